"""What every dialect says of random accept/reject scripts: the text, whole; tails beside it.

A script cuts a text into steps: of each draft so many tokens stand, and then comes the next one.
Tokens are bytes, so that steps end within characters, stop texts, calls and JSON. The events are
the streamer's own; the invariants are those of `outrider-stream/1`.
"""

import json
import random
from types import SimpleNamespace

import pytest
from hypothesis import given, settings, strategies as st

from outrider.request import Request, SamplingParams, Speculation, StreamParams
from outrider.sequence import Sequence
from outrider.serve import chat, completions, messages
from outrider.serve.call_parser import read
from outrider.serve.calls import Reply
from outrider.serve.delivery import shown
from outrider.serve.generation import Ask
from outrider.serve.response_events import TAIL_EVENT, ResponseWriter
from outrider.serve.schemas_chat import ChatBody
from outrider.serve.schemas_completions import CompletionBody
from outrider.serve.sse import Frame
from outrider.serve.tools import AUTO, FUNCTION, NONE, REQUIRED, Tool, ToolUse
from outrider.serve.turns import Turn
from outrider.step import Batch, Commit, DraftTree, Row
from outrider.stream.events import Committed, Tail
from outrider.stream.options import StreamOptions
from outrider.stream.streamer import Streamer
from outrider.testing import ByteTokenizer
from tests.serve.test_messages import put_together as message_of
from tests.serve.wire import put_together

PROMPT = (40, 41)
TOOLS = (Tool("f"), Tool("weather"))
CALLS = [
    ("f", '{"a": "é😀</tool_call>\\"", "b": [1, {"c": null}]}'),
    ("weather", '{"city": "Zürich"}'),
]
HERE = SimpleNamespace(
    now=lambda: 0,
    model_name="m",
    tokenizer=ByteTokenizer(),
    needed_tokenizer=ByteTokenizer,
)
TEXTS = st.text(alphabet="ab é日😀\n.", max_size=24)
OBJECTS = st.recursive(
    st.none() | st.integers(-9, 99) | st.text('aé😀"\\', max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("kü"), inner, max_size=3),
    max_leaves=6,
)
STREAMS = st.builds(
    lambda visibility, unit, steps: StreamOptions(
        visibility=visibility, min_stability=0.0, commit_unit=unit, steps=steps
    ),
    st.sampled_from(["provisional", "verified"]),
    st.sampled_from(["token", "word", "sentence", "line"]),
    st.booleans(),
)
cases = settings(max_examples=80, deadline=None)


def script(text, seed, options, stop=()):
    """Events of an answer that would be this text, in random steps; stop texts may end it."""
    rng, tokens = random.Random(seed), tuple(text.encode())
    sampling = SamplingParams(stop=stop, max_tokens=10_000)
    request = Request(id="r", prompt_token_ids=PROMPT, sampling=sampling, stream=options.params)
    seq = Sequence(
        id="r#0", request=request, index=0, tokens=list(PROMPT), seed=0,
        speculation=Speculation(drafter="scripted", verifier="sampled"),
    )  # fmt: skip
    streamer = Streamer(ByteTokenizer(), lambda name: "exact")
    streamer.open(seq)
    at, events, reason = 0, [], None
    while reason is None:
        num_right = min(rng.randint(0, 7), len(tokens) - at)
        wrong = tuple(rng.randrange(32, 250) for _ in range(rng.randint(0, 2)))
        tree = DraftTree.chain((*tokens[at : at + num_right], *wrong), "scripted")
        events += streamer.provisional(Batch([Row(seq, 1, 9)], []), [tree])
        taken = tokens[at : at + num_right + 1]
        at += len(taken)
        found = streamer.add(seq, taken)
        reason = "length" if at >= len(tokens) else None
        if found is not None:
            taken, reason, seq.stop_reason = taken[: found.num_tokens], "stop", found.text
        num_kept = min(num_right, len(taken))
        seq.tokens += taken
        events += streamer.verified([
            Commit(
                seq=seq, tree=tree, tokens=taken, num_drafted=len(tree), num_accepted=num_right,
                num_kept=num_kept, accepted=tuple(range(num_right)), finish_reason=reason,
            )
        ])  # fmt: skip
    return events


class Chat:
    """Each dialect turns events into frames, and frames into (text, calls) as its clients do."""

    tail_places = staticmethod(lambda told: [told["outrider"]["tail"]] if is_tail(told) else [])

    def __init__(self, turn):
        body = ChatBody(messages=[{"role": "user", "content": "a"}], stream=True)
        self._chunks = chat.Chunks(HERE, body, turn)

    def take(self, event):
        return list(self._chunks.take(event))

    @staticmethod
    def reply(told):
        found = put_together(told).get(0)
        return (found.text, tuple(found.calls)) if found else ("", ())


class Completions(Chat):
    def __init__(self, turn):
        body = CompletionBody(prompt="a", stream=True)
        self._job = completions.Job(
            id="r", place=0, ask=turn.ask, text="", speculation=turn.speculation
        )
        self._chunks = completions._Chunks(HERE, body, [self._job])

    def take(self, event):
        return list(self._chunks.take(self._job, event))

    @staticmethod
    def reply(told):
        return "".join(choice["text"] for chunk in told for choice in chunk["choices"]), ()


class Messages(Chat):
    tail_places = staticmethod(lambda told: [told] if told["type"] == "outrider_tail" else [])

    def __init__(self, turn):
        self._chunks = messages.Writer(HERE, turn)

    @staticmethod
    def reply(told):
        told = [json.loads(json.dumps(event)) for event in told]
        if told[-1]["type"] != "message_stop":  # what a client has in the middle
            deltas = (event.get("delta", {}) for event in told)
            return "".join(delta.get("text", "") for delta in deltas), ()
        blocks = message_of([e for e in told if e["type"] != "outrider_tail"])["content"]
        calls = [(block["name"], block["input"]) for block in blocks if block["type"] == "tool_use"]
        return "".join(b["text"] for b in blocks if b["type"] == "text"), tuple(calls)


class Responses(Chat):
    tail_places = staticmethod(lambda told: [told] if told["type"] == TAIL_EVENT else [])

    def __init__(self, turn):
        self._told = []
        self._writer = ResponseWriter(
            {"id": "resp_a", "output": []},
            self._put,
            self._put if turn.ask.stream.visibility == "provisional" else None,
            pieces=turn.pieces().take,
            step=(lambda event: {"tokens": []}) if turn.ask.stream.steps else None,
        )
        self._writer.open()

    def _put(self, event):
        self._told.append(json.loads(json.dumps(event)))

    def take(self, event):
        if isinstance(event, Tail):
            self._writer.take_tail(event)
        else:
            self._writer.take(event)
            if event.finish_reason is not None:
                self._writer.close("completed", {})
        told, self._told = self._told, []
        return told

    @staticmethod
    def reply(told):
        if "response" not in told[-1] or not told[-1]["response"]["output"]:
            kind = "response.output_text.delta"
            return "".join(event["delta"] for event in told if event["type"] == kind), ()
        output = told[-1]["response"]["output"]
        calls = [(i["name"], i["arguments"]) for i in output if i["type"] == "function_call"]
        texts = [i["content"][0]["text"] for i in output if i["type"] == "message"]
        deltas = {e["item_id"]: "" for e in told if "delta" in e}
        for event in told:
            if "delta" in event:
                deltas[event["item_id"]] += event["delta"]
        for item in output:
            whole = item["arguments"] if "arguments" in item else item["content"][0]["text"]
            assert deltas.get(item["id"], "") == whole
        return "".join(texts), tuple(calls)


DIALECTS = [Chat, Completions, Messages, Responses]


def is_tail(told):
    return "tail" in told.get("outrider", {})


def turn_for(options, sampling=SamplingParams(), tool_use=ToolUse()):
    stream = shown(options, sampling, has_tools=tool_use.is_active)
    ask = Ask(prompt=PROMPT, sampling=sampling, stream=stream)
    return Turn(id="chatcmpl-a", ask=ask, speculation=Speculation(), tool_use=tool_use)


def play(dialect, turn, events):
    """All that is told, frame by frame as it goes over the wire."""
    made, told = dialect(turn), []
    for event in events:
        for data in made.take(event):
            wire = Frame(data=data).encode().decode()  # whole characters in each frame
            told.append(json.loads(wire.removeprefix("data: ")))
    return told


def standard(told):
    """What is left for a client that knows nothing of the extension."""
    return [{k: v for k, v in each.items() if k != "outrider"} for each in told]


@pytest.mark.parametrize("dialect", DIALECTS)
@cases
@given(TEXTS, st.lists(st.text("abé.", min_size=1, max_size=3), max_size=2), st.integers(), STREAMS)
def test_text_is_whole_and_tails_stand_beside_it(dialect, text, stop, seed, options):
    """I1, I3, I4, I5, I8, I9; stop texts and characters are never broken."""
    turn = turn_for(options)
    events = script(text, seed, turn.ask.stream, tuple(stop))
    ends = [place for place in map(text.find, stop) if place >= 0]
    said, version, is_over = "", 0, False
    made = dialect(turn)
    told = []
    for event in events:
        assert not is_over, "I5"
        for data in made.take(event):
            told.append(data)
            for tail in dialect.tail_places(data):
                assert tail["committed_chars"] == len(said), "I4"
                assert tail["v"] > version
                version = tail["v"]
        if isinstance(event, Committed):
            said += event.text
            is_over = event.finish_reason is not None
            assert dialect.reply(told)[0] == said, "I1: nothing but what is committed"
            assert "\ufffd" not in said, "characters are whole"
            assert not any(text_of_stop in said for text_of_stop in stop)
    assert text.startswith(said)
    assert said == text or ends, "only a stop text ends it early"
    # I3: who ignores tails and members that are not standard reads the same without them.
    plain = [event for event in events if isinstance(event, Committed)]
    kept = [data for data in play(dialect, turn, events) if not dialect.tail_places(data)]
    assert without_ids(standard(kept)) == without_ids(standard(play(dialect, turn, plain)))


def without_ids(told):
    """Empty deltas and opened blocks may come sooner; what they hold is the same."""
    return [each for each in map(_said, told) if each is not None]


def _said(each):
    if "choices" in each:
        (choice,) = each["choices"]
        part = choice.get("delta", {}).get("content", choice.get("text"))
        return (part, choice["finish_reason"]) if part or choice["finish_reason"] else None
    if "delta" in each and each["delta"] not in ("", {"type": "text_delta", "text": ""}):
        return each["delta"]
    return None if "delta" in each or "response" in each else each["type"]


def written(kind, text, calls):
    """A text with calls as a model of this kind writes them."""
    if kind == FUNCTION:
        return calls[0][1]
    objects = [f'{{"name": "{name}", "arguments": {arguments}}}' for name, arguments in calls]
    if kind == REQUIRED:
        return f"[{', '.join(objects)}]"
    return text + "".join(f"\n<tool_call>{each}</tool_call>" for each in objects)


@pytest.mark.parametrize("dialect", [Chat, Messages, Responses])
@cases
@given(
    kind=st.sampled_from([AUTO, REQUIRED, FUNCTION]),
    text=TEXTS,
    calls=st.lists(st.sampled_from(CALLS), min_size=1, max_size=3),
    more=st.dictionaries(st.text("aü😀", min_size=1), OBJECTS, max_size=3),
    seed=st.integers(),
    options=STREAMS,
)
def test_calls_are_whole_however_they_were_guessed(dialect, kind, text, calls, more, seed, options):
    """I6: no tails beside calls; arguments join to the JSON that the model wrote."""
    calls = [*calls, ("f", json.dumps(more, ensure_ascii=False))]
    answer = written(kind, text, calls[-1:] if kind == FUNCTION else calls)
    calls = calls[-1:] if kind == FUNCTION else calls
    tool_use = ToolUse(tools=TOOLS, choice=kind, name="f" if kind == FUNCTION else "")
    turn = turn_for(options, tool_use=tool_use)
    events = script(answer, seed, turn.ask.stream)
    assert not any(isinstance(event, Tail) for event in events), "I6"
    told = play(dialect, turn, events)
    content, found = dialect.reply(told)
    whole = turn.read(answer)
    assert whole == read(turn.parser(), answer)
    assert content == whole.content
    assert [name for name, _ in found] == [name for name, _ in calls]
    for (_, mine), (_, theirs) in zip(found, calls, strict=True):
        assert (mine if isinstance(mine, dict) else json.loads(mine)) == json.loads(theirs)
    if dialect is not Messages:  # whose clients are given objects
        assert Reply(content, found) == whole


@pytest.mark.parametrize("dialect", DIALECTS)
@cases
@given(OBJECTS, st.integers(), STREAMS)
def test_json_is_whole_however_it_was_guessed(dialect, value, seed, options):
    """I6: no tails beside structured output."""
    answer = json.dumps(value, ensure_ascii=False)
    turn = turn_for(options, SamplingParams(json_schema={}), ToolUse(choice=NONE))
    events = script(answer, seed, turn.ask.stream)
    assert not any(isinstance(event, Tail) for event in events), "I6"
    content, _ = dialect.reply(play(dialect, turn, events))
    assert json.loads(content) == value


def test_scripts_do_show_tails_and_take_some_back():
    """The properties above would hold for streams without any."""
    options = StreamOptions(visibility="provisional", min_stability=0.0)
    events = script("a long enough text of some words é日😀 " * 3, 1, options)
    tails = [event.text for event in events if isinstance(event, Tail)]
    assert len(tails) > 5
    assert any("\ufffd" not in text and text for text in tails)
    assert StreamParams() != options.params
