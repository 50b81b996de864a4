"""What an engine does with a trained draft, by domain: counted right, and written down."""

import json

import pytest

from outrider.errors import PairError
from outrider.train.heads import run
from outrider.train.heads.by_domain import ALL, Figures, serve, served_table, spread
from outrider.train.heads.pieces import Piece, cut
from outrider.train.heads.session import train_draft
from outrider.train.heads.texts import Text
from tests.train.heads.checkpoint import TEXT, WORDS, small_run, write_target


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return write_target(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "texts.jsonl"
    rows = [
        {"text": f"{i} {TEXT.format(' '.join(WORDS[i % 8 :]))}", "domain": "code" if i % 3 else ""}
        for i in range(24)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def piece(name, domain, tokens, num_prompt=4):
    text = Text(name, tokens, [True] * len(tokens), num_prompt, domain)
    return Piece(text, name, name)


def test_prompts_are_of_all_domains_alike():
    pieces = [piece(f"{name}{i}", name, [1] * 9) for name in "ab" for i in range(4)]
    pieces += [piece("c0", "c", [1] * 9), piece("c1", "c", [1] * 9, num_prompt=0)]
    assert [one.unit for one in spread(pieces, 6)] == ["a0", "b0", "c0", "a1", "b1", "a2"]
    assert spread([], 5) == []


def test_a_draft_that_is_the_target_stands_wherever_it_is_drafted(target):
    pieces = [piece(name, name[0], [5, 6, 7, 8, 9, 10 + i]) for i, name in enumerate(("a", "b"))]
    found = serve(str(target), target, pieces, num_draft_tokens=3, num_prompts=2, device="cpu")
    for total, domains in found.kinds.values():
        assert set(domains) == {"a", "b"}
        assert total.num_drafts == domains["a"].num_drafts + domains["b"].num_drafts
        assert total.acceptance_length > 3.5  # less the last steps of an answer
        assert total.same_share == 1.0
    lines = served_table(found).splitlines()
    assert [line.split("|")[1].strip() for line in lines] == ["in the engine", "---", "a", "b", ALL]
    assert len(served_table(found._replace(kinds=one_domain(found))).splitlines()) == 3


def one_domain(found):
    return {
        kind: Figures(domains["a"], {"a": domains["a"]})
        for kind, (_, domains) in found.kinds.items()
    }


def test_a_domain_may_be_called_all(target):
    pieces = [piece(name, name, [5, 6, 7, 8, 9, 10]) for name in ("all", "b")]
    found = serve(str(target), target, pieces, num_draft_tokens=3, num_prompts=2, device="cpu")
    total, domains = found.kinds["greedy"]
    assert total.num_drafts == 2 * domains["all"].num_drafts == 2 * domains["b"].num_drafts > 0
    names = [line.split("|")[1].strip() for line in served_table(found).splitlines()[2:]]
    assert names == ["all", "b", ALL]
    written = found.to_json()["greedy"]
    assert written["total"]["num_drafts"] == 2 * written["domains"]["all"]["num_drafts"]


def test_a_run_ends_in_the_engine(target, data, tmp_path):
    lines = []
    outcome = train_draft(small_run(target, data, tmp_path, served_prompts=3), lines.append)
    assert outcome.served.num_prompts == 3
    assert set(outcome.served.kinds["greedy"].domains) <= {"code", "texts"}
    assert all(figures.total.same_share == 1.0 for figures in outcome.served.kinds.values())
    card = (tmp_path / "README.md").read_text()
    assert served_table(outcome.served) in card
    assert "6 of 6 answers were those of plain decoding" in card
    assert "GiB (the whole process" in card
    about = json.loads((tmp_path / "outrider.json").read_text())["training"]
    assert about["served"]["num_prompts"] == 3
    assert about["peak_memory_bytes"] > 1e6


def test_it_may_be_left_out(target, data, tmp_path):
    outcome = train_draft(small_run(target, data, tmp_path, served_prompts=0))
    assert outcome.served is None
    assert "In the engine" not in (tmp_path / "README.md").read_text()


def test_a_draft_that_no_engine_serves_is_written_all_the_same(target, data, tmp_path, monkeypatch):
    def refuse(*args, **options):
        raise PairError("no room")

    monkeypatch.setattr(run, "serve", refuse)
    lines = []
    outcome = train_draft(small_run(target, data, tmp_path), lines.append)
    assert outcome.served is None
    assert any("no engine serves it as it is: no room" in line for line in lines)
    assert (tmp_path / "README.md").exists()


def test_pieces_of_a_document_are_of_its_domain():
    text = Text("t", list(range(40)), [True] * 40, 4, "code")
    assert {one.text.domain for one in cut([text], 16)} == {"code"}
