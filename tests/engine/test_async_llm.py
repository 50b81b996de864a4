"""AsyncLLM: the same tokens as LLM for many clients at once; cancelling, failing and closing."""

import asyncio
import contextlib
import gc
import threading

import pytest

from outrider import LLM, AsyncLLM, SamplingParams, SpeculationParams
from outrider.errors import EngineError, RequestError
from outrider.request import StreamParams
from outrider.stream.events import Committed, Tail
from tests.engine.tiny_checkpoint import write_checkpoint

SHORT = SamplingParams(max_tokens=16, temperature=0.9, seed=5, ignore_eos=True)
ENDLESS = SamplingParams(max_tokens=120, ignore_eos=True)
PROMPTS = [[5 + i, 9, 40 - i] for i in range(8)]
SPECULATIONS = ["off", "ngram", "draft_model", {"num_draft_tokens": 2}] * 2


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    folder = write_checkpoint(tmp_path_factory.mktemp("target"))
    draft = write_checkpoint(tmp_path_factory.mktemp("draft"), num_hidden_layers=1)
    return LLM(folder, draft_model=draft, policy="fixed", check_integrity=True)


@pytest.fixture
async def served(llm):
    served = AsyncLLM(llm)
    yield served
    await served.aclose()
    llm.generate([[5]], SamplingParams(max_tokens=1))  # flushes what was aborted last
    assert not llm.engine.has_work()
    assert llm.engine.manager.num_used == 0


async def gather(events):
    return [event async for event in events]


def tokens_of(events):
    return [t for event in events if isinstance(event, Committed) for t in event.token_ids]


async def until_idle(llm):
    async with asyncio.timeout(10):
        while llm.engine.has_work():
            await asyncio.sleep(0.01)


async def test_concurrent_requests_get_the_tokens_of_llm(served, llm):
    clients = [
        gather(served.generate(prompt, SHORT, speculation))
        for prompt, speculation in zip(PROMPTS, SPECULATIONS, strict=True)
    ]
    answers = await asyncio.gather(*clients)
    expected = [out.token_ids for out in llm.generate(PROMPTS, SHORT, "off")]
    assert [tokens_of(events) for events in answers] == expected
    drafters = [events[-1].metrics.drafter for events in answers]
    assert drafters == ["", "ngram", "draft_model", "draft_model"] * 2


async def test_requests_share_the_steps(served, llm):
    before = llm.engine.stats.num_steps
    await asyncio.gather(*(gather(served.generate(p, ENDLESS, "off")) for p in PROMPTS))
    assert llm.engine.stats.num_steps - before < 2 * 120


async def test_each_client_hears_of_its_own_request_only(served):
    ids = [f"mine-{i}" for i in range(4)]
    answers = await asyncio.gather(
        *(gather(served.generate([5, i + 6], SHORT, request_id=ids[i])) for i in range(4))
    )
    assert [{event.request_id for event in events} for events in answers] == [{i} for i in ids]
    assert all(events[-1].finish_reason == "length" for events in answers)


async def test_several_completions_all_arrive(served, llm):
    sampling = SamplingParams(max_tokens=8, temperature=1.0, seed=3, n=3, ignore_eos=True)
    events = await gather(served.generate([5, 6], sampling))
    (expected,) = llm.generate([[5, 6]], sampling)
    for completion in expected.completions:
        mine = [event for event in events if event.index == completion.index]
        assert tokens_of(mine) == completion.token_ids
        assert mine[-1].finish_reason == "length"


async def test_tails_only_for_those_who_ask(served):
    asked = StreamParams(visibility="provisional", min_stability=0.0)
    plain, told = await asyncio.gather(
        gather(served.generate([5, 6], SHORT)),
        gather(served.generate([5, 6], SHORT, stream=asked)),
    )
    assert all(isinstance(event, Committed) for event in plain)
    assert any(isinstance(event, Tail) for event in told)
    assert isinstance(told[-1], Committed)
    assert tokens_of(told) == tokens_of(plain)


async def test_leaving_the_loop_aborts(served, llm):
    async for _ in served.generate([5, 6], ENDLESS):
        break
    gc.collect()
    await until_idle(llm)
    assert llm.engine.manager.num_used == 0


async def test_closing_the_iterator_aborts_at_once(served, llm):
    events = served.generate([5, 6], ENDLESS)
    await anext(events)
    await events.aclose()
    assert llm.engine.manager.num_used == 0
    await until_idle(llm)


@pytest.mark.parametrize("when", ["adding", "running"])
async def test_cancelling_the_task_aborts(served, llm, when, monkeypatch):
    at_door, go_on = threading.Event(), threading.Event()
    add = llm.engine.add

    def slow_add(request):
        at_door.set()
        go_on.wait(10)
        add(request)

    before = llm.engine.stats.num_generated_tokens
    if when == "adding":
        monkeypatch.setattr(llm.engine, "add", slow_add)
    first = asyncio.Event()

    async def client():
        async for _ in served.generate([5, 6], ENDLESS):
            first.set()

    task = asyncio.create_task(client())
    await (first.wait() if when == "running" else asyncio.to_thread(at_door.wait, 10))
    task.cancel()
    await asyncio.sleep(0)
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until_idle(llm)
    assert llm.engine.stats.num_generated_tokens - before < 110
    assert llm.engine.manager.num_used == 0


async def test_others_go_on_when_one_leaves(served, llm):
    others = [asyncio.create_task(gather(served.generate(p, ENDLESS))) for p in PROMPTS[:3]]
    async with contextlib.aclosing(served.generate([7, 7], ENDLESS)) as leaving:
        await anext(leaving)
    answers = await asyncio.gather(*others)
    expected = [out.token_ids for out in llm.generate(PROMPTS[:3], ENDLESS, "off")]
    assert [tokens_of(events) for events in answers] == expected


async def test_a_refused_request_harms_nobody(served):
    good = asyncio.create_task(gather(served.generate([5, 6], SHORT)))
    for prompt, speculation, match in [
        ([10**6], None, "knows ids"),
        ([5], "ngrm", "did you mean 'ngram'"),
        ("", None, "the prompt is empty"),
        ([5], 4, "speculation=4"),
    ]:
        with pytest.raises(RequestError, match=match):
            await gather(served.generate(prompt, SHORT, speculation))
    assert len(tokens_of(await good)) == 16


async def test_a_request_id_is_for_one_at_a_time(served):
    first = served.generate([5, 6], ENDLESS, request_id="same")
    await anext(first)
    with pytest.raises(RequestError, match="'same' is in use"):
        await gather(served.generate([5, 6], SHORT, request_id="same"))
    assert len(tokens_of(await gather(first))) > 100, "the first goes on"
    assert len(tokens_of(await gather(served.generate([5, 6], SHORT, request_id="same")))) == 16


async def test_a_failing_engine_names_the_lost_requests(llm, monkeypatch, caplog):
    served = AsyncLLM(llm)
    running = [served.generate([5, i], ENDLESS, request_id=f"lost-{i}") for i in range(2)]
    for events in running:
        await anext(events)
    with monkeypatch.context() as patch:
        patch.setattr(llm.engine.runner, "forward", lambda *_: 1 / 0)
        for events in running:
            with pytest.raises(
                EngineError, match=r"ZeroDivisionError.*lost requests: lost-0, lost-1"
            ):
                await gather(events)
    assert "the engine failed" in caplog.text
    with pytest.raises(EngineError, match=r"the engine failed .*: make a new AsyncLLM"):
        await gather(served.generate([5], SHORT))
    await served.aclose()
    anew = AsyncLLM(llm)
    assert len(tokens_of(await gather(anew.generate([5, 6], SHORT)))) == 16
    await anew.aclose()
    assert llm.engine.manager.num_used == 0


async def test_after_a_failure_the_next_front_needs_no_ids_of_its_own(llm, monkeypatch):
    served = AsyncLLM(llm)
    running = served.generate([5, 6], ENDLESS)
    await anext(running)
    with monkeypatch.context() as patch:
        patch.setattr(llm.engine.runner, "forward", lambda *_: 1 / 0)
        with pytest.raises(EngineError, match="ZeroDivisionError"):
            await gather(running)
        await served.aclose()
    assert not llm.engine.has_work()
    assert not llm.engine._groups
    anew = AsyncLLM(llm)
    assert len(tokens_of(await gather(anew.generate([5, 6], SHORT)))) == 16
    await anew.aclose()


async def test_fronts_of_one_engine_share_its_ids(served, llm):
    stream = llm.stream([[5, 6]], SHORT)
    mine = next(stream).request_id
    async with contextlib.aclosing(served.generate([5, 6], SHORT)) as events:
        assert (await anext(events)).request_id != mine
    stream.close()


@pytest.mark.parametrize("leaves", [False, True], ids=["refused", "cancelled while refused"])
async def test_an_id_in_use_elsewhere_is_refused_and_left_alone(served, llm, monkeypatch, leaves):
    stream = llm.stream([[5, 6]], SHORT)
    taken = next(stream).request_id
    at_door, go_on, add = threading.Event(), threading.Event(), llm.engine.add

    def slow_add(request):
        at_door.set()
        go_on.wait(10)
        add(request)

    monkeypatch.setattr(llm.engine, "add", slow_add)
    monkeypatch.setattr(served, "_start", lambda: None)
    client = asyncio.create_task(gather(served.generate([7], SHORT, request_id=taken)))
    await asyncio.to_thread(at_door.wait, 10)
    if leaves:
        client.cancel()
        await asyncio.sleep(0)
    go_on.set()
    with pytest.raises(asyncio.CancelledError if leaves else RequestError):
        await client
    assert list(stream)[-1].finish_reason == "length", "the other client goes on"


async def test_closing_ends_what_runs_and_refuses_what_comes(llm):
    served = AsyncLLM(llm)
    running = served.generate([5, 6], ENDLESS, request_id="cut")
    await anext(running)
    await served.aclose()
    with pytest.raises(EngineError, match=r"closed; lost requests: cut"):
        await gather(running)
    with pytest.raises(EngineError, match="closed: make a new AsyncLLM"):
        await gather(served.generate([5], SHORT))
    await served.aclose()  # twice does no harm
    assert llm.engine.manager.num_used == 0
    assert len(llm.generate([[5, 6]], SHORT)[0].token_ids) == 16


def test_one_engine_for_several_event_loops(llm):
    served = AsyncLLM(llm)

    async def answer():
        first = tokens_of(await gather(served.generate([5, 6], SHORT)))
        await asyncio.sleep(0.05)  # the engine falls asleep between the two
        return first, tokens_of(await gather(served.generate([5, 6], SHORT)))

    assert len({tuple(tokens) for _ in range(2) for tokens in asyncio.run(answer())}) == 1
    asyncio.run(served.aclose())


async def test_it_loads_what_llm_loads(tmp_path):
    served = AsyncLLM(str(write_checkpoint(tmp_path)), max_num_seqs=2)
    events = await gather(served.generate("def", SHORT, SpeculationParams(method="ngram")))
    assert len(tokens_of(events)) == 16
    await served.aclose()
