"""transcript: what was said in a session, read from its token log and from the responses in it."""

from array import array
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any, NamedTuple

from outrider.errors import SessionNotFound
from outrider.serve.response_store import Stored
from outrider.serve.schemas_responses import messages_of
from outrider.serve.session_service import Sessions
from outrider.session.records import Head
from outrider.tokenizer import Tokenizer


class Said(NamedTuple):
    """One turn of a session.

    Attributes:
        role: "user", "assistant", or "log" for tokens that belong to no response.
        begin, end: length of the log before it, and with it.
        response: whose answer it is.
    """

    role: str
    text: str
    begin: int
    end: int
    response: Stored | None = None

    def as_dict(self) -> dict[str, Any]:
        """As the studio gets it; of an answer also what it cost and what was promised."""
        told: dict[str, Any] = {"role": self.role, "text": self.text}
        told |= {"begin": self.begin, "end": self.end}
        if self.response is None:
            return told
        body = self.response.body
        names = ("usage", "metrics", "outrider")
        return {**told, "id": self.response.id, **{name: body.get(name) for name in names}}


class Transcript(NamedTuple):
    """All turns up to a head."""

    head: Head
    turns: list[Said]


async def transcript(
    kept: Sessions, tokenizer: Tokenizer | None, tenant: str, session: str
) -> Transcript:
    """What was said up to where the session is now, before it was forked too.

    An answer that a rewind or a fork has cut is told as far as it stands. Without a tokenizer, or
    with one that the session was not made with, what is known by its tokens only has no text.

    Raises:
        SessionNotFound, SessionStorageError.
    """
    found = await kept.find(tenant, session)
    if not kept.speaks(found):
        tokenizer = None
    log = await kept.call(kept.log.tokens, tenant, found.head)
    answers = await _answers(kept, tenant, found.id, log)
    heads = await kept.call(kept.log.heads, tenant, found.id)
    shared = [await _num_shared(kept, tenant, log, head) for head in heads]
    marks = [n for head, n in zip(heads, shared, strict=True) if n == head.num_tokens]
    return Transcript(found.head, list(_turns(log, answers, marks, tokenizer)))


async def _answers(
    kept: Sessions, tenant: str, session: str, log: "array[int]"
) -> list[tuple[Stored, int]]:
    """Answers of the log in order, each with its end; of rivals the one that reaches furthest."""
    best: dict[int, tuple[Stored, int]] = {}
    family = await kept.call(kept.log.branches, tenant, session)
    for stored in kept.responses.of_sessions(tenant, family):
        with suppress(SessionNotFound):  # it failed, or its tokens were dropped
            head = await kept.call(kept.log.head_of_response, tenant, stored.id)
            end = await _num_shared(kept, tenant, log, head)
            rival = best.get(stored.num_prompt)
            if end > stored.num_prompt and (rival is None or end > rival[1]):
                best[stored.num_prompt] = stored, end
    return [best[place] for place in sorted(best)]


def _turns(
    log: "array[int]",
    answers: Iterable[tuple[Stored, int]],
    marks: Iterable[int],
    tokenizer: Tokenizer | None,
) -> Iterator[Said]:
    place = 0
    for stored, end in answers:
        if stored.num_prompt < place:
            continue
        before = max([place, *(mark for mark in marks if place < mark < stored.num_prompt)])
        if before > place:  # appended, with no answer to it
            yield Said("log", _decoded(tokenizer, log[place:before]), place, before)
        yield Said("user", _asked(stored), before, stored.num_prompt)
        is_whole = end == stored.num_tokens
        text = _answered(stored) if is_whole else ""
        text = text or _decoded(tokenizer, log[stored.num_prompt : end])
        yield Said("assistant", text, stored.num_prompt, end, stored)
        place = end
    if place < len(log):
        yield Said("log", _decoded(tokenizer, log[place:]), place, len(log))


async def _num_shared(kept: Sessions, tenant: str, log: "array[int]", head: Head) -> int:
    """Tokens from the beginning on that a head has in common with the log."""
    tokens = await kept.call(kept.log.tokens, tenant, head)
    if log[: len(tokens)] == tokens:
        return len(tokens)
    pairs = enumerate(zip(log, tokens, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(log), len(tokens)))


def _asked(stored: Stored) -> str:
    return "\n\n".join(message["content"] for message in messages_of(stored.items))


def _answered(stored: Stored) -> str:
    """The text of an answer; "" for one that calls tools."""
    parts = [part for item in stored.body["output"] for part in item.get("content", ())]
    return "".join(part.get("text", "") for part in parts)


def _decoded(tokenizer: Tokenizer | None, tokens: "array[int]") -> str:
    return tokenizer.decode(tokens) if tokenizer else ""
