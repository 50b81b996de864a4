"""Body of /v1/chat/completions, and its messages, tools and prediction as the rest reads them."""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from outrider.errors import RequestError
from outrider.request import SamplingParams, SpeculationParams
from outrider.serve.base import Body
from outrider.serve.schemas_generation import (
    IGNORED,
    MAX_LOGPROBS,
    REFUSED,
    GenerationBody,
    Refusal,
    SessionOptions,
)
from outrider.serve.structured import response_format, the_one
from outrider.serve.tools import AUTO, FUNCTION, NONE, Tool, ToolUse

PREDICTION = "prediction"
ROLES = {"developer": "system"}  # names that templates do not know
TEXT_PARTS = {"text": "text", "input_text": "text", "refusal": "refusal"}


class ChatMessage(BaseModel):
    """One message; members beyond OpenAI's go to the chat template as they are."""

    model_config = ConfigDict(extra="allow", strict=True)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[dict[str, Any]] | None = None
    tool_calls: list[dict[str, Any]] | None = None


class FunctionDefinition(Body):
    """A function that the model may call."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.:-]{1,128}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ChatTool(Body):
    """An entry of `tools`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["function"]
    function: FunctionDefinition


class Prediction(Body):
    """What the answer will resemble."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["content"]
    content: str | list[dict[str, Any]]


class ChatBody(GenerationBody):
    """Body of `POST /v1/chat/completions`; the rest is in `GenerationBody`."""

    refused: ClassVar[Mapping[str, Refusal]] = {
        **REFUSED,
        "functions": Refusal("deprecated; use tools", ([],)),
        "function_call": Refusal("deprecated; use tool_choice", ("none",)),
        "audio": Refusal("this model writes text only"),
        "modalities": Refusal("this model writes text only", (["text"],)),
        "web_search_options": Refusal("this server does not search; use tools"),
        "verbosity": Refusal("say it in the messages", ("medium",)),
        "reasoning_effort": Refusal("use chat_template_kwargs, if the template reads it"),
        "echo": Refusal("only /v1/completions echoes", (False,)),
        "best_of": Refusal("use n", (1,)),
        "add_generation_prompt": Refusal("always true here; leave it out", (True,)),
        "continue_final_message": Refusal("use /v1/completions to go on with a text", (False,)),
        "add_special_tokens": Refusal("the chat template writes them; leave it out", (False,)),
        "chat_template": Refusal("the model's own is used; leave it out"),
        "documents": Refusal("use chat_template_kwargs, if the template reads them", ([],)),
        "mm_processor_kwargs": Refusal("this model reads text only", ({},)),
    }
    ignored: ClassVar[frozenset[str]] = IGNORED

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] = 0
    response_format: dict[str, Any] | None = None
    tools: list[ChatTool] = Field(default_factory=list)
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool = True
    prediction: Prediction | None = None
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    outrider: SessionOptions = SessionOptions()

    def params(self, tool_use: ToolUse) -> SamplingParams:
        """RequestError naming the field that cannot be honoured."""
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise RequestError("max_tokens and max_completion_tokens: give the second only")
        if self.top_logprobs and not self.logprobs:
            raise RequestError(f"top_logprobs={self.top_logprobs}: only with logprobs=true")
        constraints = [*response_format(self.response_format), *self.constraints()]
        if constraints and tool_use.is_active:
            raise RequestError(
                f"{constraints[0].asked_as}: would forbid calls of tools; set tool_choice='none'"
            )
        more = the_one(constraints)
        if tool_use.is_forced:
            more = {"json_schema": tool_use.schema()}
        if tool_use.is_active:
            more["skip_special_tokens"] = False  # some models mark calls by special tokens
        limit = self.max_tokens if self.max_tokens is not None else self.max_completion_tokens
        logprobs = self.top_logprobs if self.logprobs else None
        return self.sampling(max_tokens=limit, logprobs=logprobs, **more)

    def tool_use(self) -> ToolUse:
        """The functions, and whether the model may or must call one."""
        tools = tuple(
            Tool(
                name=tool.function.name,
                description=tool.function.description or "",
                parameters=tool.function.parameters,
                strict=bool(tool.function.strict),
            )
            for tool in self.tools
        )
        choice, name = _choice(self.tool_choice, AUTO if tools else NONE)
        return ToolUse(tools=tools, choice=choice, name=name, is_parallel=self.parallel_tool_calls)

    def wanted_speculation(self) -> SpeculationParams | None:
        """With the client's prediction, which means the method of that name unless one is given."""
        asked = self.asked_speculation()
        if self.prediction is None:
            return asked
        self._check_prediction()
        text = texts("prediction.content", self.prediction.content)
        if asked is None:
            return SpeculationParams(method=PREDICTION, prediction=text)
        return _with_prediction(asked, text)

    def _check_prediction(self) -> None:
        """What OpenAI does not take beside a prediction."""
        for name, usual, remedy in (
            ("n", 1, "send one request for each answer"),
            ("tools", [], "leave out the tools"),
            ("logprobs", False, "leave out logprobs"),
            ("presence_penalty", 0.0, "leave out the penalty"),
            ("frequency_penalty", 0.0, "leave out the penalty"),
        ):
            value = getattr(self, name)
            if value != usual:
                shown = value if name != "tools" else f"{len(value)} functions"
                raise RequestError(
                    f"{name}={shown}: not beside a prediction; {remedy}, or the prediction"
                )

    def template_messages(self) -> list[dict[str, Any]]:
        """As chat templates read them: contents are texts, arguments of calls are mappings."""
        return [_template_message(i, message) for i, message in enumerate(self.messages)]


def texts(name: str, content: str | list[dict[str, Any]] | None) -> str:
    """The text of a content, its parts on lines of their own.

    Raises:
        RequestError: a part that is no text.
    """
    if content is None or isinstance(content, str):
        return content or ""
    return "\n".join(_part(f"{name}.{index}", part) for index, part in enumerate(content))


def loaded(arguments: Any) -> Any:
    """Arguments of a call as a mapping; a text that is no JSON (cut off) stays one."""
    try:
        return json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError):
        return arguments


def _part(name: str, part: Mapping[str, Any]) -> str:
    kind = part.get("type")
    text = part.get(TEXT_PARTS[kind]) if isinstance(kind, str) and kind in TEXT_PARTS else None
    if not isinstance(text, str):
        raise RequestError(f"{name}: type={kind!r} cannot be read; send parts of type 'text'")
    return text


def _choice(given: str | dict[str, Any] | None, usual: str) -> tuple[str, str]:
    """(choice, name) of `tool_choice`."""
    if given is None:
        return usual, ""
    if isinstance(given, str):
        if given not in ("none", "auto", "required"):
            raise RequestError(f"tool_choice={given!r}: must be none, auto, required or a function")
        return (given, "") if given != AUTO else (usual, "")
    function = given.get("function")
    name = function.get("name") if isinstance(function, Mapping) else None
    if given.get("type") != FUNCTION or not isinstance(name, str):
        raise RequestError(
            f"tool_choice={given!r}: must look like "
            '{"type": "function", "function": {"name": "..."}}'
        )
    return FUNCTION, name


def _with_prediction(asked: SpeculationParams, text: str) -> SpeculationParams:
    if asked.prediction is not None or asked.prediction_token_ids is not None:
        raise RequestError("prediction: also in speculation; give one of the two")
    return replace(asked, method=asked.method or PREDICTION, prediction=text)


def _template_message(index: int, message: ChatMessage) -> dict[str, Any]:
    name = f"messages.{index}"
    found = {key: value for key, value in (message.model_extra or {}).items() if value is not None}
    found["role"] = ROLES.get(message.role, message.role)
    found["content"] = texts(f"{name}.content", message.content)
    if message.content is None and not message.tool_calls:
        raise RequestError(f"{name}: has no content; give a text")
    if message.tool_calls:
        found["tool_calls"] = [
            _template_call(f"{name}.tool_calls.{place}", call)
            for place, call in enumerate(message.tool_calls)
        ]
    return found


def _template_call(name: str, call: Mapping[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise RequestError(f"{name}: needs a function with a name and arguments")
    arguments = loaded(function.get("arguments", "{}"))
    return {**call, "function": {**function, "arguments": arguments}}
