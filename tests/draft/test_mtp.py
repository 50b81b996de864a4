"""MTP drafters: what they draft is what the plain recursion says, and outputs stay the target's."""

from dataclasses import replace

import pytest
import torch

from outrider.cache.pool import KVPool
from outrider.cache.table import BlockManager
from outrider.draft.base import ModelParts, Surroundings
from outrider.draft.mtp import MTPDrafter
from outrider.engine.config import EngineConfig
from outrider.engine.engine import Engine
from outrider.errors import ConfigError
from outrider.models.config import DecoderConfig
from outrider.models.decoder import Decoder
from outrider.models.heads.load import load_head
from outrider.models.runner import Runner
from outrider.ops.base import Span
from outrider.ops.choose import choose
from outrider.request import Request, SamplingParams, SpeculationParams
from outrider.testing import check_drafter, run, tiny_decoder, tiny_engine
from tests.models.heads.layouts import (
    DEEPSEEK_PARTS,
    PROJECTED_PARTS,
    TARGET,
    TARGET_CONFIG,
    H,
    L,
    V,
    mtp_names,
    random_mtp,
    random_target,
    write,
)
from tests.models.heads.mtp_targets import make
from tests.models.heads.test_mtp_network import KINDS, pairs_of

OFF = SpeculationParams(method="off")
GREEDY = SamplingParams(max_tokens=16, ignore_eos=True)
SAMPLED = SamplingParams(max_tokens=16, temperature=0.9, ignore_eos=True)
K3 = SpeculationParams(method="mtp", num_draft_tokens=3)
TREE = SpeculationParams(
    method="mtp", num_draft_tokens=4, width=3, num_nodes=9, draft_sample_method="greedy"
)
ASKED = [("r0", 1, 6), ("r1", 2, 9), ("r2", 3, 13), ("r3", 4, 3)]
SLOW = pytest.mark.slow
ADAPTED = (
    "deepseek-v3",
    "glm4-moe",
    *(pytest.param(n, marks=SLOW) for n in ("glm4-moe-lite", "qwen3-moe", "gemma3", "gpt-oss")),
)


class Told(MTPDrafter):
    """Keeps what it drafted, and for which log."""

    def __init__(self, *parts):
        super().__init__(*parts)
        self.told = []

    def draft(self, rows, plan):
        trees = super().draft(rows, plan)
        self.told += [(list(row.seq.tokens), tree) for row, tree in zip(rows, trees, strict=True)]
        return trees


def engine_of(target, head, num_blocks=256, **options):
    """Without text."""
    config = EngineConfig(block_size=4, check_integrity=True, **{"max_num_seqs": 16, **options})

    def make_pool(shapes):
        spec = target.spec
        pool = KVPool(shapes, num_blocks, config.block_size, spec.dtype, spec.device)
        return pool, BlockManager(num_blocks, config.block_size, config.enable_prefix_caching)

    pool, manager = make_pool(target.spec.kv_shapes)
    parts = ModelParts(runner=Runner(target, pool), manager=manager)
    around = Surroundings(target=parts, heads={"mtp": head}, make_pool=make_pool)
    drafter = Told.build(around)
    return Engine(parts.runner, manager, config, drafters=[drafter], default_drafter="mtp")


def request(name, speculation, sampling, seed, length, vocab=V):
    prompt = tuple((11 * seed + 3 * j * j) % vocab for j in range(length))
    return Request(
        id=name,
        prompt_token_ids=prompt,
        sampling=sampling,
        speculation=speculation,
        seed=seed,
    )


def requests(speculation, sampling=GREEDY, vocab=V):
    return [request(n, speculation, sampling, s, k, vocab) for n, s, k in ASKED]


def served(engine, asked):
    """Tokens; afterwards the head holds nothing."""
    tokens = run(engine, asked)
    assert engine.drafters["mtp"].manager.num_used == 0
    return tokens


def last_states(target, log):
    """Of all positions of a log, before the final norm; one pass over nothing else."""
    spec, count = target.spec, len(log)
    pool = KVPool(spec.kv_shapes, 1, count, spec.dtype, spec.device)
    layout = target.ops.layout([Span(range(count), 0, count)], spec.device)
    passed = target.forward_tapped(
        torch.tensor(log), layout, pool.layers, torch.arange(0), (spec.num_layers,)
    )
    return passed.tapped_AND[0]


def assert_drafts_follow_the_definition(engine, reference, at_least):
    """Every drafted token is the argmax behind its path, or among the likeliest of a tree."""
    target, count = engine.runner.network, 0
    for log, tree in engine.drafters["mtp"].told:
        if len(log) - 1 < reference.num_modules:
            continue  # modules that do not begin yet draft nothing that is defined
        raw_TH = last_states(target, log[:-1])
        for node, parent in enumerate(tree.parents):
            path = tree.path_tokens(parent) if parent >= 0 else ()
            logits = reference.draft(raw_TH, log, path)[-1]
            rank = int((logits > logits[tree.tokens[node]] + 1e-3).sum())
            assert rank <= tree.children(parent).index(node), (log, tree, node)
            count += 1
    assert count >= at_least, count


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return pairs_of(tmp_path_factory.mktemp("mtp"))


@pytest.mark.parametrize("speculation", [K3, TREE], ids=["chains", "trees"])
@pytest.mark.parametrize("kind", KINDS)
def test_drafts_are_those_of_a_full_recompute(pairs, kind, speculation):
    """Batches of mixed lengths, after rejections, with prompts that come in chunks."""
    pair = pairs[kind]
    network = pair.network(choose())
    engine = engine_of(
        network.target, pair.head, max_num_batched_tokens=18, long_prefill_token_threshold=5
    )
    served(engine, requests(speculation))
    assert_drafts_follow_the_definition(engine, pair.reference, at_least=100)
    assert engine.drafters["mtp"].num_cold_starts == 0


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_are_those_without_modules(pairs, kind, sampling):
    """Sampled ones, too: coupled drafts are verified by the target's own draws."""
    pair = pairs[kind]
    for speculation in (K3, replace(TREE, draft_sample_method=None)):
        engine = engine_of(pair.network(choose()).target, pair.head)
        plain = run(engine, requests(OFF, sampling))
        assert served(engine, requests(speculation, sampling)) == plain
        assert any(tree.tokens for _, tree in engine.drafters["mtp"].told)


@pytest.mark.parametrize("name", ADAPTED)
def test_beside_a_transformers_target(tmp_path, name):
    """Drafts by the definition, and outputs as without."""
    made = make(tmp_path, name, choose())
    engine = engine_of(made.adapter, made.head)
    for sampling in (GREEDY, SAMPLED):
        plain = run(engine, requests(OFF, sampling, 200))
        for speculation in (K3, replace(TREE, draft_sample_method=None)):
            assert served(engine, requests(speculation, sampling, 200)) == plain
    engine = engine_of(made.adapter, made.head)
    served(engine, requests(K3, GREEDY, 200))
    assert_drafts_follow_the_definition(engine, made.reference(), at_least=60)


def head_of(folder, num_modules, tensors=None, **target):
    """Modules of a Llama; with one, as DeepSeek names them, else as MiMo does."""
    made = random_mtp(num_modules=num_modules) if tensors is None else tensors
    if num_modules == 1:
        names = mtp_names(made, "model.layers.{}.", DEEPSEEK_PARTS, first=L)
    else:
        names = mtp_names(made, "model.mtp_layers.{}.", PROJECTED_PARTS)
    config = {**TARGET_CONFIG, "num_nextn_predict_layers": num_modules}
    return load_head(write(folder, config, {**random_target(), **names}), TARGET, **target)


@pytest.mark.parametrize("num_modules", [pytest.param(1, marks=SLOW), 3])
def test_the_contract_of_drafters(tmp_path, num_modules):
    target = tiny_decoder(3, hidden_size=H, intermediate_size=24, num_hidden_layers=L)
    check_drafter(MTPDrafter, target=target, heads={"mtp": head_of(tmp_path, num_modules)})


def bigrams():
    """A target that looks at its last token only, and modules that know it by heart."""
    tensors = random_target()
    for name in tensors:
        if "o_proj" in name or "down_proj" in name:
            tensors[name] = torch.zeros_like(tensors[name])
    return tensors


def knowing(num_modules):
    modules = random_mtp(num_modules=num_modules)
    for name, tensor in modules.items():
        if "o_proj" in name or "down_proj" in name:
            modules[name] = torch.zeros_like(tensor)
        if name.endswith("embedding_norm.weight"):
            modules[name] = torch.ones(H)
        if name.endswith("fc.weight"):
            parts = [torch.eye(H), torch.zeros(H, H)]  # embedding; feature
            modules[name] = torch.cat(parts if num_modules == 1 else parts[::-1], dim=1)
        if name.endswith(".norm.weight"):
            modules[name] = bigrams()["model.norm.weight"]
    return modules


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize(("num_modules", "depth"), [(1, 1), (1, 4), (3, 3), (3, 7)])
def test_modules_that_know_the_target_are_accepted_whole(tmp_path, num_modules, depth, sampling):
    head = head_of(tmp_path, num_modules, knowing(num_modules))
    target = Decoder(DecoderConfig.from_dict(TARGET_CONFIG), bigrams(), choose())
    speculation = SpeculationParams(method="mtp", num_draft_tokens=depth)
    engine = engine_of(target, head)
    asked = request("r", speculation, sampling, 2, 9)
    plain = run(engine, [replace(asked, speculation=OFF)])
    num_plain = engine.stats.num_steps
    assert served(engine, [asked]) == plain
    # The first pass has no features of the prompt; all later ones yield depth + 1 tokens.
    assert engine.stats.num_steps - num_plain == 1 + -(-15 // (depth + 1))


@pytest.mark.parametrize("kind", ["deepseek", "three modules"])
@pytest.mark.parametrize("width", [1, 2])
def test_recorded_laws_are_those_of_the_modules_at_the_requests_temperature(pairs, kind, width):
    pair = pairs[kind]
    speculation = SpeculationParams(
        method="mtp", num_draft_tokens=4, width=width, draft_sample_method="independent"
    )
    engine = engine_of(pair.network(choose()).target, pair.head)
    served(engine, requests(speculation, SAMPLED))
    count = 0
    for log, tree in engine.drafters["mtp"].told[::3]:
        if len(log) <= 3:
            continue
        raw_TH = last_states(engine.runner.network, log[:-1])
        for node, parent in enumerate(tree.parents):
            path = tree.path_tokens(parent) if parent >= 0 else ()
            logits = pair.reference.draft(raw_TH, log, path)[-1]
            expected = (logits.double() / 0.9).softmax(0)
            torch.testing.assert_close(tree.law(node), expected, rtol=1e-3, atol=1e-6)
            count += 1
    assert count > 25


@pytest.mark.parametrize("num_modules", [1, 3])
def test_a_later_request_finds_the_rows_of_a_shared_prefix(tmp_path, num_modules):
    """What modules hand each other across the end of a shared block is found there, too."""
    head = head_of(tmp_path, num_modules)
    target = Decoder(DecoderConfig.from_dict(TARGET_CONFIG), random_target(), choose())
    engine = engine_of(target, head)
    first, second = requests(K3)[1:3]
    long = tuple(range(5, 38))
    served(engine, [replace(first, prompt_token_ids=long)])
    drafter = engine.drafters["mtp"]
    drafter.told.clear()
    alone = engine_of(target, head)
    asked = replace(second, prompt_token_ids=(*long[:-3], 1, 2, 3))
    assert served(engine, [asked]) == served(alone, [asked])
    assert drafter.told == alone.drafters["mtp"].told
    assert drafter.num_cold_starts == 0


def test_who_begins_behind_a_gap_is_told_so(tmp_path):
    """As where a prefix of the target is cached and nobody may run it again."""
    engine = engine_of(
        Decoder(DecoderConfig.from_dict(TARGET_CONFIG), random_target(), choose()),
        head_of(tmp_path, 3),
    )
    drafter = engine.drafters["mtp"]
    drafter._target_manager = None
    passes, run_pass = [], drafter.run_pass
    drafter.run_pass = lambda pieces, depth: passes.append(pieces) or run_pass(pieces, depth)
    asked = replace(requests(K3)[0], prompt_token_ids=tuple(range(5, 30)))
    plain = run(engine, [replace(asked, speculation=OFF)])
    fresh = replace(asked, id="fresh", prompt_token_ids=(9, *asked.prompt_token_ids[1:]))
    assert served(engine, [asked, fresh])["r0", 0] == plain["r0", 0]
    first = [piece for pieces in passes for piece in pieces if piece.num_cached == 0]
    assert {piece.is_behind_gap for piece in first} == {True, False}
    steps = {piece.num_drafted for pieces in passes for piece in pieces}
    assert steps == {0, 1, 2}


def test_how_far_ahead_where_nobody_says(tmp_path):
    target = Decoder(DecoderConfig.from_dict(TARGET_CONFIG), random_target(), choose())
    assert engine_of(target, head_of(tmp_path / "1", 1)).drafters["mtp"].default_draft_tokens == 2
    assert engine_of(target, head_of(tmp_path / "3", 3)).drafters["mtp"].default_draft_tokens == 4


def test_no_modules_no_drafter():
    with pytest.raises(ConfigError, match="drafter 'mtp' runs a draft head"):
        tiny_engine(drafters=[MTPDrafter])
