"""The reference head against a transformers layer where they coincide, and its switches."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaModel

from outrider.models.heads.load import load_head
from outrider.models.heads.spec import Head
from tests.models.heads.layouts import (
    EAGLE3_WRITERS,
    TARGET,
    H,
    Random,
    V,
    random_eagle3,
)
from tests.models.heads.reference import ReferenceEagle3

NUM_ROWS = 7
TOKENS = torch.arange(NUM_ROWS) * 5 % V
FEATURES = Random(11)(NUM_ROWS, 3 * H)


def switched(head: Head, **conventions: Any) -> Head:
    chosen = replace(head.spec.conventions, **conventions)
    return Head(replace(head.spec, conventions=chosen), head.tensors)


@pytest.fixture
def head(tmp_path: Path) -> Head:
    made = random_eagle3(num_layers=2, input_norm="each")
    return load_head(EAGLE3_WRITERS["specforge"](tmp_path, made), TARGET)


@pytest.mark.parametrize("layout", EAGLE3_WRITERS)
def test_every_layout_computes_the_same(tmp_path: Path, layout: str) -> None:
    made = random_eagle3(input_norm="all")
    loaded = load_head(EAGLE3_WRITERS[layout](tmp_path / layout, made), TARGET)
    first = load_head(EAGLE3_WRITERS["eagle"](tmp_path / "first", made), TARGET)
    ours = ReferenceEagle3(loaded).draft(FEATURES, TOKENS, 3)
    theirs = ReferenceEagle3(first).draft(FEATURES, TOKENS, 3)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_later_layers_are_those_of_transformers(head: Head) -> None:
    """With a first layer that passes its input on, the head is a Llama of one layer."""
    tensors = dict(head.tensors)
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        tensors[f"layers.0.{name}.weight"] = torch.zeros_like(tensors[f"layers.0.{name}.weight"])
    decoder = head.spec.decoder
    assert decoder is not None
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=H,
        intermediate_size=decoder.intermediate_size,
        num_hidden_layers=1,
        num_attention_heads=decoder.num_heads,
        num_key_value_heads=decoder.num_kv_heads,
        head_dim=decoder.head_dim,
        rms_norm_eps=decoder.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": decoder.rope.theta},
        attn_implementation="eager",
    )
    model = LlamaModel(config).eval()
    own = {n.replace("layers.1.", "layers.0."): t for n, t in tensors.items() if "layers.1." in n}
    own |= {"norm.weight": tensors["norm.weight"], "embed_tokens.weight": torch.zeros(V, H)}
    model.load_state_dict(own)
    reference = ReferenceEagle3(Head(head.spec, tensors))
    inputs = reference.fuse(FEATURES)
    with torch.no_grad():
        theirs = model(inputs_embeds=inputs[None]).last_hidden_state[0]
    ours = ReferenceEagle3(switched(Head(head.spec, tensors), feedback="post-norm"))
    assert torch.allclose(ours.rows(inputs, TOKENS).feedback_TD, theirs, atol=1e-5)


def test_rows_see_only_what_came_before(head: Head) -> None:
    reference = ReferenceEagle3(head)
    whole = reference.rows(reference.fuse(FEATURES), TOKENS).logits_TV
    part = reference.rows(reference.fuse(FEATURES[:4]), TOKENS[:4]).logits_TV
    assert torch.allclose(whole[:4], part, atol=1e-6)


SWITCHES: list[tuple[dict[str, Any], int]] = [
    ({"norm_before_residual": True}, 0),
    ({"input_norm": "none"}, 0),
    ({"rope_style": "interleaved"}, 0),
    ({"norm_gain": "one-plus-weight"}, 0),
    ({"feedback": "post-norm"}, 1),
]


@pytest.mark.parametrize(("switch", "depth"), SWITCHES)
def test_every_switch_shows_at_its_depth(head: Head, switch: dict[str, Any], depth: int) -> None:
    """Feedback is first read by the second token; all others change the first."""
    declared = ReferenceEagle3(head).draft(FEATURES, TOKENS, 2)
    other = ReferenceEagle3(switched(head, **switch)).draft(FEATURES, TOKENS, 2)
    differs = [not torch.allclose(a, b, atol=1e-4) for a, b in zip(declared, other, strict=True)]
    assert differs[: depth + 1] == [False] * depth + [True]


def test_borrowed_weights_are_the_targets_rows(tmp_path: Path) -> None:
    made = random_eagle3()
    full = Random(4)(V, H)
    own = dict(made.tensors) | {"lm_head.weight": full[list(made.ids)]}
    with_own = load_head(
        EAGLE3_WRITERS["eagle"](tmp_path / "o", replace(made, tensors=own)), TARGET
    )
    bare = {n: t for n, t in made.tensors.items() if n != "lm_head.weight"}
    without = load_head(
        EAGLE3_WRITERS["eagle"](tmp_path / "b", replace(made, tensors=bare)), TARGET
    )
    ours = ReferenceEagle3(with_own).draft(FEATURES, TOKENS, 2)
    theirs = ReferenceEagle3(without, lm_head_VD=full).draft(FEATURES, TOKENS, 2)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
