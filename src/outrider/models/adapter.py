"""Any `transformers` causal LM over our KV pool and draft trees, through its attention interface.

The model runs on flattened rows [1, N] with explicit positions, without a cache and without masks;
its attention function is ours, and finds the pass it belongs to among its keyword arguments.

Shape legend: N rows of the pass, R rows whose logits are wanted, V vocabulary, H query heads, G
key/value heads, D/E key/value width.
"""

import inspect
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)

from outrider.errors import ModelError
from outrider.models.adapter_linear import EXPERTS, swap
from outrider.models.adapter_probe import PASS_KEY, Call, Probe, noting_mask
from outrider.models.base import ModelSpec
from outrider.models.checkpoint import eos_token_ids, fingerprint, read_config
from outrider.models.loader import pick_device, pick_dtype, stored_dtype
from outrider.ops.base import LayerKV, Layout, Ops, Span

ATTENTION = "outrider"
PROBING = "outrider_probe"
ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention", "attention"}
CHECK_TOKENS = 12

logger = logging.getLogger(__name__)


class Adapter:
    """A `Network` around a `transformers` model.

    Each pass calls the attention function the same number of times in the same order, so what a
    call owns and sees is found out once, by a probe. A second probe compares logits with the
    model's own eager attention and refuses a model that disagrees.

    Args:
        model: in eval mode and on its device; its attention implementation is set to ours.
        name, eos_token_ids, fingerprint: for the ModelSpec.

    Raises:
        ModelError: the model does something that cannot be done over our KV.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        ops: Ops,
        *,
        name: str,
        eos_token_ids: tuple[int, ...] = (),
        fingerprint: str = "",
    ) -> None:
        _refuse(model.config, type(model))
        self.model = model
        self.ops = ops
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._wants_offsets = False
        model.set_attn_implementation(PROBING)
        probe, vocab_size = self._probe()
        self._calls = probe.calls
        self._wants_offsets = any(_reads_cache_length(module) for module in probe.modules)
        model.set_attn_implementation(ATTENTION)
        self.spec = ModelSpec(
            name=name,
            family=model.config.model_type,
            vocab_size=vocab_size,
            max_positions=max_positions(model.config),
            eos_token_ids=eos_token_ids,
            kv_shapes=tuple(probe.kv_shapes),
            dtype=model.dtype,
            device=model.device,
            num_parameters=sum(p.numel() for p in model.parameters()),
            fingerprint=fingerprint,
        )
        self._check_against_eager()

    @torch.inference_mode()
    def forward(
        self, tokens_N: Tensor, layout: Layout, kv: list[LayerKV], wanted_R: Tensor
    ) -> Tensor:
        """See `Network.forward`."""
        step = _Pass(self.ops, layout, kv, self._calls)
        logits_RV = self._run(tokens_N, layout.positions_N, step, wanted_R)
        assert step.num_calls == len(self._calls), "every attention call must come in every pass"
        return logits_RV

    def _run(
        self, tokens_N: Tensor, positions_N: Tensor, step: "_Pass | Probe", wanted_R: Tensor
    ) -> Tensor:
        options: dict[str, Any] = {PASS_KEY: step}
        if self._keeps_logits:
            options["logits_to_keep"] = wanted_R
        if self._wants_offsets:
            options["past_key_values"] = _Offsets(positions_N)
        output = self.model(
            input_ids=tokens_N[None],
            position_ids=positions_N[None],
            use_cache=False,
            return_dict=True,
            **options,
        )
        logits_RV: Tensor = output.logits[0]
        return (logits_RV if self._keeps_logits else logits_RV[wanted_R]).float()

    @torch.inference_mode()
    def _probe(self) -> tuple[Probe, int]:
        probe = Probe()
        tokens_N = torch.arange(1, 5, device=self.model.device)
        try:
            logits_RV = self._run(tokens_N, tokens_N - 1, probe, tokens_N[:1])
        except (TypeError, AttributeError, NotImplementedError) as error:
            raise ModelError(
                f"{type(self.model).__name__} cannot run on flattened rows: {_line(error)}"
            ) from error
        if not probe.calls:
            raise ModelError(f"{type(self.model).__name__} has no attention layer to adapt")
        return probe, logits_RV.shape[-1]

    @torch.inference_mode()
    def _check_against_eager(self) -> None:
        """Two sequences side by side in two passes, against each alone under eager attention."""
        generator = torch.Generator().manual_seed(0)
        shape = (2, CHECK_TOKENS)
        tokens_BN = torch.randint(self.spec.vocab_size, shape, generator=generator)
        tokens_BN = tokens_BN.to(self.spec.device)
        ours_BNV = self._in_two_passes(tokens_BN)
        self.model.set_attn_implementation("eager")
        alone = [self.model(input_ids=row_N[None], use_cache=False).logits for row_N in tokens_BN]
        self.model.set_attn_implementation(ATTENTION)
        theirs_BNV = torch.cat(alone).float()
        error_BN = (ours_BNV - theirs_BNV).norm(dim=-1) / theirs_BNV.norm(dim=-1).clamp_min(1e-9)
        error = error_BN.median().item()
        if not error < (1e-3 if self.spec.dtype == torch.float32 else 0.1):
            raise ModelError(
                f"{type(self.model).__name__} gives other logits over our KV than with its own "
                f"attention (relative error {error:.1e}): this architecture is not supported"
            )

    def _in_two_passes(self, tokens_BN: Tensor) -> Tensor:
        """Logits [2, N, V], each sequence cut at another place and in another order."""
        (_, num_tokens), cut, device = tokens_BN.shape, CHECK_TOKENS // 2, tokens_BN.device
        kv = [
            LayerKV(
                torch.zeros(2 * num_tokens, s.num_heads, s.key_width, dtype=self.spec.dtype),
                torch.zeros(2 * num_tokens, s.num_heads, s.value_width, dtype=self.spec.dtype),
            )
            for s in self.spec.kv_shapes
        ]
        kv = [LayerKV(keys.to(device), values.to(device)) for keys, values in kv]
        slots = list(range(2 * num_tokens))
        one, two = slots[:num_tokens], slots[num_tokens:]
        passes = [
            [Span(one[:cut], 0, cut), Span(two[: cut - 1], 0, cut - 1)],
            [Span(two, cut - 1, num_tokens - cut + 1), Span(one, cut, num_tokens - cut)],
        ]
        logits_SV = torch.zeros(2 * num_tokens, self.spec.vocab_size, device=device)
        for spans in passes:
            layout = self.ops.layout(spans, device)
            tokens_N = tokens_BN.flatten()[layout.slots_N]
            every_N = torch.arange(len(tokens_N), device=device)
            logits_SV[layout.slots_N] = self.forward(tokens_N, layout, kv, every_N)
        return logits_SV.view(2, num_tokens, -1)


class _Pass:
    """One forward pass, as the attention function sees it: a call at a time."""

    def __init__(self, ops: Ops, layout: Layout, kv: list[LayerKV], calls: list[Call]) -> None:
        self.num_calls = 0
        self._ops = ops
        self._layout = layout
        self._kv = kv
        self._calls = calls

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, kwargs: dict[str, Any]
    ) -> Tensor:
        """From [1, H, N, D] to [1, N, H, E]."""
        call = self._calls[self.num_calls]
        self.num_calls += 1
        kv = self._kv[call.layer]
        if call.is_owner:
            self._ops.write_kv(kv, _rows(key), _rows(value), self._layout)
        scale = kwargs.get("scaling")
        out_NHE = self._ops.attend(
            _rows(query),
            kv,
            self._layout,
            scale=query.shape[-1] ** -0.5 if scale is None else float(scale),
            window=call.window,
            softcap=kwargs.get("softcap") or 0.0,
            sinks_H=kwargs.get("s_aux"),
        )
        return out_NHE[None]


class _Offsets:
    """In the place of a cache for layers that count rows from its length (Llama 4's temperature).

    Such a layer adds arange(N) to the length; a length per row makes that sum each row's position.
    """

    def __init__(self, positions_N: Tensor) -> None:
        self._offsets_N = positions_N - torch.arange(len(positions_N), device=positions_N.device)

    def get_seq_length(self, layer_idx: int = 0) -> Tensor:
        return self._offsets_N

    def update(self, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return key, value


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """The attention function we register; `transformers` layers call it."""
    step = kwargs.pop(PASS_KEY, None)
    if step is None:
        raise ModelError(
            f"{type(module).__name__} does not hand keyword arguments to its attention function: "
            "this architecture is not supported"
        )
    kwargs["attention_mask"] = attention_mask
    return step.attend(module, query, key, value, kwargs), None


AttentionInterface.register(ATTENTION, attention)
AttentionInterface.register(PROBING, attention)
AttentionMaskInterface.register(PROBING, noting_mask)


def load_adapter(
    folder: str | Path,
    *,
    dtype: str = "auto",
    device: torch.device | str = "cpu",
    ops: Ops,
    swap_linear: bool = True,
    trust_remote_code: bool = False,
    name: str | None = None,
) -> Adapter:
    """Loads the checkpoint in `folder` through `transformers`.

    Args:
        dtype: as in `loader.load_decoder`.
        swap_linear: on the CPU, multiply with `ops.linear` (packed copies beside the originals).
        trust_remote_code: run Python code that lies in the folder.
        name: what `spec.name` shall say; the folder if None.

    Raises:
        ModelError: no causal LM, or one whose state or attention cannot live in a KV pool.
    """
    folder, device = Path(folder), pick_device(device)
    chosen = pick_dtype(dtype, stored_dtype(read_config(folder)), device)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "local_files_only": True}
    config = _read(AutoConfig.from_pretrained, folder, **options)
    _refuse(config, _model_class(config))
    is_swapped = swap_linear and device.type == "cpu"
    if device.type == "cpu":
        options["experts_implementation"] = EXPERTS if is_swapped else "eager"
    options |= {"dtype": chosen, "attn_implementation": ATTENTION, "output_loading_info": True}
    model, info = _read(AutoModelForCausalLM.from_pretrained, folder, config=config, **options)
    _check_keys(folder, info)
    model = model.eval().requires_grad_(False).to(device)
    if is_swapped:
        swap(model, ops)
    return Adapter(
        model,
        ops,
        name=name or str(folder),
        eos_token_ids=eos_token_ids(folder),
        fingerprint=fingerprint(folder),
    )


def max_positions(config: PretrainedConfig) -> int:
    """Longest context on which the model is a function of a token's own path alone.

    With "longrope" the rotation of all tokens changes once any of them passes the original
    length, so contexts end there.
    """
    text = config.get_text_config(decoder=True)
    length = getattr(text, "max_position_embeddings", None)
    if not isinstance(length, int):
        raise ModelError(f"{config.model_type!r} states no max_position_embeddings in config.json")
    ropes = getattr(text, "rope_parameters", None) or {}
    for rope in [ropes, *(value for value in ropes.values() if isinstance(value, dict))]:
        if rope.get("rope_type") == "longrope":
            length = min(length, rope.get("original_max_position_embeddings", length))
    return length


def _read(read: Any, folder: Path, **options: Any) -> Any:
    try:
        return read(folder, **options)
    except (OSError, ValueError, KeyError, TypeError, ImportError, RuntimeError) as error:
        raise ModelError(f"transformers cannot load {str(folder)!r}: {_line(error)}") from error


def _model_class(config: PretrainedConfig) -> type[PreTrainedModel] | None:
    """The class AutoModelForCausalLM picks; None for code that comes with the checkpoint."""
    if "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        return None
    if config.is_encoder_decoder:
        raise ModelError(f"{config.model_type!r} is an encoder-decoder: only causal LMs can run")
    mapping = AutoModelForCausalLM._model_mapping
    if type(config) not in mapping:
        raise ModelError(f"{config.model_type!r} is no causal LM in this version of transformers")
    found = mapping[type(config)]
    return found[0] if isinstance(found, tuple) else found


def _refuse(config: PretrainedConfig, model_class: type[PreTrainedModel] | None) -> None:
    """ModelError for what can be known before any weight is read."""
    text = config.get_text_config(decoder=True)
    kinds = getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None) or []
    states = sorted(set(kinds) - ATTENTION_LAYERS)
    is_recurrent = model_class is not None and model_class._is_stateful and not kinds
    if states or is_recurrent:
        raise ModelError(
            f"{config.model_type!r} has layers that keep more than keys and values "
            f"({', '.join(states) or 'recurrent'}): their state could not be rolled back"
        )
    if model_class is not None and not model_class._supports_attention_backend:
        raise ModelError(
            f"{model_class.__name__} does not use the attention interface of transformers: logits "
            "over our KV would be silently wrong"
        )


def _check_keys(folder: Path, info: dict[str, Any]) -> None:
    for kind in ("missing_keys", "mismatched_keys"):
        keys = [str(key) for key in info.get(kind) or ()]
        if keys:
            raise ModelError(
                f"{str(folder)!r} has {len(keys)} {kind.replace('_', ' ')} ({', '.join(keys[:3])}"
                f"{', ...' if keys[3:] else ''}): the checkpoint does not fit its config.json"
            )
    unused = [str(key) for key in info.get("unexpected_keys") or ()]
    if unused:
        names = ", ".join(sorted(unused)[:3])
        logger.warning("%s: %d weights have no place in the model (%s)", folder, len(unused), names)


def _reads_cache_length(module: nn.Module) -> bool:
    """Whether a layer counts its rows from the cache's length instead of `position_ids`."""
    return "get_seq_length" in inspect.getsource(type(module))


def _rows(heads: Tensor) -> Tensor:
    """From [1, H, N, D] to [N, H, D]."""
    return heads[0].transpose(0, 1).contiguous()


def _line(error: Exception) -> str:
    """The first line of a message, for errors of others."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
