"""Growth of a Llama checkpoint to a larger shape that computes the same function.

The old weights sit in the first rows and columns of larger matrices. Matrices that write to the
residual stream (embedding, o_proj, down_proj) get zeros around them, so new hidden channels stay
zero, new heads, new feed-forward units and new layers add nothing (Chen et al. 2016, Net2Net, in
the spirit). Matrices that read get random weights, so that the cost is real.

Over D instead of d channels the mean square shrinks by d/D; norm weights times sqrt(d/D) and
epsilon times d/D undo that exactly.
"""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from outrider.train.export import write_weights
from outrider.train.shapes import CONFIG_KEYS, GrownShape, choose_shape

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_READERS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")


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
        ValueError: no Llama checkpoint, an unknown size or dtype, or a shape that would shrink.
    """
    if dtype not in _DTYPES:
        raise ValueError(f"dtype {dtype!r} is unknown; choose one of {', '.join(_DTYPES)}")
    if noise < 0.0:
        raise ValueError(f"noise {noise} is negative; choose 0 or more")
    config = _read_config(source_folder)
    old = GrownShape(**{name: config[key] for name, key in CONFIG_KEYS.items()})
    wanted = {
        "hidden_size": hidden_size,
        "num_layers": num_layers,
        "intermediate_size": intermediate_size,
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
    }
    new = choose_shape(old, size, wanted)
    head_dim = config.get("head_dim") or old.hidden_size // old.num_heads
    growth = _Growth(old, new, head_dim, noise=noise, seed=seed, dtype=_DTYPES[dtype])
    out_folder.mkdir(parents=True, exist_ok=True)
    weights = growth.apply(_read_weights(source_folder))
    write_weights(weights, out_folder / "model.safetensors")
    _write_config(config, old, new, head_dim, dtype, out_folder)
    for path in source_folder.iterdir():
        if path.name.startswith(("tokenizer", "generation_config", "special_tokens")):
            shutil.copyfile(path, out_folder / path.name)


class _Growth:
    """One growth: where old rows and columns go, and what fills the rest."""

    def __init__(
        self,
        old: GrownShape,
        new: GrownShape,
        head_dim: int,
        *,
        noise: float,
        seed: int,
        dtype: torch.dtype,
    ) -> None:
        self._old, self._new, self._noise, self._dtype = old, new, noise, dtype
        self._generator = torch.Generator().manual_seed(seed)
        hidden = (torch.arange(old.hidden_size), new.hidden_size)
        units = (torch.arange(old.intermediate_size), new.intermediate_size)
        queries = (_head_rows(old, new, head_dim), new.num_heads * head_dim)
        keys = (torch.arange(old.num_kv_heads * head_dim), new.num_kv_heads * head_dim)
        self._places = {
            "q_proj": (queries, hidden),
            "k_proj": (keys, hidden),
            "v_proj": (keys, hidden),
            "o_proj": (hidden, queries),
            "gate_proj": (units, hidden),
            "up_proj": (units, hidden),
            "down_proj": (hidden, units),
        }
        self._hidden = hidden

    def apply(self, source: dict[str, Tensor]) -> dict[str, Tensor]:
        """All tensors of the larger checkpoint."""
        grown: dict[str, Tensor] = {}
        for name, weight in source.items():
            if not name.startswith("model.layers."):
                grown[name] = self._grow_outer(weight)
        num_old, num_new = self._old.num_layers, self._new.num_layers
        # Old layers are spread evenly, each followed by its share of new ones.
        homes = {index * num_new // num_old: index for index in range(num_old)}
        nearest = 0
        for layer in range(num_new):
            nearest = homes.get(layer, nearest)
            prefix = f"model.layers.{nearest}."
            for name, weight in source.items():
                if name.startswith(prefix):
                    key = f"model.layers.{layer}.{name.removeprefix(prefix)}"
                    grown[key] = self._grow_inner(name, weight, is_old=layer in homes)
        return grown

    def _grow_outer(self, weight: Tensor) -> Tensor:
        """Embedding, output matrix (V, D) or the last norm (D,)."""
        if weight.ndim == 1:
            return self._grow_norm(weight)
        rows = (torch.arange(len(weight)), len(weight))
        return self._place(weight, rows, self._hidden, deviation=self._noise, is_old=True)

    def _grow_inner(self, name: str, weight: Tensor, *, is_old: bool) -> Tensor:
        if weight.ndim == 1:
            return self._grow_norm(weight)
        kind = name.split(".")[-2]
        rows, columns = self._places[kind]
        deviation = 1.0 if kind in _READERS else self._noise
        return self._place(weight, rows, columns, deviation=deviation, is_old=is_old)

    def _grow_norm(self, weight: Tensor) -> Tensor:
        scale = math.sqrt(self._old.hidden_size / self._new.hidden_size)
        grown = torch.full((self._new.hidden_size,), scale)
        grown[: len(weight)] = weight.float() * scale
        return grown.to(self._dtype)

    def _place(
        self,
        weight: Tensor,
        rows: tuple[Tensor, int],
        columns: tuple[Tensor, int],
        *,
        deviation: float,
        is_old: bool,
    ) -> Tensor:
        """`weight` at its rows and columns, gaussian values of relative `deviation` elsewhere."""
        size = (rows[1], columns[1])
        if deviation > 0.0:
            scale = deviation * float(weight.float().std())
            grown = torch.randn(size, generator=self._generator) * scale
        else:
            grown = torch.zeros(size)
        if is_old:
            grown[rows[0][:, None], columns[0]] = weight.float()
        return grown.to(self._dtype)


def _head_rows(old: GrownShape, new: GrownShape, head_dim: int) -> Tensor:
    """Rows of the old query heads: each stays in the group of the kv head it reads."""
    old_group, new_group = old.num_heads // old.num_kv_heads, new.num_heads // new.num_kv_heads
    head = torch.arange(old.num_heads)
    home = head // old_group * new_group + head % old_group
    return (home[:, None] * head_dim + torch.arange(head_dim)).flatten()


def _read_config(folder: Path) -> dict[str, Any]:
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
