"""How much of a draft could be used at all: limits that hold for every policy."""

from outrider.request import Speculation
from outrider.sequence import Sequence


def most_nodes(spec: Speculation, depth: int) -> int:
    """Nodes of the largest tree that a request wants at a depth of at most its K."""
    if depth == spec.num_draft_tokens or not depth:
        return spec.num_nodes if depth else 0
    return min(depth * spec.width, spec.num_nodes)


def usable(seq: Sequence, max_model_len: int | None) -> int:
    """Most draft tokens that can be committed beside the bonus token."""
    max_len = seq.max_len
    if max_model_len is not None and max_model_len < max_len:
        max_len = max_model_len
    return max(max_len - len(seq.tokens) - 1, 0)
