"""Guard and Purse: the two limits that hold whatever a forecast says."""

from typing import Any

WINDOW = 200  # speculating steps after which one counts 1/e
MOST_LOST = 5.0  # plain steps' time that speculation may have lost of late
MOST_GAINED = 7.0  # likewise, that what it won before makes good
HICCUP = 3.0  # times a usual step's time, beside a plain one's; a longer one tells nothing
FEWEST = 6  # steps that make a usual one
FIRST_PAUSE, LONGEST_PAUSE = 64, 1024  # steps
TRUSTED = 128  # steps without a loss, after which the next pause is the first again
TRY_SHARE = 0.006  # of time, for what is not in use
MOST_SAVED = 300  # steps, whose share is kept at most, and given beforehand: all is unknown then


class Guard:
    """Ends speculation that is measured to lose, for longer each time.

    The seconds of steps that speculated, beyond those that plain decoding of the same rows would
    have needed for their tokens, are summed up (a CUSUM test, Page 1954). A few unlucky drafts do
    not reach the limit, a clear loss does within a few steps, and no loss goes on for long.
    """

    def __init__(self) -> None:
        self._shut_until = 0
        self._pause = FIRST_PAUSE
        self.shut_at = 0
        self.num_shut = 0
        self._tokens = self._seconds = self._plain_tokens = self._plain_seconds = 0.0
        self._lost = self._usual = 0.0
        self._count = 0

    @property
    def advantage(self) -> float | None:
        """Measured goodput over plain decoding's; None before anything was measured."""
        if not self._seconds or not self._plain_seconds or not self._plain_tokens:
            return None
        return (self._tokens / self._seconds) / (self._plain_tokens / self._plain_seconds)

    @property
    def lost(self) -> float:
        """Plain steps' time that speculation has lost of late, less what it won."""
        return self._lost

    def is_shut(self, step: int) -> bool:
        return step < self._shut_until

    def reopen(self) -> None:
        """What was measured is of texts that are gone."""
        self._shut_until = 0

    def observe(
        self, step: int, tokens: float, seconds: float, plain_tokens: int, plain_seconds: float
    ) -> None:
        """A step that speculated, beside the same step without."""
        if not plain_tokens or self.is_shut(step):
            return
        if self._count >= FEWEST:
            seconds = min(seconds, HICCUP * self._usual * plain_seconds)
        taken = seconds / plain_seconds
        self._usual += 0.1 * (taken - self._usual) if self._usual else taken
        keep = 1.0 - 1.0 / WINDOW
        self._tokens = keep * self._tokens + tokens
        self._seconds = keep * self._seconds + seconds
        self._plain_tokens = keep * self._plain_tokens + plain_tokens
        self._plain_seconds = keep * self._plain_seconds + plain_seconds
        lost = taken - tokens / plain_tokens
        self._lost = max(keep * self._lost + lost, -MOST_GAINED)
        self._count += 1
        if self._lost > MOST_LOST:
            self._shut(step)
        elif self._count >= TRUSTED:
            self._pause = FIRST_PAUSE

    def explain(self, step: int) -> dict[str, Any]:
        return {
            "advantage": self.advantage,
            "shut_for_steps": max(self._shut_until - step, 0),
            "lost_steps": self._lost,
            "times_shut": self.num_shut,
        }

    def _shut(self, step: int) -> None:
        self.num_shut += 1
        self.shut_at, self._shut_until = step, step + self._pause
        self._pause = min(2 * self._pause, LONGEST_PAUSE)
        self._forget()

    def _forget(self) -> None:
        self._tokens = self._seconds = self._plain_tokens = self._plain_seconds = 0.0
        self._lost = self._usual = 0.0
        self._count = 0


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

    def earn(self, step_s: float, decoding_s: float | None = None) -> None:
        """A share of a step's time.

        Args:
            decoding_s: the part of it that did not go into prompts, by which is measured what is
                given beforehand and kept at most. None is all of it.
        """
        decoding_s = step_s if decoding_s is None else decoding_s
        self._step_s += 0.1 * (decoding_s - self._step_s) if self._step_s else decoding_s
        if self._is_new:
            self._is_new, self.seconds = False, self._most
        self.seconds = min(self.seconds, self._most) + TRY_SHARE * step_s

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
            seconds = min(seconds, max(HICCUP * self._paid, self._step_s))
            self.seconds = min(self.seconds - seconds + self._paid, self._most)
            self._paid = None

    @property
    def is_open(self) -> bool:
        """Whether a trial was paid for whose loss is not known yet."""
        return self._paid is not None

    @property
    def _most(self) -> float:
        return MOST_SAVED * TRY_SHARE * self._step_s
