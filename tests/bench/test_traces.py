"""Traces: four layouts to one form, and prompts whose shared blocks are shared tokens."""

from itertools import pairwise
from pathlib import Path

import pytest

from outrider.bench.traces import Arrival, Filler, Trace, read_trace
from outrider.errors import ConfigError

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:47.1805900,396,109
2023-11-16 18:15:46.9305900,9,0
"""
AZURE_2024 = """TIMESTAMP,ContextTokens,GeneratedTokens
2024-05-10 00:00:00.009930+00:00,10,4
2024-05-10 00:00:01+00:00,11,5
"""
MOONCAKE = """{"timestamp": 500, "input_length": 1100, "output_length": 3, "hash_ids": [0, 1, 2]}
{"timestamp": 2000, "input_length": 1030, "output_length": 4, "hash_ids": [0, 1, 9]}
"""
BURST = """Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,472,18,490,Conversation log
45,GPT-4,1087,0,1087,Conversation log
118,ChatGPT,417,276,693,Conversation log
"""
VIDUR = "num_prefill_tokens,num_decode_tokens,num_total_tokens,pd_ratio\n3772,54,3826,69.8\n"


def read(tmp_path: Path, text: str, name: str = "trace.csv") -> Trace:
    path = tmp_path / name
    path.write_text(text)
    return read_trace(path)


def test_layouts(tmp_path: Path) -> None:
    azure = read(tmp_path, AZURE)
    assert [(a.num_prompt_tokens, a.num_tokens) for a in azure.arrivals] == [(374, 44), (396, 109)]
    assert [a.at_s for a in azure.arrivals] == pytest.approx([0.0, 0.5], abs=1e-5)
    assert azure.left_out == {"no prompt or no answer": 1}
    assert azure.rate == pytest.approx(2.0, rel=1e-4)
    later = read(tmp_path, AZURE_2024)
    assert [a.at_s for a in later.arrivals] == pytest.approx([0.0, 0.99007], abs=1e-5)
    mooncake = read(tmp_path, MOONCAKE)
    assert mooncake.layout == "mooncake"
    assert mooncake.arrivals[1] == Arrival(1.5, 1030, 4, ("0", "1", "9"), 512)
    burst = read(tmp_path, BURST)
    assert [a.at_s for a in burst.arrivals] == [0.0, 113.0]
    vidur = read(tmp_path, VIDUR)
    assert (vidur.layout, vidur.has_times, vidur.rate) == ("vidur lengths", False, None)
    with pytest.raises(ConfigError, match="no times"):
        vidur.times()


def test_times_are_never_those_of_a_closed_loop(tmp_path: Path) -> None:
    times = read(tmp_path, MOONCAKE).times()
    assert 0.0 < times[0] < 1e-6
    assert times[1] == 1.5


def test_changes_of_pace_and_length(tmp_path: Path) -> None:
    trace = read(tmp_path, MOONCAKE)
    assert trace.faster(3.0).times()[1] == pytest.approx(0.5)
    short = trace.shorter(0.1).arrivals[0]
    assert (short.num_prompt_tokens, short.num_tokens, short.block_tokens) == (110, 1, 51)
    fitting = trace.fitting(1050)
    assert [a.num_prompt_tokens for a in fitting.arrivals] == [1030]
    assert fitting.left_out == {"longer than 1050 tokens": 1}
    assert trace.fitting(None) is trace
    assert len(trace.take(1).arrivals) == 1
    assert trace.hash != trace.take(1).hash
    with pytest.raises(ConfigError, match="scale"):
        trace.fitting(100)
    with pytest.raises(ConfigError, match="speed=0"):
        trace.faster(0)


def test_equal_blocks_are_equal_tokens_and_the_rest_is_their_own(tmp_path: Path) -> None:
    first, second = read(tmp_path, MOONCAKE).shorter(0.25).arrivals
    filler = Filler(["abcdefghijklmnopqrstuvwxyz " * 40], lambda text: list(text.encode()))
    assert filler.is_exact
    a, b = filler.prompt(first, "0"), filler.prompt(second, "1")
    assert (len(a), len(b)) == (275, 258)
    assert a[:256] == b[:256], "two blocks of 512 / 4 tokens are shared"
    assert a[256:258] != b[256:258]
    assert filler.prompt(first, "0") == a
    plain = Arrival(0.0, 100, 5)
    assert filler.prompt(plain, "2") != filler.prompt(plain, "3")


def test_without_a_tokenizer_lengths_are_words(tmp_path: Path) -> None:
    filler = Filler(["one two three", "four five"])
    prompt = filler.prompt(Arrival(0.0, 100, 5), "0")
    assert isinstance(prompt, str)
    assert len(prompt.split()) == 75
    assert not filler.is_exact
    with pytest.raises(ConfigError, match="no text"):
        Filler([""])


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("a,b\n1,2\n", "columns a, b"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "holds no request"),
        (AZURE.replace("374", "many"), "request 1"),
        (BURST.splitlines()[0] + "\n5,x,3,0,3,log\n", "no request with an answer"),
        ("{no json", "no JSON"),
    ],
)
def test_mistakes_are_told(tmp_path: Path, text: str, part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        read(tmp_path, text)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no trace"):
        read_trace(tmp_path / "none.csv")


def test_recorded_traces(shared_data: Path) -> None:
    azure = read_trace(shared_data / "traces" / "AzureLLMInferenceTrace_conv.csv")
    assert len(azure.arrivals) == 19366
    assert azure.rate == pytest.approx(5.53, abs=0.01)
    mooncake = read_trace(shared_data / "traces" / "mooncake_conversation_trace.jsonl")
    assert len(mooncake.arrivals) == 12031
    assert all(a.at_s <= b.at_s for a, b in pairwise(mooncake.arrivals))
    for arrival in mooncake.arrivals[:100]:
        assert len(arrival.blocks) == -(-arrival.num_prompt_tokens // 512)
