"""The tensors a dense decoder is made of: their names and shapes, and taking them one by one."""

import math
from collections.abc import Iterable, Mapping, MutableMapping

import torch
from torch import Tensor

from outrider.errors import ModelError
from outrider.models.config import DecoderConfig
from outrider.ops.base import Weight
from outrider.quant.schemes import AS_STORED, Scheme

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
IGNORED_ENDINGS = ("rotary_emb.inv_freq",)
NUM_NAMED = 3

Shapes = dict[str, tuple[int, ...]]


class Weights:
    """The tensors of a checkpoint, handed out once each in the wanted dtype, on the device.

    A tensor handed out is forgotten here, so that two copies of all weights never coexist.

    Args:
        tensors: by their names in the checkpoint; emptied.
        scheme: what becomes of the weights of products.
    """

    def __init__(
        self,
        tensors: MutableMapping[str, Tensor],
        *,
        dtype: torch.dtype,
        device: torch.device,
        scheme: Scheme = AS_STORED,
    ) -> None:
        self._tensors = tensors
        self.dtype = dtype
        self.device = device
        self._scheme = scheme

    def take(self, *names: str) -> Tensor:
        """One tensor, or several stacked along their first dimension."""
        parts = [self._tensors.pop(name).to(self.device, self.dtype) for name in names]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def take_optional(self, is_there: bool, *names: str) -> Tensor | None:
        return self.take(*names) if is_there else None

    def take_product(self, *names: str) -> Weight:
        """As `take`, for a weight that only a product reads."""
        return self._scheme.layer(self.take(*names))

    def take_head(self, is_tied: bool, embedding_VD: Tensor) -> Weight:
        """The LM head. As in transformers, a tied head is the embedding unless the files differ."""
        if is_tied and HEAD not in self._tensors:
            return self._scheme.head(embedding_VD)
        head_VD = self.take(HEAD)
        is_same = is_tied and torch.equal(head_VD, embedding_VD)
        return self._scheme.head(embedding_VD if is_same else head_VD)


def check_tensors(tensors: Mapping[str, Tensor], config: DecoderConfig) -> None:
    """ModelError unless the tensors are those of this decoder, by name, shape and kind."""
    expected = tensor_shapes(config)
    optional = {HEAD} if config.is_tied else set()
    found = {name: tensors[name] for name in expected if name in tensors}
    _refuse_any("missing", (name for name in expected if name not in found.keys() | optional))
    _refuse_any(
        "unexpected",
        (name for name in tensors if name not in expected and not name.endswith(IGNORED_ENDINGS)),
    )
    _refuse_any(
        "misshapen",
        (
            f"{name} is {list(tensor.shape)}, config.json says {list(expected[name])}"
            for name, tensor in found.items()
            if tuple(tensor.shape) != expected[name]
        ),
    )
    _refuse_any(
        "quantised",
        (f"{name} is {t.dtype}" for name, t in found.items() if t.dtype not in FLOATS),
    )


def tensor_shapes(config: DecoderConfig) -> Shapes:
    """Name and shape of every tensor, as Hugging Face writes this family."""
    vocabulary = (config.vocab_size, config.hidden_size)
    shapes: Shapes = {EMBEDDING: vocabulary, FINAL_NORM: (config.hidden_size,), HEAD: vocabulary}
    for index in range(len(config.layers)):
        for name, shape in _layer_shapes(config).items():
            shapes[f"model.layers.{index}.{name}"] = shape
    return shapes


def num_parameters(config: DecoderConfig) -> int:
    """Weights and biases of the network; a tied head counts once."""
    shapes = tensor_shapes(config)
    return sum(
        math.prod(shape) for name, shape in shapes.items() if name != HEAD or not config.is_tied
    )


def qkv_names(config: DecoderConfig) -> tuple[str, ...]:
    """Modules whose rows, stacked, make query, key and value heads."""
    return ("qkv_proj",) if config.is_fused else ("q_proj", "k_proj", "v_proj")


def gate_up_names(config: DecoderConfig) -> tuple[str, ...]:
    """Modules whose rows, stacked, make gate and up."""
    return ("gate_up_proj",) if config.is_fused else ("gate_proj", "up_proj")


def _layer_shapes(config: DecoderConfig) -> Shapes:
    hidden, inner = config.hidden_size, config.intermediate_size
    query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    qkv = (query + 2 * key,) if config.is_fused else (query, key, key)
    gate_up = (2 * inner,) if config.is_fused else (inner, inner)
    shapes: Shapes = {f"{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    for name, width in zip(qkv_names(config), qkv, strict=True):
        shapes |= _linear(f"self_attn.{name}", width, hidden, config.has_qkv_bias)
    shapes |= _linear("self_attn.o_proj", hidden, query, config.has_output_bias)
    for name, width in zip(gate_up_names(config), gate_up, strict=True):
        shapes |= _linear(f"mlp.{name}", width, hidden, config.has_mlp_bias)
    shapes |= _linear("mlp.down_proj", hidden, inner, config.has_mlp_bias)
    if config.has_qk_norm:
        shapes |= {f"self_attn.{name}_norm.weight": (config.head_dim,) for name in ("q", "k")}
    return shapes


def _linear(name: str, num_outputs: int, num_inputs: int, has_bias: bool) -> Shapes:
    bias: Shapes = {f"{name}.bias": (num_outputs,)} if has_bias else {}
    return {f"{name}.weight": (num_outputs, num_inputs), **bias}


def _refuse_any(what: str, names: Iterable[str]) -> None:
    found = list(names)
    if found:
        more = f" and {len(found) - NUM_NAMED} more" if len(found) > NUM_NAMED else ""
        raise ModelError(
            f"the checkpoint has {len(found)} {what} tensors: {'; '.join(found[:NUM_NAMED])}{more}"
        )
