"""What a folder may hold beside a served head: other families, pickles, pins, hub ids."""

import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from outrider.errors import ConfigError, ModelError
from outrider.models.heads.load import load_head
from outrider.models.heads.spec import Family
from tests.engine.test_heads import FAMILIES
from tests.models.heads.layouts import (
    DECODER,
    DRAFT_IDS,
    PROJECTED_PARTS,
    ROPE,
    TARGET,
    TARGET_CONFIG,
    VD,
    H,
    L,
    maps,
    mtp_names,
    random_eagle3,
    random_mtp,
    random_target,
    save,
    write,
    write_eagle,
    write_specforge,
    write_speculators,
)

HEAD = random_eagle3()


def pin(folder: Path, **conventions: Any) -> Path:
    (folder / "outrider.json").write_text(json.dumps({"conventions": conventions}))
    return folder


NOT_SERVED: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ("hydra", {"hydra_num_heads": 1}, {"hydra_mlp.0.0.linear.weight": torch.zeros(2, 2)}, "hydra"),
    (
        "mlp",
        {"model_type": "mlp_speculator"},
        {"speculator.emb.0.weight": torch.zeros(2, 2)},
        "mlp_speculator",
    ),
    ("draft", TARGET_CONFIG, random_target(), "draft_model"),
]


@pytest.mark.parametrize(("name", "config", "tensors", "family"), NOT_SERVED)
def test_other_families_are_named_and_refused(
    tmp_path: Path, name: str, config: dict[str, Any], tensors: dict[str, Any], family: str
) -> None:
    file = "hydra_lm_head.pt" if name == "hydra" else "model.safetensors"
    folder = write(tmp_path, config, tensors, file)
    with pytest.raises(ConfigError, match=f"of the family {family}, which is not served as a head"):
        load_head(folder, TARGET)


def test_pard_is_a_decoder_with_a_mask_token(tmp_path: Path) -> None:
    folder = write(tmp_path / "p", {**TARGET_CONFIG, "pard_token": 39}, random_target())
    head = load_head(folder, TARGET)
    assert head.spec.family is Family.PARD
    assert head.spec.mask_token_id == 39
    assert head.tensors == {}
    with pytest.raises(ConfigError, match=r"'feedback': 'pre-norm'.*a whole model \(PARD\)"):
        load_head(folder, TARGET, pins={"feedback": "pre-norm"})
    far = write(tmp_path / "f", {**TARGET_CONFIG, "pard_token": 40}, random_target())
    with pytest.raises(ConfigError, match="pard_token=40 must be below vocab_size=40"):
        load_head(far, TARGET)


def test_pard_2_is_recognised_by_its_second_file(tmp_path: Path) -> None:
    folder = write(tmp_path, {**TARGET_CONFIG, "pard2": True, "pard_token": 3}, random_target())
    save(folder / "warp_model.bin", {"target_proj.weight": torch.zeros(H, 2 * H)})
    with pytest.raises(ConfigError, match=r"pard2, .* delete warp_model.bin and 'pard2'"):
        load_head(folder, TARGET)


class Bomb:
    """What a pickle could run if it were let."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (Path.touch, (Path("exploded"),))


def test_a_pickle_never_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = write_eagle(tmp_path / "e", HEAD)
    torch.save({"fc.weight": Bomb()}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"corrupt or more than tensors"):
        load_head(folder, TARGET)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"fc.weight": Bomb()}, protocol=2))
    with pytest.raises(ModelError, match=r"corrupt or more than tensors"):
        load_head(folder, TARGET)
    assert not (tmp_path / "exploded").exists()


def test_broken_and_absent_files(tmp_path: Path) -> None:
    folder = write_specforge(tmp_path / "s", HEAD)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ModelError, match=r"model.safetensors' is truncated"):
        load_head(folder, TARGET)
    weights.unlink()
    with pytest.raises(ModelError, match="no weights in"):
        load_head(folder, TARGET)
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"no config.json"):
        load_head(folder, TARGET)
    odd = write_eagle(tmp_path / "o", HEAD)
    torch.save({"fc.weight": 3}, odd / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"'fc.weight' is no tensor"):
        load_head(odd, TARGET)


def test_shards_are_read_together(tmp_path: Path) -> None:
    folder = write(tmp_path, {**HEAD.values, "draft_vocab_size": VD}, HEAD.tensors | maps())
    whole = load_head(folder, TARGET)
    (folder / "model.safetensors").unlink()
    names = list(HEAD.tensors | maps())
    places = {name: f"model-{index % 2}.safetensors" for index, name in enumerate(names)}
    for file in set(places.values()):
        part = {n: t for n, t in (HEAD.tensors | maps()).items() if places[n] == file}
        save(folder / file, part)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    shards = load_head(folder, TARGET)
    assert shards.spec == whole.spec
    assert all(torch.equal(shards.tensors[n], t) for n, t in whole.tensors.items())


def test_a_name_goes_through_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def resolve(name: str, revision: str | None) -> Path:
        asked.append((name, revision))
        return write_specforge(tmp_path, HEAD)

    monkeypatch.setattr("outrider.models.heads.load.resolve", resolve)
    head = load_head("some/head", TARGET, revision="v1")
    assert asked == [("some/head", "v1")]
    assert head.spec.family is Family.EAGLE3


def test_pins_are_obeyed(tmp_path: Path) -> None:
    folder = pin(
        write_specforge(tmp_path, HEAD),
        norm_before_residual=True,
        feature_layers=[5, 4, 2],
        embedding="target",
    )
    spec = load_head(folder, TARGET).spec
    assert spec.conventions.norm_before_residual
    assert spec.conventions.feature_layers == (5, 4, 2)
    assert spec.conventions.embedding == "target"
    assert spec.pinned == {"norm_before_residual", "feature_layers", "embedding"}
    assert spec.assumed == {"feedback"}
    assert load_head(folder, TARGET, pins={}).spec.pinned == frozenset()
    mine = load_head(folder, TARGET, pins={"feedback": "post-norm"}).spec
    assert mine.conventions.feedback == "post-norm"
    assert not mine.conventions.norm_before_residual


WRONG_PINS: list[tuple[dict[str, Any], str]] = [
    ({"norm_before_residuals": True}, "unknown convention 'norm_before_residuals'; did you mean"),
    ({"feedback": "both"}, "feedback='both' is none of"),
    ({"norm_before_residual": 1}, "norm_before_residual=1 is none of"),
    ({"feature_layers": 3}, "feature_layers=3 must be a list of int"),
    ({"feature_layers": [1, 2]}, "the head reads 3 features of boundaries 0 to 8"),
    ({"feature_layers": [1, 2, L + 1]}, "the head reads 3 features of boundaries 0 to 8"),
    (
        {"block_masks": ["causal"]},
        r"\('causal',\): means nothing to a head of the family eagle3, which follows .*: drop it",
    ),
    ({"block_masks": ["half"]}, "each must be one of"),
    ({"input_norm": "all"}, "the files hold norms for 'none'"),
]


@pytest.mark.parametrize(("pins", "message"), WRONG_PINS)
def test_pins_that_cannot_be_obeyed(tmp_path: Path, pins: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_head(pin(write_speculators(tmp_path, HEAD), **pins), TARGET)


FOREIGN: dict[str, tuple[Family, dict[str, Any]]] = {
    "eagle1": (Family.EAGLE, {"feedback": "post-norm", "vocabulary_map": "offset"}),
    "eagle3": (Family.EAGLE3, {"sample_from_anchor": True, "input_state": "raw"}),
    "peagle": (Family.PEAGLE, {"feedback": "post-norm", "concatenation": "feature-first"}),
    "dflash": (Family.BLOCK, {"feedback": "pre-norm", "norm_before_residual": True}),
    "medusa": (Family.MEDUSA, {"embedding": "target", "vocabulary_map": "offset"}),
    "kv": (Family.KV, {"rope_origin": "own", "norm_gain": "weight"}),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_pins_that_mean_nothing_to_the_family(tmp_path: Path, name: str) -> None:
    """Nothing would become of them; what they are and what the family follows is said."""
    family, pins = FOREIGN[name]
    folder, target = FAMILIES[name][1](tmp_path / name), TARGET
    assert load_head(folder, target).spec.family is family
    for convention, value in pins.items():
        with pytest.raises(ConfigError) as error:
            load_head(folder, target, pins={convention: value})
        assert f"convention {convention}={value!r}: means nothing to a head" in str(error.value)
        assert f"of the family {family}, which follows " in str(error.value)
        assert str(error.value).endswith(": drop it")


def test_pins_that_mean_nothing_to_modules_of_the_target(tmp_path: Path) -> None:
    modules = mtp_names(random_mtp(), "mtp_layers.{}.", PROJECTED_PARTS)
    target = replace(TARGET, folder=write(tmp_path / "t", TARGET_CONFIG, random_target()))
    config = {"speculators_model_type": "mtp", "transformer_layer_config": {**DECODER, **ROPE}}
    folder = write(tmp_path / "m", config, modules)
    assert load_head(folder, target, pins={"is_first_embedding_zero": True})
    with pytest.raises(ConfigError, match=r"block_masks=\('causal',\): means nothing"):
        load_head(folder, target, pins={"block_masks": ["causal"]})


def test_pins_of_parts_that_are_not_there(tmp_path: Path) -> None:
    made = random_eagle3(ids=tuple(range(40)), own_embedding=False)
    folder = write_speculators(tmp_path, made)
    for pins, message in (
        ({"embedding": "own"}, "embedding='own': the head's files hold none"),
        ({"vocabulary_map": "absolute"}, "d2t, read as absolute, maps draft tokens 0 and 1 both"),
    ):
        with pytest.raises(ConfigError if "embedding" in pins else ModelError, match=message):
            load_head(pin(folder, **pins), TARGET)


def test_a_sidecar_that_is_no_mapping(tmp_path: Path) -> None:
    folder = write_specforge(tmp_path, HEAD)
    for text, message in (("{", "is not JSON"), ("[]", "must hold a mapping")):
        (folder / "outrider.json").write_text(text)
        with pytest.raises(ConfigError, match=message):
            load_head(folder, TARGET)


def test_a_map_written_as_ids_is_said_and_can_be_pinned(tmp_path: Path) -> None:
    tensors = HEAD.tensors | {"d2t": torch.tensor(DRAFT_IDS), "t2d": maps()["t2d"]}
    folder = write(tmp_path, {**HEAD.values, "draft_vocab_size": VD}, tensors)
    with pytest.raises(ModelError, match=r'pin "vocabulary_map": "absolute" in outrider.json'):
        load_head(folder, TARGET)
    head = load_head(pin(folder, vocabulary_map="absolute"), TARGET)
    assert head.tensors["target_ids"].tolist() == list(DRAFT_IDS)
    assert head.spec.conventions.vocabulary_map == "absolute"
