"""Files become token ids, and only what the assistant says is learned of a conversation."""

import json

import pytest

from outrider.errors import ConfigError, TokenizerError
from outrider.tokenizer import load_tokenizer
from outrider.train.heads.texts import conversation, plain, read_texts
from outrider.train.vocabulary import train_tokenizer, write_tokenizer

WORDS = "Where is my order? It left today.\nThanks! You are welcome.\n"
CHAT = [
    {"role": "user", "content": "Where is my order?"},
    {"role": "assistant", "content": "It left today."},
    {"role": "user", "content": "Thanks!"},
    {"role": "assistant", "content": "You are welcome."},
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(train_tokenizer([WORDS], vocab_size=300), folder, max_positions=128)
    return load_tokenizer(folder)


def learned(text, tokenizer):
    """The learned runs as text."""
    runs, last = [], False
    for token, mark in zip(text.tokens, text.is_learned, strict=True):
        if mark and not last:
            runs.append([])
        if mark:
            runs[-1].append(token)
        last = mark
    return [tokenizer.decode(run, skip_special_tokens=False) for run in runs]


def test_only_answers_are_learned_and_all_is_there(tokenizer):
    text = conversation("c", CHAT, tokenizer)
    assert learned(text, tokenizer) == ["It left today.<|end|>\n", "You are welcome.<|end|>\n"]
    whole = tokenizer.decode(text.tokens, skip_special_tokens=False)
    assert whole == tokenizer.backend.apply_chat_template(CHAT, tokenize=False)
    prompt = tokenizer.apply_chat_template(CHAT[:3])
    assert text.tokens[: text.num_prompt] == prompt, "as serving would tokenise it"


def test_a_question_alone_is_a_prompt(tokenizer):
    text = conversation("c", CHAT[:1], tokenizer)
    assert text.tokens == tokenizer.apply_chat_template(CHAT[:1])
    assert text.num_prompt == len(text.tokens)
    assert not any(text.is_learned)


def test_a_template_that_rewrites_history_leaves_the_last_answer(tokenizer, monkeypatch):
    original = tokenizer.backend.chat_template
    rewriting = (
        "{%- for m in messages -%}"
        "{%- if m.role == 'user' -%}<|user|>{{ m.content }}"
        "{%- elif loop.last -%}<|assistant|>(thought) {{ m.content }}"
        "{%- else -%}<|assistant|>{{ m.content }}{%- endif -%}{%- endfor -%}"
        "{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"
    )
    monkeypatch.setattr(tokenizer.backend, "chat_template", rewriting)
    text = conversation("c", CHAT, tokenizer)
    assert learned(text, tokenizer) == ["(thought) You are welcome."]
    assert original != rewriting


def test_a_plain_text_is_learned_whole_and_ends(tokenizer):
    text = plain("p", WORDS, tokenizer)
    assert all(text.is_learned)
    assert text.tokens == [*tokenizer.encode(WORDS), tokenizer.eos_token_id]


ROWS = [
    {"messages": CHAT},
    {"conversations": [{"from": "human", "value": "Thanks!"}, {"from": "gpt", "value": "You"}]},
    {"prompt": "Thanks!", "response": "You are welcome."},
    {"question": "Thanks!", "answer": "You are welcome."},
    {"text": WORDS},
    {"turns": ["Where is my order?", "Thanks!"]},
]


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_rows_of_every_layout_are_read(tokenizer, tmp_path, suffix):
    path = tmp_path / f"data{suffix}"
    lines = "\n".join(map(json.dumps, ROWS)) if suffix == ".jsonl" else json.dumps(ROWS)
    path.write_text(lines)
    texts = read_texts([path], tokenizer)
    answers = ["".join(learned(text, tokenizer)) for text in texts]
    assert answers[1] == "You<|end|>\n"
    assert answers[2] == answers[3] == "You are welcome.<|end|>\n"
    assert answers[4] == f"{WORDS}<|end|>"
    assert answers[5] == ""
    assert len({text.name for text in texts}) == len(ROWS)


def test_a_text_file_is_one_document(tokenizer, tmp_path):
    path = tmp_path / "words.txt"
    path.write_text(WORDS)
    whole = plain(str(path), WORDS, tokenizer)._replace(domain="words")
    assert read_texts([path], tokenizer) == [whole]


def test_a_row_says_its_domain_or_its_file_does(tokenizer, tmp_path):
    path = tmp_path / "notes.jsonl"
    rows = [{"domain": "code"}, {"category": "math"}, {"domain": 7}, {}]
    path.write_text("\n".join(json.dumps({"text": WORDS, **row}) for row in rows))
    domains = [text.domain for text in read_texts([path], tokenizer)]
    assert domains == ["code", "math", "notes", "notes"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"question": 3}', "need 'messages'"),
        ("a.jsonl", "{", "not JSON"),
        ("a.jsonl", "[1]", "must be a mapping"),
        ("a.txt", " \n", "nothing to learn from"),
        ("absent/b.txt", None, "no file"),
    ],
)
def test_a_mistake_is_told(tokenizer, tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_texts([path], tokenizer)


def test_conversations_need_a_template(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer.backend, "chat_template", None)
    with pytest.raises(TokenizerError, match="no chat template"):
        conversation("c", CHAT, tokenizer)
