"""prompt_ids: a conversation through the model's chat template, told of tools one way or other."""

import json
from collections.abc import Mapping, Sequence as Items
from typing import Any

from outrider.errors import RequestError
from outrider.serve.tools import ToolUse, instructions, knows_tools
from outrider.tokenizer import Tokenizer

Message = dict[str, Any]
TAKEN = ("messages", "tools", "tokenize", "add_generation_prompt", "conversation", "return_dict")


def prompt_ids(
    tokenizer: Tokenizer,
    messages: Items[Message],
    tool_use: ToolUse,
    variables: Mapping[str, Any] | None = None,
) -> tuple[int, ...]:
    """Token ids up to where the assistant's answer begins.

    Args:
        variables: further names that the template reads.

    Raises:
        TokenizerError: there is no template. RequestError: it refuses the conversation.
    """
    given = dict(variables or {})
    for name in TAKEN:
        if name in given:
            raise RequestError(f"chat_template_kwargs: {name!r} is not yours to set; drop it")
    told, more = with_tools(messages, tool_use, template_of(tokenizer))
    return tuple(tokenizer.apply_chat_template(told, {**given, **more}))


def with_tools(
    messages: Items[Message], tool_use: ToolUse, template: str
) -> tuple[list[Message], dict[str, Any]]:
    """The messages, and the template's variables, that tell the model of tools.

    A template that knows no tools gets them, earlier calls and their results as plain text.
    """
    if knows_tools(template):
        tools = [tool.as_function() for tool in tool_use.tools]
        return list(messages), {"tools": tools} if tools and tool_use.is_active else {}
    told = [_plain(message) for message in messages]
    if tool_use.is_active:
        told = _instructed(told, instructions(tool_use.tools))
    return told, {}


def template_of(tokenizer: Tokenizer) -> str:
    """The text of the chat template; "" without one. Of several, all of them."""
    template = getattr(tokenizer.backend, "chat_template", None)
    if isinstance(template, Mapping):
        return "\n".join(str(text) for text in template.values())
    return template if isinstance(template, str) else ""


def _plain(message: Message) -> Message:
    """Without members that only a template which knows tools can read."""
    if message["role"] == "tool":
        return {
            "role": "user",
            "content": f"<tool_response>\n{message['content']}\n</tool_response>",
        }
    if "tool_calls" not in message:
        return message
    rest = {key: value for key, value in message.items() if key != "tool_calls"}
    calls = [_call_text(call["function"]) for call in message["tool_calls"]]
    return {**rest, "content": "\n".join([t for t in (rest["content"], *calls) if t])}


def _call_text(function: Mapping[str, Any]) -> str:
    call = {"name": function["name"], "arguments": function["arguments"]}
    return f"<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>"


def _instructed(messages: list[Message], text: str) -> list[Message]:
    """With a text at the end of the system's message, which comes first."""
    if messages[0]["role"] == "system":
        first = {**messages[0], "content": f"{messages[0]['content']}\n\n{text}"}
        return [first, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]
