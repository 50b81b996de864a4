"""What all layouts write alike: JSON, stored weights, and the sidecar `outrider.json`."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from outrider.models.heads.pins import SECTION, SIDECAR


def write_json(path: Path, values: object) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def write_sidecar(folder: Path, conventions: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    """How the head was trained to be run, so that nobody has to guess, and what is known of it."""
    write_json(folder / SIDECAR, {SECTION: dict(conventions), "training": dict(about)})


def to_store(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Weights on the CPU in the dtype they are stored in."""
    return {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in tensors.items()}


def add_to_sidecar(folder: Path, name: str, value: object) -> None:
    """One more fact beside those that were written with the weights."""
    path = folder / SIDECAR
    values = json.loads(path.read_text(encoding="utf-8"))
    values["training"][name] = value
    write_json(path, values)
