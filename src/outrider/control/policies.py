"""The controller of an engine: every policy that is registered, made for this machine."""

import logging
from typing import Any

from outrider.control.base import Facts, Policy
from outrider.control.controller import Controller
from outrider.errors import ConfigError, unknown
from outrider.registry import OURS, POLICIES

DEFAULT = "adaptive"
logger = logging.getLogger(__name__)


def make_controller(max_model_len: int, facts: Facts, default: str = DEFAULT) -> Controller:
    """All policies; a plug-in that cannot be loaded is left out unless it is the default.

    Raises:
        ConfigError: there is no such default.
    """
    made: list[Policy] = []
    known = POLICIES.names()
    if default not in known:
        raise ConfigError(unknown("policy", default, known))
    for part in POLICIES:
        try:
            made.append(_make(POLICIES.load(part.name), facts))
        except ConfigError as error:
            if part.name == default or part.source == OURS:
                raise
            logger.warning("plug-in skipped: %s", error)
    return Controller(max_model_len, made, default)


def _make(found: Any, facts: Facts) -> Policy:
    made: Policy = found.build(facts) if hasattr(found, "build") else found()
    return made
