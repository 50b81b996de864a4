"""MTPDrafter: the target's own multi-token-prediction modules draft, step after step in turn.

DeepSeek-V3 (2024, section 2.2); algorithms 4.4.
"""

from outrider.draft.base import Surroundings
from outrider.draft.head_drafter import HeadDrafter, find_head, find_target, with_pool
from outrider.models.heads.mtp_network import MTPNetwork, MTPRunner


class MTPDrafter(HeadDrafter):
    """Chains and trees from modules that ship with the target, or were trained for it.

    Modules are trained for as many tokens ahead as there are of them. Where a request does not say
    K, it is that many and one more: a module alone, run once more, is still of use.
    """

    name = "mtp"

    @classmethod
    def build(cls, surroundings: Surroundings) -> "MTPDrafter":
        """ConfigError without modules, or where they cannot be run beside this target."""
        head = find_head(surroundings, cls.name)
        target = find_target(surroundings, cls.name)
        network = MTPNetwork(head, target, surroundings.target.runner.network.ops)
        runner, manager = with_pool(surroundings, network)
        runner = MTPRunner(network, runner.pool)
        drafter = cls(runner, manager, surroundings.target.manager)
        assert head.spec.mtp is not None
        drafter.default_draft_tokens = head.spec.mtp.num_modules + 1
        return drafter
