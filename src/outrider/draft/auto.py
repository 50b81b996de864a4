"""AutoDrafter: several drafters of which the policy chooses one, per request and step."""

from collections.abc import Iterable, Mapping, Sequence as Items

from outrider.draft.base import EndsAtDepth
from outrider.draft.cascade import LOOKUPS, MODELS, CascadeDrafter
from outrider.request import Candidate, Option, Options
from outrider.step import DraftTree, Plan, Row


class AutoDrafter(CascadeDrafter):
    """Drafters as arms of a bandit: which of them drafts is for the policy to say.

    Chains only. The adaptive policy takes the one whose drafts are worth most to the request at
    the present price of time, and tries the others now and then. A policy that does not choose gets
    the first. The options of all parts are options here.
    """

    name = "auto"
    default_draft_tokens = 4
    max_width = 1
    own_options: Mapping[str, Option] = {
        "parts": Option(
            "", "drafters to choose from, comma-separated; empty: what suits the engine"
        )
    }

    @staticmethod
    def usual_parts(names: Iterable[str]) -> tuple[str, ...]:
        """A draft model and a lookup; lookups where there is no draft model."""
        there = tuple(names)
        usual = [name for name in (*MODELS, *LOOKUPS) if name in there]
        return tuple(usual) or there[:1]

    def candidates(
        self, options: Options, num_draft_tokens: int | None, factor: int
    ) -> tuple[Candidate, ...]:
        """Whom the policy may choose, and how deep each may draft.

        Args:
            num_draft_tokens: K where the request says; else each has its own, times `factor`. A
                part that ends before that goes as far as it can.
        """
        found = []
        for name in self.parts(options):
            drafter = self._drafters[name]
            k = num_draft_tokens or factor * drafter.default_draft_tokens
            if isinstance(drafter, EndsAtDepth):
                k = min(k, drafter.max_draft_tokens)
            found.append(Candidate(name, k, 1, k))
        return tuple(found)

    def draft(self, rows: Items[Row], plan: Plan) -> list[DraftTree]:
        """By the first part: whoever planned did not choose."""
        groups: dict[str, list[int]] = {}
        for index, row in enumerate(rows):
            groups.setdefault(row.seq.speculation.parts[0], []).append(index)
        trees: dict[int, DraftTree] = {}
        for name, at in groups.items():
            drafted = self._ask(name, [rows[i] for i in at], [plan[i] for i in at])
            trees.update(zip(at, drafted, strict=True))
        return [trees[index] for index in range(len(rows))]
