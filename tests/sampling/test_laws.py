"""TargetLaws: the row of each node, its own path, and nothing for nodes nobody visits."""

import pytest
import torch

from outrider.errors import RequestError
from outrider.request import SamplingParams
from outrider.sampling.laws import TargetLaws, shape_roots
from outrider.sampling.rng import RootStream
from outrider.sampling.shaper import Shaper
from outrider.step import DraftTree

V = 8
TOKENS = [1, 2, 3]
TREE = DraftTree(tokens=(4, 5, 6), parents=(-1, -1, 0), source="test")


class Counted(Shaper):
    """A shaper that notes the paths it was asked for."""

    def __init__(self, sampling: SamplingParams) -> None:
        super().__init__(sampling, vocab_size=V, eos_token_ids=[0], bad_words_ids=(), num_prompt=3)
        self.paths: list[tuple[int, ...]] = []

    def shape(self, logits_V, tokens, path=(), mask_V=None):
        self.paths.append(tuple(path))
        return super().shape(logits_V, tokens, path, mask_V)


class AfterPath:
    """A grammar that allows the tokens above the last of the path only."""

    def mask(self, path_tokens=()):
        return torch.arange(V) > max(path_tokens, default=-1)


class Untouchable:
    """A stream nobody may draw from."""


def rows() -> torch.Tensor:
    return torch.randn(len(TREE) + 1, V, generator=torch.Generator().manual_seed(3))


def laws(sampling: SamplingParams, grammar=None) -> tuple[TargetLaws, Counted]:
    shaper = Counted(sampling)
    argmax = rows().argmax(dim=1).tolist()
    return TargetLaws(shaper, rows(), argmax, TOKENS, TREE.path_tokens, grammar), shaper


def test_each_node_has_its_own_row_and_path():
    p, shaper = laws(SamplingParams(temperature=1.0))
    for node in (-1, 0, 1, 2):
        assert torch.allclose(p.law(node), rows()[node + 1].double().softmax(dim=0))
        assert torch.allclose(p.log_law(node).exp(), p.law(node))
    assert shaper.paths == [(), (4,), (5,), (4, 6)]


def test_only_visited_nodes_are_shaped_and_only_once():
    p, shaper = laws(SamplingParams(temperature=1.0))
    for _ in range(3):
        p.law(0), p.argmax(0), p.draw(0, RootStream(0, 0, "verify"))
    assert shaper.paths == [(4,)]


def test_plain_greedy_reads_the_argmax_of_the_pass_and_shapes_nothing():
    p, shaper = laws(SamplingParams())
    assert [p.argmax(node) for node in (-1, 0, 1, 2)] == rows().argmax(dim=1).tolist()
    assert p.draw(1, Untouchable()) == p.argmax(1)
    assert shaper.paths == []


def test_shaped_greedy_moves_the_argmax_without_a_random_number():
    best = int(rows()[0].argmax())
    p, _ = laws(SamplingParams(logit_bias={best: -100.0}))
    second = int(rows()[0].topk(2).indices[1])
    assert p.argmax(-1) == p.draw(-1, Untouchable()) == second


def test_a_grammar_is_asked_along_the_path():
    p, _ = laws(SamplingParams(temperature=1.0, regex="any"), AfterPath())
    assert p.law(2)[:7].sum() == 0
    assert p.law(0)[:5].sum() == 0
    assert (p.law(-1) > 0).all()


def test_a_draw_follows_the_law():
    p, _ = laws(SamplingParams(temperature=1.0, top_k=2))
    stream = RootStream(1, 1, "verify")
    assert {p.draw(-1, stream) for _ in range(100)} == set(rows()[0].topk(2).indices.tolist())


def test_roots_are_shaped_together_where_a_temperature_is_all_and_keep_their_bits():
    """Two trees in one pass, between rows of others, and a request that asks for more."""
    logits_NV = torch.randn(7, V, generator=torch.Generator().manual_seed(5))
    argmax = logits_NV.argmax(dim=1).tolist()
    asked = [
        (SamplingParams(temperature=0.7), 1),
        (SamplingParams(temperature=1.3, top_k=3), 3),
        (SamplingParams(temperature=1.3), 5),
        (SamplingParams(), 6),
    ]
    alone, together = (
        [
            TargetLaws(Counted(s), logits_NV, argmax, TOKENS, TREE.path_tokens, None, first)
            for s, first in asked
        ]
        for _ in range(2)
    )
    shape_roots(logits_NV, together)
    for p, twin in zip(together, alone, strict=True):
        assert torch.equal(p.law(-1), twin.law(-1))
        assert torch.equal(p.log_law(-1), twin.log_law(-1))
    assert [len(p.shaper.paths) for p in together] == [1, 1, 1, 1], "for log_law, and unlike rows"


def test_a_root_that_is_no_number_fails_when_it_is_asked_for():
    logits_NV = torch.stack([torch.zeros(V), torch.full((V,), float("nan"))])
    sound, broken = (
        TargetLaws(
            Counted(SamplingParams(temperature=1.0)),
            logits_NV,
            [0, -1],
            TOKENS,
            TREE.path_tokens,
            None,
            first,
        )
        for first in (0, 1)
    )
    shape_roots(logits_NV, [sound, broken])
    assert torch.allclose(sound.law(-1), torch.full((V,), 1 / V, dtype=torch.float64))
    with pytest.raises(RequestError, match="nan"):
        broken.law(-1)
