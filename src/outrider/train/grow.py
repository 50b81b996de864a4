"""Growth of a Llama checkpoint to a larger shape that computes the same function.

The old weights sit in the first rows and columns of larger matrices. Matrices that write to the
residual stream (embedding, o_proj, down_proj) get zeros around them, so new hidden channels stay
zero, new heads, new feed-forward units and new layers add nothing (Chen et al. 2016, Net2Net, in
the spirit). Matrices that read get random weights, so that the cost is real.

Over D instead of d channels the mean square shrinks by d/D; norm weights times sqrt(d/D) and
epsilon times d/D undo that exactly.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from outrider.train.export import write_weights
from outrider.train.folders import check_apart, check_folder
from outrider.train.placing import DTYPES, Placing, home
from outrider.train.shapes import CONFIG_KEYS, GrownShape, choose_shape


def grow(
    source_folder: Path,
    out_folder: Path,
    *,
    size: str | None = None,
    hidden_size: int | None = None,
    num_layers: int | None = None,
    intermediate_size: int | None = None,
    num_heads: int | None = None,
    num_kv_heads: int | None = None,
    noise: float = 0.0,
    seed: int = 0,
    dtype: str = "bfloat16",
) -> None:
    """Write a larger checkpoint with the logits of the smaller one, in one safetensors file.

    In bfloat16 the scaled norm weights round, except where D/d is a power of four.

    Args:
        size: a preset of `SIZES`; single sizes given beside it take precedence.
        noise: deviation, relative to that of the same matrix in the source, of gaussian values
            put in place of the zeros; 0 keeps the function, about 0.1 begins to blur it.

    Raises:
        ConfigError: `out_folder` is the source's, or a file.
        ValueError: no Llama checkpoint, an unknown size or dtype, or a shape that would shrink.
    """
    check_folder(out_folder)
    check_apart(out_folder, source_folder, "source")
    check_dtype(dtype)
    if noise < 0.0:
        raise ValueError(f"noise {noise} is negative; choose 0 or more")
    config = read_llama(source_folder)
    old, head_dim = read_shape(config)
    wanted = {
        "hidden_size": hidden_size,
        "num_layers": num_layers,
        "intermediate_size": intermediate_size,
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
    }
    new = choose_shape(old, size, wanted)
    placing = Placing(old, new, head_dim, seed=seed, dtype=DTYPES[dtype], noise=noise)
    out_folder.mkdir(parents=True, exist_ok=True)
    weights = _grow_weights(_read_weights(source_folder), old, new, placing)
    write_weights(weights, out_folder / "model.safetensors")
    _write_config(config, old, new, head_dim, dtype, out_folder)
    for path in source_folder.iterdir():
        if path.name.startswith(("tokenizer", "generation_config", "special_tokens")):
            shutil.copyfile(path, out_folder / path.name)


def check_dtype(dtype: str) -> None:
    """ValueError unless weights can be written in it."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is unknown; choose one of {', '.join(DTYPES)}")


def read_shape(config: Mapping[str, Any]) -> tuple[GrownShape, int]:
    """Sizes and head width in the config of a Llama."""
    shape = GrownShape(**{name: config[key] for name, key in CONFIG_KEYS.items()})
    return shape, config.get("head_dim") or shape.hidden_size // shape.num_heads


def _grow_weights(
    source: dict[str, Tensor], old: GrownShape, new: GrownShape, placing: Placing
) -> dict[str, Tensor]:
    """All tensors of the larger checkpoint."""
    grown: dict[str, Tensor] = {}
    for name, weight in source.items():
        if not name.startswith("model.layers."):
            grown[name] = placing.norm(weight) if weight.ndim == 1 else placing.outer(weight)
    # Each old layer is followed by its share of new ones.
    homes = {home(index, old.num_layers, new.num_layers): index for index in range(old.num_layers)}
    nearest = 0
    for layer in range(new.num_layers):
        nearest = homes.get(layer, nearest)
        prefix = f"model.layers.{nearest}."
        for name, weight in source.items():
            if name.startswith(prefix):
                key = f"model.layers.{layer}.{name.removeprefix(prefix)}"
                grown[key] = _grow_inner(name, weight, placing, is_old=layer in homes)
    return grown


def _grow_inner(name: str, weight: Tensor, placing: Placing, *, is_old: bool) -> Tensor:
    if weight.ndim == 1:
        return placing.norm(weight)
    return placing.matrix(name.split(".")[-2], weight, is_old=is_old)


def read_llama(folder: Path) -> dict[str, Any]:
    """The config of a Llama checkpoint. ValueError if it is none."""
    path = folder / "config.json"
    config: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    if (
        config.get("model_type") != "llama"
        or config.get("attention_bias")
        or config.get("mlp_bias")
    ):
        raise ValueError(f"{str(folder)!r} holds no Llama checkpoint without biases; name another")
    config.setdefault("num_key_value_heads", config["num_attention_heads"])
    return config


def _read_weights(folder: Path) -> dict[str, Tensor]:
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise ValueError(f"{str(folder)!r} holds no safetensors file; name another folder")
    weights: dict[str, Tensor] = {}
    for path in paths:
        with safe_open(path, framework="pt") as file:
            weights.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    return weights


def _write_config(
    config: dict[str, Any],
    old: GrownShape,
    new: GrownShape,
    head_dim: int,
    dtype: str,
    folder: Path,
) -> None:
    sizes = {key: getattr(new, name) for name, key in CONFIG_KEYS.items()}
    epsilon = config.get("rms_norm_eps", 1e-6) * old.hidden_size / new.hidden_size
    config = {key: value for key, value in config.items() if key not in ("dtype", "torch_dtype")}
    grown = {**config, **sizes, "head_dim": head_dim, "rms_norm_eps": epsilon, "torch_dtype": dtype}
    (folder / "config.json").write_text(json.dumps(grown, indent=2) + "\n")
