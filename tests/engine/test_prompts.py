"""Prompts: text, token ids and messages become requests; what is none of them is refused."""

import pytest

from outrider.engine.prompts import encode, make_request, short
from outrider.errors import RequestError
from outrider.models.hub import resolve
from outrider.request import SamplingParams, SpeculationParams, StreamParams
from outrider.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(resolve("demo"))


def request_of(prompt, tokenizer, **sampling):
    return make_request(
        "r",
        prompt,
        SamplingParams(**sampling),
        SpeculationParams(method="ngram"),
        StreamParams(),
        tokenizer,
        priority=2,
        tenant="t",
    )


def test_text_is_encoded(tokenizer):
    text = "def main(argv):\n    naïve → 😀"
    ids = encode(text, tokenizer)
    assert list(ids) == tokenizer.encode(text)
    assert tokenizer.decode(list(ids)) == text


def test_messages_go_through_the_chat_template(tokenizer):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    text = tokenizer.decode(list(encode(messages, tokenizer)), skip_special_tokens=False)
    assert text == "<|system|>\nBe brief.<|end|>\n<|user|>\nHi<|end|>\n<|assistant|>\n"
    assert encode(tuple(messages), tokenizer) == encode(messages, tokenizer)


def test_token_ids_stay_as_they_are():
    assert encode([3, 1, 2], None) == encode((3, 1, 2), None) == (3, 1, 2)


@pytest.mark.parametrize(
    "wrong",
    [[], [1, "a"], [1.5], [True], [None], [[1, 2]], [{"role": "user"}, 3], 7, None],
    ids=repr,
)
def test_anything_else_is_refused_with_the_value(tokenizer, wrong):
    with pytest.raises(RequestError, match=r"give a text, token ids, or messages") as caught:
        encode(wrong, tokenizer)
    assert repr(wrong) in str(caught.value)


@pytest.mark.parametrize(
    ("messages", "match"),
    [
        ([{"content": "x"}], "role"),
        ([{"role": "user"}], "content"),
        ([{"role": "wizard", "content": "x"}], "unknown role wizard"),
    ],
)
def test_malformed_messages_are_refused(tokenizer, messages, match):
    with pytest.raises(RequestError, match=match):
        encode(messages, tokenizer)


def test_an_empty_text_is_refused(tokenizer):
    with pytest.raises(RequestError, match="the prompt is empty"):
        encode("", tokenizer)


def test_everything_asked_arrives_in_the_request(tokenizer):
    request = request_of([4, 5], tokenizer, seed=9, n=2)
    assert (request.id, request.prompt_token_ids, request.seed) == ("r", (4, 5), 9)
    assert request.sampling.n == 2
    assert request.speculation.method == "ngram"
    assert (request.priority, request.tenant) == (2, "t")


def test_a_seed_is_drawn_where_none_was_given(tokenizer):
    seeds = {request_of([4], tokenizer).seed for _ in range(4)}
    assert len(seeds) == 4
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_bad_words_as_they_read_at_the_start_and_after_a_space(tokenizer):
    found = request_of([4], tokenizer, bad_words=["main", "main", " def"]).bad_words_ids
    texts = [tokenizer.decode(list(ids)) for ids in found]
    assert texts == ["main", " main", " def"]
    assert request_of([4], None).bad_words_ids == ()


def test_long_values_are_cut_in_messages():
    assert short([1, 2]) == "[1, 2]"
    assert len(short(list(range(1000)))) == 60
    assert "\n" not in short("a\nb")
