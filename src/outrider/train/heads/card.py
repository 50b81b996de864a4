"""The card of a trained head: what it is, what it learned from, and how far its drafts stand."""

import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from outrider import __version__
from outrider.train.heads.acceptance import COPY, HEAD, NGRAM, Scores
from outrider.train.heads.by_domain import ByDomain, served_table, served_told
from outrider.train.heads.settings import DraftTraining
from outrider.train.heads.tables import rate, table
from outrider.train.heads.trainer import Finished

MANY_LOOPS = 0.1

_HOW = """\
At {num_rows:,} positions of held-out text the draft was given the text up to there, and at every
depth the text before it, as if all drafts before had stood. *Drawn*: the chance that rejection
sampling at temperature 1 keeps a token, sum min(p, q). *Greedy*: both laws have the same likeliest
token. Rates by depth are joint: all drafts so far stand. The acceptance length is 1 plus their sum,
the tokens that one pass of the target yields. Baselines need no training: `{copy}` guesses the last
token again and again, `{ngram}` what followed the latest earlier occurrence of the last 3, 2 or 1
tokens. The text was {origin}."""

_LOOPS = """\
**{share:.0%} of these positions lie in text that repeats itself.** There any draft stands, and the
baselines show how little that says: compare with them, and judge by sampled text."""

_LIMITS = """\
Learned from pieces of at most {window} tokens: drafts deep in longer contexts may stand less often.
Made for exactly this target; another one, or this one fine-tuned, lowers acceptance without an
error. Whatever the head guesses, outputs are the target's."""


def acceptance_table(scores: Scores) -> str:
    """Markdown: by drafter, joint rates by depth and acceptance lengths."""
    num_depths = len(scores.rates().joint)
    depths = [f"{depth}" for depth in range(1, num_depths + 1)]
    rows = []
    for name in (HEAD, NGRAM, COPY):
        drawn, greedy = scores.rates(name), scores.rates(name, greedy=True)
        joint = [rate(value) for value in drawn.joint]
        rows.append([name, *joint, f"{drawn.length:.2f}", f"{greedy.length:.2f}"])
    head = ["drafter", *depths, "length, drawn", "length, greedy"]
    return table(head, rows)


def conditional_table(scores: Scores) -> str:
    """Markdown: of the trained draft, the chance of each depth if all before it stood."""
    rows = []
    for name, greedy in (("drawn", False), ("greedy", True)):
        rates = scores.rates(greedy=greedy)
        rows.append([name, *map(rate, rates.conditional)])
    return table(["conditional", *map(str, range(1, len(rows[0])))], rows)


def facts(
    settings: DraftTraining, finished: Finished, scores: Scores, **more: Any
) -> dict[str, Any]:
    """For `outrider.json`: what a program may want to know."""
    drawn, greedy = scores.rates(), scores.rates(greedy=True)
    return {
        "outrider_version": __version__,
        "kind": settings.kind,
        "target": settings.target,
        "loss": settings.loss,
        "steps": finished.num_steps,
        "skipped_steps": finished.num_skipped,
        "seed": settings.seed,
        "window": settings.window,
        "tokens_per_step": settings.tokens_per_step,
        "on_policy_temperature": settings.temperature if settings.on_policy else None,
        "acceptance": {
            "num_positions": scores.num_rows,
            "loop_share": round(scores.loop_share, 4),
            "drawn_joint": [round(value, 4) for value in drawn.joint],
            "greedy_joint": [round(value, 4) for value in greedy.joint],
        },
        **more,
    }


def write_card(
    folder: Path,
    settings: DraftTraining,
    finished: Finished,
    scores: Scores,
    *,
    facts: Sequence[tuple[str, str]],
    notes: Sequence[str] = (),
    served: ByDomain | None = None,
) -> None:
    """Writes README.md.

    Args:
        facts: further rows of the table on training.
        notes: sentences for the end of the results.
        served: what an engine did with it.
    """
    origin = "written by the target itself" if settings.on_policy else "given, not the target's own"
    how = _HOW.format(num_rows=scores.num_rows, copy=COPY, ngram=NGRAM, origin=origin)
    sections = [
        f"# Draft ({settings.kind}) for {settings.target}",
        f"Trained with `outrider train draft` {__version__} to guess ahead of `{settings.target}`.",
        "## Training",
        table(("", ""), [*_training(settings, finished), *facts]),
        "## Acceptance on held-out text",
        acceptance_table(scores),
        conditional_table(scores),
        *([_LOOPS.format(share=scores.loop_share)] if scores.loop_share > MANY_LOOPS else []),
        how,
        *notes,
        *(["## In the engine", served_table(served), served_told(served)] if served else []),
        "## Limits",
        _LIMITS.format(window=settings.window),
    ]
    (folder / "README.md").write_text("\n\n".join(sections) + "\n", encoding="utf-8")


def _training(settings: DraftTraining, finished: Finished) -> list[tuple[str, str]]:
    names = ", ".join(path.name for path in settings.data)
    seconds = finished.curve[-1].seconds if finished.curve else 0.0
    final = f"{finished.curve[-1].loss:.3f}" if finished.curve else "unknown"
    packages = f"torch {version('torch')}, Python {platform.python_version()}"
    ended = " (stopped on a plateau)" if finished.is_plateau else ""
    answers = f"answers of the target at temperature {settings.temperature:g} to prompts of "
    return [
        ("data", f"{answers if settings.on_policy else ''}{names}"),
        ("steps", f"{finished.num_steps:,}{ended}, {finished.num_skipped} skipped"),
        ("tokens per step", f"at most {settings.tokens_per_step:,}, pieces of {settings.window}"),
        ("loss", f"{settings.loss}, last mean {final}"),
        ("seed", f"{settings.seed}"),
        ("time", f"{seconds / 60:.1f} minutes of steps ({packages})"),
    ]
