"""Cascades: who is asked, whose draft is used, and that all who were asked stay in step."""

import pytest
import torch

from outrider.cache.pool import KVPool
from outrider.cache.table import BlockManager
from outrider.draft.base import Surroundings
from outrider.draft.cascade import CascadeDrafter
from outrider.draft.draft_model import ModelDrafter
from outrider.draft.ngram import NgramDrafter
from outrider.draft.suffix import SuffixDrafter
from outrider.engine.config import EngineConfig
from outrider.engine.engine import Engine
from outrider.errors import ConfigError, PairError, RequestError
from outrider.models.runner import Piece, Runner
from outrider.registry import DRAFTERS
from outrider.request import Option, Request, SamplingParams, Speculation, SpeculationParams
from outrider.sequence import Sequence
from outrider.step import EMPTY_TREE, DraftTree, Row, RowPlan, StopRule
from outrider.testing import ScriptedDrafter, events, junk, run, tiny_decoder, tiny_engine

OFF = SpeculationParams(method="off")
GREEDY = SamplingParams(max_tokens=30, ignore_eos=True)
SAMPLED = SamplingParams(max_tokens=30, temperature=0.8, ignore_eos=True)
SHAPED = SamplingParams(
    max_tokens=30, temperature=1.1, top_k=40, repetition_penalty=1.2, frequency_penalty=0.3
)


def cascade(parts="", *, k=4, **more):
    options = {"parts": parts, **more.pop("options", {})}
    return SpeculationParams(method="cascade", num_draft_tokens=k, drafter_options=options, **more)


def request(name="r", speculation=OFF, sampling=GREEDY, length=9, seed=5, **more):
    prompt = tuple((11 * seed + j * j) % 9 + 30 for j in range(length))
    return Request(
        id=name,
        prompt_token_ids=prompt,
        sampling=sampling,
        speculation=speculation,
        seed=seed,
        **more,
    )


def requests(sampling, speculation, count=4):
    return [request(f"r{i}", speculation, sampling, length=5 + 4 * i, seed=i) for i in range(count)]


def pooled(network, num_blocks=256):
    spec = network.spec
    pool = KVPool(spec.kv_shapes, num_blocks, 4, spec.dtype, spec.device)
    return Runner(network, pool), BlockManager(num_blocks, 4)


def engine(more=(), *, model=ModelDrafter, num_blocks=256, draft_noise=0.01, **options):
    """With ngram, suffix, a draft model near the target, and a cascade of them all."""
    runner, manager = pooled(tiny_decoder(0, noise=draft_noise))
    drafters = [NgramDrafter(), SuffixDrafter(), model(runner, manager, 256), *more]
    drafters.append(CascadeDrafter({drafter.name: drafter for drafter in drafters}))
    config = EngineConfig(block_size=4, check_integrity=True, **{"max_num_seqs": 16, **options})
    return Engine(*pooled(tiny_decoder(), num_blocks), config, drafters=drafters)


class Scripted(ScriptedDrafter):
    """Says one token as often as asked; notes who asked for how much."""

    def __init__(self, name, token, score=None, options=(), max_width=1):
        super().__init__(self._say, name=name)
        self.asked: list[tuple[str, RowPlan]] = []
        self.token = token
        self.options = dict(options)
        self.max_width = max_width
        if score is not None:
            self.confidence = lambda seq: score

    def _say(self, seq, plan):
        self.asked.append((seq.id, plan))
        length = plan.depth if self.token is not None else 0
        return DraftTree.chain((self.token,) * length, self.name)


def sequence(name, parts, **options):
    spec = Speculation(
        drafter="cascade",
        parts=parts,
        num_draft_tokens=3,
        options={"parts": "", "min_score": 2.0, **options},
    )
    return Sequence(
        id=name,
        request=Request(id=name, prompt_token_ids=(1, 2)),
        index=0,
        tokens=[1, 2],
        seed=0,
        speculation=spec,
    )


def drafts(parts, sequences, width=1):
    whole = CascadeDrafter({part.name: part for part in parts})
    rows = [Row(seq, 1, 3) for seq in sequences]
    return whole.draft(rows, [RowPlan("cascade", 3, width, 3)] * len(rows))


def test_the_first_draft_that_is_good_enough_is_used_and_nobody_else_is_asked():
    a, b, c = Scripted("a", None), Scripted("b", 7), Scripted("c", 8)
    (tree,) = drafts([a, b, c], [sequence("s", ("a", "b", "c"))])
    assert (tree.tokens, tree.source) == ((7, 7, 7), "b")
    assert [len(part.asked) for part in (a, b, c)] == [1, 1, 0]


@pytest.mark.parametrize(("score", "source"), [(1.9, "b"), (2.0, "a"), (3.0, "a")])
def test_a_draft_settles_a_row_from_min_score_on(score, source):
    parts = [Scripted("a", 7, score), Scripted("b", 8)]
    assert drafts(parts, [sequence("s", ("a", "b"))])[0].source == source
    sure = [sequence("s", ("a", "b"), min_score=0.0)]
    assert drafts(parts, sure)[0].source == "a"


def test_where_nothing_better_comes_the_first_draft_is_used():
    a, b, c = Scripted("a", 7, 0.5), Scripted("b", 8, 1.0), Scripted("c", None)
    (tree,) = drafts([a, b, c], [sequence("s", ("a", "b", "c"))])
    assert tree.source == "a"
    assert len(c.asked) == 1


def test_each_row_asks_its_own_parts_and_rows_ask_together():
    a, b = Scripted("a", None), Scripted("b", 8)
    calls = []
    draft = b.draft
    b.draft = lambda rows, plan: calls.append(len(rows)) or draft(rows, plan)
    trees = drafts(
        [a, b], [sequence("s", ("a", "b")), sequence("t", ("b", "a")), sequence("u", ("a", "b"))]
    )
    assert [tree.source for tree in trees] == ["b", "b", "b"]
    assert calls == [1, 2]
    assert [name for name, _ in a.asked] == ["s", "u"]


def test_nobody_has_a_draft():
    parts = [Scripted("a", None), Scripted("b", None)]
    assert drafts(parts, [sequence("s", ("a", "b"))]) == [EMPTY_TREE]


def test_a_part_is_asked_for_no_more_branches_than_it_draws():
    a, b = Scripted("a", None), Scripted("b", 7, max_width=16)
    drafts([a, b], [sequence("s", ("a", "b"))], width=3)
    assert a.asked[0][1] == RowPlan("a", 3, 1, 3)
    assert b.asked[0][1] == RowPlan("b", 3, 3, 3)


@pytest.mark.parametrize(("names", "usual"), [
    (("ngram", "suffix", "draft_model"), ("suffix", "draft_model")),
    (("ngram", "suffix", "translate"), ("suffix", "translate")),
    (("ngram", "draft_model"), ("ngram", "draft_model")),
    (("ngram", "suffix", "recycle"), ("suffix", "ngram")),
    (("recycle",), ("recycle",)),
])  # fmt: skip
def test_usual_parts(names, usual):
    whole = CascadeDrafter({name: Scripted(name, 1) for name in names})
    assert whole.parts({"parts": "", "min_score": 2.0}) == usual


def test_it_needs_somebody_to_ask():
    surroundings = Surroundings(target=None)
    with pytest.raises(ConfigError, match="name some beside it"):
        CascadeDrafter.build(surroundings)
    found = CascadeDrafter.build(Surroundings(target=None, drafters={"ngram": NgramDrafter()}))
    assert found.parts(dict.fromkeys(found.options, "")) == ("ngram",)


def test_it_is_registered_and_says_what_it_needs():
    assert DRAFTERS.load("cascade") is CascadeDrafter
    assert CascadeDrafter.needs == ("drafters",)


@pytest.mark.parametrize(("speculation", "told"), [
    (cascade("suffix,ngrm"), r"'ngrm'.*did you mean 'ngram'"),
    (cascade("ngram, ngram"), "names ngram twice"),
    (cascade("cascade"), "part of a cascade 'cascade'"),
    (cascade("suffix", options={"inner": "ngram"}), r"key of cascade 'inner' \(known: .*alpha"),
    (cascade("suffix", options={"min_score": -1}), r"min_score.*must lie in \[0, 64\]"),
    (cascade("ngram", options={"window": 3}), "window"),
    (cascade("suffix,draft_model", width=3, options={"inner": "ngram"}), "not width=3"),
    (cascade("suffix", draft_sample_method="probabilistic"), "drafts greedy only"),
])  # fmt: skip
def test_what_cannot_be_honoured_is_refused(speculation, told):
    with pytest.raises(RequestError, match=told):
        engine().add(request(speculation=speculation))


def test_an_option_that_means_two_things_is_refused_where_both_are_meant():
    one, other = Option(1, "one"), Option(2, "other")
    parts = [Scripted("a", 1, options={"x": one}), Scripted("b", 1, options={"x": other})]
    whole = CascadeDrafter({part.name: part for part in parts})
    assert whole.options_for({"parts": "a"})["x"] == one
    assert whole.options_for({"parts": "b"})["x"] == other
    with pytest.raises(RequestError, match="option 'x' means another thing for b"):
        whole.options_for({"parts": "a,b"})


def test_a_rule_that_cannot_take_a_parts_drafts_refuses_the_whole():
    spec = cascade("ngram,draft_model", width=3, verifier="spectr")
    with pytest.raises(PairError, match=r"width=3 .* of ngram"):
        engine().add(request(speculation=spec))


@pytest.fixture(scope="module")
def plain():
    kinds = {"greedy": GREEDY, "sampled": SAMPLED, "shaped": SHAPED}
    return {name: (s, run(tiny_engine(), requests(s, OFF))) for name, s in kinds.items()}


CASCADES = {
    "usual": cascade(),
    "ngram first": cascade("ngram,draft_model", prompt_lookup_min=1),
    "model last resort": cascade("draft_model,suffix"),
    "never sure": cascade("suffix,ngram,draft_model", options={"min_score": 64.0}),
    "trees": cascade("suffix,draft_model", width=3),
    "drawn trees": cascade("suffix,draft_model", width=3, draft_sample_method="probabilistic"),
    "inner": cascade("suffix,draft_model", options={"inner": "ngram"}),
}


@pytest.mark.parametrize("kind", ["greedy", "sampled", "shaped"])
@pytest.mark.parametrize("name", CASCADES)
def test_same_tokens_as_plain_decoding(plain, name, kind):
    sampling, expected = plain[kind]
    used = engine()
    assert run(used, requests(sampling, CASCADES[name])) == expected
    assert used.stats.num_accepted_tokens > 0
    assert used.drafters["draft_model"].manager.num_used == 0


@pytest.mark.parametrize("name", CASCADES)
def test_same_tokens_under_preemption(plain, name):
    sampling, expected = plain["sampled"]
    used = engine(num_blocks=20, max_num_batched_tokens=24, max_num_seqs=4, max_model_len=70)
    assert run(used, requests(sampling, CASCADES[name])) == expected
    assert used.stats.num_preemptions > 0
    assert used.manager.num_used == used.drafters["draft_model"].manager.num_used == 0


@pytest.mark.parametrize("verifier", ["rejection", "block", "tree", "traversal"])
def test_rules_keyed_by_the_root_give_greedy_tokens(plain, verifier):
    sampling, expected = plain["greedy"]
    spec = cascade("suffix,draft_model", verifier=verifier)
    assert run(engine(), requests(sampling, spec)) == expected


def test_both_parts_draft_and_both_are_right_sometimes():
    used = engine()
    sources = {}
    for told in events(used, requests(GREEDY, cascade("ngram,draft_model"))).values():
        for event in told:
            if event.num_drafted:
                sources[event.source] = sources.get(event.source, 0) + event.num_accepted
    assert set(sources) == {"ngram", "draft_model"}
    assert all(sources.values())


class Doubting(ModelDrafter):
    """A draft model that is now and then not believed, though it was asked."""

    def confidence(self, seq):
        return float(len(seq.tokens) % 3)


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_part_that_was_asked_and_not_used_keeps_its_kv_right(sampling, width):
    used = engine([ScriptedDrafter(junk(256))], model=Doubting)
    for asked in requests(sampling, cascade("draft_model,scripted", width=width)):
        used.add(asked)
    drafter, num_compared, sources = used.drafters["draft_model"], 0, set()
    while used.has_work():
        sources |= {event.source for event in used.step() if event.num_drafted}
        for seq in used.scheduler.running:
            state = seq.drafter_state["draft_model"]
            num_compared += assert_right(drafter.runner, state, seq.tokens)
    assert sources == {"draft_model", "scripted"}
    assert num_compared > 300


def assert_right(runner, state, tokens):
    """The draft KV is that of a fresh prefill."""
    count = state.num_cached
    assert 0 < count < len(tokens)
    fresh, manager = pooled(runner.network)
    table, _ = manager.open([1])
    manager.reserve(table, count)
    fresh.run([Piece(table, 0, tokens[:count], EMPTY_TREE, False)])
    mine, theirs = torch.tensor(state.table.slots(0, count)), torch.tensor(table.slots(0, count))
    for a, b in zip(runner.pool.layers, fresh.pool.layers, strict=True):
        assert torch.equal(a.keys[mine], b.keys[theirs])
        assert torch.equal(a.values[mine], b.values[theirs])
    return count


def test_completions_of_one_prompt():
    sampling = SamplingParams(max_tokens=24, temperature=1.0, n=3, ignore_eos=True)
    expected = run(tiny_engine(), requests(sampling, OFF, 2))
    assert run(engine(), requests(sampling, cascade(), 2)) == expected


def test_a_rule_that_ends_chains_reaches_the_part_that_drafts():
    asked = []

    def propose(seq, plan):
        asked.append(plan.stop)
        return EMPTY_TREE

    part, rule = ScriptedDrafter(propose), StopRule(0.3, 1.0, 0.0)
    whole = CascadeDrafter({part.name: part})
    row = Row(sequence("s", (part.name,)), 1, 3)
    whole.draft([row], [RowPlan("cascade", 3, 1, 3, rule)])
    assert asked == [rule]
