"""What every drafter and every verifier must pass, built in or from a stranger.

Each check raises AssertionError with what broke; the numbers in the names of algorithms.md are
given where a check comes from there.
"""

from collections.abc import Callable
from itertools import product

from outrider.draft.base import Drafter
from outrider.request import Request, SamplingParams, SpeculationParams
from outrider.step import Kind
from outrider.testing.enumerate import (
    Draft,
    Model,
    ToyModel,
    bias,
    draw_chain,
    draw_chains,
    draw_siblings,
    expected_accepted,
    pick_chain,
    pick_tree,
    speculate,
)
from outrider.testing.tiny import run, tiny_engine
from outrider.verify.base import Exactness, Verifier

TOLERANCE = 1e-10
SIZES = ((2, 2), (3, 2), (2, 3), (3, 3))


def check_verifier(verifier: Verifier) -> None:
    """Enumerates the exact output law for every kind of proposal the rule accepts (section 2).

    A lossy rule is only checked for well-formed verdicts.
    """
    for (size, depth), zeros, seed in product(SIZES, (0.0, 0.4), range(3)):
        p, q = ToyModel(f"p{seed}", size, zeros), ToyModel(f"q{seed}", size, zeros)
        for kind in sorted(verifier.accepts):
            call = speculate(verifier, p, propose(kind, q, depth))
            if verifier.exactness is Exactness.EXACT:
                off = bias(call, p, depth + 2)
                told = f"{verifier.name}: law off by {off:.2e} on a {kind.value} (V={size})"
                assert off < TOLERANCE, told
            else:
                expected_accepted(call)


def propose(kind: Kind, q: Model, depth: int) -> Draft:
    """A small proposal of that kind from a toy drafter, for enumeration."""
    return {
        Kind.PICKED_CHAIN: pick_chain(q, depth),
        Kind.PICKED_TREE: pick_tree(q, (2, 1)),
        Kind.DRAWN_CHAIN: draw_chain(q, depth),
        Kind.DRAWN_CHAINS: draw_chains(q, 2, min(depth, 2)),
        Kind.DRAWN_TREE: draw_siblings(q, (2, 1)),
        Kind.MIXED_TREE: draw_siblings(q, (2, 1), num_picked=1),
    }[kind]


def check_drafter(make: Callable[[], Drafter], *, num_requests: int = 4) -> None:
    """Output with the drafter equals output without it; its lifecycle is kept (section 1.7)."""
    drafter = make()
    widths = sorted({drafter.min_width, drafter.default_width, min(2, drafter.max_width)})
    for temperature, width in product((0.0, 0.9), widths):
        sampling = SamplingParams(max_tokens=24, temperature=temperature, ignore_eos=True)
        plain = run(
            tiny_engine(), _requests(sampling, SpeculationParams(method="off"), num_requests)
        )
        asked = SpeculationParams(method=drafter.name, num_draft_tokens=3, width=width)
        for blocks in (256, 24):
            engine = tiny_engine(
                drafters=[make()], draft_seed=None, num_blocks=blocks, options=_tight(blocks)
            )
            seen = run(engine, _requests(sampling, asked, num_requests))
            assert seen == plain, f"{drafter.name} changed the output (T={temperature}, {width=})"
            held = engine.manager.num_used
            assert held == 0, f"{held} KV blocks are still held"


def _requests(
    sampling: SamplingParams, speculation: SpeculationParams, count: int
) -> list[Request]:
    return [
        Request(
            id=f"r{i}",
            prompt_token_ids=tuple((7 * i + 5 * j) % 40 + 10 for j in range(6 + i)),
            sampling=sampling,
            speculation=speculation,
            seed=100 + i,
        )
        for i in range(count)
    ]


def _tight(num_blocks: int) -> dict[str, int]:
    """With few blocks sequences preempt one another; one longest sequence always fits."""
    return {"max_model_len": min(256, num_blocks * 4)}
