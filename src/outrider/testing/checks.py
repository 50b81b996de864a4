"""check_drafter: what every drafter must pass, built in or from a stranger.

Each check raises AssertionError with what broke.
"""

import gc
import pickle
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence as Items
from copy import copy
from dataclasses import dataclass, field, replace
from itertools import count, product
from typing import Any, TypeAlias

from outrider.cache.pool import KVPool
from outrider.draft.base import Drafter, Warmth
from outrider.engine.engine import Engine
from outrider.errors import PairError, RequestError
from outrider.models.decoder import Decoder
from outrider.request import Request, SamplingParams, SpeculationParams
from outrider.sequence import Sequence
from outrider.step import DraftTree, Row, RowPlan
from outrider.stream.events import Committed
from outrider.testing.outputs import assert_drawn_as_recorded, assert_law, target_law
from outrider.testing.tiny import Made, run, tiny_decoder, tiny_engine
from outrider.testing.watch import Drafted, Watch

Tokens: TypeAlias = dict[tuple[str, int], list[int]]
OFF = SpeculationParams(method="off")
RECORDING = ("probabilistic", "independent")  # sample methods that record what they drew from
# By method and shape, the rules that read the recorded laws, most sensitive ones first.
LAW_RULES = {
    ("probabilistic", 1): ("block", "rejection"),
    ("probabilistic", 2): ("traversal", "tree"),
    ("independent", 1): ("block", "rejection"),
    ("independent", 2): ("gbv", "traversal", "tree"),
}
GREEDY = SamplingParams(max_tokens=16, ignore_eos=True)
SAMPLED = SamplingParams(max_tokens=16, temperature=0.9, ignore_eos=True)
SHAPED = SamplingParams(
    max_tokens=16,
    min_tokens=6,
    temperature=1.1,
    top_k=60,
    top_p=0.98,
    repetition_penalty=1.2,
    frequency_penalty=0.2,
    logit_bias={70: float("-inf")},
    stop=("a", "m"),
    stop_token_ids=(50, 51, 52),
)
CONSTRAINED = SamplingParams(max_tokens=16, temperature=0.8, regex="[a-z]{2,30}( [a-z]{1,9})*")
NUM_BLOCKS, FEW_BLOCKS = 256, 24
ABORTED, ABORT_AT, RESTORE_AT = "aborted", 3, 4
LAW_PROMPT, LAW_TOKENS, LAW_LENGTH = (30, 31, 32, 33, 30, 31), (20, 21, 22), 3
# Three tokens are so much likelier that no other can come: the law of the output is a small table.
FEW_TOKENS = SamplingParams(
    max_tokens=LAW_LENGTH + 1,
    temperature=2.0,
    logit_bias=dict.fromkeys(LAW_TOKENS, 200.0),
    ignore_eos=True,
)
NUM_SEEDS = 300


def check_drafter(
    drafter: str | Callable[[], Drafter],
    *,
    speculation: Mapping[str, Any] | None = None,
    beside: Items[str] = (),
    must_draft: bool = True,
    num_requests: int = 4,
    **engine: Any,
) -> None:
    """Whatever it drafts, the output is what it is without it, and the contract is kept (1.7).

    - Every tree is as deep, wide and large as planned at most, of the vocabulary, and lawful.
    - The tokens are those of plain decoding: greedy, sampled in every way the drafter knows, with
      all settings, under a grammar; beside others, n > 1, stopped, aborted, preempted.
    - What was opened is closed, and nothing is held after that.
    - A snapshot can leave the process; whoever takes it back drafts on, and one of warmth R1 or R2
      as if nothing had happened.
    - Where it records laws, tokens are drawn from those, and the output of a rule that reads them
      has the target's law.

    Args:
        drafter: a registered name, a class, or a function that makes one; a class with `build` is
            shown the engine's models.
        speculation: further keys of `SpeculationParams` ("drafter_options", "prediction_token_ids"
            ...), which a drafter may need.
        beside: registered drafters that the engine has too, for one that composes others.
        must_draft: fail a drafter that never drafts anything.
        num_requests: that ask for the drafter, beside those with n > 1, without it, and aborted.
        engine: further arguments of `tiny_engine` (datastore, target ...).
    """
    trial = Trial(
        drafter=drafter,
        speculation=speculation or {},
        beside=tuple(beside),
        num_requests=num_requests,
        options=engine,
    )
    _check_tokens(trial)
    _check_snapshots(trial)
    _check_laws(trial)
    assert trial.has_drafted or not must_draft, f"{trial.name} never drafted anything"
    gc.collect()
    for watch in trial.watches:
        watch.check_released()


@dataclass(kw_only=True)
class Trial:
    """One drafter under check: makes engines with it, and watches all drafters in them."""

    drafter: Made
    speculation: Mapping[str, Any]
    beside: tuple[str, ...]
    num_requests: int
    options: Mapping[str, Any]
    name: str = field(init=False)
    target: Decoder = field(default_factory=tiny_decoder)
    watches: list[Watch] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.name = _name_of(self.drafter)

    def engine(self, num_blocks: int = NUM_BLOCKS, **config: Any) -> tuple[Engine, Watch]:
        """A new one, and the watch over the drafter in it; one longest sequence always fits."""
        given = {"target": self.target, "draft_noise": 0.01, **self.options}
        options = {"max_model_len": min(256, num_blocks * 4), **config, **given.pop("options", {})}
        made = tiny_engine(
            drafters=[*self.beside, self.drafter],
            num_blocks=num_blocks,
            options=options,
            **given,
        )
        names = made.drafters.names()
        watches = {n: Watch(made.drafters[n], made.spec.vocab_size, names) for n in names}
        self.watches += watches.values()
        return made, watches[self.name]

    @property
    def has_drafted(self) -> bool:
        return any(w.drafted for w in self.watches if w.drafter.name == self.name)

    def asked(self, **keys: Any) -> SpeculationParams:
        usual = {"method": self.name, "num_draft_tokens": 3}
        return SpeculationParams(**{**usual, **keys, **self.speculation})

    def widths(self, about: Drafter) -> list[int]:
        """Those worth a run of their own."""
        known = {about.min_width, about.default_width, min(2, about.max_width)}
        return [self.speculation["width"]] if "width" in self.speculation else sorted(known)

    def methods(self, about: Drafter) -> tuple[str, ...]:
        asked = self.speculation.get("draft_sample_method")
        return (asked,) if asked else about.sample_methods


def _name_of(make: Made) -> str:
    """A class tells before it is made."""
    if isinstance(make, str):
        return make
    return getattr(make, "name", "") or make().name


def _check_tokens(trial: Trial) -> None:
    about = trial.engine()[0].drafters[trial.name]
    num_preemptions = 0
    for sampling in (GREEDY, SAMPLED, SHAPED, CONSTRAINED):
        plain = _served(trial.engine()[0], trial, sampling, OFF)
        ways = trial.methods(about) if sampling is SAMPLED else (None,)
        sizes = (NUM_BLOCKS, FEW_BLOCKS) if sampling is GREEDY else (FEW_BLOCKS,)
        widths = trial.widths(about) if sampling in (GREEDY, SAMPLED) else (None,)
        for method, width, num_blocks in product(ways, widths, sizes):
            asked = trial.asked(width=width, draft_sample_method=method)
            used, _ = trial.engine(num_blocks)
            seen = _served(used, trial, sampling, asked)
            _assert_same(seen, plain, f"{trial.name}, {sampling=}, {asked=}")
            held = used.manager.num_used
            assert held == 0, f"{held} KV blocks of the target are still held"
            num_preemptions += used.stats.num_preemptions
    assert num_preemptions, "nobody was preempted: the check itself is too tame"


def _served(
    engine: Engine,
    trial: Trial,
    sampling: SamplingParams,
    asked: SpeculationParams,
    between: Callable[[int], None] = lambda step: None,
) -> Tokens:
    """The tokens of all requests; `between` is called before each step."""
    for request in _requests(trial, sampling, asked):
        engine.add(request)
    tokens: Tokens = defaultdict(list)
    for step in count():
        if step == ABORT_AT:
            engine.abort(ABORTED)
        between(step)
        if not engine.has_work():
            break
        for event in engine.step():
            if isinstance(event, Committed):
                tokens[event.request_id, event.index] += event.token_ids
    return tokens


def _requests(trial: Trial, sampling: SamplingParams, asked: SpeculationParams) -> list[Request]:
    """Those of the trial, and: one decoded plainly, one that is aborted, one of n = 3."""
    kinds = [(f"r{i}", sampling, asked) for i in range(trial.num_requests)]
    kinds += [("plain", sampling, OFF), (ABORTED, sampling, asked)]
    kinds += [("three", replace(sampling, n=3), asked)]
    return [
        Request(
            id=name,
            prompt_token_ids=tuple((7 * i + 5 * (j % 5)) % 40 + 10 for j in range(6 + i)),
            sampling=sampling,
            speculation=speculation,
            seed=100 + i,
        )
        for i, (name, sampling, speculation) in enumerate(kinds)
    ]


def _assert_same(seen: Tokens, plain: Tokens, told: str) -> None:
    for key, tokens in plain.items():
        mine = seen.get(key, [])
        length = min(len(mine), len(tokens)) if key[0] == ABORTED else len(tokens)
        is_same = mine[:length] == tokens[:length] and (key[0] == ABORTED or len(mine) == length)
        assert is_same, f"changed the output of {key}: {told}"


def _check_snapshots(trial: Trial) -> None:
    """Some are taken in mid-flight, and taken back there and by drafters of other engines."""
    used, watch = trial.engine(enable_prefix_caching=False)
    heirs: list[Heir] = []

    def between(step: int) -> None:
        mine = [s for s in used.scheduler.running if s.speculation.drafter == trial.name]
        if step == RESTORE_AT:
            heirs.extend(_heirs(trial, used, watch.drafter, mine))
        if step == RESTORE_AT + 1:
            _check_heirs(trial, watch.drafted, heirs)
            heirs.clear()
            for seq in mine:
                _interrupt(watch.drafter, seq)

    plain = _served(trial.engine()[0], trial, GREEDY, OFF)
    seen = _served(used, trial, GREEDY, trial.asked(), between)
    _assert_same(seen, plain, f"{trial.name}, closed and restored in mid-flight")


class Heir:
    """A drafter of another engine that took over a sequence, as it stood then.

    That engine has the target's KV, for there are drafters that read it; a snapshot is of what a
    drafter keeps beside.
    """

    def __init__(self, trial: Trial, giver: Engine, seq: Sequence, state: bytes) -> None:
        self.seq = copy(seq)
        self.seq.tokens, self.seq.drafter_state = list(seq.tokens), {}
        self.engine, watch = trial.engine()
        self.drafter = watch.drafter
        _copy_kv(giver.runner.pool, self.engine.runner.pool)
        self.drafter.open(self.seq)
        self.drafter.restore(self.seq, pickle.loads(state))

    def draft(self, plan: RowPlan) -> DraftTree:
        (tree,) = self.drafter.draft([Row(self.seq, 1, plan.num_nodes)], [plan])
        return tree

    def close(self) -> None:
        self.drafter.close(self.seq)


def _copy_kv(source: KVPool, into: KVPool) -> None:
    for theirs, mine in zip(source.layers, into.layers, strict=True):
        mine.keys.copy_(theirs.keys)
        mine.values.copy_(theirs.values)


def _heirs(
    trial: Trial, giver: Engine, drafter: Drafter, sequences: Items[Sequence]
) -> Iterator[Heir]:
    for seq in sequences:
        snapshot = drafter.snapshot(seq)
        if snapshot is not None:
            told = f"{trial.name}: a snapshot of drafter {snapshot.drafter!r}"
            assert snapshot.drafter == trial.name, told
            covered = snapshot.num_tokens
            told = f"{trial.name}: a snapshot covers {covered} of {len(seq.tokens)} tokens"
            assert 0 < covered <= len(seq.tokens), told
            yield Heir(trial, giver, seq, pickle.dumps(snapshot))


def _check_heirs(trial: Trial, drafted: Items[Drafted], heirs: Items[Heir]) -> None:
    """An heir drafts what came next from the one who went on, if state follows from tokens."""
    made = {(at.seq_id, at.num_tokens): at for at in drafted}
    for heir in heirs:
        at = made.get((heir.seq.id, len(heir.seq.tokens)))
        if at is not None:
            tree = heir.draft(at.plan)
            is_same = (tree.tokens, tree.parents) == (at.tree.tokens, at.tree.parents)
            told = f"{trial.name} drafts {tree.tokens} after a restore, {at.tree.tokens} without"
            assert is_same or heir.drafter.warmth is Warmth.R0, told
        heir.close()


def _interrupt(drafter: Drafter, seq: Sequence) -> None:
    snapshot = drafter.snapshot(seq)
    drafter.close(seq)
    drafter.open(seq)
    if snapshot is not None:
        drafter.restore(seq, pickle.loads(pickle.dumps(snapshot)))


def _check_laws(trial: Trial) -> None:
    about = trial.engine()[0].drafters[trial.name]
    usual = [width for width in (1, 2) if about.min_width <= width <= about.max_width]
    widths = [trial.speculation["width"]] if "width" in trial.speculation else usual
    for method, width in product(trial.methods(about), widths):
        if method in RECORDING:
            _check_law(trial, method, width)


def _check_law(trial: Trial, method: str, width: int) -> None:
    used, watch = trial.engine(1024, max_num_seqs=64, check_integrity=False)
    for rule in LAW_RULES[method, min(width, 2)]:
        asked = trial.asked(width=width, draft_sample_method=method, verifier=rule)
        try:
            drawn = run(used, [_seeded(seed, asked) for seed in range(NUM_SEEDS)])
        except (PairError, RequestError):
            continue  # the drafter, or a part of it, does not draft so for this rule
        told = f"{trial.name}, {method}, {width=}, verifier={rule}"
        assert_drawn_as_recorded(watch.drafted, told)
        seen = Counter(tuple(tokens[:LAW_LENGTH]) for tokens in drawn.values())
        law = target_law(used, LAW_PROMPT, LAW_TOKENS, LAW_LENGTH, FEW_TOKENS.temperature)
        assert_law(seen, law, told)
        return


def _seeded(seed: int, asked: SpeculationParams) -> Request:
    return Request(
        id=f"{seed}",
        prompt_token_ids=LAW_PROMPT,
        sampling=FEW_TOKENS,
        speculation=asked,
        seed=seed,
    )
