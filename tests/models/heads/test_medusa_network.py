"""Medusa's forward against its definition, for every convention its files may have."""

from dataclasses import replace

import pytest
import torch

from outrider.models.config import DecoderConfig
from outrider.models.decoder import Decoder
from outrider.models.heads.load import load_head
from outrider.models.heads.medusa_network import MedusaNetwork
from outrider.models.heads.spec import TargetSpec
from outrider.models.weights import EMBEDDING, FINAL_NORM, tensor_shapes
from outrider.ops.choose import choose
from outrider.testing import tiny_decoder
from outrider.testing.tiny import TINY
from tests.models.heads.layouts import MEDUSA_CONFIG, medusa_names, vllm_medusa_names, write

V, D, IDS = 256, 32, (200, 3, 77, 41, 12)
TARGET = TargetSpec(name="tiny", family="llama", hidden_size=D, vocab_size=V, num_layers=2)


def tensors(num_heads=3, num_blocks=1, rows=V, has_bias=True, seed=1):
    """Random heads by canonical names; `rows` 0 is without lm_heads."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for i in range(num_heads):
        for j in range(num_blocks):
            made[f"heads.{i}.blocks.{j}.weight"] = torch.randn(D, D, generator=generator) * 0.15
            if has_bias:
                made[f"heads.{i}.blocks.{j}.bias"] = torch.randn(D, generator=generator)
        if rows:
            made[f"heads.{i}.lm_head.weight"] = torch.randn(rows, D, generator=generator) * 0.3
    return made


def loaded(folder, made, **pins):
    """Through the writer of a published layout and our reader."""
    if "target_ids" in made:
        config = {"model_type": "medusa", "truncated_vocab_size": len(made["target_ids"])}
        return load_head(write(folder, config, vllm_medusa_names(made)), TARGET, pins=pins)
    return load_head(write(folder, MEDUSA_CONFIG, medusa_names(made)), TARGET, pins=pins)


def reference(made, target, state_D, is_normed=True, uses_targets_head=False):
    """One row, head by head, from the formulas: logits_KV."""
    found = []
    num_heads = 1 + max(int(name.split(".")[1]) for name in made if name.startswith("heads"))
    for i in range(num_heads):
        x_D = target.final_norm(state_D[None])[0] if is_normed else state_D
        for j in range(sum(f"heads.{i}.blocks.{j}.weight" in made for j in range(9))):
            weight = made[f"heads.{i}.blocks.{j}.weight"].to(x_D)
            y_D = weight @ x_D + made.get(f"heads.{i}.blocks.{j}.bias", torch.zeros(D)).to(x_D)
            x_D = x_D + y_D * torch.sigmoid(y_D)
        own = made.get(f"heads.{i}.lm_head.weight")
        ids = made.get("target_ids", torch.arange(V))
        if own is None or uses_targets_head:
            small_d = target.head(x_D[None])[0][ids]
        else:
            small_d = (own.to(x_D) @ x_D).float()
        logits_V = torch.full((V,), float("-inf"))
        logits_V[ids] = small_d
        found.append(logits_V)
    return torch.stack(found)


def network_of(head, target):
    return MedusaNetwork(head, target, target.ops)


def states(count=5, dtype=torch.float32):
    return (torch.randn(count, D, generator=torch.Generator().manual_seed(9)) * 3).to(dtype)


KINDS = {
    "as published": {},
    "two blocks": {"num_blocks": 2},
    "three blocks": {"num_blocks": 3},
    "no bias": {"has_bias": False},
    "the target's lm_head": {"rows": 0, "num_blocks": 2},
    "one head": {"num_heads": 1},
}


@pytest.mark.parametrize("kernels", ["auto", "torch"])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_formulas(tmp_path, kind, kernels):
    made, target = tensors(**KINDS[kind]), tiny_decoder(kernels=kernels)
    network = network_of(loaded(tmp_path, made), target)
    states_RD = states()
    logits_RKV = network.forward(states_RD, network.num_heads)
    expected = torch.stack([reference(made, target, state_D) for state_D in states_RD])
    assert logits_RKV.dtype == torch.float32
    torch.testing.assert_close(logits_RKV, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pins", [{"input_state": "raw"}, {"lm_head": "target"}], ids=str)
def test_pinned_conventions_are_honoured(tmp_path, pins):
    made, target = tensors(), tiny_decoder()
    network = network_of(loaded(tmp_path, made, **pins), target)
    (state_D,) = states(1)
    logits_KV = network.forward(state_D[None], 3)[0]
    is_normed, shares = "input_state" not in pins, "lm_head" in pins
    expected = reference(made, target, state_D, is_normed, shares)
    torch.testing.assert_close(logits_KV, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits_KV, reference(made, target, state_D), atol=1e-2)


@pytest.mark.parametrize("pins", [{}, {"lm_head": "target"}], ids=["own", "target's rows"])
def test_a_truncated_vocabulary_is_spread_over_the_targets(tmp_path, pins):
    made = tensors(rows=len(IDS)) | {"target_ids": torch.tensor(IDS)}
    target = tiny_decoder()
    network = network_of(loaded(tmp_path, made, **pins), target)
    states_RD = states()
    logits_RKV = network.forward(states_RD, 3)
    assert logits_RKV.shape == (5, 3, V)
    assert logits_RKV.isfinite().sum(dim=2).unique().tolist() == [len(IDS)]
    expected = torch.stack(
        [reference(made, target, s, uses_targets_head=bool(pins)) for s in states_RD]
    )
    torch.testing.assert_close(logits_RKV, expected, atol=1e-5, rtol=1e-5)


def test_the_first_heads_alone_give_the_same_bits(tmp_path):
    network = network_of(loaded(tmp_path, tensors(num_blocks=2)), tiny_decoder())
    states_RD = states()
    whole = network.forward(states_RD, 3)
    for num_heads in (1, 2):
        assert torch.equal(network.forward(states_RD, num_heads), whole[:, :num_heads])


def test_a_row_has_the_same_bits_in_any_company(tmp_path):
    network = network_of(loaded(tmp_path, tensors(num_blocks=2)), tiny_decoder())
    states_RD = states(9)
    whole = network.forward(states_RD, 3)
    for row in range(9):
        assert torch.equal(network.forward(states_RD[row : row + 1], 3)[0], whole[row])


def test_lm_heads_that_are_not_wanted_are_not_run(tmp_path):
    network = network_of(loaded(tmp_path, tensors()), tiny_decoder())
    network._lm_heads[2] = None
    assert network.forward(states(), 2).shape == (5, 2, V)
    with pytest.raises(TypeError):
        network.forward(states(), 3)


@pytest.mark.parametrize("rows", [V, 0], ids=["own lm_head", "target's"])
def test_bfloat16(tmp_path, rows):
    """Weights and states in the target's dtype, logits in float32, near those of float32."""
    made = tensors(rows=rows)
    target = tiny_decoder(kernels="torch")
    network = network_of(loaded(tmp_path, made), in_bfloat16())
    states_RD = states(dtype=torch.bfloat16)
    logits_RKV = network.forward(states_RD, 3)
    assert logits_RKV.dtype == torch.float32
    exact = network_of(loaded(tmp_path, made), target).forward(states_RD.float(), 3)
    torch.testing.assert_close(logits_RKV, exact, atol=0.5, rtol=0.05)
    assert (logits_RKV.argmax(-1) == exact.argmax(-1)).float().mean() > 0.8


def in_bfloat16():
    """The decoder of `tiny_decoder()`."""
    config = DecoderConfig.from_dict(TINY)
    generator = torch.Generator().manual_seed(0)
    made = {
        name: torch.ones(shape)
        if len(shape) == 1
        else torch.randn(shape, generator=generator) * 0.25
        for name, shape in tensor_shapes(config).items()
        if name != "lm_head.weight"
    }
    ops = choose("torch", dtype="bfloat16")
    return Decoder(config, made, ops, eos_token_ids=(3,), dtype=torch.bfloat16)


def test_heads_in_the_targets_own_files_are_those_of_a_file_of_their_own(tmp_path):
    """Medusa-1.0: the model that is sped up brings them along."""
    made, target = tensors(rows=V), tiny_decoder()
    embedded = {EMBEDDING: torch.zeros(V, D), FINAL_NORM: torch.zeros(D)}
    folder = write(
        tmp_path / "model", {**TINY, **MEDUSA_CONFIG}, embedded | medusa_names(made, "medusa_head.")
    )
    inside = load_head(folder, replace(TARGET, folder=folder))
    ours, theirs = network_of(inside, target), network_of(loaded(tmp_path / "head", made), target)
    assert torch.equal(ours.forward(states(), 3), theirs.forward(states(), 3))
