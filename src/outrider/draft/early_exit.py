"""Early exit: the target's own first layers draft, over the target's own keys and values.

Elhoushi et al. 2024 (LayerSkip). The first E layers, the last norm and the head
are a smaller model that shares its weights and the first E layers of the KV pool with the whole.
Drafting writes KV of draft tokens where the pass that verifies will: to slots that are reserved for
it, and, layer by layer, with the values that it will write again. That pass runs all layers; it
does not take over what the first ones found.

Shape legend: V vocabulary.
"""

from collections.abc import Mapping, Sequence as Items
from copy import copy
from dataclasses import dataclass, field

from torch import Tensor

from outrider.cache.pool import KVPool
from outrider.draft.base import Snapshot, Surroundings, Warmth
from outrider.draft.drawing import draft_law, draft_stream
from outrider.errors import ConfigError
from outrider.models.decoder import Decoder
from outrider.models.runner import Piece, Runner
from outrider.request import Option
from outrider.sampling.rng import Stream
from outrider.sequence import Sequence
from outrider.step import EMPTY_TREE, Commit, DraftTree, Plan, Row, RowPlan, TargetOutput

MAX_TAIL = 32  # tokens without KV that are worth running through the first layers twice


@dataclass(eq=False, slots=True)
class ExitCourse:
    """One row while it is being drafted.

    Attributes:
        stream: what tokens are drawn from; None picks the argmax.
        laws: of the drafted tokens where they are recorded, else empty.
    """

    seq: Sequence
    depth: int
    stream: Stream | None
    tokens: list[int] = field(default_factory=list)
    laws: list[Tensor | None] = field(default_factory=list)

    @property
    def is_done(self) -> bool:
        return len(self.tokens) >= self.depth

    def piece(self) -> Piece:
        """The committed tokens without KV at first, then the last drafted one."""
        seq = self.seq
        if not self.tokens:
            return Piece(seq.table, seq.num_cached, seq.tokens[seq.num_cached :], EMPTY_TREE, True)
        position = len(seq.tokens) + len(self.tokens) - 1
        return Piece(seq.table, position, self.tokens[-1:], EMPTY_TREE, True)

    def advance(self, output: TargetOutput, row: int) -> None:
        """One more token after this row of logits; none, and the end, where no law can be made."""
        if self.stream is None and self.seq.shaper.is_plain_greedy and output.argmax_N[row] >= 0:
            self.tokens.append(output.argmax_N[row])
            return
        q_V = draft_law(self.seq, output.logits_NV[row], self.tokens)
        if q_V is None:
            self.depth = len(self.tokens)
        elif self.stream is None:
            self.tokens.append(int(q_V.argmax()))
        else:
            self.tokens.append(self.stream.pick(q_V))
            if self.seq.speculation.draft_sample_method == "probabilistic":
                self.laws.append(q_V)


class EarlyExitDrafter:
    """Chains of K tokens from the first layers of the target.

    Methods: "greedy" picks the argmax; "probabilistic" draws from q with noise of its own and
    records q; "coupled" draws from q with the noise that the target will use. A row with more than
    `MAX_TAIL` tokens to catch up on, as at the end of a prefill, is not drafted for.

    Args:
        target: the network that is sped up, and `pool` its KV.
        num_layers: E of requests that do not say; 0 is a quarter of the layers, at least one.
    """

    name = "early_exit"
    needs: tuple[str, ...] = ("target layers",)
    warmth = Warmth.R1
    default_draft_tokens = 6
    default_width = min_width = max_width = 1
    default_num_nodes: int | None = None
    sample_methods: tuple[str, ...] = ("greedy", "probabilistic", "coupled")
    options: Mapping[str, Option] = {
        "num_layers": Option(
            0, "first layers of the target that draft; 0 is a quarter of them", low=0
        )
    }

    def __init__(self, target: Decoder, pool: KVPool, num_layers: int = 0) -> None:
        num_all = len(target.spec.kv_shapes)
        assert 0 <= num_layers <= num_all
        self.target = target
        self.pool = pool
        self.num_layers = num_layers or max(1, num_all // 4)
        self.num_forwards = 0
        self._runners: dict[int, Runner] = {}
        about = EarlyExitDrafter.options["num_layers"]
        self.options = {"num_layers": about._replace(high=num_all - 1)}

    @classmethod
    def build(cls, surroundings: Surroundings) -> "EarlyExitDrafter":
        """ConfigError where the target cannot be cut."""
        runner = surroundings.target.runner
        network = runner.network
        if not isinstance(network, Decoder):
            raise ConfigError(
                f"drafter 'early_exit' runs some layers of the target, which {network.spec.name!r} "
                "allows in the lean decoder only: load it with network='lean' if its family is "
                "known there, or leave 'early_exit' out of drafters=..."
            )
        if len(network.spec.kv_shapes) < 2:
            raise ConfigError(
                f"drafter 'early_exit' needs two layers or more; {network.spec.name!r} has one: "
                "leave it out of drafters=..."
            )
        return cls(network, runner.pool)

    def open(self, seq: Sequence) -> None:
        """Nothing is kept between steps: the KV is the target's."""

    def draft(self, rows: Items[Row], plan: Plan) -> list[DraftTree]:
        courses = [_course(row, part) for row, part in zip(rows, plan, strict=True)]
        by_layers: dict[int, list[ExitCourse]] = {}
        for course in courses:
            if not course.is_done:
                by_layers.setdefault(self._num_layers(course.seq), []).append(course)
        for num_layers, together in by_layers.items():
            self._run(self._runner(num_layers), together)
        return [DraftTree.chain(course.tokens, self.name, course.laws) for course in courses]

    def observe(self, commits: Items[Commit], output: TargetOutput) -> None:
        """Nothing to learn: the pass that verified wrote all KV anew."""

    def close(self, seq: Sequence) -> None:
        """Nothing is held."""

    def snapshot(self, seq: Sequence) -> Snapshot | None:
        return None

    def restore(self, seq: Sequence, snapshot: Snapshot) -> int:
        return len(seq.tokens)

    def _num_layers(self, seq: Sequence) -> int:
        return int(seq.speculation.options.get("num_layers", 0)) or self.num_layers

    def _runner(self, num_layers: int) -> Runner:
        """Made when first asked for; it costs no weights and no KV."""
        if num_layers not in self._runners:
            network = self.target.truncated(num_layers)
            self._runners[num_layers] = Runner(network, first_layers(self.pool, num_layers))
        return self._runners[num_layers]

    def _run(self, runner: Runner, courses: list[ExitCourse]) -> None:
        while courses:
            output = runner.run([course.piece() for course in courses])
            self.num_forwards += 1
            for course, row in zip(courses, output.first, strict=True):
                course.advance(output, row)
            courses = [course for course in courses if not course.is_done]


def first_layers(pool: KVPool, num_layers: int) -> KVPool:
    """The same slots, of the first layers alone."""
    first = copy(pool)
    first.layers = pool.layers[:num_layers]
    return first


def _course(row: Row, plan: RowPlan) -> ExitCourse:
    is_behind = row.seq.num_uncached > MAX_TAIL
    depth = 0 if is_behind else min(plan.depth, plan.num_nodes)
    asked = row.seq.speculation.draft_sample_method
    method = asked if asked in EarlyExitDrafter.sample_methods else "greedy"
    return ExitCourse(row.seq, depth, draft_stream(row.seq, method))
