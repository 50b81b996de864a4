"""Early exit: the target's first layers draft over its own KV, and leave that KV as it must be."""

from types import SimpleNamespace

import pytest
import torch

from outrider.cache.pool import KVPool
from outrider.cache.table import BlockManager
from outrider.draft.base import ModelParts, Surroundings
from outrider.draft.early_exit import MAX_TAIL, EarlyExitDrafter, first_layers
from outrider.engine.config import EngineConfig
from outrider.engine.engine import Engine
from outrider.errors import ConfigError, RequestError
from outrider.models.config import DecoderConfig
from outrider.models.decoder import Decoder
from outrider.models.runner import Piece, Runner
from outrider.models.weights import tensor_shapes
from outrider.ops.choose import choose
from outrider.request import Request, SamplingParams, SpeculationParams
from outrider.step import EMPTY_TREE, DraftTree
from outrider.testing import check_drafter, run
from outrider.testing.tiny import TINY

OFF = SpeculationParams(method="off")
EXIT = SpeculationParams(method="early_exit")
LAYERS = 4
KERNELS = ["auto", "torch"]


def target(layers=LAYERS, later=1.0, seed=0, kernels="auto"):
    """A random target; `later` scales what all layers but the first add.

    One of fewer layers has the weights of the first of these.
    """
    config = DecoderConfig.from_dict({**TINY, "num_hidden_layers": layers})
    whole = DecoderConfig.from_dict({**TINY, "num_hidden_layers": LAYERS})
    generator = torch.Generator().manual_seed(seed)
    weights = {
        name: torch.ones(shape)
        if len(shape) == 1
        else torch.randn(shape, generator=generator) * 0.25
        for name, shape in tensor_shapes(whole).items()
    }
    tensors = {name: weights[name] for name in tensor_shapes(config) if name != "lm_head.weight"}
    for name in tensors:
        is_sum = name.endswith(("o_proj.weight", "down_proj.weight"))
        if is_sum and ".layers.0." not in name:
            tensors[name] = tensors[name] * later
    return Decoder(config, tensors, choose(kernels), name="target", eos_token_ids=(3,))


def with_exit(decoder, num_layers=0, num_blocks=256, **options):
    """An engine whose drafter is made of its own target."""
    spec = decoder.spec
    pool = KVPool(spec.kv_shapes, num_blocks, 4, spec.dtype, spec.device)
    config = EngineConfig(block_size=4, check_integrity=True, **{"max_num_seqs": 16, **options})
    return Engine(
        Runner(decoder, pool),
        BlockManager(num_blocks, 4),
        config,
        drafters=[EarlyExitDrafter(decoder, pool, num_layers)],
    )


def request(name="r", speculation=EXIT, seed=5, length=9, **sampling):
    prompt = tuple((11 * seed + j * j) % 90 + 30 for j in range(length))
    settings = SamplingParams(**{"max_tokens": 30, "ignore_eos": True, **sampling})
    return Request(
        id=name, prompt_token_ids=prompt, sampling=settings, speculation=speculation, seed=seed
    )


def kv(pool, table, count):
    slots = torch.tensor(table.slots(0, count))
    return [part[slots] for layer in pool.layers for part in layer]


def prefilled(decoder, tokens):
    """KV of these tokens from one pass over nothing else."""
    spec = decoder.spec
    runner = Runner(decoder, KVPool(spec.kv_shapes, 256, 4, spec.dtype, spec.device))
    manager = BlockManager(256, 4)
    table, _ = manager.open(tokens)
    manager.reserve(table, len(tokens))
    runner.run([Piece(table, 0, tokens, EMPTY_TREE, False)])
    return kv(runner.pool, table, len(tokens))


SETTINGS = {
    "greedy": {},
    "sampled": {"temperature": 0.9},
    "shaped": {"temperature": 1.1, "top_p": 0.9, "repetition_penalty": 1.2, "min_tokens": 5},
    "greedy, penalised": {"frequency_penalty": 2.0, "repetition_penalty": 1.5},
}


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("sampling", SETTINGS.values(), ids=SETTINGS)
def test_skipping_nothing_is_accepted_whole_on_every_call(sampling, kernels):
    engine = with_exit(target(kernels=kernels), LAYERS)
    engine.add(request(**sampling))
    commits = []
    seen = engine.stats
    while engine.has_work():
        before = seen.num_draft_tokens, seen.num_accepted_tokens
        engine.step()
        commits.append(
            (seen.num_draft_tokens - before[0], seen.num_accepted_tokens - before[1])
        )  # fmt: skip
    assert commits == [(6, 6)] * 4 + [(1, 1)], "4 * 7 + 2 tokens"


def test_skipping_nothing_with_noise_of_its_own_is_accepted_by_rejection():
    engine = with_exit(target(), LAYERS)
    asked = SpeculationParams(method="early_exit", verifier="rejection")
    run(engine, [request(speculation=asked, temperature=0.9)])
    assert engine.stats.num_accepted_tokens == engine.stats.num_draft_tokens == 25


@pytest.mark.parametrize("kernels", KERNELS)
def test_a_truncated_decoder_is_the_decoder_of_its_first_layers(kernels):
    """Bit for bit, KV too; and the whole one beside it is not disturbed."""
    whole, small = target(3, kernels=kernels), target(1, kernels=kernels)
    expected, _ = passes(whole)
    logits, small_kv = passes(small)
    first = whole.truncated(1)
    assert first.spec.kv_shapes == small.spec.kv_shapes
    assert first.spec.num_parameters == small.spec.num_parameters
    assert first.spec.fingerprint != whole.spec.fingerprint
    cut, cut_kv = passes(first)
    assert torch.equal(cut, logits)
    assert all(torch.equal(a, b) for a, b in zip(cut_kv, small_kv, strict=True))
    assert torch.equal(passes(whole)[0], expected)
    assert not torch.allclose(cut, expected, atol=1e-2)


def test_a_pool_of_fewer_layers_is_refused_by_the_whole_decoder():
    whole = target(3)
    with pytest.raises(AssertionError):
        passes(whole, first_layers(pool_of(whole), 2))


def pool_of(decoder, num_blocks=256):
    spec = decoder.spec
    return KVPool(spec.kv_shapes, num_blocks, 4, spec.dtype, spec.device)


def passes(decoder, pool=None):
    """Logits of a prefill and of a tree after it, and the KV they leave."""
    runner, manager = Runner(decoder, pool or pool_of(decoder)), BlockManager(256, 4)
    tokens, tree = [9, 8, 7, 6, 5], DraftTree(tokens=(4, 3, 2), parents=(-1, 0, 0))
    table, _ = manager.open(tokens)
    manager.reserve(table, 9)
    prefill = runner.run([Piece(table, 0, tokens, EMPTY_TREE, True)]).logits_NV
    after = runner.run([Piece(table, 5, [1], tree, True)]).logits_NV
    return torch.cat((prefill, after)), kv(runner.pool, table, 9)


@pytest.mark.parametrize("later", [0.05, 1.0], ids=["right drafts", "wrong drafts"])
@pytest.mark.parametrize("sampling", SETTINGS.values(), ids=SETTINGS)
def test_after_every_step_the_kv_is_that_of_a_fresh_prefill(sampling, later):
    engine = with_exit(target(later=later))
    for i, k in enumerate((1, 4, 7)):
        asked = SpeculationParams(method="early_exit", num_draft_tokens=k)
        engine.add(request(f"r{i}", asked, seed=i, length=6 + i, **sampling))
    num_compared = 0
    while engine.has_work():
        engine.step()
        for seq in engine.scheduler.running:
            fresh = prefilled(engine.runner.network, seq.tokens[: seq.num_cached])
            found = kv(engine.runner.pool, seq.table, seq.num_cached)
            assert all(torch.equal(a, b) for a, b in zip(found, fresh, strict=True)), seq.id
            num_compared += seq.num_cached
    assert num_compared > 300
    assert engine.stats.num_draft_tokens > 20


def test_logits_after_drafting_have_the_bits_of_logits_without():
    """And drafting alone changes KV neither of committed tokens nor of the layers that stay out."""
    engine = with_exit(target())
    engine.add(request(max_tokens=20))
    for _ in range(4):
        engine.step()
    (seq,) = engine.scheduler.running
    batch = engine.scheduler.schedule()
    piece = Piece(seq.table, seq.num_cached, seq.tokens[seq.num_cached :], EMPTY_TREE, True)
    expected = engine.runner.run([piece]).logits_NV
    before = [part.clone() for layer in engine.runner.pool.layers for part in layer]
    (tree,) = engine.drafters["early_exit"].draft(batch.rows, engine.controller.plan(batch))
    assert len(tree) == 6
    after = [part for layer in engine.runner.pool.layers for part in layer]
    slots = seq.table.slots(0, seq.num_cached + 1)
    assert all(torch.equal(a[slots], b[slots]) for a, b in zip(before, after, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before[2:], after[2:], strict=True))
    drafted = seq.table.slots(seq.num_cached + 1, seq.num_cached + 6)
    assert not torch.equal(before[0][drafted], after[0][drafted]), "it did draft in there"
    output = engine.runner.run([piece._replace(tree=tree)])
    assert torch.equal(output.logits_NV[:1], expected)
    kept = [part.clone() for part in after[:2]]
    assert all(torch.equal(a[drafted], b[drafted]) for a, b in zip(kept, after[:2], strict=True))


def test_the_pass_that_verifies_writes_the_same_bits_again():
    engine = with_exit(target())
    engine.add(request(max_tokens=20))
    for _ in range(4):
        engine.step()
    (seq,) = engine.scheduler.running
    batch = engine.scheduler.schedule()
    (tree,) = engine.drafters["early_exit"].draft(batch.rows, engine.controller.plan(batch))
    drafted = seq.table.slots(seq.num_cached, seq.num_cached + len(tree))
    layer = engine.runner.pool.layers[0]
    mine = [part[drafted].clone() for part in layer]
    engine.runner.forward(batch, [tree])
    assert all(torch.equal(a, part[drafted]) for a, part in zip(mine, layer, strict=True))


def test_drafts_are_those_of_a_target_that_ends_there():
    """Two of four layers draft what a model of two layers would say."""
    engine, small = with_exit(target(later=0.3), 2), target(2, later=0.3)
    prompt = request().prompt_token_ids
    engine.add(request())
    batch = engine.scheduler.schedule()
    (tree,) = engine.drafters["early_exit"].draft(batch.rows, engine.controller.plan(batch))
    alone = with_exit(small)
    expected = run(alone, [request(speculation=OFF, max_tokens=6)])["r", 0]
    assert (tree.is_chain, list(tree.tokens)) == (True, expected)
    assert (len(prompt), tree.source) == (9, "early_exit")


def test_later_layers_that_matter_little_let_most_drafts_stand():
    for later, low, high in ((0.05, 0.5, 1.0), (1.0, 0.0, 0.3)):
        engine = with_exit(target(later=later))
        run(engine, [request(f"r{i}", seed=i, temperature=0.8) for i in range(4)])
        share = engine.stats.num_accepted_tokens / engine.stats.num_draft_tokens
        assert low <= share <= high, (later, share)


@pytest.mark.parametrize("method", ["greedy", "coupled", "probabilistic"])
@pytest.mark.parametrize("sampling", SETTINGS.values(), ids=SETTINGS)
def test_tokens_are_those_of_plain_decoding_under_pressure(sampling, method):
    decoder = target(later=0.1)
    expected = run(
        with_exit(decoder), [request(f"r{i}", OFF, i, 6 + i, **sampling) for i in range(6)]
    )
    asked = [
        SpeculationParams(
            method="early_exit",
            num_draft_tokens=1 + i,
            draft_sample_method=method,
            drafter_options={"num_layers": i % 4},
        )
        for i in range(6)
    ]
    pressed = with_exit(
        decoder,
        num_blocks=24,
        max_model_len=48,
        max_num_batched_tokens=20,
        long_prefill_token_threshold=4,
    )
    requests = [request(f"r{i}", asked[i], i, 6 + i, **sampling) for i in range(6)]
    assert run(pressed, requests) == expected
    assert pressed.stats.num_preemptions > 0
    assert pressed.stats.num_accepted_tokens > 0
    assert pressed.manager.num_used == 0


def test_completions_of_one_prompt_draft_each_for_itself():
    decoder = target(later=0.1)
    told = [
        run(with_exit(decoder), [request(speculation=speculation, n=3, temperature=0.9)])
        for speculation in (OFF, EXIT)
    ]
    assert told[0] == told[1]
    assert len(set(map(tuple, told[0].values()))) == 3


def test_the_conformance_suite_over_a_deeper_target():
    check_drafter(EarlyExitDrafter, target=target(later=0.1))


def test_rows_of_one_depth_share_their_passes():
    engine = with_exit(target())
    for i in range(5):
        engine.add(request(f"r{i}", seed=i))
    batch = engine.scheduler.schedule()
    drafter = engine.drafters["early_exit"]
    drafter.draft(batch.rows, engine.controller.plan(batch))
    assert drafter.num_forwards == drafter.default_draft_tokens


def test_a_long_tail_is_not_run_twice():
    engine = with_exit(target())
    for name, length in (("short", MAX_TAIL), ("long", MAX_TAIL + 1)):
        engine.add(request(name, length=length))
    batch = engine.scheduler.schedule()
    trees = engine.drafters["early_exit"].draft(batch.rows, engine.controller.plan(batch))
    assert [len(tree) for tree in trees] == [6, 0]


def surroundings(network):
    runner = SimpleNamespace(network=network, pool="pool")
    return Surroundings(target=ModelParts(runner=runner, manager=None))


def test_it_is_built_from_a_lean_target_of_two_layers_or_more():
    built = EarlyExitDrafter.build(surroundings(target()))
    assert (built.num_layers, built.pool) == (1, "pool")
    adapted = SimpleNamespace(spec=SimpleNamespace(name="their model"))
    with pytest.raises(ConfigError, match=r"'their model'.*network='lean'"):
        EarlyExitDrafter.build(surroundings(adapted))
    with pytest.raises(ConfigError, match="two layers or more; 'target' has one"):
        EarlyExitDrafter.build(surroundings(target(1)))


def test_a_quarter_of_the_layers_is_the_default_and_all_are_refused():
    engine = with_exit(target())
    for value in (-1, LAYERS):
        asked = SpeculationParams(method="early_exit", drafter_options={"num_layers": value})
        with pytest.raises(RequestError, match=rf"num_layers.*{value}.*\[0, 3\]"):
            engine.add(request(speculation=asked))
    for num_layers in (0, 3):
        asked = SpeculationParams(method="early_exit", drafter_options={"num_layers": num_layers})
        run(engine, [request(f"r{num_layers}", speculation=asked)])
    assert sorted(engine.drafters["early_exit"]._runners) == [1, 3]
