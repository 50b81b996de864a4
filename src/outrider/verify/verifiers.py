"""Verifiers: hands each row's tree, laws and random stream to the rule its request chose."""

from functools import cache

from outrider.errors import RequestError
from outrider.registry import VERIFIERS
from outrider.sampling.laws import TargetLaws, shape_roots
from outrider.sampling.rng import PositionStream, RootStream, Stream
from outrider.sequence import Sequence
from outrider.step import Batch, DraftTree, TargetOutput, Verdict
from outrider.verify.base import Verifier


@cache
def verifier(name: str) -> Verifier:
    """The rule of that name; rules keep no state. ConfigError for an unknown name."""
    made: Verifier = VERIFIERS.load(name)()
    return made


class Verifiers:
    """Decides all rows of a step; an error in one row's settings fails that row alone."""

    def verify(
        self, batch: Batch, drafts: list[DraftTree], output: TargetOutput
    ) -> list[Verdict | None]:
        """One verdict per row, None for rows that stop short of their last token."""
        laws = [
            _laws(row.seq, tree, output, first) if first >= 0 else None
            for row, tree, first in zip(batch.rows, drafts, output.first, strict=True)
        ]
        shape_roots(output.logits_NV, [p for p in laws if p is not None])
        return [
            None if p is None else _verdict(row.seq, tree, p)
            for row, tree, p in zip(batch.rows, drafts, laws, strict=True)
        ]


def _laws(seq: Sequence, tree: DraftTree, output: TargetOutput, first: int) -> TargetLaws:
    return TargetLaws(
        seq.shaper,
        output.logits_NV,
        output.argmax_N,
        seq.tokens,
        tree.path_tokens,
        seq.grammar,
        first,
    )


def _verdict(seq: Sequence, tree: DraftTree, p: TargetLaws) -> Verdict:
    rule = verifier(seq.speculation.verifier)
    try:
        return rule.verify(tree, p, _stream(seq, rule))
    except RequestError as error:
        return Verdict((), -1, str(error))


def _stream(seq: Sequence, rule: Verifier) -> Stream:
    if rule.keyed_by == "position":
        return PositionStream(seq.seed, len(seq.tokens))
    return RootStream(seq.seed, len(seq.tokens) - 1, "verify")
