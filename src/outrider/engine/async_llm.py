"""AsyncLLM: the same engine behind an asyncio front, one worker thread, many clients."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, TypeAlias, TypeVar

from outrider.engine.build import speculation_params
from outrider.engine.llm import LLM, Speculation
from outrider.engine.prompts import NOTHING, Prompt, make_request
from outrider.errors import EngineError, RequestError
from outrider.request import PastDrafts, SamplingParams, StreamParams
from outrider.stream.events import Committed, Event

T = TypeVar("T")
_Queue: TypeAlias = asyncio.Queue[Event | EngineError]
CLOSED = "the engine is closed: make a new AsyncLLM"
logger = logging.getLogger(__name__)


class _Client(NamedTuple):
    """Who waits for a request's events, and whether the engine took the request."""

    queue: _Queue
    added: Future[None]


class AsyncLLM:
    """Serves requests concurrently; all engine work runs in one thread, in order.

    Args: as `LLM`.
    """

    def __init__(self, model: str | LLM, **options: Any) -> None:
        self._llm = model if isinstance(model, LLM) else LLM(model, **options)
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="outrider-engine")
        self._clients: dict[str, _Client] = {}
        self._loop_task: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._refusal = ""  # why nothing is served any more

    @property
    def llm(self) -> LLM:
        """The blocking face of the engine; while requests run, touch it through `call` only."""
        return self._llm

    @property
    def refusal(self) -> str:
        """Why nothing is served any more; "" while it serves."""
        return self._refusal

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
        experience: PastDrafts = NOTHING,
    ) -> AsyncIterator[Event]:
        """Events of one request, as they happen; leaving the loop early aborts it.

        Args:
            experience: how drafts for such text fared before (see `Request`).

        Raises:
            RequestError: it cannot be served as asked. EngineError: the engine broke down.
        """
        if self._refusal:
            raise EngineError(self._refusal)
        sampling = sampling or SamplingParams()
        request = make_request(
            request_id or self._llm.new_request_id(),
            prompt,
            sampling,
            self._llm.speculation if speculation is None else speculation_params(speculation),
            stream or StreamParams(),
            self._llm.tokenizer,
            priority=priority,
            tenant=tenant,
            experience=experience,
        )
        if request.id in self._clients:
            raise RequestError(f"request id {request.id!r} is in use: choose another")
        added = self._worker.submit(self._llm.engine.add, request)
        client = self._clients[request.id] = _Client(_Queue(), added)
        num_open = sampling.n
        try:
            await asyncio.wrap_future(client.added)
            self._start()
            while num_open:
                event = await client.queue.get()
                if isinstance(event, EngineError):
                    raise event
                num_open -= isinstance(event, Committed) and event.finish_reason is not None
                yield event
        finally:
            self._clients.pop(request.id, None)
            if num_open and not self._refusal:
                await self._in_worker(self._abort, request.id, client)
                self._start()

    async def call(self, function: Callable[..., T], *args: Any) -> T:
        """What `function(*args)` returns, run in the engine's thread between two steps.

        For all that reads or changes the engine while it serves: warmth, statistics, its cache.
        Nothing steps meanwhile, so it should be short. Leaving early does not stop a function that
        has begun.

        Raises:
            EngineError: the engine is closed or broke down. Else what the function raises, which
                does the engine no harm.
        """
        if self._refusal:
            raise EngineError(self._refusal)
        result: T = await self._in_worker(function, *args)
        if not self._refusal:
            self._start()  # it may have left work
        return result

    async def aclose(self) -> None:
        """Stops serving; requests in flight get an EngineError."""
        if self._refusal == CLOSED:
            return
        self._refusal = CLOSED
        self._wake.set()
        if self._loop_task is not None and not self._loop_task.done():
            await self._loop_task
        await self._lose_all("the engine was closed")
        self._llm.engine.streamer.on_tails = None
        self._worker.shutdown()

    def _start(self) -> None:
        if self._loop_task is None or self._loop_task.done():
            self._wake = asyncio.Event()  # belongs to the running loop, as the task does
            self._tells_tails_to(asyncio.get_running_loop())
            self._loop_task = asyncio.create_task(self._run())
        self._wake.set()

    async def _run(self) -> None:
        """Steps while there is work, sleeps while there is none."""
        while not self._refusal:
            if not self._llm.engine.has_work():
                self._wake.clear()
                await self._wake.wait()
                continue
            try:
                events = await self._in_worker(self._llm.engine.step)
            except Exception as error:
                logger.exception("the engine failed")
                self._refusal = f"the engine failed ({error!r}): make a new AsyncLLM"
                await self._lose_all(f"the engine failed ({error!r})")
                return
            self._deliver(events)

    def _deliver(self, events: list[Event]) -> None:
        for event in events:
            client = self._clients.get(event.request_id)
            if client is not None:
                client.queue.put_nowait(event)

    def _tells_tails_to(self, loop: asyncio.AbstractEventLoop) -> None:
        """Tails are told at once: behind the step's commit they would be void already."""
        self._llm.engine.streamer.on_tails = lambda tails: self._tell(loop, tails)

    def _tell(self, loop: asyncio.AbstractEventLoop, tails: list[Event]) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(self._deliver, tails)

    async def _lose_all(self, reason: str) -> None:
        """Every open request ends with an EngineError, and leaves nothing in the engine."""
        lost = dict(self._clients)
        for client in lost.values():
            client.queue.put_nowait(EngineError(f"{reason}; lost requests: {', '.join(lost)}"))
        await self._in_worker(self._clear, lost)

    def _clear(self, lost: dict[str, _Client]) -> None:
        """Aborts, and takes the last events out; what fails here is told, for more would too."""
        try:
            for request_id, client in lost.items():
                self._abort(request_id, client)
            self._llm.flush()
        except Exception:
            logger.exception("requests were left in the engine")

    def _abort(self, request_id: str, client: _Client) -> None:
        """In the worker, behind the add: an id that was refused belongs to somebody else."""
        if not client.added.cancelled() and client.added.exception() is None:
            self._llm.engine.abort(request_id)

    async def _in_worker(self, call: Any, *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._worker, call, *args)
