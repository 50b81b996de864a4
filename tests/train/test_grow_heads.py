"""Heads grown along with a target: the same laws and drafts, in a wider stream that stays zero."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from outrider.engine.llm import LLM
from outrider.errors import ConfigError, PairError
from outrider.models.heads.eagle_network import EagleNetwork
from outrider.models.heads.kv_network import KVNetwork
from outrider.models.heads.load import load_head
from outrider.models.heads.medusa_network import MedusaNetwork
from outrider.models.heads.spec import TargetSpec
from outrider.models.hub import resolve
from outrider.request import SamplingParams, SpeculationParams
from outrider.testing import tiny_decoder
from outrider.train.grow import grow
from outrider.train.grow_heads import grow_head
from tests.models.heads import kv_heads, layouts
from tests.models.heads.layouts import H, L, V

EPS = 0.05  # large, so that a forgotten share of it shows
SIZES = {
    "hidden_size": 27,
    "num_layers": 11,
    "intermediate_size": 36,
    "num_heads": 9,
    "num_kv_heads": 3,
}
HOMES = (0, 1, 2, 4, 5, 6, 8, 9, 11)
PROMPT = [5, 6, 7, 5, 6, 7, 9, 11, 5, 6]
NETWORKS = {"eagle": EagleNetwork, "medusa": MedusaNetwork, "kv_draft": KVNetwork}
DEMO = {"eagle": "demo-eagle3", "medusa": "demo-medusa", "kv_draft": "demo-kv"}
IDS = (1, 2, 3, 7, 30)


def write_target(folder: Path, seed: int = 7, **config: Any) -> Path:
    """A random target of the sizes that `layouts` makes heads for."""
    values = {**layouts.TARGET_CONFIG, "rms_norm_eps": EPS, "tie_word_embeddings": False}
    return layouts.write(folder, {**values, **config}, layouts.random_target(seed))


def eagle3(folder: Path, bias: bool = False, **options: Any) -> Path:
    head = layouts.random_eagle3(own_embedding=options.pop("own_embedding", False), **options)
    if bias:
        head.tensors["fc.bias"] = layouts.Random(5)(H)
        for part, rows in (("q", H), ("k", H // 2), ("v", H // 2), ("o", H)):
            head.tensors[f"layers.0.self_attn.{part}_proj.bias"] = layouts.Random(6)(rows)
    head.decoder["rms_norm_eps"] = EPS
    return layouts.write_speculators(folder, head)


def medusa(folder: Path, ids: tuple[int, ...] = (), rows: int = V, **options: Any) -> Path:
    tensors = layouts.random_medusa(rows=len(ids) or rows, **options)
    named = layouts.medusa_names(tensors)
    named |= {"token_map": torch.tensor(ids)} if ids else {}
    config = {"model_type": "medusa", "hidden_size": H, "vocab_size": V}
    return layouts.write(folder, config, named, "medusa_lm_head.safetensors")


def kv(folder: Path, *, num_kv_heads: int = layouts.KV_HEADS, **options: Any) -> Path:
    target = tiny_decoder(
        hidden_size=H, vocab_size=V, num_hidden_layers=L, num_key_value_heads=num_kv_heads
    )
    head = kv_heads.random_head(target, **{"kv_layers": (1, 6), **options})
    spec = replace(head.spec, kv=replace(head.spec.kv, norm_eps=EPS))
    return kv_heads.write(folder, head._replace(spec=spec))


# Drafter that runs it, how it is written, and with what.
HEADS: dict[str, tuple[str, Callable[..., Path], dict[str, Any]]] = {
    "eagle3": ("eagle", eagle3, {}),
    "eagle3, first and last state": ("eagle", eagle3, {"boundaries": (0, L - 1, L)}),
    "eagle3, one norm before fc": ("eagle", eagle3, {"input_norm": "all"}),
    "eagle3, a norm per feature": ("eagle", eagle3, {"input_norm": "each", "bias": True}),
    "eagle3, two layers": ("eagle", eagle3, {"num_layers": 2, "own_embedding": True}),
    "eagle3, normed": (
        "eagle",
        eagle3,
        {"flags": {"norm_before_residual": True, "norm_output": True}},
    ),
    "medusa": ("medusa", medusa, {}),
    "medusa, two blocks": ("medusa", medusa, {"num_blocks": 2}),
    "medusa, few tokens": ("medusa", medusa, {"ids": IDS}),
    "medusa, target's lm_head": ("medusa", medusa, {"rows": 0}),
    "kv": ("kv_draft", kv, {}),
    "kv, queries only": ("kv_draft", kv, {"sees_drafts": False, "kv_layers": (7, 0)}),
    "kv, few tokens": ("kv_draft", kv, {"ids": IDS}),
    "kv, raw": ("kv_draft", kv, {"input_state": "raw", "feedback": "pre-norm"}),
}
ONE_EACH = ("eagle3", "medusa", "kv")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A target and what it was grown to."""
    folder = tmp_path_factory.mktemp("pair")
    source = write_target(folder / "source")
    grow(source, folder / "grown", **SIZES, dtype="float32")
    return source, folder / "grown"


def grown_head(head: Path, pair: tuple[Path, Path], out: Path, **options: Any) -> Path:
    source, grown = pair
    options = {"dtype": "float32", **options}
    grow_head(head, out, source_target=source, grown_target=grown, **options)
    return out


@pytest.fixture
def drafted(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Serves a prompt with a head; the answer and all that the head has said on the way."""

    def drafted(target: Path, head: Path, drafter: str) -> tuple[list[int], list[Any]]:
        said: list[Any] = []
        network = NETWORKS[drafter]
        forward = network.forward

        def noting(self: Any, *args: Any) -> Any:
            said.append(forward(self, *args))
            return said[-1]

        with monkeypatch.context() as patch:
            patch.setattr(network, "forward", noting)
            llm = LLM(str(target), heads=[str(head)], load_tokenizer=False, dtype="float32")
            spec = SpeculationParams(method=drafter, num_draft_tokens=3, policy="fixed", width=1)
            sampling = SamplingParams(max_tokens=12, temperature=1.0, seed=3, ignore_eos=True)
            (output,) = llm.generate([PROMPT], sampling, spec)
        return list(output.token_ids), said

    return drafted


def assert_near(found: Tensor, wanted: Tensor) -> None:
    assert torch.equal(found.isfinite(), wanted.isfinite())
    known = wanted.isfinite()
    assert (found[known] - wanted[known]).abs().max() < 1e-4


@pytest.mark.parametrize("name", HEADS)
def test_laws_stay_and_new_channels_stay_zero(
    name: str, pair: tuple[Path, Path], drafted: Callable[..., Any], tmp_path: Path
) -> None:
    drafter, make, options = HEADS[name]
    head = make(tmp_path / "head", **options)
    grown = grown_head(head, pair, tmp_path / "grown")
    (tokens, before), (same, after) = (
        drafted(target, folder, drafter) for target, folder in zip(pair, (head, grown), strict=True)
    )
    assert same == tokens
    assert len(after) == len(before) > 3
    for old, new in zip(before, after, strict=True):
        if drafter == "medusa":
            assert_near(new, old)
            continue
        assert_near(new.logits_RV, old.logits_RV)
        feedback = new.feedback_ND
        assert_near(feedback[:, :H], old.feedback_ND)
        assert (feedback[:, H:] == 0).all()


def test_medusas_new_channels_stay_zero(
    pair: tuple[Path, Path], drafted: Callable[..., Any], tmp_path: Path
) -> None:
    """Whatever would read them."""
    grown = grown_head(medusa(tmp_path / "head"), pair, tmp_path / "grown")
    path = grown / "medusa_lm_head.safetensors"
    tensors = load_file(path)
    _, before = drafted(pair[1], grown, "medusa")
    for name, tensor in tensors.items():
        if name.endswith(".1.weight"):
            tensor[:, H:] = 1e6
    save_file(tensors, path)
    _, after = drafted(pair[1], grown, "medusa")
    assert all(map(torch.equal, before, after))


@pytest.mark.parametrize("name", ONE_EACH)
def test_sizes_follow_the_target_and_reading_is_real_work(
    name: str, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    _, make, options = HEADS[name]
    grown = grown_head(make(tmp_path / "head", **options), pair, tmp_path / "grown")
    config = json.loads((pair[1] / "config.json").read_text())
    head = load_head(grown, TargetSpec.from_config(config, name="grown"))
    shapes = {name: tuple(tensor.shape) for name, tensor in head.tensors.items()}
    wanted = {
        "eagle3": {"fc.weight": (27, 81), "layers.0.self_attn.q_proj.weight": (36, 54)},
        "medusa": {"heads.2.blocks.0.weight": (27, 27), "heads.2.lm_head.weight": (V, 27)},
        "kv": {"fc.weight": (27, 54), "layers.1.self_attn.k_proj.weight": (12, 27)},
    }[name]
    if name != "medusa":
        wanted["layers.0.mlp.down_proj.weight"] = (27, 36)
    assert wanted.items() <= shapes.items()
    for part, tensor in head.tensors.items():
        is_reader = part.endswith(("q_proj.weight", "k_proj.weight", "up_proj.weight"))
        assert not is_reader or (tensor != 0).all(), part


def test_layers_move_to_their_homes(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Boundaries and layers that are read, those that were pinned too."""
    head = eagle3(tmp_path / "eagle3", boundaries=(0, 3, L))
    pins = {"feature_layers": [1, 5, L], "feedback": "post-norm"}
    (head / "outrider.json").write_text(json.dumps({"conventions": pins, "doctor": 1}))
    grown = grown_head(head, pair, tmp_path / "grown")
    config = json.loads((grown / "config.json").read_text())
    assert config["eagle_aux_hidden_state_layer_ids"] == [HOMES[1], HOMES[5], HOMES[L]]
    assert json.loads((grown / "outrider.json").read_text())["conventions"] == {
        "feature_layers": [HOMES[1], HOMES[5], HOMES[L]],
        "feedback": "post-norm",
    }
    (head / "outrider.json").unlink()
    config = json.loads((grown_head(head, pair, grown) / "config.json").read_text())
    assert config["eagle_aux_hidden_state_layer_ids"] == [HOMES[0], HOMES[3], HOMES[L]]
    grown = grown_head(kv(tmp_path / "kv", kv_layers=(6, 7)), pair, tmp_path / "grown_kv")
    assert json.loads((grown / "config.json").read_text())["kv_layers"] == [HOMES[6], HOMES[7]]


def test_the_card_says_what_it_is(pair: tuple[Path, Path], tmp_path: Path) -> None:
    grown = grown_head(medusa(tmp_path / "fine"), pair, tmp_path / "grown")
    card = (grown / "README.md").read_text()
    assert "A grown copy of the head `fine`" in card
    assert "not trained" in card
    about = json.loads((grown / "outrider.json").read_text())["growth"]
    assert (about["grown_from"], about["target"], about["seed"]) == ("fine", "grown", 0)
    assert f"{about['num_parameters']:,}" in card
    assert "It says for the grown target what that head says for its own." in card
    assert about["noise"] == 0.0


def test_the_card_of_a_head_beside_noise_says_so(pair: tuple[Path, Path], tmp_path: Path) -> None:
    head = kv(tmp_path / "head")
    plain = grown_head(head, pair, tmp_path / "plain")
    grown = grown_head(head, pair, tmp_path / "grown", noise=0.25)
    card = (grown / "README.md").read_text()
    assert "says for the grown target what" not in card
    assert "grown with noise and no longer is exactly\nwhat the head was trained for" in card
    assert "| noise of the target | 0.25 |" in card
    assert json.loads((grown / "outrider.json").read_text())["growth"]["noise"] == 0.25
    weights = [(folder / "model.safetensors").read_bytes() for folder in (plain, grown)]
    assert weights[0] == weights[1], "the head itself gets none"


def test_the_seed_decides(pair: tuple[Path, Path], tmp_path: Path) -> None:
    head, written = eagle3(tmp_path / "head"), []
    for index, seed in enumerate((0, 0, 1)):
        grown = grown_head(head, pair, tmp_path / str(index), seed=seed)
        written.append((grown / "model.safetensors").read_bytes())
    assert written[0] == written[1] != written[2]


def test_dtype_is_that_of_weights_only(pair: tuple[Path, Path], tmp_path: Path) -> None:
    head = medusa(tmp_path / "head", ids=IDS)
    grown = grown_head(head, pair, tmp_path / "grown", dtype="bfloat16")
    tensors = load_file(grown / "medusa_lm_head.safetensors")
    assert tensors.pop("token_map").tolist() == list(IDS)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert json.loads((grown / "config.json").read_text())["torch_dtype"] == "bfloat16"


def pinned(folder: Path, **pins: Any) -> Path:
    eagle3(folder)
    (folder / "outrider.json").write_text(json.dumps({"conventions": pins}))
    return folder


def pickled(folder: Path) -> Path:
    config, tensors = {"model_type": "medusa"}, layouts.random_medusa()
    return layouts.write(folder, config, layouts.medusa_names(tensors), "medusa_lm_head.pt")


def with_decoder(folder: Path, **decoder: Any) -> Path:
    """An EAGLE-3 head of other attention heads than its target's."""
    path = eagle3(folder) / "config.json"
    config = json.loads(path.read_text())
    config["transformer_layer_config"] |= decoder
    path.write_text(json.dumps(config))
    return folder


REFUSED: dict[str, tuple[Callable[[Path], Path], type[Exception], str]] = {
    "eagle1": (
        lambda folder: layouts.write_eagle1(folder, layouts.random_eagle1()),
        ConfigError,
        "family eagle in a layout.*speculators",
    ),
    "block": (
        lambda folder: layouts.write(folder, layouts.zlab_config(), layouts.random_block()),
        ConfigError,
        "family block in a layout",
    ),
    "specforge": (
        lambda folder: layouts.write_specforge(folder, layouts.random_eagle3()),
        ConfigError,
        "family eagle3 in a layout",
    ),
    "pickled": (pickled, ConfigError, "medusa_lm_head.safetensors"),
    "narrow": (lambda folder: kv(folder, hidden=8), ConfigError, "8 wide and its target 16"),
    "normed queries": (lambda folder: eagle3(folder, is_qwen=True), ConfigError, "q_norm"),
    "gain": (
        lambda folder: pinned(folder, norm_gain="one-plus-weight"),
        ConfigError,
        "norm_gain='one-plus-weight'",
    ),
    "head_dim": (
        lambda folder: with_decoder(
            folder, head_dim=8, num_attention_heads=2, num_key_value_heads=1
        ),
        ConfigError,
        "heads of 8 values",
    ),
    "other target": (lambda folder: resolve("demo-medusa"), PairError, "another model"),
    "other kv": (lambda folder: kv(folder, num_kv_heads=4), PairError, r"\(4, 4, 4\)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_head_that_cannot_be_grown_is_refused(
    name: str, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    make, kind, message = REFUSED[name]
    with pytest.raises(kind, match=message):
        grown_head(make(tmp_path / "head"), pair, tmp_path / "grown")
    assert not (tmp_path / "grown").exists()


def test_more_heads_than_the_grown_target_are_refused(tmp_path: Path) -> None:
    source = write_target(tmp_path / "source", hidden_size=H)
    grow(source, tmp_path / "grown", num_layers=9, dtype="float32")
    head = layouts.random_eagle3(own_embedding=False)
    for part, rows in (("q", 32), ("k", 32), ("v", 32)):
        head.tensors[f"layers.0.self_attn.{part}_proj.weight"] = torch.ones(rows, 2 * H)
    head.tensors["layers.0.self_attn.o_proj.weight"] = torch.ones(H, 32)
    head.decoder.update(num_attention_heads=8, num_key_value_heads=8)
    layouts.write_speculators(tmp_path / "head", head)
    with pytest.raises(ConfigError, match="does not fit into 'grown': num_heads 4 is below"):
        grown_head(tmp_path / "head", (source, tmp_path / "grown"), tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda pair, folder: (pair[1], pair[0]), "hidden_size 16 is below"),
        (lambda pair, folder: (write_target(folder / "other", 8), pair[1]), "does not begin"),
        (lambda pair, folder: (pair[0], write_target(folder / "o", vocab_size=50)), "vocabulary"),
        (lambda pair, folder: (pair[0], write_target(folder / "o", rms_norm_eps=0.1)), "eps"),
        (lambda pair, folder: (pair[0], write_target(folder / "o", head_dim=8)), "8 wide"),
    ],
    ids=["smaller", "other weights", "vocabulary", "epsilon", "head_dim"],
)
def test_a_target_that_is_no_growth_is_refused(
    change: Callable[..., tuple[Path, Path]],
    message: str,
    pair: tuple[Path, Path],
    tmp_path: Path,
) -> None:
    head = medusa(tmp_path / "head")
    with pytest.raises(ConfigError, match=f"no growth of.*{message}.*outrider train grow"):
        grown_head(head, change(pair, tmp_path), tmp_path / "grown")


def test_the_head_the_targets_and_files_are_not_written_over(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    head = medusa(tmp_path / "head")
    (tmp_path / "file").write_text("kept")
    outs = {
        "head": head,
        "source": pair[0],
        "grown target": pair[1],
        "is a file": tmp_path / "file",
    }
    before = {path: path.read_bytes() for out in outs.values() for path in out.glob("*")}
    for what, out in outs.items():
        with pytest.raises(ConfigError, match=what):
            grown_head(head, pair, out)
    assert {path: path.read_bytes() for out in outs.values() for path in out.glob("*")} == before


def test_unknown_dtype_is_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="int8"):
        grown_head(medusa(tmp_path / "head"), pair, tmp_path / "grown", dtype="int8")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> tuple[LLM, LLM]:
    """The demo with its heads, and both a little larger."""
    source, folder = resolve("demo"), tmp_path_factory.mktemp("demo") / "grown"
    grow(source, folder, hidden_size=480, num_layers=8, intermediate_size=1152, dtype="float32")
    heads = []
    for name in DEMO.values():
        heads.append(str(folder / "heads" / name))
        grow_head(
            resolve(name), Path(heads[-1]), source_target=source, grown_target=folder,
            dtype="float32",
        )  # fmt: skip
    small, large = (
        LLM(name, draft_model="off", heads=given, dtype="float32", max_num_seqs=8)
        for name, given in (("demo", DEMO.values()), (str(folder), heads))
    )
    return small, large


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_shipped_heads_draft_as_before(served: tuple[LLM, LLM], temperature: float) -> None:
    """The same text as without them, and as many drafts accepted."""
    prompts = ["def main(argv):\n    ", "The history of the town"]
    sampling = SamplingParams(max_tokens=24, temperature=temperature, seed=1, ignore_eos=True)
    plain = [output.token_ids for output in served[1].generate(prompts, sampling, "off")]
    for drafter in DEMO:
        spec = SpeculationParams(method=drafter, num_draft_tokens=4, width=1, policy="fixed")
        small, large = (llm.generate(prompts, sampling, spec) for llm in served)
        assert [output.token_ids for output in large] == plain
        before, after = (
            [output.metrics.acceptance_length for output in outputs] for outputs in (small, large)
        )
        assert after == before
        assert max(after) > 1.2
