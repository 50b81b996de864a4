"""The protocol: invariants I1 to I10 over random drafts, stops and readers, and the transcript.

Invariants are numbered I1 to I13; I3 and I11 belong to the server.
"""

import json
import random
from itertools import pairwise

import pytest
from hypothesis import given, settings, strategies as st

from outrider.request import COMMIT_UNITS, Request, SamplingParams, SpeculationParams, StreamParams
from outrider.sequence import Sequence
from outrider.step import Batch, Commit, DraftTree, Row
from outrider.stream.detokenize import Detokenizer
from outrider.stream.erasure import Erasure
from outrider.stream.events import Committed, Tail
from outrider.stream.outbox import Outbox
from outrider.stream.stability import Stability
from outrider.stream.streamer import Streamer
from outrider.testing import ScriptedDrafter, junk_tree, tiny_engine

EURO, SMILE = "€".encode(), "😀".encode()
WHOLE = [" ", "a", "b", "ab", "é", "日", "\n", ". ", "e\u0301", ""]
BROKEN = [EURO[:1], EURO[1:], SMILE[:2], SMILE[2:], b"\x80"]
PIECES = [piece.encode() for piece in WHOLE] * 6 + BROKEN
PROMPT = tuple(range(40, 49))
OFF = SpeculationParams(method="off")
UNGATED = StreamParams(visibility="provisional", min_stability=0.0)


class PieceTokenizer:
    """Every id of the tiny model reads as some piece, now and then as part of a character."""

    special_ids = frozenset({3})

    def decode(self, ids, skip_special_tokens=True):
        pieces = (PIECES[i % len(PIECES)] for i in ids if i not in self.special_ids)
        return b"".join(pieces).decode(errors="replace")


def told(stream, sampling, truth=(), seed=0, k=4):
    """All events of one request in an engine of its own, in order."""
    drafter = ScriptedDrafter(junk_tree(256, truth, seed))
    engine = tiny_engine(drafters=[drafter], draft_seed=None, tokenizer=PieceTokenizer())
    spec = SpeculationParams(method="scripted", num_draft_tokens=k, width=2, num_nodes=2 * k)
    request = Request(
        id="r",
        prompt_token_ids=PROMPT,
        sampling=sampling,
        speculation=spec if truth else OFF,
        stream=stream,
        seed=11,
    )
    engine.add(request)
    events = []
    while engine.has_work():
        events += engine.step()
    return events


def committed(events):
    return [event for event in events if isinstance(event, Committed)]


def tokens_of(events):
    return tuple(t for event in committed(events) for t in event.token_ids)


def text_of(events):
    return "".join(event.text for event in committed(events))


stop_texts = st.text(alphabet="ab é\n€.", min_size=1, max_size=3)
stops = st.lists(stop_texts, max_size=2).map(tuple)
samplings = st.builds(
    lambda stop, heat: SamplingParams(
        max_tokens=24, ignore_eos=True, temperature=heat, stop=stop, seed=1
    ),
    stops,
    st.sampled_from([0.0, 1.0]),
)
streams = st.builds(
    lambda gate, most, unit: StreamParams(
        visibility="provisional", min_stability=gate, max_tail_tokens=most, commit_unit=unit
    ),
    st.sampled_from([0.0, 0.3, 0.5, 0.8]),
    st.sampled_from([1, 3, 16]),
    st.sampled_from(COMMIT_UNITS),
)
cases = settings(max_examples=60)


@cases
@given(samplings, streams, st.integers(0, 99), st.integers(1, 6))
def test_committed_text_is_the_same_with_tails_and_without(sampling, stream, seed, k):
    """I1, I2, I5, I10: tokens, text and metrics do not know of tails; nothing follows the end."""
    plain = told(StreamParams(), sampling)
    truth = PROMPT + tokens_of(plain)
    hidden = told(StreamParams(), sampling, truth, seed, k)
    shown = told(stream, sampling, truth, seed, k)
    assert tokens_of(shown) == tokens_of(hidden) == tokens_of(plain)
    assert text_of(shown) == text_of(hidden) == text_of(plain)
    assert committed(shown)[-1].metrics == committed(hidden)[-1].metrics
    assert shown[-1].finish_reason == plain[-1].finish_reason
    assert shown[-1].stop_reason == plain[-1].stop_reason
    assert all(event.finish_reason is None for event in committed(shown)[:-1])


@cases
@given(samplings, streams, st.integers(0, 99), st.integers(1, 6))
def test_every_tail_continues_what_is_committed(sampling, stream, seed, k):
    """I4, I7, I8, I9; and no tail that is on show already is sent again."""
    truth = PROMPT + tokens_of(told(StreamParams(), sampling))
    chars, version, on_show, tokens = 0, 0, "", ()
    for event in told(stream, sampling, truth, seed, k):
        if isinstance(event, Committed):
            chars += len(event.text)
            tokens += event.token_ids
            on_show = "" if event.text else on_show
            continue
        assert event.committed_chars == chars
        assert event.version == version + 1
        assert event.text != on_show
        assert 0.0 < event.stability <= 1.0
        assert event.stability >= stream.min_stability
        if event.text and stream.commit_unit == "token":
            assert len(event.token_ids) <= stream.max_tail_tokens
            assert event.text == as_if_committed(tokens, event.token_ids)
        version, on_show = event.version, event.text


def as_if_committed(tokens, ahead):
    """What more tokens would tell; all of it, for characters are whole."""
    detokenizer = Detokenizer(PieceTokenizer(), context=PROMPT[-6:])
    detokenizer.add(tokens)
    detokenizer.take()
    detokenizer.add(ahead)
    text = detokenizer.take()
    assert detokenizer.take(is_last=True) == ""
    return text


@cases
@given(stop_texts, st.integers(0, 99), st.sampled_from(COMMIT_UNITS))
def test_no_tail_shows_where_a_stop_text_may_have_begun(stop, seed, unit):
    """I6: the text on the screen never holds a stop text, nor ends like the beginning of one."""
    sampling = SamplingParams(max_tokens=40, ignore_eos=True, stop=(stop,), temperature=1.0)
    truth = PROMPT + tokens_of(told(StreamParams(), sampling))
    stream = StreamParams(visibility="provisional", min_stability=0.0, commit_unit=unit)
    text = ""
    for event in told(stream, sampling, truth, seed, k=6):
        if isinstance(event, Committed):
            text += event.text
            continue
        screen = text + event.text
        assert stop not in screen
        if event.source != "deferred":  # that one is verified, and what follows it is known
            assert not any(screen.endswith(stop[:n]) for n in range(1, len(stop)))


class Client:
    """The whole client, for one text part."""

    def __init__(self):
        self.last, self.version, self.committed, self.tail = 3, 0, "", ""

    def take(self, frame):
        if "sequence_number" in frame:
            assert frame["sequence_number"] == self.last + 1, "durable numbers have no gaps"
            self.last, self.tail = frame["sequence_number"], ""
            self.committed += frame.get("delta", "")
        elif frame["base"] == self.last and frame["v"] > self.version:
            assert frame["committed_chars"] == len(self.committed)
            self.tail, self.version = frame["text"], frame["v"]


class Server:
    """As little as turns events into frames of the Responses dialect."""

    def __init__(self, outbox):
        self.outbox, self.number = outbox, 3

    def send(self, event):
        if isinstance(event, Tail):
            self.outbox.put_tail(tail_frame(event, self.number))
            return
        if event.text:
            self.durable({"type": "response.output_text.delta", "delta": event.text})
        if event.finish_reason is not None:
            self.durable({"type": "response.completed"})
            self.outbox.close()

    def durable(self, frame):
        self.number += 1
        kind, rest = frame["type"], {k: v for k, v in frame.items() if k != "type"}
        self.outbox.put_durable({"type": kind, "sequence_number": self.number, **rest})


def tail_frame(tail, base):
    return {
        "type": "outrider:output_text.tail",
        "base": base,
        "committed_chars": tail.committed_chars,
        "text": tail.text,
        "n_tokens": len(tail.token_ids),
        "stability": round(tail.stability, 2),
        "source": tail.source,
        "v": tail.version,
    }


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@cases
@given(samplings, streams, st.integers(0, 99), st.floats(0.0, 1.0), st.booleans())
def test_a_slow_reader_sees_less_but_never_wrong(sampling, stream, seed, pace, is_slow):
    """I7, I9: at every moment what is committed is a part of the answer; at the end all of it."""
    plain = told(StreamParams(), sampling)
    clock, client, rng = Clock(), Client(), random.Random(seed)
    outbox = Outbox(12.0, clock, pace_s=0.3 if is_slow else 0.0)
    server = Server(outbox)
    times = []
    for event in told(stream, sampling, PROMPT + tokens_of(plain), seed):
        server.send(event)
        while rng.random() < pace and (frame := outbox.ready()) is not None:
            times += [clock.now] if "base" in frame else []
            client.take(frame)
            assert text_of(plain).startswith(client.committed)
        clock.now += rng.choice([0.0, 0.02, 0.2])
    for frame in iter(outbox.ready, None):
        assert "base" not in frame, "I5"
        client.take(frame)
    assert (client.committed, client.tail) == (text_of(plain), "")
    assert all(later - earlier >= 1 / 12 for earlier, later in pairwise(times))


def test_random_drafts_do_show_tails_that_stand_and_fall():
    """The properties above would hold for a stream without tails, too."""
    sampling = SamplingParams(max_tokens=60, ignore_eos=True)
    plain = told(StreamParams(), sampling)
    erasure = Erasure(Clock())
    for event in told(UNGATED, sampling, PROMPT + tokens_of(plain), seed=1):
        erasure.observe(event)
    found = erasure.summary()
    assert found["tail_updates"] > 10
    assert found["flickers"] > 3
    assert 0.0 < found["ne_gross"] < found["tail_updates"]


def test_several_completions_have_tails_of_their_own():
    sampling = SamplingParams(max_tokens=12, ignore_eos=True, temperature=1.0, n=2, seed=3)
    events = told(UNGATED, sampling, PROMPT + tuple(range(60)))
    assert {event.index for event in events if isinstance(event, Tail)} == {0, 1}
    for index in (0, 1):
        mine = [event for event in events if event.index == index]
        tails = [event for event in mine if isinstance(event, Tail)]
        assert [tail.version for tail in tails] == list(range(1, len(tails) + 1))
        assert mine[-1].finish_reason == "length"


# The protocol's example, as far as text goes.
TRANSCRIPT = """
{"type":"response.output_text.delta","sequence_number":4,"delta":"The"}
{"type":"outrider:output_text.tail","base":4,"committed_chars":3,"text":" answer is likely no","n_tokens":4,"stability":0.83,"source":"draft","v":1}
{"type":"response.output_text.delta","sequence_number":5,"delta":" answer is yes"}
{"type":"outrider:output_text.tail","base":5,"committed_chars":17,"text":", with caveats","n_tokens":3,"stability":0.91,"source":"draft","v":2}
{"type":"response.output_text.delta","sequence_number":6,"delta":", with caveats."}
"""  # noqa: E501
WORDS = ["The", " answer", " is", " likely", " no", " yes", ",", " with", " caveats", "."]
END = len(WORDS)


class WordTokenizer:
    special_ids = frozenset({END})

    def decode(self, ids, skip_special_tokens=True):
        return "".join(WORDS[i] for i in ids if i != END)


def test_the_transcript(monkeypatch):
    """Events 7 to 10, which no text part sees, are the server's; here the end is one event."""
    forecasts = iter([[0.97, 0.95, 0.9, 0.83], [0.97, 0.94, 0.91, 0.79]])
    monkeypatch.setattr(Stability, "survival", lambda *_: next(forecasts))
    seq = Sequence(
        id="r#0",
        request=Request(
            id="r", prompt_token_ids=(0,), stream=StreamParams(visibility="provisional")
        ),
        index=0,
        tokens=[0],
        seed=0,
    )
    streamer = Streamer(WordTokenizer(), lambda name: "exact")
    streamer.open(seq)
    clock = Clock()
    outbox, erasure = Outbox(12.0, clock), Erasure(clock)
    server, client = Server(outbox), Client()
    frames, screens, events = [], [], []

    def tell(told):
        for event in told:
            events.append(event)
            erasure.observe(event)
            server.send(event)
        for frame in iter(outbox.ready, None):
            frames.append(frame)
            client.take(frame)
            screens.append((client.committed, client.tail))
        clock.now += 0.5

    def step(draft, tokens, num_accepted, finish_reason=None):
        tree = DraftTree.chain(draft, "draft_model")
        tell(streamer.provisional(Batch([Row(seq, 1, 4)], []), [tree]))
        streamer.add(seq, tokens)
        seq.tokens += tokens
        commit = Commit(
            seq=seq, tree=tree, tokens=tokens, num_drafted=len(draft), num_accepted=num_accepted,
            finish_reason=finish_reason,
        )  # fmt: skip
        tell(streamer.verified([commit]))

    step((), (0,), 0)
    step((1, 2, 3, 4), (1, 2, 5), 2)
    step((6, 7, 8, 9), (6, 7, 8, 9, END), 4, "stop")

    assert frames[:-1] == [json.loads(line) for line in TRANSCRIPT.split("\n") if line]
    assert screens[:-1] == [
        ("The", ""),
        ("The", " answer is likely no"),
        ("The answer is yes", ""),
        ("The answer is yes", ", with caveats"),
        ("The answer is yes, with caveats.", ""),
    ]
    summary = erasure.summary()
    named = ("ne_gross", "flickers", "tail_updates", "max_retract_tokens")
    assert [summary[name] for name in named] == [0.25, 1, 2, 2]
    metrics = events[-1].metrics
    assert (metrics.acceptance_length, metrics.acceptance_rate) == (4.0, 0.75)


@pytest.mark.parametrize("unit", COMMIT_UNITS[1:])
def test_units_leave_the_output_alone(unit):
    sampling = SamplingParams(max_tokens=40, ignore_eos=True)
    plain = told(StreamParams(), sampling)
    truth = PROMPT + tokens_of(plain)
    held = committed(told(StreamParams(commit_unit=unit), sampling, truth))
    assert (text_of(held), tokens_of(held)) == (text_of(plain), tokens_of(plain))
    assert len(held) < len(plain)


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_real_drafter_is_calibrated_and_takes_little_back(temperature):
    """The shipped pair: expected calibration error over ten bins, and erasure at gate 0.5."""
    from outrider import LLM

    llm = LLM("demo")
    stream = StreamParams(visibility="provisional", min_stability=0.5)
    sampling = SamplingParams(max_tokens=96, temperature=temperature, seed=1, ignore_eos=True)
    always = SpeculationParams(method="draft_model", num_draft_tokens=4)
    bins, erased, num_tails = [0.0] * 10, [], 0
    for prompt in ("def main(", "The city of", "import os\n", "class Stack:", "In the year"):
        erasure, tail = Erasure(Clock()), None
        for event in llm.stream(prompt, sampling, always, stream=stream):
            erasure.observe(event)
            if isinstance(event, Tail):
                tail = event
            elif tail is not None:
                stood = event.token_ids[: len(tail.token_ids)] == tail.token_ids
                bins[min(int(tail.stability * 10), 9)] += tail.stability - stood
                num_tails, tail = num_tails + 1, None
        erased.append(erasure.summary()["ne_gross"])
    assert num_tails > 50
    assert sum(map(abs, bins)) / num_tails < 0.15
    assert 0.0 < sum(erased) / len(erased) <= 0.2
