"""Sequence: what is derived from its request and its log."""

import sys

import pytest

from outrider.request import Request, SamplingParams
from outrider.sequence import Sequence


def sequence(max_tokens: int | None) -> Sequence:
    request = Request(
        id="r", prompt_token_ids=(5, 6, 7), sampling=SamplingParams(max_tokens=max_tokens)
    )
    return Sequence(id="r#0", request=request, index=0, tokens=[5, 6, 7], seed=0)


@pytest.mark.parametrize(("max_tokens", "max_len"), [(1, 4), (20, 23), (None, sys.maxsize)])
def test_a_sequence_is_as_long_as_its_prompt_and_its_answer_may_be(max_tokens, max_len):
    seq = sequence(max_tokens)
    assert seq.max_len == max_len
    seq.tokens.append(8)
    assert (seq.max_len, seq.num_prompt, seq.num_generated) == (max_len, 3, 1)
