"""Schedule: when to do again what takes time itself, so that it takes a small share of it."""

import math

FIRST_STEPS = 8  # in which everything is done as often as it may be
UPDATE = 0.3  # weight of the last time it took


class Schedule:
    """Spaces out one kind of work.

    Args:
        share: of all time, that the work may take.
        least, most: steps between two times.

    Attributes:
        due_at: step from which on it is to be done.
    """

    def __init__(self, share: float, least: int, most: int) -> None:
        self.due_at = 0
        self._share = share
        self._least, self._most = least, most
        self._seconds = 0.0
        self._done_at = self._held = 0

    def done(self, step: int, seconds: float, step_s: float) -> None:
        """It was done in this step and took so long, where a step takes `step_s`."""
        self._seconds += UPDATE * (seconds - self._seconds)
        self._done_at, self._held = step, self._least
        if step >= FIRST_STEPS and step_s:
            needed = math.ceil(self._seconds / (self._share * step_s))
            self._held = max(self._least, min(needed, self._most))
        self.due_at = step + self._held

    def hasten(self, share: float) -> None:
        """Something has changed: it is due after this share of the time."""
        self.due_at = min(self.due_at, self._done_at + int(share * self._held))

    def put_off(self, step: int) -> None:
        """As good as done in this step."""
        self._done_at, self.due_at = step, step + self._least
