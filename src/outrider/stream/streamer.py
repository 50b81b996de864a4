"""Streamer: from commits to events; the one place that knows what each client has been told."""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate
from operator import add

from outrider.sequence import Sequence
from outrider.step import Batch, Commit, DraftTree
from outrider.stream.detokenize import Decoder, Detokenizer, Stop
from outrider.stream.events import (
    Committed,
    DrafterMetrics,
    Event,
    RequestMetrics,
    StepTree,
    TokenLogprob,
)
from outrider.stream.screen import Screen
from outrider.stream.stability import Stability

NUM_CONTEXT_TOKENS = 6


@dataclass(eq=False)
class Fared:
    """How one drafter's drafts fared so far.

    Attributes:
        fell: entry a counts the drafts of which a tokens stood and the next one did not.
        held: entry a counts the drafts of which a tokens stood, and then they or the answer ended.
    """

    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    fell: list[int] = field(default_factory=list)
    held: list[int] = field(default_factory=list)

    def count(self, commit: Commit) -> None:
        num_drafted, num_accepted = commit.num_drafted, commit.num_accepted
        self.num_drafts += 1
        self.num_draft_tokens += num_drafted
        self.num_accepted_tokens += num_accepted
        # What was accepted behind the answer's end continues a text that nobody wanted.
        is_cut = len(commit.tokens) <= num_accepted
        falls = not is_cut and num_accepted < num_drafted and num_accepted < _depth(commit.tree)
        _add(self.fell if falls else self.held, min(num_accepted, len(commit.tokens)))

    def metrics(self) -> DrafterMetrics:
        size = max(len(self.fell), len(self.held)) + 1
        fell, held = ([*counts, *[0] * (size - len(counts))] for counts in (self.fell, self.held))
        # Of these, at least a tokens stood.
        stood = list(accumulate(map(add, reversed(fell), reversed(held))))[::-1]
        tried = [each + more for each, more in zip(stood[1:], fell, strict=False)]
        depth = len(tried) - tried[::-1].count(0)  # they fall from each position to the next
        return DrafterMetrics(
            num_drafts=self.num_drafts,
            num_draft_tokens=self.num_draft_tokens,
            num_accepted_tokens=self.num_accepted_tokens,
            tried=tuple(tried[:depth]),
            stood=tuple(stood[1 : depth + 1]),
        )


@dataclass(eq=False)
class Told:
    """One completion's text so far and the counts behind its metrics.

    Attributes:
        screen: of a client that takes tails or whole units only; None for plain streams, which
            must not pay for it.
    """

    text: Detokenizer | None
    screen: Screen | None = None
    num_steps: int = 0
    num_relaxed_tokens: int = 0
    num_tokens: int = 0
    histogram: list[int] = field(default_factory=list)
    by_drafter: dict[str, Fared] = field(default_factory=dict)

    def count(self, commit: Commit) -> None:
        self.num_steps += 1
        self.num_tokens += len(commit.tokens)
        if commit.num_drafted:
            self.num_relaxed_tokens += commit.num_relaxed
            _add(self.histogram, commit.num_accepted)
            source = commit.tree.source or commit.seq.speculation.drafter
            fared = self.by_drafter.get(source)
            if fared is None:
                fared = self.by_drafter[source] = Fared()
            fared.count(commit)


class Streamer:
    """Keeps a detokenizer per completion.

    Args:
        tokenizer: None serves token ids without text.
        exactness: name of a verifier -> what it promises; asked when a completion ends.

    Attributes:
        on_tails: called with tails while the target is still to judge them, which is when they
            are worth most. None hands them out with the step's other events.
    """

    def __init__(self, tokenizer: Decoder | None, exactness: Callable[[str], str]) -> None:
        self._tokenizer = tokenizer
        self._exactness = exactness
        self.on_tails: Callable[[list[Event]], None] | None = None
        self._special_ids: frozenset[int] = frozenset(getattr(tokenizer, "special_ids", ()))
        self._stability = Stability()
        self._told: dict[str, Told] = {}
        self._num_screens = 0

    def open(self, seq: Sequence) -> None:
        text = self._detokenizer(seq)
        self._told[seq.id] = Told(text, self._screen(seq, text))

    def add(self, seq: Sequence, tokens: tuple[int, ...], *, may_stop: bool = True) -> Stop | None:
        """Takes in tokens that are about to be committed; tells where a stop text ends them."""
        text = self._told[seq.id].text
        return text.add(tokens, may_stop=may_stop) if text else None

    def provisional(self, batch: Batch, drafts: list[DraftTree]) -> list[Event]:
        """Tails for the clients that can take text back, unless `on_tails` has taken them."""
        if not self._num_screens:
            return []
        tails: list[Event] = []
        for row, tree in zip(batch.rows, drafts, strict=True):
            screen = self._told[row.seq.id].screen
            if len(tree) and screen is not None and screen.takes_tails:
                tail = screen.drafted(tree)
                tails += [tail] if tail is not None else []
        if self.on_tails is None:
            return tails
        if tails:
            self.on_tails(tails)
        return []

    def verified(self, commits: list[Commit]) -> list[Event]:
        """One event per sequence that got tokens or ended; a screen may make none of it, or two."""
        told = [c for c in commits if c.tokens or c.finish_reason]
        if not self._num_screens:
            return [self._event(c) for c in told]
        return [event for c in told for event in self._on_screen(c)]

    def _on_screen(self, commit: Commit) -> list[Event]:
        screen = self._told[commit.seq.id].screen
        event = self._event(commit)
        return [event] if screen is None else screen.committed(commit, event)

    def _event(self, commit: Commit) -> Committed:
        seq = commit.seq
        told = self._told[seq.id]
        offset = told.num_tokens
        if commit.tokens:
            told.count(commit)
        is_last = commit.finish_reason is not None
        event = Committed(
            seq.request.id,
            seq.index,
            offset,
            commit.tokens,
            told.text.take(is_last=is_last) if told.text else "",
            commit.num_drafted,
            commit.num_accepted,
            commit.num_kept,
            commit.tree.source,
            _logprobs(commit) if commit.logprobs else (),
            commit.finish_reason,
            seq.stop_reason,
            commit.error,
            self._metrics(seq, told) if is_last else None,
            _tree(commit) if seq.request.stream.steps else None,
        )
        if is_last:
            del self._told[seq.id]
            self._num_screens -= told.screen is not None
        return event

    def _metrics(self, seq: Sequence, told: Told) -> RequestMetrics:
        by_drafter = {name: fared.metrics() for name, fared in told.by_drafter.items()}
        total = sum(by_drafter.values(), DrafterMetrics())
        return RequestMetrics(
            num_prompt_tokens=seq.num_prompt,
            num_cached_tokens=seq.num_prefix_hits,
            num_generated_tokens=seq.num_generated,
            num_steps=told.num_steps,
            num_drafts=total.num_drafts,
            num_draft_tokens=total.num_draft_tokens,
            num_accepted_tokens=total.num_accepted_tokens,
            num_relaxed_tokens=told.num_relaxed_tokens,
            accepted_histogram=tuple(told.histogram),
            by_drafter=by_drafter,
            drafter=seq.speculation.drafter,
            verifier=seq.speculation.verifier,
            exactness=self._exactness(seq.speculation.verifier),
            verifier_options=dict(seq.speculation.verifier_options),
            num_preemptions=seq.num_preemptions,
        )

    def _screen(self, seq: Sequence, text: Detokenizer | None) -> Screen | None:
        stream, sampling = seq.request.stream, seq.request.sampling
        if not stream.is_provisional and stream.commit_unit == "token":
            return None
        self._num_screens += 1
        return Screen(
            seq.request,
            seq.index,
            text=text,
            hidden=self._special_ids.union(sampling.stop_token_ids),
            stability=self._stability,
        )

    def _detokenizer(self, seq: Sequence) -> Detokenizer | None:
        if self._tokenizer is None:
            return None
        sampling = seq.request.sampling
        return Detokenizer(
            self._tokenizer,
            stop=sampling.stop,
            keeps_stop=sampling.include_stop_str_in_output,
            skip_special_tokens=sampling.skip_special_tokens,
            context=_context(self._tokenizer, seq.tokens[: seq.num_prompt]),
        )


def _context(tokenizer: Decoder, prompt: list[int]) -> tuple[int, ...]:
    """The prompt's last tokens, from a whole character on: half of one may spoil its neighbours."""
    tails = [prompt[-size:] for size in range(NUM_CONTEXT_TOKENS, NUM_CONTEXT_TOKENS + 4)]
    whole = (tail for tail in tails if not tokenizer.decode(tail).startswith("\ufffd"))
    return tuple(next(whole, tails[0]))


def _add(counts: list[int], entry: int) -> None:
    """One more of an entry that may be new."""
    counts += [0] * (entry + 1 - len(counts))
    counts[entry] += 1


def _depth(tree: DraftTree) -> int:
    """Tokens of the longest path."""
    if tree.is_chain:
        return len(tree)
    depths: list[int] = []
    for parent in tree.parents:
        depths.append(1 if parent < 0 else depths[parent] + 1)
    return max(depths, default=0)


def _tree(commit: Commit) -> StepTree | None:
    tree = commit.tree
    return StepTree(tree.tokens, tree.parents, commit.accepted) if len(tree) else None


def _logprobs(commit: Commit) -> tuple[TokenLogprob, ...]:
    return tuple(
        TokenLogprob(token_id=token, logprob=logprob, top=top)
        for token, (logprob, top) in zip(commit.tokens, commit.logprobs, strict=False)
    )
