"""`outrider bench report`: files in, pages out."""

import pytest

from outrider.bench.result import Result

pytest.importorskip("matplotlib", reason="plots need matplotlib")


def write(path, **changes):
    facts = {"kind": "ab", "findings": {"pairs": [{"arm": "ngram", "ratio": 1.5}]}, **changes}
    Result(**facts).write(path)
    return path


def test_it_prints_where_the_pages_are(tmp_path, call):
    path = write(tmp_path / "one.json")
    printed = call("bench", "report", path, "--out", tmp_path / "pages")
    page, summary, data = printed.stdout.split()
    assert (page, summary, data) == tuple(
        str(tmp_path / "pages" / name) for name in ("report.html", "report.md", "report.json")
    )
    assert "ngram against the base arm: -, 1.500 times as fast." in (
        (tmp_path / "pages" / "report.md").read_text()
    )


def test_files_of_one_name_are_told_apart(tmp_path, call):
    paths = [write(tmp_path / folder / "ab.json") for folder in ("old", "new")]
    call("bench", "report", *paths, "--out", tmp_path / "pages")
    assert "new/ab beside" in (tmp_path / "pages" / "report.html").read_text()


def test_what_does_not_compare_is_refused(tmp_path, refused):
    one = write(tmp_path / "one.json", data={"hash": "a"})
    two = write(tmp_path / "two.json", data={"hash": "b"})
    message = refused("bench", "report", one, two, "--out", tmp_path / "pages")
    assert "data hash is 'a' in one and 'b' in the other" in message
    assert not (tmp_path / "pages").exists()


def test_a_file_that_is_no_result_is_refused(tmp_path, refused):
    (tmp_path / "x.json").write_text("{}")
    assert "no result file" in refused("bench", "report", tmp_path / "x.json")
