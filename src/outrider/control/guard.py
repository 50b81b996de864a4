"""Guard and Purse: the two limits that hold whatever a forecast says."""

from typing import Any

WINDOW = 32  # speculating steps after which one counts 1/e
FEWEST = 24  # before the guard judges
LEAST = 0.97  # of plain decoding's goodput
HICCUP = 3.0  # times a usual step's time; what is longer says nothing of drafts
FIRST_PAUSE, LONGEST_PAUSE = 48, 768  # steps
TRY_SHARE = 0.006  # of time, for what is not in use
FIRST_STEPS = 3.0  # of time, given beforehand: what is new is unknown
MOST_OWED = 3.0  # steps' time: beyond it a trial was a hiccup
MOST_SAVED = 300  # steps, whose share is kept at most


class Guard:
    """Ends speculation that is measured to lose, for longer each time.

    Steps that speculated are held against what plain decoding of the same rows is known to take,
    by goodput over a window.
    """

    def __init__(self) -> None:
        self._tokens = self._seconds = self._plain_tokens = self._plain_seconds = 0.0
        self._weight, self._count = 0.0, 0
        self._shut_until = 0
        self._pause = FIRST_PAUSE
        self.shut_at = 0
        self.num_shut = 0

    @property
    def advantage(self) -> float | None:
        """Measured goodput over plain decoding's; None before anything was measured."""
        if not self._seconds or not self._plain_seconds or not self._plain_tokens:
            return None
        return (self._tokens / self._seconds) / (self._plain_tokens / self._plain_seconds)

    def is_shut(self, step: int) -> bool:
        return step < self._shut_until

    def reopen(self) -> None:
        """What was measured is of texts that are gone."""
        self._shut_until = 0

    def observe(
        self, step: int, tokens: int, seconds: float, plain_tokens: int, plain_seconds: float
    ) -> None:
        """A step that speculated, beside the same step without."""
        if self._weight > FEWEST / 4:
            seconds = min(seconds, HICCUP * self._seconds / self._weight)
        keep = 1.0 - 1.0 / WINDOW
        self._weight = keep * self._weight + 1.0
        self._tokens = keep * self._tokens + tokens
        self._seconds = keep * self._seconds + seconds
        self._plain_tokens = keep * self._plain_tokens + plain_tokens
        self._plain_seconds = keep * self._plain_seconds + plain_seconds
        if self.is_shut(step):
            return
        self._count += 1
        found = self.advantage
        if self._count >= FEWEST and found is not None:
            if found < LEAST:
                self._shut(step)
            elif self._count >= 4 * WINDOW:
                self._pause = FIRST_PAUSE

    def explain(self, step: int) -> dict[str, Any]:
        return {
            "advantage": self.advantage,
            "shut_for_steps": max(self._shut_until - step, 0),
            "times_shut": self.num_shut,
        }

    def _shut(self, step: int) -> None:
        self.num_shut += 1
        self.shut_at, self._shut_until = step, step + self._pause
        self._pause = min(2 * self._pause, LONGEST_PAUSE)
        self._forget()

    def _forget(self) -> None:
        self._tokens = self._seconds = self._plain_tokens = self._plain_seconds = 0.0
        self._weight, self._count = 0.0, 0


class Purse:
    """A share of time to spend on trying; what a trial lost beyond it must be earned first."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._is_new = True
        self._step_s = 0.0
        self._paid: float | None = None

    @property
    def holds_something(self) -> bool:
        return self.seconds > 0.0

    def earn(self, step_s: float) -> None:
        self._step_s += 0.1 * (step_s - self._step_s) if self._step_s else step_s
        if self._is_new:
            self._is_new = False
            self.seconds = FIRST_STEPS * step_s
        self.seconds = min(self.seconds, MOST_SAVED * TRY_SHARE * self._step_s) + TRY_SHARE * step_s

    def pays(self, seconds: float) -> bool:
        """Takes the expected price of a trial if it can be paid."""
        if seconds > self.seconds:
            return False
        self.seconds -= seconds
        self._paid = seconds
        return True

    def settle(self, seconds: float) -> None:
        """What the trial that was just paid for has really lost; that is what it costs."""
        if self._paid is not None:
            most = max(MOST_SAVED * TRY_SHARE, FIRST_STEPS) * self._step_s
            left = self.seconds - seconds + self._paid
            self.seconds = max(min(left, most), -MOST_OWED * self._step_s)
            self._paid = None

    @property
    def is_open(self) -> bool:
        """Whether a trial was paid for whose loss is not known yet."""
        return self._paid is not None
