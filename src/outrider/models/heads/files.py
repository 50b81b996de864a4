"""The weight files of a draft head: names and shapes first, tensors when they are wanted."""

import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from outrider.errors import ModelError
from outrider.models.checkpoint import weight_files

# Beside or instead of the usual names; the first of a pair that is there is read.
OTHER_FILES = (
    ("medusa_lm_head.safetensors", "medusa_lm_head.pt"),
    ("hydra_lm_head.pt",),
    ("warp_model.bin",),
)
MASK_EMBEDDING = "mask_embedding.pt"


class HeadFiles:
    """What the weight files of one folder hold.

    Attributes:
        shapes: of every tensor, by its name in the files.

    Raises:
        ModelError: there are no weights, or a file is broken.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._where: dict[str, Path] = {}
        self._unpickled: dict[Path, Mapping[str, Any]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for path in _paths(folder):
            shapes = _read(path, self._shapes)
            self.shapes |= shapes
            self._where |= dict.fromkeys(shapes, path)

    def load(self, names: Iterable[str]) -> dict[str, Tensor]:
        """These tensors, on the CPU, in the dtype they are stored in."""
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self._where[name], []).append(name)
        tensors: dict[str, Tensor] = {}
        for path, wanted in by_file.items():
            tensors |= _read(path, lambda path, wanted=wanted: self._tensors(path, wanted))
        return tensors

    def mask_embedding(self) -> tuple[Tensor, int] | None:
        """What replaces the embedding of a mask token, and that token; None without the file."""
        path = self._folder / MASK_EMBEDDING
        if not path.is_file():
            return None
        values = _read(path, _unpickle)
        embedding, token = values.get("embedding"), values.get("mask_token_id")
        if not isinstance(embedding, Tensor) or not isinstance(token, int) or len(values) != 2:
            raise ModelError(
                f"{str(path)!r} must hold 'embedding', a tensor, and 'mask_token_id', a number; "
                f"it holds {sorted(values)}"
            )
        return embedding.flatten(), token

    def _shapes(self, path: Path) -> dict[str, tuple[int, ...]]:
        if path.suffix != ".safetensors":
            self._unpickled[path] = _tensors_only(path)
            return {name: tuple(t.shape) for name, t in self._unpickled[path].items()}
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118

    def _tensors(self, path: Path, names: list[str]) -> dict[str, Tensor]:
        if path in self._unpickled:
            return {name: self._unpickled[path][name] for name in names}
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in names}


def _paths(folder: Path) -> list[Path]:
    others = [
        next(folder / name for name in names if (folder / name).is_file())
        for names in OTHER_FILES
        if any((folder / name).is_file() for name in names)
    ]
    try:
        return weight_files(folder) + others
    except ModelError:
        if not others:
            raise
        return others


def _tensors_only(path: Path) -> Mapping[str, Tensor]:
    values = _unpickle(path)
    strange = [name for name, value in values.items() if not isinstance(value, Tensor)]
    if strange:
        raise ValueError(f"{strange[0]!r} is no tensor")
    return values


def _unpickle(path: Path) -> Mapping[str, Any]:
    values = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(values, dict):
        raise ValueError("it does not hold a mapping of tensors")
    return values


def _read(path: Path, read: Any) -> Any:
    kinds = (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError)
    try:
        return read(path)
    except (*kinds, ValueError, KeyError) as error:
        if isinstance(error, ModelError):
            raise
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"{str(path)!r} is truncated, corrupt or more than tensors ({first_line}): "
            "download it again, or ask its author for safetensors"
        ) from error
