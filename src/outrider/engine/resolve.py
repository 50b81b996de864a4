"""What a request asks of speculation, checked against this engine, with every default filled in."""

from dataclasses import fields

from outrider.draft.base import Drafter
from outrider.draft.drafters import Drafters
from outrider.errors import ConfigError, PairError, RequestError, unknown
from outrider.registry import DRAFTERS
from outrider.request import OFF, SamplingParams, Speculation, SpeculationParams
from outrider.verify.base import Verifier
from outrider.verify.verifiers import verifier

DEFAULT_VERIFIER = "sampled"
LOOKUP_MIN, LOOKUP_MAX = 2, 4


def resolve(
    params: SpeculationParams,
    sampling: SamplingParams,
    drafters: Drafters,
    default: str,
    draft_model: str,
) -> Speculation:
    """The drafter, rule and K in force.

    Args:
        default: drafter of requests that name none; "" decodes plainly.
        draft_model: name of the loaded draft model, "" for none.

    Raises:
        RequestError: something named is not here. PairError: drafter and rule would be wrong
            together.
    """
    rule = _rule(params, sampling)
    name = params.method if params.method is not None else default
    if name in ("", OFF):
        _refuse_unused(params, name)
        return Speculation(verifier=rule.name)
    drafter = _drafter(name, drafters)
    _check_model(params, name, draft_model)
    _check_lookup(params, name)
    method = _sample_method(params, drafter, rule)
    _check_kind(method, name, rule)
    if params.width > drafter.max_width:
        raise RequestError(
            f"width={params.width}: {name} draws at most {drafter.max_width} branches; "
            f"use width={drafter.max_width}"
        )
    if params.width > 1 and not rule.accepts.branches:
        raise PairError(
            f"width={params.width}: the verifier {rule.name!r} takes chains only; "
            "use width=1 or verifier='sampled'"
        )
    if params.is_off:
        return Speculation(verifier=rule.name)
    low, high = _lookup(params)
    k = params.num_draft_tokens
    return Speculation(
        drafter=name,
        num_draft_tokens=drafter.default_draft_tokens if k is None else k,
        width=params.width,
        verifier=rule.name,
        draft_sample_method=method,
        prompt_lookup_min=low,
        prompt_lookup_max=high,
    )


def _refuse_unused(params: SpeculationParams, name: str) -> None:
    """Nothing that only a drafter could honour may stand beside plain decoding."""
    usual = SpeculationParams()
    for field in fields(params):
        value = getattr(params, field.name)
        is_usual = value == getattr(usual, field.name) or field.name in ("method", "verifier")
        if is_usual or (field.name == "num_draft_tokens" and value == 0):
            continue
        remedy = "drop it" if name == OFF else "name a method, or load draft_model=..."
        raise RequestError(f"{field.name}={value!r}: nothing is drafted here; {remedy}")


def _rule(params: SpeculationParams, sampling: SamplingParams) -> Verifier:
    try:
        rule = verifier(params.verifier or DEFAULT_VERIFIER)
    except ConfigError as error:
        raise RequestError(str(error)) from None
    if rule.greedy_only and not sampling.is_greedy:
        raise PairError(
            f"verifier={rule.name!r} serves temperature 0 only, not {sampling.temperature}; "
            f"use verifier={DEFAULT_VERIFIER!r}"
        )
    return rule


def _drafter(name: str, drafters: Drafters) -> Drafter:
    if name in drafters:
        return drafters[name]
    if name == "draft_model":
        raise RequestError(
            "method='draft_model': no draft model is loaded; give the engine draft_model=..."
        )
    if name in DRAFTERS.names():
        raise RequestError(
            f"method={name!r}: not set up in this engine; name it in LLM(drafters=...)"
        )
    raise RequestError(unknown("method", name, [OFF, *DRAFTERS.names()]))


def _check_model(params: SpeculationParams, name: str, draft_model: str) -> None:
    if params.model is None:
        return
    if name != "draft_model":
        raise RequestError(f"model={params.model!r}: method {name!r} has no draft model; drop it")
    if params.model != draft_model:
        raise RequestError(
            f"model={params.model!r}: the engine has draft model {draft_model!r}; drop the key, or "
            "load that model with draft_model=..."
        )


def _check_lookup(params: SpeculationParams, name: str) -> None:
    for key in ("prompt_lookup_min", "prompt_lookup_max"):
        value = getattr(params, key)
        if value is not None and name != "ngram":
            raise RequestError(f"{key}={value}: method {name!r} does not look up n-grams; drop it")


def _lookup(params: SpeculationParams) -> tuple[int, int]:
    """Bounds of the n-gram match; one that is missing gives way to the one that was set."""
    low, high = params.prompt_lookup_min, params.prompt_lookup_max
    if high is None:
        high = max(LOOKUP_MAX, low or 0)
    if low is None:
        low = min(LOOKUP_MIN, high)
    return low, high


def _check_kind(method: str, name: str, rule: Verifier) -> None:
    """A rule is lossless only for the kinds of proposal it declares."""
    if method == "probabilistic" and not rule.accepts.drawn:
        kind = "tokens drawn from a law"
    elif method != "probabilistic" and not rule.accepts.point_mass:
        kind = "tokens picked without a law"
    else:
        return
    raise PairError(
        f"verifier={rule.name!r}: does not take {kind}, as {name} drafts them; "
        f"use verifier={DEFAULT_VERIFIER!r}"
    )


def _sample_method(params: SpeculationParams, drafter: Drafter, rule: Verifier) -> str:
    """How drafts are drawn; only a rule keyed by position may see drafts made with its noise."""
    asked = params.draft_sample_method
    if asked not in (None, "greedy") and not drafter.draws:
        raise RequestError(
            f"draft_sample_method={asked!r}: {drafter.name} picks deterministically; drop it"
        )
    if asked == "coupled" and rule.keyed_by != "position":
        raise PairError(
            f"draft_sample_method='coupled' needs verifier={DEFAULT_VERIFIER!r}, not {rule.name!r}"
        )
    if asked is not None:
        return asked
    if not drafter.draws:
        return "greedy"
    return "coupled" if rule.keyed_by == "position" else "probabilistic"
