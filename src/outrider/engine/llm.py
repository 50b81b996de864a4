"""LLM: load a model and generate, blocking, for one prompt or many."""

import itertools
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence as Items
from typing import Any

from outrider.engine.build import LoadConfig, build, speculation_params
from outrider.engine.calibrate import calibrate, save_prices
from outrider.engine.outputs import Completion, RequestOutput
from outrider.engine.prompts import Message, Prompt, make_request, short, with_prediction
from outrider.errors import RequestError
from outrider.request import Request, SamplingParams, SpeculationParams, StreamParams
from outrider.stream.events import Committed, Event

Speculation = str | Mapping[str, Any] | SpeculationParams


class LLM:
    """A target model, its drafters, and an engine that serves them; for one thread.

    Args:
        model: a hub id, a folder, or "demo" (the shipped pair).
        draft_model: a smaller model; requests then speculate with it unless they say otherwise.
            Drafts of one with another vocabulary are translated. "demo" brings its own; "off"
            declines it. A draft head of the target may be named here, too.
        heads: draft heads of the target, one for each drafter; see `LoadConfig`.
        speculation: default for requests that bring no `SpeculationParams`: "off", a method's
            name, or its keys.
        quantization: "int8", "int8-dynamic", "int8-weight-only" or "int4": quantise the weights
            of both models, or of the draft model as `draft_quantization` says.
        drafter_settings: by drafter, what it is made with, as in
            {"suffix": {"max_shared_tokens": 200_000}}.
        dtype, device, revision, network, kernels, swap_linear, batch_invariant,
            trust_remote_code, load_tokenizer, policy, drafters, datastore: see
            `outrider.engine.build.LoadConfig`.
        options: fields of `outrider.engine.config.EngineConfig` (max_num_seqs, block_size ...).

    Raises:
        ConfigError, ModelError: with the value at fault and what to do.
        RequestError: `speculation` asks for what is not here.
    """

    def __init__(
        self,
        model: str,
        *,
        draft_model: str | None = None,
        heads: Items[str] = (),
        speculation: Speculation | None = None,
        drafters: Items[str] | None = None,
        drafter_settings: Mapping[str, Mapping[str, Any]] | None = None,
        dtype: str = "auto",
        device: str = "auto",
        revision: str | None = None,
        network: str = "auto",
        kernels: str = "auto",
        swap_linear: bool = True,
        batch_invariant: bool = True,
        trust_remote_code: bool = False,
        load_tokenizer: bool = True,
        quantization: str | None = None,
        draft_quantization: str | None = None,
        datastore: str | None = None,
        policy: str = "adaptive",
        **options: Any,
    ) -> None:
        load = LoadConfig(
            model=str(model),
            draft_model=None if draft_model is None else str(draft_model),
            heads=tuple(map(str, _names(heads))),
            drafters=None if drafters is None else _names(drafters),
            drafter_settings=drafter_settings or {},
            dtype=str(dtype).removeprefix("torch."),
            device=str(device),
            revision=revision,
            network=network,
            kernels=kernels,
            swap_linear=swap_linear,
            batch_invariant=batch_invariant,
            trust_remote_code=trust_remote_code,
            load_tokenizer=load_tokenizer,
            quantization=quantization,
            draft_quantization=draft_quantization,
            datastore=None if datastore is None else str(datastore),
            policy=policy,
        )
        self.speculation = speculation_params({} if speculation is None else speculation)
        self.engine, self.tokenizer = build(load, options)
        self._check_speculation()
        self._ids = itertools.count()
        self._inboxes: dict[str, deque[Event]] = {}

    def generate(
        self,
        prompts: Prompt | Items[Prompt],
        sampling: SamplingParams | Items[SamplingParams] | None = None,
        speculation: Speculation | Items[Speculation] | None = None,
        *,
        priority: int = 0,
        tenant: str = "",
    ) -> list[RequestOutput]:
        """Answers to all prompts, in their order.

        Args:
            prompts: one prompt or a list; a prompt is text, token ids, or chat messages.
            sampling, speculation: one for all prompts, or one for each.
            priority: smaller runs first. tenant: shares no prefix cache with others.

        Raises:
            RequestError, PairError: a prompt or setting cannot be served; then nothing is
                generated.
        """
        many = _as_list(prompts)
        outputs: dict[str, RequestOutput] = {}
        start = time.perf_counter()
        for event in self.stream(
            many, sampling, speculation, priority=priority, tenant=tenant, outputs=outputs
        ):
            if isinstance(event, Committed):
                output = outputs[event.request_id]
                now = time.perf_counter() - start
                if event.token_ids and output.time_to_first_token_s is None:
                    output.time_to_first_token_s = now
                output.take(event)
                if event.finish_reason is not None:
                    output.latency_s = now
        return list(outputs.values())

    def chat(
        self,
        messages: Items[Message],
        sampling: SamplingParams | None = None,
        speculation: Speculation | None = None,
    ) -> RequestOutput:
        """The answer to one conversation."""
        return self.generate([list(messages)], sampling, speculation)[0]

    def stream(
        self,
        prompts: Prompt | Items[Prompt],
        sampling: SamplingParams | Items[SamplingParams] | None = None,
        speculation: Speculation | Items[Speculation] | None = None,
        *,
        stream: StreamParams | None = None,
        priority: int = 0,
        tenant: str = "",
        outputs: dict[str, RequestOutput] | None = None,
    ) -> Iterator[Event]:
        """Events as they happen, for all prompts together.

        Work begins when the first event is asked for; a caller that stops early aborts what is
        left. Streams of one engine may be read in turns.

        Args:
            outputs: filled with an empty `RequestOutput` per request id before the first event.
        """
        many = _as_list(prompts)
        per_prompt = zip(
            many,
            _spread("sampling", sampling, SamplingParams(), len(many)),
            _spread("speculation", speculation, self.speculation, len(many)),
            strict=True,
        )
        requests = [
            make_request(
                self.new_request_id(),
                prompt,
                params,
                speculation_params(spec),
                stream or StreamParams(),
                self.tokenizer,
                priority=priority,
                tenant=tenant,
            )
            for prompt, params, spec in per_prompt
        ]
        try:
            yield from self._serve(requests, {} if outputs is None else outputs)
        finally:
            self._dismiss(requests)

    def calibrate(self, budget_s: float = 2.0, *, again: bool = False) -> bool:
        """Times passes and drafting and saves it, so that the adaptive policy begins with prices.

        Without it they are learned while requests run. Prices of this machine and these models
        that were saved before are taken when the engine is built; then nothing is timed.

        Args:
            budget_s: seconds that it may take.
            again: time although there are saved prices.

        Returns:
            Whether anything was timed.

        Raises:
            ConfigError: requests are running.
        """
        if self.engine.has_prices and not again:
            return False
        self.engine.has_prices = calibrate(self.engine, budget_s) > 0
        if self.engine.has_prices:
            save_prices(self.engine)
        return self.engine.has_prices

    def save_prices(self) -> None:
        """Keeps what was learned of prices for the next engine of these models here."""
        save_prices(self.engine)

    def new_request_id(self) -> str:
        """A name that no other request of this engine was given."""
        return f"request-{next(self._ids)}"

    def flush(self) -> None:
        """Lets aborted requests leave the engine; whoever else is in it takes one step."""
        if self.engine.has_work():
            self._step()

    def _serve(self, requests: list[Request], outputs: dict[str, RequestOutput]) -> Iterator[Event]:
        inbox: deque[Event] = deque()
        for request in requests:
            self.engine.add(request)
            self._inboxes[request.id] = inbox
            outputs[request.id] = _empty_output(request)
        num_open = sum(request.sampling.n for request in requests)
        while num_open:
            while not inbox:
                assert self.engine.has_work(), "requests are open, but none of them runs"
                self._step()
            event = inbox.popleft()
            num_open -= isinstance(event, Committed) and event.finish_reason is not None
            yield event

    def _step(self) -> None:
        """One step for everybody; each stream finds its events in its inbox."""
        for event in self.engine.step():
            if event.request_id in self._inboxes:
                self._inboxes[event.request_id].append(event)

    def _dismiss(self, requests: list[Request]) -> None:
        """Nobody listens any more: what still runs is aborted."""
        for request in requests:
            self.engine.abort(request.id)
            self._inboxes.pop(request.id, None)
        self.flush()

    def _check_speculation(self) -> None:
        """The default is refused at once where no request could be served with it."""
        asked = with_prediction(self.speculation, self.tokenizer)
        self.engine.resolve(asked, SamplingParams())


def _empty_output(request: Request) -> RequestOutput:
    return RequestOutput(
        request_id=request.id,
        prompt_token_ids=list(request.prompt_token_ids),
        completions=[Completion(index=index) for index in range(request.sampling.n)],
    )


def _names(drafters: Items[str]) -> tuple[str, ...]:
    return (drafters,) if isinstance(drafters, str) else tuple(drafters)


def _as_list(prompts: Prompt | Items[Prompt]) -> list[Prompt]:
    """A list of prompts, also when one prompt was given."""
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, Mapping) or not isinstance(prompts, Iterable):
        raise RequestError(f"prompts={short(prompts)}: give one prompt or a list of them")
    items: list[Any] = list(prompts)
    if not items:
        raise RequestError("no prompt was given: pass at least one")
    is_one = all(isinstance(item, Mapping) for item in items) or all(
        isinstance(item, int) for item in items
    )
    return [items] if is_one else items


def _spread(name: str, value: Any, default: Any, count: int) -> list[Any]:
    if value is None:
        return [default] * count
    if isinstance(value, list | tuple):
        if len(value) != count:
            raise RequestError(
                f"{name}: {len(value)} were given for {count} prompts; give one, or one for each"
            )
        return list(value)
    return [value] * count
