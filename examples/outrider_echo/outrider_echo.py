"""A drafter that repeats the last tokens, and a rule that accepts a few drafts at most."""

from collections.abc import Mapping

from outrider.draft.base import Warmth
from outrider.request import Option
from outrider.step import DraftTree, Verdict
from outrider.verify.base import ALL_KINDS, Exactness


class EchoDrafter:
    """Goes on as the text did `period` tokens before: rulers, tables, stammering."""

    name, needs, warmth = "echo", (), Warmth.R0
    default_draft_tokens, default_num_nodes = 4, None
    default_width = min_width = max_width = 1
    sample_methods = ("greedy",)
    options: Mapping[str, Option] = {"period": Option(1, "tokens that repeat", low=1, high=64)}

    def draft(self, rows, plan):
        return [self._chain(row.seq, part) for row, part in zip(rows, plan, strict=True)]

    def _chain(self, seq, part):
        last = seq.tokens[-seq.speculation.options["period"] :]
        depth = min(part.depth, part.num_nodes)
        return DraftTree.chain([last[i % len(last)] for i in range(depth)], self.name)

    def open(self, seq): ...  # the token log is all it reads: nothing to keep per sequence

    def observe(self, commits, output): ...

    def close(self, seq): ...

    def snapshot(self, seq): ...

    def restore(self, seq, snapshot):
        return len(seq.tokens)


class CautiousVerifier:
    """Exact: a token of the target's own law per node, drafts stand while they guess it."""

    name, exactness, keyed_by = "cautious", Exactness.EXACT, "position"
    accepts, greedy_only = ALL_KINDS, False
    options: Mapping[str, Option] = {"most": Option(2, "drafts accepted per step", low=0, high=64)}

    def __init__(self, most=2):
        self.most = most

    def verify(self, tree, p, rng):
        accepted, node = [], -1
        while True:
            token = p.draw(node, rng)
            hits = [child for child in tree.children(node) if tree.tokens[child] == token]
            if not hits or len(accepted) == self.most:
                return Verdict(tuple(accepted), token)
            accepted.append(node := hits[0])
