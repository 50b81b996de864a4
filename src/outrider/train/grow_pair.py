"""A target and what it was grown to: their sizes, and proof that one is a growth of the other."""

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch

from outrider.errors import ConfigError
from outrider.models.heads.files import HeadFiles
from outrider.models.heads.spec import TargetSpec
from outrider.train.grow import read_llama, read_shape
from outrider.train.shapes import GrownShape, choose_shape

EMBEDDING = "model.embed_tokens.weight"


class GrownPair(NamedTuple):
    """What must be known of both targets to grow a head along.

    Attributes:
        source: what the head was trained for.
        name: of the grown target.
        head_dim: of attention, which growth leaves as it is.
    """

    source: TargetSpec
    name: str
    old: GrownShape
    new: GrownShape
    head_dim: int


def read_pair(source_target: Path, grown_target: Path) -> GrownPair:
    """Both targets.

    Raises:
        ConfigError: the second is no growth of the first.
        ValueError, ModelError: one of them is no Llama checkpoint, or cannot be read.
    """
    source, grown = read_llama(source_target), read_llama(grown_target)
    old, head_dim = read_shape(source)
    new, grown_head_dim = read_shape(grown)
    fault = _fault(source, grown, old, new) or (
        f"its heads are {grown_head_dim} wide, not {head_dim}" if grown_head_dim != head_dim else ""
    )
    if not fault and not _holds(source_target, grown_target):
        fault = f"{EMBEDDING} does not begin with the source's"
    if fault:
        raise ConfigError(
            f"{str(grown_target)!r} is no growth of {str(source_target)!r} ({fault}): write it "
            "with `outrider train grow` from the target that the head was trained for"
        )
    spec = TargetSpec.from_config(source, name=str(source_target), folder=source_target)
    return GrownPair(spec, grown_target.resolve().name, old, new, head_dim)


def plan_pair(
    source_target: Path, out: Path, size: str | None, wanted: dict[str, int | None]
) -> GrownPair:
    """The same before the second is written to `out`, with sizes as `grow` takes them.

    Raises:
        ValueError, ModelError: the source is no Llama checkpoint, or no growth has these sizes.
    """
    config = read_llama(source_target)
    old, head_dim = read_shape(config)
    spec = TargetSpec.from_config(config, name=str(source_target), folder=source_target)
    return GrownPair(spec, out.resolve().name, old, choose_shape(old, size, wanted), head_dim)


def _fault(source: dict[str, Any], grown: dict[str, Any], old: GrownShape, new: GrownShape) -> str:
    """Why no growth has these sizes; empty if one has."""
    try:
        choose_shape(old, None, vars(new))
    except ValueError as error:
        return str(error)
    if source["vocab_size"] != grown["vocab_size"]:
        return f"its vocabulary is {grown['vocab_size']}, not {source['vocab_size']}"
    wanted = source.get("rms_norm_eps", 1e-6) * old.hidden_size / new.hidden_size
    if not math.isclose(grown.get("rms_norm_eps", 1e-6), wanted, rel_tol=1e-6):
        return f"its rms_norm_eps is {grown.get('rms_norm_eps')}, not {wanted}"
    return ""


def _holds(source_target: Path, grown_target: Path) -> bool:
    """Whether the old embedding stands in the new one."""
    old_VD, new_VD = (
        HeadFiles(folder).load([EMBEDDING])[EMBEDDING] for folder in (source_target, grown_target)
    )
    return torch.equal(old_VD.to(new_VD.dtype), new_VD[:, : old_VD.shape[1]])
