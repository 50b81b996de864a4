"""Any `transformers` causal LM over our KV pool and draft trees, through its attention interface.

The model runs on flattened rows [1, N] with explicit positions, without a cache and without masks;
its attention function is ours, and finds the pass it belongs to among its keyword arguments.

Shape legend: N rows of the pass, R rows whose logits are wanted, V vocabulary, H query heads, G
key/value heads, D/E key/value width.
"""

import inspect
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
)

from outrider.errors import ModelError
from outrider.models.adapter_config import max_positions, model_class, refuse
from outrider.models.adapter_linear import EXPERTS, quantize, swap
from outrider.models.adapter_probe import (
    PASS_KEY,
    Call,
    Probe,
    check_against_eager,
    first_line,
    noting_mask,
    one_line,
)
from outrider.models.adapter_states import States
from outrider.models.base import ModelSpec
from outrider.ops.base import LayerKV, Layout, Ops, Passed
from outrider.quant.schemes import AS_STORED, Scheme

ATTENTION = "outrider"
PROBING = "outrider_probe"

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
        refuse(model.config, type(model))
        self.model = model
        self.ops = ops
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._wants_offsets = False
        with one_line(model):
            probe, vocab_size = self._probe()
        self._calls = probe.calls
        self._states = States(model)
        self._head = model.get_output_embeddings()
        hidden_size = self._find_states()
        self._wants_offsets = any(_reads_cache_length(module) for module in probe.modules)
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
            hidden_size=hidden_size,
            num_layers=len(self._states.layers) if hidden_size else 0,
        )
        with one_line(model):
            check_against_eager(self, model)

    @torch.inference_mode()
    def forward(
        self, tokens_N: Tensor, layout: Layout, kv: list[LayerKV], wanted_R: Tensor
    ) -> Tensor:
        """See `Network.forward`."""
        step = Pass(self.ops, layout, kv, self._calls)
        logits_RV = self._run(tokens_N, layout.positions_N, step, wanted_R)
        assert step.num_calls == len(self._calls), "every attention call must come in every pass"
        return logits_RV

    def forward_tapped(
        self,
        tokens_N: Tensor,
        layout: Layout,
        kv: list[LayerKV],
        wanted_R: Tensor,
        taps: Sequence[int],
    ) -> Passed:
        """See `ShowsStates`; only where `spec.hidden_size` is not 0."""
        with self._states.caught(taps) as found:
            logits_RV = self.forward(tokens_N, layout, kv, wanted_R)
        return Passed(logits_RV, self._states.stack(found, taps))

    @torch.inference_mode()
    def embed(self, tokens_N: Tensor) -> Tensor:
        """See `ShowsStates`."""
        embedded_ND: Tensor = self.model.get_input_embeddings()(tokens_N)
        return embedded_ND

    @torch.inference_mode()
    def final_norm(self, hidden_ND: Tensor) -> Tensor:
        """See `ShowsStates`."""
        assert self._states.norm is not None
        normed_ND: Tensor = self._states.norm(hidden_ND)
        return normed_ND

    @torch.inference_mode()
    def head(self, hidden_RD: Tensor) -> Tensor:
        """See `ShowsStates`."""
        assert self._head is not None
        logits_RV: Tensor = self._head(hidden_RD)
        return logits_RV.float()

    @torch.inference_mode()
    def _find_states(self) -> int:
        """Hidden width, if the states behind the last norm are what the head reads; else 0."""
        if self._states.norm is None or self._head is None:
            return 0
        taps = range(len(self._states.layers) + 1)
        tokens_N = torch.arange(1, 5, device=self.model.device)
        self.model.set_attn_implementation(PROBING)
        with self._states.caught(taps) as found:
            logits_RV = self._run(tokens_N, tokens_N - 1, Probe(), tokens_N[:2])
        self.model.set_attn_implementation(ATTENTION)
        if any(found[boundary].shape[:-1] != (1, len(tokens_N)) for boundary in taps):
            return 0
        last_ND = self.final_norm(found[len(self._states.layers)][0])
        is_plain = torch.allclose(self.head(last_ND[1:3]), logits_RV, rtol=1e-3, atol=1e-3)
        return last_ND.shape[-1] if is_plain else 0

    def _run(
        self, tokens_N: Tensor, positions_N: Tensor, step: "Pass | Probe", wanted_R: Tensor
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
        self.model.set_attn_implementation(PROBING)
        logits_RV = self._run(tokens_N, tokens_N - 1, probe, tokens_N[:1])
        self.model.set_attn_implementation(ATTENTION)
        if not probe.calls:
            raise ModelError(f"{type(self.model).__name__} has no attention layer to adapt")
        return probe, logits_RV.shape[-1]


class Pass:
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
        """From [1, H, N, D] to [1, N, H, E], contiguous as layers expect it."""
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
        return out_NHE.contiguous()[None]


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
    dtype: torch.dtype,
    device: torch.device,
    ops: Ops,
    swap_linear: bool = True,
    trust_remote_code: bool = False,
    name: str | None = None,
    eos_token_ids: tuple[int, ...] = (),
    fingerprint: str = "",
    scheme: Scheme = AS_STORED,
) -> Adapter:
    """Loads the checkpoint in `folder` through `transformers`.

    Args:
        swap_linear: on the CPU, and wherever weights are quantised, multiply with `ops.linear`
            (packed copies beside the originals).
        trust_remote_code: run Python code that lies in the folder.
        name, eos_token_ids, fingerprint: for the ModelSpec; the name is the folder if None.
        scheme: how products are quantised, after the check against eager attention: rounding
            inputs turns last bits into steps, which the check would blame on the attention.

    Raises:
        ModelError: no causal LM, or one whose state or attention cannot live in a KV pool.
    """
    if not Path(folder).is_dir():
        raise ModelError(f"{str(folder)!r} is no folder: give one with config.json and weights")
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "local_files_only": True}
    config = _read(AutoConfig.from_pretrained, folder, **options)
    refuse(config, model_class(config))
    is_swapped = swap_linear and (device.type == "cpu" or not scheme.is_off)
    if is_swapped or device.type == "cpu":
        options["experts_implementation"] = EXPERTS if is_swapped else "eager"
    options |= {"dtype": dtype, "attn_implementation": ATTENTION, "output_loading_info": True}
    model, info = _read(AutoModelForCausalLM.from_pretrained, folder, config=config, **options)
    _check_keys(folder, info)
    model = model.eval().requires_grad_(False).to(device)
    if is_swapped:
        swap(model, ops)
    adapter = Adapter(
        model,
        ops,
        name=name or str(folder),
        eos_token_ids=eos_token_ids,
        fingerprint=fingerprint,
    )
    if not scheme.is_off:
        assert is_swapped, "what is not swapped cannot be quantised"
        quantize(model, ops, scheme)
    return adapter


def _read(read: Any, folder: str | Path, **options: Any) -> Any:
    try:
        return read(folder, **options)
    except (OSError, ValueError, KeyError, TypeError, ImportError, RuntimeError) as error:
        raise ModelError(
            f"transformers cannot load {str(folder)!r}: {first_line(error)}"
        ) from error


def _check_keys(folder: str | Path, info: dict[str, Any]) -> None:
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
