"""Snapshots: what was warm for a token log when somebody asked for it to be kept."""

import hashlib
import struct
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence as Items
from dataclasses import asdict, dataclass, field
from typing import Any

from outrider.session.files import Files
from outrider.session.fingerprint import Fingerprint
from outrider.session.sealed import seal, unseal

SNAPSHOT = ".snapshot.json"
MAX_SNAPSHOTS = 4096


@dataclass(frozen=True, kw_only=True)
class Kept:
    """One part of a snapshot.

    Attributes:
        num_tokens: leading tokens of the log whose state is in bundles.
        bundles: their names, from the start of the log on.
        num_bytes: written for this snapshot; what was there already costs nothing.
        reason: why not all that was resident is kept; "" if it is.
    """

    fingerprint: Fingerprint
    num_tokens: int
    bundles: tuple[str, ...]
    num_bytes: int = 0
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a snapshot holds; plain JSON.

    Attributes:
        head: names the token log and its tenant.
        num_tokens: length of the log.
        parts: "target", and drafters by name.
        watermarks: per drafter the leading tokens that it was ready for.
        statistics: of class S, as they were given.
    """

    head: str
    num_tokens: int
    parts: Mapping[str, Kept] = field(default_factory=dict)
    watermarks: Mapping[str, int] = field(default_factory=dict)
    statistics: Mapping[str, Any] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        """Written for this snapshot."""
        return sum(kept.num_bytes for kept in self.parts.values())

    @property
    def kv_tokens(self) -> int:
        """Leading tokens whose target KV is kept."""
        kept = self.parts.get("target")
        return kept.num_tokens if kept is not None else 0

    @property
    def bundles(self) -> frozenset[str]:
        return frozenset(name for kept in self.parts.values() for name in kept.bundles)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Manifest":
        """KeyError or TypeError for what `as_dict` did not write."""
        parts = {
            name: Kept(
                **{
                    **kept,
                    "fingerprint": Fingerprint(**kept["fingerprint"]),
                    "bundles": tuple(kept["bundles"]),
                }
            )
            for name, kept in values["parts"].items()
        }
        return cls(**{**values, "parts": parts})

    def agrees(self, fingerprints: Iterable[Fingerprint]) -> bool:
        """Whether no part was made by somebody else than these."""
        now = {fingerprint.part: fingerprint.digest for fingerprint in fingerprints}
        return all(now.get(name) == kept.fingerprint.digest for name, kept in self.parts.items())


class Snapshots:
    """The manifests of one place, by log: the latest of each, the oldest forgotten first."""

    def __init__(self, files: Files, max_snapshots: int = MAX_SNAPSHOTS) -> None:
        self._files = files
        self._max = max_snapshots
        self._by_head: OrderedDict[str, Manifest] = OrderedDict()
        for name in files.names():
            if name.endswith(SNAPSHOT):
                self._take_over(name)

    def __len__(self) -> int:
        return len(self._by_head)

    def put(self, manifest: Manifest) -> None:
        """OSError where it cannot be written."""
        self._files.write(manifest.head + SNAPSHOT, seal(manifest.as_dict()))
        self._by_head[manifest.head] = manifest
        self._by_head.move_to_end(manifest.head)
        while len(self._by_head) > self._max:
            self.drop(next(iter(self._by_head)))

    def along(self, tokens: Items[int], salt: str) -> list[Manifest]:
        """Those of the log and of its beginnings, the longest first."""
        lengths = {manifest.num_tokens for manifest in self._by_head.values()}
        found = (self._by_head.get(name) for name in heads(tokens, salt, lengths))
        return [manifest for manifest in found if manifest is not None][::-1]

    def bundles(self) -> set[str]:
        """Every bundle that some snapshot names."""
        return {name for manifest in self._by_head.values() for name in manifest.bundles}

    def drop(self, head: str) -> None:
        if self._by_head.pop(head, None) is not None:
            self._files.remove(head + SNAPSHOT)

    def _take_over(self, name: str) -> None:
        record = unseal(self._files.read(name))
        try:
            manifest = Manifest.from_dict(record or {})
        except (KeyError, TypeError):
            self._files.remove(name)
            return
        self._by_head[manifest.head] = manifest


def head_of(tokens: Items[int], salt: str) -> str:
    """The name of a whole token log and its tenant."""
    return heads(tokens, salt, [len(tokens)])[0]


def heads(tokens: Items[int], salt: str, lengths: Iterable[int]) -> list[str]:
    """The names of the log's beginnings of these lengths, shortest first; longer ones have none."""
    digest = hashlib.sha256(b"head:" + hashlib.sha256(salt.encode()).digest())
    names, done = [], 0
    for length in sorted(lengths):
        if length > len(tokens):
            break
        digest.update(struct.pack(f"<{length - done}q", *tokens[done:length]))
        names.append(digest.hexdigest()[:32])
        done = length
    return names
