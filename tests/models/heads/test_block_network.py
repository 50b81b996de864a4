"""BlockNetwork against the slow reference: every convention, mixed lengths, every finish."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from outrider.cache.pool import KVPool
from outrider.cache.table import BlockManager
from outrider.errors import ConfigError
from outrider.models.decoder import Decoder
from outrider.models.heads.block_network import BlockNetwork
from outrider.models.heads.block_weights import decoder_config
from outrider.models.heads.load import load_head
from outrider.models.heads.network import HeadPiece, HeadRunner
from outrider.models.heads.spec import Head
from outrider.step import EMPTY_TREE
from outrider.testing import tiny_decoder
from tests.models.heads.block_reference import ReferenceBlock
from tests.models.heads.layouts import (
    BLOCK_DECODER,
    DSPARK_NAMES,
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    TARGET,
    VD,
    H,
    L,
    Random,
    V,
    maps,
    random_block,
    random_dspark,
    renamed,
    save,
    speculators_block_config,
    write,
)

BLOCK = 8
TEXT = [(7 * i * i + 3 * i) % (V - 1) for i in range(60)]
LENGTHS = (1, 2, 6, 18, 19, 41, 60)  # tokens; one less are context
FULL, SLIDING = "full_attention", "sliding_attention"
OWN_HEAD = {"lm_head.weight": Random(3)(V, H)}
MAPPED = {"lm_head.weight": Random(3)(VD, H)} | maps()
BIASES = {
    f"layers.{i}.self_attn.{name}_proj.bias": Random(40 + i)(width)
    for i in range(2)
    for name, width in (
        ("q", HEADS * HEAD_DIM),
        ("k", KV_HEADS * HEAD_DIM),
        ("v", KV_HEADS * HEAD_DIM),
        ("o", H),
    )
}


def the_target(**options: Any) -> Decoder:
    return tiny_decoder(
        5,
        hidden_size=H,
        vocab_size=V,
        num_hidden_layers=L,
        num_attention_heads=4,
        rope_theta=300.0,
        tie_word_embeddings=False,
        **options,
    )


@pytest.fixture(scope="module", params=["auto", "torch"])
def target(request: pytest.FixtureRequest) -> Decoder:
    return the_target(kernels=request.param)


def loaded(
    folder: Path,
    tensors: dict[str, Tensor] | None = None,
    *,
    pins: dict[str, Any] | None = None,
    decoder: dict[str, Any] | None = None,
    mask: Tensor | None = None,
    **config: Any,
) -> Head:
    body = random_block() | (tensors or {})
    values = speculators_block_config(
        "dspark" if "markov.w1" in body else "dflash",
        transformer_layer_config={**BLOCK_DECODER, **(decoder or {})},
        **config,
    )
    write(folder, values, renamed(body, *DSPARK_NAMES))
    if mask is not None:
        save(folder / "mask_embedding.pt", {"embedding": mask, "mask_token_id": 39})
    return load_head(folder, TARGET, pins=pins or {})


class Rig:
    """A network over a pool, with the context of some texts in it."""

    def __init__(
        self, head: Head, target: Decoder, texts: list[list[int]], chunk: int = 99
    ) -> None:
        self.network = BlockNetwork(head, target, target.ops)
        spec = self.network.spec
        self.pool = KVPool(spec.kv_shapes, 128, 4, spec.dtype, spec.device)
        self.runner = HeadRunner(self.network, self.pool)
        manager = BlockManager(128, 4)
        manager.open([0])
        self.texts = texts
        self.tables = [manager.open([0])[0] for _ in texts]
        for table, text in zip(self.tables, texts, strict=True):
            assert manager.reserve(table, len(text) - 1)
        self._write(ReferenceBlock(head, target), chunk)

    def _write(self, reference: ReferenceBlock, chunk: int) -> None:
        """All texts side by side, so many rows of each at once."""
        whole = [reference.features(text[:-1]) for text in self.texts]
        for start in range(0, max(len(text) for text in self.texts), chunk):
            pieces = []
            for table, text, features_SF in zip(self.tables, self.texts, whole, strict=True):
                part_RF = features_SF[start : start + chunk]
                if len(part_RF):
                    rows = self.network.read(self._tapped(part_RF, reference))
                    tokens = text[start : start + len(part_RF)]
                    pieces.append(HeadPiece(table, start, tokens, EMPTY_TREE, rows, False))
            if pieces:
                self.runner.run(pieces)

    def _tapped(self, features_RF: Tensor, reference: ReferenceBlock) -> Tensor:
        """As the target hands them out: one tensor for each boundary, rising."""
        layers = reference.spec.conventions.feature_layers
        parts = features_RF.chunk(len(layers), dim=-1)
        by_layer = dict(zip(layers, parts, strict=True))
        assert self.network.boundaries == tuple(sorted(by_layer))
        return torch.stack([by_layer[boundary] for boundary in self.network.boundaries])

    def draft(self, depth: int, rows: list[int] | None = None) -> Tensor:
        """logits_BKV of these texts, without a finish."""
        chosen = range(len(self.texts)) if rows is None else rows
        output = self.network.draft(
            [self.texts[row][-1] for row in chosen],
            [self.tables[row] for row in chosen],
            [len(self.texts[row]) - 1 for row in chosen],
            depth,
            self.pool.layers,
        )
        return self.network.scatter(output.logits_RU).unflatten(0, (-1, depth))


def close(made: Tensor, expected: Tensor) -> bool:
    """Equal to 1e-5 of the largest logit, -inf where the other is."""
    is_known = expected.isfinite()
    if not torch.equal(is_known, made.isfinite()):
        return False
    scale = float(expected[is_known].abs().max().clamp(min=1.0))
    return float((made - expected)[is_known].abs().max()) < 1e-5 * scale


def texts_of(lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    return [TEXT[60 - length :] for length in lengths]


CASES: dict[str, dict[str, Any]] = {
    "as published": {},
    "causal": {"is_causal": True},
    "a window on one layer": {
        "decoder": {"layer_types": [FULL, SLIDING], "sliding_window": 5},
    },
    "a window that sees ahead": {
        "decoder": {"layer_types": [SLIDING, FULL], "sliding_window": 5},
        "sliding_window_non_causal": True,
    },
    "masks by layer": {"pins": {"block_masks": ("causal", "bidirectional")}},
    "from the anchor": {"sample_from_anchor": True},
    "neighbours turn": {"pins": {"rope_style": "interleaved"}},
    "half of a head turns": {"decoder": {"partial_rotary_factor": 0.5}},
    "neighbours in half a head": {
        "decoder": {"partial_rotary_factor": 0.5},
        "pins": {"rope_style": "interleaved"},
    },
    "the target's frequencies": {"pins": {"rope_origin": "target"}},
    "gains of one plus": {"pins": {"norm_gain": "one-plus-weight"}},
    "layers the other way round": {"pins": {"feature_layers": (6, 2)}},
    "last and first boundary": {"pins": {"feature_layers": (L, 0)}},
    "its own embedding": {
        "tensors": {"embed_tokens.weight": Random(8)(V + 2, H)},
        "mask_token_id": V + 1,
    },
    "the target's embedding": {
        "tensors": {"embed_tokens.weight": Random(8)(V, H)},
        "pins": {"embedding": "target"},
    },
    "an embedding for the mask": {"mask": Random(9)(H)},
    "its own head": {"tensors": OWN_HEAD},
    "fewer tokens": {"tensors": MAPPED, "draft_vocab_size": VD},
    "fewer tokens of the target's head": {
        "tensors": MAPPED,
        "draft_vocab_size": VD,
        "pins": {"lm_head": "target"},
    },
    "scaled": {"logit_scale": 0.25},
    "biases": {"tensors": BIASES, "decoder": {"attention_bias": True}},
}


@pytest.mark.parametrize("case", CASES)
def test_slots_of_all_lengths_are_the_references(
    tmp_path: Path, target: Decoder, case: str
) -> None:
    head = loaded(tmp_path, **CASES[case])
    texts, reference = texts_of(), ReferenceBlock(head, target)
    rig = Rig(head, target, texts)
    depth = rig.network.num_drafts
    assert depth == BLOCK - (not head.spec.conventions.sample_from_anchor)
    made_BKV = rig.draft(depth)
    for text, made_KV in zip(texts, made_BKV, strict=True):
        _, logits_TU = reference.block(text)
        for at, made_V in enumerate(made_KV):
            expected_V = reference.scattered(logits_TU[reference.slot(at + 1)])
            assert close(made_V, expected_V), (case, len(text), at)


DIFFERENT = [case for case in CASES if case not in ("as published", "the target's embedding")]


@pytest.mark.parametrize("case", DIFFERENT)
def test_every_convention_shows(tmp_path: Path, case: str) -> None:
    """Else the comparison above would prove nothing about it."""
    target = the_target()
    usual = ReferenceBlock(loaded(tmp_path / "u"), target).logits(TEXT, [])
    other = ReferenceBlock(loaded(tmp_path / "o", **CASES[case]), target).logits(TEXT, [])
    assert not torch.allclose(usual, other, atol=1e-3)


def test_an_embedding_that_is_pinned_to_the_targets_is_not_looked_at(tmp_path: Path) -> None:
    target = the_target()
    usual = ReferenceBlock(loaded(tmp_path / "u"), target).logits(TEXT, [])
    case = CASES["the target's embedding"]
    pinned = ReferenceBlock(loaded(tmp_path / "o", **case), target).logits(TEXT, [])
    assert torch.equal(usual, pinned)


def test_context_in_pieces_and_company_change_nothing(tmp_path: Path, target: Decoder) -> None:
    head = loaded(tmp_path)
    whole = Rig(head, target, texts_of())
    made_BKV = whole.draft(7)
    assert close(Rig(head, target, texts_of(), chunk=5).draft(7), made_BKV)
    for row in range(len(LENGTHS)):
        assert close(whole.draft(7, [row])[0], made_BKV[row])
    some = [5, 0, 3]
    assert close(whole.draft(7, some), made_BKV[some])


def test_blocks_leave_nothing_behind(tmp_path: Path, target: Decoder) -> None:
    rig = Rig(loaded(tmp_path), target, texts_of())
    before = [part.clone() for layer in rig.pool.layers for part in layer]
    rig.draft(7)
    after = [part for layer in rig.pool.layers for part in layer]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_block_is_run_whole_unless_no_slot_sees_later_ones(
    tmp_path: Path, target: Decoder
) -> None:
    """Fewer depths of a bidirectional block are the same depths; a causal one costs less."""
    sizes: list[int] = []
    for name, causal in (("b", False), ("c", True)):
        rig = Rig(loaded(tmp_path / name, is_causal=causal), target, texts_of())
        whole_BKV, lengths = rig.draft(7), []
        norm = rig.network._layers[0]._norm

        def noted(hidden_ND: Tensor, norm: Any = norm, lengths: list[int] = lengths) -> Tensor:
            lengths.append(len(hidden_ND))
            return norm(hidden_ND)

        rig.network._layers[0]._norm = noted  # type: ignore[assignment]
        assert close(rig.draft(2), whole_BKV[:, :2])
        sizes += lengths
    assert sizes == [len(LENGTHS) * BLOCK, len(LENGTHS) * 3]


def dspark(kind: str, confidence: str = "state-and-token", rank: int = 6) -> dict[str, Tensor]:
    tensors = random_dspark(kind=kind, rank=rank)
    if confidence == "state":
        tensors["confidence.weight"] = Random(1)(1, H)
    if confidence == "none":
        tensors = {n: t for n, t in tensors.items() if not n.startswith("confidence")}
    return tensors


@pytest.mark.parametrize("kind", ["vanilla", "gated", "rnn"])
@pytest.mark.parametrize("confidence", ["none", "state", "state-and-token"])
@pytest.mark.parametrize("anchor", [False, True])
def test_a_finish_along_paths_is_the_references(
    tmp_path: Path, target: Decoder, kind: str, confidence: str, anchor: bool
) -> None:
    head = loaded(tmp_path, dspark(kind, confidence), sample_from_anchor=anchor)
    texts, reference = texts_of((2, 19)), ReferenceBlock(head, target)
    rig = Rig(head, target, texts)
    network = rig.network
    lengths = [len(text) - 1 for text in texts]
    roots = [text[-1] for text in texts]
    output = network.draft(roots, rig.tables, lengths, 4, rig.pool.layers)
    assert network.finish is not None
    memory_RM = torch.zeros(4, network.finish.memory_width)
    paths: list[list[int]] = [[], [], [], []]  # two of each text
    for depth in range(4):
        rows = [0, 0, 1, 1]
        previous = [path[-1] if path else roots[row] for row, path in zip(rows, paths, strict=True)]
        slots = [row * 4 + depth for row in rows]
        told = network.correct(output, slots, previous, memory_RM)
        for at, (row, path) in enumerate(zip(rows, paths, strict=True)):
            expected_V, sure = reference.told(texts[row], path)
            assert close(told.logits_RV[at], expected_V)
            assert (told.sure_R is None) == (sure is None) == (confidence == "none")
            if told.sure_R is not None:
                assert float(told.sure_R[at]) == pytest.approx(sure, abs=1e-6)
        paths = [[*path, (11 * at + 5 * depth) % V] for at, path in enumerate(paths)]
        memory_RM = told.memory_RM


def test_a_finish_with_biases_and_fewer_tokens(tmp_path: Path, target: Decoder) -> None:
    """Some trainers give the gate a bias."""
    tensors = dspark("rnn") | {"markov.w2": Random(5)(VD, 6)} | MAPPED
    head = loaded(tmp_path, tensors, draft_vocab_size=VD)
    biased = Head(head.spec, head.tensors | {"markov.joint.bias": Random(6)(18)})
    reference, text = ReferenceBlock(biased, target), texts_of((19,))[0]
    rig = Rig(biased, target, [text])
    output = rig.network.draft([text[-1]], rig.tables, [18], 2, rig.pool.layers)
    told = rig.network.correct(output, [0], [text[-1]], torch.zeros(1, 6))
    assert close(told.logits_RV[0], reference.logits(text, []))
    told = rig.network.correct(output, [1], [12], told.memory_RM)
    assert close(told.logits_RV[0], reference.logits(text, [12]))
    assert int(told.logits_RV[0].isfinite().sum()) == VD


def test_it_runs_in_bfloat16(tmp_path: Path) -> None:
    from outrider.models.config import DecoderConfig
    from outrider.models.weights import tensor_shapes
    from outrider.ops.torch import TorchOps

    config, random = the_target().config, Random(4)
    assert isinstance(config, DecoderConfig)
    tensors = {name: random(*shape) for name, shape in tensor_shapes(config).items()}
    target = Decoder(config, tensors, TorchOps(), dtype=torch.bfloat16)
    head = loaded(
        tmp_path, dspark("rnn"), decoder={"layer_types": [FULL, SLIDING], "sliding_window": 5}
    )
    rig = Rig(head, target, texts_of())
    roots, lengths = [text[-1] for text in rig.texts], [len(text) - 1 for text in rig.texts]
    output = rig.network.draft(roots, rig.tables, lengths, 3, rig.pool.layers)
    memory = torch.zeros(len(roots), 6, dtype=torch.bfloat16)
    told = rig.network.correct(output, list(range(0, 21, 3)), roots, memory)
    assert told.logits_RV.dtype == torch.float32
    assert told.logits_RV.isfinite().all()
    assert told.memory_RM.dtype == torch.bfloat16


class Foreign:
    """A target of another implementation, which shows states but not how it turns heads."""

    def __init__(self, target) -> None:
        self._target = target

    def __getattr__(self, name: str) -> Any:
        return getattr(self._target, name)


def test_the_targets_frequencies_turn_heads_of_another_width(tmp_path: Path) -> None:
    """By its theta, as in EAGLE heads; how many values of a head turn is the head's own affair."""
    own = loaded(tmp_path)
    turned = replace(own.spec, conventions=replace(own.spec.conventions, rope_origin="target"))
    wide = tiny_decoder(
        hidden_size=H, vocab_size=V, num_hidden_layers=L, head_dim=8, rope_theta=77.0
    )
    rope = decoder_config(turned, wide).rope
    assert (rope.theta, rope.width) == (77.0, own.spec.decoder.head_dim)
    assert BlockNetwork(Head(turned, own.tensors), wide, wide.ops).num_drafts


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    target = the_target()
    own = loaded(tmp_path, **CASES["its own embedding"])
    chosen = replace(own.spec.conventions, embedding="target")
    with pytest.raises(ConfigError, match=r"mask_token_id=41 is beyond the 40 tokens of 'tiny-5'"):
        BlockNetwork(Head(replace(own.spec, conventions=chosen), own.tensors), target, target.ops)
    turned = replace(own.spec, conventions=replace(own.spec.conventions, rope_origin="target"))
    with pytest.raises(ConfigError, match=r"rope_origin='target': .* the lean decoder"):
        BlockNetwork(Head(turned, own.tensors), Foreign(target), target.ops)
    narrow = replace(own.spec, widths=replace(own.spec.widths, hidden=8))
    with pytest.raises(ConfigError, match=r"lm_head='target': the head is 8 wide, its target 16"):
        BlockNetwork(Head(narrow, own.tensors), target, target.ops)
