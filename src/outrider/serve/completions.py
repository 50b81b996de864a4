"""/v1/completions: texts or token ids continued, whole and streamed."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence as Items
from contextlib import aclosing
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Depends, Header
from starlette.responses import JSONResponse, Response

from outrider.engine.prompts import encode
from outrider.errors import RequestError
from outrider.request import Speculation
from outrider.serve.base import Server, server, tenant
from outrider.serve.chat import salted, tail_of
from outrider.serve.delivery import HEADER, frame, shown, stream_options
from outrider.serve.generation import Answer, Ask, generate, whole
from outrider.serve.logprobs import LegacyLogprobs
from outrider.serve.schemas_completions import CompletionBody
from outrider.serve.schemas_generation import STREAMED
from outrider.serve.sse import DONE, Frame, event_stream
from outrider.serve.steps import Steps
from outrider.serve.turns import new_id
from outrider.serve.usage import (
    exactness,
    in_force,
    metrics_of,
    timings,
    usage,
    usage_of_all,
    with_prediction_ids,
)
from outrider.stream.erasure import Erasure
from outrider.stream.events import Committed, Event, RequestMetrics, Tail

T = TypeVar("T")
router = APIRouter(tags=["completions"])


@dataclass(frozen=True, kw_only=True)
class Job:
    """One prompt of a body.

    Attributes:
        id: of the request in the engine.
        place: which of the body's prompts; its choices begin at `place * n`.
        text: the prompt as it is echoed; "" where nobody asked for it.
    """

    id: str
    place: int
    ask: Ask
    text: str
    speculation: Speculation


@router.post("/v1/completions", response_model=None, responses=STREAMED)
async def completions(
    body: CompletionBody,
    here: Annotated[Server, Depends(server)],
    who: Annotated[str, Depends(tenant)],
    stream_header: Annotated[str, Header(alias=HEADER)] = "",
) -> Response:
    """What follows each prompt."""
    here.check_model(body.model)
    jobs = jobs_of(here, body, who, stream_header)
    if body.stream:
        return event_stream(_frames(here, body, jobs))
    answers = await together([whole(here, job.ask, job.id) for job in jobs])
    return JSONResponse(_completion(here, body, jobs, answers))


def jobs_of(here: Server, body: CompletionBody, who: str, stream_header: str = "") -> list[Job]:
    """What a body asks of the engine. RequestError, PairError: it cannot be had."""
    sampling = body.params()
    asked = body.asked_speculation()
    speculation = None if asked is None else with_prediction_ids(here, asked)
    resolved = in_force(here, speculation, sampling)
    options = stream_options(here, body.stream_options, stream_header if body.stream else "")
    options = shown(options, sampling, has_tools=False)
    jobs = []
    for place, prompt in enumerate(body.prompts()):
        ids = encode(prompt, here.tokenizer)
        check_prompt(here, place, ids)
        ask = Ask(
            prompt=ids,
            sampling=sampling,
            speculation=speculation,
            stream=options,
            tenant=salted(who, body.cache_salt),
            priority=body.priority,
        )
        text = _echo(here, prompt) if body.echo else ""
        jobs.append(Job(id=new_id("cmpl-"), place=place, ask=ask, text=text, speculation=resolved))
    return jobs


def check_prompt(here: Server, place: int, ids: tuple[int, ...]) -> None:
    """RequestError for what the engine would refuse, before another prompt has an answer."""
    engine = here.llm.engine
    wrong = next((i for i in ids if not 0 <= i < engine.spec.vocab_size), None)
    if wrong is not None:
        raise RequestError(
            f"prompt {place}: token id {wrong} is unknown; they end at {engine.spec.vocab_size - 1}"
        )
    if len(ids) >= engine.max_model_len:
        raise RequestError(
            f"prompt {place}: has {len(ids)} tokens; at most {engine.max_model_len - 1} leave room "
            "for an answer: shorten it"
        )


async def together(calls: Items[Any]) -> list[Any]:
    """All of them at once; the first failure ends the others and is raised."""
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def merged(streams: Items[AsyncIterator[T]]) -> AsyncIterator[tuple[int, T]]:
    """Items of all streams as they come, each with its stream's place; a failure ends them all.

    What is not read yet waits in the streams, where it is bounded.
    """
    queue: asyncio.Queue[tuple[int, T] | Exception | None] = asyncio.Queue()  # None: one ended
    turns = [asyncio.Semaphore(0) for _ in streams]  # one item of each stream is in the queue
    tasks = [
        asyncio.create_task(_pour(place, stream, queue, turns[place]))
        for place, stream in enumerate(streams)
    ]
    num_open = len(tasks)
    try:
        while num_open:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                num_open -= 1
            else:
                yield item
                turns[item[0]].release()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _pour(
    place: int,
    stream: AsyncIterator[T],
    queue: "asyncio.Queue[tuple[int, T] | Exception | None]",
    turn: asyncio.Semaphore,
) -> None:
    try:
        async with aclosing(stream):  # type: ignore[type-var]
            async for item in stream:
                queue.put_nowait((place, item))
                await turn.acquire()
    except Exception as error:
        queue.put_nowait(error)
    else:
        queue.put_nowait(None)


def _echo(here: Server, prompt: str | list[int]) -> str:
    return prompt if isinstance(prompt, str) else here.needed_tokenizer().decode(prompt)


async def _frames(here: Server, body: CompletionBody, jobs: list[Job]) -> AsyncIterator[Frame]:
    options = jobs[0].ask.stream
    chunks = _Chunks(here, body, jobs)
    streams = [generate(here, job.ask, job.id) for job in jobs]
    events = merged(streams)
    async with aclosing(events):  # type: ignore[type-var]
        async for place, event in events:
            for chunk in chunks.take(jobs[place], event):
                yield frame(chunk, options)
    if body.wants_usage:
        yield frame(chunks.usage(), options)
    yield Frame(data=DONE)


class _Chunks:
    """Turns the events of one response into chunks."""

    def __init__(self, here: Server, body: CompletionBody, jobs: list[Job]) -> None:
        self._head = _head(here, jobs)
        self._jobs = jobs
        self._null_usage = {"usage": None} if body.wants_usage else {}
        self._choices = {
            (job.place, index): _Choice(here, body, job, index)
            for job in jobs
            for index in range(body.n)
        }
        self._finished: list[tuple[Job, RequestMetrics]] = []
        self._erasures = [Erasure(time.monotonic) for _ in jobs]
        self._has_begun = False

    def take(self, job: Job, event: Event) -> Iterator[dict[str, Any]]:
        self._erasures[job.place].observe(event)
        choice = self._choices[job.place, event.index]
        more = self._echo()
        if isinstance(event, Tail):
            more.setdefault("outrider", {})["tail"] = tail_of(event)
            yield self._chunk(choice.wrap(""), more)
            return
        part = choice.take(event)
        made = choice.step(event) | more.pop("outrider", {})
        if event.finish_reason is not None:
            more = self._ending(job, event.metrics or RequestMetrics())
        if made:
            more["outrider"] = {**made, **more.get("outrider", {})}
        if part is not None or more:
            yield self._chunk(part or choice.wrap(""), more)

    def usage(self) -> dict[str, Any]:
        """The last chunk, which has no choices."""
        answers = {key: choice.token_ids for key, choice in self._choices.items()}
        found = usage_of_all(_usages(self._jobs, self._finished, answers))
        if len(self._jobs) == 1 and self._jobs[0].ask.stream.visibility != "verified":
            found["outrider"] = {"stream": self._erasures[0].summary()}
        return {**self._head, "choices": [], "usage": found}

    def _echo(self) -> dict[str, Any]:
        """With the first chunk of all: what is in force."""
        if self._has_begun:
            return {}
        self._has_begun = True
        job = self._jobs[0]
        made = {"stream": job.ask.stream.as_dict(), "exactness": exactness(job.speculation)}
        return {"outrider": made}

    def _ending(self, job: Job, metrics: RequestMetrics) -> dict[str, Any]:
        """With the last choice to end: what the response cost."""
        self._finished.append((job, metrics))
        if len(self._finished) < len(self._choices):
            return {}
        return _report(job.speculation, [each for _, each in self._finished])

    def _chunk(self, choice: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
        return {**self._head, "choices": [choice], **self._null_usage, **more}


class _Choice:
    """One of a response's choices, commit by commit.

    Attributes:
        token_ids: so far, where there is a prediction to hold them against.
    """

    def __init__(self, here: Server, body: CompletionBody, job: Job, index: int) -> None:
        self._index = job.place * body.n + index
        self._echo = job.text
        self._logprobs = _legacy(here, body, job)
        wants_steps = job.ask.stream.steps
        self._steps = Steps(here.tokenizer, job.ask.prompt) if wants_steps else None
        self._is_predicted = bool(job.speculation.prediction)
        self.token_ids: list[int] = []

    def step(self, event: Committed) -> dict[str, Any]:
        """What the commit was made of, for clients that ask."""
        return {} if self._steps is None else {"step": self._steps.detail(event)}

    def take(self, event: Committed) -> dict[str, Any] | None:
        """None where there is nothing to say yet."""
        if self._is_predicted:
            self.token_ids += event.token_ids
        text, self._echo = self._echo + event.text, ""
        logprobs = None
        if self._logprobs is not None and event.logprobs:
            logprobs = self._logprobs.take(event.logprobs)
        if not text and logprobs is None and event.finish_reason is None:
            return None
        return {
            **self.wrap(text),
            "logprobs": logprobs,
            "finish_reason": event.finish_reason,
            "stop_reason": event.stop_reason,
        }

    def wrap(self, text: str) -> dict[str, Any]:
        return {"index": self._index, "text": text, "logprobs": None, "finish_reason": None}


def _completion(
    here: Server, body: CompletionBody, jobs: list[Job], answers: list[list[Answer]]
) -> dict[str, Any]:
    pairs = [(job, answer) for job, found in zip(jobs, answers, strict=True) for answer in found]
    finished = [(job, answer.metrics) for job, answer in pairs]
    token_ids = {(job.place, answer.index): answer.token_ids for job, answer in pairs}
    return {
        **_head(here, jobs),
        "choices": [_whole_choice(here, body, job, answer) for job, answer in pairs],
        "usage": usage_of_all(_usages(jobs, finished, token_ids)),
        **_report(jobs[0].speculation, [metrics for _, metrics in finished]),
    }


def _whole_choice(here: Server, body: CompletionBody, job: Job, answer: Answer) -> dict[str, Any]:
    legacy = _legacy(here, body, job)
    return {
        "index": job.place * body.n + answer.index,
        "text": job.text + answer.text,
        "logprobs": None if legacy is None else legacy.take(answer.logprobs),
        "finish_reason": answer.finish_reason,
        "stop_reason": answer.stop_reason,
    }


def _head(here: Server, jobs: list[Job]) -> dict[str, Any]:
    return {
        "id": jobs[0].id,
        "object": "text_completion",
        "created": here.now(),
        "model": here.model_name,
    }


def _legacy(here: Server, body: CompletionBody, job: Job) -> LegacyLogprobs | None:
    if body.logprobs is None:
        return None
    return LegacyLogprobs(here.needed_tokenizer(), job.ask.prompt)


def _usages(
    jobs: list[Job],
    finished: list[tuple[Job, RequestMetrics]],
    token_ids: Mapping[tuple[int, int], Items[int]],
) -> list[dict[str, Any]]:
    """One per prompt.

    Args:
        token_ids: of each answer, by its job's place and its index.
    """
    return [
        usage(
            [metrics for owner, metrics in finished if owner is job],
            prediction=job.speculation.prediction,
            answers=[ids for (place, _), ids in token_ids.items() if place == job.place],
        )
        for job in jobs
    ]


def _report(speculation: Speculation, metrics: list[RequestMetrics]) -> dict[str, Any]:
    return {
        "metrics": metrics_of(metrics, speculation),
        "timings": timings(metrics),
        "outrider": {"exactness": exactness(speculation, metrics)},
    }
