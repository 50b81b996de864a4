"""Committer: where an accepted run is cut, and what KV, log-probabilities, grammar make of it."""

import math
from types import SimpleNamespace

import pytest
import torch

from outrider.cache.pool import KVPool
from outrider.cache.table import BlockManager
from outrider.engine.commit import Committer
from outrider.errors import RequestError
from outrider.request import Request, SamplingParams, SpeculationParams
from outrider.sequence import Sequence
from outrider.step import EMPTY_TREE, Batch, DraftTree, Row, TargetOutput, Verdict
from outrider.stream.streamer import Streamer
from outrider.testing import (
    ByteTokenizer,
    ScriptedDrafter,
    events,
    junk_tree,
    oracle,
    run,
    tiny_engine,
)

EOS, END = 3, 90
PROMPT = tuple(b"prompt")


class Desk:
    """A committer over a pool whose slots hold their own numbers; the model is left out."""

    def __init__(self, max_model_len=100, **sampling):
        self.manager = BlockManager(32, 4)
        self.pool = KVPool([(1, 1, 1)], 32, 4, torch.float32, torch.device("cpu"))
        self.streamer = Streamer(ByteTokenizer(), {"sampled": "exact"}.__getitem__)
        self.committer = Committer(self.manager, self.pool, self.streamer, (EOS,), max_model_len)
        request = Request(id="r", prompt_token_ids=PROMPT, sampling=SamplingParams(**sampling))
        self.seq = Sequence(id="r#0", request=request, index=0, tokens=list(PROMPT), seed=0)
        self.seq.table, _ = self.manager.open(self.seq.tokens)
        self.streamer.open(self.seq)

    def commit(self, tree, accepted, token, logits=None, num_tokens=None, relaxed=()):
        """One step of the sequence: `accepted` and the bonus token are the verdict."""
        seq = self.seq
        num_tokens = seq.num_uncached if num_tokens is None else num_tokens
        assert self.manager.reserve(seq.table, seq.num_cached + num_tokens + len(tree))
        row = Row(seq, num_tokens, len(tree))
        logits = torch.zeros(1 + len(tree), 256) if logits is None else logits
        verdict = None
        if accepted is not None:
            verdict = Verdict(tuple(accepted), token, relaxed=relaxed)
        output = TargetOutput(logits, [0 if verdict else -1], [])
        (made,) = self.committer.commit(Batch([row], []), [tree], [verdict], output)
        return made

    def run_to(self, text):
        """Commits the text's tokens, one plain step each."""
        for byte in text:
            assert self.commit(EMPTY_TREE, (), byte).finish_reason is None


def accept_all(desk, tokens, bonus):
    """A chain that is accepted in full."""
    return desk.commit(DraftTree.chain(tokens, "scripted"), range(len(tokens)), bonus)


def test_a_run_is_committed_whole_when_nothing_ends_it():
    desk = Desk()
    commit = accept_all(desk, b"abc", ord("d"))
    assert commit.tokens == tuple(b"abcd")
    assert (commit.num_drafted, commit.num_accepted, commit.num_kept) == (3, 3, 3)
    assert commit.finish_reason is None
    assert desk.seq.tokens == [*PROMPT, *b"abcd"]
    assert desk.seq.num_cached == len(desk.seq.tokens) - 1


@pytest.mark.parametrize("at", [0, 1, 2, 3])
def test_end_of_sequence_inside_an_accepted_run(at):
    """Nothing after it leaks, be it drafted (0 to 2) or the bonus token (3)."""
    desk = Desk()
    run_of = list(b"abcd")
    run_of[at] = EOS
    commit = accept_all(desk, run_of[:3], run_of[3])
    assert commit.tokens == (*b"abcd"[:at], EOS)
    assert commit.finish_reason == "stop"
    assert (desk.seq.finish_reason, desk.seq.stop_reason) == ("stop", None)
    assert (commit.num_accepted, commit.num_kept) == (3, min(at + 1, 3))
    assert desk.seq.num_cached == len(desk.seq.tokens) - 1
    (event,) = desk.streamer.verified([commit])
    assert event.text == "abcd"[:at], "the end token has no text"


def test_ignore_eos_goes_on():
    desk = Desk(ignore_eos=True)
    commit = accept_all(desk, [97, EOS, 98], 99)
    assert (commit.tokens, commit.finish_reason) == ((97, EOS, 98, 99), None)


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_stop_token_inside_an_accepted_run(ignore_eos):
    desk = Desk(stop_token_ids=(END,), ignore_eos=ignore_eos)
    commit = accept_all(desk, [97, END, 98], 99)
    assert commit.tokens == (97, END)
    assert (commit.finish_reason, desk.seq.stop_reason) == ("stop", END)
    (event,) = desk.streamer.verified([commit])
    assert (event.text, event.stop_reason) == ("a", END), "in the tokens, not in the text"


@pytest.mark.parametrize(("stop", "kept"), [("bc", "abc"), ("xa", None), ("d", "abcd"), ("a", "a")])
def test_stop_text_inside_an_accepted_run(stop, kept):
    desk = Desk(stop=(stop,))
    commit = accept_all(desk, b"abc", ord("d"))
    assert commit.tokens == tuple((kept or "abcd").encode())
    assert commit.finish_reason == ("stop" if kept else None)
    assert desk.seq.stop_reason == (stop if kept else None)
    assert commit.num_kept == min(3, len(commit.tokens))


def test_stop_text_across_two_commits():
    desk = Desk(stop=("bcd",))
    accept_all(desk, b"a", ord("b"))
    commit = accept_all(desk, b"cdef", ord("g"))
    assert (commit.tokens, commit.finish_reason) == (tuple(b"cd"), "stop")
    assert desk.seq.tokens == [*PROMPT, *b"abcd"]


def test_the_first_of_stop_text_and_end_token_decides():
    early = Desk(stop=("ab",))
    commit = accept_all(early, [*b"abc", EOS], 100)
    assert (commit.tokens, early.seq.stop_reason) == (tuple(b"ab"), "ab")
    late = Desk(stop=("cd",))
    commit = accept_all(late, [*b"ab", EOS, *b"cd"], 100)
    assert (commit.tokens, late.seq.stop_reason) == ((*b"ab", EOS), None)


@pytest.mark.parametrize("max_tokens", [1, 2, 3, 4])
def test_max_tokens_inside_an_accepted_run(max_tokens):
    desk = Desk(max_tokens=max_tokens)
    commit = accept_all(desk, b"abc", ord("d"))
    assert commit.tokens == tuple(b"abcd"[:max_tokens])
    assert commit.finish_reason == "length"
    assert commit.num_kept == min(3, max_tokens)
    assert desk.seq.num_cached == len(desk.seq.tokens) - 1


def test_the_last_allowed_token_may_be_an_end_token():
    desk = Desk(max_tokens=2)
    assert accept_all(desk, [97, EOS], 98).finish_reason == "stop"
    other = Desk(max_tokens=2, stop=("ab",))
    assert accept_all(other, b"ab", 98).finish_reason == "stop"


def test_an_end_token_beyond_the_last_allowed_one_does_not_count():
    desk = Desk(max_tokens=2)
    commit = accept_all(desk, [97, 98, EOS], 99)
    assert (commit.tokens, commit.finish_reason) == ((97, 98), "length")


def test_max_model_len_inside_an_accepted_run():
    desk = Desk(max_model_len=len(PROMPT) + 3, max_tokens=None)
    commit = accept_all(desk, b"abc", ord("d"))
    assert (commit.tokens, commit.finish_reason) == (tuple(b"abc"), "length")


@pytest.mark.parametrize("split", [1, 2, 3, 4, 5])
@pytest.mark.parametrize(("min_tokens", "kept"), [(0, 2), (2, 2), (3, 4), (4, 4), (5, 6), (9, 6)])
def test_stop_texts_wait_for_min_tokens_wherever_a_commit_ends(split, min_tokens, kept):
    """The text a.a.a. stops at a point, but not before `min_tokens` tokens stand."""
    text = b"a.a.a."
    desk = Desk(stop=(".",), min_tokens=min_tokens, max_tokens=9)
    for part in (text[:split], text[split:]):
        commit = accept_all(desk, part[:-1], part[-1])
        if commit.finish_reason:
            break
    assert bytes(desk.seq.tokens[len(PROMPT) :]) == text[:kept]
    assert commit.finish_reason == ("stop" if min_tokens <= 6 else None)


def test_a_chunk_that_stops_short_commits_no_token():
    desk = Desk()
    commit = desk.commit(EMPTY_TREE, None, 0, num_tokens=5)
    assert (commit.tokens, commit.finish_reason) == ((), None)
    assert desk.seq.num_cached == 5
    assert desk.seq.table.num_hashed == 1, "its full block may be shared at once"
    assert accept_all(desk, b"ab", 99).tokens == (*b"ab", 99)
    assert desk.seq.table.num_hashed == 2


def number_slots(desk, tree):
    """Each slot of the step holds its position in the pass: prompt, then nodes."""
    desk.manager.reserve(desk.seq.table, len(desk.seq.tokens) + len(tree))
    for index, slot in enumerate(desk.seq.table.slots(0, len(desk.seq.tokens) + len(tree))):
        for part in desk.pool.layers[0]:
            part[slot] = index


def held(desk):
    slots = desk.seq.table.slots(0, desk.seq.num_cached)
    (layer,) = desk.pool.layers
    assert torch.equal(layer.keys, layer.values)
    return [int(layer.keys[slot]) for slot in slots]


#      root -> a(0) -> c(2) -> e(4)
#           -> b(1) -> d(3) -> f(5) -> g(6)
TREE = DraftTree(tokens=tuple(b"abcdefg"), parents=(-1, -1, 0, 1, 2, 3, 5), source="scripted")


@pytest.mark.parametrize("accepted", [(), (0,), (1,), (0, 2), (1, 3), (0, 2, 4), (1, 3, 5, 6)])
def test_the_accepted_path_moves_to_the_slots_of_its_positions(accepted):
    desk = Desk()
    number_slots(desk, TREE)
    commit = desk.commit(TREE, accepted, ord("z"))
    assert commit.tokens == (*(TREE.tokens[node] for node in accepted), ord("z"))
    first = len(PROMPT)
    assert held(desk) == [*range(first), *(first + node for node in accepted)]


def test_only_what_the_cut_left_is_kept():
    desk = Desk(max_tokens=2)
    number_slots(desk, TREE)
    commit = desk.commit(TREE, (1, 3, 5, 6), ord("z"), relaxed=(3, 6))
    assert commit.num_relaxed == 1
    assert (commit.tokens, commit.num_kept, commit.num_accepted) == (tuple(b"bd"), 2, 4)
    first = len(PROMPT)
    assert held(desk) == [*range(first), first + 1], "the last token is a root without KV"


def test_trees_and_chains_leave_the_kv_of_plain_decoding():
    """The engine's own check, through the model: compaction does not disturb what follows."""
    sampling = SamplingParams(max_tokens=40, ignore_eos=True)
    plain = tiny_engine()
    truth = run(plain, [Request(id="r", prompt_token_ids=PROMPT, sampling=sampling)])["r", 0]
    drafter = ScriptedDrafter(junk_tree(256, [*PROMPT, *truth], seed=3))
    engine = tiny_engine(drafters=[drafter])
    spec = SpeculationParams(method="scripted", num_draft_tokens=4, width=4)
    asked = Request(id="r", prompt_token_ids=PROMPT, sampling=sampling, speculation=spec)
    (told,) = events(engine, [asked]).values()
    assert [t for e in told for t in e.token_ids] == truth
    assert any(e.num_accepted >= 2 for e in told), "paths of two nodes and more were compacted"


@pytest.mark.parametrize("num_top", [0, 3])
def test_logprobs_come_from_the_row_that_each_token_was_drawn_from(num_top):
    desk = Desk(logprobs=num_top)
    logits = torch.randn(1 + len(TREE), 256)
    commit = desk.commit(TREE, (1, 3), ord("z"), logits)
    rows = [logits[0], logits[1 + 1], logits[1 + 3]]
    for row_V, token, (logprob, top) in zip(rows, commit.tokens, commit.logprobs, strict=True):
        log_V = row_V.log_softmax(0)
        assert logprob == pytest.approx(float(log_V[token]))
        assert list(top) == log_V.topk(num_top).indices.tolist()
        assert all(math.isclose(value, log_V[i], rel_tol=1e-6) for i, value in top.items())


def test_logprobs_are_cut_with_the_tokens_and_left_out_unless_asked_for():
    desk = Desk(logprobs=1, max_tokens=2)
    assert len(accept_all(desk, b"abc", ord("d")).logprobs) == 2
    assert accept_all(Desk(), b"abc", ord("d")).logprobs == ()


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("method", ["scripted", "draft_model", "tree"])
def test_logprobs_under_speculation_are_those_of_plain_decoding(method, temperature):
    """Bit for bit, raw logits before temperature and penalties."""
    sampling = SamplingParams(
        max_tokens=24, temperature=temperature, logprobs=2, frequency_penalty=0.3, ignore_eos=True
    )
    asked = Request(
        id="r", prompt_token_ids=PROMPT, sampling=sampling, seed=4,
        speculation=SpeculationParams(method="off"),
    )  # fmt: skip
    (plain,) = events(tiny_engine(), [asked]).values()
    truth = [*PROMPT, *(t for e in plain for t in e.token_ids)]
    drafters = [
        ScriptedDrafter(oracle(truth)),
        ScriptedDrafter(junk_tree(256, truth), name="tree"),
    ]
    engine = tiny_engine(draft_seed=0, drafters=drafters)
    spec = SpeculationParams(method=method, num_draft_tokens=4, width=3 if method == "tree" else 1)
    (told,) = events(engine, [Request(**{**vars(asked), "speculation": spec})]).values()
    found = [entry for e in told for entry in e.logprobs]
    assert [entry.token_id for entry in found] == truth[len(PROMPT) :]
    assert found == [entry for e in plain for entry in e.logprobs]
    assert all(len(e.logprobs) == len(e.token_ids) for e in told)
    assert told[-1].metrics.num_accepted_tokens > 0


def test_an_error_ends_the_one_sequence_and_leaves_its_prompt_cached():
    """Completions that fork from it find the prompt's KV in the tree."""
    desk = Desk()
    seq = desk.seq
    desk.manager.reserve(seq.table, seq.num_uncached)
    output = TargetOutput(torch.zeros(1, 256), [0], [])
    verdict = Verdict((), -1, "no token is allowed")
    (commit,) = desk.committer.commit(
        Batch([Row(seq, seq.num_uncached, 0)], []), [EMPTY_TREE], [verdict], output
    )
    assert (commit.tokens, commit.finish_reason) == ((), "error")
    assert commit.error == "no token is allowed"
    assert seq.finish_reason == "error"
    assert seq.tokens == list(PROMPT)
    assert (seq.num_cached, seq.table.num_hashed) == (len(PROMPT) - 1, 1)


class Grammar(SimpleNamespace):
    """Notes what it is advanced by."""

    def advance(self, tokens):
        if self.error:
            raise RequestError(self.error)
        self.seen.append(tuple(tokens))


def grammar(error=""):
    return Grammar(seen=[], error=error)


def test_a_grammar_advances_by_what_was_committed():
    desk = Desk()
    desk.seq.grammar = grammar()
    accept_all(desk, b"ab", ord("c"))
    desk.commit(DraftTree.chain(b"xy", "scripted"), (0,), ord("d"))
    assert desk.seq.grammar.seen == [tuple(b"abc"), tuple(b"xd")]


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_an_end_token_ends_a_constrained_output_once(ignore_eos):
    """After a complete output a grammar allows nothing but ends: drafts of more are cut."""
    desk = Desk(ignore_eos=ignore_eos)
    desk.seq.grammar = grammar()
    commit = accept_all(desk, [*b"ab", EOS, EOS], EOS)
    assert (commit.tokens, commit.finish_reason) == ((*b"ab", EOS), "stop")


def test_a_grammar_that_fails_ends_its_own_request():
    desk = Desk()
    desk.seq.grammar = grammar(error="the grammar failed: why")
    commit = accept_all(desk, b"ab", ord("c"))
    assert (commit.finish_reason, commit.error) == ("error", "the grammar failed: why")
    assert commit.tokens == tuple(b"abc"), "they were committed before it failed"
    (event,) = desk.streamer.verified([commit])
    assert (event.error, event.text) == ("the grammar failed: why", "abc")
