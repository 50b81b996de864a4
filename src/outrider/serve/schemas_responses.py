"""Bodies of the Responses API, and what they mean: messages, sampling, tools."""

from collections.abc import Mapping, Sequence as Items
from typing import Annotated, Any, ClassVar

from pydantic import Field

from outrider.errors import RequestError
from outrider.request import SamplingParams
from outrider.serve.base import Body
from outrider.serve.schemas_chat import loaded
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

Message = dict[str, Any]
Count = Annotated[int, Field(ge=0)]
LOGPROBS = "message.output_text.logprobs"
MAX_METADATA = 16  # pairs, as OpenAI has it
TEXT_PARTS = ("input_text", "output_text", "text")
ROLES = {"user": "user", "assistant": "assistant", "system": "system", "developer": "system"}


class CreateResponse(GenerationBody):
    """Body of `POST /v1/responses`; the rest is in `GenerationBody`."""

    refused: ClassVar[Mapping[str, Refusal]] = {
        **REFUSED,
        "reasoning": Refusal("not offered; leave it out", ({},)),
        "truncation": Refusal("send 'disabled', and a shorter input", ("disabled",)),
        "max_tool_calls": Refusal("there are no built-in tools; leave it out"),
        "prompt": Refusal("prompt templates are not offered; send instructions and input"),
        "cache_salt": Refusal("caches belong to the key; use keys of their own"),
        "n": Refusal("a response is one answer; fork the session for more", (1,)),
        "modalities": Refusal("this model writes text only", (["text"],)),
        "context_management": Refusal("not offered; leave it out", ([],)),
        "moderation": Refusal("not offered; leave it out"),
    }
    ignored: ClassVar[frozenset[str]] = IGNORED - {"metadata", "store"} | {"prompt_cache_options"}

    input: str | list[dict[str, Any]] = Field(default_factory=list)
    instructions: str | None = None
    previous_response_id: str | None = None
    conversation: str | dict[str, Any] | None = None
    store: bool = True
    background: bool = False
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] = 0
    include: list[str] = Field(default_factory=list)
    text: dict[str, Any] = Field(default_factory=dict)
    tools: list[dict[str, Any]] = Field(default_factory=list)
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool = True
    metadata: dict[str, str] = Field(default_factory=dict, max_length=MAX_METADATA)
    outrider: SessionOptions = SessionOptions()

    @property
    def items(self) -> list[dict[str, Any]]:
        """The input as items, a text as a message of the user."""
        if isinstance(self.input, str):
            content = [{"type": "input_text", "text": self.input}]
            return [{"type": "message", "role": "user", "content": content}]
        return [{"type": "message", **item} for item in self.input]

    @property
    def has_logprobs(self) -> bool:
        return bool(self.top_logprobs) or LOGPROBS in self.include

    @property
    def format(self) -> Mapping[str, Any]:
        """`text.format`."""
        given = self.text.get("format") or {"type": "text"}
        if not isinstance(given, Mapping):
            raise RequestError(f"text.format={given!r}: must be a mapping with a type")
        return given

    @property
    def is_structured(self) -> bool:
        return self.format.get("type") != "text" or bool(self.constraints())

    def check(self) -> None:
        """RequestError for what cannot be honoured here, or not together."""
        given = {
            "previous_response_id": self.previous_response_id,
            "conversation": self.conversation,
            "outrider.session": self.outrider.session,
        }
        named = [name for name, value in given.items() if value is not None]
        if len(named) > 1:
            raise RequestError(f"{' and '.join(named)}: they name the same thing; give one")
        if self.background and not self.store:
            raise RequestError("background=True: needs store=true, or nobody could ask for it")
        if named and not self.store and named != ["previous_response_id"]:
            raise RequestError(f"{named[0]}: keeps what is said, so it needs store=true")
        other = [name for name in self.include if name != LOGPROBS]
        if other:
            raise RequestError(f"include={other!r}: only {LOGPROBS!r} is offered")
        unknown = [name for name in self.text if name not in ("format", "verbosity")]
        if unknown or self.text.get("verbosity") not in (None, "medium"):
            raise RequestError(f"text={self.text!r}: only format is offered")

    def session_id(self, headers: Mapping[str, str]) -> str | None:
        """The session that the body names, or else a header."""
        if self.previous_response_id is not None:
            return None
        conversation = self.conversation
        if isinstance(conversation, Mapping):
            conversation = conversation.get("id")
            if not isinstance(conversation, str):
                raise RequestError(f"conversation={self.conversation!r}: needs a text 'id'")
        found = conversation or self.outrider.session
        return found or headers.get("x-outrider-session") or headers.get("x-session-id")

    def params(self, tool_use: ToolUse) -> SamplingParams:
        """RequestError naming the field that cannot be honoured."""
        form = {"type": self.format.get("type"), "json_schema": self.format}
        constraints = [*response_format(form, "text.format"), *self.constraints()]
        if constraints and tool_use.is_active:
            name = constraints[0].asked_as
            raise RequestError(f"{name}: would forbid calls of tools; set tool_choice='none'")
        more = the_one(constraints)
        if tool_use.is_forced:
            more = {"json_schema": tool_use.schema()}
        if tool_use.is_active:
            more["skip_special_tokens"] = False  # some models mark calls by special tokens
        logprobs = self.top_logprobs if self.has_logprobs else None
        return self.sampling(max_tokens=self.max_output_tokens, logprobs=logprobs, **more)

    def tool_use(self) -> ToolUse:
        """The functions, and whether the model may or must call one."""
        tools = tuple(_tool(index, tool) for index, tool in enumerate(self.tools))
        choice, name = self.tool_choice, ""
        if isinstance(choice, Mapping):
            name = str(choice.get("name"))
            if choice.get("type") != FUNCTION or not isinstance(choice.get("name"), str):
                raise RequestError(f"tool_choice={choice!r}: only functions can be chosen, by name")
            choice = FUNCTION
        elif choice not in (None, "auto", "none", "required"):
            raise RequestError(f"tool_choice={choice!r}: must be none, auto, required, or a name")
        if choice in (None, AUTO):
            choice = AUTO if tools else NONE
        return ToolUse(tools=tools, choice=choice, name=name, is_parallel=self.parallel_tool_calls)


class Accept(Body):
    """Body of `POST /v1/responses/{id}/accept`."""

    chars: Count
    item_id: str | None = None


def messages_of(items: Items[Mapping[str, Any]]) -> list[Message]:
    """Items of the Responses API as messages of a chat template.

    Raises:
        RequestError: an item of a kind that no template takes, or a malformed one.
    """
    messages: list[Message] = []
    for index, item in enumerate(items):
        name = f"input[{index}]"
        kind = item.get("type", "message")
        if kind == "message":
            messages.append(_message(name, item))
        elif kind == "function_call":
            _add_call(messages, name, item)
        elif kind == "function_call_output":
            output = _texts(f"{name}.output", item.get("output"))
            call_id = _required(name, item, "call_id")
            messages.append({"role": "tool", "tool_call_id": call_id, "content": output})
        else:
            raise RequestError(
                f"{name}.type={kind!r}: must be message, function_call or function_call_output"
            )
    return messages


def _message(name: str, item: Mapping[str, Any]) -> Message:
    role = item.get("role")
    if role not in ROLES:
        raise RequestError(f"{name}.role={role!r}: must be one of {', '.join(ROLES)}")
    return {"role": ROLES[role], "content": _texts(f"{name}.content", item.get("content"))}


def _texts(name: str, content: object) -> str:
    """The text of a content, which is a text or a list of parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RequestError(f"{name}={content!r}: must be a text or a list of parts")
    return "".join(_part(f"{name}[{index}]", part) for index, part in enumerate(content))


def _part(name: str, part: object) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if not isinstance(part, Mapping) or kind not in (*TEXT_PARTS, "refusal"):
        raise RequestError(f"{name}.type={kind!r}: this model reads input_text only")
    return _required(name, part, "refusal" if kind == "refusal" else "text")


def _add_call(messages: list[Message], name: str, item: Mapping[str, Any]) -> None:
    """Calls that follow one another belong to one message."""
    arguments = loaded(_required(name, item, "arguments"))
    function = {"name": _required(name, item, "name"), "arguments": arguments}
    call = {"id": _required(name, item, "call_id"), "type": "function", "function": function}
    if not messages or "tool_calls" not in messages[-1]:
        messages.append({"role": "assistant", "content": "", "tool_calls": []})
    messages[-1]["tool_calls"].append(call)


def _required(name: str, item: Mapping[str, Any], key: str) -> str:
    value = item.get(key)
    if not isinstance(value, str):
        raise RequestError(f"{name}.{key}={value!r}: must be a text")
    return value


def _tool(index: int, tool: Mapping[str, Any]) -> Tool:
    name = f"tools[{index}]"
    if tool.get("type") != "function":
        raise RequestError(f"{name}.type={tool.get('type')!r}: only functions are offered")
    parameters = tool.get("parameters")
    if parameters is not None and not isinstance(parameters, Mapping):
        raise RequestError(f"{name}.parameters={parameters!r}: must be a JSON schema")
    return Tool(
        name=_required(name, tool, "name"),
        description=str(tool.get("description") or ""),
        parameters=parameters,
        strict=bool(tool.get("strict")),
    )
