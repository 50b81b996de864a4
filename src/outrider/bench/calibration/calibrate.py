"""Calibration: what passes, drafts and the host cost on this machine, timed within seconds.

Passes of many shapes are run on the model itself; drafters answer a few prompts. Together they
price every draft length at every load, before any of it is measured.
"""

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence as Items
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from outrider.bench.calibration import roofline
from outrider.bench.calibration.prediction import HOST_SIZES, Predictor, Profile
from outrider.bench.calibration.roofline import Point, Roofline
from outrider.bench.calibration.steps import StepLog, Watcher
from outrider.bench.inprocess import InProcess
from outrider.bench.provenance import machine_fingerprint
from outrider.bench.target import Arm, Ask, Question
from outrider.cache.pool import KVPool
from outrider.cache.table import BlockManager, BlockTable
from outrider.control.base import Facts, Step
from outrider.control.cost import CostModel
from outrider.control.learning import WARM_UP, Lessons
from outrider.control.linear_cost import LinearCost
from outrider.engine.engine import Engine
from outrider.errors import ConfigError
from outrider.models.runner import Piece
from outrider.request import OFF, SamplingParams, SpeculationParams
from outrider.step import EMPTY_TREE, DraftTree

ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
CONTEXTS = (64, 256, 1024)
VERIFIED = 4  # rows of each sequence in shapes like those of verification
PROMPT_ROWS = (64, 256)
MIN_ROUNDS, MAX_ROUNDS = 3, 25
REPEATS, ENOUGH_S = 4, 0.01  # of one shape at a time
TOLD = 3  # times that the cost model is told of a shape: it takes a timing to be noisy
DRAFT_DEPTH = 8  # deepest draft whose acceptance is counted
MAX_TOKENS = 48
PARALLEL = 4  # requests together, where drafting is timed for several
FORMAT = 2


class Shape(NamedTuple):
    """A pass to time: sequences, new rows of each, tokens of context of each."""

    num_sequences: int
    rows_each: int
    context: int


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Prices and acceptance, of one model on one machine.

    Attributes:
        machine, model: fingerprints.
        points: decoding passes, a row per sequence. verify_points: passes with drafts.
        left_out: shapes for which there was no room.
        profiles: acceptance, by method and temperature; see `key_of`.
        end_rates: chance of a token to end its answer, by temperature.
    """

    machine: str
    model: str
    predictor: Predictor
    roofline: Roofline | None
    points: tuple[Point, ...]
    verify_points: tuple[Point, ...] = ()
    left_out: tuple[Shape, ...] = ()
    profiles: Mapping[str, Profile] = field(default_factory=dict)
    end_rates: Mapping[str, float] = field(default_factory=dict)

    def end_rate(self, temperature: float) -> float:
        """0 where no answer was seen to end."""
        return self.end_rates.get(f"{temperature:g}", 0.0)

    def profile(self, method: str, temperature: float) -> Profile | None:
        return self.profiles.get(key_of(method, temperature))

    def to_json(self) -> dict[str, Any]:
        """For a result's findings; `from_json` takes it back."""
        return {
            "format": FORMAT,
            "machine_fingerprint": self.machine,
            "model_fingerprint": self.model,
            "points": _table(self.points, self.roofline),
            "verify_points": [point._asdict() for point in self.verify_points],
            "left_out": [shape._asdict() for shape in self.left_out],
            "roofline": None if self.roofline is None else vars(self.roofline),
            "cost": self.predictor.cost.to_json(),
            "host": self.predictor.host.to_json(),
            "profiles": {key: profile.to_json() for key, profile in self.profiles.items()},
            "end_rates": dict(self.end_rates),
        }

    @classmethod
    def from_json(cls, held: Mapping[str, Any]) -> "Calibration":
        """Raises ConfigError where it is of another form."""
        try:
            if held["format"] != FORMAT:
                raise ValueError(f"format {held['format']!r} instead of {FORMAT}")
            cost, host = CostModel(), LinearCost(HOST_SIZES)
            cost.load(held["cost"])
            host.load(held["host"])
            fitted = held["roofline"]
            points = [{k: p[k] for k in Point._fields} for p in held["points"]]
            return cls(
                machine=str(held["machine_fingerprint"]),
                model=str(held["model_fingerprint"]),
                predictor=Predictor(cost, host),
                roofline=None if fitted is None else Roofline(**fitted),
                points=tuple(Point(**point) for point in points),
                verify_points=tuple(Point(**point) for point in held["verify_points"]),
                left_out=tuple(Shape(**shape) for shape in held["left_out"]),
                profiles={k: Profile.from_json(p) for k, p in held["profiles"].items()},
                end_rates={k: float(rate) for k, rate in held["end_rates"].items()},
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(
                f"this is no calibration ({error!r}): make one by `outrider bench calibrate`"
            ) from error

    def check(self, engine: Engine) -> None:
        """ConfigError unless it is of this machine and model."""
        self.check_machine()
        _compare("model", self.model, engine.spec.fingerprint)

    def check_machine(self) -> None:
        """ConfigError unless it is of this machine, with as many threads."""
        _compare("machine, or another number of threads", self.machine, machine_fingerprint())


def _compare(name: str, mine: str, its: str) -> None:
    if mine != its:
        raise ConfigError(
            f"the calibration is of another {name} ({mine}, this is {its}): calibrate here"
        )


def key_of(method: str, temperature: float) -> str:
    return f"{method} at temperature {temperature:g}"


class Calibrator:
    """Times one engine.

    Args:
        target: serves nobody else meanwhile.
        seed: of the order of passes, and of answers.
        tick: told the share that is done, and what is being timed.
    """

    def __init__(
        self,
        target: InProcess,
        *,
        seed: int = 0,
        clock: Callable[[], float] = time.perf_counter,
        tick: Callable[[float, str], None] = lambda share, told: None,
    ) -> None:
        self._target = target
        self._engine = target.llm.engine
        self._seed, self._clock, self._tick = seed, clock, tick
        self._learner = _Learner(self._engine, clock)
        self._profiles: dict[str, Profile] = {}
        self._ends: dict[str, tuple[int, int]] = {}  # answers that ended by themselves, tokens

    def run(
        self,
        arms: Items[Arm],
        questions: Items[Question],
        *,
        temperatures: Items[float] = (0.0,),
        rows: Items[int] = ROWS,
        contexts: Items[int] = CONTEXTS,
        budget_s: float = 30.0,
    ) -> Calibration:
        """Passes first, then plain decoding, then each arm's drafter.

        Args:
            arms: whose drafters are timed, and whose acceptance is counted, at their own K or
                `DRAFT_DEPTH`; named by method.
            questions: any; enough to fill some seconds.
            budget_s: half of it for passes; drafters share the other half.
        """
        machine = machine_fingerprint()
        timed, left_out = self._passes(rows, contexts, budget_s / 2)
        decoding = tuple(point for point in timed if point.rows_each == 1)
        verifying = tuple(point for point in timed if point.rows_each == VERIFIED)
        runs = [(None, t) for t in temperatures] + [(a, t) for t in temperatures for a in arms]
        for number, (arm, temperature) in enumerate(runs if questions else []):
            self._tick(0.5 + 0.5 * number / len(runs), arm.name if arm else "plain decoding")
            self._answer(arm, temperature, questions, budget_s / 2 / len(runs))
        shapes = (*decoding, *verifying)
        if machine_fingerprint() != machine:
            raise ConfigError(
                "the number of threads was changed while passes were timed: set it before "
                "(OMP_NUM_THREADS) and calibrate again"
            )
        return Calibration(
            machine=machine,
            model=self._engine.spec.fingerprint,
            predictor=Predictor(self._learner.cost, self._learner.host),
            roofline=roofline.fit(shapes) if len(shapes) > 2 else None,
            points=decoding,
            verify_points=verifying,
            left_out=tuple(left_out),
            profiles=self._profiles,
            end_rates={key: ends / max(count, 1) for key, (ends, count) in self._ends.items()},
        )

    def _passes(
        self, rows: Items[int], contexts: Items[int], budget_s: float
    ) -> tuple[list[Point], list[Shape]]:
        """Every shape in turn, in rounds of another order, so that drift is spread over all."""
        shapes: list[Shape] = []
        left_out: list[Shape] = []
        for shape in _shapes(rows, contexts):
            (shapes if _fits(self._engine, shape) else left_out).append(shape)
        until = self._clock() + budget_s
        rng = random.Random(self._seed)
        timings: dict[Shape, list[float]] = {shape: [] for shape in shapes}
        for number in range(-1, MAX_ROUNDS):  # the first round warms up
            if number >= MIN_ROUNDS and self._clock() > until:
                break
            for shape in rng.sample(shapes, len(shapes)):
                found = self._time(shape)
                if number >= 0:
                    timings[shape] += found
            done = 1.0 - max(until - self._clock(), 0.0) / budget_s if budget_s else 1.0
            self._tick(0.5 * done, "passes")
        points = [_point(shape, found) for shape, found in timings.items()]
        for point in rng.sample(points * TOLD, TOLD * len(points)):
            self._learner.note_pass(point)
        return points, left_out

    def _time(self, shape: Shape) -> list[float]:
        """Seconds of passes, short ones a few times; what is in the KV cache does not matter."""
        manager, runner = self._engine.manager, self._engine.runner
        tables = [_room(manager, shape) for _ in range(shape.num_sequences)]
        pieces = [_piece(table, shape) for table in tables]
        found: list[float] = []
        while not found or (len(found) < REPEATS and sum(found) < ENOUGH_S):
            start = self._clock()
            runner.run(pieces)
            found.append(self._clock() - start)
        for table in tables:
            manager.free(table)
        return found

    def _answer(
        self, arm: Arm | None, temperature: float, questions: Items[Question], budget_s: float
    ) -> None:
        """A few answers alone and together, shallow and deep, so that prices can be told apart."""
        off = SpeculationParams(method=OFF)
        deep = off if arm is None or arm.speculation is None else _deep(arm.speculation)
        log = StepLog(self._clock)
        until = self._clock() + budget_s
        with log.attached(self._engine), self._learner.attached(self._engine):
            for number, batch in enumerate(_batches(questions)):
                if number >= 3 and self._clock() > until:
                    break
                speculation = deep if number % 3 or arm is None else _shallow(deep)
                self._run(batch, Arm(name="calibration", speculation=speculation), temperature)
        totals = log.of(deep)
        if arm is not None and totals is not None and totals.depths.deepest:
            self._profiles[key_of(arm.name, temperature)] = Profile(
                drafter=self._drafter(deep),
                forecast=totals.depths.forecast(),
                nodes_per_depth=totals.depths.nodes_per_depth,
                num_drafts=totals.depths.planned[0],
            )

    def _run(self, questions: Items[Question], arm: Arm, temperature: float) -> None:
        sampling = SamplingParams(max_tokens=MAX_TOKENS, temperature=temperature, seed=self._seed)
        asks = [
            Ask(question=question, sampling=sampling, arm=arm, tenant=f"calibration {number}")
            for number, question in enumerate(questions)
        ]
        replies = self._target.run(asks, concurrency=len(asks))
        error = next((reply.error for reply in replies if reply.error), "")
        if error:
            raise ConfigError(f"{arm.speculation} fails: {error}")
        ends, count = self._ends.get(f"{temperature:g}", (0, 0))
        self._ends[f"{temperature:g}"] = (
            ends + sum(reply.finish_reason == "stop" for reply in replies),
            count + sum(reply.num_tokens for reply in replies),
        )

    def _drafter(self, speculation: SpeculationParams) -> str:
        return self._engine.resolve(speculation, SamplingParams()).drafter


class EveryStep:
    """Lessons that learn the times of every step: while timing, no time has to be spared."""

    def __init__(self, facts: Facts) -> None:
        self._facts = facts
        self._lessons = Lessons(facts)

    @property
    def cost(self) -> CostModel:
        return self._lessons.cost

    def observe(self, step: Step) -> None:
        if self._lessons.step >= WARM_UP:  # later on some steps are left out
            before, self._lessons = self._lessons, Lessons(self._facts)
            self._lessons.cost, self._lessons.minds = before.cost, before.minds
        self._lessons.observe(step)


class _Learner(Watcher):
    """Learns prices from steps as the adaptive policy does, and the host's beside."""

    name = "calibration"

    def __init__(self, engine: Engine, clock: Callable[[], float]) -> None:
        self._learner = EveryStep(Facts(clock=clock, context_price=_context_price(engine)))
        self._clock = clock
        self._ended_s: float | None = None
        self.host = LinearCost(HOST_SIZES)

    @property
    def cost(self) -> CostModel:
        return self._learner.cost

    def note_pass(self, point: Point) -> None:
        self.cost.passes.observe(point.num_rows, point.num_read, point.num_visits, point.seconds)

    def observe(self, step: Step) -> None:
        now_s = self._clock()
        self._learner.observe(step)
        is_next = all(row.num_tokens == 1 for row in step.batch.rows)
        if self._ended_s is not None and step.times is not None and is_next:
            between_s = max(now_s - self._ended_s - step.times.total, 0.0)
            self.host.observe((1.0, len(step.batch.rows)), between_s)
        self._ended_s = self._clock()


def lines(calibration: Calibration, engine: Engine) -> dict[str, Any]:
    """The roofline in the units of data sheets; empty where there is none."""
    found, spec = calibration.roofline, engine.spec
    if found is None:
        return {}
    weight_bytes = spec.num_parameters * spec.dtype.itemsize
    kv_bytes = KVPool.bytes_per_block(spec.kv_shapes, 1, spec.dtype)
    return {
        "ridge_rows": found.ridge,
        "weights_gb_per_s": weight_bytes / found.weights_s / 1e9 if found.ridge else None,
        "gflop_per_s": 2 * spec.num_parameters / found.row_s / 1e9 if found.row_s else None,
        "kv_gb_per_s": kv_bytes / found.byte_s / 1e9 if found.byte_s else None,
        "overhead_ms": 1e3 * found.overhead_s,
        "relative_error": found.error,
    }


def _table(points: Items[Point], fitted: Roofline | None) -> list[dict[str, Any]]:
    """Points with the names that figures read, the monotone table and the fit beside them."""
    told = []
    for context in sorted({point.context for point in points}):
        row = sorted((p for p in points if p.context == context), key=lambda p: p.num_rows)
        for point, rising in zip(row, roofline.monotone([p.seconds for p in row]), strict=True):
            fit = None if fitted is None else fitted.seconds(point)
            told.append({"rows": point.num_rows, **point._asdict(), "monotone": rising, "fit": fit})
    return told


def _shapes(rows: Items[int], contexts: Items[int]) -> Iterator[Shape]:
    """Decoding, verification, and prompts."""
    for context in contexts:
        for num_rows in rows:
            yield Shape(num_rows, 1, context)
            if num_rows % VERIFIED == 0:
                yield Shape(num_rows // VERIFIED, VERIFIED, context)
    if contexts:
        yield from (Shape(1, num_rows, 0) for num_rows in PROMPT_ROWS)


def _fits(engine: Engine, shape: Shape) -> bool:
    manager, length = engine.manager, shape.context + shape.rows_each
    per_sequence = -(-length // manager.block_size)
    is_short = length <= engine.max_model_len
    return is_short and shape.num_sequences * per_sequence <= manager.num_free


def _room(manager: BlockManager, shape: Shape) -> BlockTable:
    table, _ = manager.open((0,), "calibration")
    is_there = manager.reserve(table, shape.context + shape.rows_each)
    assert is_there, "shapes without room are left out"
    return table


def _piece(table: BlockTable, shape: Shape) -> Piece:
    """A draft below one committed token, or a prompt."""
    if shape.context:
        draft = DraftTree.chain((0,) * (shape.rows_each - 1), "calibration")
        return Piece(table, shape.context, (0,), draft, True)
    return Piece(table, 0, (0,) * shape.rows_each, EMPTY_TREE, True)


def _point(shape: Shape, timings: list[float]) -> Point:
    """The fastest tenth: whatever else runs on the machine only adds."""
    ordered = sorted(timings)
    seconds = ordered[len(ordered) // 10]
    spread = ordered[3 * len(ordered) // 4] - ordered[len(ordered) // 4]
    return Point(*shape, seconds, spread / 2 / seconds, len(ordered))


def _batches(questions: Items[Question]) -> Iterator[list[Question]]:
    """One alone, then several together, over and over; the third of three is drafted shallow."""
    at = 0
    while True:
        for size in (PARALLEL, 1, PARALLEL):
            yield [questions[(at + i) % len(questions)] for i in range(size)]
            at += size


def _deep(speculation: SpeculationParams) -> SpeculationParams:
    if speculation.num_draft_tokens is not None:
        return with_depth(speculation, speculation.num_draft_tokens)
    return with_depth(speculation, DRAFT_DEPTH)


def _shallow(speculation: SpeculationParams) -> SpeculationParams:
    return speculation if speculation.is_off else with_depth(speculation, 2)


def with_depth(speculation: SpeculationParams, depth: int) -> SpeculationParams:
    """The same at exactly this K, which is what a K without a policy means."""
    return replace(speculation, num_draft_tokens=depth, policy=None, policy_options={})


def _context_price(engine: Engine) -> float:
    """Bytes of a token's KV over bytes of the weights."""
    spec = engine.spec
    kv_bytes = KVPool.bytes_per_block(spec.kv_shapes, 1, spec.dtype)
    return kv_bytes / max(spec.num_parameters * spec.dtype.itemsize, 1)
