"""Mistakes that engines have made, planted: rules and drafters that bias the output."""

from dataclasses import replace

import torch

from outrider.draft.draft_model import ModelDrafter
from outrider.step import DraftTree
from outrider.verify.greedy import GreedyVerifier
from outrider.verify.rejection import RejectionVerifier
from outrider.verify.sampled import SampledVerifier, walk


class OtherTemperature(RejectionVerifier):
    """Reads q as if it had been drawn from at half the temperature."""

    name = "other_temperature"

    def verify(self, tree, p, rng):
        laws = tuple(None if q_V is None else _sharper(q_V) for q_V in tree.laws)
        return super().verify(replace(tree, laws=laws), p, rng)


def _sharper(q_V):
    squared_V = q_V.double().square()
    return squared_V / squared_V.sum()


class SoftmaxOfPick(RejectionVerifier):
    """Takes tokens that were picked for draws from a softmax: here from the target's own."""

    name = "softmax_of_pick"

    def verify(self, tree, p, rng):
        laws = tuple(
            p.law(node - 1) if tree.law(node) is None else tree.law(node)
            for node in range(len(tree))
        )
        return super().verify(replace(tree, laws=laws), p, rng)


class OneTooMany(GreedyVerifier):
    """Accepts one draft too many, if there is one."""

    name = "one_too_many"

    def verify(self, tree, p, rng):
        verdict = super().verify(tree, p, rng)
        following = tree.children(verdict.accepted[-1] if verdict.accepted else -1)
        if not following:
            return verdict
        accepted = (*verdict.accepted, following[0])
        return verdict._replace(accepted=accepted, token=p.argmax(following[0]))


class OtherNoise(SampledVerifier):
    """The target's law, but not the tokens of the seed: two draws for the first position."""

    name = "other_noise"

    def verify(self, tree, p, rng):
        if tree.tokens:
            p.draw(-1, rng)
        return walk(tree, lambda node: p.draw(node, rng))


class PicksButRecordsSoftmax(ModelDrafter):
    """Drafts greedily, and records the softmax that it did not draw from."""

    def draft(self, rows, plan):
        return [self._picked(tree) for tree in super().draft(rows, plan)]

    def _picked(self, tree):
        if not tree.tokens or tree.law(0) is None:
            return tree
        return DraftTree.chain([int(tree.law(0).argmax())], tree.source, tree.laws[:1])


class RecordsFlatter(ModelDrafter):
    """Records laws at twice the temperature that it drew at."""

    def draft(self, rows, plan):
        return [
            replace(tree, laws=tuple(None if q is None else _flatter(q) for q in tree.laws))
            for tree in super().draft(rows, plan)
        ]


def _flatter(q_V: torch.Tensor) -> torch.Tensor:
    root_V = q_V.double().sqrt()
    return root_V / root_V.sum()
