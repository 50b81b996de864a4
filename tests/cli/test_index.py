"""`outrider index`: a datastore that `generate` can draft from, and mistakes in one line."""

import json

import pytest

from outrider.draft.datastore import Datastore
from outrider.tokenizer import load_tokenizer

CODE = "def main(argv):\n    return [line.strip() for line in argv]\n"


@pytest.fixture
def corpus(tmp_path):
    """A folder of two texts, and what is none."""
    folder = tmp_path / "corpus"
    (folder / "inner").mkdir(parents=True)
    (folder / ".git").mkdir()
    (folder / "b.py").write_text(CODE * 2)
    (folder / "inner" / "a.txt").write_text("the quick brown fox\n")
    (folder / "empty.txt").write_text("\n")
    (folder / "picture.bin").write_bytes(b"\xff\xfe\x00")
    (folder / ".git" / "config").write_text("hidden")
    return folder


def test_the_summary_is_one_line_of_json_and_the_folder_holds_the_texts(
    call, model, corpus, tmp_path
):
    out = tmp_path / "store"
    extra = tmp_path / "extra.md"
    extra.write_text("# naïve\n")
    result = call("index", "build", extra, corpus, "--model", model, "--output", out)
    (line,) = result.stdout.splitlines()
    tokenizer, store = load_tokenizer(model), Datastore.load(out)
    texts = ["# naïve\n", CODE * 2, "the quick brown fox\n"]
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    assert json.loads(line) == {
        "datastore": str(out),
        "num_tokens": sum(map(len, ids)),
        "num_documents": 3,
        "num_skipped_files": 2,
        "vocab_size": tokenizer.vocab_size,
    }
    assert store.tokens.tolist() == [token for document in ids for token in (*document, -1)]
    assert store.header.fingerprint == tokenizer.fingerprint()


def test_generate_drafts_from_it_and_answers_the_same(call, model, corpus, tmp_path):
    out = tmp_path / "store"
    call("index", "build", corpus, "--model", model, "--output", out)
    asked = ("--prompt", "def main(", "--max-tokens", 12, "--json")
    plain = json.loads(call("generate", model, *asked).stdout)["completions"][0]
    result = call("generate", model, *asked, "--datastore", out, "--speculation", "rest")
    drafted = json.loads(result.stdout)["completions"][0]
    assert drafted["token_ids"] == plain["token_ids"]
    assert drafted["metrics"]["drafter"] == "rest"
    assert drafted["metrics"]["num_draft_tokens"] > 0


def test_chat_takes_a_datastore_and_settings(call, model, corpus, tmp_path, monkeypatch):
    loaded = {}

    def llm(name, **options):
        loaded.update(options)
        raise ValueError("seen enough")

    monkeypatch.setattr("outrider.cli.options.LLM", llm)
    with pytest.raises(AssertionError, match="seen enough"):
        call("chat", model, "--datastore", corpus, "--drafter-settings", '{"suffix": {"depth": 9}}')
    assert loaded["datastore"] == str(corpus)
    assert loaded["drafter_settings"] == {"suffix": {"depth": 9}}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("{corpus}/nothing", "--model", "{model}"), "no file or folder"),
        (("{corpus}/picture.bin", "--model", "{model}"), "is no UTF-8 text: leave it out"),
        (("{corpus}/empty.txt", "--model", "{model}"), "no tokens: name files with text"),
        (("{corpus}", "--model", "no/such/model"), "no folder 'no/such/model'"),
        (("{corpus}", "--model", "{corpus}"), "no tokenizer in"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(refused, model, corpus, tmp_path, args, message):
    out = tmp_path / "store"
    args = [arg.format(corpus=corpus, model=model) for arg in args]
    assert message in refused("index", "build", *args, "--output", out)
    assert not out.exists()
