"""Learners: policies that learn, a set for every arm, so that no arm is taught by another."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy

from outrider.control.base import Policy
from outrider.engine.engine import Engine


class Learners:
    """An engine's policies, once for each learner; all begin with what the engine knew at first.

    A policy that is asked by one arm sees every step of the engine. Were there one for all arms,
    those of fixed K would pay for trials from which an adaptive one learns.

    Args:
        engine: as its policies are now, all learners find them.

    Attributes:
        shared: names of policies that cannot be copied: one serves all learners.
    """

    def __init__(self, engine: Engine) -> None:
        self._policies = engine.controller.policies
        self._first: dict[str, Policy] = {}
        self._own: dict[str, dict[str, Policy]] = {}
        self.shared: list[str] = []
        for name, policy in self._policies.items():
            try:
                self._first[name] = deepcopy(policy)
            except TypeError:  # it holds a lock, a file or the like
                self.shared.append(name)

    def forget(self) -> None:
        """All begin anew."""
        self._own.clear()

    @contextmanager
    def teaching(self, learner: str) -> Iterator[None]:
        """Meanwhile the engine's steps are planned by this learner's policies, and teach them.

        Policies that come later (those that only watch) stay.
        """
        if learner not in self._own:
            self._own[learner] = deepcopy(self._first)
        before = {name: self._policies[name] for name in self._first}
        self._policies.update(self._own[learner])
        try:
            yield
        finally:
            self._policies.update(before)
