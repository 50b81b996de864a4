"""Result: the one file that a measurement leaves, and whether two of them may be compared."""

import dataclasses
import enum
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence as Items
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from outrider.bench.provenance import as_text
from outrider.errors import ConfigError

SCHEMA_VERSION = 1  # of the envelope: names and places of the keys
METRIC_VERSION = 1  # of the definitions: what a key's number means

ENVELOPE = (
    "kind",
    "schema_version",
    "metric_version",
    "settings",
    "data",
    "target",
    "seeds",
    "provenance",
    "blocks",
)


@dataclass(frozen=True, kw_only=True)
class Result:
    """What was asked, of whom, with what, on what machine, and what came out.

    Attributes:
        kind: the command: "ab", "load", "sweep", "lossless", "cost", "advise", "calibrate" ...
        findings: what the run concludes, by name. In the file they stand beside the envelope's
            keys, so that scripts read `.pairs[0].ratio`; they may not take the envelope's names.
        blocks: every measured block, from which the findings can be computed again.
        settings: what was asked for, defaults filled in.
        data: of the prompts: name, hash, num_questions, licence (`Dataset.describe()`).
        target: of whoever answered (`Target.describe()`): "model", and where known "model_hash".
        seeds: by what they seed.
        provenance: `Watch.facts()`.
    """

    kind: str
    findings: Mapping[str, Any]
    blocks: Items[Any] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    target: Mapping[str, Any] = field(default_factory=dict)
    seeds: Mapping[str, int] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION
    metric_version: int = METRIC_VERSION

    def __post_init__(self) -> None:
        taken = sorted(set(self.findings) & set(ENVELOPE))
        assert not taken, f"findings may not be named as the envelope's keys: {taken}"

    def to_json(self) -> dict[str, Any]:
        """The file's content: envelope, findings, blocks last; of types that JSON has."""
        envelope = {name: plain(getattr(self, name)) for name in ENVELOPE}
        blocks = envelope.pop("blocks")
        return {**envelope, **plain(self.findings), "blocks": blocks}

    def write(self, path: Path) -> None:
        """The whole file or none of it: an interrupted run leaves what was there before."""
        write_text(path, json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n")

    def title(self) -> str:
        """One line that tells results apart."""
        about = (self.target.get("model") or self.target.get("name"), self.data.get("name"))
        return ": ".join([self.kind, ", ".join(str(part) for part in about if part)]).rstrip(": ")


def load(path: Path) -> Result:
    """Reads a result back.

    Raises:
        ConfigError: there is no such file, it is no result, or a newer outrider wrote it.
    """
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"no file {str(path)!r}: write one by `outrider bench ... --json FILE`"
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{str(path)!r} is no result file ({error}): give one of `outrider bench`"
        ) from error
    return from_json(held, str(path))


def from_json(held: Any, name: str = "result") -> Result:
    """The inverse of `Result.to_json`."""
    if not isinstance(held, Mapping) or not {"kind", "schema_version"} <= set(held):
        raise ConfigError(
            f'{name!r} is no result file (no "kind" and "schema_version" in it): '
            "give one that `outrider bench ... --json FILE` wrote"
        )
    if held["schema_version"] != SCHEMA_VERSION:
        raise ConfigError(
            f"{name!r} has schema version {held['schema_version']}, this outrider reads "
            f"{SCHEMA_VERSION}: measure again, or use the version that wrote it"
        )
    findings = {key: value for key, value in held.items() if key not in ENVELOPE}
    return Result(findings=findings, **{key: held[key] for key in ENVELOPE if key in held})


def check_comparable(base: Result, other: Result) -> None:
    """Refuses to put side by side what does not measure the same thing.

    Raises:
        ConfigError: kind, data, model or definitions differ; the message says which and how.
    """
    for name, mine, its in (
        ("kind", base.kind, other.kind),
        ("metric version", base.metric_version, other.metric_version),
        ("data hash", base.data.get("hash"), other.data.get("hash")),
        *_models(base, other),
    ):
        if mine != its:
            raise ConfigError(
                f"these results cannot be compared: {name} is {mine!r} in one and {its!r} in the "
                "other; measure both with the same prompts, model and version"
            )


def differences(base: Result, other: Result) -> list[tuple[str, str, str]]:
    """What else was not the same, for people: (name, here, there)."""
    ours, theirs = (dict(_circumstances(result)) for result in (base, other))
    names = dict.fromkeys((*ours, *theirs))
    return [
        (name, ours.get(name, "-"), theirs.get(name, "-"))
        for name in names
        if ours.get(name) != theirs.get(name)
    ]


def plain(value: Any) -> Any:
    """In types that JSON has: records by their fields, numbers that are not finite as null."""
    if value is None or (isinstance(value, str | bool | int) and not isinstance(value, enum.Enum)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, enum.Enum):
        return plain(value.value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if hasattr(value, "_asdict"):
        return plain(value._asdict())
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(inner) for inner in value]
    if hasattr(value, "tolist"):  # numpy and torch
        return plain(value.tolist())
    return str(value)


def content_hash(*parts: Any) -> str:
    """Of values that JSON has, or of records of them: equal content, equal hash, on any machine."""
    text = json.dumps(plain(parts), sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_text(path: Path, text: str) -> None:
    """All or nothing, durable when it returns; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o666 & ~_umask())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _umask() -> int:
    """The process' own; it can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _models(base: Result, other: Result) -> list[tuple[str, Any, Any]]:
    """By hash where both tell it, else by name: servers seldom tell a hash."""
    key = (
        "model_hash"
        if base.target.get("model_hash") and other.target.get("model_hash")
        else "model"
    )
    return [(key.replace("_", " "), base.target.get(key), other.target.get(key))]


def _circumstances(result: Result) -> list[tuple[str, str]]:
    """Settings, seeds, versions and machine, each in one line."""
    facts: dict[str, Any] = {**result.settings, "seeds": result.seeds}
    for name in ("versions", "machine"):
        facts.update(result.provenance.get(name, {}))
    facts["commit"] = result.provenance.get("commit")
    return as_text(facts)
