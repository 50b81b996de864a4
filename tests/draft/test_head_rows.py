"""HeadRows: which features are taken over, when rows are due, and what outlives a sequence."""

import pytest
import torch

from outrider.cache.pool import KVPool
from outrider.cache.table import BlockManager
from outrider.draft.head_rows import HeadRows
from outrider.draft.row_keys import FromSecond
from outrider.request import Request, SamplingParams
from outrider.sequence import Sequence
from outrider.step import Commit, States, TargetOutput

SIZE = 4
NOTHING = torch.empty(0)


def read(tapped_2RH):
    """7000 + t of position t, from boundaries 2 and 5 alone."""
    return 2 * tapped_2RH[1] - tapped_2RH[0] - 1000


def rows_of(num_blocks=32, boundaries=(2, 5), enable_prefix_caching=True):
    pool = KVPool([(1, 1, 1)], num_blocks, SIZE, torch.float32, torch.device("cpu"))
    manager = BlockManager(num_blocks, SIZE, enable_prefix_caching)
    return HeadRows("head", pool, manager, boundaries, read)


def sequence(tokens, tenant="", n=1, index=0, num_prompt=0, name="r"):
    request = Request(
        id=name,
        prompt_token_ids=tuple(tokens),
        sampling=SamplingParams(n=n, max_tokens=50),
        tenant=tenant,
    )
    seq = Sequence(f"{name}#{index}", request, index, list(tokens), 0, num_prompt=num_prompt)
    seq.drafter_state["head"] = None
    return seq


def position_states(starts, lengths, nodes=(), boundaries=(2, 5)):
    """States that say their place: boundary b of position t is 1000 b + t; nodes count from 500."""
    values, start, at = [], [], 0
    nodes = nodes or [0] * len(starts)
    for first, length, count in zip(starts, lengths, nodes, strict=True):
        start.append(at)
        values += [*range(first, first + length), *range(500, 500 + count)]
        at += length + count
    tapped = torch.stack([1000.0 * b + torch.tensor(values) for b in boundaries])
    return States(boundaries, tapped.unsqueeze(-1), start, list(lengths), list(starts))


def observe(rows, commits, states, is_open=lambda seq: True):
    return rows.observe(commits, TargetOutput(NOTHING, [-1] * len(commits), [], states), is_open)


def waiting(state):
    """Positions of the features that wait."""
    pieces = [*state.waiting, *map(read, state.unread)]
    found = [int(value) - 7000 for piece in pieces for value in piece[:, 0]]
    assert len(found) == state.num_waiting
    return found


def run_due(rows, seq, state, count=None):
    """As a drafter does, with KV that says its row and token."""
    count = rows.num_due(seq, state) if count is None else count
    assert rows.reserve(state, count)
    tokens, inputs = rows.due(seq, state, count)
    for slot, token, value in zip(
        state.table.slots(state.num_rows, state.num_rows + count), tokens, inputs, strict=True
    ):
        assert not rows.manager.is_guarded(slot // SIZE)
        rows.pool.layers[0].keys[slot] = token
        rows.pool.layers[0].values[slot] = value
    rows.ran(state, count)
    rows.publish(seq, state)


def held(rows, state):
    """Tokens and positions of the rows with KV."""
    slots = state.table.slots(0, state.num_rows)
    layer = rows.pool.layers[0]
    return layer.keys[slots].flatten().tolist(), (layer.values[slots].flatten() - 7000).tolist()


def fed(rows, tokens, **options):
    """A sequence whose prompt has been run by the target, all but its last token."""
    seq = sequence(tokens, **options)
    observe(rows, [Commit(seq)], position_states([0], [len(tokens) - 1]))
    return seq, rows.state(seq)


def test_features_of_kept_nodes_follow_those_of_the_chain():
    rows, seq, other = rows_of(), sequence([1, 2, 3, 4, 5, 6]), sequence([9, 8])
    states = position_states([3, 0], [1, 2], [4, 0])
    rows.state(seq).num_skipped = 3
    commit = Commit(seq, tokens=(5, 6), accepted=(1, 2, 3), num_kept=2)
    observe(rows, [commit, Commit(other)], states)
    assert waiting(rows.state(seq)) == [3, 501, 502]
    assert waiting(rows.state(other)) == [0, 1]


def test_only_its_own_boundaries_are_read_and_only_for_who_is_open():
    rows, seq, closed = rows_of(), sequence([1, 2, 3]), sequence([4, 5, 6])
    states = position_states([0, 0], [2, 2], boundaries=(0, 2, 3, 5))
    observe(rows, [Commit(closed), Commit(seq)], states, lambda asked: asked is seq)
    assert waiting(rows.state(seq)) == [0, 1]
    assert closed.drafter_state["head"] is None


def test_a_pass_that_runs_tokens_again_gives_new_features_only():
    rows = rows_of()
    seq, state = fed(rows, [1, 2, 3, 4, 5])
    observe(rows, [Commit(seq)], position_states([2], [3]))
    assert waiting(state) == [0, 1, 2, 3, 4]


def test_a_gap_leaves_out_rows_and_what_waited_before_it():
    rows = rows_of()
    seq, state = fed(rows, [1, 2, 3, 4, 5, 6, 7, 8])
    run_due(rows, seq, state, 5)
    seq.tokens += [9, 10, 11]
    observe(rows, [Commit(seq)], position_states([9], [2]))
    assert (state.num_skipped, state.num_rows, state.next_position) == (4, 5, 11)
    tokens, inputs = rows.due(seq, state, 1)
    assert tokens == [11]
    assert inputs.item() == 7009
    assert rows.num_gaps == 2


def test_a_row_is_due_once_its_token_is_known():
    rows = rows_of()
    seq = sequence([1, 2, 3])
    observe(rows, [Commit(seq)], position_states([0], [3]))
    state = rows.state(seq)
    assert rows.num_due(seq, state) == 2
    assert rows.can_draft(seq, state)
    run_due(rows, seq, state)
    assert held(rows, state) == ([2, 3], [0, 1])
    assert not rows.can_draft(seq, state), "the row that drafts has been run"
    seq.tokens.append(4)
    assert rows.can_draft(seq, state)
    seq.tokens.append(5)
    assert not rows.can_draft(seq, state), "its feature is missing"


def test_rows_of_full_blocks_are_found_by_the_same_tokens_only():
    rows = rows_of()
    seq, state = fed(rows, range(10, 21))
    run_due(rows, seq, state)
    rows.close(seq)
    assert rows.manager.num_used == 0
    same = list(range(10, 21))
    assert rows.num_known(sequence(same)) == 8
    assert rows.num_known(sequence([9, *same[1:]])) == 0, "rows depend on the first token"
    assert rows.num_known(sequence([*same[:8], 0, 0, 0])) == 4
    assert rows.num_known(sequence(same, tenant="b")) == 0
    heir = sequence(same)
    assert held(rows, rows.state(heir)) == (list(range(11, 19)), list(range(8)))


class Log(list):
    """Counts the tokens that are copied out of it."""

    num_copied = 0

    def __getitem__(self, at):
        found = super().__getitem__(at)
        Log.num_copied += len(found) if isinstance(at, slice) else 0
        return found


def test_what_is_published_costs_what_is_new_of_it():
    rows = rows_of(num_blocks=64)
    seq, state = fed(rows, range(200))
    seq.tokens = Log(seq.tokens)
    run_due(rows, seq, state)
    Log.num_copied = 0
    for at in range(199, 207):
        seq.tokens.append(at)
        rows.publish(seq, state)
    assert Log.num_copied == 0
    observe(rows, [Commit(seq)], position_states([199], [7]))
    run_due(rows, seq, state)
    assert len(rows.manager.tree) == 206 // SIZE
    assert Log.num_copied <= 7 + 2 * SIZE


def test_a_log_without_its_first_token():
    tokens = FromSecond([5, 6, 7, 8])
    assert (len(tokens), list(tokens), tokens[0], tokens[-1]) == (3, [6, 7, 8], 6, 8)
    assert (tokens[0:2], tokens[1:9], tokens[2:2]) == ([6, 7], [7, 8], [])
    assert (len(FromSecond([])), list(FromSecond([3]))) == (0, [])


def test_rows_behind_a_gap_are_not_found():
    rows, seq = rows_of(), sequence(range(12))
    observe(rows, [Commit(seq)], position_states([2], [9]))
    run_due(rows, seq, rows.state(seq))
    assert rows.num_gaps == 1
    assert len(rows.manager.tree) == 0


def test_another_completion_gets_the_prompts_rows_and_a_block_of_its_own():
    rows = rows_of()
    leader, state = fed(rows, range(11), n=2)
    run_due(rows, leader, state, 9)
    sibling = sequence(range(11), n=2, index=1)
    own = rows.state(sibling)
    assert held(rows, own) == (list(range(1, 10)), list(range(9)))
    assert own.table.blocks[:2] == state.table.blocks[:2]
    assert own.table.blocks[2] != state.table.blocks[2]
    leader.tokens += [40, 41]
    observe(rows, [Commit(leader)], position_states([10], [2]))
    run_due(rows, leader, state)
    late = rows.state(sequence(range(11), n=2, index=1))
    assert held(rows, late) == (list(range(1, 11)), list(range(10))), "no row of the leader's own"
    rows.manager.check_integrity([state.table, own.table, late.table])


def test_the_prompts_rows_are_run_at_once_where_others_start_from_them():
    rows = rows_of()
    leader = sequence([1, 2, 3, 4, 5, 6], n=3, num_prompt=5)
    commit = Commit(leader, tokens=(6,))
    (overdue,) = observe(rows, [commit], position_states([0], [5]))
    assert overdue.num_rows == 4
    alone = sequence([1, 2, 3, 4, 5], num_prompt=4)
    assert observe(rows, [Commit(alone, tokens=(5,))], position_states([0], [4])) == []


def test_the_prompts_rows_are_run_at_once_where_they_fill_a_block():
    """Others with this prompt may come in the next step, and find the target's blocks of it."""
    rows, alone = rows_of(), sequence([1, 2, 3, 4, 5, 6, 7], num_prompt=6)
    (overdue,) = observe(rows, [Commit(alone, tokens=(7,))], position_states([0], [6]))
    assert overdue.num_rows == 5
    rows = rows_of(enable_prefix_caching=False)
    assert observe(rows, [Commit(alone, tokens=(7,))], position_states([0], [6])) == []


@pytest.mark.parametrize(("length", "num_rows"), [(4, 0), (5, 4), (7, 6)])
def test_the_end_of_a_sequence_runs_rows_that_fill_a_block(length, num_rows):
    rows, seq = rows_of(), sequence(range(length))
    states = position_states([0], [length - 1])
    overdue = observe(rows, [Commit(seq, finish_reason="stop")], states)
    assert [part.num_rows for part in overdue] == [num_rows] * bool(num_rows)
    rows = rows_of(enable_prefix_caching=False)
    assert observe(rows, [Commit(sequence(range(9)), finish_reason="stop")], states) == []


def test_too_many_that_wait_are_run_all_but_one(monkeypatch):
    monkeypatch.setattr("outrider.draft.head_rows.MAX_WAITING", 5)
    rows, seq = rows_of(enable_prefix_caching=False), sequence(range(20))
    assert observe(rows, [Commit(seq)], position_states([0], [5])) == []
    (overdue,) = observe(rows, [Commit(seq)], position_states([5], [1]))
    assert overdue.num_rows == 5


def test_features_are_read_when_rows_are_run_and_all_in_one_go():
    """A sequence that nobody drafts for costs next to nothing."""
    rows, one, other = rows_of(), sequence(range(30)), sequence(range(100, 130))
    num_read, read = [], rows._read

    def counting(tapped_ARH):
        num_read.append(tapped_ARH.shape[1])
        return read(tapped_ARH)

    rows._read = counting
    for at in range(4):
        observe(rows, [Commit(one), Commit(other)], position_states([at, at], [1, 1]))
    assert num_read == []
    states = rows.state(one), rows.state(other)
    rows.read(states)
    rows.read(states)
    assert num_read == [8]
    assert [waiting(state) for state in states] == [[0, 1, 2, 3]] * 2
    observe(rows, [Commit(one)], position_states([4], [1]))
    run_due(rows, one, states[0])
    assert num_read == [8, 1]
    assert states[0].num_waiting == 0


def test_many_short_steps_stand_in_few_tensors():
    rows, seq = rows_of(), sequence(range(60))
    for at in range(50):
        observe(rows, [Commit(seq)], position_states([at], [1]))
    state = rows.state(seq)
    assert len(state.unread) <= 17
    assert waiting(state) == list(range(50))


def saved_of(rows, num_ran):
    seq, state = fed(rows, range(20, 34))
    run_due(rows, seq, state, num_ran)
    return seq, rows.save(seq, state)


@pytest.mark.parametrize(
    ("tokens", "num_rows", "left"),
    [
        (range(20, 34), 9, [9, 10, 11, 12]),
        (range(20, 50), 9, [9, 10, 11, 12]),
        ([*range(20, 32), 0, 0], 9, [9, 10, 11]),
        ([*range(20, 30), 0, 0], 9, [9]),
        ([*range(20, 29), 0, 0], 8, []),
        ([*range(20, 26), 0, 0], 5, []),
        ([20], 0, []),
        ([0, 1, 2], 0, []),
    ],
)
@pytest.mark.parametrize("is_new", [True, False], ids=["elsewhere", "here"])
def test_what_is_common_is_restored(tokens, num_rows, left, is_new):
    rows = rows_of()
    seq, saved = saved_of(rows, 9)
    rows.close(seq)
    rows, heir = rows_of() if is_new else rows, sequence(tokens)
    following = rows.load(heir, saved)
    state = rows.state(heir)
    assert held(rows, state) == (list(range(21, 21 + num_rows)), list(range(num_rows)))
    assert waiting(state) == left
    assert following == num_rows + len(left) == state.next_position
    rows.manager.check_integrity([state.table])
    if rows.num_due(heir, state):
        run_due(rows, heir, state)


def test_where_the_pool_knows_more_than_was_saved_that_is_kept():
    rows = rows_of()
    seq, saved = saved_of(rows, 5)
    run_due(rows, seq, rows.state(seq))
    heir = sequence(range(20, 34))
    assert rows.load(heir, saved) == 13
    assert rows.state(heir).num_rows == 12
    assert waiting(rows.state(heir)) == [12]


def test_rows_behind_a_gap_are_restored_to_slots_of_their_own():
    rows, seq = rows_of(), sequence(range(20, 34))
    observe(rows, [Commit(seq)], position_states([3], [10]))
    run_due(rows, seq, rows.state(seq), 8)
    saved = rows.save(seq, rows.state(seq))
    rows.close(seq)
    known, state = fed(rows, range(20, 34))
    run_due(rows, known, state, 8)
    heir = sequence([*range(20, 33), 0])
    assert rows.load(heir, saved) == 13
    state = rows.state(heir)
    assert held(rows, state) == (list(range(24, 32)), list(range(3, 11)))
    assert waiting(state) == [11, 12]
    assert not any(rows.manager.is_guarded(block) for block in state.table.blocks)


def test_without_room_nothing_is_restored():
    rows = rows_of()
    _, saved = saved_of(rows, 9)
    small = rows_of(num_blocks=2)
    heir = sequence(range(20, 34))
    assert small.load(heir, saved) == 0
    assert small.manager.num_used == 0
