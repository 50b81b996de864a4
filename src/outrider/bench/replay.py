"""Replay: drafters that read tokens alone, over recorded answers, without a model.

At each call the drafter proposes and the record decides: the path that agrees with the recorded
answer is accepted, and one more token is committed, as a target of temperature 0 that gave this
answer would have done. For answers that were drawn it is an estimate.
"""

import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence as Items
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from outrider.bench.calibration.prediction import Load, Predictor
from outrider.bench.statistics import INTERVAL, NUM_RESAMPLES
from outrider.bench.workloads import Encoded
from outrider.control.controller import Controller
from outrider.draft.base import Composes, Drafter, ModelParts, Surroundings, Warmth
from outrider.draft.drafters import Drafters
from outrider.engine.resolve import resolve
from outrider.errors import ConfigError, OutriderError, RequestError
from outrider.models.base import ModelSpec
from outrider.registry import DRAFTERS
from outrider.request import MAX_NODES, Request, SamplingParams, SpeculationParams
from outrider.sequence import Sequence, Status
from outrider.step import Batch, Commit, Row, TargetOutput
from outrider.tokenizer import Tokenizer
from outrider.verify.sampled import walk

PREDICTION = "prediction"
WITHOUT_MODEL = {"datastore", PREDICTION, "drafters"}
SAMPLING = SamplingParams(max_tokens=None)
CONTROLLER = Controller(sys.maxsize)
NOTHING = torch.empty(0, 0)

Columns: TypeAlias = NDArray[np.float64]


class Counts(NamedTuple):
    """What happened, summed.

    Attributes:
        num_calls: steps of decoding; num_drafts: those that carried a draft.
        num_draft_tokens, num_accepted_tokens: nodes drafted; nodes on accepted paths.
        num_tokens: committed.
        draft_seconds: of the processor, inside `draft`, for other processes shall not count;
            other_seconds: inside `open`, `observe` and `close`.
    """

    num_calls: int = 0
    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_tokens: int = 0
    draft_seconds: float = 0.0
    other_seconds: float = 0.0

    def __add__(self, other: Any) -> "Counts":
        return Counts(*(mine + its for mine, its in zip(self, other, strict=True)))


class Interval(NamedTuple):
    """An estimate, and its 95 % bootstrap interval over sessions; None for a single session."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True, kw_only=True)
class Replayed:
    """How one drafter did on one workload.

    Attributes:
        acceptance_length: 1 + accepted tokens / drafts, over the calls that carried a draft.
        tokens_per_call: committed tokens / calls, calls without a draft counted: speed follows it.
    """

    workload: str
    speculation: SpeculationParams
    num_records: int
    counts: Counts
    acceptance_length: Interval
    tokens_per_call: Interval

    @property
    def acceptance_rate(self) -> float:
        """Accepted / drafted tokens; 0.0 when nothing was drafted."""
        return self.counts.num_accepted_tokens / max(1, self.counts.num_draft_tokens)

    @property
    def draft_share(self) -> float:
        """Share of calls that carried a draft."""
        return self.counts.num_drafts / self.counts.num_calls

    @property
    def draft_us(self) -> float:
        """Microseconds of processor time per call inside `draft`, in calls without a draft too."""
        return 1e6 * self.counts.draft_seconds / self.counts.num_calls

    @property
    def other_us(self) -> float:
        """Likewise inside `open`, `observe` and `close`."""
        return 1e6 * self.counts.other_seconds / self.counts.num_calls


def replay(
    records: Iterable[Encoded],
    make: Callable[[], Drafters],
    params: SpeculationParams,
    *,
    workload: str = "",
    is_fresh: bool = False,
    tick: Callable[[], None] = lambda: None,
) -> Replayed:
    """Plays the records in their order, so that what drafters share between sequences warms up.

    Args:
        make: new drafters; called once, or before each record where `is_fresh`.
        params: who drafts and how far. A drafter that reads a prediction is given the record's;
            records without one are left out then.
        tick: called after every record.

    Raises:
        RequestError: `params` cannot be honoured by these drafters, or no record is left.
    """
    drafters = make()
    wants = wants_prediction(drafters, params)
    counts: list[Counts] = []
    sessions: list[str] = []
    for index, record in enumerate(records):
        tick()
        if wants and not record.prediction:
            continue
        if is_fresh and counts:
            drafters = make()
        asked = replace(params, prediction_token_ids=record.prediction) if wants else params
        counts.append(_play(_sequence(record, index, drafters, asked), record.output, drafters))
        sessions.append(record.session or f"record {index}")
    if not counts:
        raise RequestError(
            f"method={params.method!r}: no record carries a prediction; leave it out"
        )
    return _summary(workload, params, counts, sessions)


def predicted(row: Mapping[str, Any], predictor: Predictor) -> float:
    """How many times as fast one request at a time would be with these drafts.

    Args:
        row: sums and means of a replay, as in a result's file. What verifying costs beside the
            pass is taken to be what plain decoding's rest is.
    """
    plain_s = predictor.plain_s(Load(batch=1, context=0, is_drawn=False))
    num_nodes = row["num_draft_tokens"] / max(row["num_drafts"], 1)
    passes = predictor.cost.passes
    more_s = row["draft_share"] * (passes.predict(1 + num_nodes) - passes.predict(1))
    drafting_s = 1e-6 * (row["draft_us_per_call"] + row["other_us_per_call"])
    return float(row["tokens_per_call"]["value"] * plain_s / (plain_s + more_s + drafting_s))


def without_model(
    name: str, tokenizer: Tokenizer | None = None, datastore: str | None = None
) -> Drafters:
    """The drafter of that name, with all that it may compose, built where no model is.

    Raises:
        ConfigError: it is unknown, or needs more than tokens.
    """
    surroundings = Surroundings(target=_vocabulary(tokenizer), datastore=datastore)
    _refuse_models(name)
    parts: dict[str, Drafter] = {}
    if _composes(name):
        parts = {part: made for part, made in _all_built(surroundings) if part != name}
    return Drafters([*parts.values(), _built(name, replace(surroundings, drafters=parts))])


def wants_prediction(drafters: Drafters, params: SpeculationParams) -> bool:
    """Whether whoever drafts reads a prediction, itself or through a part of it."""
    drafter = drafters[params.method or ""]
    if PREDICTION in drafter.needs:
        return True
    if not isinstance(drafter, Composes):
        return False
    parts = drafter.parts(params.drafter_options)
    return any(PREDICTION in drafters[part].needs for part in parts)


def _vocabulary(tokenizer: Tokenizer | None) -> ModelParts:
    """What is left of a target without its network: the vocabulary, and a place to draft on."""
    spec = ModelSpec(
        name="replay",
        family="",
        vocab_size=0 if tokenizer is None else tokenizer.vocab_size,
        max_positions=sys.maxsize,
        eos_token_ids=(),
        kv_shapes=(),
        dtype=torch.float32,
        device=torch.device("cpu"),
        num_parameters=0,
        fingerprint="",
    )
    runner: Any = SimpleNamespace(network=SimpleNamespace(spec=spec))
    manager: Any = None
    return ModelParts(runner=runner, manager=manager, tokenizer=tokenizer)


def _refuse_models(name: str) -> None:
    """ConfigError unless tokens are all that a drafter needs."""
    found = DRAFTERS.load(name)
    missing = [need for need in found.needs if need not in WITHOUT_MODEL]
    if not missing and found.warmth is not Warmth.R0 and not _composes(name):
        missing = ["a model"]
    if missing:
        raise ConfigError(f"drafter {name!r} needs {', '.join(missing)}: it cannot be replayed")


def _composes(name: str) -> bool:
    return "drafters" in DRAFTERS.load(name).needs


def _built(name: str, surroundings: Surroundings) -> Drafter:
    found = DRAFTERS.load(name)
    made: Drafter = found.build(surroundings) if hasattr(found, "build") else found()
    return made


def _all_built(surroundings: Surroundings) -> Iterable[tuple[str, Drafter]]:
    """Those that read tokens alone and compose nothing, as far as they can be had."""
    for name in DRAFTERS.names():
        try:
            _refuse_models(name)
            if not _composes(name):
                yield name, _built(name, surroundings)
        except OutriderError:
            continue


def _sequence(
    record: Encoded, index: int, drafters: Drafters, params: SpeculationParams
) -> Sequence:
    request = Request(
        id=f"record-{index}",
        prompt_token_ids=tuple(record.prompt),
        sampling=SAMPLING,
        speculation=params,
    )
    return Sequence(
        id=f"record-{index}#0",
        request=request,
        index=0,
        tokens=list(record.prompt),
        seed=0,
        speculation=resolve(params, SAMPLING, drafters, "", ""),
        status=Status.RUNNING,
        arrival=index,
    )


def _play(seq: Sequence, truth: Items[int], drafters: Drafters) -> Counts:
    """One record from its first token to its last."""
    start = time.process_time()
    drafters.open(seq)
    counts = Counts(other_seconds=time.process_time() - start)
    while seq.num_generated < len(truth):
        counts += _call(seq, truth, drafters)
    start = time.process_time()
    seq.status = Status.FINISHED
    drafters.close(seq)
    return counts + Counts(other_seconds=time.process_time() - start)


def _call(seq: Sequence, truth: Items[int], drafters: Drafters) -> Counts:
    """One step of decoding: draft, let the record decide, commit."""
    batch = Batch([Row(seq, seq.num_uncached, MAX_NODES)], [])
    plan = CONTROLLER.plan(batch)
    start = time.process_time()
    (tree,) = drafters.draft(batch, plan)
    drafted = time.process_time()
    start_at = seq.num_generated
    ahead = iter(truth[start_at : start_at + len(tree) + 1])
    accepted, token, *_ = walk(tree, lambda _: next(ahead, -1))
    path = [*(tree.tokens[node] for node in accepted), *([token] if token >= 0 else [])]
    seq.tokens += path
    seq.num_cached = len(seq.tokens) - 1
    commit = Commit(
        seq=seq,
        tree=tree,
        tokens=tuple(path),
        num_drafted=len(tree),
        num_accepted=len(accepted),
        num_kept=len(accepted),
        accepted=accepted,
        finish_reason="stop" if seq.num_generated == len(truth) else None,
    )
    walked = time.process_time()
    drafters.observe([commit], TargetOutput(NOTHING, [-1], []))
    return Counts(
        num_calls=1,
        num_drafts=len(tree) > 0,
        num_draft_tokens=len(tree),
        num_accepted_tokens=len(accepted),
        num_tokens=len(path),
        draft_seconds=drafted - start,
        other_seconds=time.process_time() - walked,
    )


def _summary(
    workload: str, params: SpeculationParams, counts: list[Counts], sessions: list[str]
) -> Replayed:
    by_session: dict[str, Counts] = {}
    for session, count in zip(sessions, counts, strict=True):
        by_session[session] = by_session.get(session, Counts()) + count
    rows_SC = np.array(list(by_session.values()), dtype=np.float64)
    return Replayed(
        workload=workload,
        speculation=params,
        num_records=len(counts),
        counts=sum(counts, Counts()),
        acceptance_length=bootstrap(rows_SC, _acceptance_length),
        tokens_per_call=bootstrap(rows_SC, _tokens_per_call),
    )


def _acceptance_length(sums_XC: Columns) -> Columns:
    _, num_drafts, _, num_accepted = sums_XC.T[:4]
    length_X: Columns = 1.0 + num_accepted / np.maximum(num_drafts, 1.0)
    return length_X


def _tokens_per_call(sums_XC: Columns) -> Columns:
    rate_X: Columns = sums_XC[:, 4] / sums_XC[:, 0]
    return rate_X


def bootstrap(rows_SC: Columns, ratio: Callable[[Columns], Columns]) -> Interval:
    """A ratio of sums with a percentile bootstrap over S sessions.

    Args:
        rows_SC: C sums of each session.
        ratio: of X sums over sessions [X, C], the X ratios.
    """
    value = float(ratio(rows_SC.sum(axis=0, keepdims=True))[0])
    count = len(rows_SC)
    if count < 2:
        return Interval(value, None, None)
    rng = np.random.default_rng(0)
    sums_XC = np.stack(
        [rows_SC[rng.integers(count, size=count)].sum(axis=0) for _ in range(NUM_RESAMPLES)]
    )
    tail = (1 - INTERVAL) / 2
    low, high = np.quantile(ratio(sums_XC), [tail, 1 - tail])
    return Interval(value, float(low), float(high))
