"""Server-sent events as tests read them, and what the chunks of a chat come to."""

import json
from typing import Any, NamedTuple

import httpx

DONE = "[DONE]"


class Event(NamedTuple):
    """One frame: the name and the data, JSON if it is any."""

    event: str | None
    data: Any


class Streamed(NamedTuple):
    """One choice of a streamed chat."""

    text: str
    calls: list[tuple[str, str]]
    logprobs: list[dict[str, Any]]
    finish_reason: str | None


def frames(response: httpx.Response) -> list[Event]:
    """All frames of a streamed response, comments left out."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    blocks = [block for block in response.text.split("\n\n") if block]
    return [_frame(block) for block in blocks if not block.startswith(":")]


def chunks(response: httpx.Response) -> list[dict[str, Any]]:
    """The chunks of an OpenAI stream, which must end as such streams do."""
    found = [frame.data for frame in frames(response)]
    assert found[-1] == DONE
    assert DONE not in found[:-1]
    return found[:-1]


def put_together(chunks: list[dict[str, Any]]) -> dict[int, Streamed]:
    """What a naive client of chat makes of the chunks; choices by index."""
    found: dict[int, Streamed] = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            old = found.get(choice["index"], Streamed("", [], [], None))
            assert old.finish_reason is None, "nothing follows the end of a choice"
            delta = choice["delta"]
            for call in delta.get("tool_calls", ()):
                _add_call(old.calls, call)
            logprobs = choice["logprobs"]["content"] if choice["logprobs"] else []
            found[choice["index"]] = Streamed(
                old.text + (delta.get("content") or ""),
                old.calls,
                old.logprobs + logprobs,
                choice["finish_reason"],
            )
    return found


def _add_call(calls: list[tuple[str, str]], call: dict[str, Any]) -> None:
    function = call["function"]
    if "id" in call:
        assert call["index"] == len(calls)
        calls.append((function["name"], function["arguments"]))
    else:
        name, arguments = calls[call["index"]]
        calls[call["index"]] = (name, arguments + function["arguments"])


def _frame(block: str) -> Event:
    fields = [line.partition(": ") for line in block.split("\n")]
    event = next((value for name, _, value in fields if name == "event"), None)
    data = "\n".join(value for name, _, value in fields if name == "data")
    return Event(event, data if data == DONE else json.loads(data))
