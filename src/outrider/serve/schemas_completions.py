"""Body of /v1/completions, OpenAI's first API: a text, or several, to be continued."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import Field

from outrider.errors import RequestError
from outrider.request import SamplingParams
from outrider.serve.schemas_generation import (
    IGNORED,
    MAX_LOGPROBS,
    REFUSED,
    GenerationBody,
    Refusal,
)
from outrider.serve.structured import response_format, the_one

MAX_PROMPTS = 256
Prompts = str | list[str] | list[int] | list[list[int]]


class CompletionBody(GenerationBody):
    """Body of `POST /v1/completions`; the rest is in `GenerationBody`.

    `response_format` is vLLM's addition.
    """

    refused: ClassVar[Mapping[str, Refusal]] = {
        **REFUSED,
        "suffix": Refusal("this model does not fill in; put what follows into the prompt", ("",)),
        "add_special_tokens": Refusal("send token ids to leave them out", (True,)),
        "prompt_embeds": Refusal("send text or token ids"),
        "tools": Refusal("use /v1/chat/completions", ([],)),
        "messages": Refusal("use /v1/chat/completions"),
    }
    ignored: ClassVar[frozenset[str]] = IGNORED

    prompt: Prompts
    max_tokens: int | None = 16
    echo: bool = False
    best_of: int | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    response_format: dict[str, Any] | None = None

    def params(self) -> SamplingParams:
        """RequestError naming the field that cannot be honoured."""
        if self.best_of is not None and self.best_of != self.n:
            raise RequestError(
                f"best_of={self.best_of}: all completions are sent, none is chosen; use n"
            )
        if self.echo and self.logprobs is not None:
            raise RequestError(
                "echo with logprobs: log-probabilities of the prompt are not offered; drop one"
            )
        constraints = [*response_format(self.response_format), *self.constraints()]
        more = the_one(constraints)
        return self.sampling(max_tokens=self.max_tokens, logprobs=self.logprobs, **more)

    def prompts(self) -> list[str | list[int]]:
        """One or many; RequestError for none, and for more than `MAX_PROMPTS`."""
        given = self.prompt
        is_one = isinstance(given, str) or (bool(given) and isinstance(given[0], int))
        found: list[Any] = [given] if is_one else list(given)
        if not 0 < len(found) <= MAX_PROMPTS:
            raise RequestError(
                f"prompt: {len(found)} are too few or too many; send 1 to {MAX_PROMPTS}"
            )
        return found
