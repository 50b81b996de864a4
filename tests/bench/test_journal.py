"""Journal: what was finished is found again, whatever the moment of the interruption."""

import json

import pytest

from outrider.bench.journal import Journal, open_journal
from outrider.errors import ConfigError

PLAN = {"kind": "ab", "arms": ["off", "on"], "seed": 0}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "folder" / "ab.json"


def test_an_interrupted_run_finds_its_blocks(path):
    with open_journal(path, PLAN) as journal:
        journal.add("0.0", {"seconds": (1.5, None)})
        journal.add("0.1", [1])
    with open_journal(path, PLAN, resume=True) as journal:
        assert dict(journal.items()) == {"0.0": {"seconds": [1.5, None]}, "0.1": [1]}
        assert journal.num_resumed == len(journal) == 2
        assert "0.1" in journal
        assert "0.2" not in journal
        journal.add("0.2", 3)
    with open_journal(path, PLAN, resume=True) as journal:
        assert journal["0.2"] == 3
        assert len(journal) == 3


def test_a_block_is_given_back_as_it_will_be_read(path):
    with open_journal(path, PLAN) as journal:
        assert journal.add("a", {"t": (1, float("inf"))}) == {"t": [1, None]}


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_line_that_breaks_off_is_measured_again(path, cut):
    with open_journal(path, PLAN) as journal:
        journal.add("a", 1)
        journal.add("b", {"long": "x" * 30})
    file = path.with_name("ab.json.journal")
    file.write_text(file.read_text()[:-cut])
    with open_journal(path, PLAN, resume=True) as journal:
        assert [key for key, _ in journal.items()] == (["a", "b"] if cut == 1 else ["a"])
        journal.add("c", 2)
    lines = file.read_text().splitlines()
    assert all(json.loads(line) for line in lines)
    assert "c" in lines[-1]


def test_another_plan_is_refused_and_the_difference_named(path):
    with open_journal(path, PLAN) as journal:
        journal.add("a", 1)
    with pytest.raises(ConfigError, match=r"seed: 0, now 1.*drop --resume"):
        open_journal(path, {**PLAN, "seed": 1}, resume=True)
    with open_journal(path, PLAN, resume=True) as journal:
        assert "a" in journal, "the refusal left it as it was"


def test_without_resume_a_run_begins_anew(path):
    with open_journal(path, PLAN) as journal:
        journal.add("a", 1)
    with open_journal(path, PLAN) as journal:
        assert len(journal) == 0


def test_a_finished_run_leaves_nothing(path):
    with open_journal(path, PLAN) as journal:
        journal.add("a", 1)
        journal.finish()
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize(
    ("result", "message"), [(None, "give --json FILE"), ("x.json", "no .*x.json.journal' to go on")]
)
def test_nothing_to_go_on_with_is_told(tmp_path, result, message):
    with pytest.raises(ConfigError, match=message):
        open_journal(tmp_path / result if result else None, PLAN, resume=True)


def test_a_file_of_something_else_is_told(path):
    path.parent.mkdir()
    path.with_name("ab.json.journal").write_text('{"kind": "ab"}\n')
    with pytest.raises(ConfigError, match="no journal of this version"):
        open_journal(path, PLAN, resume=True)


def test_without_a_path_it_only_remembers():
    journal = Journal(None, PLAN)
    journal.add("a", 1)
    assert journal["a"] == 1
    journal.finish()
