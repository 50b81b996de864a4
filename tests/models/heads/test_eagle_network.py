"""EagleNetwork against the plain reference: every convention, every way through the kernels."""

import math
from dataclasses import replace

import pytest
import torch

from outrider.cache.pool import KVPool
from outrider.errors import ConfigError
from outrider.models.heads.eagle_network import EagleNetwork
from outrider.models.heads.spec import Head
from outrider.models.heads.teacher_forcing import teacher_forced, teacher_forced_in_parallel
from outrider.ops.base import Span
from tests.models.heads.heads_for_tests import eagle1, eagle3, peagle, states_of, target_decoder
from tests.models.heads.layouts import BOUNDARIES, DRAFT_IDS, H, L, V
from tests.models.heads.reference import ReferenceEagle3
from tests.models.heads.reference_eagle1 import ReferenceEagle1

TEXT = [(7 * j * j + 3) % V for j in range(14)]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}

EAGLE3 = [
    {},
    {"is_qwen": True},
    {"input_norm": "all"},
    {"input_norm": "each"},
    {"num_layers": 2},
    {"own_embedding": False},
    {"hidden": 8},
    {"ids": tuple(range(V))},
    {"num_features": 2, "boundaries": (1, 6), "pins": {"feature_layers": [6, 1]}},
    {"pins": {"feature_layers": [8, 0, 3]}},
    {"pins": {"feature_layers": [3, 3, 3]}},
    {"pins": {"norm_before_residual": True}},
    {"pins": {"feedback": "post-norm"}},
    {"num_layers": 2, "pins": {"feedback": "post-norm", "norm_before_residual": True}},
    {"pins": {"rope_style": "interleaved"}},
    {"is_qwen": True, "pins": {"rope_style": "interleaved"}},
    {"is_qwen": True, "input_norm": "each", "pins": {"norm_gain": "one-plus-weight"}},
    {"pins": {"lm_head": "target"}},
    {"pins": {"embedding": "target"}},
]
EAGLE1 = [
    {},
    {"has_bias": True},
    {"has_norms": True},
    {"has_qkv_bias": True},
    {"own_embedding": True},
    {"num_layers": 2},
    {"pins": {"concatenation": "feature-first"}},
    {"pins": {"input_state": "raw"}},
    {"has_norms": True, "has_qkv_bias": True, "pins": {"rope_style": "interleaved"}},
]
CASES = [(eagle3, options) for options in EAGLE3] + [(eagle1, options) for options in EAGLE1]


def name_of(case):
    return f"{case[0].__name__} {case[1]}"


def reference_of(head: Head, target=None):
    target = target or target_decoder()
    embedding = target.embed(torch.arange(V))
    # Rows of the head are what it makes of unit vectors.
    lm_head = target.head(torch.eye(H)).T
    if head.spec.family == "eagle":
        return ReferenceEagle1(head, embedding, lm_head, target.final_norm)
    return ReferenceEagle3(head, embedding, lm_head)


def features_of(head: Head, tapped):
    layers = head.spec.conventions.feature_layers if head.spec.widths.num_features else (L,)
    return torch.cat([tapped[layer] for layer in layers], dim=-1)


def over_draft_vocabulary(head: Head, logits_RV):
    """Those the head knows; all others must be impossible."""
    ids = head.tensors.get("target_ids")
    if ids is None:
        return logits_RV
    others = torch.ones(V, dtype=torch.bool)
    others[ids] = False
    assert (logits_RV[:, others] == -math.inf).all()
    return logits_RV[:, ids]


@pytest.mark.parametrize("way", ["fused", "by layer", "torch"])
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_rows_are_those_of_the_reference(tmp_path, case, way):
    make, options = case
    head = make(tmp_path, **options)
    target = target_decoder("torch" if way == "torch" else "auto")
    network = EagleNetwork(head, target)
    forward = network.forward_by_layer if way == "by layer" else network.forward
    tokens = torch.tensor(TEXT[1:])
    tapped = states_of(target, TEXT)[1][:, :-1]
    inputs = network.read(tapped[list(network.boundaries)])
    reference = reference_of(head, target)
    wanted_inputs = reference.fuse(features_of(head, tapped))
    torch.testing.assert_close(inputs, wanted_inputs, **CLOSE)
    expected = reference.rows(wanted_inputs, tokens)
    pool = KVPool(network.spec.kv_shapes, 16, 4, torch.float32, torch.device("cpu"))
    for start, stop in ((0, 8), (8, 9), (9, 13)):
        layout = network.ops.layout([Span([3, 0, 2, 1], start, stop - start, (), 4)], "cpu")
        rows = torch.arange(0, stop - start, 2)
        output = forward(tokens[start:stop], inputs[start:stop], layout, pool.layers, rows)
        found = over_draft_vocabulary(head, output.logits_RV)
        torch.testing.assert_close(found, expected.logits_TV[start:stop:2], **CLOSE)
        torch.testing.assert_close(output.feedback_ND, expected.feedback_TD[start:stop], **CLOSE)


def forced(reference, inputs_TD, depth):
    """Logits of the last row after feeding back `depth` times along the text."""
    num_rows = len(inputs_TD)
    for step in range(depth + 1):
        tokens = torch.tensor(TEXT[1 : num_rows + step + 1])
        rows = reference.rows(inputs_TD, tokens)
        inputs_TD = torch.cat([inputs_TD, rows.feedback_TD[-1:]])
    return rows.logits_TV[-1]


@pytest.mark.parametrize("case", [CASES[0], CASES[4], CASES[12], CASES[19]], ids=name_of)
def test_teacher_forcing_recurs_as_drafting_does(tmp_path, case):
    make, options = case
    head = make(tmp_path, **options)
    network, reference = EagleNetwork(head, target_decoder()), reference_of(head)
    tapped = states_of(target_decoder(), TEXT)[1]
    logits = teacher_forced(network, TEXT, tapped[list(network.boundaries)], 4)
    assert [len(rows) for rows in logits] == [13, 12, 11, 10]
    inputs = reference.fuse(features_of(head, tapped))
    for depth, logits_NV in enumerate(logits):
        found = over_draft_vocabulary(head, logits_NV)
        expected = [forced(reference, inputs[: t + 1], depth) for t in range(len(found))]
        torch.testing.assert_close(found, torch.stack(expected), **CLOSE)


def test_all_depths_at_once_see_true_rows_and_masks_before_them(tmp_path):
    head = peagle(tmp_path, input_norm="all")
    network, reference = EagleNetwork(head, target_decoder()), reference_of(head)
    tapped = states_of(target_decoder(), TEXT)[1]
    logits = teacher_forced_in_parallel(
        network,
        TEXT,
        tapped[list(network.boundaries)],
        4,
        mask_token_id=network.mask_token_id,
        mask_input_1D=network.mask_input_1D,
    )
    inputs = reference.fuse(features_of(head, tapped))
    mask = reference.fuse(head.tensors["mask_feature"][None])
    for t in (0, 5, 9):
        fed = torch.cat([inputs[: t + 1], mask.expand(3, -1)])
        rows = reference.rows(fed, torch.tensor([*TEXT[1 : t + 2], 39, 39, 39]))
        found = torch.stack([over_draft_vocabulary(head, part[t : t + 1])[0] for part in logits])
        torch.testing.assert_close(found, rows.logits_TV[t:], **CLOSE)


def test_without_fc_the_feature_is_the_normed_last_state(tmp_path):
    head = eagle3(tmp_path)
    spec = replace(
        head.spec,
        widths=replace(head.spec.widths, num_features=0),
        conventions=replace(head.spec.conventions, feature_layers=()),
    )
    tensors = {name: t for name, t in head.tensors.items() if name != "fc.weight"}
    target = target_decoder()
    network = EagleNetwork(Head(spec, tensors), target)
    assert network.boundaries == (L,)
    tapped = states_of(target, TEXT)[1]
    assert torch.equal(network.read(tapped[[L]]), target.final_norm(tapped[L]))


def test_the_heads_tensors_are_left_alone(tmp_path):
    head = eagle3(tmp_path, pins={"norm_gain": "one-plus-weight"})
    before = {name: tensor.clone() for name, tensor in head.tensors.items()}
    EagleNetwork(head, target_decoder())
    assert head.tensors.keys() == before.keys()
    assert all(torch.equal(head.tensors[name], before[name]) for name in before)


def test_rope_of_the_target_turns_as_a_head_with_its_theta(tmp_path):
    target = target_decoder()
    own = eagle3(tmp_path)
    pinned = eagle3(tmp_path, pins={"rope_origin": "target"})
    decoder = replace(own.spec.decoder, rope=target.config.rope)
    twin = Head(replace(own.spec, decoder=decoder), own.tensors)
    assert decoder.rope.theta != own.spec.decoder.rope.theta
    tapped = states_of(target, TEXT)[1][list(BOUNDARIES)]
    first, second, third = (
        teacher_forced(EagleNetwork(head, target), TEXT, tapped, 1)[0]
        for head in (pinned, twin, own)
    )
    assert torch.equal(first, second)
    assert not torch.allclose(first[:, DRAFT_IDS], third[:, DRAFT_IDS], atol=1e-3)


def test_a_windowed_layer_sees_the_last_rows_only(tmp_path):
    head = eagle3(tmp_path)
    decoder = replace(head.spec.decoder, windows=(3,))
    network = EagleNetwork(
        Head(replace(head.spec, decoder=decoder), head.tensors), target_decoder()
    )
    tapped = states_of(target_decoder(), TEXT)[1][list(BOUNDARIES)]
    changed = tapped.clone()
    changed[:, 4] += 1.0
    first, second = (teacher_forced(network, TEXT, t, 1)[0] for t in (tapped, changed))
    differs = [not torch.equal(a, b) for a, b in zip(first, second, strict=True)]
    assert differs == [4 <= row < 7 for row in range(13)]


@pytest.mark.parametrize("name", ["embedding", "lm_head"])
def test_a_part_of_another_width_is_refused(tmp_path, name):
    head = eagle3(tmp_path, hidden=8, pins={name: "target"})
    with pytest.raises(ConfigError, match=f"convention {name}='target': the target's is 16 wide"):
        EagleNetwork(head, target_decoder())


def test_half_precision_runs(tmp_path):
    target = target_decoder("torch")
    network = EagleNetwork(eagle3(tmp_path), target)
    half = replace(target.spec, dtype=torch.bfloat16)

    class Half:
        spec, ops = half, target.ops
        forward = forward_tapped = None
        final_norm = staticmethod(lambda x: target.final_norm(x.float()).bfloat16())
        embed = staticmethod(lambda x: target.embed(x).bfloat16())
        head = staticmethod(lambda x: target.head(x.float()))

    tapped = states_of(target, TEXT)[1][list(BOUNDARIES)]
    small = EagleNetwork(eagle3(tmp_path), Half())
    exact, rough = (
        teacher_forced(net, TEXT, states, 2)[1][:, DRAFT_IDS]
        for net, states in ((network, tapped), (small, tapped.bfloat16()))
    )
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, rtol=0.2, atol=0.2)
