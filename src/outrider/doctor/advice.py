"""What was found, in sentences, and what to do about it."""

from collections.abc import Iterator

from outrider.doctor.diagnosis import Diagnosis
from outrider.doctor.examine import Row
from outrider.doctor.fit import FAULT
from outrider.doctor.outlook import Outlook

WELL_KNOWN = {
    "feature_layers": "config.json names other layers, or in another order, than in training",
    "vocabulary_map": "d2t is written the other way",
}
USUAL_DEPTH = 3
POOR = 0.2  # of overlap at depth 1; a head that works shares more


def advice(diagnosis: Diagnosis) -> list[str]:
    """Line by line; the most important first."""
    return [
        *_of_conventions(diagnosis),
        *_of_models(diagnosis),
        *_beside_baselines(diagnosis),
        *_of_outlook(diagnosis),
    ]


def _of_conventions(diagnosis: Diagnosis) -> Iterator[str]:
    findings = diagnosis.findings
    if findings is None:
        return
    declared, winner = findings.declared, findings.winner
    if declared.refusal:
        yield f"The head cannot be read as declared: {declared.refusal}"
    if winner is None:
        yield "The declared settings stand: run in no other way does the head fit clearly better."
        return
    yield _cost(declared, winner)
    for name, why in WELL_KNOWN.items():
        if name in winner.changes:
            yield f"{name}: {why}."
    yield (
        f"Run it with {winner.name}: repeat with --pin, which writes that to the head's "
        "outrider.json, and every engine here obeys it; other programs need it in config.json."
    )


def _cost(declared: Row, winner: Row) -> str:
    assert winner.score is not None
    if declared.score is None or winner.difference is None:
        return f"With {winner.name} it shares {winner.score.value:.3f} of its laws with the target."
    found = winner.difference
    return (
        f"The declared settings are not those of training: with {winner.name} the head shares "
        f"{winner.score.value:.3f} of its laws with the target instead of "
        f"{declared.score.value:.3f} (+{found.value:.3f}, 95 % interval {found.low:.3f} to "
        f"{found.high:.3f})."
    )


def _of_models(diagnosis: Diagnosis) -> Iterator[str]:
    for check in diagnosis.checks:
        if check.verdict == FAULT:
            yield f"{check.about}: {check.told}."
    if diagnosis.findings is None and diagnosis.score is None:
        yield (
            "The two vocabularies differ, so laws cannot be compared: measure translated drafts by "
            "outrider bench advise."
        )


def _beside_baselines(diagnosis: Diagnosis) -> Iterator[str]:
    if diagnosis.score is None:
        return
    name, best = max(diagnosis.baselines.items(), key=lambda pair: pair[1].value)
    if best.value >= diagnosis.score.value:
        yield (
            f"{name[0].upper()}{name[1:]} fits better ({best.value:.3f}) than this draft "
            f"({diagnosis.score.value:.3f}): on such text method ngram serves as well, and costs "
            "nothing."
        )
    if diagnosis.score.by_depth[0] < POOR:
        yield (
            f"Its first token shares only {diagnosis.score.by_depth[0]:.3f} with the target, which "
            "no setting explains: see whether it was made for this very target (base or "
            "instruct, version) and for text like these prompts."
        )


def _of_outlook(diagnosis: Diagnosis) -> Iterator[str]:
    for one in diagnosis.outlooks:
        yield _expected(one)
    kinds = {one.kind: one for one in diagnosis.outlooks}
    if {"sampled", "greedy"} <= kinds.keys() and any(t.num_looped for t in diagnosis.written.texts):
        yield (
            "This target repeats itself where it is greedy, and anybody can guess a repetition: "
            "judge by sampled text."
        )


def _expected(one: Outlook) -> str:
    lengths = one.lengths
    best = max(one.speedups, default=0.0)
    depth = 1 + one.speedups.index(best) if one.speedups else min(USUAL_DEPTH, len(lengths))
    told = f"{one.kind} text: {lengths[depth - 1]:.2f} tokens per pass of the target at K = {depth}"
    if not one.speedups:
        return f"{told}; what that is worth here was not timed."
    if not one.best_depth:
        return (
            f"{told}, but on this machine that does not pay: at best "
            f"{best:.2f} times as fast as plain decoding."
        )
    return (
        f"{told}, {best:.2f} times as fast as plain decoding for one request at "
        "a time (a forecast; outrider bench ab measures)."
    )
