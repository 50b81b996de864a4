"""Padding: frames of few sizes, so that their lengths do not tell how many tokens they carry."""

import secrets
from collections.abc import Callable

SMALLEST = 512
FIELD = ',"obfuscation":""'


def pad(data: str, *, noise: Callable[[int], str] | None = None, num_other: int = 0) -> str:
    """A frame whose size in bytes is the next of 512, 1024, 2048 and so on.

    The filler is the standard member `obfuscation` of OpenAI's streams, put last. Times of
    frames still tell of steps; pacing is against that.

    Args:
        data: the frame as it is sent: a JSON object with at least one member.
        noise: n characters of ASCII that JSON need not escape; random by default, so that
            compression does not undo it.
        num_other: bytes of the frame's other lines.
    """
    assert data[0] + data[-1] == "{}" != data, "a JSON object with a member"
    least = len(data.encode()) + len(FIELD) + num_other
    size = SMALLEST
    while size < least:
        size *= 2
    filler = (noise or _random)(size - least)
    return f'{data[:-1]}{FIELD[:-1]}{filler}"}}'


def _random(length: int) -> str:
    return secrets.token_hex((length + 1) // 2)[:length]
