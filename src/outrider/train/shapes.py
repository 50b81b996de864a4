"""The sizes that growth may raise, and the presets for the demo target."""

from dataclasses import dataclass, fields


@dataclass(frozen=True, kw_only=True)
class GrownShape:
    """Sizes that growth may raise; the names are those of the HF config after `CONFIG_KEYS`."""

    hidden_size: int
    num_layers: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int


SIZES = {
    "135m": GrownShape(
        hidden_size=768, num_layers=21, intermediate_size=2048, num_heads=12, num_kv_heads=4
    ),
    "1b": GrownShape(
        hidden_size=1536, num_layers=28, intermediate_size=6144, num_heads=24, num_kv_heads=8
    ),
}
CONFIG_KEYS = {
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "intermediate_size": "intermediate_size",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
}


def choose_shape(old: GrownShape, size: str | None, wanted: dict[str, int | None]) -> GrownShape:
    """The preset `size`, or `old` without one, with every size in `wanted` that is not None.

    Raises:
        ValueError: an unknown preset, a size below the old one, or head counts that do not fit.
    """
    if size is not None and size not in SIZES:
        raise ValueError(f"size {size!r} is unknown; choose one of {', '.join(SIZES)}")
    base = old if size is None else SIZES[size]
    sizes = {
        name: getattr(base, name) if value is None else value for name, value in wanted.items()
    }
    new = GrownShape(**sizes)
    for field in fields(GrownShape):
        before, after = getattr(old, field.name), getattr(new, field.name)
        if after < before:
            raise ValueError(f"{field.name} {after} is below the source's {before}; only raise it")
    if new.hidden_size % new.num_heads:
        raise ValueError(
            f"hidden_size {new.hidden_size} is no multiple of num_heads {new.num_heads}; "
            "transformers refuses such a config"
        )
    group = old.num_heads // old.num_kv_heads
    if new.num_heads % new.num_kv_heads or new.num_heads // new.num_kv_heads < group:
        raise ValueError(
            f"num_heads {new.num_heads} is no multiple, by {group} or more, of num_kv_heads "
            f"{new.num_kv_heads}; the source has {group} heads per kv head"
        )
    return new
