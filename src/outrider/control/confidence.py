"""Calibration: how likely a drafted token stands, given how sure its drafter was of it."""

from collections.abc import Mapping, Sequence as Items
from typing import Any

import numpy as np

from outrider.step import DEEPEST, LEAST_SURE, LOG_DEPTH, MOST_SURE, StopRule, logit

SLOPE, INTERCEPT = 0.5, -0.2  # where nothing was observed (vLLM's adaptive verification)
SPREADS = np.array([0.5, 0.7, 0.5])  # standard deviations of slope, intercept, gain beforehand
MEMORY = 2000.0  # observations after which one counts 1/e
BATCH = 100  # observations that are taken in together
LONGEST_STEP = 1.0  # of Newton's method, for each of the three
NUM_CELLS = 32  # of confidence, for each depth
EDGES = np.linspace(logit(LEAST_SURE), logit(MOST_SURE), NUM_CELLS + 1)[1:-1]
NUM_BINS = DEEPEST * NUM_CELLS
LOG_DEPTH_OF_BIN = np.repeat(LOG_DEPTH[1:], NUM_CELLS)
SAVED_WEIGHT = 500.0  # most observations that what was saved counts for


class Calibration:
    """How likely a token stands: sigmoid(slope * logit(confidence) + intercept + gain * ln(depth)).

    One is kept for each drafter and kind of request (how it samples, how hot), for what a largest
    probability means differs between them. Observations fall into bins by logit and depth, which
    forget exponentially; every hundred of them one step of Newton's method brings the three numbers
    up to date (a logistic regression with a normal prior).

    Attributes:
        slope, intercept, gain: as learned so far; see `StopRule`.
        num_observations: since it was made.
    """

    def __init__(self) -> None:
        self.slope, self.intercept, self.gain = SLOPE, INTERCEPT, 0.0
        self.num_observations = 0
        self._bins = np.zeros((3, NUM_BINS))  # observations, those that stood, sums of logits
        self._confidence: list[float] = []
        self._depths: list[int] = []
        self._stood: list[bool] = []

    def observe(self, confidence: float, accepted: bool, depth: int = 1) -> None:
        """One drafted token, all before which was accepted, stood or fell."""
        self._confidence.append(confidence)
        self._depths.append(depth)
        self._stood.append(accepted)
        if len(self._stood) >= BATCH:
            self._learn()

    def observe_draft(self, confidence: Items[float], num_accepted: int) -> None:
        """One chain: what was accepted, and the token that was refused, if any.

        Args:
            confidence: `DraftTree.confidence`; nothing is learned from an empty one.
        """
        num_tested = min(len(confidence), num_accepted + 1)
        self._confidence += confidence[:num_tested]
        self._depths += range(1, num_tested + 1)
        self._stood += [index < num_accepted for index in range(num_tested)]
        if len(self._stood) >= BATCH:
            self._learn()

    def acceptance(self, confidence: float, depth: int = 1) -> float:
        """Probability that a token stands of which the drafter was so sure."""
        return self.rule(0.0).acceptance(confidence, depth)

    def rule(self, floor: float) -> StopRule:
        """Drafts on while all so far stands with at least this probability."""
        return StopRule(floor, self.slope, self.intercept, self.gain)

    def to_json(self) -> dict[str, Any]:
        """`load` takes it back; what waits to be taken in is left out."""
        used = np.flatnonzero(self._bins[0] > 1e-3).tolist()
        return {
            "slope": self.slope,
            "intercept": self.intercept,
            "gain": self.gain,
            "bins": {str(place): self._bins[:, place].round(4).tolist() for place in used},
        }

    def load(self, saved: Mapping[str, Any]) -> None:
        """Starts from what was saved, which new observations soon outweigh. ValueError for junk."""
        learned = np.array([saved[key] for key in ("slope", "intercept", "gain")], dtype=np.float64)
        bins = np.zeros((3, NUM_BINS))
        for place, sums in saved["bins"].items():
            if not 0 <= int(place) < NUM_BINS or len(sums) != 3 or min(sums[:2]) < 0:
                raise ValueError(f"bins[{place}]={sums}: must be two counts and a sum")
            bins[:, int(place)] = sums
        if not (np.isfinite(learned).all() and np.isfinite(bins).all()):
            raise ValueError("slope, intercept, gain and bins: must be finite")
        self._bins = bins * min(1.0, SAVED_WEIGHT / max(float(bins[0].sum()), 1.0))
        self.slope, self.intercept, self.gain = learned.tolist()

    def _learn(self) -> None:
        """Takes in what was observed since, and moves slope, intercept and gain."""
        count = len(self._stood)
        bounded = np.fmin(np.fmax(self._confidence, LEAST_SURE), MOST_SURE)
        logits = np.log(bounded / (1.0 - bounded))
        index = np.searchsorted(EDGES, logits)
        index += NUM_CELLS * (np.minimum(self._depths, DEEPEST) - 1)
        self._bins *= np.exp(-count / MEMORY)
        for row, weights in zip(self._bins, (None, self._stood, logits), strict=True):
            row += np.bincount(index, weights, NUM_BINS)
        self.num_observations += count
        for pending in (self._confidence, self._depths, self._stood):
            pending.clear()
        self._fit()

    def _fit(self) -> None:
        """A step towards the most probable slope, intercept and gain."""
        used = np.flatnonzero(self._bins[0] > 1e-6)
        counts, stood, sums = self._bins[:, used]
        places = np.stack([sums / counts, np.ones(len(used)), LOG_DEPTH_OF_BIN[used]])
        now, prior = np.array([self.slope, self.intercept, self.gain]), (SLOPE, INTERCEPT, 0.0)
        expected = 0.5 + 0.5 * np.tanh(0.5 * (now @ places))
        uphill = places @ (stood - counts * expected) - (now - prior) / SPREADS**2
        curvature = (places * (counts * expected * (1.0 - expected))) @ places.T
        curvature += np.diag(SPREADS**-2)
        step = np.linalg.solve(curvature, uphill)
        now += np.fmin(np.fmax(step, -LONGEST_STEP), LONGEST_STEP)
        self.slope, self.intercept, self.gain = now.tolist()
