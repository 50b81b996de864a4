"""Any text survives the tokenizer, and the template renders what the models were trained on."""

from pathlib import Path

import pytest
from hypothesis import given, strategies as st
from jinja2.exceptions import TemplateError
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from outrider.train.vocabulary import (
    END,
    SPECIAL_TOKENS,
    Message,
    render_chat,
    train_tokenizer,
    write_tokenizer,
)

CHAT = [Message("system", "Be brief."), Message("user", "Hi\nyou"), Message("assistant", "Yes.")]


@pytest.fixture(scope="module")
def loaded(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> object:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(tokenizer, folder, max_positions=64)
    return AutoTokenizer.from_pretrained(folder)


@given(text=st.text())
def test_round_trip_is_exact(loaded: PreTrainedTokenizerBase, text: str) -> None:
    assert loaded.decode(loaded.encode(text)) == text


@given(text=st.lists(st.sampled_from([*SPECIAL_TOKENS, " ", "\n", "a .", " ,", "'s"])).map("".join))
def test_special_tokens_and_spaces_survive(loaded: PreTrainedTokenizerBase, text: str) -> None:
    assert loaded.decode(loaded.encode(text)) == text


def test_digits_stand_alone(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.encode("12345").ids) == 5


def test_special_tokens_come_first(loaded: PreTrainedTokenizerBase) -> None:
    assert loaded.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(len(SPECIAL_TOKENS)))
    assert (loaded.eos_token, loaded.pad_token, loaded.bos_token) == (END, "<|pad|>", None)


def test_template_renders_the_training_text(loaded: PreTrainedTokenizerBase) -> None:
    messages = [message._asdict() for message in CHAT]
    rendered = loaded.apply_chat_template(messages, tokenize=False)
    assert rendered == f"{render_chat(CHAT)}{END}\n"
    prompt = loaded.apply_chat_template(messages[:2], tokenize=False, add_generation_prompt=True)
    assert rendered.startswith(prompt)
    assert prompt.endswith("<|assistant|>\n")


def test_template_refuses_unknown_roles(loaded: PreTrainedTokenizerBase) -> None:
    with pytest.raises(TemplateError, match="oracle"):
        loaded.apply_chat_template([{"role": "oracle", "content": ""}], tokenize=False)


def test_too_small_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="200"):
        train_tokenizer(["text"], vocab_size=200)
