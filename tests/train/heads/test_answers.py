"""Answers come from the engine, are kept, and are learned without their prompts."""

from types import SimpleNamespace

import pytest

from outrider.errors import ConfigError
from outrider.train.heads import answers
from outrider.train.heads.answers import Asking, answered
from tests.train.heads.conftest import piece, random_pieces

ASKING = Asking("tiny", "cpu", "auto", 0.8, 5, 40, 3)


class Echo:
    """Answers with the prompt backwards."""

    def __init__(self):
        self.asked = []

    def generate(self, prompts, sampling):
        self.asked += list(zip(prompts, sampling, strict=True))
        return [SimpleNamespace(token_ids=prompt[::-1]) for prompt in prompts]


def test_only_answers_are_learned(tmp_path):
    echo = Echo()
    (found,) = answered(random_pieces(9), ASKING, tmp_path, llm=echo)
    first, second = random_pieces(9)[0].text.tokens[:2]
    assert found.text.tokens == [first, second, second, first]
    assert found.text.is_learned == [False, False, True, True]
    ((_, sampling),) = echo.asked
    assert (sampling.temperature, sampling.max_tokens) == (0.8, 5)


def test_answers_are_written_once(tmp_path, monkeypatch):
    monkeypatch.setattr(answers, "AT_ONCE", 2)
    pieces = random_pieces(9, 10, 11)
    first = answered(pieces[:2], ASKING, tmp_path, llm=Echo())
    with (tmp_path / answers.FILE).open("a") as file:
        file.write('{"key": "cut off')
    echo = Echo()
    again = answered(pieces, ASKING, tmp_path, llm=echo)
    assert [prompt for prompt, _ in echo.asked] == [pieces[2].text.tokens[:2]]
    assert again[:2] == first
    other = Echo()
    answered(pieces, ASKING._replace(temperature=0.0), tmp_path, llm=other)
    assert len(other.asked) == 3, "at another temperature they are others"


def test_a_seed_is_a_function_of_the_prompt(tmp_path):
    seeds = []
    for folder in ("a", "b"):
        echo = Echo()
        answered(random_pieces(9, 10), ASKING, tmp_path / folder, llm=echo)
        seeds.append([sampling.seed for _, sampling in echo.asked])
    assert seeds[0] == seeds[1]
    assert len(set(seeds[0])) == 2


def test_prompts_must_leave_room(tmp_path):
    long = piece(list(range(40)))
    long = long._replace(text=long.text._replace(num_prompt=38))
    with pytest.raises(ConfigError, match="raise window"):
        answered([long], ASKING, tmp_path, llm=Echo())
