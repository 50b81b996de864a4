"""Scheduler: who runs, with how many rows, and whose KV gives way."""

import random
from itertools import count

import pytest
from hypothesis import given, settings, strategies as st

from outrider.cache.table import BlockManager
from outrider.engine.config import EngineConfig
from outrider.engine.scheduler import Scheduler
from outrider.request import Request, SamplingParams, Speculation, SpeculationParams
from outrider.sequence import Sequence, Status
from outrider.testing import events, run, tiny_engine

BLOCK = 4
arrivals = count()


def scheduler(num_blocks=64, *, caching=False, **config):
    settings = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "block_size": BLOCK, **config}
    return Scheduler(EngineConfig(**settings), BlockManager(num_blocks, BLOCK, caching))


def sequence(name, num_prompt, *, k=0, width=1, priority=0, prompt=None):
    tokens = prompt or [sum(map(ord, name)) + 7 * i for i in range(num_prompt)]
    return Sequence(
        id=name,
        request=Request(id=name, prompt_token_ids=tuple(tokens), priority=priority),
        index=0,
        tokens=list(tokens),
        seed=0,
        arrival=next(arrivals),
        speculation=Speculation(drafter="scripted" if k else "", num_draft_tokens=k, width=width),
    )


def add(target, *sequences):
    for seq in sequences:
        target.add(seq)


def step(target, *, num_accepted=0):
    """Schedules, and commits as the engine would: drafts accepted so far as there were any."""
    batch = target.schedule()
    for row in batch.rows:
        seq, was_at_end = row.seq, row.reaches_end
        assert (
            len(seq.table.blocks) * BLOCK >= seq.num_cached + row.num_tokens + row.max_draft_nodes
        )
        seq.num_cached += row.num_tokens
        if was_at_end:
            kept = min(num_accepted, row.max_draft_nodes)
            seq.num_cached += kept
            seq.tokens += [7] * (kept + 1)
        target.manager.commit(seq.table, seq.tokens, seq.num_cached)
    target.manager.check_integrity([seq.table for seq in target.running])
    return batch


def shares(batch):
    return {row.seq.id: (row.num_tokens, row.max_draft_nodes) for row in batch.rows}


def tokens_of(batch):
    return {name: num_tokens for name, (num_tokens, _) in shares(batch).items()}


def test_prompts_are_run_in_chunks_that_fill_the_budget():
    target = scheduler(max_num_batched_tokens=10)
    add(target, sequence("a", 6), sequence("b", 9), sequence("c", 3))
    assert tokens_of(step(target)) == {"a": 6, "b": 4}
    assert tokens_of(step(target)) == {"a": 1, "b": 5, "c": 3}
    assert tokens_of(step(target)) == {"a": 1, "b": 1, "c": 1}


def test_only_the_row_that_reaches_the_end_may_draft():
    target = scheduler(long_prefill_token_threshold=10)
    add(target, sequence("a", 14, k=3))
    assert shares(step(target)) == {"a": (10, 0)}
    assert shares(step(target)) == {"a": (4, 3)}
    assert shares(step(target)) == {"a": (1, 3)}


def test_one_prompt_may_not_take_more_than_the_threshold():
    target = scheduler(long_prefill_token_threshold=5)
    add(target, sequence("a", 12), sequence("b", 12))
    assert tokens_of(step(target)) == {"a": 5, "b": 5}
    assert tokens_of(step(target)) == {"a": 5, "b": 5}
    assert tokens_of(step(target)) == {"a": 2, "b": 2}


def test_drafts_get_the_rows_that_prompts_leave():
    target = scheduler(max_num_batched_tokens=12)
    add(target, sequence("a", 1, k=3))
    step(target)
    add(target, sequence("b", 19))
    assert shares(step(target)) == {"a": (1, 0), "b": (11, 0)}
    assert shares(step(target)) == {"a": (1, 3), "b": (8, 0)}


def test_seats_are_limited():
    target = scheduler(max_num_seqs=2)
    add(target, *(sequence(name, 3) for name in "abc"))
    assert set(shares(step(target))) == {"a", "b"}
    target.release(target.running[0])
    assert set(shares(step(target))) == {"b", "c"}


@settings(max_examples=40)
@given(st.data())
def test_a_step_never_exceeds_its_budget_and_everyone_who_runs_moves(data):
    """Drafts or prompts of the first never starve the last."""
    budget = data.draw(st.integers(4, 20))
    target = scheduler(
        200, max_num_seqs=4, max_num_batched_tokens=budget,
        long_prefill_token_threshold=data.draw(st.sampled_from([0, 5])),
    )  # fmt: skip
    for name in "abcd":
        size, k = data.draw(st.integers(1, 30)), data.draw(st.integers(0, 6))
        add(target, sequence(name, size, k=k, width=data.draw(st.integers(1, 3))))
    for _ in range(12):
        before = {seq.id for seq in target.running}
        batch = step(target, num_accepted=data.draw(st.integers(0, 3)))
        assert sum(t + nodes for t, nodes in shares(batch).values()) <= budget
        assert all(num_tokens >= 1 for num_tokens in tokens_of(batch).values())
        assert before <= set(shares(batch))


def test_an_urgent_prompt_leaves_a_row_for_those_who_run():
    target = scheduler(max_num_batched_tokens=8)
    add(target, *(sequence(name, 2) for name in "abc"))
    step(target)
    add(target, sequence("urgent", 30, priority=-1))
    for _ in range(3):
        assert tokens_of(step(target)) == {"a": 1, "b": 1, "c": 1, "urgent": 5}


def test_wide_drafts_of_the_first_leave_a_row_for_the_others():
    target = scheduler(max_num_seqs=4, max_num_batched_tokens=8)
    add(target, *(sequence(name, 1, k=6) for name in "abcd"))
    for _ in range(8):
        step(target)
    assert shares(step(target)) == {"a": (1, 4), "b": (1, 0), "c": (1, 0), "d": (1, 0)}


def test_smaller_priority_numbers_first_then_arrival():
    target = scheduler(max_num_seqs=1)
    late, early = sequence("late", 2, priority=1), sequence("early", 2, priority=1)
    early.arrival, late.arrival = 0, 1
    add(target, late, early, sequence("urgent", 2, priority=-1))
    order = []
    while target.has_work():
        (row,) = step(target).rows
        order.append(row.seq.id)
        row.seq.status = Status.FINISHED
        target.release(row.seq)
    assert order == ["urgent", "early", "late"]


def test_the_head_of_the_line_waits_for_its_blocks_and_nobody_overtakes():
    target = scheduler(num_blocks=8)
    add(target, sequence("a", 20), sequence("big", 16), sequence("small", 2))
    assert set(shares(step(target))) == {"a"}
    assert target.num_waiting == 2
    target.release(target.running[0])
    assert set(shares(step(target))) == {"big", "small"}


def test_waiting_for_blocks_is_no_lookup_of_the_prefix_cache():
    target = scheduler(num_blocks=8, caching=True)
    add(target, sequence("a", 20), sequence("big", 16))
    for _ in range(5):
        step(target)
    assert target.manager.queries == 20
    assert target.manager.hits == 0


def test_a_finished_sequence_that_waited_is_passed_over():
    target = scheduler()
    gone, here = sequence("gone", 3), sequence("here", 3)
    add(target, gone, here)
    gone.status = Status.FINISHED
    target.release(gone)
    assert target.num_waiting == 1
    assert set(shares(step(target))) == {"here"}
    assert target.num_waiting == 0


def test_cached_prefixes_are_not_run_again():
    target = scheduler(caching=True)
    prompt = list(range(11))
    first, second = sequence("a", 0, prompt=prompt), sequence("b", 0, prompt=prompt)
    add(target, first)
    step(target)
    add(target, second)
    assert tokens_of(step(target)) == {"a": 1, "b": 3}
    assert (first.num_prefix_hits, second.num_prefix_hits) == (0, 8)
    assert second.table.blocks[:2] == first.table.blocks[:2]


def test_the_last_in_rank_gives_way():
    target = scheduler(num_blocks=6)
    first, second, urgent = sequence("a", 8), sequence("b", 7), sequence("u", 8, priority=-1)
    add(target, first, second, urgent)
    assert set(shares(step(target))) == {"a", "b", "u"}
    batch = step(target)
    assert [seq.id for seq in batch.preempted] == ["b"]
    assert set(shares(batch)) == {"u", "a"}
    assert (second.status, second.num_cached, second.table) == (Status.WAITING, 0, None)
    assert second.num_preemptions == 1
    assert second.tokens[-1] == 7, "the log is kept"


def test_a_sequence_gives_way_itself_when_it_is_the_last():
    target = scheduler(num_blocks=4)
    add(target, sequence("a", 7), sequence("b", 8))
    step(target)
    batch = step(target)
    assert [seq.id for seq in batch.preempted] == ["b"]
    assert tokens_of(batch) == {"a": 1}


def test_nobody_is_admitted_in_a_step_that_preempts():
    """Two blocks are free then, enough for a first chunk of the very one that gave way."""
    target = scheduler(num_blocks=4, long_prefill_token_threshold=8)
    add(target, sequence("a", 7), sequence("b", 8))
    step(target)
    assert set(shares(step(target))) == {"a"}
    assert target.manager.num_free == 2


def test_a_preempted_sequence_comes_back_before_later_ones_and_runs_its_whole_log():
    target = scheduler(num_blocks=4)
    first, second, third = sequence("a", 7), sequence("b", 8), sequence("c", 1)
    add(target, first, second, third)
    step(target)
    step(target)
    target.release(target.running[0])
    batch = step(target)
    assert list(tokens_of(batch)) == ["b", "c"]
    assert tokens_of(batch)["b"] == 9, "eight of the prompt and one that was generated"
    assert second.num_cached == len(second.tokens) - 1
    assert second.num_prefix_hits == 0


def test_prefix_hits_are_those_of_the_first_admission():
    target = scheduler(num_blocks=12, caching=True)
    seq = sequence("a", 9)
    add(target, seq)
    step(target)
    target._preempt(seq)
    assert tokens_of(step(target)) == {"a": 2}
    assert seq.num_prefix_hits == 0


def test_drafts_get_what_is_free_and_no_more():
    target = scheduler(num_blocks=3)
    add(target, sequence("a", 6, k=9))
    assert shares(step(target)) == {"a": (6, 6)}
    assert shares(step(target)) == {"a": (1, 5)}


def test_a_rejected_draft_leaves_its_room_to_others_in_the_next_step():
    target = scheduler(num_blocks=4)
    add(target, sequence("a", 3, k=8))
    step(target)
    add(target, sequence("b", 8))
    assert shares(step(target)) == {"a": (1, 4), "b": (8, 0)}


def test_drafts_of_the_first_never_preempt_the_last():
    """The first in rank drafts in the very step in which the last needs a block for its token."""
    target = scheduler(num_blocks=3)
    add(target, sequence("a", 3, k=4), sequence("b", 4))
    assert shares(step(target)) == {"a": (3, 4), "b": (4, 0)}
    batch = step(target)
    assert batch.preempted == []
    assert shares(batch) == {"a": (1, 0), "b": (1, 0)}


@settings(max_examples=60)
@given(st.data())
def test_preemptions_are_those_of_plain_decoding(data):
    """With and without drafts, all rejected, the same sequences run, wait and give way."""
    sizes = data.draw(st.lists(st.integers(1, 12), min_size=2, max_size=5))
    ks = data.draw(st.lists(st.integers(1, 6), min_size=len(sizes), max_size=len(sizes)))
    num_blocks = data.draw(st.integers(8, 16))
    plain, drafting = scheduler(num_blocks), scheduler(num_blocks)
    for i, (size, k) in enumerate(zip(sizes, ks, strict=True)):
        add(plain, sequence(f"s{i}", size))
        add(drafting, sequence(f"s{i}", size, k=k))
    for _ in range(12):
        one, two = step(plain), step(drafting)
        assert tokens_of(one) == tokens_of(two)
        assert [s.id for s in one.preempted] == [s.id for s in two.preempted]


def test_everyone_finishes_however_small_the_pool():
    """One longest sequence fits; priorities, drafts and chunks notwithstanding."""
    target = scheduler(num_blocks=8, max_num_batched_tokens=9, long_prefill_token_threshold=3)
    for i in range(6):
        add(target, sequence(f"s{i}", 5 + i, k=3, priority=i % 2))
    finished = []
    for _ in range(400):
        batch = step(target, num_accepted=1)
        for row in batch.rows:
            if len(row.seq.tokens) >= 28:
                row.seq.status = Status.FINISHED
                target.release(row.seq)
                finished.append(row.seq.id)
        if not target.has_work():
            break
    assert sorted(finished) == [f"s{i}" for i in range(6)]
    assert target.manager.num_used == 0


def test_whoever_waits_for_room_is_not_hashed_again_in_every_step(monkeypatch):
    """Its prefix is cached, and hashed once; it is seated when blocks are given back."""
    target = scheduler(num_blocks=16, caching=True, max_num_batched_tokens=80)
    shared = [*range(100, 124)]
    first = sequence("a", 0, prompt=[*shared, 1])
    add(target, first)
    step(target)
    add(target, sequence("b", 14))
    step(target)
    add(target, sequence("c", 0, prompt=[*shared, *range(30)]))
    asked, hash_below = [], target.manager.tree.hash_below
    monkeypatch.setattr(
        target.manager.tree, "hash_below", lambda *at: asked.append(at) or hash_below(*at)
    )
    assert set(shares(step(target))) == {"a", "b"}
    assert len(asked) > 6
    for _ in range(2):
        asked.clear()
        assert set(shares(target.schedule())) == {"a", "b"}
        assert not asked
    target.release(target.running[1])
    assert set(shares(step(target))) == {"a", "c"}


@pytest.mark.parametrize("priorities", [(0,), (0, 0, 1, 2)])
def test_who_was_refused_is_told_what_asking_again_would(priorities):
    """Prompts share prefixes, which are revived, evicted and registered while somebody waits."""
    num_refused = 0
    for seed in range(25):
        rng = random.Random(seed)
        budget = rng.choice([8, 16, 64])
        target = scheduler(
            rng.randint(8, 20), caching=True, max_num_seqs=8, max_num_batched_tokens=budget
        )
        told = heed(target)
        shared = [[100 * k + i for i in range(rng.choice([8, 16, 20, 32]))] for k in range(2)]
        for number in range(120):
            prompt = rng.choice(shared) + rng.choices(range(1000, 2000), k=rng.randint(1, 9))
            if rng.random() < 0.35 and len(prompt) + 24 < target.manager.num_blocks * BLOCK:
                priority = rng.choice(priorities)
                add(target, sequence(f"s{number}", 0, prompt=prompt, priority=priority))
            if target.has_work():
                step(target)
            for seq in list(target.running):
                if rng.random() < 0.06 or seq.num_generated > 20:
                    seq.status = Status.FINISHED
                    target.release(seq)
        assert all(refused == wanted for refused, wanted in told if refused)
        num_refused += sum(refused for refused, _ in told)
    assert num_refused > 300, num_refused


def heed(target):
    """Pairs to come: whether it refuses by what it remembers, and whether there is no room."""
    told, is_refused, manager = [], target._is_refused, target.manager

    def heeded(seq, budget):
        refused, prefix = is_refused(seq, budget), manager.look(seq.tokens)
        end = target._first_end(seq, prefix, budget)
        told.append((refused, not manager.can_open(prefix, end)))
        return refused

    target._is_refused = heeded
    return told


def test_a_fork_is_adopted_while_there_are_seats():
    target = scheduler(max_num_seqs=2)
    seq = sequence("a", 9)
    add(target, seq)
    step(target)
    forks = []
    for name in "bc":
        fork = sequence(name, 0, prompt=seq.tokens[:9])
        fork.table, _ = target.manager.fork(seq.table, 8)
        fork.num_cached = 8
        forks.append(fork)
    assert [target.adopt(fork) for fork in forks] == [True, False]
    assert tokens_of(target.schedule()) == {"a": 1, "b": 1}


def test_in_an_engine_rows_never_exceed_the_budget():
    """The counted rows are what the model really ran."""
    engine = tiny_engine(options={"max_num_batched_tokens": 20, "max_num_seqs": 5})
    sizes = []
    forward = engine.runner.run

    def noted(pieces, taps=()):
        sizes.append(sum(len(piece.chain) + len(piece.tree) for piece in pieces))
        return forward(pieces, taps)

    engine.runner.run = noted
    asked = [
        Request(
            id=f"r{i}",
            prompt_token_ids=tuple(range(20, 45 + i)),
            sampling=SamplingParams(max_tokens=12, ignore_eos=True),
            speculation=SpeculationParams(method="draft_model", num_draft_tokens=5),
        )
        for i in range(6)
    ]
    told = events(engine, asked)
    assert max(sizes) <= 20
    assert sum(sizes) == engine.stats.num_rows
    assert run(tiny_engine(), asked) == {
        key: [t for e in es for t in e.token_ids] for key, es in told.items()
    }


@pytest.mark.parametrize("urgent", [0, 5])
def test_in_an_engine_priorities_decide_who_is_first(urgent):
    engine = tiny_engine(options={"max_num_seqs": 1})
    asked = [
        Request(
            id=f"r{i}",
            prompt_token_ids=(40 + i, 41),
            sampling=SamplingParams(max_tokens=3, ignore_eos=True),
            priority=0 if i == urgent else 1,
        )
        for i in range(6)
    ]
    assert next(iter(events(engine, asked))) == (f"r{urgent}", 0)
