"""What every drafter and every verifier must pass, built in or from a stranger.

Each check raises AssertionError with what broke; the numbers in the names of algorithms.md are
given where a check comes from there.
"""

from collections.abc import Callable
from itertools import product

from outrider.draft.base import Drafter
from outrider.request import Request, SamplingParams, SpeculationParams
from outrider.testing.enumerate import (
    ToyModel,
    bias,
    draw_chain,
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
        drafts = []
        if verifier.accepts.point_mass:
            drafts.append(pick_chain(q, depth))
        if verifier.accepts.drawn and not verifier.greedy_only:
            drafts.append(draw_chain(q, depth))
        if verifier.accepts.branches:
            drafts.append(pick_tree(q, (2, 1)))
        for draft in drafts:
            call = speculate(verifier, p, draft)
            if verifier.exactness is Exactness.EXACT:
                off = bias(call, p, depth + 2)
                assert off < TOLERANCE, f"{verifier.name}: law off by {off:.2e} (V={size})"


def check_drafter(make: Callable[[], Drafter], *, num_requests: int = 4) -> None:
    """Output with the drafter equals output without it; its lifecycle is kept (section 1.7)."""
    drafter = make()
    for temperature, width in product((0.0, 0.9), (1, min(2, drafter.max_width))):
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
