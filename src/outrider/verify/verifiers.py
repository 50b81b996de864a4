"""Verifiers: hands each row's tree, laws and random stream to the rule its request chose."""

from functools import lru_cache
from typing import TypeAlias

from outrider.errors import RequestError
from outrider.registry import OURS, VERIFIERS
from outrider.sampling.laws import TargetLaws, shape_roots
from outrider.sampling.rng import PositionStream, RootStream, Stream
from outrider.sequence import Sequence
from outrider.step import Batch, DraftTree, TargetOutput, Verdict
from outrider.verify.base import Exactness, Verifier
from outrider.verify.sampled import walk

Settings: TypeAlias = tuple[tuple[str, bool | int | float | str], ...]


@lru_cache(maxsize=256)
def verifier(name: str, options: Settings = ()) -> Verifier:
    """The rule of that name; rules keep no state. ConfigError for an unknown name."""
    made: Verifier = VERIFIERS.load(name)(**dict(options))
    return made


@lru_cache(maxsize=256)
def comes_to_argmax(name: str) -> bool:
    """Whether at temperature 0 the rule is the walk along the argmax, and need not be asked.

    All exact ones are in law; of a stranger's only its own verdict is taken.
    """
    is_exact = verifier(name).exactness in (Exactness.EXACT, Exactness.EXACT_GREEDY)
    return is_exact and any(part.name == name and part.source == OURS for part in VERIFIERS)


class Verifiers:
    """Decides all rows of a step; an error in one row's settings fails that row alone."""

    def verify(
        self, batch: Batch, drafts: list[DraftTree], output: TargetOutput
    ) -> list[Verdict | None]:
        """One verdict per row, None for rows that stop short of their last token."""
        verdicts = [
            _greedy(row.seq, tree, output, first) if first >= 0 else None
            for row, tree, first in zip(batch.rows, drafts, output.first, strict=True)
        ]
        shaped = [i for i, v in enumerate(verdicts) if v is None and output.first[i] >= 0]
        laws = [_laws(batch.rows[i].seq, drafts[i], output, output.first[i]) for i in shaped]
        shape_roots(output.logits_NV, laws)
        for i, p in zip(shaped, laws, strict=True):
            verdicts[i] = _verdict(batch.rows[i].seq, drafts[i], p)
        return verdicts


def _greedy(seq: Sequence, tree: DraftTree, output: TargetOutput, first: int) -> Verdict | None:
    """For rows whose law is the argmax of the logits every exact rule comes to this; else None."""
    if not seq.shaper.is_plain_greedy or not comes_to_argmax(seq.speculation.verifier):
        return None
    argmax_N = output.argmax_N
    if not tree.tokens:
        verdict = Verdict((), argmax_N[first])
    else:
        verdict = walk(tree, lambda node: argmax_N[first + 1 + node])
    return verdict if verdict.token >= 0 else None  # no number: the laws say what is wrong


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
    name, options = seq.speculation.verifier, seq.speculation.verifier_options
    if seq.shaper.is_plain_greedy and comes_to_argmax(name):
        name, options = "greedy", ()  # a row without numbers: the walk tells what is wrong
    rule = verifier(name, options)
    try:
        return rule.verify(tree, p, _stream(seq, rule))
    except RequestError as error:
        return Verdict((), -1, str(error))


def _stream(seq: Sequence, rule: Verifier) -> Stream:
    if rule.keyed_by == "position":
        return PositionStream(seq.seed, len(seq.tokens))
    return RootStream(seq.seed, len(seq.tokens) - 1, "verify")
