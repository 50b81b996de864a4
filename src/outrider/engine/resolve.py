"""What a request asks of speculation, checked against this engine, with every default filled in."""

import logging
from collections.abc import Mapping, Sequence as Items
from dataclasses import fields
from functools import lru_cache
from typing import Any

from outrider.control.base import ChecksOptions, NamesDepth, Policy
from outrider.control.controller import Controller
from outrider.draft.base import (
    Checks,
    Composes,
    Drafter,
    DrawsByOptions,
    EndsAtDepth,
    LooksUp,
    OffersChoice,
)
from outrider.draft.drafters import Drafters
from outrider.errors import ConfigError, PairError, RequestError, unknown
from outrider.registry import DRAFTERS
from outrider.request import (
    MAX_DRAFT_TOKENS,
    MAX_NODES,
    OFF,
    Candidate,
    Option,
    Options,
    SamplingParams,
    Speculation,
    SpeculationParams,
)
from outrider.step import Kind
from outrider.verify.base import Exactness, Verifier
from outrider.verify.verifiers import Settings, verifier

DEFAULT_VERIFIER = "sampled"
LOOKUP_MIN, LOOKUP_MAX = 2, 4
MORE = 2  # times a drafter's own K, for policies that go as far as pays
MAX_POSITIONS = 1 << 40
NO_HEADS: Mapping[str, str] = {}
logger = logging.getLogger(__name__)
OWN_MODEL, OTHER_MODEL = "draft model", "draft model of another vocabulary"  # in `needs`


def resolve(
    params: SpeculationParams,
    sampling: SamplingParams,
    drafters: Drafters,
    default: str,
    draft_model: str,
    controller: Controller | None = None,
    heads: Mapping[str, str] = NO_HEADS,
) -> Speculation:
    """The drafter, rule and K in force.

    Args:
        default: drafter of requests that name none; "" decodes plainly.
        draft_model: name of the loaded draft model, "" for none.
        controller: whose policies may be named; None knows "fixed" alone.
        heads: names of the loaded draft heads, by the drafter that runs each.

    Raises:
        RequestError: something named is not here. PairError: drafter and rule would be wrong
            together.
    """
    rule, rule_options = _rule(params, sampling)
    plain = Speculation(verifier=rule.name, verifier_options=rule_options)
    name = params.method if params.method is not None else default
    if name in ("", OFF):
        _refuse_unused(params, name)
        return plain
    drafter = _drafter(name, drafters, params.model)
    options, parts = _composed(drafter, params)
    members = [drafters[part] for part in parts] or [drafter]
    _check_model(params, members, draft_model, heads)
    _check_lookup(params, name, members, options)
    width = _width(params, drafter, members)
    policy = _policy(params, sampling, rule, controller or Controller(MAX_POSITIONS))
    policy_options = _policy_options(params, policy)
    num_draft_tokens, num_nodes = _size(params, drafter, width, policy, policy_options)
    candidates: tuple[Candidate, ...] = ()
    if isinstance(drafter, OffersChoice):
        factor = MORE if policy.needs_clock else 1
        k = params.num_draft_tokens
        if isinstance(policy, NamesDepth):
            k = num_draft_tokens
        candidates = drafter.candidates(options, k, factor)
        num_draft_tokens = num_nodes = max(one.num_draft_tokens for one in candidates)
    method = _sample_method(params, name, members, options, rule, width)
    low, high = _lookup(params)
    found = Speculation(
        drafter=name,
        parts=parts,
        num_draft_tokens=num_draft_tokens,
        width=width,
        num_nodes=num_nodes,
        verifier=rule.name,
        verifier_options=rule_options,
        options=options,
        prediction=_prediction(params, members),
        draft_sample_method=method,
        prompt_lookup_min=low,
        prompt_lookup_max=high,
        candidates=candidates,
        policy=policy.name,
        policy_options=policy_options,
        tpot_s=_seconds(params, "tpot_ms"),
        ttft_s=_seconds(params, "ttft_ms"),
    )
    _check_kinds(members, found, rule)
    for member in dict.fromkeys((drafter, *members)):
        if isinstance(member, Checks):
            member.check(found)
    return plain if params.is_off else found


def _composed(drafter: Drafter, params: SpeculationParams) -> tuple[Options, tuple[str, ...]]:
    """Options of the drafter, every one of them, and the parts they name."""
    given = params.drafter_options
    if not isinstance(drafter, Composes):
        return _options("drafter_options", drafter.name, drafter.options, given), ()
    known = drafter.options_for(given)
    options = _options("drafter_options", drafter.name, known, given)
    return options, drafter.parts(options)


def _policy(
    params: SpeculationParams, sampling: SamplingParams, rule: Verifier, controller: Controller
) -> Policy:
    """Who decides how far to draft.

    A seed fixes the tokens under a rule that is not keyed by position only while the drafts are
    equally long each time, and a lossy rule's tokens depend on the drafts at any temperature: such
    requests get the fixed policy unless they name another.
    """
    is_sized = (params.num_draft_tokens, params.width, params.num_nodes) != (None, None, None)
    is_free = rule.keyed_by == "position" or sampling.is_greedy or sampling.seed is None
    is_keyed = is_free and rule.exactness in (Exactness.EXACT, Exactness.EXACT_GREEDY)
    name = params.policy or ("fixed" if is_sized or not is_keyed else controller.default)
    if name not in controller.policies:
        raise RequestError(unknown("policy", name, list(controller.policies)))
    policy = controller.policies[name]
    if params.slo and not policy.needs_clock:
        raise RequestError(
            f"slo={dict(params.slo)!r}: policy {name!r} keeps no latency targets; add "
            "policy='adaptive', or drop it"
        )
    return policy


def _policy_options(params: SpeculationParams, policy: Policy) -> Options:
    options = _options("policy_options", policy.name, policy.options, params.policy_options)
    if isinstance(policy, ChecksOptions):
        policy.check(options)
    return options


def _seconds(params: SpeculationParams, target: str) -> float | None:
    return params.slo[target] / 1e3 if target in params.slo else None


def _size(
    params: SpeculationParams,
    drafter: Drafter,
    width: int,
    policy: Policy,
    policy_options: Options,
) -> tuple[int, int]:
    """K and the most nodes of a tree; where a policy goes as far as pays, chains may grow further.

    A policy whose settings name a K must be able to plan it.
    """
    k, num_nodes = params.num_draft_tokens, params.num_nodes
    if num_nodes is not None and params.width is not None and num_nodes < params.width:
        raise RequestError(
            f"num_nodes={num_nodes}: has no room for width={params.width} branches; use "
            f"num_nodes={params.width} or more"
        )
    named = policy.most_depth(policy_options) if isinstance(policy, NamesDepth) else None
    if named is not None and k is not None and named > k:
        raise RequestError(
            f"num_draft_tokens={k}: policy {policy.name!r} asks for up to {named}; drop "
            "num_draft_tokens, or lower the K of the policy"
        )
    deepest = drafter.max_draft_tokens if isinstance(drafter, EndsAtDepth) else MAX_DRAFT_TOKENS
    asked = named if k is None else k
    if asked is not None and asked > deepest:
        _say_less(drafter.name, asked, deepest)
    if k is None:
        k = drafter.default_draft_tokens
        if named is not None:
            k = max(named, 1)
        elif policy.needs_clock and width == 1:
            k = min(MORE * k, MAX_DRAFT_TOKENS)
    k = min(k, deepest)
    return k, num_nodes or drafter.default_num_nodes or min(k * width, MAX_NODES)


@lru_cache(maxsize=64)
def _say_less(name: str, k: int, deepest: int) -> None:
    """Once: a sweep over K asks for it again and again."""
    logger.warning(
        "a K of %d: %s guesses at most %d tokens ahead here, so K is %d",
        k,
        name,
        deepest,
        deepest,
    )


def _refuse_unused(params: SpeculationParams, name: str) -> None:
    """Nothing that only a drafter could honour may stand beside plain decoding."""
    usual = SpeculationParams()
    for field in fields(params):
        value = getattr(params, field.name)
        is_rule = field.name in ("method", "verifier", "verifier_options")
        is_usual = value == getattr(usual, field.name) or is_rule
        if is_usual or (field.name == "num_draft_tokens" and value == 0):
            continue
        remedy = "drop it" if name == OFF else "name a method, or load draft_model=..."
        raise RequestError(f"{field.name}={value!r}: nothing is drafted here; {remedy}")


def _rule(params: SpeculationParams, sampling: SamplingParams) -> tuple[Verifier, Settings]:
    name = params.verifier or DEFAULT_VERIFIER
    try:
        usual = verifier(name)
    except ConfigError as error:
        raise RequestError(str(error)) from None
    if usual.greedy_only and not sampling.is_greedy:
        raise PairError(
            f"verifier={name!r} serves temperature 0 only, not {sampling.temperature}; "
            f"use verifier={DEFAULT_VERIFIER!r}"
        )
    if usual.exactness is Exactness.SYNTHETIC and sampling.is_constrained:
        raise PairError(
            f"verifier={name!r} accepts whatever is drafted and would break the grammar: drop one "
            "of the two"
        )
    options = _options("verifier_options", name, usual.options, params.verifier_options)
    given = tuple(sorted(options.items()))
    return verifier(name, given), given


def _options(
    key: str, name: str, known: Mapping[str, Option], given: Mapping[str, Any]
) -> dict[str, bool | int | float | str]:
    """All options of a drafter or a rule, those that the request gives and the defaults."""
    found = {option: about.default for option, about in known.items()}
    for option, value in given.items():
        if option not in known:
            if not known:
                raise RequestError(f"{key}={dict(given)!r}: {name} has no options; drop it")
            raise RequestError(unknown(f"{key} key of {name}", str(option), list(known)))
        known[option].check(f"{key}[{option!r}]", value)
        found[option] = type(known[option].default)(value)
    return found


def _width(params: SpeculationParams, drafter: Drafter, members: Items[Drafter]) -> int:
    """One of the members must be able to draft as wide as is asked."""
    if params.width is None:
        return drafter.default_width
    low = max(drafter.min_width, min(member.min_width for member in members))
    high = min(drafter.max_width, max(member.max_width for member in members))
    if not low <= params.width <= high:
        bound = f"at most {high}" if params.width > high else f"at least {low}"
        raise RequestError(
            f"width={params.width}: {drafter.name} draws {bound} branches; "
            f"use width={high if params.width > high else low}"
        )
    return params.width


def _prediction(params: SpeculationParams, members: Items[Drafter]) -> tuple[int, ...]:
    wants = any("prediction" in member.needs for member in members)
    if params.prediction is not None:
        raise RequestError("prediction: needs a tokenizer; give prediction_token_ids")
    ids = params.prediction_token_ids
    if wants and ids is None:
        raise RequestError(
            "prediction: this method reads one; give the expected text as prediction=... (or its "
            "token ids as prediction_token_ids=...)"
        )
    if ids is not None and not wants:
        names = ", ".join(member.name for member in members)
        raise RequestError(f"prediction_token_ids: {names} reads no prediction; drop it")
    return ids or ()


def _drafter(name: str, drafters: Drafters, model: str | None) -> Drafter:
    if name in drafters:
        return drafters[name]
    try:
        if name not in DRAFTERS.names():
            raise RequestError(unknown("method", name, [OFF, *DRAFTERS.names()]))
        drafter = DRAFTERS.load(name)
    except ConfigError as error:
        raise RequestError(f"method={name!r}: {error}") from None
    if _runs_draft_model(drafter):
        raise RequestError(_missing_model(name, drafters))
    if "head" in drafter.needs:
        given = "..." if model is None else repr([model])
        raise RequestError(
            f"method={name!r}: no such head is loaded; give the engine heads={given}, or name the "
            "head as draft_model=..."
        )
    raise RequestError(f"method={name!r}: not set up in this engine; name it in LLM(drafters=...)")


def _runs_draft_model(drafter: Drafter) -> bool:
    return OWN_MODEL in drafter.needs or OTHER_MODEL in drafter.needs


def _missing_model(name: str, drafters: Drafters) -> str:
    others = (drafters[other] for other in drafters.names())
    other = next((other for other in others if _runs_draft_model(other)), None)
    if other is None:
        return f"method={name!r}: no draft model is loaded; give the engine draft_model=..."
    kind = "another" if OTHER_MODEL in other.needs else "the target's own"
    return f"method={name!r}: the draft model here has {kind} vocabulary; use method={other.name!r}"


def _check_model(
    params: SpeculationParams,
    members: Items[Drafter],
    draft_model: str,
    heads: Mapping[str, str],
) -> None:
    """A draft model or head that a request insists on must be the one that would draft for it."""
    model = params.model
    runs_model = any(_runs_draft_model(member) for member in members)
    mine = {heads[member.name]: member.name for member in members if member.name in heads}
    if model is None or model in mine or (runs_model and model == draft_model):
        return
    if runs_model:
        raise RequestError(
            f"model={model!r}: the engine has draft model {draft_model!r}; drop the key, or load "
            "that model with draft_model=..."
        )
    if not mine:
        names = ", ".join(member.name for member in members)
        raise RequestError(f"model={model!r}: method {names!r} has no draft model; drop it")
    head, name = next(iter(mine.items()))
    raise RequestError(
        f"model={model!r}: {name!r} runs the head {head!r} here; drop the key, or load that head "
        "with heads=... or draft_model=..."
    )


def _check_lookup(
    params: SpeculationParams, name: str, members: Items[Drafter], options: Options
) -> None:
    if any(isinstance(member, LooksUp) and member.looks_up(options) for member in members):
        return
    for key in ("prompt_lookup_min", "prompt_lookup_max"):
        value = getattr(params, key)
        if value is not None:
            raise RequestError(f"{key}={value}: method {name!r} does not look up n-grams; drop it")


def _lookup(params: SpeculationParams) -> tuple[int, int]:
    """Bounds of the n-gram match; one that is missing gives way to the one that was set."""
    low, high = params.prompt_lookup_min, params.prompt_lookup_max
    if high is None:
        high = max(LOOKUP_MAX, low or 0)
    if low is None:
        low = min(LOOKUP_MIN, high)
    return low, high


def _sample_method(
    params: SpeculationParams,
    name: str,
    members: Items[Drafter],
    options: Options,
    rule: Verifier,
    width: int,
) -> str:
    """How drafts are drawn; only a rule keyed by position may see drafts made with its noise."""
    asked = params.draft_sample_method
    known = {method for member in members for method in _methods(member, options)}
    if asked is not None and asked not in known:
        raise RequestError(
            f"draft_sample_method={asked!r}: {name} drafts {' or '.join(sorted(known))} only"
            f"{_remedy(asked, members, options)}"
        )
    if asked == "coupled" and rule.keyed_by != "position":
        raise PairError(
            f"draft_sample_method='coupled' needs verifier={DEFAULT_VERIFIER!r}, not {rule.name!r}"
        )
    if asked is not None:
        return asked
    if rule.keyed_by == "position":
        return "coupled" if "coupled" in known else "greedy"
    for method in ("probabilistic", "independent"):
        if method in known and all(
            _kind(member, options, method, width) in rule.accepts for member in members
        ):
            return method
    return "greedy"


def _methods(member: Drafter, options: Options) -> tuple[str, ...]:
    """How a drafter can draw under these options."""
    if isinstance(member, DrawsByOptions):
        return member.sample_methods_for(options)
    return member.sample_methods


def _remedy(method: str, members: Items[Drafter], options: Options) -> str:
    """Names the option that would let drafts be drawn so, if one of them is all it takes."""
    for member in members:
        for name, about in member.options.items():
            for choice in about.choices:
                if method in _methods(member, {**options, name: choice}):
                    return (
                        f" with {name}={options[name]!r}; drop it, or use "
                        f"drafter_options={{{name!r}: {choice!r}}}"
                    )
    return "; drop it"


def _check_kinds(members: Items[Drafter], spec: Speculation, rule: Verifier) -> None:
    """A rule keeps its promise only for the kinds of proposal it declares."""
    method, width = spec.draft_sample_method, spec.width
    for member in members:
        kind = _kind(member, spec.options, method, width)
        if kind in rule.accepts or (method == "coupled" and rule.keyed_by == "position"):
            continue
        known = ", ".join(sorted(k.value for k in rule.accepts))
        as_chain = _kind(member, spec.options, method, 1)
        chain = "width=1 or " if width > 1 and as_chain in rule.accepts else ""
        raise PairError(
            f"verifier={rule.name!r} takes {known}; with width={width} and "
            f"draft_sample_method={method!r}, the best it would take of {member.name}, that drafts "
            f"a {kind.value}: use {chain}verifier={DEFAULT_VERIFIER!r}"
        )


def _kind(member: Drafter, options: Options, method: str, width: int) -> Kind:
    width = max(min(width, member.max_width), member.min_width)
    if method not in _methods(member, options) or method == "greedy":
        return Kind.PICKED_CHAIN if width == 1 else Kind.PICKED_TREE
    if width == 1:
        return Kind.DRAWN_CHAIN
    return Kind.DRAWN_CHAINS if method == "independent" else Kind.DRAWN_TREE
