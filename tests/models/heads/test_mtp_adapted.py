"""MTP modules made of layers of `transformers`, against those layers under eager attention."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor

from outrider.cache.pool import KVPool
from outrider.errors import ConfigError
from outrider.models.adapter import Adapter, load_adapter
from outrider.models.heads.mtp_network import MTPNetwork
from outrider.models.heads.spec import Head
from outrider.ops.base import Span
from outrider.ops.choose import choose
from outrider.ops.torch import TorchOps
from tests.models.heads.mtp_targets import TARGETS, Target, make
from tests.models.heads.test_mtp_network import TREE, Drafting, line, pooled, tree_logits

TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


def network(target: Target) -> MTPNetwork:
    return MTPNetwork(target.head, target.adapter, target.adapter.ops)


RUN = [name for name in TARGETS if name != "mimo-v2-flash"]


@pytest.mark.parametrize("name", RUN)
@pytest.mark.parametrize("kernels", ["cpu", "torch"])
def test_chains_and_trees(tmp_path: Path, name: str, kernels: str) -> None:
    ops = choose() if kernels == "cpu" else TorchOps()
    check(make(tmp_path, name, ops))


@pytest.mark.parametrize("layout", ["qwen", "speculators"])
def test_other_layouts_store_experts_as_the_files_do(tmp_path: Path, layout: str) -> None:
    check(make(tmp_path, "qwen3-moe", choose(), layout))


def test_several_modules(tmp_path: Path) -> None:
    check(make(tmp_path, "glm4-moe", choose(), num_modules=3))


def check(target: Target) -> None:
    """Chains side by side, further than there are modules, and a tree."""
    reference = target.reference()
    runner, manager = pooled(network(target))
    lengths = (11, 3, 8)
    sequences = [Drafting(runner, manager, n, seed, hidden=32) for seed, n in enumerate(lengths)]
    paths = [[7, 8, 9], [20, 30, 1], [2, 3, 4]]
    found = line(runner, sequences, paths)
    for row, (sequence, path) in enumerate(zip(sequences, paths, strict=True)):
        expected = reference.draft(sequence.raw_TH, sequence.tokens, path)
        for step, logits in enumerate(expected):
            torch.testing.assert_close(found[step][row], logits, **TOLERANCE)
    grown = tree_logits(runner, sequences[0], TREE)
    for node in range(len(TREE)):
        path = TREE.path_tokens(node)
        expected = reference.draft(sequences[0].raw_TH, sequences[0].tokens, path)
        torch.testing.assert_close(grown[node + 1], expected[-1], **TOLERANCE)


@pytest.mark.parametrize("num_modules", [1, 2, 3])
def test_as_transformers_drafts_itself(tmp_path: Path, num_modules: int) -> None:
    """One token a module, greedy; for the order of several modules it is an outside witness."""
    if not hasattr(transformers.modeling_layers, "MtpModel"):
        pytest.skip("this version of transformers has no MTP modules")
    target = make(tmp_path, "deepseek-v3", choose(), num_modules=num_modules)
    pinned = replace(target.head.spec.conventions, is_first_embedding_zero=False)
    spec = replace(target.head.spec, conventions=pinned)
    target = target._replace(head=Head(spec, target.head.tensors))
    runner, manager = pooled(network(target))
    sequence = Drafting(runner, manager, 9, 1, hidden=32)
    tokens, logits = theirs(target, sequence)
    found = line(runner, [sequence], [tokens[:-1]])
    torch.testing.assert_close(torch.cat(found), logits, **TOLERANCE)
    assert torch.cat(found).argmax(dim=1).tolist() == tokens


@torch.inference_mode()
def theirs(target: Target, sequence: Drafting) -> tuple[list[int], Tensor]:
    """Tokens, and logits_KV, one of each module."""
    main, own = target.donor, target.head.tensors
    assert target.head.spec.mtp is not None
    main.config.num_mtp_layers = target.head.spec.mtp.num_modules
    model = transformers.modeling_layers.MtpModel(main, main.config.num_mtp_layers).eval()
    names = {"enorm": "embedding_norm", "hnorm": "feature_norm", "post_norm": "norm"}
    for number, layer in enumerate(model.layers):
        start = f"modules.{number}."
        for name, ours in {**names, "eh_proj": "fc"}.items():
            getattr(layer, name).weight.copy_(own[f"{start}{ours}.weight"])
        layer.mtp_block.load_state_dict(main.model.layers[2 + number].state_dict())
    length = len(sequence.raw_TH)
    tokens, logits, _ = model(
        input_ids=torch.tensor([sequence.tokens[1:]]),
        last_hidden_states=main.model.norm(sequence.raw_TH)[None],
        attention_mask=None,
        position_ids=torch.arange(1, length + 1)[None],
        mtp_cache=transformers.cache_utils.MtpCache(config=main.config.get_mtp_config()),
    )
    return tokens[0].tolist(), logits[0]


def test_half_width_keeps_what_the_target_keeps_wide(tmp_path: Path) -> None:
    target = make(tmp_path, "deepseek-v3", TorchOps(batch_invariant=False))
    adapter = load_adapter(
        tmp_path / "plain",
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
        ops=TorchOps(batch_invariant=False),
    )
    half = target._replace(adapter=adapter)
    runner, manager = pooled(network(half))
    found = torch.cat(line(runner, [Drafting(runner, manager, 9, 2, hidden=32)], [[3, 1]]))
    runner, manager = pooled(network(target))
    expected = torch.cat(line(runner, [Drafting(runner, manager, 9, 2, hidden=32)], [[3, 1]]))
    error = (found - expected).norm(dim=1) / expected.norm(dim=1)
    assert found.dtype == torch.float32
    assert error.median() < 0.1


def test_a_family_that_transformers_renames_is_refused(tmp_path: Path) -> None:
    target = make(tmp_path, "mimo-v2-flash", choose())
    with pytest.raises(ConfigError, match=r"differ \(self_attn\.attention_sink_bias\)"):
        network(target)


def test_a_convention_that_a_class_settles_is_refused(tmp_path: Path) -> None:
    target = make(tmp_path, "qwen3", choose())
    pinned = replace(target.head.spec.conventions, rope_style="interleaved")
    spec = replace(target.head.spec, conventions=pinned)
    with pytest.raises(ConfigError, match="rope_style='interleaved'"):
        network(target._replace(head=Head(spec, target.head.tensors)))


def test_the_target_is_left_as_it_was(tmp_path: Path) -> None:
    target = make(tmp_path, "glm4-moe", choose())
    tokens_N = torch.arange(5, 12)
    before = through(target.adapter, tokens_N)
    network(target)
    assert torch.equal(through(target.adapter, tokens_N), before)


def through(adapter: Adapter, tokens_N: Tensor) -> Tensor:
    spec, count = adapter.spec, len(tokens_N)
    pool = KVPool(spec.kv_shapes, 1, count, spec.dtype, spec.device)
    layout = adapter.ops.layout([Span(range(count), 0, count)], spec.device)
    return adapter.forward(tokens_N, layout, pool.layers, torch.arange(count))
