"""Prediction: the place in the expected text is kept through edits, at little cost per edit."""

import random
from collections import Counter

import pytest
from hypothesis import given, strategies as st

from outrider.draft.prediction import REACH, TRUSTED_MATCH, PredictionDrafter, tokens_taken
from outrider.errors import RequestError
from outrider.request import Request, SamplingParams, Speculation, SpeculationParams
from outrider.sequence import Sequence
from outrider.step import Row, RowPlan
from outrider.testing import run, tiny_engine
from outrider.verify.sampled import walk

K = 16
PROMPT = (1, 2, 3)
TEXT = tuple(random.Random(7).choices(range(1000, 3000), k=400))
tokens = st.lists(st.integers(0, 3), max_size=40)


def sequence(prediction, answer=(), min_match=2):
    seq = Sequence(
        id="s",
        request=Request(id="s", prompt_token_ids=PROMPT),
        index=0,
        tokens=[*PROMPT, *answer],
        num_prompt=len(PROMPT),
        seed=0,
        speculation=Speculation(
            drafter="prediction", prediction=tuple(prediction), options={"min_match": min_match}
        ),
    )
    PredictionDrafter().open(seq)
    return seq


def draft(seq, depth=K, width=1, num_nodes=None):
    plan = RowPlan("prediction", depth, width, num_nodes or depth * width)
    (tree,) = PredictionDrafter().draft([Row(seq, 1, plan.num_nodes)], [plan])
    tree.check()
    assert len(tree) <= plan.num_nodes
    assert len(tree.children(-1)) <= width
    assert all(tree.depth(node) <= depth for node in range(len(tree)))
    return tree


def calls(prediction, answer, width=1, depth=K, min_match=2):
    """(drafted, accepted) of each pass, were `answer` what the target says."""
    seq, seen = sequence(prediction, min_match=min_match), []
    while (written := len(seq.tokens) - len(PROMPT)) < len(answer):
        tree = draft(seq, depth, width)
        truth = [*answer[written:], -1]
        said = walk(tree, lambda node, tree=tree, truth=truth: truth[tree.depth(node)])
        seen.append((len(tree), len(said.accepted)))
        path = [tree.tokens[node] for node in said.accepted]
        seq.tokens += [*path, said.token][: len(answer) - written]
    return seen


def lost(prediction, answer, **more):
    """Passes beyond those that a prediction without a fault would take."""
    return len(calls(prediction, answer, **more)) - -(-len(answer) // (K + 1))


def place_of(seq):
    draft(seq)
    return seq.drafter_state["prediction"].place


@pytest.mark.parametrize("width", [1, 3])
def test_a_right_prediction_is_accepted_whole_every_time(width):
    seen = calls(TEXT, TEXT, width)
    assert seen[:-1] == [(K, K)] * (len(TEXT) // (K + 1))
    assert seen[-1][0] == seen[-1][1]
    assert len(seen) == -(-len(TEXT) // (K + 1))


EDITS = {
    "one token replaced": (*TEXT[:150], 9, *TEXT[151:]),
    "three tokens replaced": (*TEXT[:150], 7, 8, 9, *TEXT[153:]),
    "one token added": (*TEXT[:150], 9, *TEXT[150:]),
    "twelve tokens added": (*TEXT[:150], *range(500, 512), *TEXT[150:]),
    "one token left out": (*TEXT[:150], *TEXT[151:]),
    "a hundred tokens left out": (*TEXT[:150], *TEXT[250:]),
    "two tokens for nine": (*TEXT[:150], 8, 9, *TEXT[159:]),
    "nine tokens for two": (*TEXT[:150], *range(500, 509), *TEXT[152:]),
    "a part moved": (*TEXT[:100], *TEXT[200:300], *TEXT[100:200], *TEXT[300:]),
    "a part said twice": (*TEXT[:200], *TEXT[100:]),
    "the first token split": (7, 8, *TEXT[1:]),
    "a start before it": (*range(500, 506), *TEXT),
    "an end after it": (*TEXT, *range(500, 506)),
}
ADDED = {"twelve tokens added": 12, "nine tokens for two": 9, "a start before it": 6,
         "an end after it": 6}  # fmt: skip


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("name", EDITS)
def test_an_edit_costs_few_passes_beside_the_tokens_it_adds(name, width):
    """Each new token takes a pass; finding the place again takes at most four more per joint."""
    num_joints = 3 if name == "a part moved" else 1
    assert lost(TEXT, EDITS[name], width=width) <= ADDED.get(name, 0) + 4 * num_joints


def test_many_edits_still_leave_most_of_the_text_accepted():
    rng, answer = random.Random(3), list(TEXT)
    for at in range(380, 0, -40):
        kind = rng.randrange(3)
        answer[at : at + (0 if kind == 1 else 2)] = [at, at + 1][: 2 * (kind < 2)]
    accepted = sum(count for _, count in calls(TEXT, answer))
    assert accepted >= len(answer) - 10 * 5
    wide = sum(count for _, count in calls(TEXT, answer, width=3))
    assert wide >= accepted


def test_one_other_token_is_taken_for_one_replaced():
    seq = sequence(TEXT, [*TEXT[:20], 9])
    tree = draft(seq)
    assert tree.tokens == TEXT[21:29], "a guess reaches half as far"
    seq.tokens += [8]
    assert draft(seq).tokens == TEXT[22:26]
    seq.tokens += TEXT[22:23]
    assert draft(seq).tokens == TEXT[23:27], "one that agrees is followed like a short match"
    seq.tokens += [7, 6, 5]
    assert len(draft(seq)) == 0, "and then no more, until the text is found again"


def test_a_match_is_one_of_the_answer_not_of_the_prompt():
    assert draft(sequence([50, 60, PROMPT[-1], 9, 70], [9])).tokens == (60, 3, 9, 70)


def test_the_place_is_found_after_min_match_tokens():
    for min_match in (1, 2, 3):
        seq = sequence(TEXT, [*TEXT[:20], *range(500, 520)], min_match)
        for count in range(1, min_match + 1):
            assert len(draft(seq)) == 0
            seq.tokens.append(TEXT[99 + count])
        found = TEXT[100 + min_match :][: min(K, REACH * min_match)]
        assert draft(seq).tokens == found


def test_a_place_is_trusted_once_it_matched_long_enough():
    seq = sequence(TEXT, [*TEXT[:20], *range(500, 520), *TEXT[100:102]])
    assert len(draft(seq)) == 2 * REACH
    seq.tokens += TEXT[102:103]
    assert len(draft(seq)) == 3 * REACH
    state = seq.drafter_state["prediction"]
    assert state.home == 20
    seq.tokens += TEXT[103 : 100 + TRUSTED_MATCH]
    assert len(draft(seq)) == K
    assert state.home == 100 + TRUSTED_MATCH


def test_of_equal_matches_the_nearest_from_home_on_wins_then_the_nearest_before():
    text = [*range(100, 110), 5, 6, *range(200, 210), 5, 6, *range(300, 310), 5, 6, 400, 401]
    after = [12, 24, 36]
    for written, place in ((10, 12), (15, 24), (30, 36), (37, 36)):
        seq = sequence(text, [*text[:written], 9, 9, 9, 5, 6])
        assert place in after
        assert place_of(seq) == place


def test_a_longer_match_wins_over_a_nearer_one():
    text = [*range(100, 110), 5, 6, *range(200, 210), 4, 5, 6, 300, 301]
    assert place_of(sequence(text, [*text[:5], 9, 9, 5, 6])) == 12
    assert place_of(sequence(text, [*text[:5], 9, 9, 4, 5, 6])) == 25
    text = [*range(100, 110), 4, 5, 7, *range(200, 205), 5, 6, *range(210, 215), 4, 5, 6, 300, 301]
    assert place_of(sequence(text, [*text[:5], 9, 4, 5])) == 12
    assert place_of(sequence(text, [*text[:5], 9, 4, 5, 6])) == 28


def test_a_false_match_does_not_move_home():
    """Two tokens of an insertion happen to stand far behind; the text returns to where it was."""
    text = [*range(100, 130), 5, 6, *range(200, 230)]
    seq = sequence(text, [*text[:10], 5, 6])
    assert place_of(seq) == 32
    seq.tokens += [9, 9, *text[10:12]]
    assert place_of(seq) == 12


def test_branches_are_the_match_the_replacement_and_the_insertion():
    seq = sequence(TEXT, [*TEXT[:20], 9, *TEXT[300:302]])
    tree = draft(seq, width=3)
    roots = [tree.tokens[node] for node in tree.children(-1)]
    assert roots == [TEXT[302], TEXT[23], TEXT[20]]
    assert [tree.tokens[n] for n in draft(seq, width=2).children(-1)] == roots[:2]
    assert draft(seq, width=3, num_nodes=4).tokens == TEXT[302:306]


def test_past_the_end_nothing_is_drafted():
    assert draft(sequence(TEXT, TEXT[:-2])).tokens == TEXT[-2:]
    assert len(draft(sequence(TEXT, TEXT))) == 0
    assert len(draft(sequence(TEXT, [*TEXT, 9, 9]))) == 0
    assert len(draft(sequence((), [5, 6, 7]))) == 0


@given(tokens, tokens, st.integers(1, 4), st.data())
def test_the_state_depends_on_the_log_alone(prediction, answer, min_match, data):
    """However many tokens come at once, and when it is rebuilt after preemption."""
    grown, count = sequence(prediction, min_match=min_match), 0
    while count < len(answer):
        step = data.draw(st.integers(1, len(answer) - count))
        grown.tokens += answer[count : count + step]
        count += step
        tree = draft(grown)
    fresh = sequence(prediction, answer, min_match)
    if answer:
        assert draft(fresh) == tree
        assert draft(fresh, width=3) == draft(grown, width=3)


@given(tokens, tokens, st.integers(1, 3))
def test_a_match_is_a_match(prediction, answer, min_match):
    """Where the last token was not expected, the place is after a longest match, or a guess."""
    seq = sequence(prediction, answer, min_match)
    draft(seq)
    state = seq.drafter_state["prediction"]
    if state.streak and answer and state.home_at < len(seq.tokens):
        agreeing = min(state.streak, state.place, len(answer))
        assert answer[-agreeing:] == prediction[state.place - agreeing : state.place]


def request(name, speculation, seed, temperature):
    return Request(
        id=name,
        prompt_token_ids=tuple((7 * seed + 5 * j) % 40 + 10 for j in range(6 + seed)),
        sampling=SamplingParams(max_tokens=40, temperature=temperature, ignore_eos=True),
        speculation=speculation,
        seed=100 + seed,
    )


def edited(answer):
    return (*answer[:8], 77, *answer[9:20], *answer[23:30], 78, 79, *answer[30:])


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("num_blocks", [256, 30])
def test_tokens_are_those_of_plain_decoding(temperature, width, num_blocks):
    off = SpeculationParams(method="off")
    plain = run(tiny_engine(), [request(f"r{i}", off, i, temperature) for i in range(5)])
    asked = [
        request(
            name,
            SpeculationParams(
                method="prediction", prediction_token_ids=edited(answer), width=width
            ),
            i,
            temperature,
        )
        for i, ((name, _), answer) in enumerate(plain.items())
    ]
    engine = tiny_engine(
        drafters=[PredictionDrafter()],
        draft_seed=None,
        num_blocks=num_blocks,
        options={"max_model_len": min(256, num_blocks * 4)},
    )
    assert run(engine, asked) == plain
    assert engine.stats.num_accepted_tokens > 60
    assert engine.manager.num_used == 0
    if num_blocks == 30:
        assert engine.stats.num_preemptions > 0


def test_a_request_without_a_prediction_is_refused():
    engine = tiny_engine(drafters=[PredictionDrafter()])
    with pytest.raises(RequestError, match="prediction"):
        engine.add(request("r", SpeculationParams(method="prediction"), 0, 0.0))


def test_it_is_rebuilt_from_the_tokens():
    seq, drafter = sequence(TEXT, [*TEXT[:20], 9, *TEXT[21:30]]), PredictionDrafter()
    expected = draft(seq)
    assert drafter.snapshot(seq) is None
    drafter.close(seq)
    assert seq.drafter_state == {}
    assert drafter.restore(seq, None) == len(seq.tokens)
    assert draft(seq) == expected
    assert len(expected) == K


@given(tokens)
def test_a_copy_takes_all_of_it_and_what_shares_no_token_nothing(prediction):
    assert tokens_taken(prediction, prediction) == len(prediction)
    assert tokens_taken(prediction, [*prediction, 9]) == len(prediction)
    assert tokens_taken(prediction, [token + 4 for token in prediction]) == 0
    assert tokens_taken(prediction, []) == tokens_taken([], prediction) == 0


@given(tokens.filter(bool), st.data())
def test_one_replaced_token_is_not_taken_and_all_others_are(prediction, data):
    at = data.draw(st.integers(0, len(prediction) - 1))
    answer = [*prediction[:at], 9, *prediction[at + 1 :]]
    assert tokens_taken(prediction, answer) == len(prediction) - 1


@given(st.permutations(range(30)), st.integers(0, 29), st.integers(0, 29))
def test_whichever_token_it_is_replaced_by(prediction, at, other):
    answer = [*prediction[:at], other, *prediction[at + 1 :]]
    expected = len(prediction) - (other != prediction[at])
    assert tokens_taken(prediction, answer) == expected


@given(tokens, tokens, st.integers(1, 3))
def test_no_token_of_either_counts_twice(prediction, answer, times):
    taken = tokens_taken(prediction, answer * times)
    both = Counter(prediction) & Counter(answer * times)
    assert 0 <= taken <= both.total()
    assert tokens_taken(prediction, prediction * times) == len(prediction)


TAKEN = {
    "one token replaced": 399,
    "three tokens replaced": 397,
    "one token added": 400,
    "twelve tokens added": 400,
    "one token left out": 399,
    "a hundred tokens left out": 300,
    "two tokens for nine": 391,
    "nine tokens for two": 398,
    "a part moved": 400,
    "a part said twice": 400,
    "the first token split": 399,
    "a start before it": 400,
    "an end after it": 400,
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_takes_what_it_leaves(name):
    assert tokens_taken(TEXT, EDITS[name]) == TAKEN[name]


def test_a_match_takes_its_tokens_where_they_stand_and_not_those_taken_elsewhere():
    """An answer says once what stands twice, and then how it goes on the second time."""
    assert tokens_taken([1, 2, 3, 8, 1, 2, 3, 9], [1, 2, 3, 9]) == 4
    assert tokens_taken([*range(10), 50, 51, 52], [60, 61, 50, 51, 52]) == 3
    assert tokens_taken([*range(10), 50], [60, 61, 50]) == 0, "one token is no match"
