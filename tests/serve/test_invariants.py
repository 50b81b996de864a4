"""Invariants I1 to I13 of `outrider-stream/1`, each a property over random accept/reject scripts.

A script cuts a text into steps: of each draft so many tokens stand, and then comes the next one.
Tokens are bytes, so that steps end within characters, stop texts, calls and JSON. The events are
the streamer's own, and every dialect tells them. `tests/stream/test_protocol.py` holds I1 to I10
against random engines, below the server.
"""

import asyncio
import codecs
import json
import random
import re
from dataclasses import replace
from functools import partial
from itertools import accumulate, pairwise
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from outrider import AsyncLLM
from outrider.client.stream import Reader
from outrider.request import Request, SamplingParams, Speculation, StreamParams
from outrider.sequence import Sequence
from outrider.serve import chat, completions, delivery, messages, response_run
from outrider.serve.app import create_app
from outrider.serve.base import ServeConfig
from outrider.serve.call_parser import read
from outrider.serve.calls import Reply
from outrider.serve.delivery import delivered, frame, shown
from outrider.serve.generation import Ask
from outrider.serve.response_events import TAIL_EVENT, ResponseWriter
from outrider.serve.response_service import _frame as numbered_frame
from outrider.serve.ring import Ring
from outrider.serve.schemas_chat import ChatBody
from outrider.serve.schemas_completions import CompletionBody
from outrider.serve.tools import AUTO, FUNCTION, NONE, REQUIRED, Tool, ToolUse
from outrider.serve.turns import Turn
from outrider.step import Batch, Commit, DraftTree, Row
from outrider.stream.events import Committed, RequestMetrics, Tail
from outrider.stream.options import PACE_S, StreamOptions
from outrider.stream.outbox import Outbox
from outrider.stream.pad import SMALLEST
from outrider.stream.streamer import Streamer
from outrider.testing import ByteTokenizer
from tests.serve.conftest import client_of
from tests.serve.streams import Visit, parse
from tests.serve.test_messages import put_together as message_of
from tests.serve.wire import put_together

PROMPT = (40, 41)
TOOLS = (Tool("f"), Tool("weather"))
CALLS = [
    ("f", '{"a": "é😀</tool_call>\\"", "b": [1, {"c": null}]}'),
    ("weather", '{"city": "Zürich"}'),
]


class Bytes(ByteTokenizer):
    """One that can also say how a token stands in its vocabulary, as steps want to know."""

    def token_text(self, token_id):
        return f"<0x{token_id:02X}>"


HERE = SimpleNamespace(
    now=lambda: 0,
    model_name="m",
    tokenizer=Bytes(),
    needed_tokenizer=Bytes,
)
TEXTS = st.text(alphabet="ab é日😀\n.", max_size=24)
STOP = st.text("abé.", min_size=1, max_size=3)
STOPS = st.lists(STOP, max_size=2).map(tuple)
OBJECTS = st.recursive(
    st.none() | st.integers(-9, 99) | st.text('aé😀"\\', max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("kü"), inner, max_size=3),
    max_leaves=6,
)


def stream_options(visibilities, units=("token", "word", "sentence", "line"), most=(1, 4, 16)):
    return st.builds(
        lambda visibility, unit, most, steps: StreamOptions(
            visibility=visibility, min_stability=0.0, commit_unit=unit, max_tail_tokens=most,
            steps=steps,
        ),
        st.sampled_from(visibilities), st.sampled_from(units), st.sampled_from(most), st.booleans(),
    )  # fmt: skip


STREAMS = stream_options(["provisional", "verified"])
WITH_TAILS = stream_options(["provisional"])
cases = settings(max_examples=60, deadline=None)
over_a_server = settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module")
def over(llm):
    """`over(use)` is what comes of `use(client)` of a server over a tiny engine."""
    app = create_app(AsyncLLM(llm), ServeConfig(drain_s=0.0))
    lifespan, client = app.router.lifespan_context(app), client_of(app)
    with asyncio.Runner() as runner:
        runner.run(lifespan.__aenter__())
        yield lambda use: runner.run(use(client))
        runner.run(client.aclose())
        runner.run(lifespan.__aexit__(None, None, None))


def script(text, seed, options, stop=(), counts=()):
    """Events of an answer that would be this text, in random steps; stop texts may end it.

    Args:
        counts: tokens that stand in each step, of eight drafted; () draws both.
    """
    rng, tokens, counts = random.Random(seed), tuple(text.encode()), list(counts)
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
        num_right = min(counts.pop(0) if counts else rng.randint(0, 7), len(tokens) - at)
        num_wrong = 8 - num_right if counts else rng.randint(0, 2)
        wrong = tuple(rng.randrange(32, 250) for _ in range(num_wrong))
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


def commits_of(events):
    return [event for event in events if isinstance(event, Committed)]


def text_of(events):
    return "".join(event.text for event in commits_of(events))


class Chat:
    """Each dialect turns events into frames, and frames into (text, calls) as its clients do."""

    tail_places = staticmethod(lambda told: [told["outrider"]["tail"]] if is_tail(told) else [])

    def __init__(self, turn):
        self._options = turn.ask.stream
        body = ChatBody(messages=[{"role": "user", "content": "a"}], stream=True)
        self._chunks = chat.Chunks(HERE, body, turn)

    def take(self, event):
        return list(self._chunks.take(event))

    def sent(self, event):
        """As it goes over the wire."""
        return [frame(data, self._options) for data in self.take(event)]

    @staticmethod
    def reply(told):
        found = put_together(told).get(0)
        return (found.text, tuple(found.calls)) if found else ("", ())


class Completions(Chat):
    def __init__(self, turn):
        self._options = turn.ask.stream
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
        self._options = turn.ask.stream
        self._chunks = messages.Writer(HERE, turn)

    def sent(self, event):
        return [frame(data, self._options, data["type"]) for data in self.take(event)]

    @staticmethod
    def reply(told):
        told = [json.loads(json.dumps(event)) for event in told]
        if not told or told[-1]["type"] != "message_stop":  # what a client has in the middle
            deltas = (event.get("delta", {}) for event in told)
            return "".join(delta.get("text", "") for delta in deltas), ()
        blocks = message_of([e for e in told if e["type"] != "outrider_tail"])["content"]
        calls = [(block["name"], block["input"]) for block in blocks if block["type"] == "tool_use"]
        return "".join(b["text"] for b in blocks if b["type"] == "text"), tuple(calls)


class Responses(Chat):
    """Listens to the ring of its response, as a connection does."""

    tail_places = staticmethod(lambda told: [told] if told["type"] == TAIL_EVENT else [])

    def __init__(self, turn, listener=None):
        self._options = turn.ask.stream
        self._heard = []
        self.ring = Ring()
        self.ring.join(listener or self)
        wants_tails = self._options.visibility == "provisional"
        self.writer = ResponseWriter(
            {"id": "resp_a", "output": []},
            self.ring.put,
            self.ring.put_tail if wants_tails else None,
            pieces=turn.pieces().take,
            step=(lambda event: {"tokens": []}) if self._options.steps else None,
        )
        self.writer.open()

    def put_durable(self, item):
        self._heard.append(item)

    put_tail = put_durable

    def close(self):
        pass

    def take(self, event):
        return [json.loads(item.data) for item in self._items(event)]

    def sent(self, event):
        return [numbered_frame(item, self._options.pad) for item in self._items(event)]

    def _items(self, event):
        if isinstance(event, Tail):
            self.writer.take_tail(event)
        else:
            self.writer.take(event)
            if event.finish_reason is not None:
                self.writer.close("completed", {})
                self.ring.close()
        heard, self._heard = self._heard, []
        return heard

    @staticmethod
    def reply(told):
        if not told or "response" not in told[-1] or not told[-1]["response"]["output"]:
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
        for sent in made.sent(event):
            wire = sent.encode().decode()  # whole characters in each frame
            data = next(line for line in wire.split("\n") if line.startswith("data: "))
            told.append(json.loads(data.removeprefix("data: ")))
    return told


def standard(dialect, told):
    """What is left for a client that knows nothing of the extension; ids by their order.

    Deltas without text, which carry tails and steps, say nothing to it and are dropped.
    """
    kept = [_bare(each) for each in told if not dialect.tail_places(each) and not _is_extra(each)]
    names = {}
    text = json.dumps(kept)
    text = re.sub(r"[0-9a-f]{32}", lambda m: names.setdefault(m[0], f"id{len(names)}"), text)
    return json.loads(text)


OURS = ("outrider", "sequence_number")  # numbers: of what is left they have gaps


def _bare(value):
    if isinstance(value, dict):
        return {k: _bare(v) for k, v in value.items() if k not in OURS}
    return [_bare(each) for each in value] if isinstance(value, list) else value


def _is_extra(told):
    if "outrider" not in told:
        return False
    if "choices" not in told:
        return told.get("delta") in ("", {"type": "text_delta", "text": ""})
    (choice,) = told["choices"]
    is_empty = choice.get("delta", {"content": choice.get("text")}) == {"content": ""}
    return is_empty and choice["finish_reason"] is None


@pytest.mark.parametrize("dialect", DIALECTS)
@cases
@given(TEXTS, STOPS, st.integers(), STREAMS)
def test_i1_committed_text_only_grows_and_is_the_final_text(dialect, text, stop, seed, options):
    """Stop texts and characters are never broken on the way."""
    turn = turn_for(options)
    events = script(text, seed, turn.ask.stream, stop)
    said, told, made = "", [], dialect(turn)
    for event in events:
        told += made.take(event)
        if isinstance(event, Committed):
            said += event.text
            assert dialect.reply(told)[0] == said, "nothing but what is committed"
            assert "\ufffd" not in said, "characters are whole"
            assert not any(each in said for each in stop)
    assert text.startswith(said)
    assert said == text or any(each in text for each in stop), "only a stop text ends it early"


@pytest.mark.parametrize("dialect", DIALECTS)
@cases
@given(TEXTS, STOPS, st.integers(), WITH_TAILS)
def test_i2_what_is_committed_does_not_depend_on_tails(dialect, text, stop, seed, options):
    """The same steps: the same commits, told the same way."""
    shows, hides = turn_for(options), turn_for(delivery.without_tails(options))
    with_tails = script(text, seed, shows.ask.stream, stop)
    without = script(text, seed, hides.ask.stream, stop)
    assert commits_of(with_tails) == without
    assert dialect.reply(play(dialect, shows, with_tails)) == dialect.reply(
        play(dialect, hides, without)
    )


@over_a_server
@given(seed=st.integers(0, 999), heat=st.sampled_from([0, 1]), k=st.integers(1, 6), options=STREAMS)
def test_i2_nor_does_it_over_a_real_engine(over, seed, heat, k, options):
    """Tokens, finish and usage are those of a client that asks for nothing."""
    body = {
        "prompt": "the quick", "max_tokens": 24, "seed": seed, "temperature": heat,
        "ignore_eos": True, "stream": True,
        "speculation": {"method": "draft_model", "num_draft_tokens": k},
    }  # fmt: skip
    asked = {"include_usage": True}

    async def ask(client):
        found = []
        for stream in (asked, {**asked, "outrider": options.as_dict()}):
            answer = await client.post("/v1/completions", json={**body, "stream_options": stream})
            told = [event.data for event in parse(answer.text)[:-1]]
            choices = [choice for chunk in told for choice in chunk["choices"]]
            told[-1]["usage"].pop("outrider", None)
            text = "".join(choice["text"] for choice in choices)
            found.append((text, choices[-1]["finish_reason"], told[-1]["usage"]))
        return found

    plain, told = over(ask)
    assert plain == told
    assert plain[2]["completion_tokens"] == 24


@pytest.mark.parametrize("dialect", DIALECTS)
@cases
@given(TEXTS, STOPS, st.integers(), WITH_TAILS)
def test_i3_who_ignores_the_extension_gets_the_standard_stream(dialect, text, stop, seed, options):
    """Frame for frame and member for member that of a client that did not ask."""
    turn = turn_for(options)
    events = script(text, seed, turn.ask.stream, stop)
    told = play(dialect, turn, events)
    plain = play(dialect, turn_for(StreamOptions()), commits_of(events))
    assert standard(dialect, told) == standard(dialect, plain)


@pytest.mark.parametrize("dialect", DIALECTS)
@cases
@given(TEXTS, STOPS, st.integers(), WITH_TAILS)
def test_i4_tails_begin_where_the_commits_end(dialect, text, stop, seed, options):
    """In characters; in the Responses API also by `base`, the number of the last event."""
    turn = turn_for(options)
    said, version, last, made = "", 0, -1, dialect(turn)
    for event in script(text, seed, turn.ask.stream, stop):
        for data in made.take(event):
            assert dialect is not Responses or ("sequence_number" in data) != ("base" in data)
            last = data.get("sequence_number", last)
            for tail in dialect.tail_places(data):
                assert tail["committed_chars"] == len(said)
                assert tail["v"] > version
                assert tail.get("base", last) == last
                version = tail["v"]
        said += event.text if isinstance(event, Committed) else ""


def tell(events, options, listener):
    """These events to one that listens to the ring of their response."""
    made = Responses(turn_for(options), listener)
    for event in events:
        made.take(event)
    return made


class Post:
    """A connection that loses tails, repeats them, and brings them late; commits it does not."""

    def __init__(self, seed):
        self._rng, self._late = random.Random(seed), []
        self.frames = []

    def put_durable(self, item):
        self._bring()
        self.frames.append(json.loads(item.data))

    def put_tail(self, item):
        self._late += [json.loads(item.data)] * self._rng.randint(0, 2)
        if self._rng.random() < 0.7:
            self._bring()

    def close(self):
        self._bring()

    def _bring(self):
        self._rng.shuffle(self._late)
        kept = self._rng.randint(0, len(self._late))
        self.frames += self._late[kept:]
        del self._late[kept:]


@settings(cases, max_examples=150)
@given(TEXTS, st.integers(), WITH_TAILS)
def test_i4_i9_no_late_or_old_tail_is_ever_shown(text, seed, options):
    """Our client's rule: nothing before the commit point changes, and a void tail is not drawn."""
    post, reader = Post(seed), Reader()
    tell(script(text, seed, options), options, post)
    said, last, version, drawn, states = "", -1, 0, "", []
    for each in post.frames:
        if "sequence_number" in each:
            last, drawn = each["sequence_number"], ""
            said += each["delta"] if each["type"] == "response.output_text.delta" else ""
        elif each["base"] == last and each["v"] > version:
            assert each["committed_chars"] == len(said), "I9"
            drawn, version = each["text"], each["v"]
        for line in (f"data: {json.dumps(each)}", ""):
            for state in reader.take(line):
                states.append(state)
                assert (state.committed, state.tail) == (said, drawn)
                assert text.startswith(state.committed), "I9"
    assert (said, states[-1].committed if states else "") == (text, text)


ROUTES = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}], "max_tokens": 12},
    "/v1/completions": {"prompt": "a", "max_tokens": 12},
    "/v1/messages": {"messages": [{"role": "user", "content": "a"}], "max_tokens": 12},
    "/v1/responses": {"input": "a", "max_output_tokens": 12},
}
LATE = Tail(
    request_id="", index=0, token_ids=(65,), text="LATE", committed_chars=0, stability=1.0,
    source="draft", version=999,
)  # fmt: skip


@pytest.mark.parametrize("path", ROUTES)
@over_a_server
@given(seed=st.integers(0, 999))
def test_i5_no_tail_follows_the_end(over, llm, path, seed):
    """Not even where the engine still tells some: they are told from another thread."""
    step, told = llm.engine.step, []

    def late():
        events = step()
        last = [e for e in events if isinstance(e, Committed) and e.finish_reason is not None]
        told.extend(last)
        after = [replace(LATE, request_id=e.request_id) for e in last]
        return [*events, *after, *after]

    body = {
        **ROUTES[path], "stream": True, "seed": seed, "temperature": 1, "ignore_eos": True,
        "speculation": {"method": "draft_model", "num_draft_tokens": 4},
    }  # fmt: skip
    if path == "/v1/messages":
        del body["seed"], body["ignore_eos"]

    async def ask(client):
        header = {"X-Outrider-Stream": "provisional; stability=0; max_updates_per_s=1000"}
        return (await client.post(path, json=body, headers=header)).text

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llm.engine, "step", late)
        text = over(ask)
    assert told
    assert "LATE" not in text
    frames = [event.data for event in parse(text) if event.data != "[DONE]"]
    (end,) = [place for place, data in enumerate(frames) if is_end(data)]
    tails = [place for place, data in enumerate(frames) if is_any_tail(data)]
    assert max(tails, default=-1) < end


def is_end(data):
    """Whether a frame of any dialect is the terminal one of its answer."""
    reasons = [choice["finish_reason"] for choice in data.get("choices", ())]
    ends = ("message_stop", "response.completed", "response.incomplete")
    return any(reasons) or data.get("type") in ends


def is_any_tail(data):
    return is_tail(data) or data.get("type") in ("outrider_tail", TAIL_EVENT)


@cases
@given(TEXTS, st.integers(), WITH_TAILS)
def test_i5_the_ring_and_the_outbox_are_shut_at_the_end(text, seed, options):
    outbox = Outbox(1e9, lambda: 0.0)
    made = tell(script(text, seed, options), options, outbox)
    read_so_far = list(iter(outbox.ready, None))
    assert read_so_far[-1].type == "response.completed"
    assert not made.writer.take_tail(LATE), "the writer takes none"
    with pytest.raises(AssertionError, match="terminal"):
        made.ring.put_tail({"type": TAIL_EVENT, "text": "late"})
    outbox.put_tail("late")
    assert outbox.ready() is None


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
def test_i6_no_tails_beside_calls_which_are_whole(dialect, kind, text, calls, more, seed, options):
    """However they were guessed, arguments join to the JSON that the model wrote."""
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
def test_i6_no_tails_beside_structured_output_which_is_whole(dialect, value, seed, options):
    answer = json.dumps(value, ensure_ascii=False)
    turn = turn_for(options, SamplingParams(json_schema={}), ToolUse(choice=NONE))
    events = script(answer, seed, turn.ask.stream)
    assert not any(isinstance(event, Tail) for event in events), "I6"
    content, _ = dialect.reply(play(dialect, turn, events))
    assert json.loads(content) == value


@cases
@given(TEXTS, STOP, STOPS, st.integers(), WITH_TAILS)
def test_i6_no_tail_where_a_stop_text_may_have_begun(text, stop, more, seed, options):
    said, stop = "", (stop, *more)
    for event in script(text, seed, options, stop):
        if isinstance(event, Committed):
            said += event.text
            continue
        screen = said + event.text
        assert not any(each in screen for each in stop)
        begun = [each[:n] for each in stop for n in range(1, len(each))]
        if event.source != "deferred":  # what is held back is verified, and its end is known
            assert not any(screen.endswith(each) for each in begun)


class VirtualLoop(asyncio.SelectorEventLoop):
    """Sleeps take no time: where nothing is ready its clock jumps to what is due next."""

    def __init__(self):
        super().__init__()
        self.now = 0.0
        select = self._selector.select

        def jump(timeout):
            assert timeout is not None, "everything waits for something that never comes"
            self.now += timeout
            return select(0)

        self._selector.select = jump

    def time(self):
        return self.now


def in_virtual_time(make):
    """What `make(clock)` comes to, `delivered` going by the same clock."""
    loop = VirtualLoop()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(delivery, "time", SimpleNamespace(monotonic=loop.time))
        try:
            return loop.run_until_complete(make(loop.time))
        finally:
            loop.close()


async def slowly(events, pauses):
    """Each event so many seconds after the one before it."""
    for event, pause in zip(events, pauses, strict=False):
        await asyncio.sleep(pause)
        yield event


def pauses_of(seed):
    """Long enough for any script; some of them none, some longer than bounds and pace."""
    return random.Random(seed).choices([0.0, 0.004, 0.03, 0.11, 0.7], k=200)


@settings(cases, max_examples=200)
@given(st.text("ab é日😀.", min_size=9), st.integers(), WITH_TAILS, st.sampled_from([2, 12, 100]))
def test_i7_tails_keep_their_bounds_and_slow_readers_lose_nothing_else(text, seed, options, rate):
    options = StreamOptions(**{**options.as_dict(), "max_updates_per_s": rate})
    events = script(text, seed, options)

    async def read_all(clock):
        times, found, pauses = [], [], iter(pauses_of(seed + 1))
        async for event in delivered(slowly(events, pauses_of(seed)), options):
            found.append(event)
            if isinstance(event, Tail):
                times.append(clock())
                assert event.committed_chars == len(text_of(found)), "no void tail is delivered"
            await asyncio.sleep(next(pauses))
        return times, found

    times, found = in_virtual_time(read_all)
    assert commits_of(found) == commits_of(events), "commits never"
    assert all(late - early >= 1 / rate - 1e-9 for early, late in pairwise(times))
    for tail in (event for event in events if isinstance(event, Tail)):
        if options.commit_unit == "token":
            assert len(tail.token_ids) <= options.max_tail_tokens


@cases
@given(TEXTS, st.integers(), WITH_TAILS)
def test_i8_offsets_count_code_points_and_tails_end_on_whole_ones(text, seed, options):
    """A tail's text is that of its tokens behind the committed ones, and none is half a one."""
    said, told = "", b""
    for event in script(text, seed, options):
        if isinstance(event, Committed):
            said += event.text
            told += bytes(event.token_ids)
            continue
        assert event.committed_chars == len(said)
        if not event.text:
            continue
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        screen = decoder.decode(told + bytes(event.token_ids))
        assert screen == said + event.text
        if options.commit_unit == "token":  # others hold verified tokens back, halves too
            assert decoder.getstate()[0] == b"", "no half of a code point"


@over_a_server
@given(TEXTS.filter(bool), st.integers(0, 99), st.booleans())
def test_i10_tails_are_not_billed_stored_or_fed_back(over, text, seed, is_background):
    """Log, stored response, usage, replay and the next turn do not know of them."""
    options = StreamOptions(visibility="provisional", min_stability=0.0)
    events = script(text, seed, options)

    async def ask(client):
        found = []
        for told in (events, commits_of(events)):
            session = (await client.post("/v1/sessions", json={})).json()["id"]
            body = {
                "input": "a", "stream": True, "stream_options": {"outrider": options.as_dict()},
                "outrider": {"session": session}, "background": is_background,
            }  # fmt: skip
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(response_run, "generate", partial(tells, told))
                said = parse((await client.post("/v1/responses", json=body)).text)
            name = said[0].data["response"]["id"]
            stored = (await client.get(f"/v1/responses/{name}")).json()
            again = parse((await client.get(f"/v1/responses/{name}?stream=true")).text)
            usage = {k: v for k, v in stored["usage"].items() if k != "outrider"}
            sessions = client.app.state.server.sessions
            head = (await sessions.find("", session)).head
            log = list(await sessions.call(sessions.log.tokens, "", head))
            follow = {"input": "b", "temperature": 0, "max_output_tokens": 4}
            next_body = {**follow, "outrider": {"session": session}}
            after = (await client.post("/v1/responses", json=next_body)).json()
            assert [e.data for e in again] == [e.data for e in said if e.id is not None]
            kinds = [e.event for e in again]
            texts = [answer["output"][0]["content"] for answer in (stored, after)]
            cost = [after["usage"][f"{name}_tokens"] for name in ("input", "output")]
            found.append((log, texts, usage, cost, kinds))
        return found

    with_tails, without = over(ask)
    assert with_tails == without


async def tells(events, server, ask, request_id, *, queued=None):
    """In place of `generate`: these events, with room for readers between them."""
    if queued is not None:
        queued()
    for event in events:
        await asyncio.sleep(0.001)
        yield event


@over_a_server
@given(TEXTS.filter(bool), STOPS, st.integers(0, 99), st.data())
def test_i11_resume_replays_what_was_missed_and_goes_live(over, text, stop, seed, data):
    """After any number, in the midst or at the end; tails are not replayed."""
    options = StreamOptions(visibility="provisional", min_stability=0.0)
    events = script(text, seed, options, stop)

    async def ask(client):
        body = {
            "input": "a", "stream": True, "stream_options": {"outrider": options.as_dict()},
            "background": True,
        }  # fmt: skip
        async with Visit(client.app, "POST", "/v1/responses", body) as visit:
            first = [await visit.next()]
            name = first[0].data["response"]["id"]
            while (event := await visit.next()) is not None and len(first) < num_first:
                first.append(event)
        path = f"/v1/responses/{name}?stream=true"
        last = max(int(event.id) for event in first if event.id is not None)
        told = {}
        for after in (last, data.draw(st.integers(-1, last))):
            async with Visit(client.app, "GET", f"{path}&starting_after={after}") as visit:
                told[after] = await visit.rest()
        whole = parse((await client.get(path)).text)
        final = (await client.get(f"/v1/responses/{name}")).json()
        return first, told, whole, final

    num_first = data.draw(st.integers(1, 6))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(response_run, "generate", partial(tells, events))
        first, told, whole, final = over(ask)
    assert [int(event.id) for event in whole] == list(range(len(whole)))
    assert [e for e in first if e.id is not None] == whole[: sum(e.id is not None for e in first)]
    assert whole[-1].data["response"] == final
    for after, rest in told.items():
        durable = [event for event in rest if event.id is not None]
        assert durable == whole[after + 1 :], "all of it, once, in order"
        last = after
        for event in rest:
            assert event.id is not None or event.data["base"] == last > after, "live tails only"
            last = int(event.id) if event.id is not None else last


WATCHED = StreamOptions(pad=True, pacing="smooth")


def watch(dialect, options, counts, pauses, seed):
    """(time, bytes) of each frame, for one who only watches the line; how many end the stream."""
    text = "".join(random.Random(seed).choices("abcdefgh ", k=sum(counts) + len(counts)))
    turn = turn_for(options)

    async def look(clock):
        events = script(text, seed, turn.ask.stream, counts=counts)
        assert len(events) == len(counts), "one event per step"
        made, seen = dialect(turn), []
        async for event in delivered(slowly(events, pauses), turn.ask.stream):
            sent = made.sent(event)
            seen += [(round(clock(), 6), len(each.encode())) for each in sent]
        return seen, len(sent)

    return in_virtual_time(look)


COUNTS = st.lists(st.integers(0, 8), min_size=2, max_size=12)


@pytest.mark.parametrize("dialect", DIALECTS)
@cases
@given(COUNTS, st.integers(0, 999), st.data())
def test_i12_padded_and_paced_frames_do_not_show_accepted_counts(dialect, counts, seed, data):
    """Whatever was accepted in each step: the same sizes at the same times, up to the last step.

    What ends the stream may hold all of the text, and so tell its length by buckets; answers of
    one length look alike to the end.
    """
    others = data.draw(st.lists(st.integers(0, 8), min_size=len(counts), max_size=len(counts)))
    shuffled = data.draw(st.permutations(counts))
    (mine, num_last), (theirs, _), (alike, _) = (
        watch(dialect, WATCHED, each, pauses_of(seed), seed) for each in (counts, others, shuffled)
    )
    assert mine == alike
    assert mine[:-num_last] == theirs[:-num_last]
    assert [time for time, _ in mine] == [time for time, _ in theirs]
    sizes = {size - len("data: \n\n") for _, size in mine}
    assert all(size >= SMALLEST and size & (size - 1) == 0 for size in sizes)


@pytest.mark.parametrize("dialect", DIALECTS)
@cases
@given(COUNTS, st.integers(0, 999))
def test_i12_paced_frames_do_not_show_when_a_step_ended(dialect, counts, seed):
    """They leave together, a tenth of a second apart; only the end does not wait."""
    pauses = pauses_of(seed)
    times = sorted({time for time, _ in watch(dialect, WATCHED, counts, pauses, seed)[0]})
    gaps = [late - early for early, late in pairwise(times[:-1])]
    assert all(gap >= PACE_S - 1e-6 for gap in gaps)
    steps = list(accumulate(pauses[: len(counts)]))
    assert times[-1] <= max(steps[-1], times[0]) + PACE_S + 1e-6, "nor is it held for long"


@pytest.mark.parametrize("dialect", DIALECTS)
def test_i12_without_padding_and_pace_they_do(dialect):
    """Or the properties above would say nothing."""
    few, many = [0, 3, 5, 1], [3, 0, 5, 1]
    pauses = [0.01, 0.02, 0.03, 0.004]
    burst, unpadded = StreamOptions(pad=True), StreamOptions(pacing="smooth")
    assert watch(dialect, unpadded, few, pauses, 1) != watch(dialect, unpadded, many, pauses, 1)
    times = {time for time, _ in watch(dialect, burst, few, pauses, 1)[0]}
    assert times == {round(time, 6) for time in accumulate(pauses)}


@pytest.mark.parametrize("path", ROUTES)
@over_a_server
@given(seed=st.integers(0, 999))
def test_i12_every_route_pads_where_others_may_listen(over, path, seed):
    body = {**ROUTES[path], "stream": True, "temperature": 1}

    async def ask(client):
        here = client.app.state.server
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(here, "config", replace(here.config, host="0.0.0.0"))
            return (await client.post(path, json=body)).content

    told = over(ask)
    frames = [part for part in told.split(b"\n\n") if part and b"[DONE]" not in part]
    assert len(frames) > 1
    for part in frames:
        size = len(part) - len("data: ")
        assert size >= SMALLEST
        assert size & (size - 1) == 0


def growing(texts, gate):
    """An engine that says these, one each time the gate opens."""

    async def generate(server, ask, request_id, **_):
        for place, text in enumerate(texts):
            await gate.acquire()
            last = "stop" if place == len(texts) - 1 else None
            metrics = RequestMetrics() if last else None
            yield Committed("r", 0, place, (5,), text, finish_reason=last, metrics=metrics)

    return generate


@over_a_server
@given(texts=st.lists(st.text("aé😀 ", max_size=4), min_size=2, max_size=6), data=st.data())
def test_i13_accepted_text_is_committed_and_never_changes(over, texts, data):
    """Confirmed once the commit has reached it, else 409 with what is committed."""

    async def ask(client):
        gate = asyncio.Semaphore(1)
        told, accepted = "", ""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(response_run, "generate", growing(texts, gate))
            body = {"input": "a", "stream": True}
            async with Visit(client.app, "POST", "/v1/responses", body) as visit:
                name = (await visit.next()).data["response"]["id"]
                path = f"/v1/responses/{name}/accept"
                for num_said in range(1, len(texts) + 1):
                    while told != "".join(texts[:num_said]):
                        told += (await visit.next()).data.get("delta", "")
                    chars = data.draw(st.integers(0, len(told) + 2))
                    answer = await client.post(path, json={"chars": chars})
                    if answer.status_code == 404:
                        assert not told, "there is no message yet"
                    else:
                        is_told = chars <= len(told)
                        assert answer.status_code == (200 if is_told else 409)
                        assert answer.json()["text"] == (told[:chars] if is_told else told)
                        assert answer.json()["chars"] == min(chars, len(told))
                        accepted = max(accepted, told[:chars], key=len)
                    gate.release()
                await visit.rest()
        final = (await client.get(f"/v1/responses/{name}")).json()
        said = final["output"][0]["content"][0]["text"] if final["output"] else ""
        assert said == "".join(texts)
        assert said.startswith(accepted)
        if said:
            everything = await client.post(path, json={"chars": len(said)})
            assert everything.status_code == 200

    over(ask)


def test_scripts_do_show_tails_and_take_some_back():
    """The properties above would hold for streams without any."""
    options = StreamOptions(visibility="provisional", min_stability=0.0)
    events = script("a long enough text of some words é日😀 " * 3, 1, options)
    tails = [event.text for event in events if isinstance(event, Tail)]
    assert len(tails) > 5
    assert any("\ufffd" not in text and text for text in tails)
    assert StreamParams() != options.params


@pytest.mark.parametrize("number", range(1, 14))
def test_each_invariant_has_a_property(number):
    named = [test for name, test in globals().items() if re.search(rf"_i{number}_", name)]
    assert any(hasattr(test, "hypothesis") for test in named)
