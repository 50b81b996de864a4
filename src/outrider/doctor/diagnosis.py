"""Diagnosis: all that is said of one draft, and how it is come by."""

from collections.abc import Callable, Sequence as Items
from dataclasses import dataclass
from typing import Any

from outrider.doctor.baselines import BASELINES, score_copies
from outrider.doctor.evidence import Evidence, look
from outrider.doctor.examine import MOST_RUNS, NUM_DEPTHS, Findings, Row, examine, follow
from outrider.doctor.fit import Check
from outrider.doctor.guessers import Guesser
from outrider.doctor.outlook import DEPTH, Outlook, Prices, priced
from outrider.doctor.scores import Score, total
from outrider.doctor.standing import joint_of, standing
from outrider.doctor.subject import Subject
from outrider.doctor.switches import boundaries_of, switches_of
from outrider.doctor.texts import Text, Written
from outrider.models.base import Network

Tick = Callable[[int, int, str], None]  # done, of so many, what is being done


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """What was found.

    Attributes:
        family: of the head, or "draft model".
        findings: of a head's conventions; None for a model, which has none.
        score: of the draft as it should be run; None where it cannot be led along texts.
        baselines: of guesses that anybody could make, by name.
        checks: of a draft model beside its target.
        outlooks: what to expect, on sampled and greedy text.
        notes: what a reader of the figures has to know.
    """

    family: str
    written: Written
    score: Score | None
    baselines: dict[str, Score]
    findings: Findings | None = None
    checks: tuple[Check, ...] = ()
    outlooks: tuple[Outlook, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def winner(self) -> Row | None:
        return self.findings.winner if self.findings else None


def diagnose_head(
    subject: Subject,
    network: Network,
    written: Written,
    *,
    most_runs: int = MOST_RUNS,
    tick: Tick = lambda done, of, what: None,
) -> Diagnosis:
    """Runs a head as declared and in other ways along the target's text.

    Raises:
        ConfigError: the target hands out no states, or the head cannot be run at all.
    """
    spec, num_layers = subject.spec, network.spec.num_layers
    first = subject.guesser(subject.declared, network)  # what cannot be run at all is told at once
    evidence = look(
        network,
        written.texts,
        sorted(boundaries_of(spec, num_layers)),
        tick=lambda done: tick(done, len(written.texts), "reading the target's states"),
    )
    depths = min(NUM_DEPTHS, first.max_depth or NUM_DEPTHS)
    findings = examine(
        subject.declared,
        lambda way: subject.guesser(way, network),
        switches_of(spec, num_layers),
        evidence,
        num_depths=depths,
        refusal=subject.refusal,
        most_runs=most_runs,
        tick=lambda done, name: tick(done, most_runs, name),
    )
    best = subject.guesser(findings.best.conventions, network)
    return Diagnosis(
        family=str(spec.family),
        written=written,
        findings=findings,
        score=findings.best.score,
        baselines=baselines(evidence, depths),
        outlooks=outlooks(best, evidence),
        notes=(*written.notes, *_of_head(subject, network)),
    )


def diagnose_model(
    guesser: Guesser | None,
    network: Network,
    written: Written,
    checks: Items[Check],
    *,
    tick: Tick = lambda done, of, what: None,
) -> Diagnosis:
    """Leads a draft model along the target's text.

    Args:
        guesser: None where its tokens are not the target's, so that its laws cannot be compared.
    """
    evidence = look(
        network,
        written.texts,
        tick=lambda done: tick(done, len(written.texts), "reading the target's laws"),
    )
    score: Score | None = None
    expected: tuple[Outlook, ...] = ()
    if guesser is not None:
        told = [(one.text.prompt, follow(guesser, one, NUM_DEPTHS)) for one in evidence]
        score, expected = total(told), outlooks(guesser, evidence)
    return Diagnosis(
        family="draft model",
        written=written,
        score=score,
        baselines=baselines(evidence, NUM_DEPTHS),
        checks=tuple(checks),
        outlooks=expected,
        notes=written.notes,
    )


def baselines(evidence: Items[Evidence], num_depths: int) -> dict[str, Score]:
    """What anybody could guess, on the same rows."""
    return {
        name: total([(one.text.prompt, score_copies(one, copies, num_depths)) for one in evidence])
        for name, copies in BASELINES.items()
    }


def outlooks(guesser: Guesser, evidence: Items[Evidence]) -> tuple[Outlook, ...]:
    """How far drafts would stand, without prices."""
    depths = min(DEPTH, guesser.max_depth or DEPTH)
    found = []
    for is_sampled, kind in ((True, "sampled"), (False, "greedy")):
        mine = [one for one in evidence if one.text.is_sampled == is_sampled]
        if mine:
            joint = joint_of([standing(guesser, one, depths) for one in mine])
            found.append(Outlook(kind, joint, sum(one.text.num_written for one in mine)))
    return tuple(found)


def with_prices(diagnosis: Diagnosis, prices: Prices) -> Diagnosis:
    """With speed-ups for one request at a time."""
    context = _mean_length(diagnosis.written.texts)
    told = tuple(priced(one, prices, context) for one in diagnosis.outlooks)
    return Diagnosis(**{**vars(diagnosis), "outlooks": told})


def to_json(diagnosis: Diagnosis) -> dict[str, Any]:
    """For a result's findings."""
    return {
        "family": diagnosis.family,
        "num_positions": diagnosis.written.num_positions,
        "rows": [_row(row) for row in (diagnosis.findings.rows if diagnosis.findings else ())],
        "winner": None if diagnosis.winner is None else diagnosis.winner.name,
        "changes": {} if diagnosis.winner is None else diagnosis.winner.changes,
        "score": None if diagnosis.score is None else _score(diagnosis.score),
        "baselines": {name: _score(score) for name, score in diagnosis.baselines.items()},
        "checks": [check._asdict() for check in diagnosis.checks],
        "outlook": [one.to_json() for one in diagnosis.outlooks],
        "notes": list(diagnosis.notes),
    }


def _row(row: Row) -> dict[str, Any]:
    found = row.difference
    return {
        "name": row.name,
        "changes": row.changes,
        "score": None if row.score is None else _score(row.score),
        "difference": None if found is None else found.value,
        "interval": None if found is None else [found.low, found.high],
        "is_clear": found is not None and found.is_clear,
        "is_cut": row.is_cut,
        "refusal": row.refusal,
    }


def _score(score: Score) -> dict[str, Any]:
    return {"value": score.value, "overlap": score.by_depth, "same_token": score.matches}


def _of_head(subject: Subject, network: Network) -> list[str]:
    """What its files leave open, and what was laid down before."""
    spec, notes = subject.spec, []
    if spec.assumed:
        notes.append(f"its files do not say: {', '.join(sorted(spec.assumed))}")
    if subject.pins:
        pinned = ", ".join(f"{name}={value!r}" for name, value in subject.pins.items())
        notes.append(f"outrider.json lays down {pinned}; this is part of what is declared here")
    rope, most = spec.decoder.rope if spec.decoder else None, network.spec.max_positions
    if rope is not None and rope.max_positions < most:
        notes.append(
            f"it was made for {rope.max_positions} positions, the target for {most}: expect less "
            "on longer texts than these"
        )
    return notes


def _mean_length(texts: Items[Text]) -> int:
    return sum(len(text.tokens) for text in texts) // max(len(texts), 1)
