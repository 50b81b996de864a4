"""Streamer: what each client is told of commits, and the counts behind it."""

import pytest
from hypothesis import given, strategies as st

from outrider.request import Request, SamplingParams, Speculation, StreamParams
from outrider.sequence import Sequence
from outrider.step import Batch, Commit, DraftTree, Row
from outrider.stream.events import TokenLogprob
from outrider.stream.streamer import Streamer
from outrider.testing import ByteTokenizer

EXACTNESS = {"sampled": "exact", "greedy": "exact-greedy"}


def sequence(name="s", prompt=b"prompt", **request):
    asked = Request(id=name, prompt_token_ids=tuple(prompt), **request)
    return Sequence(
        id=f"{name}#0",
        request=asked,
        index=0,
        tokens=list(prompt),
        seed=0,
        speculation=Speculation(drafter="scripted", verifier="greedy"),
    )


def streamer(*sequences, tokenizer=ByteTokenizer()):
    made = Streamer(tokenizer, EXACTNESS.__getitem__)
    for seq in sequences:
        made.open(seq)
    return made


def tell(a_streamer, seq, tokens, **commit):
    """As the committer does it: the streamer takes tokens in, the log grows, events follow."""
    tokens = tuple(tokens)
    a_streamer.add(seq, tokens)
    seq.tokens += tokens
    (event,) = a_streamer.verified([Commit(seq=seq, tokens=tokens, **commit)])
    return event


def chain(*tokens):
    return DraftTree.chain(tokens, "scripted")


def drafted(num_drafted, num_accepted, num_kept=None):
    return {
        "tree": chain(*range(60, 60 + num_drafted)),
        "num_drafted": num_drafted,
        "num_accepted": num_accepted,
        "num_kept": num_accepted if num_kept is None else num_kept,
    }


def test_events_join_to_the_output_with_offsets_without_gaps():
    seq = sequence()
    stream = streamer(seq)
    told = [
        tell(stream, seq, b"a", num_drafted=0),
        tell(stream, seq, b"bcd", **drafted(3, 2)),
        tell(stream, seq, b"e", **drafted(3, 0)),
        tell(stream, seq, b"fg", **drafted(2, 1), finish_reason="length"),
    ]
    assert [event.offset for event in told] == [0, 1, 4, 5]
    assert "".join(event.text for event in told) == "abcdefg"
    assert [event.num_from_draft for event in told] == [0, 2, 0, 1]
    assert [event.source for event in told] == ["", "scripted", "scripted", "scripted"]
    assert [event.metrics is not None for event in told] == [False, False, False, True]


def tell_end(stream, seq):
    (event,) = stream.verified([Commit(seq=seq, finish_reason="abort")])
    return event.metrics


def test_the_last_event_carries_the_metrics():
    seq = sequence()
    seq.num_prefix_hits, seq.num_preemptions = 4, 2
    stream = streamer(seq)
    tell(stream, seq, b"a")
    tell(stream, seq, b"bcde", **drafted(3, 3), num_relaxed=2)
    tell(stream, seq, b"f", **drafted(3, 0))
    tell(stream, seq, b"g", **drafted(2, 0))
    event = tell(stream, seq, b"hi", **drafted(3, 3, num_kept=2), finish_reason="stop")
    metrics = event.metrics
    assert metrics.accepted_histogram == (2, 0, 0, 2)
    assert metrics.joint_acceptance == (0.5, 0.5, 0.5)
    assert metrics.by_drafter["scripted"].num_drafts == metrics.num_drafts
    assert (metrics.num_steps, metrics.num_drafts) == (5, 4)
    assert (metrics.num_draft_tokens, metrics.num_accepted_tokens) == (11, 6)
    assert metrics.num_generated_tokens == 9
    assert metrics.num_relaxed_tokens == 2
    assert (metrics.num_prompt_tokens, metrics.num_cached_tokens) == (6, 4)
    assert metrics.num_preemptions == 2
    assert (metrics.drafter, metrics.verifier) == ("scripted", "greedy")
    assert metrics.exactness == "exact-greedy"
    assert event.num_from_draft == 2, "what the cut left of the accepted path"


def by_drafter(*commits):
    """What the metrics tell of these commits: (tokens, what `Commit` takes)."""
    seq = sequence()
    stream = streamer(seq)
    for tokens, commit in commits:
        tell(stream, seq, tokens, **commit)
    return tell_end(stream, seq).by_drafter


def test_a_token_is_tried_where_the_draft_came_so_far_and_all_before_it_stood():
    found = by_drafter(
        (b"a", {}),
        (b"abcd", drafted(3, 3)),
        (b"abc", drafted(4, 2)),
        (b"ab", drafted(1, 1)),
        (b"a", drafted(2, 0)),
    )
    fared = found["scripted"]
    assert list(found) == ["scripted"]
    assert fared.tried == (4, 2, 2)
    assert fared.stood == (3, 2, 1)
    assert fared.acceptance == (0.75, 1.0, 0.5)
    assert (fared.num_drafts, fared.num_draft_tokens, fared.num_accepted_tokens) == (4, 10, 6)


@pytest.mark.parametrize(
    ("tokens", "num_accepted", "tried", "stood"),
    [
        (b"a", 3, (1,), (1,)),  # the first drafted token ended the answer
        (b"abc", 3, (1, 1, 1), (1, 1, 1)),
        (b"abcd", 3, (1, 1, 1, 1), (1, 1, 1, 0)),  # the target's own token did
        (b"a", 0, (1,), (0,)),
        (b"abc", 4, (1, 1, 1), (1, 1, 1)),
        (b"abcd", 4, (1, 1, 1, 1), (1, 1, 1, 1)),
    ],
)
def test_what_lies_behind_the_end_was_not_tried(tokens, num_accepted, tried, stood):
    commit = drafted(4, num_accepted, min(num_accepted, len(tokens)))
    fared = by_drafter((tokens, commit))["scripted"]
    assert (fared.tried, fared.stood) == (tried, stood)
    assert fared.num_accepted_tokens == num_accepted, "as in the totals"


def test_of_a_tree_the_longest_path_counts():
    """Three branches of one, three and two tokens."""
    tree = DraftTree(tokens=(5, 6, 7, 8, 9, 10), parents=(-1, -1, 1, 2, -1, 4), source="tree")
    for num_accepted, tried in ((0, (1,)), (1, (1, 1)), (2, (1, 1, 1)), (3, (1, 1, 1))):
        commit = {"tree": tree, "num_drafted": 6, "num_accepted": num_accepted}
        fared = by_drafter((b"abcdefgh"[: num_accepted + 1], commit))["tree"]
        assert fared.tried == tried
        assert sum(fared.stood) == num_accepted


def test_each_drafter_is_counted_by_itself():
    other = {**drafted(2, 2), "tree": DraftTree.chain((60, 61), "other")}
    nameless = {**drafted(1, 1), "tree": DraftTree.chain((60,), "")}
    found = by_drafter((b"ab", drafted(3, 1)), (b"abc", other), (b"ab", nameless))
    assert found["other"].tried == found["other"].stood == (1, 1)
    assert found["scripted"].tried == (2, 1), "a draft that names nobody is the request's"
    assert found["scripted"].num_drafts == 2


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(0, 5)), min_size=1, max_size=20))
def test_counts_by_position_are_those_of_the_drafts(drafts):
    drafts = [(depth, min(accepted, depth)) for depth, accepted in drafts]
    fared = by_drafter(*((bytes(97 + i for i in range(a + 1)), drafted(d, a)) for d, a in drafts))
    fared = fared["scripted"]
    for i, (tried, stood) in enumerate(zip(fared.tried, fared.stood, strict=True)):
        here = [accepted for depth, accepted in drafts if depth > i and accepted >= i]
        assert (tried, stood) == (len(here), sum(accepted > i for accepted in here))
    assert sum(fared.stood) == sum(accepted for _, accepted in drafts)
    assert sum(fared.tried) == sum(min(d, a + 1) for d, a in drafts)


def test_steps_without_tokens_tell_nothing():
    seq = sequence()
    stream = streamer(seq)
    assert stream.verified([Commit(seq=seq)]) == []
    assert tell_end(stream, seq).num_steps == 0


def test_the_end_brings_what_was_held_back_and_forgets_the_sequence():
    seq = sequence(sampling=SamplingParams(stop=("end",)))
    stream = streamer(seq)
    assert tell(stream, seq, b"the en").text == "the "
    (event,) = stream.verified([Commit(seq=seq, finish_reason="abort")])
    assert (event.text, event.token_ids, event.offset) == ("en", (), 6)
    assert event.finish_reason == "abort"
    with pytest.raises(KeyError):
        stream.verified([Commit(seq=seq, finish_reason="abort")])


@pytest.mark.parametrize(("keeps", "text"), [(False, "the "), (True, "the end")])
def test_stop_texts_are_looked_for_as_the_request_says(keeps, text):
    seq = sequence(sampling=SamplingParams(stop=("end",), include_stop_str_in_output=keeps))
    stream = streamer(seq)
    stop = stream.add(seq, tuple(b"the end of it"))
    assert (stop.text, stop.num_tokens) == ("end", 7)
    (event,) = stream.verified([Commit(seq=seq, tokens=tuple(b"the end"), finish_reason="stop")])
    assert event.text == text


def test_special_tokens_are_left_out_unless_asked_for():
    told = []
    for skips in (True, False):
        seq = sequence(sampling=SamplingParams(skip_special_tokens=skips))
        told.append(tell(streamer(seq), seq, (65, 3), finish_reason="length").text)
    assert told == ["A", "A\x03"]


def test_logprobs_stand_beside_their_tokens():
    seq = sequence()
    found = ((-0.5, {97: -0.5, 98: -1.0}), (-2.0, {99: -0.1}))
    event = tell(streamer(seq), seq, b"ab", logprobs=found)
    assert event.logprobs == (
        TokenLogprob(token_id=97, logprob=-0.5, top={97: -0.5, 98: -1.0}),
        TokenLogprob(token_id=98, logprob=-2.0, top={99: -0.1}),
    )


def test_without_a_tokenizer_there_are_ids_only():
    seq = sequence(sampling=SamplingParams())
    event = tell(streamer(seq, tokenizer=None), seq, b"ab", finish_reason="length")
    assert (event.text, event.token_ids) == ("", (97, 98))


def test_sequences_do_not_mix():
    one, two = sequence("one"), sequence("two")
    stream = streamer(one, two)
    euro = "€".encode()
    stream.add(one, tuple(euro[:2]))
    stream.add(two, tuple(b"x"))
    told = stream.verified(
        [Commit(seq=one, tokens=tuple(euro[:2])), Commit(seq=two, tokens=(120,))]
    )
    assert [(event.request_id, event.text) for event in told] == [("one", ""), ("two", "x")]
    assert tell(stream, one, euro[2:]).text == "€"


def tails(stream, seq, tree):
    return stream.provisional(Batch([Row(seq, 1, 9)], []), [tree])


SHOWN = StreamParams(visibility="provisional", min_stability=0.0)


def test_only_clients_that_asked_see_tails():
    shown, hidden = sequence("shown", stream=SHOWN), sequence("hidden")
    stream = streamer(shown, hidden)
    batch = Batch([Row(hidden, 1, 2), Row(shown, 1, 2)], [])
    (tail,) = stream.provisional(batch, [chain(97, 98), chain(99)])
    assert (tail.request_id, tail.index, tail.token_ids, tail.text) == ("shown", 0, (99,), "c")
    assert tails(stream, shown, DraftTree()) == []


def test_nobody_who_did_not_ask_has_a_screen():
    asked = [SHOWN, StreamParams(commit_unit="line"), StreamParams(min_stability=0.1)]
    sequences = [sequence(str(i), stream=params) for i, params in enumerate(asked)]
    stream = streamer(*sequences)
    screens = [stream._told[seq.id].screen for seq in sequences]
    assert [screen is not None for screen in screens] == [True, True, False]
    assert stream._num_screens == 2
    for seq in sequences:
        stream.verified([Commit(seq=seq, finish_reason="abort")])
    assert stream._num_screens == 0


def test_tails_go_out_before_the_step_ends_to_those_who_listen():
    seq = sequence(stream=SHOWN)
    stream = streamer(seq)
    heard = []
    stream.on_tails = heard.extend
    assert tails(stream, seq, chain(97)) == []
    assert [tail.text for tail in heard] == ["a"]
    assert tails(stream, seq, chain(3)) == []
    assert len(heard) == 1, "nothing to show, nobody is called"


class Words:
    """A word begins with its space, which the first of a text loses."""

    def decode(self, ids, skip_special_tokens=True):
        return "".join(f" w{i}" for i in ids).removeprefix(" ")


def test_the_first_word_keeps_its_space_because_of_the_prompt():
    seq = sequence(prompt=(1, 2))
    stream = streamer(seq, tokenizer=Words())
    assert [tell(stream, seq, (i,)).text for i in (3, 4)] == [" w3", " w4"]


class ByteFallback:
    """Bytes that follow one another are a text together or, if they are none, all unreadable."""

    def decode(self, ids, skip_special_tokens=True):
        try:
            return bytes(ids).decode()
        except UnicodeDecodeError:
            return "\ufffd" * len(ids)


@pytest.mark.parametrize("lead", [b"", b"a", b"ab"])
def test_a_prompt_of_many_bytes_does_not_spoil_the_first_character(lead):
    """The last six tokens of two smileys begin inside the first one."""
    smiley = "😀".encode()
    seq = sequence(prompt=lead + smiley * 2)
    stream = streamer(seq, tokenizer=ByteFallback())
    assert "".join(tell(stream, seq, (byte,)).text for byte in smiley) == "😀"


def test_an_unreadable_prompt_is_no_error():
    seq = sequence(prompt=b"\x80" * 20)
    stream = streamer(seq, tokenizer=ByteTokenizer())
    assert tell(stream, seq, b"a").text == "a"
