"""InProcess: our own engine as a target, driven in this thread."""

import time
from collections.abc import Callable, Sequence as Items
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any

from outrider.bench.feed import Feed, Listed, due_of, in_order_of
from outrider.bench.histogram import since
from outrider.bench.learners import Learners
from outrider.bench.provenance import versions
from outrider.bench.target import Acceptance, Ask, Question, Reply
from outrider.engine.llm import LLM
from outrider.engine.prompts import encode, make_request
from outrider.errors import ConfigError, OutriderError, RequestError
from outrider.request import Request, StreamParams
from outrider.stream.events import Committed, RequestMetrics


class InProcess:
    """One engine without a server: steps follow one another as fast as they can.

    Prompts given to `run` become tokens before the clock starts. Policies that learn are kept for
    each arm (an ask's `learner`), and begin with what the engine's knew when this was made. An
    arm's `extra` is for servers and refused.

    Args:
        llm: serves nobody else meanwhile.
        clock, sleep: seconds that never go back, and how to let some pass.
    """

    def __init__(
        self,
        llm: LLM,
        *,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.llm = llm
        self.name = llm.engine.spec.name
        self._clock = clock
        self._sleep = sleep
        self._encoded: dict[str, tuple[Question, tuple[int, ...]]] = {}
        self._at_start = _counted(llm)
        self._learners = Learners(llm.engine)

    @property
    def has_chat_template(self) -> bool:
        """Whether prompts may be conversations."""
        backend = getattr(self.llm.tokenizer, "backend", None)
        return bool(getattr(backend, "chat_template", None))

    def describe(self) -> dict[str, Any]:
        engine, config = self.llm.engine, self.llm.engine.config
        spec = engine.spec
        return {
            "kind": "in process",
            "name": self.name,
            "model": spec.name,
            "model_hash": spec.fingerprint,
            "family": spec.family,
            "num_parameters": spec.num_parameters,
            "dtype": str(spec.dtype).removeprefix("torch."),
            "device": str(spec.device),
            "kernels": engine.runner.network.ops.name,
            "draft_model": engine.draft_model or None,
            "default_drafter": engine.default_drafter or None,
            "max_model_len": engine.max_model_len,
            "max_num_seqs": config.max_num_seqs,
            "max_num_batched_tokens": config.max_num_batched_tokens,
            "enable_prefix_caching": config.enable_prefix_caching,
            "starts_with_prices": engine.has_prices,
            "policies_shared_by_arms": self._learners.shared,
            "engine": "outrider",
            "engine_version": versions()["outrider"],
        }

    def run(
        self,
        asks: Items[Ask],
        *,
        concurrency: int,
        tick: Callable[[Reply], None] = lambda reply: None,
    ) -> list[Reply]:
        for ask in asks:
            with suppress(OutriderError):  # told when its turn comes
                self._ids(ask.question)
        return in_order_of(asks, self.serve(Listed(asks), concurrency=concurrency, tick=tick))

    def serve(
        self,
        feed: Feed,
        *,
        concurrency: int,
        tick: Callable[[Reply], None] = lambda reply: None,
    ) -> list[Reply]:
        """Answers what a feed asks, until it ends; replies in the order in which they came.

        An ask of another learner that comes while answers are under way teaches the first one's
        policies.

        Raises:
            ConfigError: the engine serves somebody else, or nobody may be served at a time.
        """
        if concurrency < 1:
            raise ConfigError(f"concurrency={concurrency}: must be at least 1")
        self.llm.flush()
        if self.llm.engine.has_work():
            raise ConfigError("the engine serves other requests: finish or abort them first")
        run = _Run(self, feed, concurrency, tick)
        try:
            return run.to_the_end()
        finally:
            run.dismiss()

    def forget(self) -> None:
        """Policies of all arms begin anew."""
        self._learners.forget()

    def counters(self) -> Acceptance | None:
        """Of drafts; which passes emitted tokens for whom the engine does not count."""
        return since(self._at_start, _counted(self.llm))

    def _ids(self, question: Question) -> tuple[int, ...]:
        """Tokens of a prompt, kept."""
        known = self._encoded.get(question.id)
        if known is None or known[0] is not question:
            known = (question, encode(question.prompt, self.llm.tokenizer))
            self._encoded[question.id] = known
        return known[1]

    def _request(self, ask: Ask) -> Request:
        """RequestError for what cannot be asked here."""
        if ask.arm.extra:
            raise RequestError(
                f"arm {ask.arm.name!r}: extra={dict(ask.arm.extra)} goes into the body of a "
                "server's request; in this process give speculation instead"
            )
        _check_one(ask)
        return make_request(
            self.llm.new_request_id(),
            self._ids(ask.question),
            ask.sampling,
            self.llm.speculation if ask.arm.speculation is None else ask.arm.speculation,
            StreamParams(),
            self.llm.tokenizer,
            priority=ask.priority,
            tenant=ask.tenant,
        )


@dataclass(kw_only=True)
class _Flight:
    """One request in the engine, and what has come of it."""

    ask: Ask
    due_s: float
    sent_s: float
    num_prompt_tokens: int
    first_s: float | None = None
    last_s: float | None = None
    chunk_s: list[float] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    text: str = ""

    def take(self, event: Committed, now_s: float) -> None:
        self.text += event.text
        self.token_ids += event.token_ids
        if event.token_ids:
            self.first_s = now_s if self.first_s is None else self.first_s
            self.last_s = now_s
            self.chunk_s.append(now_s)

    def reply(self, last: Committed) -> Reply:
        metrics = last.metrics or RequestMetrics()
        failed = last.finish_reason in ("abort", "error")
        return Reply(
            ask=self.ask,
            due_s=self.due_s,
            sent_s=self.sent_s,
            first_s=self.first_s,
            last_s=self.last_s,
            chunk_s=tuple(self.chunk_s),
            num_prompt_tokens=self.num_prompt_tokens,
            num_cached_tokens=metrics.num_cached_tokens,
            num_tokens=len(self.token_ids),
            token_ids=tuple(self.token_ids),
            text=self.text,
            finish_reason=last.finish_reason or "",
            acceptance=acceptance_of(metrics),
            error=(last.error or f"ended by {last.finish_reason!r}") if failed else "",
        )


class _Run:
    """One call of `serve`: admits what is due, steps, and hands out what came."""

    def __init__(
        self, target: InProcess, feed: Feed, concurrency: int, tick: Callable[[Reply], None]
    ) -> None:
        self._target = target
        self._engine = target.llm.engine
        self._feed = feed
        self._concurrency = concurrency
        self._tick = tick
        self._flights: dict[str, _Flight] = {}
        self._replies: list[Reply] = []
        self._teaching = ExitStack()
        self._start_s = target._clock()

    def to_the_end(self) -> list[Reply]:
        while True:
            self._admit()
            if self._flights:
                self._step()
                continue
            due_s = self._feed.due_s
            if due_s is None:
                return self._replies
            self._target._sleep(max(0.0, due_s - self._now()))

    def dismiss(self) -> None:
        """What is still in the engine, after an interruption, leaves it."""
        for request_id in self._flights:
            self._engine.abort(request_id)
        self._target.llm.flush()
        self._teaching.close()

    def _now(self) -> float:
        return self._target._clock() - self._start_s

    def _admit(self) -> None:
        while len(self._flights) < self._concurrency:
            due_s, now_s = self._feed.due_s, self._now()
            if due_s is None or due_s > now_s:
                return
            self._send(self._feed.take(now_s))

    def _send(self, ask: Ask) -> None:
        if not self._flights:
            self._teaching.close()
            learner = ask.learner or ask.arm.name
            self._teaching.enter_context(self._target._learners.teaching(learner))
        now_s = self._now()
        try:
            request = self._target._request(ask)
            now_s = self._now()
            self._engine.add(request)
        except OutriderError as error:
            self._ended(Reply(ask=ask, due_s=due_of(ask, now_s), sent_s=now_s, error=str(error)))
            return
        self._flights[request.id] = _Flight(
            ask=ask,
            due_s=due_of(ask, now_s),
            sent_s=now_s,
            num_prompt_tokens=len(request.prompt_token_ids),
        )

    def _step(self) -> None:
        events = self._engine.step()
        now_s = self._now()
        for event in events:
            flight = self._flights.get(event.request_id)
            if flight is None or not isinstance(event, Committed):
                continue
            flight.take(event, now_s)
            if event.finish_reason is not None:
                del self._flights[event.request_id]
                self._ended(flight.reply(event))

    def _ended(self, reply: Reply) -> None:
        self._replies.append(reply)
        self._feed.note(reply)
        self._tick(reply)


def acceptance_of(metrics: RequestMetrics) -> Acceptance:
    return Acceptance(
        num_steps=metrics.num_steps,
        num_drafts=metrics.num_drafts,
        num_draft_tokens=metrics.num_draft_tokens,
        num_accepted_tokens=metrics.num_accepted_tokens,
        histogram=metrics.accepted_histogram,
    )


def _check_one(ask: Ask) -> None:
    if ask.sampling.n != 1:
        raise RequestError(f"n={ask.sampling.n}: one answer per ask is measured; set n=1")


def _counted(llm: LLM) -> Acceptance:
    stats = llm.engine.stats
    return Acceptance(
        num_drafts=stats.num_drafts,
        num_draft_tokens=stats.num_draft_tokens,
        num_accepted_tokens=stats.num_accepted_tokens,
    )
