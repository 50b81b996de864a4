"""Toy problems that the tests of verifiers share: laws over a few tokens, and drafts gone wrong."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from outrider.request import Request, SamplingParams, SpeculationParams
from outrider.sampling.rng import Stream
from outrider.step import DraftTree
from outrider.testing import ToyModel, bias, expected_accepted, speculate
from outrider.testing.enumerate import Context, Draft, Model
from outrider.verify.base import Verifier

EXACT = 1e-12
BIASED = 1e-3


def toys(size: int, zeros: float = 0.0, count: int = 8) -> list[tuple[Model, Model]]:
    """Random (p, q) pairs; `zeros` is the share of tokens that each forbids."""
    return [(ToyModel(f"p{i}", size, zeros), ToyModel(f"q{i}", size, zeros)) for i in range(count)]


def law(*weights: float, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(weights, dtype=dtype)


def accepted_on_average(verifier: Verifier, p: Model, draft: Draft) -> float:
    return expected_accepted(speculate(verifier, p, draft))


def law_is_right(verifier: Verifier, p: Model, drafts: Sequence[Draft], length: int) -> bool:
    return all(bias(speculate(verifier, p, draft), p, length) < EXACT for draft in drafts)


def most_apart(one: dict[object, float], other: dict[object, float]) -> float:
    return max(abs(one.get(key, 0.0) - other.get(key, 0.0)) for key in one | other)


def worst(verifier: Verifier, make: Callable[[Model], Draft]) -> float:
    """Largest bias over the toys of a draft, or of a verifier, with a mistake in it."""
    return max(bias(speculate(verifier, p, make(q)), p, 4) for p, q in toys(3))


def recorded(q: Model, draft: Draft, record: Callable[[Tensor, list[int]], Tensor]) -> Draft:
    """The same tokens; as the law of each is recorded `record(q, tokens of siblings before)`."""

    def mutant(context: Context, stream: Stream) -> DraftTree:
        tree = draft(context, stream)
        laws = []
        for node, parent in enumerate(tree.parents):
            before = [tree.tokens[i] for i in tree.children(parent) if i < node]
            laws.append(record(q(context + tree.path_tokens(parent)), before))
        return DraftTree(tokens=tree.tokens, parents=tree.parents, laws=tuple(laws))

    return mutant


def zeroed(q_V: Tensor, tokens: list[int]) -> Tensor:
    """A mistake: the law without these tokens, not renormalised."""
    rest_V = q_V.clone()
    rest_V[tokens] = 0.0
    return rest_V


def without(q_V: Tensor, tokens: list[int]) -> Tensor:
    """The law of a draw that must not be one of these tokens."""
    rest_V = zeroed(q_V, tokens)
    return rest_V / rest_V.sum()


def request(sampling: SamplingParams, speculation: SpeculationParams) -> Request:
    return Request(
        id="r", prompt_token_ids=(40, 50, 60), sampling=sampling, speculation=speculation, seed=1
    )
