"""ToolUse: the functions of one request, what a prompt says of them, what a grammar forces."""

import json
from collections.abc import Mapping, Sequence as Items
from dataclasses import dataclass
from typing import Any, NamedTuple

from outrider.errors import RequestError
from outrider.serve.call_formats import PARSERS, ForcedArgumentsParser, ForcedCallsParser
from outrider.serve.call_parser import CallParser

AUTO, NONE, REQUIRED, FUNCTION = "auto", "none", "required", "function"


class Tool(NamedTuple):
    """A function that the model may call; `parameters` is a JSON schema."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] | None = None
    strict: bool = False

    def as_function(self) -> dict[str, Any]:
        """As chat templates and the OpenAI wire have it."""
        function: dict[str, Any] = {"name": self.name, "description": self.description}
        function["parameters"] = self.schema
        return {"type": "function", "function": function}

    @property
    def schema(self) -> dict[str, Any]:
        return dict(self.parameters or {"type": "object", "properties": {}})


@dataclass(frozen=True, kw_only=True)
class ToolUse:
    """The tools of one request.

    Attributes:
        choice: "none", "auto", "required", or "function" with the function's `name`.
        is_parallel: whether one answer may hold several calls.
    """

    tools: tuple[Tool, ...] = ()
    choice: str = NONE
    name: str = ""
    is_parallel: bool = True

    def __post_init__(self) -> None:
        names = [tool.name for tool in self.tools]
        if len(set(names)) < len(names):
            raise RequestError(f"tools={names!r}: give each function a name of its own")
        if self.choice != NONE and not names:
            raise RequestError(f"tool_choice={self.choice!r}: there are no tools; give tools=[...]")
        if self.choice == FUNCTION and self.name not in names:
            raise RequestError(
                f"tool_choice={self.name!r}: no such tool; use one of {', '.join(names)}"
            )

    @property
    def is_active(self) -> bool:
        """Whether the answer may be a call."""
        return self.choice != NONE

    @property
    def is_forced(self) -> bool:
        """Whether the answer must be a call: a grammar sees to it."""
        return self.choice in (REQUIRED, FUNCTION)

    def schema(self) -> dict[str, Any]:
        """What a forced answer must match: the arguments alone, or a list of calls."""
        if self.choice == FUNCTION:
            return next(tool.schema for tool in self.tools if tool.name == self.name)
        calls = [_call_schema(tool) for tool in self.tools]
        found: dict[str, Any] = {"type": "array", "items": {"anyOf": calls}, "minItems": 1}
        if not self.is_parallel:
            found["maxItems"] = 1
        return _hoist_definitions(found, [tool.schema for tool in self.tools])

    def parser(self, template: str) -> CallParser:
        """For the answer to this request, by a model with this chat template."""
        if self.choice == FUNCTION:
            return ForcedArgumentsParser(self.name)
        if self.choice == REQUIRED:
            return ForcedCallsParser()
        names = frozenset(tool.name for tool in self.tools)
        return PARSERS[call_format(template)](names)


def call_format(template: str) -> str:
    """How models with this chat template write calls: "hermes", "mistral" or "llama3_json".

    Raises:
        RequestError: they write them in a way that is not read here.
    """
    if "[TOOL_CALLS]" in template:
        return "mistral"
    if "<function=" in template:
        raise RequestError(
            "tool_choice='auto': this model writes calls as <function=...>, which is not read "
            "here; use tool_choice 'required' or name a function"
        )
    if "<tool_call>" in template or "<|python_tag|>" not in template:
        return "hermes"
    return "llama3_json"


def knows_tools(template: str) -> bool:
    """Whether a chat template tells the model of `tools` by itself."""
    return "tools" in template


def instructions(tools: Items[Tool]) -> str:
    """What a model is told of tools where its chat template does not: calls as Hermes has them."""
    listed = "\n".join(json.dumps(tool.as_function(), ensure_ascii=False) for tool in tools)
    return (
        "These functions can be called, each described by a line of JSON:\n"
        f"<tools>\n{listed}\n</tools>\n"
        "To call one, write its name and arguments as JSON between these tags:\n"
        '<tool_call>\n{"name": "...", "arguments": {...}}\n</tool_call>'
    )


def _call_schema(tool: Tool) -> dict[str, Any]:
    arguments = {k: v for k, v in tool.schema.items() if k not in ("$defs", "definitions")}
    return {
        "type": "object",
        "properties": {"name": {"const": tool.name}, "arguments": arguments},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def _hoist_definitions(found: dict[str, Any], schemas: Items[Mapping[str, Any]]) -> dict[str, Any]:
    """Definitions go to the top, where references look for them; two of one name must agree."""
    for key in ("$defs", "definitions"):
        merged: dict[str, Any] = {}
        for schema in schemas:
            for name, definition in dict(schema.get(key, {})).items():
                if merged.setdefault(name, definition) != definition:
                    raise RequestError(
                        f"tools: two schemas define {key}/{name} differently; rename one of them"
                    )
        if merged:
            found[key] = merged
    return found
