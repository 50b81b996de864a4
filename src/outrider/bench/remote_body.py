"""What an ask looks like as the body of an OpenAI-compatible request.

Every setting is said, or the ask is refused: servers have defaults of their own.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from outrider.bench.remote_server import LLAMA_CPP, OUTRIDER, SGLANG, VLLM, ServerFacts
from outrider.bench.target import Ask
from outrider.errors import RequestError
from outrider.request import OFF, SamplingParams, SpeculationParams

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
# Said only where they ask for something: not every server knows them.
PLAIN = (
    *("presence_penalty", "frequency_penalty", "ignore_eos", "min_tokens"),
    *("include_stop_str_in_output", "skip_special_tokens"),
)
LISTS = ("stop", "stop_token_ids", "bad_words")
USUAL = SamplingParams()


def body_of(ask: Ask, facts: ServerFacts) -> tuple[str, dict[str, Any]]:
    """(path, body): conversations go to chat, text and token ids to completions.

    Raises:
        RequestError: this server cannot be asked that.
    """
    path, prompt = _prompt(ask)
    body = {
        "model": facts.model,
        **prompt,
        **_sampling(ask.sampling, facts.kind, path),
        "stream": True,
        "stream_options": {"include_usage": True},
        **_speculation(ask, facts.kind),
        **_tenant(ask.tenant, facts.kind),
    }
    if ask.priority:
        body["priority"] = ask.priority
    if facts.kind == SGLANG:
        body["return_meta_info"] = True
    return path, {**body, **ask.arm.extra}


def isolates_tenants(kind: str) -> bool:
    """Whether requests of two tenants can be kept from one another's prefix cache."""
    return bool(_tenant("x", kind))


def speculation_keys(params: SpeculationParams) -> dict[str, Any] | str:
    """As our own server reads it: what differs from the defaults."""
    if params.is_off:
        return OFF
    usual = SpeculationParams()
    values = {f.name: getattr(params, f.name) for f in dataclasses.fields(params)}
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in values.items()
        if value != getattr(usual, name)
    }


def _prompt(ask: Ask) -> tuple[str, dict[str, Any]]:
    prompt = ask.question.prompt
    if isinstance(prompt, str):
        return COMPLETIONS, {"prompt": prompt}
    items: list[Any] = list(prompt)
    if items and all(isinstance(item, Mapping) for item in items):
        return CHAT, {"messages": [dict(message) for message in items]}
    return COMPLETIONS, {"prompt": items}


def _sampling(params: SamplingParams, kind: str, path: str) -> dict[str, Any]:
    if params.n != 1:
        raise RequestError(f"n={params.n}: one answer per ask is measured; set n=1")
    body: dict[str, Any] = {"temperature": params.temperature, "top_p": params.top_p}
    for name in ("max_tokens", "seed"):
        if getattr(params, name) is not None:
            body[name] = getattr(params, name)
    body |= {n: getattr(params, n) for n in PLAIN if getattr(params, n) != getattr(USUAL, n)}
    body |= {name: list(getattr(params, name)) for name in LISTS if getattr(params, name)}
    if params.logit_bias:
        body["logit_bias"] = {str(token): bias for token, bias in params.logit_bias.items()}
    return {**body, **_filters(params, kind), **_logprobs(params, path), **_constraint(params)}


def _filters(params: SamplingParams, kind: str) -> dict[str, Any]:
    """Not OpenAI's, so a stranger hears of them only if need be.

    The known servers take a model's recommended settings, or their own, where nothing is said.
    """
    given = {
        "top_k": params.top_k,
        "min_p": params.min_p,
        "repetition_penalty": params.repetition_penalty,
    }
    if not kind:
        return {name: value for name, value in given.items() if value != getattr(USUAL, name)}
    if kind == LLAMA_CPP:
        given["repeat_penalty"] = given.pop("repetition_penalty")
    elif not params.top_k:
        given["top_k"] = -1
    return given


def _logprobs(params: SamplingParams, path: str) -> dict[str, Any]:
    if params.logprobs is None:
        return {}
    if path == CHAT:
        return {"logprobs": True, "top_logprobs": params.logprobs}
    return {"logprobs": params.logprobs}


def _constraint(params: SamplingParams) -> dict[str, Any]:
    if params.json_schema is not None:
        schema = {"name": "answer", "schema": params.json_schema}
        return {"response_format": {"type": "json_schema", "json_schema": schema}}
    for name in ("regex", "grammar"):
        if (value := getattr(params, name)) is not None:
            return {"structured_outputs": {name: value}}
    return {}


def _speculation(ask: Ask, kind: str) -> dict[str, Any]:
    params = ask.arm.speculation
    if params is None:
        return {}
    if kind == OUTRIDER:
        keys = speculation_keys(params)
        return {"outrider": {"speculation": keys}} if keys else {}
    if kind == LLAMA_CPP and params.is_off:
        return {"speculative.n_max": 0}
    if kind == LLAMA_CPP and params == SpeculationParams(num_draft_tokens=params.num_draft_tokens):
        return {"speculative.n_max": params.num_draft_tokens}
    raise RequestError(
        f"arm {ask.arm.name!r}: {kind or 'this server'} takes no such speculation per request; "
        "start a server for each arm, or give the arm the server's own keys as extra"
    )


def _tenant(tenant: str, kind: str) -> dict[str, Any]:
    """Nothing where the server knows no tenants; `isolates_tenants` tells of it."""
    if not tenant:
        return {}
    if kind in (OUTRIDER, VLLM):
        return {"cache_salt": tenant}
    if kind == SGLANG:
        return {"extra_key": tenant}
    return {"cache_prompt": False} if kind == LLAMA_CPP else {}
