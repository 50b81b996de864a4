"""The schemes by name: what becomes of a model's weights when it is loaded.

Only products are quantised. Embeddings, norms, biases and the routers of experts stay as they
are, and the LM head, whose errors go straight into the logits, never falls below 8 bits.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from outrider.errors import ConfigError, unknown
from outrider.ops.base import Weight
from outrider.quant import int4, int8

Quantize = Callable[[Tensor], Weight]


def unchanged(weight_OI: Tensor) -> Weight:
    """The weight as it is stored."""
    return weight_OI


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """One way to store a model's products.

    Attributes:
        layer: for products inside the layers.
        head: for the LM head.
    """

    name: str
    layer: Quantize = unchanged
    head: Quantize = unchanged

    @property
    def is_off(self) -> bool:
        return self.layer is unchanged

    @property
    def variant(self) -> str:
        """What tells the model it makes from the stored one; empty for the stored one itself."""
        return "" if self.is_off else self.name


def _int8(name: str, activation_bits: int) -> Scheme:
    quantize = partial(int8.quantize, activation_bits=activation_bits)
    return Scheme(name=name, layer=quantize, head=quantize)


AS_STORED = Scheme(name="off")
ACCURATE, FAST, FLOAT = 14, 8, 0  # bits of the inputs

SCHEMES = {
    scheme.name: scheme
    for scheme in (
        AS_STORED,
        _int8("int8", ACCURATE),
        _int8("int8-dynamic", FAST),
        _int8("int8-weight-only", FLOAT),
        Scheme(
            name="int4",
            layer=partial(int4.quantize, activation_bits=ACCURATE),
            head=partial(int8.quantize, activation_bits=ACCURATE),
        ),
    )
}


def find_scheme(name: str | None) -> Scheme:
    """The scheme behind `name`; None is "off". ConfigError for an unknown one."""
    if name is None:
        return AS_STORED
    if str(name) not in SCHEMES:
        raise ConfigError(unknown("quantization", str(name), list(SCHEMES)))
    return SCHEMES[str(name)]
