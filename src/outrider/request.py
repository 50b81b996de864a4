"""What is asked, frozen: sampling, speculation, streaming, and the request that carries them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from operator import index
from typing import Any, NamedTuple, Self, TypeAlias, TypeVar

from outrider.errors import RequestError, unknown

OFF = "off"
MAX_DRAFT_TOKENS = 64
MAX_WIDTH = 64
MAX_NODES = 256
MAX_N = 1024
SAMPLE_METHODS = ("greedy", "probabilistic", "independent", "coupled")
VISIBILITIES = ("verified", "provisional")
COMMIT_UNITS = ("token", "word", "sentence", "line")
PastDrafts: TypeAlias = Mapping[str, Mapping[str, Sequence[float]]]
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the target's law is shaped and drawn from, and when to stop.

    Every field is honoured exactly under speculation, at every draft position.

    Attributes:
        max_tokens: most tokens to generate; None means up to the model's context.
        min_tokens: end-of-sequence and stop tokens are forbidden before this many tokens.
        temperature: 0 is greedy; otherwise logits are divided by it.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the smallest set of tokens with at least this mass; 1 keeps all.
        min_p: drop tokens below this share of the most likely one; 0 keeps all.
        repetition_penalty: > 1 makes tokens of prompt and output less likely (CTRL, Keskar 2019).
        presence_penalty: subtracted once from the logit of each token already generated.
        frequency_penalty: subtracted per occurrence from the logit of each generated token.
        logit_bias: token id -> added to its logit.
        bad_words: texts whose usual tokens (at a start, and after a space) are forbidden in the
            output; another split into tokens may still read the same.
        seed: same seed, same tokens; None draws one.
        n: completions of one prompt; completion i has its own stream of the seed.
        stop: texts that end the output and are not part of it.
        stop_token_ids: tokens that end the output (kept in token_ids, not in text).
        ignore_eos: go on after the model's end-of-sequence token.
        include_stop_str_in_output: keep the stop text at the end.
        skip_special_tokens: leave special tokens out of the text.
        logprobs: None, or how many most likely tokens to report beside the emitted one (raw
            logits, before any transform, in nats).
        json_schema, regex, grammar: at most one; the output is constrained to it (JSON schema
            as text or mapping; regular expression; EBNF grammar).
    """

    max_tokens: int | None = 128
    min_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    bad_words: tuple[str, ...] = ()
    seed: int | None = None
    n: int = 1
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    json_schema: str | Mapping[str, Any] | None = None
    regex: str | None = None
    grammar: str | None = None

    def __post_init__(self) -> None:
        for name in ("stop", "bad_words"):
            value = getattr(self, name)
            if isinstance(value, str):
                object.__setattr__(self, name, (value,))
        _check_sampling(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """From JSON-like keys; an unknown key is an error."""
        return _from_dict(cls, values)

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def is_constrained(self) -> bool:
        """Whether a grammar limits the output."""
        return self.json_schema is not None or self.regex is not None or self.grammar is not None


class Option(NamedTuple):
    """A setting of one drafter or one verifier, given per request.

    Attributes:
        default: in force where the request says nothing; its type is the setting's.
        meaning: one line for people.
        low, high: bounds of a number, both allowed.
        choices: the texts that are known; () allows any text.
    """

    default: bool | int | float | str
    meaning: str
    low: float = -math.inf
    high: float = math.inf
    choices: tuple[str, ...] = ()

    def check(self, name: str, value: object) -> None:
        """RequestError with the value and the remedy if it cannot be honoured."""
        kind = type(self.default)
        if kind is float and _is_int(value):
            value = float(value)  # type: ignore[arg-type]
        _require(type(value) is kind, name, value, f"must be a {_KIND_NAMES[kind]}")
        if isinstance(value, str):
            is_known = not self.choices or value in self.choices
            _require(is_known, name, value, f"must be one of {', '.join(self.choices)}")
        elif kind is not bool:
            bounds = f"must lie in [{self.low:g}, {self.high:g}]"
            _require(self.low <= value <= self.high, name, value, bounds)  # type: ignore[operator]


_KIND_NAMES = {bool: "truth value", int: "whole number", float: "number", str: "text"}
Options: TypeAlias = Mapping[str, bool | int | float | str]


@dataclass(frozen=True, kw_only=True)
class SpeculationParams:
    """Who drafts, how far, and which rule verifies, for one request.

    Attributes:
        method: "off", or a drafter's name (`outrider plugins` lists them); None takes the
            engine's default: its draft model if it has one, else off.
        num_draft_tokens: K, depth of the draft tree (for a chain, its tokens); None takes the
            drafter's default.
        width: branches at the root of a draft tree; 1 is a chain, None the drafter's default.
        num_nodes: most nodes of a draft tree; None takes the drafter's default, which is
            `num_draft_tokens * width` unless it says otherwise.
        verifier: acceptance rule; None takes "sampled" (exact, one seeded draw per node).
        draft_sample_method: how a model drafts: "greedy" (its most likely tokens),
            "probabilistic" (its own draws, siblings without replacement; the laws are recorded),
            "independent" (`width` chains, each drawn as if alone), or "coupled" (the target's
            noise with its own law); None picks "coupled" for a rule that is keyed by position,
            else the first of "probabilistic", "independent", "greedy" that the rule takes, out of
            those that the drafter honours under its options. At temperature 0 all of them pick.
        prompt_lookup_min, prompt_lookup_max: shortest and longest n-gram that `ngram` matches.
        model: the draft model that must be loaded (checked against the engine's, never loaded
            per request).
        drafter_options, verifier_options: settings of the method and of the rule by name
            (`outrider plugins` lists them).
        prediction: text that the answer is expected to resemble, for method "prediction" (as
            predicted outputs elsewhere); needs a tokenizer.
        prediction_token_ids: the same as token ids; give one of the two.
        policy: who decides how far to draft in each step: "fixed" (always K), "adaptive" (as far
            as pays at present, up to K; zero included), "off", "table" (K by batch size), or a
            plug-in's name. None is "fixed" where the size of drafts is given, else the engine's
            policy.
        policy_options: settings of the policy by name.
        slo: latency targets that "adaptive" keeps where it can, by longer drafts or by shorter:
            "tpot_ms" per token after the first, "ttft_ms" to the first.
    """

    method: str | None = None
    num_draft_tokens: int | None = None
    width: int | None = None
    num_nodes: int | None = None
    verifier: str | None = None
    draft_sample_method: str | None = None
    prompt_lookup_min: int | None = None
    prompt_lookup_max: int | None = None
    model: str | None = None
    drafter_options: Options = field(default_factory=dict)
    verifier_options: Options = field(default_factory=dict)
    prediction: str | None = None
    prediction_token_ids: tuple[int, ...] | None = None
    policy: str | None = None
    policy_options: Options = field(default_factory=dict)
    slo: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_speculation(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """From JSON-like keys; `num_speculative_tokens` (vLLM) means `num_draft_tokens`."""
        renamed = dict(values)
        if "num_speculative_tokens" in renamed:
            if "num_draft_tokens" in renamed:
                raise RequestError(
                    "num_speculative_tokens and num_draft_tokens are the same setting: give one"
                )
            renamed["num_draft_tokens"] = renamed.pop("num_speculative_tokens")
        return _from_dict(cls, renamed)

    @property
    def is_off(self) -> bool:
        return self.method == OFF or self.num_draft_tokens == 0


class Candidate(NamedTuple):
    """One drafter that a policy may choose, and the largest draft of it."""

    drafter: str
    num_draft_tokens: int
    width: int
    num_nodes: int


@dataclass(frozen=True, kw_only=True)
class Speculation:
    """`SpeculationParams` with every default filled in and checked against one engine.

    Attributes:
        drafter: "" for plain decoding.
        parts: further drafters that the drafter composes.
        num_nodes: most nodes of a draft tree.
        options: of the drafter, every one of them. verifier_options: likewise, sorted by name.
        prediction: token ids that the answer is expected to resemble.
        draft_sample_method: the one in force, honoured by the drafter or by one of its parts.
    """

    drafter: str = ""
    parts: tuple[str, ...] = ()
    num_draft_tokens: int = 0
    width: int = 1
    num_nodes: int = 0
    verifier: str = "sampled"
    verifier_options: tuple[tuple[str, bool | int | float | str], ...] = ()
    options: Options = field(default_factory=dict)
    prediction: tuple[int, ...] = ()
    draft_sample_method: str = "greedy"
    prompt_lookup_min: int = 2
    prompt_lookup_max: int = 4
    policy: str = "fixed"
    policy_options: Options = field(default_factory=dict)
    candidates: tuple[Candidate, ...] = ()
    tpot_s: float | None = None
    ttft_s: float | None = None

    def __post_init__(self) -> None:
        if not self.num_nodes:
            object.__setattr__(self, "num_nodes", self.num_draft_tokens * self.width)
        if not self.candidates and self.drafter:
            one = Candidate(self.drafter, self.num_draft_tokens, self.width, self.num_nodes)
            object.__setattr__(self, "candidates", (one,))


@dataclass(frozen=True, kw_only=True)
class StreamParams:
    """What the client may see, and when.

    Attributes:
        visibility: "verified" (committed text only) or "provisional" (drafts too, as a tail
            that each later event replaces).
        min_stability: drafts are shown while the probability that all of them stand is at least
            this; from 0.5 on they are also held to a bound on what is taken back.
        max_tail_tokens: most drafted tokens of a tail.
        commit_unit: committed text comes by "token", or is held back to whole units: "word",
            "sentence" or "line".
        steps: whether events carry the draft of their step. Sizes of drafts tell of the prompt,
            so only on request.
    """

    visibility: str = "verified"
    min_stability: float = 0.8
    max_tail_tokens: int = 16
    commit_unit: str = "token"
    steps: bool = False

    def __post_init__(self) -> None:
        _check_stream(self)

    @property
    def is_provisional(self) -> bool:
        return self.visibility == "provisional"


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt and what is to be done with it.

    Attributes:
        id: unique among requests in flight.
        prompt_token_ids: at least one token.
        seed: resolved seed (never None, unlike `sampling.seed`).
        priority: smaller is seated first and loses its KV last; equal ones in order of arrival. Who
            runs keeps the seat.
        tenant: salt of the prefix cache; requests of different tenants share no KV.
        bad_words_ids: token sequences that `sampling.bad_words` stands for.
        experience: drafter -> {"drafted": [...], "accepted": [...]}, by position how many of its
            drafts for such text came so far and stood until there, and how many of those stood
            there too; policies may start from it. Tokens do not depend on it under rules keyed by
            position.
    """

    id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    speculation: SpeculationParams = field(default_factory=SpeculationParams)
    stream: StreamParams = field(default_factory=StreamParams)
    seed: int = 0
    priority: int = 0
    tenant: str = ""
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    experience: PastDrafts = field(default_factory=dict)


def _from_dict(cls: type[T], values: Mapping[str, Any]) -> T:
    known = [f.name for f in fields(cls)]  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            raise RequestError(unknown(f"{cls.__name__} key", str(key), known))
    cast = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return cls(**cast)


def _require(holds: bool, name: str, value: object, remedy: str) -> None:
    if not holds:
        raise RequestError(f"{name}={value!r}: {remedy}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_sampling(p: SamplingParams) -> None:
    numbers = "temperature top_p min_p repetition_penalty presence_penalty frequency_penalty"
    for name in numbers.split():
        value = getattr(p, name)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        _require(is_number and math.isfinite(value), name, value, "must be a finite number")
    for name in ("min_tokens", "top_k", "n"):
        _require(_is_int(getattr(p, name)), name, getattr(p, name), "must be an integer")
    for name in ("max_tokens", "seed", "logprobs"):
        value = getattr(p, name)
        _require(value is None or _is_int(value), name, value, "must be an integer or None")
    _require(p.max_tokens is None or p.max_tokens >= 1, "max_tokens", p.max_tokens, "must be >= 1")
    _require(p.min_tokens >= 0, "min_tokens", p.min_tokens, "must be >= 0")
    _require(
        p.max_tokens is None or p.min_tokens <= p.max_tokens,
        "min_tokens", p.min_tokens, f"must not exceed max_tokens={p.max_tokens}",
    )  # fmt: skip
    _require(p.temperature >= 0, "temperature", p.temperature, "must be >= 0 (0 is greedy)")
    _require(p.top_k >= 0, "top_k", p.top_k, "must be >= 0 (0 keeps all tokens)")
    _require(0 < p.top_p <= 1, "top_p", p.top_p, "must lie in (0, 1]")
    _require(0 <= p.min_p <= 1, "min_p", p.min_p, "must lie in [0, 1]")
    _require(
        p.repetition_penalty > 0,
        "repetition_penalty",
        p.repetition_penalty,
        "must be > 0 (1 is none)",
    )
    _require(1 <= p.n <= MAX_N, "n", p.n, f"must lie in [1, {MAX_N}]")
    _require(p.seed is None or 0 <= p.seed < 2**63, "seed", p.seed, "must lie in [0, 2**63)")
    _require(p.logprobs is None or p.logprobs >= 0, "logprobs", p.logprobs, "must be >= 0")
    for name in ("stop", "bad_words"):
        texts = getattr(p, name)
        is_texts = isinstance(texts, tuple | list) and all(isinstance(t, str) and t for t in texts)
        _require(is_texts, name, texts, "must be non-empty texts")
        object.__setattr__(p, name, tuple(texts))
    ids = p.stop_token_ids
    _require(
        isinstance(ids, tuple | list) and all(_is_int(i) for i in ids),
        "stop_token_ids", ids, "must be token ids",
    )  # fmt: skip
    object.__setattr__(p, "stop_token_ids", tuple(ids))
    _check_bias(p)
    kinds = [name for name in ("json_schema", "regex", "grammar") if getattr(p, name) is not None]
    _require(len(kinds) <= 1, " and ".join(kinds), "...", "give at most one of them")


def _token_id(key: object) -> int:
    """JSON has texts for keys; a fraction is no token id."""
    return int(key) if isinstance(key, str) else index(key)  # type: ignore[arg-type]


def _check_bias(p: SamplingParams) -> None:
    try:
        bias = {_token_id(token): float(value) for token, value in dict(p.logit_bias).items()}
    except (TypeError, ValueError):
        raise RequestError(
            f"logit_bias={p.logit_bias!r}: must map token ids to numbers, as in {{42: -5.0}}"
        ) from None
    for token, value in bias.items():
        _require(not math.isnan(value), f"logit_bias[{token}]", value, "must be a number")
    object.__setattr__(p, "logit_bias", bias)


def _check_speculation(p: SpeculationParams) -> None:
    for name in ("method", "verifier", "model"):
        value = getattr(p, name)
        is_name = value is None or (isinstance(value, str) and value != "")
        _require(is_name, name, value, "must be a name, or None for the default")
    k = p.num_draft_tokens
    _require(
        k is None or (_is_int(k) and 0 <= k <= MAX_DRAFT_TOKENS),
        "num_draft_tokens", k, f"must lie in [0, {MAX_DRAFT_TOKENS}] (0 is plain decoding)",
    )  # fmt: skip
    for name, most in (("width", MAX_WIDTH), ("num_nodes", MAX_NODES)):
        value = getattr(p, name)
        is_in = value is None or (_is_int(value) and 1 <= value <= most)
        _require(is_in, name, value, f"must lie in [1, {most}]")
    _require(
        p.draft_sample_method in (None, *SAMPLE_METHODS),
        "draft_sample_method",
        p.draft_sample_method,
        f"must be one of {', '.join(SAMPLE_METHODS)}",
    )
    for name in ("drafter_options", "verifier_options"):
        value = getattr(p, name)
        _require(isinstance(value, Mapping), name, value, "must map names to values")
    _check_prediction(p)
    _check_policy(p)
    for name in ("prompt_lookup_min", "prompt_lookup_max"):
        value = getattr(p, name)
        _require(
            value is None or (_is_int(value) and 1 <= value <= 32),
            name,
            value,
            "must lie in [1, 32]",
        )
    low, high = p.prompt_lookup_min, p.prompt_lookup_max
    _require(
        low is None or high is None or low <= high,
        "prompt_lookup_min", low, f"must not exceed prompt_lookup_max={high}",
    )  # fmt: skip


TARGETS = ("tpot_ms", "ttft_ms")


def _check_policy(p: SpeculationParams) -> None:
    is_name = p.policy is None or (isinstance(p.policy, str) and p.policy != "")
    _require(is_name, "policy", p.policy, "must be a name, or None for the default")
    is_map = isinstance(p.policy_options, Mapping)
    _require(is_map, "policy_options", p.policy_options, "must map names to values")
    _require(
        isinstance(p.slo, Mapping), "slo", p.slo, f"must map {' or '.join(TARGETS)} to numbers"
    )
    for name, value in p.slo.items():
        _require(name in TARGETS, "slo", name, f"must be {' or '.join(TARGETS)}")
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        is_time = is_number and math.isfinite(value) and value > 0
        _require(is_time, f"slo[{name!r}]", value, "must be milliseconds above 0")


def _check_prediction(p: SpeculationParams) -> None:
    text, ids = p.prediction, p.prediction_token_ids
    _require(text is None or isinstance(text, str), "prediction", text, "must be text or None")
    _require(text is None or ids is None, "prediction_token_ids", ids, "drop it or prediction")
    if ids is None:
        return
    is_ids = isinstance(ids, tuple | list) and all(_is_int(i) for i in ids)
    _require(is_ids, "prediction_token_ids", ids, "must be token ids")
    object.__setattr__(p, "prediction_token_ids", tuple(ids))


def _check_stream(p: StreamParams) -> None:
    _require(isinstance(p.steps, bool), "steps", p.steps, "must be true or false")
    for name, known in (("visibility", VISIBILITIES), ("commit_unit", COMMIT_UNITS)):
        value = getattr(p, name)
        _require(value in known, name, value, f"must be one of {', '.join(known)}")
    value = p.min_stability
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    _require(is_number and 0 <= value <= 1, "min_stability", value, "must lie in [0, 1]")
    value = p.max_tail_tokens
    _require(
        _is_int(value) and 1 <= value <= MAX_DRAFT_TOKENS,
        "max_tail_tokens", value, f"must lie in [1, {MAX_DRAFT_TOKENS}]",
    )  # fmt: skip
