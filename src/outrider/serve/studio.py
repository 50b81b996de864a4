"""The studio: the page at /, its files, and what it asks about methods and sessions."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import FileResponse, Response

from outrider.engine.engine import Engine
from outrider.engine.resolve import DEFAULT_VERIFIER
from outrider.errors import ConfigError, RequestError, SessionError
from outrider.registry import DRAFTERS, VERIFIERS, Registry
from outrider.request import (
    MAX_DRAFT_TOKENS,
    MAX_NODES,
    MAX_WIDTH,
    Option,
    SamplingParams,
    SpeculationParams,
)
from outrider.serve.base import ServeConfig, Server, server, tenant
from outrider.serve.errors import ApiError
from outrider.serve.session_service import Sessions
from outrider.serve.sessions import told
from outrider.serve.transcript import transcript
from outrider.stream.options import StreamOptions
from outrider.verify.base import Exactness

FOLDER = Path(__file__).with_name("studio")
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
# The page runs its own scripts and talks to its own server, and nothing else.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",
}
FILES = {path.name: path for path in sorted(FOLDER.iterdir()) if path.suffix in TYPES}

router = APIRouter()
GREEDY = SamplingParams()


@router.get("/", include_in_schema=False)
def page() -> Response:
    """The page; it holds nothing that needs a key."""
    return _file("index.html")


@router.get("/studio/{name}", include_in_schema=False)
def file(name: str) -> Response:
    """A script, style or picture of the page."""
    if name not in FILES:
        raise ApiError(404, f"the studio has no file {name!r}")
    return _file(name)


@router.get("/v1/outrider/methods")
def methods(
    request: Request,
    here: Annotated[Server, Depends(server)],
    _: Annotated[str, Depends(tenant)],
) -> dict[str, Any]:
    """Who can draft, how far by whose word, which rules decide, their options, what is served.

    Of each method `is_here` says whether requests may name it, `reason` why not, and `rules`
    which rules take its drafts as it makes them when nothing else is asked for (temperature 0).
    A bound that is null is no bound.
    """
    engine = here.llm.engine
    rules = list(_rules(here.config))
    return {
        "model": here.model_name,
        "draft_model": engine.draft_model or None,
        "defaults": _defaults(here),
        "methods": list(_methods(engine, [rule["name"] for rule in rules if rule["is_allowed"]])),
        "policies": list(_policies(engine)),
        "rules": rules,
        "limits": {
            "num_draft_tokens": MAX_DRAFT_TOKENS,
            "width": MAX_WIDTH,
            "num_nodes": MAX_NODES,
        },
        "max_model_len": engine.max_model_len,
        "stream_options": [field.name for field in fields(StreamOptions)],
        "endpoints": _endpoints(request.app.openapi()["paths"]),
    }


@router.get("/v1/outrider/transcripts/{session_id}")
async def session_transcript(
    session_id: str,
    here: Annotated[Server, Depends(server)],
    who: Annotated[str, Depends(tenant)],
) -> dict[str, Any]:
    """What was said in a session, turn by turn, up to where it is.

    `begin` and `end` of a turn are places in the session's log, as fork and rewind take them.
    """
    kept = here.sessions
    if not isinstance(kept, Sessions):
        raise ApiError(404, "this server keeps no sessions")
    try:
        head, turns = await transcript(kept, here.tokenizer, who, session_id)
    except SessionError as error:
        raise told(error) from error
    return {
        "object": "list",
        "session": head.session,
        "head": head.id,
        "n_tokens": head.num_tokens,
        "data": [turn.as_dict() for turn in turns],
    }


def _file(name: str) -> Response:
    path = FILES[name]
    return FileResponse(path, media_type=TYPES[path.suffix], headers=HEADERS)


def _endpoints(paths: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """As in "POST /v1/responses"."""
    return sorted(f"{verb.upper()} {path}" for path, verbs in paths.items() for verb in verbs)


def _defaults(here: Server) -> dict[str, str]:
    """What serves a request that says nothing about speculation."""
    engine = here.llm.engine
    found = engine.resolve(here.llm.speculation, GREEDY)
    return {
        "method": found.drafter or "off",
        "rule": found.verifier,
        "policy": found.policy if found.drafter else engine.controller.default,
    }


def _methods(engine: Engine, rules: list[str]) -> Iterator[dict[str, Any]]:
    for name, source, found in _loaded(DRAFTERS):
        is_here = name in engine.drafters
        drafter = engine.drafters[name] if is_here else found
        yield {
            "name": name,
            "source": source,
            "is_here": is_here,
            "reason": None if is_here else _refusal(engine, SpeculationParams(method=name)),
            "needs": list(drafter.needs),
            "warmth": drafter.warmth.value,
            "num_draft_tokens": drafter.default_draft_tokens,
            "width": drafter.default_width,
            "min_width": drafter.min_width,
            "max_width": drafter.max_width,
            "num_nodes": drafter.default_num_nodes,
            "sample_methods": list(drafter.sample_methods),
            "options": _options(drafter.options),
            "rules": [rule for rule in rules if is_here and _takes(engine, drafter, rule)],
        }


def _policies(engine: Engine) -> Iterator[dict[str, Any]]:
    """Who may decide how far to draft; the default is that of requests that say no K either."""
    for name, policy in engine.controller.policies.items():
        yield {
            "name": name,
            "is_default": name == engine.controller.default,
            "options": _options(policy.options),
        }


def _rules(config: ServeConfig) -> Iterator[dict[str, Any]]:
    for name, source, rule in _loaded(VERIFIERS):
        yield {
            "name": name,
            "source": source,
            "is_default": name == DEFAULT_VERIFIER,
            "is_allowed": _is_allowed(config, rule.exactness),
            "exactness": rule.exactness.value,
            "greedy_only": rule.greedy_only,
            "accepts": sorted(kind.value for kind in rule.accepts),
            "options": _options(rule.options),
        }


def _is_allowed(config: ServeConfig, exactness: Exactness) -> bool:
    if exactness is Exactness.SYNTHETIC:
        return config.allow_synthetic
    return exactness is not Exactness.LOSSY or config.allow_lossy


def _takes(engine: Engine, drafter: Any, rule: str) -> bool:
    wants_prediction = "prediction" in drafter.needs
    asked = SpeculationParams(
        method=drafter.name,
        verifier=rule,
        prediction_token_ids=(0,) if wants_prediction else None,
    )
    return _refusal(engine, asked) is None


def _refusal(engine: Engine, asked: SpeculationParams) -> str | None:
    """Why this engine would refuse such a request, None where it would not."""
    try:
        engine.resolve(asked, GREEDY)
    except (RequestError, ConfigError) as error:
        return str(error)
    return None


def _options(options: Mapping[str, Option]) -> dict[str, Any]:
    return {
        name: {
            "default": option.default,
            "meaning": option.meaning,
            "low": _bound(option.low),
            "high": _bound(option.high),
            "choices": list(option.choices),
        }
        for name, option in options.items()
    }


def _bound(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _loaded(parts: Registry) -> Iterator[tuple[str, str, Any]]:
    """(name, source, class) of every part that can be imported."""
    for part in parts:
        try:
            yield part.name, part.source, parts.load(part.name)
        except ConfigError:
            continue  # a broken plug-in; `outrider plugins` says why
