"""StreamOptions: how a client asks for `outrider-stream/1`, in a request's body or in a header."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from outrider.errors import RequestError, unknown
from outrider.request import StreamParams

PACE_S = 0.1
CHOICES = {"retract": ("tail", "none"), "pacing": ("burst", "smooth")}
HEADER_NAMES = {"stability": "min_stability"}


@dataclass(frozen=True, kw_only=True)
class StreamOptions:
    """What one client can take, and wants.

    Attributes:
        visibility: "verified" or "provisional": whether tails are sent.
        retract: "tail" if the client can replace a tail; "none" forces "verified".
        min_stability, max_tail_tokens, commit_unit: as in `StreamParams`.
        max_updates_per_s: most tails a second; the latest wins.
        pacing: "burst" sends with each step, "smooth" every `PACE_S` seconds.
        pad: frames are padded to size buckets.
        steps: each commit says what it was made of (`serve.steps`).

    Raises:
        RequestError: names the option, the value and the remedy.
    """

    visibility: str = "verified"
    retract: str = "tail"
    min_stability: float = 0.8
    max_tail_tokens: int = 16
    max_updates_per_s: float = 12.0
    commit_unit: str = "token"
    pacing: str = "burst"
    pad: bool = False
    steps: bool = False

    def __post_init__(self) -> None:
        for name, known in CHOICES.items():
            value = getattr(self, name)
            _require(value in known, name, value, f"must be one of {', '.join(known)}")
        rate = self.max_updates_per_s
        is_number = isinstance(rate, int | float) and not isinstance(rate, bool)
        is_rate = is_number and math.isfinite(rate) and rate > 0
        _require(is_rate, "max_updates_per_s", rate, "must be a number above 0")
        _require(isinstance(self.pad, bool), "pad", self.pad, "must be true or false")
        _ = self.params  # checks the rest
        if self.retract == "none":
            object.__setattr__(self, "visibility", "verified")

    @classmethod
    def from_body(
        cls, values: Mapping[str, Any], *, pad: bool = False, pacing: str = "burst"
    ) -> Self:
        """From the value of `stream_options.outrider`.

        Args:
            pad, pacing: in force where it says nothing of them.
        """
        if not isinstance(values, Mapping):
            raise RequestError(
                f"stream_options.outrider={values!r}: must be a mapping such as "
                '{"visibility": "provisional"}'
            )
        known = [f.name for f in fields(cls)]
        for name in values:
            if name not in known:
                raise RequestError(unknown("stream option", str(name), known))
        return cls(**{"pad": pad, "pacing": pacing, **values})

    @classmethod
    def from_header(cls, header: str, *, pad: bool = False, pacing: str = "burst") -> Self:
        """From a header such as `provisional; stability=0.8; commit_unit=word`, as `from_body`."""
        values: dict[str, Any] = {}
        parts = [part.strip() for part in header.split(";")]
        for place, part in enumerate(parts):
            name, is_pair, value = (text.strip() for text in part.partition("="))
            if not is_pair and place == 0:
                name, value = "visibility", name
            elif not is_pair:
                raise _bad_header(header, f"{part!r} is not of the form name=value")
            name = HEADER_NAMES.get(name, name)
            if name in values:
                raise _bad_header(header, f"{name} is given twice")
            values[name] = _typed(name, value)
        return cls.from_body(values, pad=pad, pacing=pacing)

    @property
    def params(self) -> StreamParams:
        """What the engine must know of it."""
        return StreamParams(
            visibility=self.visibility,
            min_stability=self.min_stability,
            max_tail_tokens=self.max_tail_tokens,
            commit_unit=self.commit_unit,
            steps=self.steps,
        )

    @property
    def pace_s(self) -> float:
        """Seconds between frames; 0 sends at once."""
        return PACE_S if self.pacing == "smooth" else 0.0

    def as_dict(self) -> dict[str, bool | int | float | str]:
        """What is in force, for the response's echo."""
        return asdict(self)


def _typed(name: str, text: str) -> Any:
    """A header's value as JSON would have it; what does not fit stays text and is refused."""
    readers = {"min_stability": float, "max_updates_per_s": float, "max_tail_tokens": int}
    if name in ("pad", "steps"):
        return {"true": True, "false": False}.get(text, text)
    try:
        return readers[name](text) if name in readers else text
    except ValueError:
        return text


def _bad_header(header: str, why: str) -> RequestError:
    return RequestError(
        f"X-Outrider-Stream={header!r}: {why}; write it as 'provisional; stability=0.8'"
    )


def _require(holds: bool, name: str, value: object, remedy: str) -> None:
    if not holds:
        raise RequestError(f"{name}={value!r}: {remedy}")
