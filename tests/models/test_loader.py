"""From names and folders to a decoder: formats, devices, dtypes, and every way it can fail."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.errors
import pytest
import torch
from safetensors.torch import load_file, save_file

from outrider.errors import ModelError
from outrider.models import hub
from outrider.models.checkpoint import (
    eos_token_ids,
    fingerprint,
    load_tensors,
    read_config,
    weight_files,
)
from outrider.models.loader import load_decoder, pick_device, pick_dtype, resolve, stored_dtype
from outrider.ops.base import Span
from outrider.ops.torch import TorchOps
from tests.models.tiny import Passes, difference, reference_logits, tiny_model

PROMPT = [1, 30, 12, 77, 9]
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("LlamaConfig")


@pytest.fixture
def folder(model: Any, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path)
    return tmp_path


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def deviation(folder: Path, model: Any) -> float:
    decoder = load_decoder(folder, ops=TorchOps())
    (ours,) = Passes(decoder)((Span(list(range(len(PROMPT))), 0, len(PROMPT)), PROMPT))
    return difference(ours, reference_logits(model, PROMPT))


def to_shards(folder: Path) -> None:
    """The weights in two safetensors files with an index."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = sorted(tensors)
    parts = {"model-1-of-2.safetensors": names[::2], "model-2-of-2.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name].clone() for name in part}, folder / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": weight_map}))


def to_pickle(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    torch.save({name: tensor.clone() for name, tensor in tensors.items()}, folder / "x.bin")
    (folder / WEIGHTS).unlink()
    (folder / "x.bin").rename(folder / "pytorch_model.bin")


def to_pickled_shards(folder: Path) -> None:
    to_pickle(folder)
    tensors = torch.load(folder / "pytorch_model.bin", weights_only=True)
    (folder / "pytorch_model.bin").unlink()
    for number, name in enumerate(tensors):
        torch.save({name: tensors[name].clone()}, folder / f"part-{number}.bin")
    weight_map = {name: f"part-{number}.bin" for number, name in enumerate(tensors)}
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("convert", [None, to_shards, to_pickle, to_pickled_shards])
def test_formats(convert: Callable[[Path], None] | None, folder: Path, model: Any) -> None:
    if convert:
        convert(folder)
    assert deviation(folder, model) < 2e-5


def test_shards_written_by_transformers(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(weight_files(tmp_path)) > 2
    assert deviation(tmp_path, model) < 2e-5


def test_old_style_config(folder: Path, model: Any) -> None:
    values = read_config(folder)
    scaling = {"type": "linear", "factor": 1.0}
    del values["rope_parameters"]
    values |= {"rope_theta": 10000.0, "rope_scaling": scaling, "torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(values))
    assert deviation(folder, model) < 2e-5


def test_tied_pickle_that_holds_both_names(tmp_path: Path) -> None:
    tied = tiny_model("LlamaConfig", tie_word_embeddings=True)
    tied.save_pretrained(tmp_path)
    to_pickle(tmp_path)
    torch.save(tied.state_dict(), tmp_path / "pytorch_model.bin")
    assert "lm_head.weight" in load_tensors(tmp_path)
    assert deviation(tmp_path, tied) < 2e-5


def absent_shard(folder: Path) -> None:
    to_shards(folder)
    (folder / "model-2-of-2.safetensors").unlink()


def no_weight_map(folder: Path) -> None:
    (folder / f"{WEIGHTS}.index.json").write_text("{}")


def truncated(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])


def empty(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"")


def truncated_pickle(folder: Path) -> None:
    to_pickle(folder)
    path = folder / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:-200])


def pickle_of_something_else(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    torch.save([1, 2, 3], folder / "pytorch_model.bin")


def pickle_with_code(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    torch.save({"x": Path("surprise")}, folder / "pytorch_model.bin")


def no_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def broken_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": ')


def config_of_another_kind(folder: Path) -> None:
    (folder / "config.json").write_text("[]")


def wider_config(folder: Path) -> None:
    edit_config(folder, intermediate_size=64)


def deeper_config(folder: Path) -> None:
    edit_config(folder, num_hidden_layers=3)


def other_family(folder: Path) -> None:
    edit_config(folder, model_type="gpt_neox")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (absent_shard, r"index\.json' names 1 files that are not there, such as 'model-2-of-2\.sa"),
        (no_weight_map, r"index\.json' has no weight_map: download the checkpoint again"),
        (truncated, r"model\.safetensors' is truncated or corrupt \(.*\): download it again"),
        (empty, r"model\.safetensors' is truncated or corrupt \(.*\): download it again"),
        (
            truncated_pickle,
            r"pytorch_model\.bin' is truncated or corrupt \(.*\): download it again",
        ),
        (pickle_of_something_else, r"\(it does not hold a mapping of tensors\)"),
        (pickle_with_code, r"pytorch_model\.bin' is truncated or corrupt \(Weights only load fail"),
        (no_weights, r"no weights in '.*': expected model\.safetensors or pytorch_model\.bin"),
        (no_config, r"no config\.json in '.*': it is not a Hugging Face checkpoint"),
        (broken_config, r"config\.json' is not JSON \(.*\): download it again"),
        (config_of_another_kind, r"config\.json' must hold a mapping, got list"),
        (wider_config, r"has 6 misshapen tensors: .*gate_proj\.weight is \[48, 32\], config\.json"),
        (deeper_config, r"has 9 missing tensors: model\.layers\.2\..* and 6 more"),
        (other_family, r"model_type 'gpt_neox' is not of the lean decoder .* adapter may run it"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_damaged_folders(damage: Callable[[Path], None], message: str, folder: Path) -> None:
    damage(folder)
    with pytest.raises(ModelError, match=message) as caught:
        load_decoder(folder, ops=TorchOps())
    assert "\n" not in str(caught.value)


def test_eos_token_ids(folder: Path) -> None:
    generation = folder / "generation_config.json"
    generation.write_text('{"eos_token_id": [5, 6]}')
    assert eos_token_ids(folder) == (5, 6)
    generation.write_text("{}")
    assert eos_token_ids(folder) == (2,)
    generation.unlink()
    assert eos_token_ids(folder) == (2,)
    edit_config(folder, eos_token_id=None)
    assert eos_token_ids(folder) == ()


def test_fingerprint_follows_weights_and_config(folder: Path) -> None:
    first = fingerprint(folder)
    assert fingerprint(folder) == first
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (folder / WEIGHTS).write_bytes(bytes(data))
    second = fingerprint(folder)
    edit_config(folder, rms_norm_eps=1e-3)
    assert len({first, second, fingerprint(folder)}) == 3


CPU = torch.device("cpu")
ACCELERATOR = torch.device("meta")


@pytest.mark.parametrize(
    ("dtype", "stored", "device", "expected"),
    [
        ("auto", "bfloat16", CPU, torch.float32),
        ("auto", "bfloat16", ACCELERATOR, torch.bfloat16),
        ("auto", None, ACCELERATOR, torch.float32),
        ("float16", "bfloat16", CPU, torch.float16),
    ],
)
def test_dtypes(dtype: str, stored: str | None, device: torch.device, expected: Any) -> None:
    assert pick_dtype(dtype, stored, device) == expected


def test_unknown_dtype(folder: Path) -> None:
    message = r"unknown dtype 'bf16'; did you mean .* \(known: auto, bfloat16, float16, float32\)"
    with pytest.raises(ModelError, match=message):
        load_decoder(folder, ops=TorchOps(), dtype="bf16")


def test_stored_in_a_dtype_nothing_runs_in() -> None:
    with pytest.raises(ModelError, match=r"weights stored as 'float8_e4m3fn': give dtype as one"):
        pick_dtype("auto", "float8_e4m3fn", ACCELERATOR)


def test_stored_dtype() -> None:
    assert stored_dtype({"torch_dtype": "float16"}) == "float16"
    assert stored_dtype({"text_config": {"dtype": "bfloat16"}}) == "bfloat16"
    assert stored_dtype({}) is None


@pytest.mark.parametrize("device", ["nonsense", "cuda:99"])
def test_unknown_device(device: str) -> None:
    with pytest.raises(ModelError, match=rf"device '{device}' cannot be used here \("):
        pick_device(device)


def test_resolve_local(folder: Path) -> None:
    assert resolve(str(folder)) == folder
    with pytest.raises(ModelError, match=r"revision 'v2' is for models on the hub, '.*' is a fold"):
        resolve(str(folder), revision="v2")


@pytest.mark.parametrize("name", ["no/such/folder", "./missing", "/missing", "~/missing", "a b"])
def test_no_such_folder(name: str) -> None:
    with pytest.raises(ModelError, match=rf"no folder '{name}', and it is no hub id such as"):
        resolve(name)


def test_shipped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(hub, "files", lambda package: tmp_path)
    with pytest.raises(ModelError, match=r"'demo' is missing from this installation: install"):
        resolve("demo")
    folder = tmp_path / "assets" / "demo" / "draft"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    assert resolve("demo-draft") == folder


def http_error(kind: type[Exception]) -> Exception:
    error = kind.__new__(kind)
    Exception.__init__(error, "first line\nsecond line")
    return error


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            "LocalEntryNotFoundError",
            r"not in the local cache .* out of reach: .* local folder \(first line\)",
        ),
        ("GatedRepoError", r"it is gated: ask for access on its page, then run `hf auth login`"),
        ("RepositoryNotFoundError", r"there is no such model, or it is private: check the name"),
        ("RevisionNotFoundError", r"it has no revision 'v2'"),
    ],
)
def test_hub_errors(kind: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    error = http_error(getattr(huggingface_hub.errors, kind))

    def fail(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(hub, "snapshot_download", fail)
    with pytest.raises(ModelError, match=r"cannot get 'some/model' from the hub: " + message):
        resolve("some/model", revision="v2")


@pytest.mark.parametrize(
    ("name", "shipped"),
    [("demoo", "demo"), ("demo-eagle", "demo-eagle3"), ("demo-medus", "demo-medusa")],
)
def test_a_slip_in_a_shipped_name_is_told(
    name: str, shipped: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    message = rf"cannot get '{name}' from the hub \(did you mean '{shipped}', which is shipped\?\)"
    with pytest.raises(ModelError, match=message):
        resolve(name)
    with pytest.raises(ModelError, match=rf"no folder '{name} '.*did you mean '{shipped}'"):
        resolve(f"{name} ")


@pytest.mark.parametrize("name", ["gpt2", "demo/demo-medus"])
def test_other_names_are_no_slips(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match=f"cannot get '{name}' from the hub: "):
        resolve(name)


def test_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    message = r"^cannot get 'outrider/none' from the hub: not in the local cache .* HF_HUB_OFFLINE"
    with pytest.raises(ModelError, match=message) as caught:
        resolve("outrider/none")
    assert "\n" not in str(caught.value)


def test_pickles_are_fetched_only_where_there_are_no_safetensors(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    wanted: list[list[str]] = []

    def download(name: str, *, allow_patterns: list[str], **_: Any) -> str:
        wanted.append(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", download)
    assert resolve("some/model") == tmp_path
    assert ["pytorch_model*.bin" in patterns for patterns in wanted] == [False, True]
    (tmp_path / WEIGHTS).touch()
    resolve("some/model")
    assert len(wanted) == 3
