"""MTP modules over a KV pool against whole sequences computed from the formulas.

Shape legend: T rows, H hidden width, V vocabulary.
"""

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from outrider.cache.pool import KVPool
from outrider.cache.table import BlockManager, BlockTable
from outrider.errors import ConfigError
from outrider.models.config import DecoderConfig
from outrider.models.decoder import Decoder
from outrider.models.heads.load import load_head
from outrider.models.heads.mtp_network import MTPNetwork, MTPRunner
from outrider.models.heads.mtp_turns import own_rows, parent_slots
from outrider.models.heads.network import HeadPiece, HeadRunner
from outrider.models.heads.spec import Head
from outrider.ops.base import Ops, Span
from outrider.ops.choose import choose
from outrider.ops.torch import TorchOps
from outrider.step import EMPTY_TREE, DraftTree, TargetOutput
from tests.models.heads.layouts import (
    DECODER,
    DEEPSEEK_PARTS,
    PROJECTED_PARTS,
    QWEN_NAMES,
    ROPE,
    TARGET,
    TARGET_CONFIG,
    H,
    L,
    V,
    mtp_names,
    random_mtp,
    random_target,
    renamed,
    write,
)
from tests.models.heads.mtp_reference import ReferenceMTP, dense_layer

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
ONE = {"num_nextn_predict_layers": 1}
FAMILIES: dict[str, dict[str, bool]] = {
    "llama": {},
    "qwen2": {"has_bias": True},
    "qwen3": {"has_qk_norm": True},
}


def deepseek(folder: Path, num_modules: int = 1, **pins: Any) -> "Pair":
    made = random_mtp(num_modules=num_modules, own_vocabulary=True)
    names = mtp_names(made, "model.layers.{}.", DEEPSEEK_PARTS, first=L)
    return native(folder, names, {"num_nextn_predict_layers": num_modules}, "llama", pins)


def qwen(folder: Path, **pins: Any) -> "Pair":
    made = random_mtp(has_qk_norm=True)
    return native(folder, renamed(made, *QWEN_NAMES), ONE, "qwen3", pins)


def mimo(folder: Path, num_modules: int = 1, **pins: Any) -> "Pair":
    made = random_mtp(has_bias=True, num_modules=num_modules)
    names = mtp_names(made, "model.mtp_layers.{}.", PROJECTED_PARTS)
    return native(folder, names, {"num_nextn_predict_layers": num_modules}, "qwen2", pins)


def speculators(folder: Path, **pins: Any) -> "Pair":
    names = mtp_names(random_mtp(), "mtp_layers.{}.", PROJECTED_PARTS)
    target = write(folder / "t", TARGET_CONFIG, random_target())
    config = {"speculators_model_type": "mtp", "transformer_layer_config": {**DECODER, **ROPE}}
    head = load_head(write(folder / "m", config, names), replace(TARGET, folder=target), pins=pins)
    return Pair(head, "llama", random_target())


def native(
    folder: Path,
    modules: Mapping[str, Tensor],
    config: Mapping[str, Any],
    family: str,
    pins: Mapping[str, Any],
) -> "Pair":
    """Modules in the files of a target."""
    target = random_target(**FAMILIES[family])
    written = write(
        folder, {**TARGET_CONFIG, **config, "model_type": family}, {**target, **modules}
    )
    return Pair(load_head(written, replace(TARGET, family=family), pins=pins), family, target)


LAYOUTS = {"deepseek": deepseek, "qwen": qwen, "mimo": mimo, "speculators": speculators}


class Pair:
    """A head with its target, and the reference of the head."""

    def __init__(self, head: Head, family: str, tensors: dict[str, Tensor]) -> None:
        config = DecoderConfig.from_dict({**TARGET_CONFIG, "model_type": family})
        self.head = head
        self._config, self._tensors = config, tensors
        self.reference = ReferenceMTP(head, tensors, dense_layer(head, config), config.norm_eps)

    def network(self, ops: Ops, dtype: torch.dtype = torch.float32) -> MTPNetwork:
        return MTPNetwork(
            self.head, Decoder(self._config, dict(self._tensors), ops, dtype=dtype), ops
        )


class Drafting:
    """One sequence whose rows a network runs over a pool that others share."""

    def __init__(
        self,
        runner: HeadRunner,
        manager: BlockManager,
        length: int,
        seed: int,
        hidden: int = H,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.raw_TH = torch.randn(length, hidden, generator=generator).to(runner.network.spec.dtype)
        self.tokens = torch.randint(V, (length + 1,), generator=generator).tolist()
        self.table: BlockTable = manager.open([], "")[0]
        manager.reserve(self.table, length + 40)
        self.inputs = runner.network.read(self.raw_TH[None])

    def piece(self, start: int, stop: int, tree: DraftTree, nodes: Sequence[Tensor]) -> HeadPiece:
        inputs = torch.cat([self.inputs[start:stop], *(row[None] for row in nodes)])
        chain = self.tokens[start + 1 : stop + 1]
        return HeadPiece(self.table, start, chain, tree, inputs, stop == len(self.raw_TH))


def pooled(network: MTPNetwork, block_size: int = 4) -> tuple[HeadRunner, BlockManager]:
    spec = network.spec
    pool = KVPool(spec.kv_shapes, 256, block_size, spec.dtype, spec.device)
    return HeadRunner(network, pool), BlockManager(256, block_size)


def line(runner: HeadRunner, sequences: list[Drafting], paths: list[list[int]]) -> list[Tensor]:
    """logits_BV after the logs and then after each token of the paths, a pass a token."""
    pieces = [s.piece(0, len(s.raw_TH), EMPTY_TREE, ()) for s in sequences]
    found = []
    for step in range(len(paths[0]) + 1):
        output, feedback = runner.run(pieces)
        found.append(output.logits_NV)
        ends = torch.tensor([len(piece.chain) for piece in pieces]).cumsum(0) - 1
        pieces = [
            HeadPiece(
                s.table,
                len(s.raw_TH) + step,
                path[step : step + 1],
                EMPTY_TREE,
                feedback[[end]],
                True,
            )
            for s, path, end in zip(sequences, paths, ends.tolist(), strict=True)
            if step < len(path)
        ]
    return found


def tree_logits(runner: HeadRunner, sequence: Drafting, tree: DraftTree) -> Tensor:
    """Of the root and all nodes; level by level, as a drafter grows it."""
    length = len(sequence.raw_TH)
    runner.run([sequence.piece(0, length, EMPTY_TREE, ())])
    fed: list[Tensor] = []
    feedback = runner.run([sequence.piece(length - 1, length, EMPTY_TREE, ())])[1]
    for depth in range(1, 1 + max(map(tree.depth, range(len(tree))))):
        count = sum(tree.depth(node) <= depth for node in range(len(tree)))
        fed += [feedback[tree.parents[node] + 1] for node in range(len(fed), count)]
        nodes = DraftTree(tokens=tree.tokens[:count], parents=tree.parents[:count])
        output, feedback = runner.run([sequence.piece(length - 1, length, nodes, fed)])
    return output.logits_NV


# Nodes in the order of their depths.
TREE = DraftTree(tokens=(5, 9, 17, 5, 30, 2, 7, 31), parents=(-1, -1, 0, 0, 1, 2, 4, 6))


def pairs_of(folder: Path) -> dict[str, Pair]:
    found = {name: make(folder / name) for name, make in LAYOUTS.items()}
    found["two modules"] = deepseek(folder / "2", 2)
    found["three modules"] = mimo(folder / "3", 3)
    return found


KINDS = (*LAYOUTS, "two modules", "three modules")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    return pairs_of(tmp_path_factory.mktemp("mtp"))


@pytest.fixture(params=["cpu", "torch"])
def ops(request: pytest.FixtureRequest) -> Ops:
    return choose() if request.param == "cpu" else TorchOps()


@pytest.mark.parametrize("kind", KINDS)
def test_chains_side_by_side(pairs: dict[str, Pair], ops: Ops, kind: str) -> None:
    """Five steps, further than there are modules; logs of several lengths, one of a single row."""
    pair = pairs[kind]
    runner, manager = pooled(pair.network(ops))
    lengths = (11, 4, 17, max(1, pair.reference.num_modules - 1))
    sequences = [Drafting(runner, manager, n, seed) for seed, n in enumerate(lengths)]
    paths = [[(7 * step + 3 * n) % V for step in range(5)] for n in lengths]
    found = line(runner, sequences, paths)
    for row, (sequence, path) in enumerate(zip(sequences, paths, strict=True)):
        if len(sequence.raw_TH) < pair.reference.num_modules:
            continue  # modules that do not begin yet have no law here
        expected = pair.reference.draft(sequence.raw_TH, sequence.tokens, path)
        for step, logits in enumerate(expected):
            torch.testing.assert_close(found[step][row], logits, **TOLERANCE)


@pytest.mark.parametrize("kind", KINDS)
def test_trees(pairs: dict[str, Pair], ops: Ops, kind: str) -> None:
    pair = pairs[kind]
    runner, manager = pooled(pair.network(ops))
    sequence = Drafting(runner, manager, 9, 3)
    found = tree_logits(runner, sequence, TREE)
    for node in range(-1, len(TREE)):
        path = TREE.path_tokens(node)
        expected = pair.reference.draft(sequence.raw_TH, sequence.tokens, path)[-1]
        torch.testing.assert_close(found[node + 1], expected, **TOLERANCE)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cuts", [(1, 2, 3, 4, 5), (3, 7), (8,)])
def test_cut_into_passes_with_drafts_that_fell_between(
    pairs: dict[str, Pair], kind: str, cuts: tuple[int, ...]
) -> None:
    """Rows that a rejected draft left behind are written over, whatever modules wrote them."""
    pair = pairs[kind]
    network = pair.network(choose())
    runner, manager = pooled(network)
    sequence = Drafting(runner, manager, 11, 4)
    junk = Drafting(runner, manager, 3, 5)
    for start, stop in zip((0, *cuts), (*cuts, 11), strict=True):
        piece = sequence.piece(start, stop, EMPTY_TREE, ())
        _, feedback = runner.run([piece, junk.piece(0, 3, EMPTY_TREE, ())])
        for step in range(3):
            row = feedback[[len(piece.chain) - 1]] if step == 0 else feedback[[0]]
            draft = HeadPiece(sequence.table, stop + step, [8 + step], EMPTY_TREE, row, True)
            output, feedback = runner.run([draft])
    expected = pair.reference.draft(sequence.raw_TH, sequence.tokens, [8, 9, 10])
    torch.testing.assert_close(output.logits_NV[0], expected[-1], **TOLERANCE)


SWITCHES: dict[str, dict[str, Any]] = {
    "pre-norm": {"feedback": "pre-norm"},
    "raw": {"input_state": "raw"},
    "embedding-first": {"concatenation": "embedding-first"},
    "feature-first": {"concatenation": "feature-first"},
    "zero": {"is_first_embedding_zero": True},
    "not zero": {"is_first_embedding_zero": False},
    "gain": {"norm_gain": "one-plus-weight"},
    "target's vocabulary": {"lm_head": "target", "embedding": "target"},
    "interleaved": {"rope_style": "interleaved"},
}


@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize("kind", ["deepseek", "qwen", "mimo"])
def test_every_convention_is_honoured(tmp_path: Path, kind: str, switch: str) -> None:
    plain, pair = LAYOUTS[kind](tmp_path / "a"), LAYOUTS[kind](tmp_path / "b", **SWITCHES[switch])
    found = []
    for one in (plain, pair):
        runner, manager = pooled(one.network(choose()))
        sequence = Drafting(runner, manager, 6, 7)
        found.append(torch.cat(line(runner, [sequence], [[4, 5]])))
        expected = torch.stack(one.reference.draft(sequence.raw_TH, sequence.tokens, [4, 5]))
        torch.testing.assert_close(found[-1], expected, **TOLERANCE)
    is_other = plain.head.spec.conventions != pair.head.spec.conventions
    assert torch.allclose(*found) != is_other, "a switch that switches nothing"


def test_frequencies_of_its_own_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="rope_origin='own'"):
        deepseek(tmp_path, rope_origin="own").network(choose())


@pytest.mark.parametrize("kind", KINDS)
def test_a_fused_pass_and_its_twin(pairs: dict[str, Pair], kind: str) -> None:
    network = pairs[kind].network(choose())
    found = []
    for one in (network, network.by_layer()):
        runner, manager = pooled(one)
        found.append(torch.cat(line(runner, [Drafting(runner, manager, 7, 1)], [[3, 1, 4]])))
    torch.testing.assert_close(*found, **TOLERANCE)


@pytest.mark.parametrize("kind", ["deepseek", "three modules"])
def test_half_width(pairs: dict[str, Pair], kind: str) -> None:
    """bfloat16 runs, and its greedy choices are those of float32 as a rule."""
    ops = TorchOps(batch_invariant=False)
    runner, manager = pooled(pairs[kind].network(ops, torch.bfloat16))
    sequence = Drafting(runner, manager, 9, 2)
    found = torch.cat(line(runner, [sequence], [[3, 1, 4, 1]]))
    expected = torch.stack(
        pairs[kind].reference.draft(sequence.raw_TH.float(), sequence.tokens, [3, 1, 4, 1])
    )
    assert found.dtype == torch.float32
    error = (found - expected).norm(dim=1) / expected.norm(dim=1)
    assert error.max() < 0.05


def test_rows_of_later_modules() -> None:
    """A table of two blocks of four slots; module 2 begins with row 2."""
    table = [3, 1]
    late, early = Span(table, 3, 2, (-1, 0), 4), Span(table, 1, 2, (-1,), 4)
    bare = Span(table, 0, 1, (-1,), 4)
    places = array("i", [14, 15, 4, 5, 6])
    assert own_rows([late], 2) == (None, [Span(places, 1, 2, (-1, 0))])
    rows, spans = own_rows([late, early, bare], 2)
    assert rows == [0, 1, 2, 3, 5, 6]
    assert spans[1] == Span(array("i", [14, 15]), 0, 1, (-1,))
    assert parent_slots([late, early, bare]) == [14, 15, 4, 5, 12, 13, 14, 12, 12]


class Telling(MTPRunner):
    """Says of pieces what drafters say; all logs have as many rows.

    Args:
        behind: sequences that begin behind a gap.
    """

    def __init__(self, network: MTPNetwork, pool: KVPool, length: int, behind: Sequence[int] = ()):
        super().__init__(network, pool)
        self._length, self._behind = length, behind

    def run(self, pieces: list[HeadPiece]) -> tuple[TargetOutput, Tensor]:
        told = [
            piece._replace(
                num_drafted=1 + piece.num_cached - self._length if piece.num_cached else 0,
                is_behind_gap=index in self._behind,
            )
            for index, piece in enumerate(pieces)
        ]
        return super().run(told)


@pytest.mark.parametrize("kind", ["two modules", "three modules"])
def test_whose_turn_it_is_is_not_asked_of_the_device(pairs: dict[str, Pair], kind: str) -> None:
    """Where the host says the step, that which stands beside the feature is not looked at."""
    network, found = pairs[kind].network(choose()), []
    for step in (0, 101):
        runner, manager = pooled(network)
        sequence = Drafting(runner, manager, 6, 1)
        sequence.inputs[:, -1] = step
        told = Telling(network, runner.pool, 6) if step else runner
        found.append(torch.cat(line(told, [sequence], [[3, 1, 4, 1]])))
    torch.testing.assert_close(*found, **TOLERANCE)


@pytest.mark.parametrize("num_modules", [1, 3])
def test_behind_a_gap_no_embedding_is_left_out(tmp_path: Path, num_modules: int) -> None:
    """The row in place 0 is not that of position 0 there; the sequence beside it has that."""
    found = {}
    for is_zero, behind in ((True, (0,)), (True, ()), (False, ())):
        folder = tmp_path / f"{is_zero}{len(behind)}"
        network = mimo(folder, num_modules, is_first_embedding_zero=is_zero).network(choose())
        runner, manager = pooled(network)
        told = Telling(network, runner.pool, 6, behind)
        sequences = [Drafting(told, manager, 6, seed) for seed in (1, 2)]
        found[is_zero, behind] = torch.stack(line(told, sequences, [[3, 1], [4, 2]]))
    gap, zero, whole = found.values()
    torch.testing.assert_close(gap[:, 0], whole[:, 0], **TOLERANCE)
    torch.testing.assert_close(gap[:, 1], zero[:, 1], **TOLERANCE)
    assert not torch.allclose(zero, whole)
    assert not torch.allclose(gap[:, 0], zero[:, 0])
    assert not torch.allclose(gap[:, 1], whole[:, 1])
