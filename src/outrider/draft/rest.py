"""REST: a draft is what most often followed the text's ending in a corpus.

He et al. 2023 (arXiv:2311.08252). `votes` finds the tree: in C++ where that can be compiled, else
in plain Python.
"""

from collections.abc import Mapping, Sequence as Items

from outrider.draft.base import Snapshot, Surroundings, Warmth
from outrider.draft.datastore import LONGEST, Datastore
from outrider.draft.native.datastore import NativeVotes
from outrider.draft.native.library import datastore_library
from outrider.draft.votes import Ask, PlainVotes, Votes
from outrider.errors import ConfigError
from outrider.request import Option
from outrider.sequence import Sequence
from outrider.step import EMPTY_TREE, Commit, DraftTree, Plan, Row, RowPlan, TargetOutput

BUILD = "`outrider index build CORPUS --model MODEL --output FOLDER`"
# Rows cost little on a GPU; on a CPU every row is paid for.
GPU_NODES = 64
CPU_NODES = 8


class RestDrafter:
    """Drafts from a datastore; needs no state of a sequence but its tokens.

    Args:
        num_nodes: nodes of a tree where the request does not say.
    """

    name = "rest"
    needs: tuple[str, ...] = ("datastore",)
    warmth = Warmth.R0
    default_draft_tokens = 10
    default_width = max_width = 16
    min_width = 1
    default_num_nodes: int | None = CPU_NODES
    sample_methods: tuple[str, ...] = ("greedy",)
    options: Mapping[str, Option] = {
        "min_match": Option(2, "shortest ending of the text that is looked up", 1, LONGEST),
        "max_occurrences": Option(5000, "most places in the corpus that vote", 1, 1_000_000),
    }

    def __init__(self, datastore: Datastore, num_nodes: int = CPU_NODES) -> None:
        self.datastore = datastore
        self.votes = new_votes(datastore)
        self.default_num_nodes = num_nodes

    @classmethod
    def build(cls, surroundings: Surroundings) -> "RestDrafter":
        """ConfigError without a datastore of the target's vocabulary."""
        folder = surroundings.datastore
        if folder is None:
            raise ConfigError(
                f"drafter 'rest' needs a datastore: make one with {BUILD} and give datastore=FOLDER"
            )
        datastore = Datastore.load(folder)
        _check_vocabulary(datastore, folder, surroundings)
        device = surroundings.target.runner.network.spec.device
        return cls(datastore, CPU_NODES if device.type == "cpu" else GPU_NODES)

    def open(self, seq: Sequence) -> None:
        """Nothing to prepare: the token log is the question, the corpus the answer."""

    def draft(self, rows: Items[Row], plan: Plan) -> list[DraftTree]:
        return [self._tree(row.seq, part) for row, part in zip(rows, plan, strict=True)]

    def _tree(self, seq: Sequence, plan: RowPlan) -> DraftTree:
        options = seq.speculation.options
        shortest, most = int(options["min_match"]), int(options["max_occurrences"])
        ask = Ask(plan.depth, plan.width, plan.num_nodes, shortest, most)
        tokens, parents = self.votes.draft(seq.tokens, ask)
        if not tokens:
            return EMPTY_TREE
        return DraftTree(tokens=tokens, parents=parents, source=self.name)

    def observe(self, commits: Items[Commit], output: TargetOutput) -> None:
        """The corpus does not learn."""

    def close(self, seq: Sequence) -> None:
        """Nothing is held."""

    def snapshot(self, seq: Sequence) -> Snapshot | None:
        return None

    def restore(self, seq: Sequence, snapshot: Snapshot) -> int:
        return len(seq.tokens)


def new_votes(datastore: Datastore) -> Votes:
    """In C++ where that can be compiled, else in Python."""
    compiled = datastore_library()
    return PlainVotes(datastore) if compiled is None else NativeVotes(compiled, datastore)


def _check_vocabulary(datastore: Datastore, folder: str, surroundings: Surroundings) -> None:
    """Token ids must mean the same in the corpus and in the target."""
    header, tokenizer = datastore.header, surroundings.target.tokenizer
    spec = surroundings.target.runner.network.spec
    if header.vocab_size > spec.vocab_size or (
        tokenizer is not None and tokenizer.fingerprint() != header.fingerprint
    ):
        raise ConfigError(
            f"datastore {folder!r} was made with another tokenizer than that of {spec.name!r}: "
            f"make one for it with {BUILD}"
        )
