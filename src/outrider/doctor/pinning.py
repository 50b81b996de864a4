"""Writing what was found into the head's `outrider.json`, which the loader obeys."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from outrider.errors import ConfigError
from outrider.models.heads.pins import SECTION, SIDECAR, check_pins


def write_pins(folder: Path, pins: Mapping[str, Any]) -> Path:
    """Lays down conventions beside the head's files; other sections stay as they are.

    Raises:
        ConfigError: the file is there and is no mapping, or the folder cannot be written to.
    """
    path = folder / SIDECAR
    check_pins(pins)
    listed = {k: list(v) if isinstance(v, tuple) else v for k, v in pins.items()}
    text = json.dumps({**_held(path), SECTION: listed}, indent=1) + "\n"
    part = path.with_suffix(".part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise ConfigError(
            f"{str(path)!r} cannot be written ({error}): copy the head into a folder of yours"
        ) from error
    return path


def _held(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{str(path)!r} is not JSON ({error}): mend or delete it") from error
    if not isinstance(held, dict):
        raise ConfigError(f"{str(path)!r} must hold a mapping: mend or delete it")
    return held
