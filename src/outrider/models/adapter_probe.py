"""What tiny passes tell about a `transformers` model: the KV each attention call owns and sees.

The mask function registered here draws no mask that anyone applies: it hands the attention function
a note on the window that the model meant. So windows come from the model's own code, not from
guesses about its configuration.

Shape legend: T rows of the probe, H query heads, G key/value heads, D/E key/value width, B
sequences, N tokens of each, S slots, V vocabulary.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from outrider.errors import ModelError
from outrider.models.base import KVShape, ModelSpec, Network
from outrider.ops.base import LayerKV, Span, Window

PASS_KEY = "outrider"
NOTE = "outrider_window"
HARMLESS = {"cache_position", "dropout", "is_causal", "position_ids", "sliding_window"}
HONOURED = {PASS_KEY, "s_aux", "scaling", "softcap"}
CHECK_TOKENS = 12
PLAIN_POSITIONS = (0, 1, 2, 3, 7, 64, 65, 1000, 4097, 100_000)


class Call(NamedTuple):
    """One call of the attention function within a pass.

    Attributes:
        layer: index into the KV pool.
        is_owner: whether it writes its keys there; otherwise an earlier call has (shared KV).
        window: which earlier positions it sees.
    """

    layer: int
    is_owner: bool
    window: Window


class Probe:
    """Takes the place of a pass, and records instead of attending.

    Attributes:
        calls: one per attention call, in order.
        kv_shapes: one per layer that owns KV.
        modules: the module behind each call.
    """

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.kv_shapes: list[KVShape] = []
        self.modules: list[nn.Module] = []
        self._keys: list[Tensor] = []

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, kwargs: dict[str, Any]
    ) -> Tensor:
        """Notes the call; the result is zeros [1, T, H, E]."""
        window = _window_of(module, kwargs.pop("attention_mask"))
        _check_arguments(module, kwargs)
        layer = next((i for i, known in enumerate(self._keys) if known is key), len(self._keys))
        is_owner = layer == len(self._keys)
        if is_owner:
            self._keys.append(key)
            self.kv_shapes.append(KVShape(key.shape[1], key.shape[-1], value.shape[-1]))
        self.calls.append(Call(layer, is_owner, window))
        self.modules.append(module)
        return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[-1])


def noting_mask(
    *,
    q_length: int,
    kv_length: int,
    mask_function: Callable[..., Tensor],
    device: torch.device,
    local_size: int | None = None,
    **_: Any,
) -> Tensor:
    """A mask function for `transformers`: an empty mask that carries the window it stands for."""
    mask = torch.zeros(1, 1, q_length, kv_length, dtype=torch.bool, device=device)
    setattr(mask, NOTE, read_window(mask_function, local_size or 0, device))
    return mask


def read_window(
    mask_function: Callable[..., Tensor], size: int, device: torch.device | str = "cpu"
) -> Window | None:
    """The window `mask_function` draws, tried around every edge; None if it draws no window."""
    edges = {max(0, n * size + d) for n in range(4) for d in (-1, 0, 1)} if size else set()
    positions_P = torch.tensor(sorted({*PLAIN_POSITIONS, *edges}), device=device)
    row, key = positions_P[:, None], positions_P[None, :]
    try:
        drawn_PP = mask_function(0, 0, row, key)
    except (IndexError, RuntimeError):
        return None  # it looks into a tensor of this pass: padding, images, packed sequences
    candidates = [Window(sliding=size), Window(chunk=size)] if size else [Window()]
    for window in candidates:
        seen_PP = key <= row
        if window.sliding:
            seen_PP = seen_PP & (key > row - window.sliding)
        if window.chunk:
            seen_PP = seen_PP & (key // window.chunk == row // window.chunk)
        if torch.equal(drawn_PP.expand_as(seen_PP), seen_PP):
            return window
    return None


@torch.inference_mode()
def check_against_eager(network: Network, model: PreTrainedModel) -> None:
    """Two sequences side by side over our KV, against each alone under eager attention.

    The median over rows is judged: at half precision a router may send a row elsewhere.
    """
    ours = model.config._attn_implementation
    generator = torch.Generator().manual_seed(0)
    num_tokens = network.spec.vocab_size // 2  # placeholders of images stand at the end
    tokens_BN = torch.randint(num_tokens, (2, CHECK_TOKENS), generator=generator)
    tokens_BN = tokens_BN.to(network.spec.device)
    ours_BNV = _in_two_passes(network, tokens_BN)
    model.set_attn_implementation("eager")
    alone = [model(input_ids=row_N[None], use_cache=False).logits for row_N in tokens_BN]
    model.set_attn_implementation(ours)
    theirs_BNV = torch.cat(alone).float()
    error_BN = (ours_BNV - theirs_BNV).norm(dim=-1) / theirs_BNV.norm(dim=-1).clamp_min(1e-9)
    error = error_BN.median().item()
    if not error < (1e-3 if network.spec.dtype == torch.float32 else 0.1):
        raise ModelError(
            f"{type(model).__name__} gives other logits over our KV than with its own attention "
            f"(relative error {error:.1e}): this architecture is not supported"
        )


@contextmanager
def one_line(model: PreTrainedModel) -> Iterator[None]:
    """Turns what a model's own code raises in a trial pass into a ModelError."""
    kinds = (TypeError, AttributeError, LookupError, RuntimeError, NotImplementedError)
    try:
        yield
    except kinds as error:
        raise ModelError(
            f"{type(model).__name__} cannot run on flattened rows: {first_line(error)}"
        ) from error


def first_line(error: Exception) -> str:
    """The first line of somebody else's message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _in_two_passes(network: Network, tokens_BN: Tensor) -> Tensor:
    """logits_BNV of two sequences, each cut at another place and in another order."""
    num_tokens, cut, device = tokens_BN.shape[1], CHECK_TOKENS // 2, tokens_BN.device
    kv = _small_pool(network.spec, tokens_BN.numel())
    slots = list(range(tokens_BN.numel()))
    one, two = slots[:num_tokens], slots[num_tokens:]
    passes = [
        [Span(one[:cut], 0, cut), Span(two[: cut - 1], 0, cut - 1)],
        [Span(two, cut - 1, num_tokens - cut + 1), Span(one, cut, num_tokens - cut)],
    ]
    logits_SV = torch.zeros(len(slots), network.spec.vocab_size, device=device)
    for spans in passes:
        layout = network.ops.layout(spans, device)
        tokens_N = tokens_BN.flatten()[layout.slots_N]
        every_N = torch.arange(len(tokens_N), device=device)
        logits_SV[layout.slots_N] = network.forward(tokens_N, layout, kv, every_N)
    return logits_SV.view(*tokens_BN.shape, -1)


def _small_pool(spec: ModelSpec, num_slots: int) -> list[LayerKV]:
    kind: Any = {"dtype": spec.dtype, "device": spec.device}
    return [
        LayerKV(
            torch.zeros(num_slots, shape.num_heads, shape.key_width, **kind),
            torch.zeros(num_slots, shape.num_heads, shape.value_width, **kind),
        )
        for shape in spec.kv_shapes
    ]


def _window_of(module: nn.Module, mask: Tensor | None) -> Window:
    window = getattr(mask, NOTE, None)
    if window is None:
        raise ModelError(
            f"{type(module).__name__} attends under a mask that is neither causal, nor a sliding "
            "window, nor chunked: this model cannot run over our KV"
        )
    assert isinstance(window, Window)
    return window


def _check_arguments(module: nn.Module, kwargs: dict[str, Any]) -> None:
    """ModelError for anything that would change attention and that we would not honour."""
    is_causal = kwargs.get("is_causal")
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    if not is_causal:
        raise ModelError(f"{type(module).__name__} is not causal: it cannot go token by token")
    for name, value in kwargs.items():
        is_switch = value is None or isinstance(value, bool)
        if not is_switch and name not in HARMLESS and name not in HONOURED:
            raise ModelError(
                f"{type(module).__name__} passes {name!r} to its attention function, which we do "
                "not support: logits would be wrong"
            )
