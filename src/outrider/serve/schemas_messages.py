"""Bodies of /v1/messages, and their messages and tools as the rest reads them."""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from outrider.errors import RequestError
from outrider.request import SamplingParams, SpeculationParams
from outrider.serve.schemas_chat import texts
from outrider.serve.schemas_generation import (
    OutriderOptions,
    Refusal,
    SiftedBody,
    seed_of,
    the_speculation,
)
from outrider.serve.tools import AUTO, FUNCTION, NONE, REQUIRED, Tool, ToolUse

Content = str | list[dict[str, Any]]
CHOICES = {"auto": AUTO, "any": REQUIRED, "tool": FUNCTION, "none": NONE}


class InputMessage(BaseModel):
    """One message of the conversation."""

    model_config = ConfigDict(extra="forbid", strict=True)

    role: Literal["user", "assistant", "system"]
    content: Content


class InputTool(BaseModel):
    """A function that the model may call."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.:-]{1,128}$")]
    description: str = ""
    input_schema: dict[str, Any]
    type: Literal["custom"] | None = None
    cache_control: dict[str, Any] | None = None
    strict: bool | None = None


class ToolChoice(BaseModel):
    """Whether the model may or must call a function."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["auto", "any", "tool", "none"]
    name: str = ""
    disable_parallel_tool_use: bool = False


class CountBody(SiftedBody):
    """Body of `POST /v1/messages/count_tokens`: what becomes the prompt."""

    refused: ClassVar[Mapping[str, Refusal]] = {
        "thinking": Refusal("not offered; leave it out", ({"type": "disabled"},)),
        "mcp_servers": Refusal("this server calls no other; use tools", ([],)),
        "container": Refusal("not offered; leave it out"),
        "context_management": Refusal("not offered; send what shall be read"),
        "output_config": Refusal("not offered; use /v1/chat/completions with response_format"),
        "output_format": Refusal("not offered; use /v1/chat/completions with response_format"),
    }
    ignored: ClassVar[frozenset[str]] = frozenset({"metadata", "service_tier", "cache_control"})

    model: str | None = None
    messages: Annotated[list[InputMessage], Field(min_length=1)]
    system: Content | None = None
    tools: list[InputTool] = Field(default_factory=list)
    tool_choice: ToolChoice | None = None

    def tool_use(self) -> ToolUse:
        """The functions, and whether the model may or must call one."""
        tools = tuple(
            Tool(name=tool.name, description=tool.description, parameters=tool.input_schema)
            for tool in self.tools
        )
        given = self.tool_choice or ToolChoice(type="auto")
        choice = CHOICES[given.type] if tools or given.type in ("any", "tool") else NONE
        is_parallel = not given.disable_parallel_tool_use
        return ToolUse(tools=tools, choice=choice, name=given.name, is_parallel=is_parallel)

    def template_messages(self) -> list[dict[str, Any]]:
        """As chat templates read them.

        Raises:
            RequestError: a block that is no text, or a conversation that ends with an answer.
        """
        if self.messages[-1].role == "assistant":
            raise RequestError(
                f"messages.{len(self.messages) - 1}: an answer that was begun is not continued "
                "here; end with a message of the user, or use /v1/completions"
            )
        found = []
        if self.system:
            found.append({"role": "system", "content": texts("system", self.system)})
        for index, message in enumerate(self.messages):
            found += _template_messages(f"messages.{index}.content", message)
        return found


class MessagesBody(CountBody):
    """Body of `POST /v1/messages`."""

    max_tokens: Annotated[int, Field(ge=1)]
    stop_sequences: list[str] = Field(default_factory=list)
    stream: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    speculation: dict[str, Any] | str | None = None
    outrider: OutriderOptions = OutriderOptions()

    def params(self, tool_use: ToolUse) -> SamplingParams:
        """RequestError naming the field that cannot be honoured."""
        more: dict[str, Any] = {"json_schema": tool_use.schema()} if tool_use.is_forced else {}
        return SamplingParams(
            max_tokens=self.max_tokens,
            stop=tuple(self.stop_sequences),
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            seed=None if self.seed is None else seed_of(self.seed),
            skip_special_tokens=not tool_use.is_active,
            **more,
        )

    def asked_speculation(self) -> SpeculationParams | None:
        """None where the body says nothing of it."""
        return the_speculation(self.speculation, self.outrider.speculation)


def _template_messages(name: str, message: InputMessage) -> Iterator[dict[str, Any]]:
    """Results of tools are messages of their own; calls belong to the message they stand in."""
    content = message.content
    blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
    said: list[dict[str, Any]] = []
    calls = []
    for index, block in enumerate(blocks):
        kind = block.get("type")
        if kind == "tool_result":
            yield _result(f"{name}.{index}", block)
        elif kind == "tool_use":
            calls.append(_call(f"{name}.{index}", block))
        elif kind not in ("thinking", "redacted_thinking"):  # never read again by the model
            said.append(block)
    text = texts(name, said)
    if calls:
        yield {"role": message.role, "content": text, "tool_calls": calls}
    elif said or not blocks:
        yield {"role": message.role, "content": text}


def _result(name: str, block: Mapping[str, Any]) -> dict[str, Any]:
    content = block.get("content", "")
    if not isinstance(content, str | list):
        raise RequestError(f"{name}.content={content!r}: must be a text or a list of blocks")
    text = texts(f"{name}.content", _mappings(name, content))
    return {"role": "tool", "tool_call_id": str(block.get("tool_use_id", "")), "content": text}


def _mappings(name: str, content: str | list[Any]) -> str | list[dict[str, Any]]:
    if isinstance(content, list) and not all(isinstance(block, dict) for block in content):
        raise RequestError(f"{name}.content: must be a text or a list of blocks")
    return content


def _call(name: str, block: Mapping[str, Any]) -> dict[str, Any]:
    called, given = block.get("name"), block.get("input", {})
    if not isinstance(called, str) or not isinstance(given, Mapping):
        raise RequestError(f"{name}: needs a name, and an input that is an object")
    function = {"name": called, "arguments": dict(given)}
    return {"id": str(block.get("id", "")), "type": "function", "function": function}
