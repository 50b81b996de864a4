"""GbvVerifier: block verification over several independently drawn chains.

Shape legend: V vocabulary, K draft length, M chains.
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from outrider.request import Option
from outrider.sampling.laws import Laws
from outrider.sampling.rng import Stream
from outrider.step import DraftTree, Verdict
from outrider.verify.base import Exactness
from outrider.verify.block import correction, longest_block
from outrider.verify.spectr import INDEPENDENT, chains_of, dense

RULES = ("selection", "recursive")


class GbvVerifier:
    """Multi-draft block verification of M i.i.d. chains.

    "selection" (Thomas and Pal 2026): the largest chain in a fixed order is
    verified as a block against the law of the largest of M, at O(V log V) per depth.
    "recursive": chain after chain, in draw order, has what it adds to the
    accepted path verified as a block against what is left of the target there; O(V).

    SpecTr-GBV (Lin et al. 2026) is another rule, and is not what this is: its acceptance
    probability and residual could not be sourced in a form that holds, so they are not here.

    Invariant: the output law is the target's, if the chains are drawn independently from one q and
    end by rules that look at the tokens before the end alone. On one chain both rules are `block`.

    Raises:
        RequestError: an unknown rule.
    """

    name = "gbv"
    exactness = Exactness.EXACT
    keyed_by: Literal["position", "root"] = "root"
    accepts = INDEPENDENT
    greedy_only = False
    options: Mapping[str, Option] = {
        "rule": Option("selection", "how the chains share the target's law", choices=RULES)
    }

    def __init__(self, *, rule: str = "selection") -> None:
        self.options["rule"].check("rule", rule)
        self.rule = rule

    def verify(self, tree: DraftTree, p: Laws, rng: Stream) -> Verdict:
        chains = chains_of(tree)
        if not any(chains):
            return Verdict((), p.draw(-1, rng))
        if self.rule == "recursive":
            return _recursive(chains, tree, p, rng)
        return _selection(chains, tree, p, rng)


class Picked(NamedTuple):
    """The largest of M chains, down to the first token that the target forbids.

    Attributes:
        nodes: of the chain. p_rows: [V] before each, float64.
        laws: [V] of each token, given those before it, among the largest of M chains.
    """

    nodes: tuple[int, ...]
    p_rows: list[Tensor]
    laws: list[Tensor]


def pick_chain(chains: tuple[tuple[int, ...], ...], tree: DraftTree, p: Laws) -> Picked:
    """The largest chain by p/q token after token, ties by token id.

    Chains that agree so far tie so far, so the largest is found from level to level, with p after
    its own prefixes alone. `below` is the q-mass of the chains that come before all with the prefix
    in hand, in units in which it and theirs, `mass`, sum to one.
    """
    count, below, mass = len(chains), 0.0, 1.0
    picked = Picked((), [], [])
    last, ratio = -1, 1.0
    while ratio > 0.0 and (chains := tuple(c for c in chains if len(c) > len(picked.nodes))):
        children = [chain[len(picked.nodes)] for chain in chains]
        p_V = p.law(last)
        q_V = dense(tree.law(children[0]), p_V, tree.tokens[children[0]])
        ratios_V = torch.where(q_V > 0, p_V / q_V, torch.inf)
        ratio, token, last = max((float(ratios_V[t := tree.tokens[c]]), t, c) for c in children)
        law_V, low = largest_law(q_V, ratios_V, token, count, below, mass)
        mass *= float(q_V[token])
        below, mass = low / (low + mass), mass / (low + mass)
        chains = tuple(c for c in chains if c[len(picked.nodes)] == last)
        picked = Picked((*picked.nodes, last), [*picked.p_rows, p_V], [*picked.laws, law_V])
    return picked


def largest_law(
    q_V: Tensor, ratios_V: Tensor, token: int, count: int, below: float, mass: float
) -> tuple[Tensor, float]:
    """The law [V] of the next token of the largest of M chains, and `below` for this token.

    A token covers the masses from low to high, and is the largest's with (high^M - low^M) shared
    out; divided by high - low that is a sum without cancellation.
    """
    order_V = ratios_V.sort(stable=True).indices
    high_V = below + mass * q_V[order_V].cumsum(dim=0)
    low_V = torch.cat([high_V.new_tensor([below]), high_V[:-1]])
    share_V = sum(high_V**i * low_V ** (count - 1 - i) for i in range(count))
    law_V = torch.empty_like(q_V)
    law_V[order_V] = q_V[order_V] * share_V
    return law_V / law_V.sum(), float(low_V[order_V == token])


def _selection(
    chains: tuple[tuple[int, ...], ...], tree: DraftTree, p: Laws, rng: Stream
) -> Verdict:
    nodes, p_rows, laws = pick_chain(chains, tree, p)
    tokens = [tree.tokens[node] for node in nodes]
    n, weight = longest_block(rng, p_rows, laws, tokens)
    if n == len(nodes):
        return Verdict(nodes, p.draw(nodes[-1], rng))
    return Verdict(nodes[:n], rng.pick(correction(weight, p_rows[n], laws[n], tokens[n])))


def _recursive(
    chains: tuple[tuple[int, ...], ...], tree: DraftTree, p: Laws, rng: Stream
) -> Verdict:
    accepted: tuple[int, ...] = ()
    left_V = p.law(-1)
    for chain in chains:
        start = len(accepted)
        if chain[:start] != accepted or len(chain) == start:
            continue  # it left the accepted path, and is of no use any more
        tokens = [tree.tokens[node] for node in chain]
        q_rows = [tree.law(node) for node in chain]
        p_rows = _rows(chain, tree, p, accepted, left_V)
        n, weight = longest_block(rng, p_rows, q_rows, tokens, start)
        if n == len(chain):
            return Verdict(chain, p.draw(chain[-1], rng))
        accepted, left_V = chain[:n], correction(weight, p_rows[n], q_rows[n], tokens[n])
    return Verdict(accepted, rng.pick(left_V))


def _rows(
    chain: tuple[int, ...], tree: DraftTree, p: Laws, accepted: tuple[int, ...], left_V: Tensor
) -> list[Tensor]:
    """p before each token down to the first forbidden one; after the accepted path what is left."""
    rows: list[Tensor] = []
    for depth, node in enumerate(chain):
        rows.append(left_V if depth == len(accepted) else p.law(chain[depth - 1] if depth else -1))
        if depth >= len(accepted) and rows[-1][tree.tokens[node]] == 0.0:
            break
    return rows
