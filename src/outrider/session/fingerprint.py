"""Fingerprint: what must be the same for stored state to mean what it meant."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """The identity of who made some state: every field must agree, or the state is not used.

    Attributes:
        part: whose state it is ("target", or a drafter's name).
        fields: name -> value, such as the weights' digest, the dtype, the block size.
    """

    part: str
    fields: Mapping[str, str]

    @cached_property
    def digest(self) -> str:
        text = json.dumps([self.part, sorted(self.fields.items())])
        return hashlib.sha256(text.encode()).hexdigest()

    def difference(self, other: "Fingerprint") -> str:
        """What the other one has instead of what is here, for people; "" if they agree."""
        if self.part != other.part:
            return f"it is of {other.part}, not of {self.part}"
        names = dict.fromkeys((*self.fields, *other.fields))
        return "; ".join(
            f"{name} was {_short(other.fields.get(name))} and is {_short(self.fields.get(name))}"
            for name in names
            if self.fields.get(name) != other.fields.get(name)
        )


def _short(value: str | None, limit: int = 24) -> str:
    if value is None:
        return "unknown"
    return value if len(value) <= limit else value[:limit] + "..."
