"""Puts batch-invariant linear kernels under a `transformers` model, where its matrix products are.

Covered: `nn.Linear`, GPT-2's `Conv1D`, routers and other small modules that call `F.linear` on
their own weight, and experts that dispatch through `ExpertsInterface`. Not covered: products
written out in a layer's own code (Llama 4's experts, Gemma 3n's AltUp, routers that cast their
weight first); there a row may differ in its last bits with its company. It also may where a width
is no multiple of 32: element-wise kernels of torch treat the last values of a tensor apart.

The packed weights live beside the originals, which other code may read.

Shape legend: N rows, I/O input/output width, k experts of a token.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel
from transformers.integrations.moe import ExpertsInterface
from transformers.pytorch_utils import Conv1D

from outrider.ops.base import Linear, Ops
from outrider.quant.schemes import Quantize, Scheme, unchanged

EXPERTS = "outrider"
PACKED = "outrider_experts"
GATES = ("gate", "shared_expert_gate", "wg")  # of experts; a feed-forward layer's is "gate_proj"


def swap(model: nn.Module, ops: Ops) -> None:
    """Replaces the products of every module of `model` by `ops.linear`; done in place, once."""
    for module in model.modules():
        weight: Any = getattr(module, "weight", None)
        if _is_product(module):
            _replace(module, ops, unchanged)
        elif isinstance(weight, nn.Parameter) and weight.ndim == 2 and not _is_lookup(module):
            _set_forward(module, _intercepted(module.forward, weight, ops))


def quantize(model: PreTrainedModel, ops: Ops, scheme: Scheme) -> None:
    """Replaces products of a swapped model by those of quantised weights.

    Routers and gates stay in float, whether `nn.Linear` or with a product of their own: they are
    small, and a token sent to another expert is another answer. So do lookups and what `swap`
    does not cover.
    """
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if _is_product(module) and not _is_router(name):
            _replace(module, ops, scheme.head if module is head else scheme.layer)


def experts(module: Any, hidden_NI: Tensor, index_Nk: Tensor, weights_Nk: Tensor) -> Tensor:
    """Mixture of experts, expert by expert; a row adds up its experts in order of their index."""
    ups, downs = getattr(module, PACKED)
    activate = module._apply_gate if module.has_gate else module.act_fn
    out_NI = torch.zeros_like(hidden_NI)
    for expert in index_Nk.unique().tolist():
        if expert >= len(ups):
            continue  # a router's way to say "no expert"
        rows, choice = torch.where(index_Nk == expert)
        y = downs[expert](activate(ups[expert](hidden_NI[rows])))
        if getattr(module, "has_post_expert_norm", False):
            y = module.post_expert_norm(y)
        y = y * weights_Nk[rows, choice, None]
        out_NI.index_add_(0, rows, y.to(out_NI.dtype))
    return out_NI


ExpertsInterface.register(EXPERTS, experts)


class _Intercept(TorchFunctionMode):
    """Answers `F.linear` on one weight, wherever a module's own code calls it."""

    def __init__(self, weight_OI: Tensor, ops: Ops) -> None:
        self._weight_OI = weight_OI
        self._ops = ops
        self._linear: Linear | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_ours = func is F.linear and not kwargs and args[1] is self._weight_OI
        if not is_ours:
            return func(*args, **(kwargs or {}))
        if self._linear is None:
            self._linear = self._ops.linear(self._weight_OI, *args[2:])
        return _over_leading(self._linear)(args[0])


def _intercepted(forward: Callable[..., Any], weight_OI: Tensor, ops: Ops) -> Callable[..., Any]:
    mode = _Intercept(weight_OI, ops)

    def run(*args: Any, **kwargs: Any) -> Any:
        with mode:
            return forward(*args, **kwargs)

    return run


def _over_leading(linear: Linear) -> Linear:
    """Our kernels take [N, I]; modules hand [..., I], sometimes without rows."""

    def run(x: Tensor) -> Tensor:
        flat_NI = x.reshape(-1, x.shape[-1])
        some_NI = flat_NI if len(flat_NI) else flat_NI.new_zeros(1, x.shape[-1])
        y_NO = linear(some_NI)[: len(flat_NI)]
        return y_NO.view(*x.shape[:-1], y_NO.shape[-1])

    return run


def _is_product(module: nn.Module) -> bool:
    is_linear = type(module).forward is nn.Linear.forward
    return is_linear or isinstance(module, Conv1D) or _is_experts(module)


def _is_router(name: str) -> bool:
    """Whether a module's path through the model names a router, or the gate of experts."""
    return any(part in GATES or "router" in part for part in name.split("."))


def _replace(module: Any, ops: Ops, quantize: Quantize) -> None:
    if _is_experts(module):
        setattr(module, PACKED, _pack_experts(module, ops, quantize))
        return
    weight_OI = module.weight.t().contiguous() if isinstance(module, Conv1D) else module.weight
    _set_forward(module, _over_leading(ops.linear(quantize(weight_OI), module.bias)))


def _set_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    module.forward = forward


def _is_lookup(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding | nn.EmbeddingBag)


def _is_experts(module: nn.Module) -> bool:
    """Whether the class went through `use_experts_implementation`."""
    return hasattr(module, "is_transposed") and hasattr(module, "has_gate")


def _pack_experts(
    module: nn.Module, ops: Ops, quantize: Quantize
) -> tuple[list[Linear], list[Linear]]:
    names = ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")
    ups, downs = ([*_packed(module, name, ops, quantize)] for name in names)
    return ups, downs


def _packed(module: nn.Module, name: str, ops: Ops, quantize: Quantize) -> list[Linear]:
    weights = getattr(module, name).detach()
    weights = weights.transpose(1, 2) if module.is_transposed else weights
    biases = getattr(module, f"{name}_bias") if module.has_bias else [None] * len(weights)
    pairs = zip(weights, biases, strict=True)
    return [ops.linear(quantize(weight.contiguous()), bias) for weight, bias in pairs]
