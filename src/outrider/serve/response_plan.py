"""Plan: what one body of the Responses API asks of the engine, and what its response says of it."""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from outrider.engine.build import speculation_params
from outrider.engine.engine import Engine
from outrider.engine.prompts import make_request
from outrider.request import Request, SamplingParams, Speculation, SpeculationParams
from outrider.serve.base import Server
from outrider.serve.chat_template import template_of
from outrider.serve.delivery import shown, stream_options
from outrider.serve.generation import Ask
from outrider.serve.logprobs import chat_logprob
from outrider.serve.response_events import Put, ResponseWriter
from outrider.serve.schemas_responses import CreateResponse
from outrider.serve.steps import Steps
from outrider.serve.tools import AUTO, ToolUse
from outrider.serve.turns import Turn
from outrider.serve.usage import (
    exactness,
    in_force,
    metrics_of,
    timings,
    usage,
    with_prediction_ids,
)
from outrider.stream.events import Committed, RequestMetrics
from outrider.stream.options import StreamOptions

SEED_BITS = 63
NOTHING: Mapping[str, Any] = {}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A body with every default filled in and every refusal made.

    Attributes:
        header: the client's `X-Outrider-Stream`.
        sampling: its seed is set, so that the answer can be made again.
        params: as the engine takes them; None is its default. speculation: what comes of them.
        created_at: seconds since the epoch.
    """

    body: CreateResponse
    header: str
    sampling: SamplingParams
    params: SpeculationParams | None
    speculation: Speculation
    options: StreamOptions
    tool_use: ToolUse
    template: str
    created_at: int

    @classmethod
    def of(
        cls,
        here: Server,
        body: CreateResponse,
        header: str = "",
        settings: Mapping[str, Any] = NOTHING,
    ) -> "Plan":
        """RequestError, PairError, ApiError: it cannot be had.

        Args:
            settings: of the session; its `speculation` holds where the body says nothing.
        """
        body.check()
        here.check_model(body.model)
        tool_use = body.tool_use()
        template = template_of(here.needed_tokenizer())
        if tool_use.choice == AUTO:
            tool_use.parser(template)  # refuses formats that are not read
        sampling = body.params(tool_use)
        if sampling.seed is None:
            sampling = replace(sampling, seed=secrets.randbits(SEED_BITS))
        asked = body.asked_speculation()
        if asked is None and settings.get("speculation") is not None:
            asked = speculation_params(settings["speculation"])
        params = None if asked is None else with_prediction_ids(here, asked)
        options = stream_options(here, body.stream_options, header)
        return cls(
            body=body,
            header=header,
            sampling=sampling,
            params=params,
            speculation=in_force(here, params, sampling),
            options=shown(options, sampling, has_tools=tool_use.is_active),
            tool_use=tool_use,
            template=template,
            created_at=here.now(),
        )

    def as_request(self, tenant: str, previous: str | None) -> dict[str, Any]:
        """JSON by which the answer can be made again after a crash."""
        body = self.body.model_dump(mode="json", exclude_unset=True)
        body["seed"] = self.sampling.seed
        return {
            "body": body,
            "header": self.header,
            "created_at": self.created_at,
            "previous": previous,
            "tenant": tenant,
        }

    @classmethod
    def again(cls, here: Server, request: Mapping[str, Any], settings: Mapping[str, Any]) -> "Plan":
        """The plan that `as_request` wrote down."""
        body = CreateResponse.model_validate(request["body"])
        plan = cls.of(here, body, request["header"], settings)
        return replace(plan, created_at=request["created_at"])

    def ask(self, prompt: tuple[int, ...], tenant: str) -> Ask:
        return Ask(
            prompt=prompt,
            sampling=self.sampling,
            speculation=self.params,
            stream=self.options,
            tenant=tenant,
            priority=self.body.priority,
        )

    async def check(self, here: Server, prompt: tuple[int, ...], tenant: str) -> None:
        """Raises what the engine would refuse such a request for, before its turn has come.

        Raises:
            RequestError: the prompt is too long, a schema does not compile, and the like.
            EngineError: the engine broke down.
        """
        llm, ask = here.llm, self.ask(prompt, tenant)
        request = make_request(
            llm.new_request_id(),
            ask.prompt,
            ask.sampling,
            llm.speculation if ask.speculation is None else ask.speculation,
            ask.stream.params,
            llm.tokenizer,
            tenant=tenant,
        )
        await here.engine.call(_try_out, llm.engine, request)

    def response(self, here: Server, response_id: str, previous: str | None) -> dict[str, Any]:
        """The response object as it is created."""
        body = self.body
        return {
            "id": response_id,
            "object": "response",
            "created_at": self.created_at,
            "status": "in_progress",
            "background": body.background,
            "conversation": None,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata,
            "model": here.model_name,
            "output": [],
            "parallel_tool_calls": body.parallel_tool_calls,
            "previous_response_id": previous,
            "reasoning": {"effort": None, "summary": None},
            "store": body.store,
            "temperature": self.sampling.temperature,
            "text": {"format": dict(body.format)},
            "tool_choice": self._tool_choice(),
            "tools": body.tools,
            "top_logprobs": body.top_logprobs,
            "top_p": self.sampling.top_p,
            "truncation": "disabled",
            "usage": None,
            "user": None,
            "outrider": {
                "stream": self.options.as_dict(),
                "exactness": exactness(self.speculation),
                "seed": self.sampling.seed,
            },
        }

    def writer(
        self, here: Server, ask: Ask, response: dict[str, Any], put: Put, put_tail: Put
    ) -> ResponseWriter:
        """What turns the answer's events into those of the API."""
        tokenizer = here.needed_tokenizer()
        turn = Turn(
            id=response["id"],
            ask=ask,
            speculation=self.speculation,
            tool_use=self.tool_use,
            template=self.template,
        )

        def logprobs(event: Committed) -> list[dict[str, Any]]:
            return [chat_logprob(tokenizer, token) for token in event.logprobs]

        wants_steps = self.options.steps
        return ResponseWriter(
            response,
            put,
            put_tail if self.options.visibility != "verified" else None,
            pieces=turn.pieces().take,
            logprobs=logprobs if self.body.has_logprobs else None,
            step=Steps(tokenizer, ask.prompt).detail if wants_steps else None,
        )

    def report(self, metrics: RequestMetrics) -> dict[str, Any]:
        """Members of the final object: what the answer cost."""
        counted = usage([metrics])
        return {
            "usage": {
                "input_tokens": counted["prompt_tokens"],
                "input_tokens_details": {
                    "cached_tokens": metrics.num_cached_tokens,
                    "cache_write_tokens": 0,  # OpenAI's are billed; ours cost nothing
                },
                "output_tokens": counted["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": counted["total_tokens"],
            },
            "metrics": metrics_of([metrics], self.speculation),
            "timings": timings([metrics]),
        }

    def _tool_choice(self) -> str | dict[str, Any]:
        if self.tool_use.name:
            return {"type": "function", "name": self.tool_use.name}
        return self.body.tool_choice or AUTO


def _try_out(engine: Engine, request: Request) -> None:
    """Adds the request and takes it back, between two steps: nothing of it runs."""
    engine.add(request)
    engine.abort(request.id)
