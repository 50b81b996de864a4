"""Pieces of an answer: text, the beginning of a call, and its arguments; whole calls from them."""

from collections.abc import Iterable
from typing import NamedTuple, TypeAlias


class Text(NamedTuple):
    """Content: what the model says beside its calls."""

    text: str


class CallStart(NamedTuple):
    """The model calls a function; its arguments follow."""

    index: int  # type: ignore[assignment]  # hides tuple.index
    name: str


class CallArguments(NamedTuple):
    """A further part of the JSON text of a call's arguments."""

    index: int  # type: ignore[assignment]  # hides tuple.index
    text: str


Piece: TypeAlias = Text | CallStart | CallArguments


class Call(NamedTuple):
    """A whole call; `arguments` is JSON text as the model wrote it (perhaps cut off)."""

    name: str
    arguments: str


class Reply(NamedTuple):
    """What a text comes to: its content, and the calls in it."""

    content: str
    calls: tuple[Call, ...]


def gather(pieces: Iterable[Piece]) -> Reply:
    """What pieces come to, put together."""
    content = ""
    calls: dict[int, list[str]] = {}
    for piece in pieces:
        if isinstance(piece, Text):
            content += piece.text
        elif isinstance(piece, CallStart):
            calls[piece.index] = [piece.name, ""]
        else:
            calls[piece.index][1] += piece.text
    return Reply(content, tuple(Call(name, arguments) for name, arguments in calls.values()))


def merged(pieces: Iterable[Piece]) -> list[Piece]:
    """Neighbours of one kind and call as one piece."""
    merged: list[Piece] = []
    for piece in pieces:
        last = merged[-1] if merged else None
        if isinstance(piece, Text) and isinstance(last, Text):
            merged[-1] = Text(last.text + piece.text)
        elif (
            isinstance(piece, CallArguments)
            and isinstance(last, CallArguments)
            and piece.index == last.index
        ):
            merged[-1] = CallArguments(piece.index, last.text + piece.text)
        else:
            merged.append(piece)
    return merged
