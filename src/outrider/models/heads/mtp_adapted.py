"""AdaptedLayer: one layer like those of a `transformers` target, with tensors of its own.

It is made by the class of the target's layer, and called as the model calls that: what the model
hands its layers is seen in a trial pass, and made anew for every pass.

Shape legend: N rows of a pass, H hidden width.
"""

import inspect
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from outrider.cache.pool import KVPool
from outrider.errors import ConfigError, ModelError
from outrider.models.adapter import ATTENTION, PROBING, Adapter, Pass
from outrider.models.adapter_linear import swap
from outrider.models.adapter_probe import PASS_KEY, Probe, first_line
from outrider.models.adapter_states import States
from outrider.models.base import ShowsStates
from outrider.ops.base import LayerKV, Layout, Ops, Span

REMEDY = "use another drafter for this target"
_EXPERT = re.compile(r"(.*experts\.)(\d+)\.(gate|up|down)_proj\.weight$")
EVERY_PASS = ("attention_mask", "cache_position", "position_embeddings", "position_ids", PASS_KEY)


class AdaptedLayer:
    """A decoder layer over KV of its own; attention is that of the adapter.

    Args:
        index: of the target's layer that it is like.
        tensors: by their names within a layer, experts one by one or together.

    Raises:
        ConfigError: the layer keeps more than keys and values, or is called with what cannot be
            made anew, or the tensors are not those of its class.
    """

    def __init__(
        self, target: ShowsStates, index: int, tensors: Mapping[str, Tensor], ops: Ops
    ) -> None:
        if not isinstance(target, Adapter):
            raise ConfigError(
                f"MTP modules run over the lean decoder or a transformers model, not over "
                f"{type(target).__name__}: {REMEDY}"
            )
        self.ops = ops
        self._name = target.spec.name
        self._model = target.model
        theirs = States(target.model).layers[index]
        with self._one_line():
            self._called = _watch(target, theirs)
            self._layer = _make(theirs, index, tensors, ops)
            probe = Probe()
            self._called.run(self._layer, self._called.first_NH, self._called.positions_N, probe)
        self._calls = probe.calls
        self._check(probe)
        (self.kv_shape,) = probe.kv_shapes
        self.norm_eps = _norm_eps(theirs)
        with self._one_line():
            self._try(target)

    @torch.inference_mode()
    def __call__(self, hidden_NH: Tensor, layout: Layout, kv: LayerKV) -> Tensor:
        step = Pass(self.ops, layout, [kv], self._calls)
        return self._called.run(self._layer, hidden_NH, layout.positions_N, step)

    def by_layer(self) -> "AdaptedLayer":
        """Itself: nothing here is fused."""
        return self

    def _check(self, probe: Probe) -> None:
        if len(probe.kv_shapes) != 1 or not all(call.is_owner for call in probe.calls):
            raise ConfigError(
                f"the MTP module of {self._name!r} has a layer without keys and values of its own "
                f"(it is like {type(self._layer).__name__}): {REMEDY}"
            )
        if any("get_seq_length" in inspect.getsource(type(m)) for m in probe.modules):
            raise ConfigError(
                f"the MTP module of {self._name!r} has a layer that counts rows of a cache, which "
                f"it does not have here: {REMEDY}"
            )

    def _try(self, target: Adapter) -> None:
        """A pass of two rows."""
        spec = target.spec
        (kv,) = KVPool((self.kv_shape,), 1, 2, spec.dtype, spec.device).layers
        layout = self.ops.layout([Span([0, 1], 0, 2)], spec.device)
        self(self._called.first_NH[:2], layout, kv)

    @contextmanager
    def _one_line(self) -> Iterator[None]:
        kinds = (TypeError, AttributeError, LookupError, RuntimeError, ValueError, ModelError)
        try:
            yield
        except ConfigError:
            raise
        except kinds as error:
            raise ConfigError(
                f"the MTP module of {self._name!r} cannot be run as a layer of its own "
                f"({first_line(error)}): {REMEDY}"
            ) from error


class _Turning(NamedTuple):
    """How the model makes what turns queries and keys: a module, and its other arguments."""

    module: nn.Module
    arguments: dict[str, Any]

    def at(self, hidden_1NH: Tensor, positions_1N: Tensor) -> Any:
        first = next(iter(inspect.signature(self.module.forward).parameters))
        return self.module(**{**self.arguments, first: hidden_1NH, "position_ids": positions_1N})


class _Called(NamedTuple):
    """How the model calls one of its layers.

    Attributes:
        constants: keyword arguments that are the same in every pass.
        varying: names of those that are made for every pass.
        first_NH, positions_N: of the trial pass.
    """

    constants: dict[str, Any]
    varying: frozenset[str]
    turning: _Turning | None
    mask: Any
    first_NH: Tensor
    positions_N: Tensor

    def run(
        self, layer: nn.Module, hidden_NH: Tensor, positions_N: Tensor, step: "Pass | Probe"
    ) -> Tensor:
        """hidden_NH behind the layer."""
        hidden_1NH, positions_1N = hidden_NH[None], positions_N[None]
        made: dict[str, Any] = {
            PASS_KEY: step,
            "position_ids": positions_1N,
            "cache_position": positions_N,
            "attention_mask": self.mask if isinstance(step, Probe) else None,
        }
        if self.turning is not None:
            made["position_embeddings"] = self.turning.at(hidden_1NH, positions_1N)
        given = {name: made[name] for name in self.varying}
        output = layer(hidden_1NH, **given, **self.constants)
        behind_1NH: Tensor = output[0] if isinstance(output, tuple) else output
        return behind_1NH[0]


@torch.inference_mode()
def _watch(target: Adapter, layer: nn.Module) -> _Called:
    """One trial pass of the target, seen from one of its layers."""
    model, rotary = target.model, getattr(target.model.get_decoder(), "rotary_emb", None)
    seen: list[dict[str, Any]] = []
    turns: list[tuple[_Turning, Any]] = []

    def note_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(_bound(module, args, kwargs))

    def note_turn(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        turns.append((_Turning(module, _bound(module, args, kwargs)), output))

    tokens_N = torch.arange(1, 5, device=target.spec.device)
    model.set_attn_implementation(PROBING)
    with ExitStack() as stack:
        stack.callback(model.set_attn_implementation, ATTENTION)
        stack.callback(layer.register_forward_pre_hook(note_call, with_kwargs=True).remove)
        if isinstance(rotary, nn.Module):
            stack.callback(rotary.register_forward_hook(note_turn, with_kwargs=True).remove)
        model(
            input_ids=tokens_N[None],
            position_ids=tokens_N[None] - 1,
            use_cache=False,
            return_dict=True,
            **{PASS_KEY: Probe()},
        )
    return _called(seen[0], turns, tokens_N - 1)


def _called(
    given: dict[str, Any], turns: list[tuple[_Turning, Any]], positions_N: Tensor
) -> _Called:
    hidden_1NH = given.pop(next(iter(given)))
    turned = given.get("position_embeddings")
    turning = next((turn for turn, output in turns if output is turned), None)
    if turned is not None and turning is None:
        raise ConfigError(f"the model makes position embeddings in an unknown way: {REMEDY}")
    constants = {name: value for name, value in given.items() if name not in EVERY_PASS}
    strange = [name for name, value in constants.items() if isinstance(value, Tensor)]
    if strange:
        raise ConfigError(
            f"the model hands its layers {strange[0]!r}, which an MTP module has none of: {REMEDY}"
        )
    return _Called(
        constants=constants,
        varying=frozenset(given) & frozenset(EVERY_PASS),
        turning=turning,
        mask=given.get("attention_mask"),
        first_NH=hidden_1NH[0],
        positions_N=positions_N,
    )


def _bound(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a call by name, the first one first."""
    signature = inspect.signature(module.forward)
    arguments = dict(signature.bind(*args, **kwargs).arguments)
    extra = next((p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD), "")
    more = arguments.pop(extra, {})
    return {**arguments, **more}


def _make(theirs: nn.Module, index: int, tensors: Mapping[str, Tensor], ops: Ops) -> nn.Module:
    """A layer of the class of theirs with these tensors, and with products as theirs are done."""
    config = next(module.config for module in theirs.modules() if hasattr(module, "config"))
    with torch.device("meta"):
        made = type(theirs)(config, index)
    state = _fitted(tensors, theirs.state_dict())
    for name, buffer in theirs.named_buffers():
        if name not in state:  # a constant, not to be found in files
            _set_buffer(made, name, buffer)
    made.load_state_dict(state, assign=True)
    made = made.eval().requires_grad_(False)
    if any("forward" in vars(module) for module in theirs.modules()):
        swap(made, ops)
    return made


def _set_buffer(module: nn.Module, name: str, buffer: Tensor) -> None:
    path, _, last = name.rpartition(".")
    module.get_submodule(path).register_buffer(last, buffer, persistent=False)


def _fitted(tensors: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as the class names and shapes them, in the dtype and place of the target's."""
    named = _with_experts_together(tensors)
    strange = sorted(named.keys() ^ state.keys())
    if strange:
        raise ConfigError(
            f"the tensors of the MTP module and of the target's layer differ ({strange[0]}): "
            f"transformers stores this family in a way that is not served; {REMEDY}"
        )
    wrong = [name for name, tensor in named.items() if tensor.shape != state[name].shape]
    if wrong:
        raise ConfigError(
            f"{wrong[0]} of the MTP module is {list(named[wrong[0]].shape)}, in the target's "
            f"layer it is {list(state[wrong[0]].shape)}: {REMEDY}"
        )
    return {name: tensor.to(state[name]) for name, tensor in named.items()}


def _with_experts_together(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Experts stored one by one as `transformers` keeps them: gate over up, and down, stacked."""
    result: dict[str, Tensor] = {}
    split: dict[str, dict[str, dict[int, Tensor]]] = {}
    for name, tensor in tensors.items():
        match = _EXPERT.match(name)
        if match is None:
            result[name] = tensor
        else:
            split.setdefault(match[1], {}).setdefault(match[3], {})[int(match[2])] = tensor
    for start, kinds in split.items():
        gate, up, down = (_stacked(kinds[kind]) for kind in ("gate", "up", "down"))
        result[f"{start}gate_up_proj"] = torch.cat((gate, up), dim=1)
        result[f"{start}down_proj"] = down
    return result


def _stacked(by_number: dict[int, Tensor]) -> Tensor:
    return torch.stack([by_number[number] for number in sorted(by_number)])


def _norm_eps(layer: nn.Module) -> float:
    """Of the norm before its attention, as its class calls it."""
    norm = layer.get_submodule("input_layernorm")
    return float(getattr(norm, "variance_epsilon", getattr(norm, "eps", 1e-6)))
