"""GreedyVerifier: the walk along the argmax, without a random number."""

from outrider.step import EMPTY_TREE, DraftTree, Verdict
from outrider.testing import ToyLaws, ToyModel
from outrider.verify.greedy import GreedyVerifier


class Untouchable:
    """A stream nobody may draw from."""


def test_drafts_stand_while_they_are_the_argmax():
    p = ToyModel("p", 4)
    first = int(p(()).argmax())
    second = int(p((first,)).argmax())
    third = int(p((first, second)).argmax())
    other = (first + 1) % 4
    trees = {
        EMPTY_TREE: Verdict((), first),
        DraftTree.chain([other, second], "test"): Verdict((), first),
        DraftTree.chain([first, second], "test"): Verdict((0, 1), third),
        DraftTree(tokens=(other, first, second), parents=(-1, -1, 1)): Verdict((1, 2), third),
    }
    for tree, verdict in trees.items():
        assert GreedyVerifier().verify(tree, ToyLaws(p, (), tree), Untouchable()) == verdict
