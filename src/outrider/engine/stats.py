"""EngineStats: what the engine has done since its start."""

from dataclasses import dataclass

from outrider.step import Batch, Commit, Row


@dataclass
class EngineStats:
    """Counters; tokens, steps and requests, never times (the engine has no clock).

    Attributes:
        num_steps: target passes; num_rows: rows (tokens and draft nodes) in them.
        num_prompt_tokens: tokens run as prompt or recomputed, prefix hits left out.
        num_generated_tokens: emitted.
        num_drafts, num_draft_tokens, num_accepted_tokens: trees, their nodes, accepted nodes.
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
            self.num_finished += commit.finish_reason is not None


def _is_decoded(row: Row, commit: Commit) -> bool:
    """Whether the row's last token was generated, and run for the first time."""
    return 0 < len(commit.tokens) < row.seq.num_generated
