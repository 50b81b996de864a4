"""Units: commits held back to whole words, sentences or lines."""

import re
from dataclasses import dataclass, field
from itertools import chain

from outrider.stream.events import Committed

CJK = r"\u3000-\u30ff\u3400-\u9fff\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff"
CLOSERS = r"[\"')\]}\u2019\u201d\u00bb\u300d\u300f\uff09]*"
ENDS = {  # what ends a unit, to its last character
    "word": re.compile(rf"\s|[{CJK}]"),
    "sentence": re.compile(rf"[.!?\u2026]+{CLOSERS}\s+|[\u3002\uff01\uff1f]+{CLOSERS}|\n\s*"),
    "line": re.compile(r"\n"),
}
LOOK_BACK = 32  # an end may have begun in text that was held back, but not long ago


@dataclass(eq=False)
class Units:
    """A filter over the `Committed` events of one completion.

    Text goes out up to the end of its last whole unit, and all of it with the finish reason.
    A word ends with white space, or with any ideograph or kana; a sentence with its closing mark
    and the white space behind it (an abbreviation may end one early), or with its line.

    Tokens never go out before their text: an event's token ids, log-probabilities and counts come
    with the last piece of its text, and pieces before that have none. So texts and ids still join
    to the output, `offset` still counts the tokens sent before, and counts still add up, though
    `num_from_draft` then counts drafted tokens wherever they stand.

    Attributes:
        unit: out of `request.COMMIT_UNITS`; "token" holds nothing back.
        text: what is held back.
    """

    unit: str = "token"
    text: str = ""
    _events: list[Committed] = field(default_factory=list)

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Tokens held back; the text of the first of them may have gone out."""
        return tuple(chain.from_iterable(event.token_ids for event in self._events))

    def take(self, event: Committed) -> Committed | None:
        """What may go out now that the event has come."""
        if self.unit == "token":
            return event
        start = max(0, len(self.text) - LOOK_BACK)
        self.text += event.text
        self._events.append(event)
        end = len(self.text) if event.finish_reason is not None else self._end(start)
        is_nothing = not end and event.finish_reason is None
        return None if is_nothing else self._release(end)

    def _end(self, start: int) -> int:
        """Where the last whole unit ends; 0 if there is none."""
        end = 0
        for found in ENDS[self.unit].finditer(self.text, start):
            end = found.end()
        return end

    def _release(self, end: int) -> Committed:
        text, self.text = self.text[:end], self.text[end:]
        count, left = 0, end
        while count < len(self._events) and len(self._events[count].text) <= left:
            left -= len(self._events[count].text)
            count += 1
        whole, self._events = self._events[:count], self._events[count:]
        if left:
            first = self._events[0]
            self._events[0] = first._replace(text=first.text[left:])
        return _joined(whole, text) if whole else _piece(self._events[0], text)


def _joined(events: list[Committed], text: str) -> Committed:
    """One event in place of several; the last may be the completion's last."""
    return events[-1]._replace(
        offset=events[0].offset,
        token_ids=tuple(chain.from_iterable(event.token_ids for event in events)),
        text=text,
        num_drafted=sum(event.num_drafted for event in events),
        num_accepted=sum(event.num_accepted for event in events),
        num_from_draft=sum(event.num_from_draft for event in events),
        logprobs=tuple(chain.from_iterable(event.logprobs for event in events)),
        tree=events[0].tree if len(events) == 1 else None,
    )


def _piece(event: Committed, text: str) -> Committed:
    """The first part of an event's text, without its tokens."""
    return Committed(event.request_id, event.index, event.offset, text=text, source=event.source)
