"""`outrider train grow --head`: heads beside the target they were grown along with."""

import json
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from outrider.cli.main import app
from outrider.models.heads.load import load_head
from outrider.models.heads.spec import TargetSpec
from tests.train.test_grow_heads import eagle3, kv, medusa, write_target

SIZES = ("--hidden-size", 24, "--num-layers", 9)


def call(*args: object) -> Result:
    return CliRunner().invoke(app, ["train", "grow", *map(str, args)])


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_target(tmp_path / "source")


def test_heads_are_written_beside_the_target(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    heads = [make(tmp_path / make.__name__) for make in (eagle3, medusa, kv)]
    result = call(source, out, *SIZES, *(word for head in heads for word in ("--head", head)))
    assert result.exit_code == 0, result.output
    assert result.stdout == ""
    spec = TargetSpec.from_config(json.loads((out / "config.json").read_text()), name="out")
    for head in heads:
        place = out / "heads" / head.name
        assert f"wrote {place}\n" in result.stderr
        assert load_head(place, spec).spec.widths.hidden == 24


def test_again_gives_the_same_files(source: Path, tmp_path: Path) -> None:
    """Also where a first call had written the target alone."""
    head, written = kv(tmp_path / "kv"), []
    for more in ((), ("--head", head), ("--head", head)):
        assert call(source, tmp_path / "out", *SIZES, *more).exit_code == 0
        files = sorted((tmp_path / "out").rglob("*.safetensors"))
        written.append([path.read_bytes() for path in files])
    assert written[1] == written[2]
    assert written[0][0] in written[1]


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        (("kv", "other/kv"), "heads/kv"),
        (("no/such",), "no/such"),
        (("demo-kv",), "another model"),
    ],
)
def test_a_mistake_is_one_line(
    source: Path, tmp_path: Path, heads: tuple[str, ...], message: str
) -> None:
    kv(tmp_path / "kv")
    kv(tmp_path / "other" / "kv")
    paths = [tmp_path / head if (tmp_path / head).is_dir() else head for head in heads]
    words = [word for path in paths for word in ("--head", path)]
    result = call(source, tmp_path / "out", *SIZES, *words)
    assert result.exit_code == 2
    assert message in result.stderr.splitlines()[-1]
    assert f"error: --head '{paths[-1]}': " in result.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists(), "all heads are looked at before anything is written"


def test_a_late_head_that_is_unfit_costs_nothing(source: Path, tmp_path: Path) -> None:
    fit = kv(tmp_path / "fit")
    unfit = kv(tmp_path / "unfit", hidden=8)
    result = call(source, tmp_path / "out", *SIZES, "--head", fit, "--head", unfit)
    assert f"error: --head '{unfit}': the head '{unfit}' is 8 wide" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("out", ["kv", "source", "file"])
def test_what_is_read_is_not_written_over(source: Path, tmp_path: Path, out: str) -> None:
    head = kv(tmp_path / "kv")
    (tmp_path / "file").write_text("kept")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    result = call(source, tmp_path / out, *SIZES, "--head", head)
    assert result.exit_code == 2
    assert str(tmp_path / out) in result.stderr.splitlines()[-1]
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_noise_is_on_the_cards(source: Path, tmp_path: Path) -> None:
    head = kv(tmp_path / "kv")
    assert call(source, tmp_path / "out", *SIZES, "--head", head, "--noise", 0.1).exit_code == 0
    about = json.loads((tmp_path / "out" / "heads" / "kv" / "outrider.json").read_text())
    assert about["growth"]["noise"] == 0.1
