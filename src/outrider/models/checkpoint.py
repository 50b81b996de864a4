"""The files of a checkpoint folder: configuration, weights, end-of-sequence tokens, fingerprint."""

import hashlib
import json
import pickle
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from outrider.errors import ModelError

CONFIG = "config.json"
SAMPLE_BYTES = 1 << 16


def read_config(folder: Path) -> dict[str, Any]:
    """The mapping in `config.json`. ModelError if it is missing or not JSON."""
    values = _read_json(folder / CONFIG)
    if values is None:
        raise ModelError(f"no {CONFIG} in {str(folder)!r}: it is not a Hugging Face checkpoint")
    return values


def eos_token_ids(folder: Path) -> tuple[int, ...]:
    """Tokens that end an answer, as `generation_config.json` says, else `config.json`."""
    for values in (_read_json(folder / "generation_config.json"), read_config(folder)):
        given = (values or {}).get("eos_token_id")
        if given is not None:
            return tuple(given) if isinstance(given, list) else (given,)
    return ()


def load_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint by name, on the CPU, mapped from the files where possible.

    Reads `model.safetensors` or its shards, else `pytorch_model.bin` or its shards (tensors only:
    nothing in a pickle is executed).

    Raises:
        ModelError: there are no weights, a shard is missing, or a file is broken.
    """
    tensors: dict[str, Tensor] = {}
    for path in weight_files(folder):
        read = _read_safetensors if path.suffix == ".safetensors" else _read_pickle
        tensors |= read(path)
    return tensors


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights, in order of their names."""
    for single in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{single}.index.json"
        if index.is_file():
            return _shards(index)
        if (folder / single).is_file():
            return [folder / single]
    raise ModelError(
        f"no weights in {str(folder)!r}: expected model.safetensors or pytorch_model.bin "
        "(or shards with an .index.json)"
    )


def fingerprint(folder: Path, quantization: str = "") -> str:
    """Hex digest of the configuration and of names, sizes and samples of the weight files.

    Args:
        quantization: what loading makes of the weights; another model than the stored one.
    """
    digest = hashlib.sha256((folder / CONFIG).read_bytes())
    digest.update(quantization.encode())
    for path in weight_files(folder):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size};".encode())
        for sample in _samples(path, size):
            digest.update(sample)
    return digest.hexdigest()


def _samples(path: Path, size: int) -> Iterable[bytes]:
    """The file's beginning, middle and end."""
    with path.open("rb") as file:
        for start in (0, size // 2, max(0, size - SAMPLE_BYTES)):
            file.seek(start)
            yield file.read(SAMPLE_BYTES)


def _shards(index: Path) -> list[Path]:
    names = (_read_json(index) or {}).get("weight_map")
    if not isinstance(names, dict):
        raise ModelError(f"{str(index)!r} has no weight_map: download the checkpoint again")
    shards = [index.parent / name for name in sorted(set(names.values()))]
    absent = [shard.name for shard in shards if not shard.is_file()]
    if absent:
        raise ModelError(
            f"{str(index)!r} names {len(absent)} files that are not there, such as {absent[0]!r}: "
            "download the checkpoint again"
        )
    return shards


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    return _read(path, load_file, (SafetensorError, OSError, ValueError))


def _read_pickle(path: Path) -> dict[str, Tensor]:
    kinds = (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError)
    return _read(path, _unpickle, kinds)


def _unpickle(path: Path) -> dict[str, Tensor]:
    values = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(values, dict) or not all(isinstance(v, Tensor) for v in values.values()):
        raise ValueError("it does not hold a mapping of tensors")
    return values


def _read(
    path: Path,
    read: Callable[[Path], dict[str, Tensor]],
    kinds: tuple[type[Exception], ...],
) -> dict[str, Tensor]:
    try:
        return read(path)
    except kinds as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"{str(path)!r} is truncated or corrupt ({first_line}): download it again"
        ) from error


def _read_json(path: Path) -> dict[str, Any] | None:
    """The mapping in a JSON file; None if there is no such file."""
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{str(path)!r} is not JSON ({error}): download it again") from error
    if not isinstance(values, dict):
        raise ModelError(f"{str(path)!r} must hold a mapping, got {type(values).__name__}")
    return values
