"""A head is replaced by a surely better one only, and can be taken back."""

import pytest
import torch

from outrider.errors import ConfigError
from outrider.train.heads.acceptance import HEAD, Marks, Scores
from outrider.train.heads.promote import (
    check_in_use,
    check_out,
    compare,
    replace_head,
    roll_back,
    tally_of,
)


def tally(rates, *, num_rows=30, noise=0.02, seed=0):
    """One depth; a document's rows stand about as often as it says."""
    generator = torch.Generator().manual_seed(seed)
    rows = [
        (rate + noise * torch.randn(num_rows, 1, generator=generator)).clamp(0, 1) for rate in rates
    ]
    drawn = torch.cat(rows)
    units = torch.arange(len(rates)).repeat_interleave(num_rows)
    marks = {HEAD: Marks(drawn, drawn.round())}
    names = [f"d{i}" for i in range(len(rates))]
    return tally_of(Scores(marks, units, names, torch.zeros(len(drawn))))


OLD = [0.2, 0.9, 0.5, 0.7, 0.3, 0.6, 0.8, 0.4]


def test_a_small_gain_everywhere_is_found_because_documents_are_paired():
    found = compare(tally([rate + 0.05 for rate in OLD], seed=1), tally(OLD))
    assert found.is_better
    assert found.difference == pytest.approx(0.05, abs=0.01)
    assert found.low < found.difference < found.high
    assert found.num_documents == len(OLD)


def test_a_gain_on_one_document_is_not_sure():
    new = [*OLD[:-1], 0.9]
    found = compare(tally(new, seed=1), tally(OLD))
    assert found.difference > 0.05
    assert not found.is_better


def test_rows_of_one_document_are_no_evidence_for_others():
    """Resampling rows would call this sure: thousands of them, of four documents."""
    new, old = [0.9, 0.5, 0.4, 0.3], [0.5, 0.5, 0.4, 0.3]
    assert not compare(tally(new, num_rows=2000), tally(old, num_rows=2000)).is_better


def test_worse_and_equal_heads_are_not_better():
    assert not compare(tally([rate - 0.05 for rate in OLD], seed=1), tally(OLD)).is_better
    same = compare(tally(OLD), tally(OLD))
    assert (same.difference, same.is_better) == (0.0, False)


def test_too_few_documents_tell_nothing():
    with pytest.raises(ConfigError, match="3 held-out documents"):
        compare(tally(OLD[:3]), tally(OLD[:3]))


def head(folder, content):
    folder.mkdir()
    (folder / "config.json").write_text(content)
    return folder


def test_the_one_before_is_kept_and_taken_back(tmp_path):
    in_use, new = head(tmp_path / "use", "old"), head(tmp_path / "new", "new")
    (new / "work").mkdir()
    previous = replace_head(in_use, new)
    assert (in_use / "config.json").read_text() == "new"
    assert (previous / "config.json").read_text() == "old"
    assert not (in_use / "work").exists()
    newer = head(tmp_path / "newer", "newer")
    replace_head(in_use, newer)
    assert (previous / "config.json").read_text() == "new", "one step back, not the first of all"
    roll_back(in_use)
    assert (in_use / "config.json").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "newer", "use"]


def test_a_copy_that_fails_costs_nothing(tmp_path):
    """Neither the head in use nor the one before, which is removed last."""
    in_use, previous = head(tmp_path / "use", "now"), head(tmp_path / "use.previous", "before")
    with pytest.raises(OSError, match="absent"):
        replace_head(in_use, tmp_path / "absent")
    assert (in_use / "config.json").read_text() == "now"
    assert (previous / "config.json").read_text() == "before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["use", "use.previous"]


def test_the_one_before_may_be_put_back_by_promotion(tmp_path):
    in_use, previous = head(tmp_path / "use", "now"), head(tmp_path / "use.previous", "before")
    assert replace_head(in_use, previous) == previous
    assert (in_use / "config.json").read_text() == "before"
    assert (previous / "config.json").read_text() == "now"


def test_a_link_to_the_head_in_use_stays_a_link(tmp_path):
    real, new = head(tmp_path / "real", "old"), head(tmp_path / "new", "new")
    link = tmp_path / "use"
    link.symlink_to("real")
    replace_head(link, new)
    assert link.is_symlink()
    assert (real / "config.json").read_text() == (link / "config.json").read_text() == "new"
    assert (tmp_path / "real.previous" / "config.json").read_text() == "old"
    roll_back(link)
    assert (link / "config.json").read_text() == "old"


@pytest.mark.parametrize(
    "out",
    ["use", "use.previous", "use.incoming", "use/next", "use.previous/next", ".", "link"],
)
def test_a_run_must_not_write_where_promotion_replaces(tmp_path, out):
    in_use = head(tmp_path / "use", "old")
    (tmp_path / "link").symlink_to("use")
    with pytest.raises(ConfigError, match=r"out='.*' and promote='.*use': .*name another folder"):
        check_out(in_use, tmp_path / out)


def test_a_run_may_write_beside_what_promotion_replaces(tmp_path):
    in_use = head(tmp_path / "use", "old")
    for name in ("next", "use.next", "user"):
        check_out(in_use, tmp_path / name)


def test_nothing_to_take_back_and_nothing_in_use(tmp_path):
    in_use = head(tmp_path / "use", "old")
    with pytest.raises(ConfigError, match="nothing to go back to"):
        roll_back(in_use)
    with pytest.raises(ConfigError, match="no head is in use"):
        check_in_use(tmp_path / "absent")
    check_in_use(in_use)
