"""Where answers part, and by how much the target itself preferred its token."""

import pytest
import torch

from outrider.bench.lossless.forced import margin, margin_changes, rows
from outrider.bench.lossless.identity import (
    Answer,
    Difference,
    Rounding,
    differences,
    examine,
    first_difference,
)
from outrider.request import Request, SamplingParams
from outrider.testing import run, tiny_engine

PROMPT = (30, 31, 32, 33, 30, 31, 40)
EXCUSING = Rounding(tie_eps=0.5, largest=0.5, num_positions=1, width=4, is_bitwise=False)


def answer(tokens, text="", error=""):
    return Answer(id="q", text=text, token_ids=tokens, error=error)


@pytest.mark.parametrize(
    ("base", "arm", "expected"),
    [
        ((1, 2, 3), (1, 2, 3), None),
        ((1, 2, 3), (1, 5, 3), (1, 2, 5)),
        ((1, 2, 3), (1, 2), (2, 3, None)),
        ((1,), (1, 2), (1, None, 2)),
        ((), (4,), (0, None, 4)),
    ],
)
def test_first_difference(base, arm, expected):
    found = first_difference(answer(base), answer(arm))
    assert (found and (found.position, found.base, found.arm)) == expected


def test_text_counts_where_there_are_no_tokens():
    found = first_difference(answer(None, "abc"), answer((1,), "abd"))
    assert (found.position, found.base, found.arm) == (2, "c", "d")


def test_failed_answers_are_no_differences():
    assert not list(differences([answer((1,))], [answer((), error="lost")]))


@pytest.fixture(scope="module")
def engine():
    return tiny_engine(options={"check_integrity": False, "max_num_batched_tokens": 16})


@pytest.fixture(scope="module")
def greedy(engine):
    sampling = SamplingParams(max_tokens=20, ignore_eos=True)
    request = Request(id="r", prompt_token_ids=PROMPT, sampling=sampling)
    return tuple(run(engine, [request])["r", 0])


@pytest.mark.parametrize("width", [1, 2, 5, 64])
def test_forced_rows_are_those_of_decoding(engine, greedy, width):
    found = [int(row_V.argmax()) for row_V in rows(engine, (*PROMPT, *greedy[:-1]), 7, width)]
    assert tuple(found) == greedy
    assert engine.manager.num_used == 0


def test_forced_rows_of_a_long_prompt_run_in_chunks(engine, greedy):
    tokens = (*PROMPT, *greedy)
    whole = list(rows(engine, tokens, 1, 1))
    late = list(rows(engine, tokens, len(tokens), 3))
    assert torch.equal(whole[-1], late[0])


def test_no_margin_changes_on_batch_invariant_kernels(engine, greedy):
    assert margin_changes(engine, (*PROMPT, *greedy), 7, 5) == [0.0] * 21


def test_margin_in_nats_and_steps_of_the_format():
    logits_V = torch.tensor([4.0, 4.5, -1.0])
    found = margin(logits_V, 1, 0, torch.bfloat16)
    assert found.nats == 0.5
    assert found.ulp == 16.0  # bfloat16 has 2 ** -5 between 4 and 8
    assert margin(logits_V, 0, 1, torch.float32).nats == -0.5


def test_a_difference_is_excused_only_within_rounding(engine, greedy):
    at = 3
    (row_V,) = rows(engine, (*PROMPT, *greedy[:at]), 7 + at, 1)
    best, second = row_V.topk(2).indices.tolist()
    assert best == greedy[at]
    found = Difference(id="q", position=at, base=best, arm=second)
    gap = float(row_V[best] - row_V[second])
    for tie_eps, is_near in ((2 * gap, True), (gap / 2, False)):
        rounding = Rounding(
            tie_eps=tie_eps, largest=tie_eps, num_positions=1, width=4, is_bitwise=False
        )
        seen = examine(engine, found, PROMPT, greedy, rounding)
        assert seen.is_near_tie is is_near
        assert seen.margin_nats == pytest.approx(gap, rel=1e-5)
    ended = examine(engine, found, PROMPT, greedy, EXCUSING)
    assert ended.position == at


def test_an_answer_that_ends_early_is_no_near_tie(engine, greedy):
    found = first_difference(answer(greedy), answer(greedy[:4]))
    assert examine(engine, found, PROMPT, greedy, EXCUSING).is_near_tie is False


def test_sampled_answers_are_examined_with_their_noise(engine):
    sampling = SamplingParams(max_tokens=12, temperature=0.9, ignore_eos=True)
    request = Request(id="r", prompt_token_ids=PROMPT, sampling=sampling, seed=7)
    drawn = tuple(run(engine, [request])["r", 0])
    for at, token in enumerate(drawn):
        other = Difference(id="q", position=at, base=token, arm=(token + 1) % 256)
        seen = examine(engine, other, PROMPT, drawn, EXCUSING, temperature=0.9, seed=7)
        assert seen.margin_nats > 0.0, "with the noise, what was drawn is the best"
