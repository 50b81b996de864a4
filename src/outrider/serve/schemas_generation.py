"""GenerationBody: the fields that chat and completions share, and what becomes of those we lack."""

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

from pydantic import ConfigDict, Field, model_validator

from outrider.engine.build import speculation_params
from outrider.errors import RequestError
from outrider.request import SamplingParams, SpeculationParams
from outrider.serve.base import Body
from outrider.serve.errors import ApiError
from outrider.serve.structured import Constraint, guided, structured_outputs

MAX_LOGPROBS = 20
STREAMED: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}
"""What routes that stream where asked answer besides JSON, for the OpenAPI page."""
SEED_MASK = 2**63 - 1
Text = str | list[str]
# What goes further makes numbers of the logits that are none.
Penalty = Annotated[float, Field(ge=-2, le=2)]
Bias = Annotated[float, Field(ge=-1e6, le=1e6)]


class Refusal(NamedTuple):
    """A field that would change the answer and is not honoured.

    Attributes:
        remedy: what to do instead.
        harmless: values that ask for nothing but what is done anyway.
    """

    remedy: str
    harmless: tuple[Any, ...] = ()


REFUSED: Mapping[str, Refusal] = {
    "use_beam_search": Refusal("beam search is not offered; leave it out", (False,)),
    "length_penalty": Refusal("it belongs to beam search; leave it out", (1, 1.0)),
    "early_stopping": Refusal("it belongs to beam search; leave it out", (False,)),
    "spaces_between_special_tokens": Refusal("always true here; leave it out", (True,)),
    "truncate_prompt_tokens": Refusal("shorten the prompt instead", (-1,)),
    "allowed_token_ids": Refusal("use logit_bias, or a grammar in structured_outputs"),
    "prompt_logprobs": Refusal("log-probabilities of the prompt are not offered; leave it out"),
    "return_token_ids": Refusal("use /tokenize", (False,)),
    "return_tokens_as_token_ids": Refusal("use the `bytes` of logprobs", (False,)),
    "logits_processors": Refusal("use logit_bias or structured_outputs", ([],)),
    "kv_transfer_params": Refusal("not offered; leave it out"),
    "guided_decoding_backend": Refusal("there is one; leave it out", ("auto", "xgrammar")),
    "guided_whitespace_pattern": Refusal("put blanks into a grammar"),
}
IGNORED = frozenset(
    {
        *("metadata", "prompt_cache_key", "prompt_cache_retention", "request_id"),
        *("safety_identifier", "service_tier", "store", "user"),
    }
)


class OutriderOptions(Body):
    """`outrider` in a body: what only this server knows."""

    model_config = ConfigDict(extra="forbid", strict=True)

    speculation: dict[str, Any] | str | None = None


class SessionOptions(OutriderOptions):
    """`outrider` in a body: how to speculate, which session, and what the client expects of it."""

    session: str | None = None
    if_head: str | None = None
    on_conflict: Literal["error", "fork"] = "error"


class OutriderStream(Body):
    """`stream_options`; the options under `outrider` are those of `StreamOptions`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    continuous_usage_stats: Literal[False] | None = None
    outrider: dict[str, Any] | None = None


class SiftedBody(Body):
    """A body where null says the same as leaving a field out.

    A field that is not honoured is refused if it would change the answer, else ignored.
    """

    model_config = ConfigDict(extra="forbid", strict=True)
    refused: ClassVar[Mapping[str, Refusal]] = {}
    ignored: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="before")
    @classmethod
    def _sift(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        given = {name: value for name, value in values.items() if value is not None}
        for name, value in given.items():
            if not _is_finite(value):
                message = f"{name}: holds NaN or Infinity, which JSON does not have; send numbers"
                raise ApiError(400, message, param=name)
        for name in sorted(given.keys() & cls.refused.keys()):
            if not _is_among(given.pop(name), cls.refused[name].harmless):
                message = f"{name}: {cls.refused[name].remedy}"
                raise ApiError(400, message, param=name, code="unsupported_parameter")
        return {name: value for name, value in given.items() if name not in cls.ignored}


class GenerationBody(SiftedBody):
    """Body of a request for text in one of OpenAI's older dialects, with vLLM's additions."""

    refused: ClassVar[Mapping[str, Refusal]] = REFUSED
    ignored: ClassVar[frozenset[str]] = IGNORED

    model: str | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] = 1.0
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    logit_bias: dict[str, Bias] = Field(default_factory=dict)
    seed: int | None = None
    n: int = 1
    stop: Text = Field(default_factory=list)
    stop_token_ids: list[int] = Field(default_factory=list)
    bad_words: list[str] = Field(default_factory=list)
    ignore_eos: bool = False
    min_tokens: int = 0
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    guided_json: str | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    structured_outputs: dict[str, Any] | None = None
    priority: int = 0
    cache_salt: Annotated[str, Field(min_length=1)] | None = None
    stream: bool = False
    stream_options: OutriderStream | None = None
    speculation: dict[str, Any] | str | None = None
    outrider: OutriderOptions = OutriderOptions()

    @model_validator(mode="after")
    def _check_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ApiError(
                400, "stream_options: only with stream=true; leave it out", param="stream_options"
            )
        return self

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def constraints(self) -> list[Constraint]:
        """What the fields of vLLM ask the output to match."""
        found = guided(self.guided_json, self.guided_regex, self.guided_choice, self.guided_grammar)
        if self.structured_outputs is not None:
            found += structured_outputs(self.structured_outputs)
        return found

    def sampling(self, **more: Any) -> SamplingParams:
        """The parameters of the engine; `more` are those that a dialect names its own way.

        Raises:
            RequestError: naming the field that cannot be honoured.
        """
        names = (
            "temperature top_p top_k min_p repetition_penalty presence_penalty frequency_penalty"
            " n bad_words stop_token_ids ignore_eos min_tokens include_stop_str_in_output"
            " skip_special_tokens logit_bias"
        )
        values: dict[str, Any] = {name: getattr(self, name) for name in names.split()}
        values["top_k"] = max(self.top_k, 0) if self.top_k == -1 else self.top_k  # vLLM's "all"
        values["stop"] = [self.stop] if isinstance(self.stop, str) else self.stop
        values["seed"] = None if self.seed is None else seed_of(self.seed)
        return SamplingParams.from_dict({**values, **more})

    def asked_speculation(self) -> SpeculationParams | None:
        """None where the body says nothing of it."""
        return the_speculation(self.speculation, self.outrider.speculation)


def the_speculation(*given: str | Mapping[str, Any] | None) -> SpeculationParams | None:
    """What is given by one of two names; RequestError for both."""
    asked = [each for each in given if each is not None]
    if len(asked) > 1:
        raise RequestError("speculation and outrider.speculation: give one of the two")
    return speculation_params(asked[0]) if asked else None


def _is_among(value: Any, harmless: tuple[Any, ...]) -> bool:
    return any(type(value) is type(one) and value == one for one in harmless)


def _is_finite(value: Any) -> bool:
    """Whether all numbers in it are some: they may be told again, and nobody could read them."""
    left = [value]
    while left:
        value = left.pop()
        if isinstance(value, float) and not math.isfinite(value):
            return False
        if isinstance(value, Mapping | list):
            left += value.values() if isinstance(value, Mapping) else value
    return True


def seed_of(seed: int) -> int:
    """OpenAI takes negative seeds; each has a positive one that stands for it."""
    if not -(2**63) <= seed < 2**63:
        raise RequestError(f"seed={seed}: must lie in [-2**63, 2**63)")
    return seed & SEED_MASK
