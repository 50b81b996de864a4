"""EAGLE heads draft: 1 and 2 in the target's feature space, 3 over fused layers, P-EAGLE at once.

Li et al. 2024 ("EAGLE"; "EAGLE-2: faster inference with dynamic draft trees"), Li et al. 2025
("EAGLE-3"); algorithms 4.4 and 4.5.
"""

from outrider.cache.table import BlockManager
from outrider.draft.base import Surroundings
from outrider.draft.growth import Growth
from outrider.draft.head_course import HeadCourse, HeadMaskCourse
from outrider.draft.head_drafter import HeadDrafter, find_head, find_target, with_pool
from outrider.draft.row_state import RowState
from outrider.models.heads.eagle_network import EagleNetwork
from outrider.models.heads.network import HeadRunner
from outrider.sequence import Sequence


class EagleDrafter(HeadDrafter):
    """Runs whichever head of the family was loaded.

    A P-EAGLE head drafts all depths in one pass: rows of its mask stand behind the newest true row,
    and each gives the law at its depth, whatever is drafted before it.
    """

    name = "eagle"

    def __init__(
        self,
        runner: HeadRunner,
        manager: BlockManager,
        target_manager: BlockManager | None = None,
    ) -> None:
        super().__init__(runner, manager, target_manager)
        network = runner.network
        self._mask = None
        if isinstance(network, EagleNetwork) and network.mask_input_1D is not None:
            assert network.mask_token_id is not None
            self._mask = network.mask_token_id, network.mask_input_1D

    @classmethod
    def build(cls, surroundings: Surroundings) -> "EagleDrafter":
        """ConfigError without a head of the family, or a target that hands out its states."""
        head = find_head(surroundings, cls.name)
        network = EagleNetwork(head, find_target(surroundings, cls.name))
        return cls(*with_pool(surroundings, network), surroundings.target.manager)

    def course(self, seq: Sequence, state: RowState, growth: Growth, depth: int) -> HeadCourse:
        if self._mask is None:
            return super().course(seq, state, growth, depth)
        token, input_1D = self._mask
        return HeadMaskCourse(
            seq,
            state,
            growth,
            self.shaper(seq, state, growth),
            mask=token,
            mask_1D=input_1D,
            depth=depth,
            vocab_size=self.spec.vocab_size,
        )
