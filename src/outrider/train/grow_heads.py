"""Draft heads grown along with their target: they draft as before, at a larger head's cost.

A grown target's residual stream before the home of old layer i is the old stream before layer i,
followed by zeros. A head that is enlarged by the same rules (see `grow`) reads the old values from
it and keeps its own new channels at zero, so its laws stay what they were.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from outrider import __version__
from outrider.models.checkpoint import read_config
from outrider.models.heads.detect import detect
from outrider.models.heads.files import HeadFiles
from outrider.models.heads.load import load_head
from outrider.models.heads.names import canonical
from outrider.models.heads.pins import SECTION, SIDECAR
from outrider.train.export import write_weights
from outrider.train.folders import check_apart, check_folder
from outrider.train.grow import check_dtype
from outrider.train.grow_layouts import Growth, Layout, find_layout, read_growth
from outrider.train.grow_pair import GrownPair, read_pair
from outrider.train.heads.files import write_json
from outrider.train.placing import DTYPES, Placing, home

_CARD = """\
# Draft ({family}), grown

A grown copy of the head `{name}`, written by `outrider train grow` {version}. It was not trained.
{law}
It is for measuring the cost of a head of this size, and tells nothing of how well one could guess.

|  |  |
| --- | --- |
| target | {target} |
| its hidden size | {new.hidden_size:,}, was {old.hidden_size:,} |
| its layers | {new.num_layers}, were {old.num_layers} |
| parameters | {num_parameters:,} |
| weights | {dtype}, new ones by seed {seed} |
| noise of the target | {noise:g} |

The old weights are among the new ones, so the terms of the head that it was grown from hold.
"""
_SAME = "It says for the grown target what that head says for its own."
_BLURRED = """\
It computes what that head computes, but its target was grown with noise and no longer is exactly
what the head was trained for: it reads other states, and may be accepted less often."""


class _Checked(NamedTuple):
    """A head that can be grown, and how."""

    layout: Layout
    growth: Growth


def grow_head(
    head_folder: Path,
    out_folder: Path,
    *,
    source_target: Path,
    grown_target: Path,
    noise: float = 0.0,
    seed: int = 0,
    dtype: str = "bfloat16",
) -> None:
    """Write a head for `grown_target` with the laws of one for `source_target`.

    Served are EAGLE-3 in the speculators layout, Medusa in safetensors, and KV heads. In bfloat16
    the scaled norm weights round, except where the widths' quotient is a power of four.

    Args:
        noise: that the target was grown with, for the card; the head gets none.

    Raises:
        ConfigError: another layout, a head that cannot be grown, targets that do not belong
            together (PairError: the head is of another target), or `out_folder` is a file, or the
            folder of the head or a target.
        ModelError: files cannot be read. ValueError: an unknown dtype.
    """
    for taken, what in ((source_target, "source"), (grown_target, "grown target")):
        check_apart(out_folder, taken, what)
    pair = read_pair(source_target, grown_target)
    layout, growth = check_head(head_folder, out_folder, pair, dtype)
    config, files = read_config(head_folder), HeadFiles(head_folder)
    placing = Placing(growth.old, growth.new, pair.head_dim, seed=seed, dtype=DTYPES[dtype])
    written = canonical(detect(config, files.shapes), files.shapes)
    tensors = files.load(written.values())
    grown = {theirs: _grow(ours, tensors[theirs], placing) for ours, theirs in written.items()}
    out_folder.mkdir(parents=True, exist_ok=True)
    write_weights(grown, out_folder / layout.weights)
    write_json(out_folder / "config.json", layout.grow_config(config, growth))
    about = {
        "outrider_version": __version__,
        "grown_from": head_folder.resolve().name,
        "target": pair.name,
        "noise": noise,
        "seed": seed,
        "num_parameters": sum(t.numel() for t in grown.values() if t.is_floating_point()),
    }
    pins = _grow_pins(head_folder, pair)
    write_json(out_folder / SIDECAR, {SECTION: pins, "growth": about})
    _write_card(out_folder, growth, about)


def check_head(head_folder: Path, out_folder: Path, pair: GrownPair, dtype: str) -> _Checked:
    """Whether a head can be grown into a folder; nothing is written.

    Raises:
        ConfigError, PairError, ModelError, ValueError: as `grow_head`.
    """
    check_dtype(dtype)
    check_folder(out_folder)
    check_apart(out_folder, head_folder, "head")
    spec = load_head(head_folder, pair.source).spec
    layout = find_layout(head_folder, spec, read_config(head_folder))
    return _Checked(layout, read_growth(spec, pair, dtype))


def _grow(name: str, tensor: Tensor, placing: Placing) -> Tensor:
    """One tensor, by its canonical name."""
    if not tensor.is_floating_point():
        return tensor  # which tokens it can say
    if "lm_head." in name or name.startswith("embed_tokens."):
        return placing.outer(tensor)
    if "norm." in name:
        return placing.norm(tensor)
    # Medusa's blocks, x + silu(W x + b), lead from stream to stream like `fc`.
    kind = "fc" if name.startswith("heads.") else name.split(".")[-2]
    return placing.matrix(kind, tensor) if tensor.ndim == 2 else placing.bias(kind, tensor)


def _grow_pins(head_folder: Path, pair: GrownPair) -> dict[str, Any]:
    """The conventions that were laid down beside the head, layers at their homes."""
    path = head_folder / SIDECAR
    values = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    pins: dict[str, Any] = dict(values.get(SECTION, {}))
    if "feature_layers" in pins:
        layers, old, new = pins["feature_layers"], pair.old.num_layers, pair.new.num_layers
        pins["feature_layers"] = [home(layer, old, new) for layer in layers]
    return pins


def _write_card(folder: Path, growth: Growth, about: Mapping[str, Any]) -> None:
    pair = growth.pair
    card = _CARD.format(
        family=growth.spec.family,
        name=about["grown_from"],
        version=__version__,
        target=pair.name,
        old=pair.old,
        new=pair.new,
        num_parameters=about["num_parameters"],
        dtype=growth.dtype,
        seed=about["seed"],
        noise=about["noise"],
        law=_BLURRED if about["noise"] else _SAME,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
