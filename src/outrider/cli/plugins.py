"""`outrider plugins`: the drafters and verifiers that are there, built in or installed."""

import json
from typing import Annotated, Any

import typer

from outrider.registry import DRAFTERS, VERIFIERS


def plugins(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """List drafters and verifiers."""
    found = {"drafters": _drafters(), "verifiers": _verifiers()}
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
            "needs": list(getattr(DRAFTERS.load(part.name), "needs", ())),
            "warmth": DRAFTERS.load(part.name).warmth.value,
            "source": part.source,
        }
        for part in DRAFTERS
    ]


def _verifiers() -> list[dict[str, Any]]:
    return [
        {
            "name": part.name,
            "exactness": str(VERIFIERS.load(part.name).exactness.value),
            "source": part.source,
        }
        for part in VERIFIERS
    ]
