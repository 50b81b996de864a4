"""What tests of draft models share: runners over pools, requests, KV to compare, exact laws."""

import torch

from outrider.cache.pool import KVPool
from outrider.cache.table import BlockManager
from outrider.draft.draft_model import ModelDrafter
from outrider.models.runner import Piece, Runner
from outrider.request import Request, SamplingParams, SpeculationParams
from outrider.step import EMPTY_TREE

OFF = SpeculationParams(method="off")
GREEDY = SamplingParams(max_tokens=24, ignore_eos=True)


def request(name="r", speculation=OFF, sampling=GREEDY, length=9, seed=5, **more):
    prompt = tuple((11 * seed + j * j) % 90 + 30 for j in range(length))
    return Request(
        id=name,
        prompt_token_ids=prompt,
        sampling=sampling,
        speculation=speculation,
        seed=seed,
        **more,
    )


def pooled(network, num_blocks=256, block_size=4):
    spec = network.spec
    pool = KVPool(spec.kv_shapes, num_blocks, block_size, spec.dtype, spec.device)
    return Runner(network, pool), BlockManager(num_blocks, block_size)


def drafter_of(engine) -> ModelDrafter:
    return engine.drafters["draft_model"]


def kv(runner, table, count):
    slots = torch.tensor(table.slots(0, count))
    return [part[slots] for layer in runner.pool.layers for part in layer]


def prefilled(runner, tokens):
    """KV of these tokens from one pass over nothing else."""
    fresh, manager = pooled(runner.network)
    table, _ = manager.open(tokens)
    manager.reserve(table, len(tokens))
    fresh.run([Piece(table, 0, tokens, EMPTY_TREE, False)])
    return kv(fresh, table, len(tokens))


def last_logits(network, tokens):
    fresh, manager = pooled(network)
    table, _ = manager.open(tokens)
    manager.reserve(table, len(tokens))
    return fresh.run([Piece(table, 0, list(tokens), EMPTY_TREE, True)]).logits_NV[0]


def exact_output_law(network, prompt, length, temperature):
    """P(first `length` tokens) by running the model over every prefix."""
    size, law = network.spec.vocab_size, {(): 1.0}
    for _ in range(length):
        longer = {}
        for path, weight in law.items():
            logits_V = last_logits(network, [*prompt, *path])
            p_V = (logits_V.double() / temperature).softmax(dim=0)
            longer.update({(*path, t): weight * float(p_V[t]) for t in range(size)})
        law = longer
    return law
