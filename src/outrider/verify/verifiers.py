"""Verifiers: hands each row's tree, laws and random stream to the rule its request chose."""

from functools import cache

from outrider.errors import RequestError
from outrider.registry import VERIFIERS
from outrider.sampling.laws import TargetLaws
from outrider.sampling.rng import PositionStream, RootStream, Stream
from outrider.sequence import Sequence
from outrider.step import Batch, DraftTree, Row, TargetOutput, Verdict
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
        return [
            _verdict(row, tree, output, first) if first >= 0 else None
            for row, tree, first in zip(batch.rows, drafts, output.first, strict=True)
        ]


def _verdict(row: Row, tree: DraftTree, output: TargetOutput, first: int) -> Verdict:
    seq = row.seq
    rows = slice(first, first + 1 + len(tree))
    rule = verifier(seq.speculation.verifier)
    laws = TargetLaws(
        seq.shaper,
        output.logits_NV[rows],
        output.argmax_N[rows],
        seq.tokens,
        tree.path_tokens,
        seq.grammar,
    )
    try:
        return rule.verify(tree, laws, _stream(seq, rule))
    except RequestError as error:
        return Verdict((), -1, str(error))


def _stream(seq: Sequence, rule: Verifier) -> Stream:
    if rule.keyed_by == "position":
        return PositionStream(seq.seed, len(seq.tokens))
    return RootStream(seq.seed, len(seq.tokens) - 1, "verify")
