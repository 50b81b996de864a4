"""ResponseWriter: from the engine's events to those of the Responses API, in OpenAI's order."""

from collections.abc import Callable, Iterable, Mapping, Sequence as Items
from copy import deepcopy
from typing import Any

from outrider.serve.calls import CallArguments, CallStart, Piece, Text
from outrider.serve.errors import ApiError
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
            that asked; each has a delta of its own, be it an empty one, once an item is open. Of
            an answer that never says anything they come with the last event.
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
        self._steps: list[dict[str, Any]] = []  # that no delta has told yet
        self._item: dict[str, Any] | None = None
        self.is_closed = False  # whether the last event was told
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
            self._steps.append(self._step(event))
        for piece in self._pieces(event):
            self._take(piece)
        if self._steps and self._item is not None:
            self._tell_delta("")

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

    def end(self, status: str) -> None:
        """All events but the last one; `close` is to follow."""
        if self._item is None and not self.response["output"] and status == "completed":
            self._open_message()
        if self._steps and self._item is not None:
            self._tell_delta("")
        self._close_item("completed" if status == "completed" else "incomplete")

    def close(self, status: str, changes: Mapping[str, Any]) -> None:
        """The last events: what is open ends, then the whole response in its final state.

        Args:
            status: "completed", "incomplete", "failed" or "cancelled".
            changes: further members of the final object, such as `usage`.
        """
        self.end(status)
        self.response |= {"status": status, **changes}
        kind = "incomplete" if status == "cancelled" else status
        steps = {"outrider": {"steps": self._steps}} if self._steps else {}
        self.is_closed = True
        self._put({"type": f"response.{kind}", "response": self.response, **steps})

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
        self._part["text"] += text
        self._tell_delta(text)

    def _say_arguments(self, piece: CallArguments) -> None:
        assert self._item is not None, "arguments follow the start of their call"
        self._item["arguments"] += piece.text
        self._tell_delta(piece.text)

    def _tell_delta(self, text: str) -> None:
        """More of the open item; of the steps that wait, all but the last had no text."""
        steps, self._steps = self._steps, []
        for step in steps[:-1]:
            self._tell_step("", step)
        self._tell_step(text, steps[-1] if steps else None)

    def _tell_step(self, text: str, step: dict[str, Any] | None) -> None:
        more = {} if step is None else {"outrider": {"step": step}}
        if not self._is_message:
            self._tell("response.function_call_arguments.delta", delta=text, **more)
            return
        logprobs, self._unsaid = self._unsaid, []
        self._part["logprobs"] += logprobs
        kind = "response.output_text.delta"
        self._tell(kind, content_index=0, delta=text, logprobs=logprobs, **more)

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
    told before are cut off, of steps the tokens; other events are told once. If the text comes out
    otherwise, all that is passed on is the last event, whose output is what was told.

    Args:
        told: the durable events that came before, in order.
        put: takes what is new.

    Raises:
        ApiError: from a call: the answer is not the one that was told.
    """

    def __init__(self, told: Items[Mapping[str, Any]], put: Put) -> None:
        self._put = put
        self._told = Told(told)
        self._marks = {_mark(event) for event in told}
        self._num_chars: dict[str, int] = {}  # of each item, how many came again
        self._num_items = 0  # that came again
        self._num_tokens = sum(len(_step(event).get("tokens", ())) for event in told)
        self._differs = False

    def __call__(self, event: Mapping[str, Any]) -> None:
        if self._differs:
            if "response" in event:
                event["response"]["output"] = self._told.output
                self._put(event)
        elif "delta" in event:
            text, step = self._new_text(event), self._new_step(_step(event))
            if text or step:
                rest = {key: value for key, value in event.items() if key != "outrider"}
                self._put({**rest, "delta": text, **({"outrider": {"step": step}} if step else {})})
        else:
            self._compare(event)
            if _mark(event) not in self._marks:
                self._put(event)

    def end(self) -> None:
        """The answer is there; ApiError if more than that was told."""
        self._require(self._num_items >= len(self._told.output))
        for item, text in self._told.texts.items():
            self._require(self._num_chars.get(item, 0) >= len(text))

    def _compare(self, event: Mapping[str, Any]) -> None:
        """An item begins as it did, and does not end before what was told of it."""
        if event["type"] == "response.output_item.added":
            known = self._told.output[event["output_index"] : event["output_index"] + 1]
            self._require(all(_name_of(item) == _name_of(event["item"]) for item in known))
            self._num_items += 1
        elif event["type"].endswith(".done"):
            item = event["item"]["id"] if "item" in event else event["item_id"]
            self._require(self._num_chars.get(item, 0) >= len(self._told.texts.get(item, "")))

    def _new_text(self, event: Mapping[str, Any]) -> str:
        delta: str = event["delta"]
        item = event["item_id"]
        start = self._num_chars.get(item, 0)
        known = self._told.texts.get(item, "")[start : start + len(delta)]
        new = delta[len(known) :]
        self._require(delta.startswith(known) and not (new and item in self._told.ended))
        self._num_chars[item] = start + len(delta)
        return new

    def _require(self, is_same: bool) -> None:
        if not is_same:
            self._differs = True
            message = (
                "made again after a restart, the answer was not what was told of it: ask again"
            )
            raise ApiError(500, message, code="answer_differs")

    def _new_step(self, step: Mapping[str, Any]) -> dict[str, Any]:
        """A step of which only the end is new has no tree: it would show what is known."""
        num_known = self._num_tokens
        if not num_known or not step:
            return dict(step)
        tokens = step["tokens"]
        self._num_tokens = max(num_known - len(tokens), 0)
        if num_known >= len(tokens):
            return {}
        rest = {key: value for key, value in step.items() if key != "tree"}
        accepted = max(step["accepted"] - num_known, 0)
        return {**rest, "tokens": tokens[num_known:], "accepted": accepted}


class Told:
    """What the events of a response say of its output.

    Attributes:
        output: items as far as they were told. ended: ids of those that were told to their end.
        texts: of each item what its deltas say.
    """

    def __init__(self, events: Iterable[Mapping[str, Any]]) -> None:
        self.output: list[dict[str, Any]] = []
        self.ended: set[str] = set()
        self.texts: dict[str, str] = {}
        for event in events:
            self._take(event)

    def _take(self, event: Mapping[str, Any]) -> None:
        kind = event["type"]
        if "delta" in event:
            item = event["item_id"]
            self.texts[item] = self.texts.get(item, "") + event["delta"]
        if kind == "response.output_item.added":
            self.output.append({**deepcopy(event["item"]), "status": "incomplete"})
        elif kind in ("response.output_text.done", "response.function_call_arguments.done"):
            self.ended.add(event["item_id"])
        elif kind == "response.output_item.done":
            self.output[event["output_index"]] = event["item"]
        elif kind == "response.content_part.added":
            self.output[event["output_index"]]["content"].append(deepcopy(event["part"]))
        elif kind == "response.function_call_arguments.delta":
            self.output[event["output_index"]]["arguments"] += event["delta"]
        elif kind == "response.output_text.delta":
            part = self.output[event["output_index"]]["content"][0]
            part["text"] += event["delta"]
            part["logprobs"] += event["logprobs"]


def _name_of(item: Mapping[str, Any]) -> tuple[str, str | None]:
    """What an item is, before any of its text."""
    return item["id"], item.get("name")


def _step(event: Mapping[str, Any]) -> Mapping[str, Any]:
    """The step that came with a delta; empty without one."""
    step: Mapping[str, Any] = event.get("outrider", {}).get("step", {})
    return step


def _mark(event: Mapping[str, Any]) -> tuple[str, int]:
    """What tells apart events that come once per response or item."""
    return str(event["type"]), int(event.get("output_index", -1))
