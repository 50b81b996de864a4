"""ByArm: several targets as one, each arm answered by its own: two servers side by side."""

from collections.abc import Callable, Mapping, Sequence as Items
from typing import Any

from outrider.bench.histogram import total
from outrider.bench.target import Acceptance, Ask, Forgets, Reply, Target


class ByArm:
    """Asks go to the target of their arm; those of one call are all of one arm.

    Arms then share neither process nor memory nor weights, and `describe` says so.

    Args:
        targets: by the arm's name.
    """

    def __init__(self, targets: Mapping[str, Target]) -> None:
        self._targets = dict(targets)
        self.name = ", ".join(dict.fromkeys(target.name for target in targets.values()))

    @property
    def has_chat_template(self) -> bool:
        """Whether all of them take conversations."""
        return all(getattr(target, "has_chat_template", True) for target in self._each())

    def describe(self) -> dict[str, Any]:
        """Of each, and what they have in common at the top."""
        told = {name: target.describe() for name, target in self._targets.items()}
        first, *others = told.values()
        same = {
            key: value
            for key, value in first.items()
            if all(other.get(key) == value for other in others)
        }
        return {**same, "name": self.name, "one_process": len(self._each()) == 1, "by_arm": told}

    def run(
        self,
        asks: Items[Ask],
        *,
        concurrency: int,
        tick: Callable[[Reply], None] = lambda reply: None,
    ) -> list[Reply]:
        (name,) = {ask.arm.name for ask in asks}
        return self._targets[name].run(asks, concurrency=concurrency, tick=tick)

    def counters(self) -> Acceptance | None:
        """All of them together, None if any has none: differences are of the one that ran."""
        return total(target.counters() for target in self._each())

    def forget(self) -> None:
        """All begin anew that can."""
        for target in self._each():
            if isinstance(target, Forgets):
                target.forget()

    def _each(self) -> list[Target]:
        return list({id(target): target for target in self._targets.values()}.values())
