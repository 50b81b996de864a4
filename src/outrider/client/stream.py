"""Reader: what a client shows of a streamed response, whatever the connection does meanwhile."""

import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from outrider.client.wire import Call, ClientError

DELTA = "response.output_text.delta"
TAIL = "outrider:output_text.tail"
LAST = frozenset(
    {"response.completed", "response.incomplete", "response.cancelled", "response.failed"}
)
Event = Mapping[str, Any]


class Shown(NamedTuple):
    """What to show now.

    Attributes:
        committed: text that never changes again.
        tail: how it is expected to go on; draw it in grey, and replace it by the next one.
        response: the final object in the last state; None before.
    """

    committed: str
    tail: str
    response: dict[str, Any] | None = None


class Reader:
    """Applies the client's rule of `outrider-stream/1` to lines of an event stream.

    Attributes:
        is_done: the terminal event was read.
    """

    def __init__(self) -> None:
        self.is_done = False
        self._shown = Shown("", "")
        self._committed: list[str] = []
        self._last = -1  # sequence number of the last durable event
        self._version = 0  # of the last tail
        self._response_id: str | None = None
        self._data: list[str] = []  # lines of the event being read
        self._has_resumed = False

    def take(self, line: str) -> Iterator[Shown]:
        """The state after this line, if it is another one.

        Raises:
            ClientError: the response failed.
        """
        if line.startswith("data:"):
            self._data.append(line.removeprefix("data:").removeprefix(" "))
        elif not line and self._data:
            text, self._data = "\n".join(self._data), []
            yield from self._apply(text)

    def resume(self, cause: Exception | None) -> Call:
        """How to go on after the connection broke: once, with what comes after the last event.

        Raises:
            ClientError: it broke before, or before the response had a name.
        """
        if self._has_resumed or self._response_id is None:
            raise ClientError(None, f"the stream broke off: {cause or 'no last event'}") from cause
        self._has_resumed = True
        self._data = []
        query: dict[str, str | int] = {"stream": "true", "starting_after": self._last}
        return Call(method="GET", path=f"/v1/responses/{self._response_id}", query=query)

    def _apply(self, text: str) -> Iterator[Shown]:
        event = _parsed(text)
        shown = self._shown._replace(tail=self._tail_after(event))
        if event.get("type") == DELTA:
            self._committed.append(event["delta"])
            shown = shown._replace(committed="".join(self._committed))
        if event.get("type") in LAST:
            self.is_done = True
            shown = shown._replace(response=event["response"])
        if shown != self._shown:
            self._shown = shown
            yield shown

    def _tail_after(self, event: Event) -> str:
        """A durable event voids the tail; a newer tail that begins where we are replaces it."""
        if "sequence_number" in event:
            self._last = event["sequence_number"]
            self._response_id = self._response_id or event.get("response", {}).get("id")
            return ""
        is_tail = event.get("type") == TAIL
        if is_tail and event["base"] == self._last and event["v"] > self._version:
            self._version = event["v"]
            return str(event["text"])
        return self._shown.tail


def _parsed(text: str) -> Event:
    """An event; ClientError for one that says that the response failed."""
    try:
        event = json.loads(text)
    except ValueError:
        event = None
    if not isinstance(event, dict):
        return {}  # "[DONE]", or what later versions may send
    if event.get("type") == "response.failed":
        told = event["response"].get("error") or {}
    elif event.get("type") == "error" or ("error" in event and "type" not in event):
        told = event.get("error") or event
    else:
        return event
    raise ClientError(None, str(told.get("message", "the response failed")), told.get("code"))
