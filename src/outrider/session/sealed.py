"""Sealed JSON: a small record that is read back as it was written, or not at all."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

VERSION = 1


def seal(values: Mapping[str, Any]) -> bytes:
    """JSON with a checksum of its own and the version of the format."""
    record = {"version": VERSION, **values}
    return json.dumps({**record, "seal": _checksum(record)}, indent=1).encode()


def unseal(data: bytes | None) -> dict[str, Any] | None:
    """None for what is damaged, of another version, or no such record at all."""
    try:
        record = json.loads(data or b"")
    except ValueError:
        return None
    if not isinstance(record, dict) or record.get("version") != VERSION:
        return None
    if record.pop("seal", None) != _checksum(record):
        return None
    del record["version"]
    return record


def _checksum(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
