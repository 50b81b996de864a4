"""LLM: load a model and generate, blocking, for one prompt or many."""

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence as Items
from typing import Any

from outrider.engine.build import LoadConfig, build, speculation_params
from outrider.engine.outputs import Completion, RequestOutput
from outrider.engine.prompts import Message, Prompt, make_request
from outrider.errors import RequestError
from outrider.request import SamplingParams, SpeculationParams, StreamParams
from outrider.stream.events import Committed, Event

Speculation = str | Mapping[str, Any] | SpeculationParams


class LLM:
    """A target model, its drafters, and an engine that serves them.

    Args:
        model: a hub id, a folder, or "demo" (the shipped pair).
        draft_model: a smaller model of the same vocabulary; requests then speculate with it
            unless they say otherwise. "demo" brings its own; "off" declines it.
        speculation: default for requests that bring no `SpeculationParams`: "off", a method's
            name, or its keys.
        dtype, device, revision, network, batch_invariant, trust_remote_code, drafters: see
            `outrider.engine.build.LoadConfig`.
        options: fields of `outrider.engine.config.EngineConfig` (max_num_seqs, block_size ...).

    Raises:
        ConfigError, ModelError: with the value at fault and what to do.
    """

    def __init__(
        self,
        model: str,
        *,
        draft_model: str | None = None,
        speculation: Speculation | None = None,
        drafters: Items[str] | None = None,
        dtype: str = "auto",
        device: str = "auto",
        revision: str | None = None,
        network: str = "auto",
        batch_invariant: bool = True,
        trust_remote_code: bool = False,
        **options: Any,
    ) -> None:
        load = LoadConfig(
            model=str(model),
            draft_model=None if draft_model is None else str(draft_model),
            drafters=None if drafters is None else tuple(drafters),
            dtype=str(dtype).removeprefix("torch."),
            device=str(device),
            revision=revision,
            network=network,
            batch_invariant=batch_invariant,
            trust_remote_code=trust_remote_code,
        )
        self.speculation = speculation_params(speculation or {})
        self.engine, self.tokenizer = build(load, options)
        self._ids = itertools.count()

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
            RequestError: a prompt or setting cannot be served; then nothing is generated.
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

        A caller that stops early aborts what is left.

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
                f"request-{next(self._ids)}",
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
        self._add_all(requests)
        if outputs is not None:
            for request in requests:
                outputs[request.id] = _empty_output(request)
        return self._events({request.id for request in requests})

    def _add_all(self, requests: list[Any]) -> None:
        """All of them or none."""
        for count, request in enumerate(requests):
            try:
                self.engine.add(request)
            except RequestError:
                for added in requests[:count]:
                    self.engine.abort(added.id)
                self.engine.step()
                raise

    def _events(self, request_ids: set[str]) -> Iterator[Event]:
        try:
            while self.engine.has_work():
                yield from self.engine.step()
        finally:
            for request_id in request_ids:
                self.engine.abort(request_id)
            if self.engine.has_work():
                self.engine.step()


def _empty_output(request: Any) -> RequestOutput:
    return RequestOutput(
        request_id=request.id,
        prompt_token_ids=list(request.prompt_token_ids),
        completions=[Completion(index=index) for index in range(request.sampling.n)],
    )


def _as_list(prompts: Prompt | Items[Prompt]) -> list[Prompt]:
    """A list of prompts, also when one prompt was given."""
    if isinstance(prompts, str):
        return [prompts]
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
