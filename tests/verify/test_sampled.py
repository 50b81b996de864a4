"""SampledVerifier: where the walk ends, and tokens that no draft can change."""

import pytest
import torch
from hypothesis import given, strategies as st

from outrider.sampling.rng import PositionStream, Stream
from outrider.step import EMPTY_TREE, DraftTree, Verdict
from outrider.testing import ToyLaws, ToyModel, draw_tree, pick_tree
from outrider.testing.enumerate import Context, Draft, Model
from outrider.verify.sampled import SampledVerifier

V = 6
LENGTH = 40


class Planned:
    """A stream whose picks are decided beforehand."""

    def __init__(self, *tokens: int) -> None:
        self._tokens = list(tokens)

    def pick(self, law_V: torch.Tensor) -> int:
        return self._tokens.pop(0)

    def flip(self, probability: float) -> bool:
        raise AssertionError("node-wise sampling tosses no coins")


def verify(tree: DraftTree, *tokens: int) -> Verdict:
    return SampledVerifier().verify(tree, ToyLaws(ToyModel("p", V), (), tree), Planned(*tokens))


def test_the_walk_ends_where_no_child_holds_the_token():
    tree = DraftTree(tokens=(1, 2, 3, 4), parents=(-1, -1, 1, 2), source="test")
    assert verify(tree, 5) == Verdict((), 5)
    assert verify(tree, 1, 3) == Verdict((0,), 3)
    assert verify(tree, 2, 3, 0) == Verdict((1, 2), 0)
    assert verify(tree, 2, 3, 4, 5) == Verdict((1, 2, 3), 5)


def test_plain_decoding_is_a_tree_without_nodes():
    assert verify(EMPTY_TREE, 3) == Verdict((), 3)


def test_of_equal_siblings_the_first_drawn_is_taken():
    tree = DraftTree(tokens=(1, 1, 2), parents=(-1, -1, 0), source="test")
    assert verify(tree, 1, 2, 0) == Verdict((0, 2), 0)


def by_definition(tree: DraftTree, tokens: list[int]) -> Verdict:
    """From node to node: the first child that holds the token, until none does."""
    accepted: list[int] = []
    while True:
        token = tokens[len(accepted)]
        children = tree.children(accepted[-1] if accepted else -1)
        found = [child for child in children if tree.tokens[child] == token]
        if not found:
            return Verdict(tuple(accepted), token)
        accepted.append(found[0])


@given(st.data())
def test_one_pass_over_the_nodes_is_the_walk_from_child_to_child(data):
    num_nodes = data.draw(st.integers(0, 8))
    tokens = data.draw(st.lists(st.integers(0, 2), min_size=num_nodes, max_size=num_nodes))
    parents = [data.draw(st.integers(-1, node - 1)) for node in range(num_nodes)]
    tree = DraftTree(tokens=tuple(tokens), parents=tuple(parents), source="test")
    picked = data.draw(st.lists(st.integers(0, 2), min_size=9, max_size=9))
    assert verify(tree, *picked) == by_definition(tree, picked)


def junk(context: Context, stream: Stream) -> DraftTree:
    tokens = [(7 * len(context) + i) % V for i in range(5)]
    return DraftTree(tokens=tuple(tokens), parents=(-1, -1, 0, 1, 2), source="junk")


def coupled(q: Model, seed: int, widths: tuple[int, ...]) -> Draft:
    """Siblings are the best of log q plus the target's own noise, one noise per depth."""

    def noisy(path: Context) -> torch.Tensor:
        scores_V = q(path).log() + PositionStream(seed, 0).noise(len(path), V)
        return scores_V.softmax(dim=0)

    return pick_tree(noisy, widths)


def decode(p: Model, draft: Draft, seed: int) -> tuple[list[int], int]:
    """LENGTH tokens as the engine makes them, and how many calls it took."""
    tokens: Context = ()
    num_calls = 0
    while len(tokens) < LENGTH:
        tree = draft(tokens, PositionStream(seed + 1000, len(tokens)))
        laws = ToyLaws(p, tokens, tree)
        verdict = SampledVerifier().verify(tree, laws, PositionStream(seed, len(tokens)))
        tokens += (*(tree.tokens[node] for node in verdict.accepted), verdict.token)
        num_calls += 1
    return list(tokens[:LENGTH]), num_calls


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("widths", [(1,), (1, 1, 1), (1,) * 7, (2, 1), (2, 2), (3, 2, 1)])
def test_a_seed_gives_the_same_tokens_whatever_is_drafted(seed, widths):
    p, q = ToyModel("p", V, 0.2), ToyModel("q", V)
    plain, num_plain = decode(p, lambda context, stream: EMPTY_TREE, seed)
    assert num_plain == LENGTH
    drafts = [junk, pick_tree(q, widths), draw_tree(q, widths), coupled(q, seed, widths)]
    for draft in drafts:
        assert decode(p, draft, seed)[0] == plain


def test_a_perfect_coupled_drafter_is_always_believed():
    p = ToyModel("p", V)
    assert decode(p, coupled(p, 3, (1, 1, 1)), 3)[1] == LENGTH // 4


def test_coupling_helps_an_imperfect_drafter():
    p = ToyModel("p", V)

    def near(context: Context) -> torch.Tensor:
        return 0.8 * p(context) + 0.2 / V

    calls = {
        name: sum(decode(p, make(seed), seed)[1] for seed in range(10))
        for name, make in {
            "coupled": lambda seed: coupled(near, seed, (1, 1, 1)),
            "drawn": lambda seed: draw_tree(near, (1, 1, 1)),
        }.items()
    }
    assert calls["coupled"] < 0.75 * calls["drawn"]
