"""Screen: which drafts a client sees, where a tail ends, and what is told of held back text."""

import pytest
import torch

from outrider.request import Request, SamplingParams, StreamParams
from outrider.sequence import Sequence
from outrider.step import Batch, Commit, DraftTree, Row
from outrider.stream.events import Committed, Tail
from outrider.stream.screen import likeliest_path
from outrider.stream.streamer import Streamer
from outrider.testing import ByteTokenizer


class Stage:
    """One completion, streamed: drafts and commits go in, events come out."""

    def __init__(self, sampling=None, tokenizer=ByteTokenizer(), **stream):
        asked = {"visibility": "provisional", "min_stability": 0.0, **stream}
        request = Request(
            id="r",
            prompt_token_ids=tuple(b"prompt"),
            sampling=sampling or SamplingParams(),
            stream=StreamParams(**asked),
        )
        self.seq = Sequence(id="r#0", request=request, index=0, tokens=list(b"prompt"), seed=0)
        self.streamer = Streamer(tokenizer, lambda name: "exact")
        self.streamer.open(self.seq)
        self.tree = DraftTree()

    def draft(self, tree):
        """The tail, or None."""
        self.tree = tree if isinstance(tree, DraftTree) else DraftTree.chain(tuple(tree), "d")
        tails = self.streamer.provisional(Batch([Row(self.seq, 1, 9)], []), [self.tree])
        return tails[0] if tails else None

    def commit(self, tokens, finish_reason=None):
        """The events."""
        tokens = tuple(tokens)
        self.streamer.add(self.seq, tokens)
        self.seq.tokens += tokens
        commit = Commit(
            seq=self.seq, tree=self.tree, tokens=tokens, num_drafted=len(self.tree),
            finish_reason=finish_reason,
        )  # fmt: skip
        self.tree = DraftTree()
        return self.streamer.verified([commit])

    def shown(self, tree):
        tail = self.draft(tree)
        return tail and tail.text


def test_the_first_child_is_shown_where_no_law_says_more():
    tree = DraftTree(tokens=tuple(b"axbc"), parents=(-1, -1, 0, 2), source="d")
    tail = Stage().draft(tree)
    assert (tail.token_ids, tail.text, tail.source) == (tuple(b"abc"), "abc", "tree")


def test_among_drawn_siblings_the_likeliest_is_shown():
    """The second sibling's law lacks the first: it would call even the third the likeliest."""
    first_V = torch.tensor([0.1, 0.2, 0.6, 0.1])
    second_V = torch.tensor([0.1, 0.0, 0.8, 0.1])
    leaf_V = torch.tensor([0.7, 0.1, 0.1, 0.1])
    tree = DraftTree(
        tokens=(1, 2, 0, 3),
        parents=(-1, -1, 1, 1),
        laws=(first_V, second_V, leaf_V, leaf_V),
        source="d",
    )
    assert likeliest_path(tree) == [1, 2]
    assert likeliest_path(DraftTree()) == []


@pytest.mark.parametrize(
    ("source", "kind"),
    [("ngram", "retrieval"), ("prediction", "prediction"), ("draft_model", "draft")],
)
def test_a_tail_says_where_its_drafts_come_from(source, kind):
    assert Stage().draft(DraftTree.chain(tuple(b"ab"), source)).source == kind


def test_tails_follow_the_released_text_and_their_versions_rise():
    stage = Stage()
    told = [
        stage.draft(b"ab"),
        *stage.commit(b"ac"),
        stage.draft(b"e"),
        *stage.commit("é".encode()),
    ]
    tails = [event for event in told if isinstance(event, Tail)]
    assert [(t.text, t.committed_chars, t.version) for t in tails] == [("ab", 0, 1), ("e", 2, 2)]
    assert stage.draft(b"x").committed_chars == 3, "code points, not bytes"


def test_gates_close_on_bad_drafts_and_open_on_good_ones():
    stage = Stage(min_stability=0.8)
    assert stage.shown(b"abcd") == "a", "what a drafter is trusted beforehand"
    stage.commit(b"x")
    assert stage.shown(b"abcd") is None
    for _ in range(40):
        stage.draft(b"abcd")
        stage.commit(b"abcde")
    tail = stage.draft(b"abcd")
    assert tail.text == "abcd"
    assert 0.8 <= tail.stability < 1.0


def test_drafts_that_nobody_saw_teach_as_well():
    stage = Stage(min_stability=0.99)
    for _ in range(5):
        assert stage.draft(b"abcd") is None
        stage.commit(b"abcde")
    assert stage.streamer._stability.survival("d", 4)[3] > 0.6


def test_one_completion_learns_from_another():
    teacher = Stage(min_stability=0.8)
    for _ in range(60):
        teacher.draft(b"abcd")
        teacher.commit(b"abcde")
    pupil = Stage(min_stability=0.8)
    pupil.streamer._stability = teacher.streamer._stability
    pupil.streamer.open(pupil.seq)
    assert pupil.shown(b"abcd") == "abcd"


def test_the_end_of_the_output_is_no_failure_of_the_draft():
    stage = Stage()
    stage.draft(b"abcd")
    stage.commit(b"ab", finish_reason="length")
    assert stage.streamer._stability.survival("d", 4)[3] > 0.8**4


def test_a_tail_has_at_most_as_many_drafts_as_asked():
    assert Stage(max_tail_tokens=2).shown(b"abcd") == "ab"


def test_a_tail_ends_before_what_ends_the_output_or_is_no_text():
    assert Stage().shown(b"ab\x03cd") == "ab", "an end token"
    assert Stage().shown(b"\x03cd") is None
    assert Stage(SamplingParams(stop_token_ids=(99,))).shown(b"abcd") == "ab"


def test_no_tail_in_constrained_output():
    stage = Stage(SamplingParams(regex="a+"))
    assert stage.draft(b"aaa") is None
    assert [type(event) for event in stage.commit(b"aaa")] == [Committed]


def test_no_tail_where_a_stop_text_may_have_begun():
    stage = Stage(SamplingParams(stop=("end",)))
    assert stage.shown(b"the e") == "the "
    assert stage.commit(b"the e")[0].text == "the "
    assert stage.draft(b"gg") is None, "the e may yet be an end"
    assert stage.commit(b"gg")[0].text == "egg"
    assert stage.shown(b" end of") == " "


def test_a_tail_that_no_text_makes_void_is_cleared():
    stage = Stage(SamplingParams(stop=("end",)))
    stage.draft(b"ab")
    committed, cleared = stage.commit(b"e")
    assert (committed.token_ids, committed.text) == (tuple(b"e"), "")
    assert (cleared.text, cleared.token_ids, cleared.version) == ("", (), 2)
    assert [type(event) for event in stage.commit(b"n")] == [Committed], "cleared once"


def test_without_a_tokenizer_tails_are_tokens():
    stage = Stage(tokenizer=None, commit_unit="line")
    assert stage.draft((500, 600)).token_ids == (500, 600)
    (event,) = stage.commit((500,))
    assert event.token_ids == (500,), "no text that could be held back"
    assert stage.draft((7,)).text == ""


def test_held_back_text_leads_the_tail():
    stage = Stage(commit_unit="word")
    assert stage.shown(b"one t") == "one t"
    released, held = stage.commit(b"one tw")
    assert (released.text, held.text, held.token_ids) == ("one ", "tw", tuple(b"one tw"))
    assert (held.source, held.stability, held.committed_chars) == ("deferred", 1.0, 4)
    tail = stage.draft(b"o th")
    assert (tail.text, tail.committed_chars) == ("two th", 4)
    (held,) = stage.commit(b"o")
    assert held.text == "two"
    assert stage.draft(b"\x80") is None
    (last,) = stage.commit(b"s", finish_reason="stop")
    assert last.text == "twos"
    assert last.offset == 0
    assert bytes(last.token_ids) == b"one twos"


def test_the_same_tail_is_not_sent_twice():
    stage = Stage(commit_unit="line")
    assert stage.shown(b"ab") == "ab"
    assert stage.commit(b"ab") == [], "what is held back is on show already"
    assert stage.shown(b"c") == "abc"


def test_who_sees_verified_text_only_gets_whole_units_and_no_tails():
    stage = Stage(visibility="verified", commit_unit="word")
    assert stage.draft(b"abc") is None
    assert stage.commit(b"ab") == []
    (event,) = stage.commit(b"c d")
    assert event.text == "abc "
    assert [e.text for e in stage.commit(b"", finish_reason="abort")] == ["d"]
