"""Suffix decoding: which tree wins, what is shared with whom and for how long, and end to end."""

import logging
import random
from dataclasses import replace

import pytest

from outrider.draft import suffix
from outrider.draft.base import Snapshot
from outrider.draft.suffix import SuffixDrafter, in_a_loop
from outrider.draft.suffix_tree import Guess, PlainSuffixTree
from outrider.errors import ConfigError, RequestError
from outrider.ops.cpu import build
from outrider.request import Request, SamplingParams, Speculation, SpeculationParams
from outrider.sequence import Sequence
from outrider.step import Commit, Row, RowPlan, TargetOutput
from outrider.testing import check_drafter, run, tiny_engine

OUTPUT = TargetOutput(None, [], [])


@pytest.fixture(params=["native", "plain"])
def kind(request, monkeypatch):
    """Both forms of the tree."""
    if request.param == "plain":
        monkeypatch.setattr(suffix, "library", lambda: None)
    elif build.find_compiler() is None:
        pytest.skip("no C++ compiler on the PATH")
    return request.param


def sequence(prompt, name="s", tenant="", **options):
    usual = {key: option.default for key, option in SuffixDrafter.options.items()}
    return Sequence(
        id=f"{name}#0",
        request=Request(id=name, prompt_token_ids=tuple(prompt), tenant=tenant),
        index=0,
        tokens=list(prompt),
        seed=0,
        speculation=Speculation(drafter="suffix", options={**usual, **options}),
    )


def opened(drafter, prompt, name="s", tenant="", **options):
    seq = sequence(prompt, name, tenant, **options)
    drafter.open(seq)
    return seq


def commit(drafter, seq, tokens):
    seq.tokens += tokens
    drafter.observe([Commit(seq=seq, tokens=tuple(tokens))], OUTPUT)


def answered(drafter, prompt, tokens, name="past", tenant="", **options):
    seq = opened(drafter, prompt, name, tenant, **options)
    commit(drafter, seq, tokens)
    drafter.close(seq)
    return seq


def draft(drafter, seq, depth=8, width=1, num_nodes=None):
    plan = RowPlan("suffix", depth, width, num_nodes or depth * width)
    (tree,) = drafter.draft([Row(seq, 1, plan.num_nodes)], [plan])
    tree.check()
    return tree


def test_it_passes_the_conformance_suite(kind):
    check_drafter(SuffixDrafter)


def test_the_longest_mode_passes_it_too():
    class Longest(SuffixDrafter):
        def open(self, seq):
            super().open(seq)
            seq.speculation.options["mode"] = "longest"

    check_drafter(Longest)


def test_the_papers_example_over_shared_answers(kind):
    drafter = SuffixDrafter()
    for text in ([1, 2, 3, 4, 5, 7], [1, 2, 3, 4, 5, 6], [9, 2, 3, 4, 8]):
        answered(drafter, [0], text)
    first = opened(drafter, [0, 1, 2, 3])
    tree = draft(drafter, first)
    assert (tree.tokens, tree.source, tree.laws) == ((4, 5, 6), "suffix", ())
    assert tree.is_chain
    assert drafter.confidence(first) == 2.5
    second = opened(drafter, [9, 9, 2, 3])
    assert draft(drafter, second).tokens == (4, 8)
    assert drafter.confidence(second) == 2.0


def test_the_better_score_wins_then_the_longer_match_then_the_own_text(kind):
    drafter = SuffixDrafter()
    answered(drafter, [0], [1, 2, 3, 9])
    once = opened(drafter, [1, 2, 3, 8, 0, 1, 2, 3])
    assert draft(drafter, once, depth=1).tokens == (9,), "own: 8 after one of two, shared: always"
    often = opened(drafter, [7, 3, 8, 3, 8, 3, 8, 3, 8, 3])
    assert draft(drafter, often, depth=1).tokens == (9,), "1 against 4 of 5"
    other = SuffixDrafter()
    answered(other, [0], [2, 3, 9, 2, 3])
    tied = opened(other, [2, 3, 8, 2, 3])
    assert draft(other, tied, depth=1).tokens == (8,), "equal score and match"
    longer = opened(other, [1, 3, 8, 2, 3])
    assert draft(other, longer, depth=1).tokens == (9,), "equal score, longer match"


def test_depth_nodes_and_settings_are_kept(kind):
    drafter = SuffixDrafter()
    answered(drafter, [0], list(range(1, 40)))
    seq = opened(drafter, [0, 1, 2, 3, 4])
    assert draft(drafter, seq).tokens == (5, 6, 7, 8), "as far as the match is long"
    assert draft(drafter, seq, depth=2).tokens == (5, 6)
    assert draft(drafter, seq, depth=4, num_nodes=3).tokens == (5, 6, 7)
    assert len(draft(drafter, seq, depth=0, num_nodes=0)) == 0
    eager = opened(drafter, [0, 1, 2, 3, 4], alpha=1.5, offset=1.0)
    assert len(draft(drafter, eager, depth=20)) == 7
    rare = SuffixDrafter()
    for token in range(20):
        answered(rare, [0], [1, token + 2])
    assert len(draft(rare, opened(rare, [0, 1]))) == 0, "each has one chance in twenty"
    assert len(draft(rare, opened(rare, [0, 1], min_probability=0.05))) == 1


def test_a_wide_plan_drafts_a_tree(kind):
    drafter = SuffixDrafter()
    for text in ([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 7], [1, 2, 3, 4, 8, 9], [1, 2, 3, 5, 5, 5]):
        answered(drafter, [0], text)
    tree = draft(drafter, opened(drafter, [0, 1, 2, 3]), depth=3, width=2)
    paths = {tree.path_tokens(node) for node in range(len(tree))}
    assert len(tree) <= 6
    assert len(tree.children(-1)) == 2
    assert {(4, 5), (4, 8), (5,)} < paths
    assert max(tree.depth(node) for node in range(len(tree))) <= 3


def test_an_answer_in_flight_is_there_for_others_at_once(kind):
    drafter = SuffixDrafter()
    one, other = opened(drafter, [0], "one"), opened(drafter, [0, 1, 2], "other")
    assert len(draft(drafter, other)) == 0
    commit(drafter, one, [1, 2, 3, 4])
    assert draft(drafter, other).tokens == (3, 4)
    drafter.close(one)
    assert draft(drafter, other).tokens == (3, 4), "and stays when it is finished"


def test_prompts_are_not_shared(kind):
    drafter = SuffixDrafter()
    answered(drafter, [1, 2, 3, 4], [7])
    assert len(draft(drafter, opened(drafter, [0, 1, 2]))) == 0


def test_tenants_see_nothing_of_one_another(kind):
    drafter = SuffixDrafter()
    answered(drafter, [0], [1, 2, 3, 4, 5], tenant="a")
    assert len(draft(drafter, opened(drafter, [0, 1, 2], tenant="b"))) == 0
    assert draft(drafter, opened(drafter, [0, 1, 2], tenant="a")).tokens == (3, 4)


def test_without_sharing_nothing_is_looked_up_and_nothing_left(kind):
    drafter = SuffixDrafter()
    answered(drafter, [0], [1, 2, 3, 4])
    assert len(draft(drafter, opened(drafter, [0, 1, 2], shared="none"))) == 0
    answered(drafter, [0], [5, 6, 7, 8], shared="none")
    assert len(draft(drafter, opened(drafter, [0, 5, 6]))) == 0


def test_a_preempted_sequence_enters_its_tokens_once(kind):
    drafter = SuffixDrafter()
    seq = opened(drafter, [0])
    commit(drafter, seq, [1, 2, 3])
    tree = drafter._shared[""].tree
    for _ in range(3):
        drafter.close(seq)
        drafter.open(seq)
        draft(drafter, seq)
    commit(drafter, seq, [4])
    assert tree.num_tokens == 4
    assert tree.count([1, 2, 3, 4]) == tree.count([3, 4]) == tree.count([1]) == 1


def test_another_request_of_the_same_name_is_another_text(kind):
    drafter = SuffixDrafter()
    for _ in range(2):
        answered(drafter, [0], [1, 2, 3], name="same")
    assert drafter._shared[""].tree.count([1, 2, 3]) == 2


def test_tokens_that_no_observation_told_of_are_entered_at_the_latest_on_closing(kind):
    drafter = SuffixDrafter()
    seq = opened(drafter, [0])
    seq.tokens += [1, 2]
    drafter.close(seq)
    assert drafter._shared[""].tree.count([1, 2]) == 1
    assert seq.drafter_state == {}
    drafter.observe([Commit(seq=seq, tokens=(2,))], OUTPUT)
    assert drafter._shared[""].num_tokens == 2


def test_the_oldest_answers_are_forgotten_whole(kind):
    drafter = SuffixDrafter(max_shared_tokens=100, depth=8)
    rng = random.Random(0)
    texts = [[rng.randrange(4) for _ in range(rng.randrange(1, 30))] for _ in range(40)]
    for text in texts:
        answered(drafter, [0], text)
    kept = []
    while texts and sum(map(len, kept)) + len(texts[-1]) <= 100:
        kept.insert(0, texts.pop())
    shared, anew = drafter._shared[""], PlainSuffixTree(8)
    for text in kept:
        anew.extend(anew.open(), text)
    assert shared.tree.num_tokens == shared.num_tokens == sum(map(len, kept)) <= 100
    for text in kept:
        for at in range(len(text)):
            string = text[at : at + 8]
            assert shared.tree.count(string) == anew.count(string)
    assert shared.tree.count([3]) == anew.count([3]), "also of what only the forgotten held"


def test_an_answer_that_is_forgotten_in_flight_goes_on_as_a_new_text(kind):
    drafter = SuffixDrafter(max_shared_tokens=10)
    old = opened(drafter, [0], "old")
    commit(drafter, old, [1, 2, 3])
    answered(drafter, [0], [4, 5, 6, 7, 8, 9, 10, 11], "new")
    shared = drafter._shared[""]
    assert shared.tree.count([1]) == 0
    commit(drafter, old, [12, 13])
    assert (shared.tree.count([12, 13]), shared.tree.count([3, 12])) == (1, 0)
    assert shared.num_tokens == 10
    commit(drafter, old, list(range(20, 40)))
    assert shared.num_tokens == 0, "it alone is more than may be held"
    commit(drafter, old, [1])
    assert shared.tree.count([1]) == 1


def test_the_tenant_longest_without_a_request_is_forgotten(kind):
    drafter = SuffixDrafter(max_tenants=2)
    flying = opened(drafter, [0], tenant="a")
    for tenant in "bc":
        answered(drafter, [0], [1, 2, 3], tenant=tenant)
    commit(drafter, flying, [1, 2, 1])
    assert draft(drafter, flying).tokens == (2,), "who is in flight keeps what it has"
    assert set(drafter._shared) == {"b", "c"}


def test_the_longest_mode_proposes_what_followed_the_longest_match(kind):
    drafter = SuffixDrafter()
    for text in ([2, 3, 5, 5], [2, 3, 5, 5], [1, 2, 3, 6, 7]):
        answered(drafter, [0], text)
    longest = opened(drafter, [0, 1, 2, 3], mode="longest")
    assert draft(drafter, longest).tokens == (6, 7)
    assert drafter.confidence(longest) == pytest.approx(3 * 2 / 5), "a match of 5 counts as 2"
    answered(drafter, [0], list(range(20, 60)))
    one = opened(drafter, [0, 20], mode="longest")
    assert draft(drafter, one, depth=20).tokens == (21, 22, 23, 24), "four per matched token"


def test_a_loop_is_drafted_to_any_depth_in_the_longest_mode(kind):
    drafter = SuffixDrafter()
    seq = opened(drafter, [4, 5, 4, 5, 4], mode="longest")
    assert draft(drafter, seq, depth=6).tokens == (5, 4, 5, 4, 5, 4)


def test_a_loop_goes_on_as_far_as_the_match_allows():
    guess = Guess((7, 8), (-1, 0), (1.0, 1.0), 1.0, 1)
    assert in_a_loop(guess, 9)[:2] == ((7, 8, 7, 8), (-1, 0, 1, 2))
    assert in_a_loop(guess, 2) is guess
    assert in_a_loop(Guess(), 9) == Guess()


def test_nothing_is_held_that_a_log_could_not_bring_back(kind):
    drafter = SuffixDrafter()
    seq = opened(drafter, [1, 2, 3, 1, 2])
    assert drafter.snapshot(seq) is None
    assert drafter.confidence(seq) == 0.0
    expected = draft(drafter, seq).tokens
    assert drafter.restore(seq, Snapshot(drafter="suffix", num_tokens=5, state=None)) == 5
    assert draft(drafter, seq).tokens == expected == (3, 1)
    drafter.close(seq)
    drafter.close(seq)
    assert drafter.confidence(seq) == 0.0


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"max_shared_tokens": 0}, "max_shared_tokens=0: must be >= 1"),
        ({"max_tenants": 0}, "max_tenants=0: must be >= 1"),
        ({"depth": 1}, "depth=1: must be >= 2"),
    ],
)
def test_what_cannot_be_held_is_refused(wrong, told):
    with pytest.raises(ConfigError, match=told):
        SuffixDrafter(**wrong)


def test_without_a_compiler_python_serves_and_says_so_once(monkeypatch, caplog):
    monkeypatch.setattr(suffix, "library", lambda: None)
    suffix._say_plain.cache_clear()
    with caplog.at_level(logging.WARNING):
        drafter = SuffixDrafter()
        for name in "ab":
            opened(drafter, [1, 2], tenant=name)
    assert len(caplog.records) == 1
    assert isinstance(drafter._shared["a"].tree, PlainSuffixTree)
    assert drafter._shared["a"].max_tokens == suffix.MAX_PLAIN_TOKENS


def request(name, tenant="", n=1, seed=5, **options):
    return Request(
        id=name,
        prompt_token_ids=tuple(range(10, 18)),
        sampling=SamplingParams(max_tokens=60, temperature=0.9, n=n, ignore_eos=True),
        speculation=SpeculationParams(method="suffix", num_draft_tokens=6, drafter_options=options),
        seed=seed,
        tenant=tenant,
    )


def accepted_by(engine, request):
    before = engine.stats.num_accepted_tokens
    tokens = run(engine, [request])
    return engine.stats.num_accepted_tokens - before, tokens


@pytest.mark.parametrize("mode", ["frequency", "longest"])
def test_an_answer_given_before_is_accepted_almost_whole(kind, mode):
    engine = tiny_engine(drafters=[SuffixDrafter()], draft_seed=None)
    first, tokens = accepted_by(engine, request("first", mode=mode))
    again, same = accepted_by(engine, request("again", mode=mode))
    assert list(tokens.values()) == list(same.values())
    assert again > 40 > 2 * first
    elsewhere, _ = accepted_by(engine, request("other", tenant="other", mode=mode))
    assert elsewhere == first, "another tenant starts from nothing"


def test_completions_of_one_request_are_texts_of_their_own():
    drafter = SuffixDrafter()
    engine = tiny_engine(drafters=[drafter], draft_seed=None)
    tokens = run(engine, [request("many", n=3)])
    tree = drafter._shared[""].tree
    assert tree.num_tokens == sum(map(len, tokens.values())) == 180
    for output in tokens.values():
        assert tree.count(output[:40]) >= 1


class Counted(SuffixDrafter):
    """Notes how often sequences were opened."""

    num_opened = 0

    def open(self, seq):
        self.num_opened += 1
        super().open(seq)


def test_preemption_in_an_engine_enters_every_token_once():
    drafter = Counted()
    options = {"max_model_len": 80}
    engine = tiny_engine(drafters=[drafter], draft_seed=None, num_blocks=40, options=options)
    tokens = run(engine, [request(f"r{i}", seed=i) for i in range(4)])
    assert drafter.num_opened > 4, "somebody was preempted"
    shared = drafter._shared[""]
    anew = PlainSuffixTree(drafter.depth)
    for output in tokens.values():
        anew.extend(anew.open(), output)
    assert shared.tree.num_tokens == anew.num_tokens
    for output in tokens.values():
        for at in range(len(output)):
            assert shared.tree.count(output[at : at + 3]) == anew.count(output[at : at + 3])


def test_a_setting_that_is_not_known_is_refused():
    engine = tiny_engine(drafters=[SuffixDrafter()], draft_seed=None)
    with pytest.raises(RequestError, match="mode"):
        engine.add(request("r", mode="shortest"))
    with pytest.raises(RequestError, match="min_probability"):
        engine.add(request("r", min_probability=1.5))


@pytest.mark.parametrize(("name", "value"), [("alpha", 2.0), ("offset", 1.0),
                                             ("min_probability", 0.3)])  # fmt: skip
def test_what_the_longest_match_has_no_use_for_is_refused(name, value):
    engine = tiny_engine(drafters=[SuffixDrafter()], draft_seed=None)
    message = f"'{name}'\\]={value}: is for mode 'frequency' of suffix"
    with pytest.raises(RequestError, match=message):
        engine.add(request("r", mode="longest", **{name: value}))
    engine.add(request("r", mode="longest"))


def test_the_longest_match_is_a_chain():
    asked = {"drafter_options": {"mode": "longest"}, "width": 2, "method": "suffix"}
    engine = tiny_engine(drafters=[SuffixDrafter(), "cascade"], draft_seed=None)
    made = request("r")
    with pytest.raises(RequestError, match="width=2: mode 'longest' of suffix drafts chains"):
        engine.add(replace(made, speculation=SpeculationParams(**asked)))
    asked |= {"method": "cascade", "drafter_options": {"parts": "suffix,ngram", "mode": "longest"}}
    engine.add(replace(made, speculation=SpeculationParams(**asked)))
    asked["drafter_options"]["parts"] = "suffix"
    with pytest.raises(RequestError, match="width=2: mode 'longest'"):
        engine.add(replace(made, id="s", speculation=SpeculationParams(**asked)))
