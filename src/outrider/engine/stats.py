"""EngineStats: what the engine has done since its start."""

from dataclasses import dataclass, field

from outrider.request import MAX_DRAFT_TOKENS
from outrider.step import Batch, Commit, DraftTree, Row


@dataclass
class EngineStats:
    """Counters; tokens, steps and requests, never times (the engine has no clock).

    Attributes:
        num_steps: target passes; num_rows: rows (tokens and draft nodes) in them.
        num_prompt_tokens: tokens run as prompt or recomputed, prefix hits left out.
        num_generated_tokens: emitted.
        num_drafts, num_draft_tokens, num_accepted_tokens: trees, their nodes, accepted nodes.
        depths: entry d counts the drafts that went d deep, one per sequence and step; 0 is none.
    """

    num_steps: int = 0
    num_rows: int = 0
    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0
    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_preemptions: int = 0
    num_finished: int = 0
    depths: list[int] = field(default_factory=lambda: [0] * (MAX_DRAFT_TOKENS + 1))

    def observe(self, batch: Batch, commits: list[Commit]) -> None:
        self.num_steps += 1
        self.num_preemptions += len(batch.preempted)
        for row, commit in zip(batch.rows, commits, strict=True):
            self.num_rows += row.num_tokens
            self.num_prompt_tokens += row.num_tokens - _is_decoded(row, commit)
            self.num_generated_tokens += len(commit.tokens)
            if commit.num_drafted:
                self.num_rows += commit.num_drafted
                self.num_drafts += 1
                self.num_draft_tokens += commit.num_drafted
                self.num_accepted_tokens += commit.num_accepted
                self.depths[min(_depth(commit.tree), MAX_DRAFT_TOKENS)] += 1
            elif commit.tokens:
                self.depths[0] += 1
            self.num_finished += commit.finish_reason is not None


def _depth(tree: DraftTree) -> int:
    """Length of the longest path."""
    if tree.is_chain:
        return len(tree.tokens)
    depths: list[int] = []
    for parent in tree.parents:
        depths.append(1 if parent < 0 else depths[parent] + 1)
    return max(depths, default=0)


def _is_decoded(row: Row, commit: Commit) -> bool:
    """Whether the row's last token was generated, and run for the first time."""
    return 0 < len(commit.tokens) < row.seq.num_generated
