"""`outrider plugins`: drafters, verifiers and policies that are there, built in or installed."""

import json
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from outrider.errors import ConfigError
from outrider.registry import DRAFTERS, POLICIES, VERIFIERS, Registered, Registry


def plugins(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """List drafters, verifiers and policies."""
    found = {"drafters": _drafters(), "verifiers": _verifiers(), "policies": _policies()}
    if as_json:
        typer.echo(json.dumps(found))
        return
    for kind, parts in found.items():
        typer.echo(kind)
        for part in parts:
            facts = ", ".join(f"{k} {v}" for k, v in part.items() if k not in ("name", "source"))
            typer.echo(f"  {part['name']:<14} {facts}  ({part['source']})")


def _drafters() -> list[dict[str, Any]]:
    return [
        {
            "name": part.name,
            "needs": list(drafter.needs),
            "warmth": drafter.warmth.value,
            "source": part.source,
        }
        for part, drafter in _loaded(DRAFTERS)
    ]


def _verifiers() -> list[dict[str, Any]]:
    return [
        {
            "name": part.name,
            "exactness": str(verifier.exactness.value),
            "source": part.source,
        }
        for part, verifier in _loaded(VERIFIERS)
    ]


def _policies() -> list[dict[str, Any]]:
    return [{"name": part.name, "source": part.source} for part, _ in _loaded(POLICIES)]


def _loaded(parts: Registry) -> Iterator[tuple[Registered, Any]]:
    """Parts with their classes; why a plug-in is broken goes to stderr, stdout is for the rest."""
    try:
        for part in parts:
            found = _load(parts, part.name)
            if found is not None:
                yield part, found
    except ConfigError as error:  # two parts of one name: plug-ins cannot be told apart
        typer.echo(f"broken: {error}", err=True)


def _load(parts: Registry, name: str) -> Any:
    try:
        return parts.load(name)
    except ConfigError as error:
        typer.echo(f"broken: {error}", err=True)
        return None
