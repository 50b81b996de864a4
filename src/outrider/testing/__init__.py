"""What drafters and verifiers of others are tested with."""

from outrider.testing.checks import check_drafter
from outrider.testing.drafters import ScriptedDrafter, junk, junk_tree, oracle
from outrider.testing.enumerate import (
    Script,
    ToyLaws,
    ToyModel,
    bias,
    draw_chain,
    draw_chains,
    draw_siblings,
    draw_tree,
    exact_law,
    expected_accepted,
    pick_chain,
    pick_tree,
    speculate,
)
from outrider.testing.tiny import ByteTokenizer, events, run, tiny_decoder, tiny_engine
from outrider.testing.verdicts import check_verifier

__all__ = [
    "ByteTokenizer",
    "Script",
    "ScriptedDrafter",
    "ToyLaws",
    "ToyModel",
    "bias",
    "check_drafter",
    "check_verifier",
    "draw_chain",
    "draw_chains",
    "draw_siblings",
    "draw_tree",
    "events",
    "exact_law",
    "expected_accepted",
    "junk",
    "junk_tree",
    "oracle",
    "pick_chain",
    "pick_tree",
    "run",
    "speculate",
    "tiny_decoder",
    "tiny_engine",
]
