"""Committer: turns verdicts into tokens of the log, and makes KV and grammar follow it.

Shape legend: R rows of logits, V vocabulary.
"""

from typing import NamedTuple

import torch

from outrider.cache.pool import KVPool
from outrider.cache.table import BlockManager
from outrider.control.limits import usable
from outrider.errors import RequestError
from outrider.sequence import Sequence
from outrider.step import Batch, Commit, DraftTree, Row, TargetOutput, Verdict
from outrider.stream.streamer import Streamer


class Cut(NamedTuple):
    """How many of the verified tokens are kept, and why no more come after them."""

    num_tokens: int
    finish_reason: str | None = None
    stop_reason: str | int | None = None


class Committer:
    """The only one who writes to the token log, moves KV, or advances a grammar."""

    def __init__(
        self,
        manager: BlockManager,
        pool: KVPool,
        streamer: Streamer,
        eos_token_ids: tuple[int, ...],
        max_model_len: int,
    ) -> None:
        self.manager = manager
        self.pool = pool
        self.streamer = streamer
        self.eos_token_ids = eos_token_ids
        self.max_model_len = max_model_len

    def commit(
        self,
        batch: Batch,
        drafts: list[DraftTree],
        verdicts: list[Verdict | None],
        output: TargetOutput,
    ) -> list[Commit]:
        return [
            self._commit(row, tree, verdict, output, first)
            for row, tree, verdict, first in zip(
                batch.rows, drafts, verdicts, output.first, strict=True
            )
        ]

    def _commit(
        self, row: Row, tree: DraftTree, verdict: Verdict | None, output: TargetOutput, first: int
    ) -> Commit:
        seq = row.seq
        if verdict is None:
            seq.num_cached += row.num_tokens
            self.manager.commit(seq.table, seq.tokens, seq.num_cached)
            return Commit(seq=seq)
        if verdict.error:
            self._settle(seq, len(seq.tokens), ())
            return self._fail(seq, verdict.error)
        accepted = verdict.accepted
        path = (*[tree.tokens[node] for node in accepted], verdict.token)
        cut = self._cut(seq, path)
        tokens = path[: cut.num_tokens]
        logprobs = _logprobs(seq, output, first, accepted, tokens)
        num_before = len(seq.tokens)
        seq.tokens += tokens
        num_kept = min(len(accepted), len(tokens))
        self._settle(seq, num_before, accepted[:num_kept])
        if seq.grammar is not None and not cut.finish_reason:
            error = self._advance(seq, tokens)
            if error:
                return self._fail(seq, error, tokens)
        seq.finish_reason, seq.stop_reason = cut.finish_reason, cut.stop_reason
        num_drafted, num_accepted = len(tree.tokens), len(accepted)
        num_relaxed = len(set(verdict.relaxed).intersection(accepted[:num_kept]))
        reason = cut.finish_reason
        return Commit(
            seq, tree, tokens, num_drafted, num_accepted, num_kept, accepted, reason, logprobs,
            num_relaxed=num_relaxed,
        )  # fmt: skip

    def _cut(self, seq: Sequence, path: tuple[int, ...]) -> Cut:
        """The first of: end token, length, stop text."""
        cut = self._cut_at_token(seq, path)
        is_stop_token = cut.finish_reason == "stop"
        readable = path[: cut.num_tokens - is_stop_token]
        silent = seq.request.sampling.min_tokens - 1 - seq.num_generated
        if silent > 0:
            self.streamer.add(seq, readable[:silent], may_stop=False)
            readable = readable[silent:]
        stop = self.streamer.add(seq, readable)
        if stop is not None:
            return Cut(max(silent, 0) + stop.num_tokens, "stop", stop.text)
        return cut

    def _cut_at_token(self, seq: Sequence, path: tuple[int, ...]) -> Cut:
        """A grammar allows an end token only when it is complete: then nothing can follow."""
        sampling = seq.request.sampling
        stop_ids = sampling.stop_token_ids
        eos_ids = () if sampling.ignore_eos and seq.grammar is None else self.eos_token_ids
        room = usable(seq, self.max_model_len) + 1
        for count, token in enumerate(path[:room] if stop_ids or eos_ids else (), start=1):
            if token in stop_ids:
                return Cut(count, "stop", token)
            if token in eos_ids:
                return Cut(count, "stop")
        return Cut(room, "length") if room <= len(path) else Cut(len(path))

    def _settle(self, seq: Sequence, num_before: int, accepted: tuple[int, ...]) -> None:
        """KV of the accepted path goes to the slots of its positions; a chain is there already."""
        # The nodes of a path ascend: if the last is where it belongs, all are.
        if accepted and accepted[-1] != len(accepted) - 1:
            moved = [(node, depth) for depth, node in enumerate(accepted) if node != depth]
            slots = seq.table.slots(num_before, num_before + accepted[-1] + 1)
            self.pool.copy_slots([slots[s] for s, _ in moved], [slots[t] for _, t in moved])
        seq.num_cached = min(num_before + len(accepted), len(seq.tokens) - 1)
        self.manager.commit(seq.table, seq.tokens, seq.num_cached)

    def _advance(self, seq: Sequence, tokens: tuple[int, ...]) -> str:
        """The grammar moves once, here; what goes wrong in it ends this request alone."""
        try:
            seq.grammar.advance(tokens)
        except RequestError as error:
            return str(error)
        return ""

    def _fail(self, seq: Sequence, error: str, tokens: tuple[int, ...] = ()) -> Commit:
        seq.finish_reason = "error"
        return Commit(seq=seq, tokens=tokens, finish_reason="error", error=error)


def _logprobs(
    seq: Sequence,
    output: TargetOutput,
    first: int,
    accepted: tuple[int, ...],
    tokens: tuple[int, ...],
) -> tuple[tuple[float, dict[int, float]], ...]:
    """Of each token, from the verify row that it came from: raw logits, log-softmax, nats."""
    count = seq.request.sampling.logprobs
    if count is None:
        return ()
    rows = [first, *(first + 1 + node for node in accepted)]
    found = []
    for row, token in zip(rows, tokens, strict=False):
        log_V = torch.log_softmax(output.logits_NV[row].float(), dim=-1)
        top = torch.topk(log_V, count)
        pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        found.append((float(log_V[token]), dict(pairs)))
    return tuple(found)
