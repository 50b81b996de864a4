"""Scores against brute force, baselines against their slow twins, loops against the eye."""

import pytest
import torch

from outrider.errors import ConfigError
from outrider.train.acceptance import lookup_ngram, repeat_last
from outrider.train.heads import acceptance as acceptance_module
from outrider.train.heads.acceptance import COPY, HEAD, NGRAM, lookup, score
from outrider.train.heads.eagle3 import Eagle3
from outrider.train.heads.medusa import Medusa
from outrider.train.heads.small import Small
from tests.train.heads.conftest import law, piece, random_pieces, settings

K = 3


def brute_force(teacher, pieces, propose):
    """Chances and matches of single guesses, position by position. Rows know token t + 1."""
    drawn, greedy = [], []
    for one in pieces:
        tokens = one.text.tokens
        p = law(teacher, tokens).softmax(-1)
        for row in range(len(tokens) - 1 - K):
            guesses = propose(tokens[: row + 2], K)
            guesses = guesses + [None] * (K - len(guesses))
            laws = [p[row + 1 + depth] for depth in range(K)]
            pairs = list(zip(guesses, laws, strict=True))
            drawn.append([0.0 if g is None else float(law_V[g]) for g, law_V in pairs])
            greedy.append([float(g == int(law_V.argmax())) for g, law_V in pairs])
    return torch.tensor(drawn), torch.tensor(greedy)


@pytest.fixture
def pieces():
    loop = piece([11, 12, 13, 14] * 8)
    return [*random_pieces(9, 20), loop, piece([30, 31, 32] * 3 + [30, 40, 31])]


@pytest.mark.parametrize(("name", "propose"), [(COPY, repeat_last), (NGRAM, lookup_ngram)])
def test_baselines_are_what_brute_force_says(teacher, pieces, monkeypatch, name, propose):
    monkeypatch.setattr(acceptance_module, "ROWS", 7)
    student = Medusa.fresh(teacher, settings("medusa"), None)
    marks = score(student, teacher, pieces, K, tokens_per_pass=40).marks[name]
    drawn, greedy = brute_force(teacher, pieces, propose)
    assert torch.allclose(marks.drawn_MK, drawn, atol=1e-5)
    assert torch.equal(marks.greedy_MK, greedy)


def test_the_head_is_scored_where_it_is_served(teacher, pieces):
    """An untrained Medusa says at row t what the target says at t; verified one further on."""
    student = Medusa.fresh(teacher, settings("medusa"), None)
    marks = score(student, teacher, pieces, K).marks[HEAD]
    expected = []
    for one in pieces:
        p = law(teacher, one.text.tokens).softmax(-1)
        for row in range(len(p) - 1 - K):
            later = p[row + 1 : row + 1 + K]
            expected.append(torch.minimum(p[row], later).sum(-1))
    assert torch.allclose(marks.drawn_MK, torch.stack(expected), atol=1e-5)


def test_a_draft_vocabulary_counts_against_the_whole_law(teacher, pieces):
    """What the draft cannot say never stands, and p is not made to sum to one again."""
    ids = torch.arange(0, 256, 2)
    student = Medusa.fresh(teacher, settings("medusa", depths=1), ids)
    marks = score(student, teacher, pieces[:1], 1).marks[HEAD]
    logits = law(teacher, pieces[0].text.tokens)
    p, q = logits.softmax(-1), logits[:, ids].softmax(-1)
    rows = len(logits) - 2
    expected = torch.minimum(p[1 : 1 + rows, ids], q[:rows]).sum(-1)
    assert torch.allclose(marks.drawn_MK[:, 0], expected, atol=1e-5)
    likeliest = ids[q[:rows].argmax(-1)]
    assert torch.equal(marks.greedy_MK[:, 0], (likeliest == p[1 : 1 + rows].argmax(-1)).float())


def test_a_draft_that_is_the_target_always_stands(teacher, pieces, monkeypatch):
    """The rows of a decoder, whose guess is verified where it was made."""
    student = Small.fresh(teacher, settings("draft_model"), None)

    def states(batch, taught, num_depths):
        index_N = torch.arange(len(batch))
        for depth in range(num_depths):
            yield taught.final_NH[(index_N + depth).clamp_max(len(batch) - 1)]

    monkeypatch.setattr(student, "states", states)
    monkeypatch.setattr(student, "logits", lambda depth, states_RD: teacher.logits(states_RD))
    scores = score(student, teacher, pieces, K)
    assert scores.rates().joint == pytest.approx([1.0] * K, abs=1e-5)
    assert scores.rates(greedy=True).length == 1.0 + K


def test_rates_are_products_and_shares(teacher, pieces):
    scores = score(Eagle3.fresh(teacher, settings("eagle3"), None), teacher, pieces, K)
    drawn = scores.marks[HEAD].drawn_MK
    first, second = drawn[:, 0].mean(), (drawn[:, 0] * drawn[:, 1]).mean()
    rates = scores.rates()
    assert rates.joint[:2] == pytest.approx([float(first), float(second)], abs=1e-6)
    assert rates.conditional[1] == pytest.approx(float(second / first), abs=1e-6)
    assert rates.length == pytest.approx(1.0 + sum(rates.joint))


def test_lookup_is_its_slow_twin():
    generator = torch.Generator().manual_seed(3)
    for size in (2, 3, 5):
        tokens = torch.randint(0, size, (60,), generator=generator).tolist()
        guesses = lookup(tokens, 4)
        for stop in range(1, len(tokens) + 1):
            slow = lookup_ngram(tokens[:stop], 4)
            assert guesses[stop - 1] == slow + [-1] * (4 - len(slow))


def test_loops_are_flagged(teacher):
    free, loop = random_pieces(40)[0], piece([9, 8, 7] * 14)
    student = Medusa.fresh(teacher, settings("medusa"), None)
    scores = score(student, teacher, [free, loop], K)
    is_of_loop = scores.unit_M == scores.units.index(loop.unit)
    assert not scores.is_loop_M[~is_of_loop].any()
    # Row t is in a loop once the 24 tokens up to it repeat with a short period.
    assert scores.is_loop_M[is_of_loop].int().tolist() == [0] * 23 + [1] * (42 - 1 - K - 23)


def test_too_short_a_text_is_told(teacher):
    student = Medusa.fresh(teacher, settings("medusa"), None)
    with pytest.raises(ConfigError, match="3 learned tokens in a row"):
        score(student, teacher, [piece([5, 6, 7])], K)
    with pytest.raises(ConfigError, match="give longer texts"):
        score(student, teacher, [], K)
