"""Replay: counts against a hand-made example, oracles, memory between records, what is refused."""

import pytest

from outrider.bench import replay as module
from outrider.bench.replay import replay, wants_prediction, without_model
from outrider.bench.workloads import Encoded
from outrider.draft.base import Warmth
from outrider.draft.drafters import Drafters
from outrider.draft.ngram import NgramDrafter
from outrider.errors import ConfigError, RequestError
from outrider.registry import DRAFTERS
from outrider.request import SpeculationParams
from outrider.step import EMPTY_TREE, DraftTree
from outrider.testing import ScriptedDrafter, junk

NGRAM = SpeculationParams(method="ngram", num_draft_tokens=2)
SCRIPTED = SpeculationParams(method="scripted")


def record(prompt, output, session="", prediction=()):
    return Encoded(list(prompt), tuple(output), session, tuple(prediction))


def scripted(propose, **attributes):
    drafter = ScriptedDrafter(propose)
    for name, value in attributes.items():
        setattr(drafter, name, value)
    return drafter


def knows(*records):
    """Proposes what the record of that prompt holds."""
    truth = {tuple(r.prompt): [*r.prompt, *r.output] for r in records}

    def propose(seq, plan):
        start = len(seq.tokens)
        known = truth[seq.request.prompt_token_ids][start : start + plan.depth]
        return DraftTree.chain(known, "scripted")

    return propose


def test_a_hand_computed_example():
    """Prompt 1 2 3 1 2, answer 3 1 2 9, two tokens per draft.

    Call 1: "1 2" stood before 3 1: both are right, and 2 is committed with them. Call 2: "2 3 1 2"
    stood before 3 1: wrong, and 9 is committed. So 2 calls, 4 tokens drafted, 2 accepted.
    """
    found = replay(
        [record([1, 2, 3, 1, 2], [3, 1, 2, 9])], lambda: Drafters([NgramDrafter()]), NGRAM
    )
    counts = found.counts
    assert counts[:5] == (2, 2, 4, 2, 4)
    assert found.acceptance_length.value == 1 + 2 / 2
    assert found.tokens_per_call.value == 4 / 2
    assert found.acceptance_rate == 2 / 4
    assert found.draft_share == 1.0
    assert found.draft_us > 0


def test_calls_without_a_draft_count_for_tokens_per_call_alone():
    """As above, and then 8 and 7, after texts that never stood before."""
    found = replay(
        [record([1, 2, 3, 1, 2], [3, 1, 2, 9, 8, 7])], lambda: Drafters([NgramDrafter()]), NGRAM
    )
    assert found.counts[:5] == (4, 2, 4, 2, 6), "after 9 and after 8 nothing is drafted"
    assert found.acceptance_length.value == 2.0
    assert found.tokens_per_call.value == 6 / 4
    assert found.draft_share == 0.5


@pytest.mark.parametrize(
    ("length", "num_calls", "num_accepted"), [(10, 2, 8), (11, 3, 9), (1, 1, 1), (4, 1, 4)]
)
def test_an_oracle_is_always_right(length, num_calls, num_accepted):
    """K + 1 tokens per call; where the answer ends inside a draft no further token is added."""
    one = record([5], range(100, 100 + length))
    found = replay([one], lambda: Drafters([scripted(knows(one))]), SCRIPTED)
    counts = found.counts
    assert (counts.num_calls, counts.num_accepted_tokens) == (num_calls, num_accepted)
    assert counts.num_tokens == length
    assert found.acceptance_rate == 1.0


def test_junk_is_rejected_and_the_record_is_said_all_the_same():
    found = replay([record([5], [1000] * 7)], lambda: Drafters([scripted(junk(50))]), SCRIPTED)
    assert found.counts[:5] == (7, 7, 28, 0, 7)
    assert found.acceptance_length.value == found.tokens_per_call.value == 1.0


def test_of_a_tree_the_branch_that_agrees_is_accepted():
    tree = DraftTree(tokens=(7, 1, 8, 2, 3), parents=(-1, -1, 0, 1, 3), source="scripted")
    drafter = scripted(lambda seq, plan: tree, default_draft_tokens=3, default_width=2)
    found = replay([record([5], [1, 2, 9])], lambda: Drafters([drafter]), SCRIPTED)
    assert found.counts[:5] == (1, 1, 5, 2, 3)


def test_the_drafter_is_told_what_an_engine_would_tell():
    one, two = record([5], range(100, 107)), record([6, 6], [1, 2, 3])
    drafter, told = scripted(knows(one, two)), []
    observe = drafter.observe

    def note(commits, output):
        (commit,) = commits
        seq = commit.seq
        told.append((seq.id, commit.tokens, commit.num_accepted, commit.finish_reason))
        assert output.first == [-1]
        assert seq.num_cached == len(seq.tokens) - 1
        assert tuple(seq.tokens[-len(commit.tokens) :]) == commit.tokens
        observe(commits, output)

    drafter.observe = note
    replay([one, two], lambda: Drafters([drafter]), SCRIPTED)
    assert told == [
        ("record-0#0", (100, 101, 102, 103, 104), 4, None),
        ("record-0#0", (105, 106), 2, "stop"),
        ("record-1#0", (1, 2, 3), 3, "stop"),
    ]
    assert drafter.opened == drafter.closed == ["record-0#0", "record-1#0"]


class Remembers(ScriptedDrafter):
    """Proposes what followed the same prompt the last time."""

    def __init__(self):
        self.memory = {}
        super().__init__(self.recall)

    def recall(self, seq, plan):
        known = self.memory.get(seq.request.prompt_token_ids, [])
        rest = known[seq.num_generated :][: plan.depth]
        return DraftTree.chain(rest, self.name) if rest else EMPTY_TREE

    def close(self, seq):
        self.memory[seq.request.prompt_token_ids] = seq.tokens[seq.num_prompt :]


def test_what_drafters_share_warms_up_unless_they_are_made_afresh():
    records = [record([5], range(10)) for _ in range(3)]
    warm = replay(records, lambda: Drafters([Remembers()]), SCRIPTED)
    assert warm.counts.num_calls == 10 + 2 + 2
    cold = replay(records, lambda: Drafters([Remembers()]), SCRIPTED, is_fresh=True)
    assert cold.counts.num_calls == 30
    assert cold.counts.num_drafts == 0
    assert cold.acceptance_length.value == 1.0


def test_the_interval_is_over_sessions_not_over_records():
    """Two sessions of opposite luck: a resample of sessions is all right, all wrong, or half."""
    right = [record([5], range(100, 105), "a")] * 20
    wrong = [record([6], range(200, 205), "b")] * 20

    def propose(seq, plan):
        known = knows(right[0])(seq, plan) if seq.tokens[0] == 5 else None
        return known or DraftTree.chain([0], "scripted")

    found = replay([*right, *wrong], lambda: Drafters([scripted(propose)]), SCRIPTED)
    value, low, high = found.tokens_per_call
    assert value == pytest.approx(200 / (20 + 100))
    assert (low, high) == (1.0, 5.0)
    alone = replay(right, lambda: Drafters([scripted(propose)]), SCRIPTED)
    assert alone.tokens_per_call == (5.0, None, None)
    apart = [one._replace(session="") for one in (*right, *wrong)]
    split = replay(apart, lambda: Drafters([scripted(propose)]), SCRIPTED)
    assert 1.0 < split.tokens_per_call.low < value < split.tokens_per_call.high < 5.0


def test_a_tick_per_record():
    ticks = []
    replay(
        [record([5], [1])] * 4,
        lambda: Drafters([NgramDrafter()]),
        NGRAM,
        tick=lambda: ticks.append(1),
    )
    assert len(ticks) == 4


def reads_prediction(**attributes):
    def propose(seq, plan):
        known = seq.speculation.prediction[seq.num_generated :][: plan.depth]
        return DraftTree.chain(known, "scripted") if known else EMPTY_TREE

    return scripted(propose, needs=("prediction",), **attributes)


def test_a_record_s_prediction_reaches_the_drafter_and_records_without_one_are_left_out():
    records = [record([5], range(5), prediction=range(5)), record([5], range(5))]
    found = replay(records, lambda: Drafters([reads_prediction()]), SCRIPTED)
    assert found.num_records == 1
    assert found.counts[:5] == (1, 1, 4, 4, 5)
    with pytest.raises(RequestError, match="no record carries a prediction"):
        replay(records[1:], lambda: Drafters([reads_prediction()]), SCRIPTED)


class Composer(ScriptedDrafter):
    """Hands every row to the part that an option names."""

    needs = ("drafters",)

    def __init__(self, drafters):
        super().__init__(self.ask, "composer")
        self.drafters = drafters

    @classmethod
    def build(cls, surroundings):
        return cls(dict(surroundings.drafters))

    def options_for(self, given):
        return {}

    def parts(self, options):
        return ("ngram",)

    def ask(self, seq, plan):
        from outrider.step import Row

        return self.drafters["ngram"].draft([Row(seq, 1, plan.num_nodes)], [plan])[0]


def register(monkeypatch, name, part):
    monkeypatch.setattr(module, f"_{name}_for_test", part, raising=False)
    monkeypatch.setitem(DRAFTERS._builtins, name, f"{module.__name__}:_{name}_for_test")


def test_a_drafter_that_composes_others_gets_them_built(monkeypatch):
    register(monkeypatch, "composer", Composer)
    drafters = without_model("composer")
    assert {"ngram", "composer"} <= set(drafters.names())
    params = SpeculationParams(method="composer", num_draft_tokens=2)
    assert not wants_prediction(drafters, params)
    one = record([1, 2, 3, 1, 2], [3, 1, 2, 9])
    found = replay([one], lambda: without_model("composer"), params)
    assert found.counts[:5] == (2, 2, 4, 2, 4)


def test_a_model_s_drafter_is_refused(monkeypatch):
    with pytest.raises(ConfigError, match="'draft_model' needs draft model: it cannot be replayed"):
        without_model("draft_model")
    register(monkeypatch, "deep", type("Deep", (NgramDrafter,), {"warmth": Warmth.R2}))
    with pytest.raises(ConfigError, match="'deep' needs a model"):
        without_model("deep")
    with pytest.raises(ConfigError, match="unknown drafter 'ngramm'"):
        without_model("ngramm")


def test_settings_that_the_drafter_does_not_have_are_refused():
    params = SpeculationParams(method="ngram", width=60, num_draft_tokens=2)
    with pytest.raises(RequestError, match="width=60"):
        replay([record([5], [1])], lambda: Drafters([NgramDrafter()]), params)
