"""Rope tables against `transformers`, for every scaling and both styles of config."""

from typing import Any

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from outrider.errors import ModelError
from outrider.models.rope import RopeTable, rotate_
from outrider.models.rope_scaling import inverse_frequencies, read_rope
from outrider.ops.base import Span
from outrider.ops.torch import TorchOps

HEAD_DIM = 64
MAX_POSITIONS = 8192
SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 2.5},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 1024,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 2048},
    "yarn-tuned": {
        "factor": 16.0,
        "original_max_position_embeddings": 512,
        "beta_fast": 16,
        "beta_slow": 2,
        "attention_factor": 1.3,
        "truncate": False,
    },
    "yarn-mscale": {
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "mscale": 0.7,
        "mscale_all_dim": 1.0,
    },
    "longrope": {
        "short_factor": [1.0 + i / 8 for i in range(HEAD_DIM // 2)],
        "long_factor": [2.0 + i for i in range(HEAD_DIM // 2)],
        "original_max_position_embeddings": 1024,
    },
}


def read(values: dict[str, Any], head_dim: int = HEAD_DIM) -> Any:
    return read_rope(values, head_dim=head_dim, max_positions=MAX_POSITIONS)


@pytest.mark.parametrize("theta", [10000.0, 500000])
@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_are_those_of_transformers(name: str, theta: float) -> None:
    kind = name.split("-")[0]
    parameters = {"rope_type": kind, "rope_theta": theta, **SCALINGS[name]}
    config = transformers.LlamaConfig(
        head_dim=HEAD_DIM, max_position_embeddings=MAX_POSITIONS, rope_parameters=dict(parameters)
    )
    expected_F, attention_factor = ROPE_INIT_FUNCTIONS[kind](config)
    ours = read({"rope_parameters": parameters})
    torch.testing.assert_close(inverse_frequencies(ours), expected_F, rtol=2e-7, atol=0)
    assert ours.attention_factor == pytest.approx(attention_factor, rel=1e-12)


def test_default_frequencies() -> None:
    ours_F = inverse_frequencies(read({"rope_theta": 100.0}, head_dim=4))
    torch.testing.assert_close(ours_F, torch.tensor([1.0, 0.1]))


@pytest.mark.parametrize("name", ["linear", "llama3", "yarn", "longrope"])
def test_old_style_means_the_same(name: str) -> None:
    old = {"rope_theta": 5e5, "rope_scaling": {"type": name, **SCALINGS[name]}}
    new = {"rope_parameters": {"rope_type": name, "rope_theta": 5e5, **SCALINGS[name]}}
    assert read(old) == read(new)


@pytest.mark.parametrize("scaling", [None, {}])
def test_no_scaling(scaling: Any) -> None:
    ours = read({"rope_theta": 5e5, "rope_scaling": scaling})
    assert (ours.kind, ours.theta, ours.max_positions) == ("default", 5e5, MAX_POSITIONS)


def test_longrope_ends_where_its_long_factors_begin() -> None:
    assert read({"rope_parameters": {"rope_type": "longrope", **SCALINGS["longrope"]}}
                ).max_positions == 1024  # fmt: skip
    same = {**SCALINGS["longrope"], "long_factor": SCALINGS["longrope"]["short_factor"]}
    assert read({"rope_parameters": {"rope_type": "longrope", **same}}).max_positions == 8192


def test_yarn_reaches_as_far_as_it_stretches() -> None:
    given = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192}
    assert read({"rope_scaling": given}).max_positions == 32768


def test_pretraining_context_beside_the_rope_parameters_counts() -> None:
    values = {
        "rope_scaling": {"type": "yarn", "factor": 2.0},
        "original_max_position_embeddings": 512,
    }
    assert read(values).original_max_positions == 512


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rope_type": "spiral"}, r"rope type 'spiral' is not known \(known: default, dynamic"),
        ({"rope_type": "linear"}, r"rope parameters of type 'linear' lack 'factor'"),
        ({"rope_type": "llama3", "factor": 8.0}, r"'llama3' lack 'low_freq_factor'"),
        ({"mrope_section": [1, 2, 3]}, r"rope parameter 'mrope_section' is not known"),
        ({"full_attention": {"rope_theta": 1.0}}, r"rope parameters differ by layer type"),
        (
            {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]},
            r"short_factor has 1 values, the rope needs 32",
        ),
    ],
)
def test_refusals(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        read({"rope_parameters": given})


def test_rope_parameters_that_are_no_mapping() -> None:
    with pytest.raises(ModelError, match=r"rope parameters must be a mapping, got 'linear'"):
        read({"rope_scaling": "linear"})


def test_a_grown_table_keeps_its_bits() -> None:
    ops, device = TorchOps(), torch.device("cpu")
    table = RopeTable(read({"rope_theta": 1e4}), dtype=torch.float32, device=device)
    early = ops.layout([Span(list(range(40)), 0, 40)], device)
    late = ops.layout([Span(list(range(3001)), 3000, 1)], device)
    before = table.at(early)
    table.at(late)
    after = table.at(early)
    assert torch.equal(before.cos, after.cos)
    assert torch.equal(before.sin, after.sin)


def test_rotate_leaves_the_rest_of_a_head_alone() -> None:
    device = torch.device("cpu")
    table = RopeTable(read({"rope_theta": 1e4}, head_dim=4), dtype=torch.float32, device=device)
    turn = table.at(TorchOps().layout([Span([0, 1], 1, 1)], device))
    heads_NJD = torch.arange(6.0).view(1, 1, 6)
    rotated = rotate_(heads_NJD.clone(), turn)[0, 0]
    cos, sin = torch.tensor([1.0, 0.01]).cos(), torch.tensor([1.0, 0.01]).sin()
    x, y = torch.tensor([0.0, 1.0]), torch.tensor([2.0, 3.0])
    torch.testing.assert_close(rotated[:2], x * cos - y * sin)
    torch.testing.assert_close(rotated[2:4], y * cos + x * sin)
    assert rotated[4:].tolist() == [4.0, 5.0]
