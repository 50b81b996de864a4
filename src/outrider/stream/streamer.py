"""Streamer: from commits to events; the one place that knows what each client has been told."""

from collections.abc import Callable
from dataclasses import dataclass, field

from outrider.sequence import Sequence
from outrider.step import Batch, Commit, DraftTree
from outrider.stream.detokenize import Decoder, Detokenizer, Stop
from outrider.stream.events import Committed, Event, RequestMetrics, Tail, TokenLogprob

NUM_CONTEXT_TOKENS = 6


@dataclass(eq=False)
class Told:
    """One completion's text so far and the counts behind its metrics."""

    text: Detokenizer | None
    num_steps: int = 0
    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_tokens: int = 0
    histogram: list[int] = field(default_factory=list)

    def count(self, commit: Commit) -> None:
        self.num_steps += 1
        self.num_tokens += len(commit.tokens)
        if commit.num_drafted:
            self.num_drafts += 1
            self.num_draft_tokens += commit.num_drafted
            self.num_accepted_tokens += commit.num_accepted
            missing = commit.num_accepted + 1 - len(self.histogram)
            self.histogram += [0] * missing
            self.histogram[commit.num_accepted] += 1


class Streamer:
    """Keeps a detokenizer per completion.

    Args:
        tokenizer: None serves token ids without text.
        exactness: name of a verifier -> what it promises; asked when a completion ends.
    """

    def __init__(self, tokenizer: Decoder | None, exactness: Callable[[str], str]) -> None:
        self._tokenizer = tokenizer
        self._exactness = exactness
        self._told: dict[str, Told] = {}

    def open(self, seq: Sequence) -> None:
        self._told[seq.id] = Told(self._detokenizer(seq))

    def add(self, seq: Sequence, tokens: tuple[int, ...], *, may_stop: bool = True) -> Stop | None:
        """Takes in tokens that are about to be committed; tells where a stop text ends them."""
        text = self._told[seq.id].text
        return text.add(tokens, may_stop=may_stop) if text else None

    def provisional(self, batch: Batch, drafts: list[DraftTree]) -> list[Event]:
        """Tails for the clients that can take text back: the first path of each draft tree."""
        return [
            self._tail(row.seq, tree)
            for row, tree in zip(batch.rows, drafts, strict=True)
            if len(tree) and row.seq.request.stream.is_provisional
        ]

    def verified(self, commits: list[Commit]) -> list[Event]:
        """One event per sequence that got tokens or ended."""
        return [self._event(c) for c in commits if c.tokens or c.finish_reason]

    def _event(self, commit: Commit) -> Event:
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
        )
        if is_last:
            del self._told[seq.id]
        return event

    def _metrics(self, seq: Sequence, told: Told) -> RequestMetrics:
        return RequestMetrics(
            num_prompt_tokens=seq.num_prompt,
            num_cached_tokens=seq.num_prefix_hits,
            num_generated_tokens=seq.num_generated,
            num_steps=told.num_steps,
            num_drafts=told.num_drafts,
            num_draft_tokens=told.num_draft_tokens,
            num_accepted_tokens=told.num_accepted_tokens,
            accepted_histogram=tuple(told.histogram),
            drafter=seq.speculation.drafter,
            verifier=seq.speculation.verifier,
            exactness=self._exactness(seq.speculation.verifier),
            num_preemptions=seq.num_preemptions,
        )

    def _tail(self, seq: Sequence, tree: DraftTree) -> Tail:
        path, node = [], -1
        while children := tree.children(node):
            node = children[0]
            path.append(tree.tokens[node])
        text = self._told[seq.id].text
        return Tail(
            request_id=seq.request.id,
            index=seq.index,
            token_ids=tuple(path),
            text=text.peek(tuple(path)) if text else "",
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


def _logprobs(commit: Commit) -> tuple[TokenLogprob, ...]:
    return tuple(
        TokenLogprob(token_id=token, logprob=logprob, top=top)
        for token, (logprob, top) in zip(commit.tokens, commit.logprobs, strict=False)
    )
