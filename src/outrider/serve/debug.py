"""/debug/controller: why K is what it is, from the policies themselves."""

import math
from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Depends
from pydantic import BaseModel, Field

from outrider.serve.base import Server, server, tenant

router = APIRouter(tags=["debug"])


class ControllerReport(BaseModel):
    """Who decides how far to draft, and what each policy says of its last decision."""

    default: str = Field(description="Policy of requests that name none and say no K.")
    num_running: int = Field(description="Sequences in the engine now.")
    step_seconds: dict[str, float] = Field(
        description="Time of all steps so far: `draft`, `forward` (the target's pass), `rest`."
    )
    policies: dict[str, dict[str, Any]] = Field(
        description="By policy, what it tells; {} of those that measure nothing. `adaptive` tells "
        "`why` in a line; tokens per second as plain decoding and as decided "
        "(`plain_tokens_per_s`, `expected_tokens_per_s`); `depths` in force (depth: sequences); "
        "`guard` (the measured `advantage` over plain decoding, `times_shut`, `shut_for_steps`); "
        "`acceptance` by drafter and temperature (`stands`: the probability that a draft stands "
        "up to each depth); and prices (`cost`, seconds; `cost.passes` is a table by rows). A "
        "number that is not known is null."
    )


@router.get("/debug/controller")
async def controller(
    here: Annotated[Server, Depends(server)], _: Annotated[str, Depends(tenant)]
) -> ControllerReport:
    """Why K is what it is: the last decision, what it was made from, and what it brought.

    It tells sums over all requests, so a server with keys asks for one. It holds no text.
    """
    return await here.engine.call(_report, here)


def _report(here: Server) -> ControllerReport:
    """In the engine's thread."""
    engine = here.llm.engine
    return ControllerReport(
        default=engine.controller.default,
        num_running=len(engine.scheduler.running),
        step_seconds=engine.controller.seconds._asdict(),
        policies=_finite(engine.controller.explain()),
    )


def _finite(value: Any) -> Any:
    """The same with null for what JSON has no number for."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): _finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return value
