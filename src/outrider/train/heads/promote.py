"""Promotion: a new head takes the place of the one in use only if it is surely better.

Both are tallied on the same held-out documents: led along their text where the trainer runs both,
else drafting in the engine for what the target says there. What they differ by is averaged over
documents drawn again and again (bootstrap, Efron 1979): positions of one document are alike, so
documents are what chance is about.

Shape legend: M rows, U documents, S resamples.
"""

import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from outrider.errors import ConfigError
from outrider.train.folders import is_within
from outrider.train.heads.acceptance import HEAD, Scores

NUM_RESAMPLES = 2000
INTERVAL = 0.95
LEAST_DOCUMENTS = 4
PREVIOUS, INCOMING = ".previous", ".incoming"


class Tally(NamedTuple):
    """By document: drafted tokens that stood, or would have, and drafts that were made."""

    accepted: dict[str, float]
    num_drafts: dict[str, int]


class Comparison(NamedTuple):
    """Acceptance length of the new head less that of the one in use, and its 95 % interval."""

    difference: float
    low: float
    high: float
    new_length: float
    old_length: float
    num_documents: int

    @property
    def is_better(self) -> bool:
        """Whether chance alone would not explain it."""
        return self.low > 0.0

    def told(self) -> str:
        """In one sentence."""
        verdict = "is better" if self.is_better else "is not surely better"
        return (
            f"the new head {verdict}: acceptance length {self.new_length:.3f} against "
            f"{self.old_length:.3f}, difference {self.difference:+.3f} "
            f"({self.low:+.3f} to {self.high:+.3f}, {self.num_documents} documents)"
        )


def tally_of(scores: Scores) -> Tally:
    """Every scored row counts as a draft."""
    accepted_M = scores.marks[HEAD].drawn_MK.double().cumprod(1).sum(1)
    found = Tally({}, {})
    for index, unit in enumerate(scores.units):
        is_own_M = scores.unit_M == index
        if bool(is_own_M.any()):
            found.accepted[unit] = float(accepted_M[is_own_M].sum())
            found.num_drafts[unit] = int(is_own_M.sum())
    return found


def compare(new: Tally, old: Tally, *, seed: int = 0) -> Comparison:
    """Paired by document.

    Raises:
        ConfigError: there are too few documents to tell anything.
    """
    both = sorted(set(new.num_drafts) & set(old.num_drafts))
    if len(both) < LEAST_DOCUMENTS:
        raise ConfigError(
            f"{len(both)} held-out documents tell nothing of others: give at least "
            f"{LEAST_DOCUMENTS}"
        )
    parts_4U = np.array([[part[unit] for unit in both] for part in (*new, *old)])
    draws_SU = np.random.default_rng(seed).integers(len(both), size=(NUM_RESAMPLES, len(both)))
    drawn_4S = parts_4U[:, draws_SU].sum(-1)
    differences_S = drawn_4S[0] / drawn_4S[1] - drawn_4S[2] / drawn_4S[3]
    tail = (1.0 - INTERVAL) / 2
    low, high = np.quantile(differences_S, (tail, 1.0 - tail))
    total = parts_4U.sum(-1)
    new_length, old_length = (1.0 + float(total[i] / total[i + 1]) for i in (0, 2))
    return Comparison(
        new_length - old_length, float(low), float(high), new_length, old_length, len(both)
    )


def replace_head(in_use: Path, new: Path) -> Path:
    """Puts a copy of the new head where the other was, which is kept beside it.

    Returns:
        Where the other is now: `in_use` with ".previous" behind its name. One that was there
        before is gone.
    """
    in_use, previous = in_use.resolve(), _beside(in_use, PREVIOUS)
    with tempfile.TemporaryDirectory(
        dir=in_use.parent, prefix=f"{in_use.name}{INCOMING}-"
    ) as place:
        incoming = Path(place) / "head"
        shutil.copytree(new, incoming, ignore=shutil.ignore_patterns("work"))
        # Nothing is removed until the copy is whole.
        if previous.exists():
            shutil.rmtree(previous)
        in_use.rename(previous)
        incoming.rename(in_use)
    return previous


def roll_back(in_use: Path) -> None:
    """Takes back the head that was promoted last.

    Raises:
        ConfigError: none was kept.
    """
    in_use = in_use.resolve()
    incoming, previous = _beside(in_use, INCOMING), _beside(in_use, PREVIOUS)
    if not previous.is_dir():
        raise ConfigError(f"no folder {str(previous)!r}: there is nothing to go back to")
    in_use.rename(incoming)
    previous.rename(in_use)
    shutil.rmtree(incoming)


def check_in_use(folder: Path) -> None:
    """ConfigError unless there is a draft; told before hours are spent."""
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"promote={str(folder)!r}: no head is in use there; the first one is copied by hand"
        )


def check_out(in_use: Path, out: Path) -> None:
    """ConfigError if promotion would move, remove or copy what a run writes or replaces."""
    for taken in (in_use, _beside(in_use, PREVIOUS), _beside(in_use, INCOMING)):
        if is_within(out, taken) or is_within(taken, out):
            raise ConfigError(
                f"out={str(out)!r} and promote={str(in_use)!r}: promotion replaces "
                f"{str(taken)!r} with a copy of what is in out, so one must not lie in the other: "
                "name another folder for out"
            )


def _beside(folder: Path, ending: str) -> Path:
    folder = folder.resolve()
    return folder.with_name(folder.name + ending)
