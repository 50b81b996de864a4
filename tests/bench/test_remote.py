"""Remote: bodies, chunks and counters of four kinds of servers, and our own one over a socket."""

import asyncio
import gc
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import httpx
import pytest
import uvicorn

from outrider import LLM, AsyncLLM
from outrider.bench.inprocess import InProcess
from outrider.bench.remote import Remote
from outrider.bench.remote_body import body_of
from outrider.bench.remote_reading import Lines, Reading
from outrider.bench.remote_server import ServerFacts, read_counters
from outrider.bench.target import Acceptance, Arm, Ask, Question
from outrider.errors import ConfigError, RequestError
from outrider.request import SamplingParams, SpeculationParams
from outrider.serve.app import create_app
from outrider.serve.config import ServeConfig
from tests.engine.tiny_checkpoint import write_checkpoint

PLAIN = Arm(name="default")
OFF = Arm(name="off", speculation=SpeculationParams(method="off"))
NGRAM = Arm(
    name="ngram",
    speculation=SpeculationParams(method="ngram", num_draft_tokens=3, prompt_lookup_min=1),
)
MANY = list(range(5, 105))  # a prompt in which a look-up finds most tokens
EIGHT = SamplingParams(max_tokens=8, ignore_eos=True, seed=1)
USAGE = {"prompt_tokens": 5, "completion_tokens": 4, "prompt_tokens_details": {"cached_tokens": 2}}
URL = "http://server"


def ask(prompt: Any = "hello", arm: Arm = PLAIN, **more: Any) -> Ask:
    values = {"question": Question(id="q", prompt=prompt), "sampling": EIGHT, "arm": arm}
    return Ask(**{**values, **more})


def sse(*chunks: Any) -> list[bytes]:
    return [f"data: {c if isinstance(c, str) else json.dumps(c)}\n\n".encode() for c in chunks]


def words(*texts: str, reason: str = "length", **last: Any) -> list[bytes]:
    """Chunks of completions, the last one with a finish reason, then usage, then the end."""
    chunks: list[Any] = [{"choices": [{"text": text}]} for text in texts]
    chunks[-1]["choices"][0]["finish_reason"] = reason
    return sse(*chunks, {"choices": [], "usage": USAGE, **last}, "[DONE]")


class Fake(httpx.AsyncBaseTransport):
    """A server that answers from a script; what it was asked is in `bodies`."""

    def __init__(
        self,
        pieces: Callable[[dict[str, Any]], AsyncIterator[bytes]],
        owner: str = "vllm",
        status: int = 200,
        **pages: httpx.Response,
    ) -> None:
        self.pieces, self.owner, self.status, self.pages = pieces, owner, status, pages
        self.bodies: list[dict[str, Any]] = []
        self.num_open = self.most_open = 0

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        name = request.url.path.strip("/").replace("/", "_")
        if name in self.pages:
            return self.pages[name]
        if name == "v1_models":
            card = {"id": "m", "owned_by": self.owner, "max_model_len": 99}
            return httpx.Response(200, json={"data": [card]})
        if request.method != "POST":
            return httpx.Response(404)
        self.bodies.append({"path": request.url.path, **json.loads(await request.aread())})
        return httpx.Response(self.status, content=self._stream(self.bodies[-1]))

    async def _stream(self, body: dict[str, Any]) -> AsyncIterator[bytes]:
        self.num_open += 1
        self.most_open = max(self.most_open, self.num_open)
        async for piece in self.pieces(body):
            yield piece
        self.num_open -= 1


def scripted(pieces: list[bytes], pause_s: float = 0.0) -> Callable[..., AsyncIterator[bytes]]:
    async def stream(body: dict[str, Any]) -> AsyncIterator[bytes]:
        for piece in pieces:
            if pause_s:
                await asyncio.sleep(pause_s)
            yield piece

    return stream


def remote(transport: Fake, **options: Any) -> Remote:
    return Remote(URL, transport=transport, **options)


def test_chunks_become_a_reply() -> None:
    target = remote(Fake(scripted(words("a", "bc", "d"), pause_s=0.02)))
    (reply,) = target.run([ask()], concurrency=1)
    target.close()
    assert (reply.text, reply.finish_reason, reply.error) == ("abcd", "length", "")
    assert (reply.num_prompt_tokens, reply.num_cached_tokens, reply.num_tokens) == (5, 2, 4)
    assert len(reply.chunk_s) == 3
    assert reply.first_s is not None
    assert reply.last_s is not None
    assert reply.first_s - reply.sent_s >= 0.02
    assert reply.last_s - reply.first_s >= 0.04
    assert reply.tpot_s == pytest.approx((reply.last_s - reply.first_s) / 3)
    assert reply.acceptance is None
    assert reply.token_ids is None


def test_concurrency_bounds_what_is_in_flight_and_order_is_kept() -> None:
    fake = Fake(scripted(words("a", "b"), pause_s=0.002))
    asks = [ask(str(i)) for i in range(9)]
    replies = remote(fake).run(asks, concurrency=3)
    assert [reply.ask for reply in replies] == asks
    assert fake.most_open == 3
    assert len(fake.bodies) == 9


def test_an_open_loop_sends_at_its_times_however_slow_the_answers_are() -> None:
    fake = Fake(scripted(words("a"), pause_s=0.1))
    asks = [ask(str(i), at_s=0.02 * i + 0.01) for i in range(4)]
    replies = remote(fake).run(asks, concurrency=100)
    assert fake.most_open == 4
    for reply in replies:
        assert reply.due_s == reply.ask.at_s <= reply.sent_s


@pytest.mark.parametrize(
    ("pieces", "part"),
    [
        (words("a", "b")[:1], "broke off"),
        (sse({"error": {"message": "out of memory"}}), "out of memory"),
        (sse("{no json"), "no known form"),
        (sse({"choices": ["text"]}), "no known form"),
        (words("a", reason="abort"), "abort"),
        ([*words("a")[:1], b"data: [DONE]\n\n"], "how many tokens"),
    ],
)
def test_a_stream_that_goes_wrong_is_an_error_and_sent_once(pieces: list[bytes], part: str) -> None:
    fake = Fake(scripted(pieces))
    (reply,) = remote(fake).run([ask()], concurrency=1)
    assert part in reply.error
    assert len(fake.bodies) == 1


def test_refusals_and_broken_connections_are_errors_of_their_ask_alone() -> None:
    async def stream(body: dict[str, Any]) -> AsyncIterator[bytes]:
        if body["prompt"] == "breaks":
            raise httpx.ReadError("connection reset")
        for piece in words("a"):
            yield piece

    asks = [ask("breaks"), ask("good")]
    broken, good = remote(Fake(stream)).run(asks, concurrency=2)
    assert broken.error == "ReadError: connection reset"
    assert good.error == ""
    refusing = Fake(scripted([json.dumps({"error": {"message": "busy"}}).encode()]), status=429)
    (reply,) = remote(refusing).run([ask()], concurrency=1)
    assert reply.error == "status 429: busy"


def test_a_tokenizer_counts_where_the_server_does_not() -> None:
    fake = Fake(scripted([*words("a b", "c")[:2], b"data: [DONE]\n\n"]))
    (reply,) = remote(fake, count_tokens=len).run([ask()], concurrency=1)
    assert (reply.num_tokens, reply.error) == (4, "")


def test_lines_survive_any_cut() -> None:
    whole = b': ping\r\n\r\ndata: {"a": 1}\r\n\r\nevent: x\ndata:[DONE]\n\n'
    for cut in range(len(whole)):
        lines = Lines()
        assert lines.take(whole[:cut]) + lines.take(whole[cut:]) == [b'{"a": 1}', b"[DONE]"]


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        (
            {"metrics": {"speculative_decoding": {
                "num_spec_steps": 4, "num_draft_tokens": 12, "num_accepted_draft_tokens": 6,
                "acceptance_histogram": [1, 1, 1, 1]}}},
            Acceptance(0, 4, 12, 6, (1, 1, 1, 1)),
        ),
        (
            {"meta_info": {"spec_verify_ct": 4, "spec_draft_token_num": 12,
                           "spec_accept_token_num": 6}},
            Acceptance(5, 4, 12, 6),
        ),
        ({"meta_info": {"spec_verify_ct": 4}}, Acceptance(5, 4, 0, 6)),
        ({"timings": {"predicted_n": 11, "draft_n": 12, "draft_n_accepted": 6}},
         Acceptance(5, 5, 12, 6)),
        ({"timings": {"predicted_n": 11}}, None),
        ({}, None),
    ],
)  # fmt: skip
def test_acceptance_is_read_from_each_server(
    told: dict[str, Any], expected: Acceptance | None
) -> None:
    """All tell of 11 tokens: one of the prompt's pass, then 4 drafted steps that accepted 6."""
    for place in ("chunk", "choice"):
        reading = Reading(ask(), 0.0, 0.0)
        choice = {"text": "a", "finish_reason": "stop", **(told if place == "choice" else {})}
        chunk = {"choices": [choice], "usage": {"completion_tokens": 11}}
        chunk |= told if place == "chunk" else {}
        reading.take(json.dumps(chunk).encode(), 1.0)
        assert reading.reply().acceptance == expected


def test_chats_say_their_thoughts_and_calls_too() -> None:
    reading = Reading(ask(), 0.0, 0.0)
    for at_s, delta in enumerate(
        [
            {"role": "assistant", "content": ""},
            {"reasoning_content": "hm "},
            {"content": "yes"},
            {"tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]},
        ]
    ):
        reading.take(json.dumps({"choices": [{"delta": delta}]}).encode(), float(at_s))
    last = {"choices": [{"delta": {}, "finish_reason": "stop"}], "usage": USAGE}
    reading.take(json.dumps(last).encode(), 9.0)
    reply = reading.reply()
    assert reply.text == "hm yesf{}"
    assert (reply.first_s, reply.last_s) == (1.0, 9.0)
    assert reply.chunk_s == (1.0, 2.0, 3.0)


def facts(kind: str) -> ServerFacts:
    return ServerFacts(kind=kind, model="m")


def test_a_body_says_every_setting_that_a_server_would_choose_otherwise() -> None:
    path, body = body_of(ask(), facts("vllm"))
    assert path == "/v1/completions"
    assert body["temperature"] == 0.0
    assert (body["max_tokens"], body["seed"], body["ignore_eos"]) == (8, 1, True)
    assert (body["top_k"], body["min_p"], body["repetition_penalty"]) == (-1, 0.0, 1.0)
    assert body["stream_options"] == {"include_usage": True}
    _, of_llama_cpp = body_of(ask(), facts("llama.cpp"))
    assert (of_llama_cpp["top_k"], of_llama_cpp["repeat_penalty"]) == (0, 1.0)
    _, of_stranger = body_of(ask(), facts(""))
    assert not {"top_k", "min_p", "repetition_penalty"} & of_stranger.keys()
    _, of_sglang = body_of(ask(), facts("sglang"))
    assert of_sglang["return_meta_info"] is True


def test_prompts_choose_their_api() -> None:
    messages = [{"role": "user", "content": "hello"}]
    path, body = body_of(ask(messages), facts(""))
    assert (path, body["messages"]) == ("/v1/chat/completions", messages)
    path, body = body_of(ask([1, 2]), facts(""))
    assert (path, body["prompt"]) == ("/v1/completions", [1, 2])


def test_speculation_is_asked_in_the_servers_words_or_refused() -> None:
    assert body_of(ask(arm=OFF), facts("outrider"))[1]["outrider"] == {"speculation": "off"}
    asked = body_of(ask(arm=NGRAM), facts("outrider"))[1]["outrider"]
    assert asked == {
        "speculation": {"method": "ngram", "num_draft_tokens": 3, "prompt_lookup_min": 1}
    }
    assert body_of(ask(arm=OFF), facts("llama.cpp"))[1]["speculative.n_max"] == 0
    three = Arm(name="3", speculation=SpeculationParams(num_draft_tokens=3))
    assert body_of(ask(arm=three), facts("llama.cpp"))[1]["speculative.n_max"] == 3
    for arm, kind in ((NGRAM, "llama.cpp"), (OFF, "vllm"), (three, "sglang"), (OFF, "")):
        with pytest.raises(RequestError, match="per request"):
            body_of(ask(arm=arm), facts(kind))
    extra = Arm(name="x", extra={"spec": False, "seed": 5})
    body = body_of(ask(arm=extra), facts("vllm"))[1]
    assert (body["spec"], body["seed"]) == (False, 5)


@pytest.mark.parametrize(
    ("kind", "key"),
    [("vllm", "cache_salt"), ("outrider", "cache_salt"), ("sglang", "extra_key"),
     ("llama.cpp", "cache_prompt"), ("", "")],
)  # fmt: skip
def test_tenants_are_kept_apart_where_the_server_can(kind: str, key: str) -> None:
    with_tenant = body_of(ask(tenant="a"), facts(kind))[1]
    assert with_tenant.keys() - body_of(ask(), facts(kind))[1].keys() == ({key} if key else set())
    fake = Fake(scripted(words("a")), owner=kind.replace(".", ""))
    assert remote(fake).describe()["isolates_tenants"] is bool(key)


PAGE = """# TYPE vllm:spec_decode_num_drafts_total counter
vllm:spec_decode_num_drafts_total{engine="0",model_name="m"} 6.0
vllm:spec_decode_num_drafts_total{engine="1",model_name="m"} 4.0
vllm:spec_decode_num_draft_tokens_total{engine="0"} 20.0
vllm:spec_decode_num_accepted_tokens_total{engine="0"} 9.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",position="0"} 6.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",position="1"} 3.0
vllm:spec_decode_num_drafts_created{engine="0"} 1.7e+09
"""


def test_counters_add_up_engines_and_give_the_histogram() -> None:
    assert read_counters(PAGE) == Acceptance(0, 10, 20, 9, (4, 3, 3))
    assert read_counters("process_cpu_seconds_total 3.0\n") is None
    fake = Fake(scripted([]), metrics=httpx.Response(200, text=PAGE))
    assert remote(fake).counters() == read_counters(PAGE)
    assert remote(Fake(scripted([]))).counters() is None


def test_who_is_there_is_asked_once_and_mistakes_are_told() -> None:
    told = remote(Fake(scripted([]), version=httpx.Response(200, json={"version": "1"}))).describe()
    assert (told["model"], told["engine"], told["engine_version"]) == ("m", "vllm", "1")
    assert told["max_model_len"] == 99
    with pytest.raises(ConfigError, match="'other' is not served at http://server: it has 'm'"):
        remote(Fake(scripted([])), model="other").describe()
    with pytest.raises(ConfigError, match="OPENAI_API_KEY"):
        remote(Fake(scripted([]), v1_models=httpx.Response(401))).run([ask()], concurrency=1)
    hidden = Fake(scripted(words("a")), v1_models=httpx.Response(404))
    with pytest.raises(ConfigError, match="name the one"):
        remote(hidden).describe()
    assert remote(hidden, model="m").describe()["engine"] == "unknown"
    with pytest.raises(ConfigError, match="no server answers"):
        Remote("127.0.0.1:1").describe()
    for url in ("ftp://x", "http://", "http://user:key@host"):
        with pytest.raises(ConfigError, match="url"):
            Remote(url)


def test_a_key_is_sent_and_never_told() -> None:
    fake = Fake(scripted(words("a")))
    target = remote(fake, api_key="secret")
    assert "secret" not in json.dumps(target.describe())
    assert target._http.headers["Authorization"] == "Bearer secret"


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    folder = write_checkpoint(tmp_path_factory.mktemp("target"))
    return LLM(str(folder), check_integrity=True)


@pytest.fixture(scope="module")
def url(llm: LLM) -> Iterator[str]:
    """Our own server on a socket, in a thread."""
    app = create_app(AsyncLLM(llm), ServeConfig(drain_s=0.0))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, ws="none"))
    started = threading.Event()
    usual = server.startup

    async def startup(sockets: Any = None) -> None:
        await usual(sockets)
        started.set()

    server.startup = startup  # type: ignore[method-assign]
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    assert started.wait(20)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}/v1"
    server.should_exit = True
    thread.join(20)
    assert not thread.is_alive()


def test_our_own_server_answers_as_the_engine_does(url: str, llm: LLM) -> None:
    target = Remote(url)
    before = target.counters()
    prompts = ["def main(argv):", "return", MANY]
    arms = (OFF, NGRAM)
    asks = [ask(prompt, arm, tenant=arm.name) for prompt in prompts for arm in arms]
    replies = target.run(asks, concurrency=3)
    after = target.counters()
    target.close()
    assert [reply.error for reply in replies] == [""] * 6
    assert all(reply.num_tokens == 8 for reply in replies)
    assert before is not None
    assert after is not None
    num_drafts = sum(reply.acceptance.num_drafts for reply in replies if reply.acceptance)
    assert after.num_drafts - before.num_drafts == num_drafts > 0
    local = InProcess(llm).run(asks, concurrency=3)
    assert [reply.text for reply in replies] == [reply.text for reply in local]
    assert [r.acceptance and r.acceptance.num_drafts for r in replies] == [
        r.acceptance and r.acceptance.num_drafts for r in local
    ]
    told = target.facts
    assert (told.kind, told.model) == ("outrider", llm.engine.spec.name)


def test_what_our_server_refuses_is_the_askers_error(url: str) -> None:
    target = Remote(url)
    missing = Arm(name="x", speculation=SpeculationParams(method="draft_model"))
    refused, good = target.run([ask(arm=missing), ask()], concurrency=2)
    target.close()
    assert refused.error.startswith("status 400: ")
    assert "draft_model" in refused.error
    assert good.error == ""


def test_it_may_be_dropped_where_another_loop_runs() -> None:
    """The collector finds targets that nobody uses whenever it likes."""
    held = [remote(Fake(scripted(words("a"))))]
    held[0].run([ask()], concurrency=1)
    closed, runner = held[0]._close, held[0]._runner

    async def drop() -> None:
        held.clear()
        gc.collect()

    asyncio.run(drop())
    assert not closed.alive
    with pytest.raises(RuntimeError, match="closed"):
        runner.get_loop()
