"""Padding: frames keep their meaning, and their sizes say next to nothing."""

import json

from hypothesis import given, strategies as st

from outrider.stream.pad import SMALLEST, pad

FRAMES = st.dictionaries(st.text(max_size=8), st.text(max_size=900), min_size=1, max_size=3)


@given(FRAMES, st.booleans(), st.integers(0, 40))
def test_sizes_are_buckets_and_members_stay(frame, is_ascii, num_other):
    frame.pop("obfuscation", None)
    data = json.dumps({"id": 1, **frame}, ensure_ascii=is_ascii)
    padded = pad(data, num_other=num_other)
    size = len(padded.encode()) + num_other
    assert size % SMALLEST == 0
    assert size & (size - 1) == 0, "a power of two"
    assert size >= 2 * SMALLEST or len(data.encode()) < SMALLEST
    read = json.loads(padded)
    assert list(read)[-1] == "obfuscation"
    del read["obfuscation"]
    assert read == json.loads(data)


def test_bursts_of_one_and_of_five_tokens_look_alike():
    frames = [json.dumps({"choices": [{"delta": {"content": "word " * n}}]}) for n in range(1, 9)]
    assert len({len(frame) for frame in frames}) == 8
    assert len({len(pad(frame)) for frame in frames}) == 1


def test_the_filler_is_random_unless_given():
    data = '{"a":1}'
    assert pad(data) != pad(data)
    assert pad(data, noise=lambda n: "-" * n) == pad(data, noise=lambda n: "-" * n)
