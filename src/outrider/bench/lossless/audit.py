"""Audit: watches a sampled run, and tests whether what came out has the target's law.

Sums of scores whose terms have mean 0, given all that was drawn before, if drafter and rule are
right; each in units of its standard deviation. They hold for any text, length and K.

Shape legend: V vocabulary.
"""

import math
from collections.abc import Iterator, Sequence as Items
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from outrider.engine.engine import Engine
from outrider.sampling.laws import Laws, TargetLaws
from outrider.sequence import Sequence
from outrider.step import Batch, DraftTree, TargetOutput, Verdict
from outrider.verify.base import Exactness, Verifier
from outrider.verify.rejection import RejectionVerifier
from outrider.verify.sampled import SampledVerifier
from outrider.verify.tree import TreeVerifier
from outrider.verify.verifiers import verifier

TOKEN_WISE = (RejectionVerifier, SampledVerifier, TreeVerifier)  # on chains alike
COUPLED = "coupled"
ROUNDING = 1e-6
TINIEST = 1e-300  # in place of 0 inside logarithms: what cannot come and came all the same tells


@dataclass
class Score:
    """A sum of scores of draws, each less its mean, and the sum of their variances."""

    num_terms: int = 0
    total: float = 0.0
    variance: float = 0.0

    @property
    def deviations(self) -> float:
        """The sum in units of its standard deviation; infinite where only 0 could come."""
        if self.variance > 0.0:
            return self.total / math.sqrt(self.variance)
        return 0.0 if abs(self.total) < ROUNDING else math.copysign(math.inf, self.total)

    def add(self, score_V: Tensor, law_V: Tensor, token: int) -> None:
        mean = float(score_V @ law_V)
        self.num_terms += 1
        self.total += float(score_V[token]) - mean
        self.variance += float((score_V - mean).square() @ law_V)

    def add_coin(self, is_heads: bool, probability: float) -> None:
        self.num_terms += 1
        self.total += is_heads - probability
        self.variance += probability * (1.0 - probability)


@dataclass
class Scores:
    """The sums of one run.

    Attributes:
        accepted: whether each position that was reached stood, less its probability; of chains and
            token-wise rules. That is sum_x min(p(x), q(x)), or sum_x p(x) q(x) under node-wise
            sampling, or p(x) of a token x that was picked.
        emitted: log p of every token that came out, less its mean under p: a law that was made
            sharper or flatter shows.
        towards: how much likelier the drafter finds each token that came out than the target does
            (q / (p + q); of picks, whether it was drafted), less its mean under p.
        drawn: log q of every drafted token, less its mean under the law recorded with it.
    """

    accepted: Score = field(default_factory=Score)
    emitted: Score = field(default_factory=Score)
    towards: Score = field(default_factory=Score)
    drawn: Score = field(default_factory=Score)


class Audit:
    """Stands between an engine and its rules while `attached`, and changes nothing.

    Requests at temperature 0 have no law to test and are passed by; so is whatever a rule emits
    that does not promise the target's law.
    """

    def __init__(self) -> None:
        self.scores = Scores()
        self._rules: Any = None

    @contextmanager
    def attached(self, engine: Engine) -> Iterator["Audit"]:
        self._rules = engine.verifiers
        engine.verifiers = self  # type: ignore[assignment]  # has what the engine asks of it
        try:
            yield self
        finally:
            engine.verifiers = self._rules

    def verify(
        self, batch: Batch, drafts: list[DraftTree], output: TargetOutput
    ) -> list[Verdict | None]:
        """The rules' own verdicts."""
        verdicts: list[Verdict | None] = self._rules.verify(batch, drafts, output)
        for row, tree, verdict, first in zip(
            batch.rows, drafts, verdicts, output.first, strict=True
        ):
            if verdict is None or verdict.error or row.seq.shaper.is_greedy or not tree.tokens:
                continue
            self._note_drawn(tree)
            self._note(row.seq, tree, verdict, _laws(row.seq, tree, output, first))
        return verdicts

    def _note(self, seq: Sequence, tree: DraftTree, verdict: Verdict, laws: Laws) -> None:
        spec = seq.speculation
        rule = verifier(spec.verifier, spec.verifier_options)
        if rule.exactness is not Exactness.EXACT:
            return
        # Coupled drafts know the noise that the target's tokens are drawn with.
        is_coupled = spec.draft_sample_method == COUPLED
        self._note_emitted(tree, verdict, laws, is_coupled=is_coupled)
        if isinstance(rule, TOKEN_WISE) and tree.is_chain and not is_coupled:
            self._note_accepted(rule, tree, len(verdict.accepted), laws)

    def _note_drawn(self, tree: DraftTree) -> None:
        """Of independent chains every draw counts, so equal prefixes count as often."""
        nodes = [node for path in tree.paths for node in path] or range(len(tree))
        for node in nodes:
            q_V = tree.law(node)
            if q_V is not None:
                _add_log(self.scores.drawn, q_V.double(), tree.tokens[node])

    def _note_emitted(
        self, tree: DraftTree, verdict: Verdict, laws: Laws, *, is_coupled: bool
    ) -> None:
        """Every token of the call, accepted or added, against p where it stands.

        A call ends at a place that depends on its tokens, but goes on there with p, so that the
        terms which are left out have mean 0 as well; so do both sums, under block rules too.
        """
        nodes = (-1, *verdict.accepted)
        tokens = (*(tree.tokens[node] for node in verdict.accepted), verdict.token)
        for node, token in zip(nodes, tokens, strict=True):
            p_V = laws.law(node).cpu()
            _add_log(self.scores.emitted, p_V, token)
            children = tree.children(node)
            if children and not is_coupled:
                self.scores.towards.add(_lean(tree, children, p_V), p_V, token)

    def _note_accepted(
        self, rule: Verifier, tree: DraftTree, num_accepted: int, laws: Laws
    ) -> None:
        for node in range(min(num_accepted + 1, len(tree))):
            p_V, q_V = laws.law(node - 1).cpu(), tree.law(node)
            if q_V is None:
                alpha = float(p_V[tree.tokens[node]])
            elif isinstance(rule, SampledVerifier):
                alpha = float(p_V @ q_V.to(p_V))
            else:
                alpha = float(p_V.minimum(q_V.to(p_V)).sum())
            self.scores.accepted.add_coin(node < num_accepted, min(1.0, alpha))


def _lean(tree: DraftTree, children: Items[int], p_V: Tensor) -> Tensor:
    """Scores in [0, 1] of all tokens: a function of the text alone, as the first child's law is."""
    q_V = tree.law(children[0])
    if q_V is not None:
        q_V = q_V.to(p_V)
        return q_V / (p_V + q_V).clamp(min=TINIEST)
    score_V = p_V.new_zeros(len(p_V))
    score_V[[tree.tokens[child] for child in children if tree.law(child) is None]] = 1.0
    return score_V


def _add_log(score: Score, law_V: Tensor, token: int) -> None:
    law_V = law_V.cpu()
    score.add(law_V.clamp(min=TINIEST).log(), law_V / law_V.sum(), token)


def _laws(seq: Sequence, tree: DraftTree, output: TargetOutput, first: int) -> Laws:
    """Of the row, as the rules are given them."""
    return TargetLaws(
        seq.shaper,
        output.logits_NV,
        output.argmax_N,
        seq.tokens,
        tree.path_tokens,
        seq.grammar,
        first,
    )
