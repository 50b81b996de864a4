"""LogitSpec: the logits that gave the last token also rank the one after it; n-grams go on.

Liu et al. 2025 (arXiv:2507.01449). The likeliest tokens of the row that the
root came from are tried as its children, and each is continued with what followed it earlier in
the text, as the root itself is.

Shape legend: V vocabulary, N rows of the pass, R sequences learnt for.
"""

from collections.abc import Iterator, Mapping, Sequence as Items
from dataclasses import dataclass, field

from outrider.draft.base import Snapshot, Surroundings, Warmth
from outrider.draft.ngram import TOKEN_BITS, NgramIndex, continuation, merge
from outrider.request import MAX_WIDTH, Option
from outrider.sequence import Sequence
from outrider.step import EMPTY_TREE, Commit, DraftTree, Plan, Row, RowPlan, TargetOutput

LONGEST_NGRAM = 3
# Rows cost little on a GPU; on a CPU every row is paid for.
GPU_NODES = 64
CPU_NODES = 8

# Tokens of a candidate's chain, itself included, up to a rank; the likeliest token has rank 0.
LENGTHS = ((8, 4), (32, 3))


class NgramPool(NgramIndex):
    """Where each n-gram of a growing text last stood, also for endings that are only supposed."""

    def after(self, tokens: Items[int], candidate: int) -> int | None:
        """Position after the last place of the longest ending of [*tokens, candidate].

        `tokens` is the text as far as it is indexed.
        """
        found, ngram = None, 1 << TOKEN_BITS | candidate
        for length in range(1, self.longest + 1):
            found = self._after.get(ngram, found)
            if length > len(tokens):
                break
            ngram = ngram << TOKEN_BITS | tokens[-length]
        return found


@dataclass(eq=False, slots=True)
class RetrievalState:
    """What is kept for one sequence.

    Attributes:
        ranked: the likeliest tokens, best first, of the row that the last token came from.
        num_tokens: length of the log for which `ranked` holds.
    """

    pool: NgramPool = field(default_factory=lambda: NgramPool(1, LONGEST_NGRAM))
    ranked: list[int] = field(default_factory=list)
    num_tokens: int = 0


class RetrievalDrafter:
    """Drafts the root's n-gram continuation, and beside it candidates from the last logits.

    Before a sequence has had logits, and after it was preempted, only the continuation is there.
    The width counts all branches at the root; 1 is a chain: the root's, or else the first
    candidate's.

    Args:
        num_nodes: nodes of a tree, and most branches, where the request does not say.
    """

    name = "retrieval"
    needs: tuple[str, ...] = ("logits",)
    warmth = Warmth.R0
    default_draft_tokens = 5
    default_width = CPU_NODES
    min_width = 1
    max_width = MAX_WIDTH
    default_num_nodes: int | None = CPU_NODES
    sample_methods: tuple[str, ...] = ("greedy",)
    options: Mapping[str, Option] = {}

    def __init__(self, num_nodes: int = CPU_NODES) -> None:
        self.default_num_nodes = num_nodes
        self.default_width = min(num_nodes, self.max_width)

    @classmethod
    def build(cls, surroundings: Surroundings) -> "RetrievalDrafter":
        device = surroundings.target.runner.network.spec.device
        return cls(CPU_NODES if device.type == "cpu" else GPU_NODES)

    def open(self, seq: Sequence) -> None:
        seq.drafter_state[self.name] = RetrievalState()

    def draft(self, rows: Items[Row], plan: Plan) -> list[DraftTree]:
        return [self._tree(row.seq, part) for row, part in zip(rows, plan, strict=True)]

    def _tree(self, seq: Sequence, plan: RowPlan) -> DraftTree:
        state: RetrievalState = seq.drafter_state[self.name]
        state.pool.extend(seq.tokens)
        if plan.depth < 1:
            return EMPTY_TREE
        chains: list[list[int]] = []
        branches: set[int] = set()
        num_nodes = 0  # at least: chains of one branch may share nodes
        for chain in _chains(state, seq.tokens, plan.depth):
            if chain[0] not in branches:
                if len(branches) == plan.width:
                    break
                branches.add(chain[0])
                num_nodes += len(chain)
                chains.append(chain)
            elif plan.width > 1:
                chains.append(chain)
            if num_nodes >= plan.num_nodes:
                break
        return merge(chains, plan.num_nodes, self.name)

    def observe(self, commits: Items[Commit], output: TargetOutput) -> None:
        """Ranks the candidates for the next draft, for all sequences in one go."""
        learnt = [
            (commit.seq, _row_of_last_token(commit, first))
            for commit, first in zip(commits, output.first, strict=True)
            if first >= 0 and _goes_on(commit) and self.name in commit.seq.drafter_state
        ]
        if not learnt:
            return
        count = 1 + max(_most_candidates(seq) for seq, _ in learnt)
        logits_RV = output.logits_NV[[row for _, row in learnt]]
        ranked = logits_RV.topk(min(count, logits_RV.shape[1]), dim=-1).indices.tolist()
        for (seq, _), tokens in zip(learnt, ranked, strict=True):
            state: RetrievalState = seq.drafter_state[self.name]
            state.ranked, state.num_tokens = tokens, len(seq.tokens)

    def close(self, seq: Sequence) -> None:
        seq.drafter_state.pop(self.name, None)

    def snapshot(self, seq: Sequence) -> Snapshot | None:
        return None

    def restore(self, seq: Sequence, snapshot: Snapshot) -> int:
        self.open(seq)
        return len(seq.tokens)


def chain_length(rank: int) -> int:
    """Tokens of the chain that begins with the candidate of this rank."""
    return next((length for highest, length in LENGTHS if rank <= highest), 1)


def _chains(state: RetrievalState, tokens: list[int], depth: int) -> Iterator[list[int]]:
    """Chains below the root in order of trust: its own continuation, then candidates by rank."""
    if state.pool.matches:
        yield continuation(tokens, state.pool.matches[0], depth)
    if state.num_tokens != len(tokens):
        return
    for rank, candidate in enumerate(state.ranked):
        if candidate != tokens[-1]:
            yield _candidate_chain(state.pool, tokens, candidate, min(chain_length(rank), depth))


def _candidate_chain(pool: NgramPool, tokens: list[int], candidate: int, length: int) -> list[int]:
    """The candidate, and what followed the longest ending of the text and it."""
    start = pool.after(tokens, candidate) if length > 1 else None
    if start is None:
        return [candidate]
    followed = tokens[start : start + length - 1]
    if len(followed) < length - 1:
        followed = continuation([*followed, candidate], 0, length - 1)  # it stands behind the text
    return [candidate, *followed]


def _goes_on(commit: Commit) -> bool:
    return bool(commit.tokens) and commit.finish_reason is None


def _row_of_last_token(commit: Commit, first: int) -> int:
    """The row of logits that the last committed token was chosen from: its parent's."""
    depth = len(commit.tokens) - 1
    return first + 1 + commit.accepted[depth - 1] if depth else first


def _most_candidates(seq: Sequence) -> int:
    """Branches that a draft of this sequence can have."""
    return min(seq.speculation.width, seq.speculation.num_nodes)
