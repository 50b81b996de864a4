"""ResponseWriter: from the engine's events to those of the Responses API, in OpenAI's order."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from outrider.serve.calls import CallArguments, CallStart, Piece, Text
from outrider.stream.events import Committed, Tail

TAIL_EVENT = "outrider:output_text.tail"
Put = Callable[[Mapping[str, Any]], object]
Pieces = Callable[[Committed], list[Piece]]
Logprobs = Callable[[Committed], list[dict[str, Any]]]
Step = Callable[[Committed], dict[str, Any]]


class ResponseWriter:
    """Grows a response object and tells of each change; `put` must serialise at once.

    An answer is one message, or messages and function calls in turns where `pieces` finds them.

    Args:
        response: the object as it is created, with `output` empty; grown in place.
        put: takes durable events. put_tail: takes tails; None where the client wants none.
        pieces: reads content and function calls out of the text.
        logprobs: what is reported beside a delta. step: of what each commit was made, for clients
            that asked; it then comes with a delta, be it an empty one.
    """

    def __init__(
        self,
        response: dict[str, Any],
        put: Put,
        put_tail: Put | None = None,
        *,
        pieces: Pieces,
        logprobs: Logprobs | None = None,
        step: Step | None = None,
    ) -> None:
        self.response = response
        self._put = put
        self._put_tail = put_tail
        self._pieces = pieces
        self._logprobs = logprobs
        self._step = step
        self._unsaid: list[dict[str, Any]] = []  # logprobs of tokens whose text is held back
        self._steps: dict[str, Any] = {}  # members of the next delta
        self._item: dict[str, Any] | None = None
        self._stem = str(response["id"]).partition("_")[2]

    def open(self) -> None:
        """The events before the first token."""
        self._put({"type": "response.created", "response": self.response})
        self._put({"type": "response.in_progress", "response": self.response})

    def take(self, event: Committed) -> None:
        """The events of committed text; text that is held back comes with a later one."""
        if self._logprobs is not None:
            self._unsaid += self._logprobs(event)
        if self._step is not None:
            self._steps = {"outrider": {"step": self._step(event)}}
        for piece in self._pieces(event):
            self._take(piece)
        if self._steps and self._is_message:
            self._say("")

    def take_tail(self, tail: Tail) -> bool:
        """Tells what is expected to follow an open message; says whether anybody was told."""
        if self._put_tail is None or not self._is_message:
            return False
        self._put_tail(
            {
                "type": TAIL_EVENT,
                **self._place(),
                "content_index": 0,
                "committed_chars": len(self._part["text"]),
                "text": tail.text,
                "n_tokens": len(tail.token_ids),
                "stability": tail.stability,
                "source": tail.source,
                "v": tail.version,
            }
        )
        return True

    def close(self, status: str, changes: Mapping[str, Any]) -> None:
        """The last events: what is open ends, then the whole response in its final state.

        Args:
            status: "completed", "incomplete", "failed" or "cancelled".
            changes: further members of the final object, such as `usage`.
        """
        if self._item is None and not self.response["output"] and status == "completed":
            self._open_message()
        self._close_item("completed" if status == "completed" else "incomplete")
        self.response |= {"status": status, **changes}
        kind = "incomplete" if status == "cancelled" else status
        self._put({"type": f"response.{kind}", "response": self.response})

    @property
    def _is_message(self) -> bool:
        """Whether a message is open."""
        return self._item is not None and self._item["type"] == "message"

    def _take(self, piece: Piece) -> None:
        if isinstance(piece, Text):
            self._say(piece.text)
        elif isinstance(piece, CallStart):
            self._open_call(piece.name)
        else:
            self._say_arguments(piece)

    def _say(self, text: str) -> None:
        if not self._is_message:
            self._close_item("completed")
            self._open_message()
        step, self._steps = self._steps, {}
        logprobs, self._unsaid = self._unsaid, []
        self._part["text"] += text
        self._part["logprobs"] += logprobs
        kind = "response.output_text.delta"
        self._tell(kind, content_index=0, delta=text, logprobs=logprobs, **step)

    def _say_arguments(self, piece: CallArguments) -> None:
        assert self._item is not None, "arguments follow the start of their call"
        self._item["arguments"] += piece.text
        self._tell("response.function_call_arguments.delta", delta=piece.text)

    def _open_message(self) -> None:
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        self._open_item({"type": "message", "role": "assistant", "content": []}, "msg")
        assert self._item is not None
        self._item["content"].append(part)
        self._tell("response.content_part.added", content_index=0, part=part)

    def _open_call(self, name: str) -> None:
        self._close_item("completed")
        call_id = f"call_{self._stem}_{len(self.response['output'])}"
        call = {"type": "function_call", "call_id": call_id, "name": name, "arguments": ""}
        self._open_item(call, "fc")

    def _open_item(self, item: dict[str, Any], prefix: str) -> None:
        """Ids follow from the response's, so that an answer written again has the same ones."""
        output = self.response["output"]
        self._item = {"id": f"{prefix}_{self._stem}_{len(output)}", "status": "in_progress", **item}
        output.append(self._item)
        self._put(
            {
                "type": "response.output_item.added",
                "output_index": len(output) - 1,
                "item": self._item,
            }
        )

    def _close_item(self, status: str) -> None:
        item = self._item
        if item is None:
            return
        if item["type"] == "message":
            part = self._part
            part["logprobs"] += self._unsaid
            self._unsaid = []
            text, logprobs = part["text"], part["logprobs"]
            self._tell("response.output_text.done", content_index=0, text=text, logprobs=logprobs)
            self._tell("response.content_part.done", content_index=0, part=part)
        else:
            name, arguments = item["name"], item["arguments"]
            self._tell("response.function_call_arguments.done", name=name, arguments=arguments)
        item["status"] = status
        index = len(self.response["output"]) - 1
        self._put({"type": "response.output_item.done", "output_index": index, "item": item})
        self._item = None

    @property
    def _part(self) -> dict[str, Any]:
        """The text of the open message."""
        assert self._item is not None, "a message is open"
        part: dict[str, Any] = self._item["content"][0]
        return part

    def _tell(self, kind: str, **members: Any) -> None:
        self._put({"type": kind, **self._place(), **members})

    def _place(self) -> dict[str, Any]:
        assert self._item is not None, "an item is open"
        index = len(self.response["output"]) - 1
        return {"item_id": self._item["id"], "output_index": index}


class Rewrite:
    """Takes the events of an answer that is made again and passes on what was not told before.

    The same seed gives the same text, but perhaps in other portions: of deltas the characters
    told before are cut off, other events are told once.

    Args:
        told: the durable events that came before, in order.
        put: takes what is new.
    """

    def __init__(self, told: Iterable[Mapping[str, Any]], put: Put) -> None:
        self._put = put
        self._marks = {_mark(event) for event in told}
        self._num_chars: dict[str, int] = {}
        for event in told:
            if "delta" in event:
                item = event["item_id"]
                self._num_chars[item] = self._num_chars.get(item, 0) + len(event["delta"])

    def __call__(self, event: Mapping[str, Any]) -> None:
        if "delta" in event:
            delta: str = event["delta"]
            item = event["item_id"]
            num_known = self._num_chars.get(item, 0)
            self._num_chars[item] = max(num_known - len(delta), 0)
            if new := delta[num_known:]:
                self._put({**event, "delta": new})
        elif _mark(event) not in self._marks:
            self._put(event)


def _mark(event: Mapping[str, Any]) -> tuple[str, int]:
    """What tells apart events that come once per response or item."""
    return str(event["type"]), int(event.get("output_index", -1))
