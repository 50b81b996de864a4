"""AsyncLLM: the same engine behind an asyncio front, one worker thread, many clients."""

import asyncio
import itertools
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeAlias

from outrider.engine.build import speculation_params
from outrider.engine.llm import LLM, Speculation
from outrider.engine.prompts import Prompt, make_request
from outrider.errors import EngineError, RequestError
from outrider.request import SamplingParams, StreamParams
from outrider.stream.events import Committed, Event

_Queue: TypeAlias = asyncio.Queue[Event | EngineError]


class AsyncLLM:
    """Serves requests concurrently; all engine work runs in one thread, in order.

    Args: as `LLM`.
    """

    def __init__(self, model: str | LLM, **options: Any) -> None:
        self._llm = model if isinstance(model, LLM) else LLM(model, **options)
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="outrider-engine")
        self._queues: dict[str, _Queue] = {}
        self._loop_task: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._ids = itertools.count()
        self._is_closed = False

    async def generate(
        self,
        prompt: Prompt,
        sampling: SamplingParams | None = None,
        speculation: Speculation | None = None,
        *,
        stream: StreamParams | None = None,
        request_id: str | None = None,
        priority: int = 0,
        tenant: str = "",
    ) -> AsyncIterator[Event]:
        """Events of one request, as they happen; leaving the loop early aborts it.

        Raises:
            RequestError: it cannot be served as asked. EngineError: the engine broke down.
        """
        if self._is_closed:
            raise EngineError("the engine is closed: make a new AsyncLLM")
        sampling = sampling or SamplingParams()
        request = make_request(
            request_id or f"request-{next(self._ids)}",
            prompt,
            sampling,
            self._llm.speculation if speculation is None else speculation_params(speculation),
            stream or StreamParams(),
            self._llm.tokenizer,
            priority=priority,
            tenant=tenant,
        )
        if request.id in self._queues:
            raise RequestError(f"request id {request.id!r} is in use: choose another")
        queue = self._queues[request.id] = _Queue()
        num_open = 0
        try:
            await self._in_worker(self._llm.engine.add, request)
            num_open = sampling.n
            self._start()
            while num_open:
                event = await queue.get()
                if isinstance(event, EngineError):
                    raise event
                num_open -= isinstance(event, Committed) and event.finish_reason is not None
                yield event
        finally:
            self._queues.pop(request.id, None)
            if num_open and not self._is_closed:
                await self._in_worker(self._llm.engine.abort, request.id)
                self._wake.set()

    async def aclose(self) -> None:
        """Stops serving; requests in flight get an EngineError."""
        self._is_closed = True
        self._wake.set()
        if self._loop_task is not None:
            await self._loop_task
        self._tell_all(EngineError("the engine was closed while the request was running"))
        self._worker.shutdown()

    def _start(self) -> None:
        if self._loop_task is None or self._loop_task.done():
            self._loop_task = asyncio.create_task(self._run())
        self._wake.set()

    async def _run(self) -> None:
        """Steps while there is work, sleeps while there is none."""
        while not self._is_closed:
            if not self._llm.engine.has_work():
                self._wake.clear()
                await self._wake.wait()
                continue
            try:
                events = await self._in_worker(self._llm.engine.step)
            except Exception as error:
                lost = ", ".join(self._queues) or "none"
                self._tell_all(EngineError(f"the engine failed ({error!r}); lost requests: {lost}"))
                self._is_closed = True
                raise
            for event in events:
                queue = self._queues.get(event.request_id)
                if queue is not None:
                    queue.put_nowait(event)

    def _tell_all(self, error: EngineError) -> None:
        for queue in self._queues.values():
            queue.put_nowait(error)

    async def _in_worker(self, call: Any, *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._worker, call, *args)
