"""KV heads: what they compute is their definition, committed KV stays, and reading is strict."""

import pytest
import torch

from outrider.errors import ConfigError, ModelError, PairError
from outrider.models.decoder import Decoder
from outrider.models.heads.kv_head import KEYS, read_kv, write_config
from outrider.models.heads.kv_network import KVNetwork, KVRunner, as_lean
from outrider.models.heads.load import load_head
from outrider.models.heads.network import HeadPiece
from outrider.models.heads.spec import Family, Head
from outrider.models.weights import tensor_shapes
from outrider.ops.choose import choose
from outrider.step import DraftTree
from outrider.testing import tiny_decoder
from tests.models.heads.kv_heads import (
    DRAFT_IDS,
    Prefilled,
    Twin,
    copied_pair,
    given,
    random_head,
    read,
    target_spec,
    write,
)

LENGTHS = (1, 7, 18)
CHAIN = [40, 41, 60, 77, 32]
TREE = DraftTree(tokens=(40, 60, 41, 30, 61, 90), parents=(-1, -1, 0, 0, 1, 2))
VARIANTS = {
    "as trained": {},
    "queries only": {"sees_drafts": False},
    "one layer": {"kv_layers": (1,)},
    "layers in any order": {"kv_layers": (1, 0)},
    "one layer twice": {"sees_drafts": False, "kv_layers": (1, 1, 0)},
    "feature first": {"concatenation": "feature-first"},
    "raw feature": {"input_state": "raw"},
    "feedback before the norm": {"feedback": "pre-norm"},
    "narrow": {"hidden": 20},
    "narrow, fed back raw": {"hidden": 20, "feedback": "pre-norm", "sees_drafts": False},
    "draft vocabulary": {"ids": DRAFT_IDS},
}
TARGETS = {
    "llama": {},
    "queries and keys normed": {"model_type": "qwen3", "head_dim": 8},
    "windows": {"model_type": "mistral", "sliding_window": 6},
    "partly turned": {"model_type": "phi3", "partial_rotary_factor": 0.5, "pad_token_id": 0},
}


def prompt(length):
    return [(13 * length + 5 * i * i) % 200 + 4 for i in range(length)]


class Side:
    """A sequence with room for drafts in a pool that it shares with others."""

    def __init__(self, target, runner, manager, tokens):
        self.tokens, self.context = tokens, Prefilled(target, tokens[:-1])
        self.table, _ = manager.open(tokens)
        manager.reserve(self.table, len(tokens) + 12)
        slots = torch.tensor(self.table.slots(0, len(tokens) - 1))
        for index, kv in enumerate(runner.pool.layers):
            keys, values = self.context.layer(index)
            kv.keys[slots], kv.values[slots] = keys, values

    @property
    def num_keys(self):
        return len(self.tokens) - 1


def setting(target, head, lengths=LENGTHS):
    """The runner, and sequences of these many frozen positions."""
    empty = Prefilled(target, [5], num_blocks=256)
    empty.manager.free(empty.table)
    runner = KVRunner(KVNetwork(head, target), empty.pool)
    sides = [Side(target, runner, empty.manager, prompt(length + 1)) for length in lengths]
    return runner, sides


def fed(runner, side):
    return runner.network.read(side.context.states_TH[-1:])


def whole_tree(runner, side):
    """All of `TREE`, each row fed with the feature."""
    inputs_PH = fed(runner, side).expand(1 + len(TREE), -1)
    return HeadPiece(side.table, side.num_keys, side.tokens[-1:], TREE, inputs_PH, True)


def assert_near(found_V, wanted_V):
    assert torch.equal(found_V.isfinite(), wanted_V.isfinite())
    is_known = wanted_V.isfinite()
    off = (found_V - wanted_V)[is_known].abs().max()
    assert off <= 1e-5 * wanted_V[is_known].abs().max(), float(off)


@pytest.mark.parametrize("kernels", ["auto", "torch"])
@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_a_chain_is_what_the_definition_says(options, kernels):
    """Row by row, several sequences of mixed lengths in each pass."""
    target = tiny_decoder(3, kernels=kernels)
    check_chain(target, random_head(target, **options))


@pytest.mark.parametrize("sees_drafts", [True, False])
@pytest.mark.parametrize("values", TARGETS.values(), ids=TARGETS)
def test_over_other_targets_too(values, sees_drafts):
    target = tiny_decoder(3, **values)
    check_chain(target, random_head(target, sees_drafts=sees_drafts))


def check_chain(target, head):
    runner, sides = setting(target, head)
    inputs = [fed(runner, side) for side in sides]
    wanted = [Twin(head, target, side.context).path([side.tokens[-1], *CHAIN]) for side in sides]
    for depth in range(len(CHAIN) + 1):
        pieces = [
            HeadPiece(
                side.table,
                side.num_keys + depth,
                [CHAIN[depth - 1]] if depth else side.tokens[-1:],
                DraftTree(),
                inputs_1H,
                True,
            )
            for side, inputs_1H in zip(sides, inputs, strict=True)
        ]
        output, feedback_NH = runner.run(pieces, [side.num_keys for side in sides])
        assert output.first == [0, 1, 2]
        for row, path in enumerate(wanted):
            assert_near(output.logits_NV[row], path[depth])
            assert output.argmax_N[row] == int(path[depth].argmax())
        inputs = list(feedback_NH.split(1))


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_a_fused_pass_and_its_twin(options):
    """Mixed lengths and trees, twice over the same pool."""
    target = tiny_decoder(3, kernels="cpu")
    runner, sides = setting(target, random_head(target, **options))
    pieces = [whole_tree(runner, side) for side in sides]
    num_keys = [side.num_keys for side in sides]
    network = runner.network
    assert (network._fused is not None) == network.head_spec.kv.sees_drafts
    for _ in range(2):
        output, feedback_NH = runner.run(pieces, num_keys)
        network._fused, fused = None, network._fused
        slow, slow_NH = runner.run(pieces, num_keys)
        network._fused = fused
        assert_near(output.logits_NV, slow.logits_NV)
        assert_near(feedback_NH, slow_NH)


@pytest.mark.parametrize("sees_drafts", [True, False])
def test_a_node_of_a_tree_is_the_end_of_its_path(sees_drafts):
    target = tiny_decoder(3)
    head = random_head(target, sees_drafts=sees_drafts)
    runner, sides = setting(target, head)
    handed = [{(): None} for _ in sides]
    for depth in range(4):
        nodes = [node for node in range(len(TREE)) if TREE.depth(node) <= depth]
        tree = DraftTree(
            tokens=tuple(TREE.tokens[n] for n in nodes),
            parents=tuple(TREE.parents[n] for n in nodes),
        )
        paths = [(), *(TREE.path_tokens(node) for node in nodes)]
        pieces = [
            HeadPiece(
                side.table,
                side.num_keys,
                side.tokens[-1:],
                tree,
                torch.cat([fed(runner, side), *(known[path[:-1]] for path in paths[1:])]),
                True,
            )
            for side, known in zip(sides, handed, strict=True)
        ]
        output, feedback_NH = runner.run(pieces, [side.num_keys for side in sides])
        for index, side in enumerate(sides):
            rows = range(index * len(paths), (index + 1) * len(paths))
            handed[index] = {
                path: feedback_NH[row, None] for path, row in zip(paths, rows, strict=True)
            }
            twin = Twin(head, target, side.context)
            for path, row in zip(paths, rows, strict=True):
                assert_near(output.logits_NV[row], twin.path([side.tokens[-1], *path])[-1])


@pytest.mark.parametrize("sees_drafts", [True, False])
def test_committed_kv_is_read_only(sees_drafts):
    target = tiny_decoder(3)
    runner, sides = setting(target, random_head(target, sees_drafts=sees_drafts))
    before = [part.clone() for kv in runner.pool.layers for part in kv]
    pieces = [whole_tree(runner, side) for side in sides]
    runner.run(pieces, [side.num_keys for side in sides])
    after = [part for kv in runner.pool.layers for part in kv]
    written = {
        slot for side in sides for slot in side.table.slots(side.num_keys, side.num_keys + 7)
    }
    others = torch.tensor([s for s in range(len(before[0])) if s not in written])
    assert all(torch.equal(a[others], b[others]) for a, b in zip(before, after, strict=True))
    is_whole = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert is_whole is not sees_drafts, "queries alone leave nothing behind"


@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_a_copy_of_the_target_says_what_the_target_says(kernels):
    target, head = copied_pair(kernels)
    runner, (side,) = setting(target, read(head, target), (9,))
    tokens, inputs_1H = list(side.tokens), fed(runner, side)
    for depth in range(6):
        piece = HeadPiece(
            side.table, side.num_keys + depth, tokens[-1:], DraftTree(), inputs_1H, True
        )
        output, inputs_1H = runner.run([piece], [side.num_keys])
        wanted_V = Prefilled(target, tokens).last_logits_V
        torch.testing.assert_close(output.logits_NV[0], wanted_V, rtol=1e-3, atol=1e-3)
        tokens.append(int(wanted_V.argmax()))


def test_half_precision_runs():
    target = tiny_decoder(3, kernels="torch")
    full = KVNetwork(random_head(target), target)
    target_16 = half(target)
    runner, (side,) = setting(target_16, random_head(target), (9,))
    output, feedback_NH = runner.run([whole_tree(runner, side)], [9])
    assert output.logits_NV.dtype == torch.float32
    assert feedback_NH.dtype == torch.bfloat16
    wanted = Twin(random_head(target), target, Prefilled(target, side.tokens[:-1]))
    near = wanted.path(side.tokens[-1:])[0].softmax(0)
    assert full.spec.dtype == torch.float32
    assert float(torch.minimum(near, output.logits_NV[0].softmax(0)).sum()) > 0.9


def half(target):
    """`tiny_decoder(3)` in bfloat16."""
    generator = torch.Generator().manual_seed(3)
    tensors = {
        name: torch.ones(size) if len(size) == 1 else torch.randn(size, generator=generator) * 0.25
        for name, size in tensor_shapes(target.config).items()
        if name != "lm_head.weight"
    }
    return Decoder(target.config, tensors, choose("torch"), dtype=torch.bfloat16)


def test_a_target_of_other_shapes_is_refused():
    head = random_head(tiny_decoder(3))
    for values in ({"num_key_value_heads": 4}, {"head_dim": 16}, {"num_hidden_layers": 1}):
        with pytest.raises(PairError, match="it was made for another model"):
            KVNetwork(head, tiny_decoder(3, **values))


def test_a_target_that_is_not_lean_is_refused():
    class Other:
        spec = tiny_decoder(3).spec

    with pytest.raises(ConfigError, match="load 'tiny-3' with network='lean'"):
        as_lean(Other(), "kv_draft")


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_what_is_written_is_what_is_read(options):
    target = tiny_decoder(3)
    head = random_head(target, **options)
    spec, tensors = read(head, target)
    assert spec == head.spec
    assert spec.family is Family.KV
    assert not spec.assumed, "every convention is written down"
    assert tensors.keys() == head.tensors.keys()


def test_every_key_must_be_there_and_no_other():
    target = tiny_decoder(3)
    head = random_head(target)
    assert write_config(head.spec).keys() == set(KEYS)
    for key in KEYS:
        with pytest.raises(ConfigError, match=f"lacks {key}:"):
            read(head, target, **{key: ...})
    with pytest.raises(ConfigError, match="did you mean 'kv_layers'"):
        read(head, target, kv_layer=[0, 1])


WRONG = {
    "hidden_size": (33, "fc.weight"),
    "target_hidden_size": (64, "fc.weight"),
    "num_attention_heads": (3, "no multiple"),
    "num_hidden_layers": (1, "shows 2"),
    "key_width": (16, "q_proj"),
    "value_width": (4, "o_proj"),
    "intermediate_size": (48, "gate_proj"),
    "kv_layers": ([0, 2], "0 to 1"),
    "query_position": ("root", r"\['own'\]"),
    "feedback": ("both", "none of"),
    "has_qk_norm": (True, "no norms of queries"),
    "sees_drafts": (False, "hold projections of keys"),
    "rms_norm_eps": (1, "small positive"),
    "draft_vocab_size": (15, "lm_head='own'"),
    "lm_head": ("own", "lm_head.weight"),
}


@pytest.mark.parametrize("key", WRONG)
def test_config_and_tensors_must_agree(key):
    target = tiny_decoder(3)
    value, told = WRONG[key]
    with pytest.raises((ConfigError, ModelError), match=told):
        read(random_head(target), target, **{key: value})


def test_a_switch_is_true_or_false():
    target = tiny_decoder(3)
    with pytest.raises(ConfigError, match="sees_drafts=1 must be true or false"):
        read(random_head(target), target, sees_drafts=1)


def test_layers_are_one_for_one_and_none_twice():
    target = tiny_decoder(3)
    with pytest.raises(ConfigError, match="names 1 layers, the files hold 2"):
        read(random_head(target), target, kv_layers=[1])
    with pytest.raises(ConfigError, match="names a layer twice"):
        read(random_head(target), target, kv_layers=[1, 1])


def test_strange_missing_and_misshapen_tensors_are_errors():
    target = tiny_decoder(3)
    spec, tensors = random_head(target)
    for change, told in (
        ({"layers.0.rotary": torch.ones(2)}, "unknown tensors: layers.0.rotary"),
        ({"norm.weight": None}, "missing tensors: norm.weight"),
        ({"norm.weight": torch.ones(3)}, r"norm.weight is \[3\], expected \[32\]"),
        ({"fc.weight": tensors["fc.weight"].to(torch.int8)}, "quantised tensors: fc.weight"),
    ):  # fmt: skip
        changed = {**tensors, **change}
        changed = {name: tensor for name, tensor in changed.items() if tensor is not None}
        with pytest.raises(ModelError, match=told):
            read(Head(spec, changed), target)


def test_a_head_of_another_target_is_refused():
    head = random_head(tiny_decoder(3))
    with pytest.raises(PairError, match="hidden size 32, target 'tiny' has 48"):
        read(head, tiny_decoder(3, hidden_size=48))
    with pytest.raises(PairError, match="vocabulary 256, target 'tiny' has 300"):
        read(head, tiny_decoder(3, vocab_size=300))


def test_a_map_must_name_tokens_once():
    target = tiny_decoder(3)
    head = random_head(target, ids=DRAFT_IDS)
    head.tensors["target_ids"][1] = 0
    with pytest.raises(ModelError, match="names a token twice"):
        read(head, target)


def test_pins_are_laid_over_the_file():
    target = tiny_decoder(3)
    spec, _ = read_kv(given(random_head(target), target, pins={"feedback": "pre-norm"}))
    assert spec.conventions.feedback == "pre-norm"
    assert spec.pinned == {"feedback"}


def test_a_folder_is_loaded(tmp_path):
    target = tiny_decoder(3)
    head = random_head(target)
    spec, tensors = load_head(write(tmp_path / "head", head), target_spec(target))
    assert spec == head.spec
    assert all(torch.equal(tensors[name], tensor) for name, tensor in head.tensors.items())


def test_its_folder_is_told_from_others(tmp_path):
    """By its config; tensors alone do not say how they run."""
    folder = write(tmp_path / "head", random_head(tiny_decoder(3)))
    (folder / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="model_type 'outrider_kv_head'"):
        load_head(folder, target_spec(tiny_decoder(3)))
