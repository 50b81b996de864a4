"""Tokenizers of `transformers` and bare SentencePiece models, through the same methods."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from outrider.errors import RequestError, TokenizerError
from outrider.request import SamplingParams
from outrider.sampling.grammar import GrammarCompiler
from outrider.tokenizer import (
    Tokenizer,
    TransformersTokenizer,
    check_messages,
    load_tokenizer,
    same_vocabulary,
)

TEXT = ["the cat sat on the mat , and the dog did not .", "she said it's  two  spaces !"] * 20
AWKWARD = ["a , b .", " leading", "trailing ", "two  spaces", "don 't", "naïve 🐈\n\tx", ""]
TEMPLATE = (
    "{% for m in messages %}{{ m.role + ':' + m.content + '\n' }}{% endfor %}"
    "{{ 'think' if thinking else '' }}{% if add_generation_prompt %}assistant:{% endif %}"
)


def write_bpe(folder: Path, *, texts: Iterable[str] = TEXT, **config: Any) -> Path:
    """A byte-level BPE tokenizer as `tokenizer.json` with its `tokenizer_config.json`."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    values = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "clean_up_tokenization_spaces": True,
        **config,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    return folder


def write_sentencepiece(folder: Path) -> Path:
    """A bare `tokenizer.model` with byte fallback."""
    folder.mkdir(parents=True, exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    return folder


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(write_bpe(tmp_path_factory.mktemp("bpe"), chat_template=TEMPLATE))


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(write_sentencepiece(tmp_path_factory.mktemp("pieces")))


@pytest.fixture(params=["bpe", "pieces"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("text", AWKWARD)
def test_round_trip_is_exact(text: str, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(text)
    assert all(isinstance(token_id, int) for token_id in ids)
    assert tokenizer.decode(ids) == text


def test_special_tokens(tokenizer: Tokenizer) -> None:
    end = tokenizer.eos_token_id
    assert end is not None
    assert end in tokenizer.special_ids
    ids = [*tokenizer.encode("the cat"), end]
    assert tokenizer.decode(ids) == "the cat"
    assert tokenizer.decode(ids, skip_special_tokens=False).endswith("the cat</s>")
    assert tokenizer.token_text(end) == "</s>"


def test_begin_token(pieces: Tokenizer) -> None:
    ids = pieces.encode("the cat")
    assert ids == [pieces.vocabulary()["<s>"], *pieces.encode("the cat", add_special_tokens=False)]
    assert pieces.decode(ids, skip_special_tokens=False) == "<s>the cat"


def test_ids_that_a_padded_model_may_emit(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("the cat", add_special_tokens=False)
    beyond = tokenizer.vocab_size
    assert tokenizer.decode([*ids, beyond, beyond + 7]) == "the cat"
    assert tokenizer.token_text(beyond) == tokenizer.token_text(-1) == ""


def test_half_a_character(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("x🐈", add_special_tokens=False)
    assert len(ids) > 3
    assert "\ufffd" in tokenizer.decode(ids[:-1])
    assert tokenizer.decode(ids) == "x🐈"


def test_windows_of_ids_continue_a_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("the cat sat on the mat", add_special_tokens=False)
    for start in range(1, len(ids) - 2):
        settled = tokenizer.decode(ids[start : start + 1])
        assert tokenizer.decode(ids[start:]).startswith(settled)
        assert "the cat sat on the mat".endswith(tokenizer.decode(ids[start:])[len(settled) :])


def test_vocabulary(tokenizer: Tokenizer) -> None:
    vocabulary = tokenizer.vocabulary()
    assert sorted(vocabulary.values()) == list(range(tokenizer.vocab_size))
    assert all(tokenizer.token_text(token_id) == token for token, token_id in vocabulary.items())


def test_bytes_of_tokens(pieces: Tokenizer) -> None:
    all_bytes = pieces.backend.token_bytes()
    ids = pieces.encode("the cat\n🐈")
    assert b"".join(all_bytes[token_id] for token_id in ids) == " the cat\n🐈".encode()
    assert all_bytes[ids[0]] == b""
    assert len(all_bytes) == pieces.vocab_size


def test_grammars_understand_the_backend(tokenizer: Tokenizer) -> None:
    end = tokenizer.eos_token_id
    assert end is not None
    compiler = GrammarCompiler(tokenizer.backend, tokenizer.vocab_size, [end])
    mask_V = compiler.compile(SamplingParams(regex="cat|dog")).mask()
    assert mask_V is not None
    assert bool(mask_V[tokenizer.vocabulary()["c"]])
    assert not bool(mask_V[tokenizer.vocabulary()["t"]])


def test_chat_template(bpe: Tokenizer) -> None:
    messages = [{"role": "user", "content": "the cat"}]
    assert bpe.decode(bpe.apply_chat_template(messages)) == "user:the cat\nassistant:"
    thinking = bpe.apply_chat_template(messages, {"thinking": True})
    assert bpe.decode(thinking) == "user:the cat\nthinkassistant:"


def test_no_chat_template(pieces: Tokenizer, tmp_path: Path) -> None:
    for tokenizer in (pieces, load_tokenizer(write_bpe(tmp_path))):
        with pytest.raises(TokenizerError, match=r"has no chat template: send a plain prompt"):
            tokenizer.apply_chat_template([{"role": "user", "content": "x"}])


def test_a_template_that_refuses(tmp_path: Path) -> None:
    template = "{{ raise_exception('no system turns here') }}"
    tokenizer = load_tokenizer(write_bpe(tmp_path, chat_template=template))
    with pytest.raises(RequestError, match=r"template refuses the messages: no system turns here"):
        tokenizer.apply_chat_template([{"role": "system", "content": "x"}])


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], r"messages=\[\]: must be a list of at least one message"),
        ("hello", r"messages='hello': must be a list"),
        ({"role": "user", "content": "x"}, r"must be a list of at least one message"),
        (["hello"], r"messages\[0\]='hello': must be a mapping with role and content"),
        ([{"content": "x"}], r"messages\[0\]\.role=None: must be a text such as 'user'"),
        ([{"role": "user"}], r"messages\[0\]\.content=None: must be a text"),
        (
            [{"role": "user", "content": "x"}, {"role": "user", "content": 3}],
            r"messages\[1\]\.content=3: must be a text",
        ),
    ],
)
def test_malformed_messages(messages: Any, message: str, bpe: Tokenizer) -> None:
    with pytest.raises(RequestError, match=message):
        bpe.apply_chat_template(messages)


def test_a_tool_call_needs_no_content() -> None:
    check_messages([{"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}])


def test_same_vocabulary(bpe: Tokenizer, pieces: Tokenizer, tmp_path: Path) -> None:
    again = load_tokenizer(write_bpe(tmp_path / "again"))
    assert same_vocabulary(bpe, again) is None
    assert bpe.fingerprint() == again.fingerprint()
    assert bpe.fingerprint() != pieces.fingerprint()
    assert same_vocabulary(bpe, pieces) == "token '<s>' is id 0 here and id 1 there"


def test_vocabularies_of_which_one_goes_on(bpe: Tokenizer, tmp_path: Path) -> None:
    write_bpe(tmp_path)
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    backend.add_tokens(["<more>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    longer = load_tokenizer(tmp_path)
    token_id = bpe.vocab_size
    there, here = same_vocabulary(bpe, longer), same_vocabulary(longer, bpe)
    assert there == f"token '<more>' is not here and id {token_id} there"
    assert here == f"token '<more>' is id {token_id} here and not there"


def test_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"no tokenizer in '.*': copy tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_broken_tokenizers(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(TokenizerError, match=r"tokenizer\.model' cannot be read \(.*\): download"):
        load_tokenizer(tmp_path)
    write_bpe(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(TokenizerError, match=r"cannot be read \(.*\): download it again") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_real_sentencepiece(shared_data: Path) -> None:
    folder = shared_data / "weights" / "stories260K"
    if not folder.is_dir():
        pytest.skip(f"no checkpoint at {folder}")
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.vocab_size, tokenizer.eos_token_id) == (512, 2)
    assert tokenizer.special_ids == {0, 1, 2}
    ids = tokenizer.encode("Once upon a time, there was")
    assert ids[0] == 1
    assert tokenizer.decode(ids) == "Once upon a time, there was"
    assert tokenizer.token_text(ids[1]).startswith("▁")
    other = load_tokenizer(shared_data / "weights" / "chars940K")
    reason = same_vocabulary(tokenizer, other)
    assert reason is not None
    assert reason.startswith("token '")


def test_decoding_without_the_detour_reads_the_same(bpe: Tokenizer) -> None:
    """The Rust tokenizer is asked directly; ids beyond it, and special ones, as its owner says."""
    for ids in ([], [0, 5, 299, 1], list(range(300)), [5, 10**6], [10**6]):
        for skips in (True, False):
            known = [i for i in ids if i < bpe.vocab_size]
            told = bpe.backend.decode(
                known, skip_special_tokens=skips, clean_up_tokenization_spaces=False
            )
            assert bpe.decode(ids, skips) == told


def test_a_backend_that_reads_in_its_own_way_is_asked(bpe: Tokenizer) -> None:
    class Loud(type(bpe.backend)):  # type: ignore[misc]
        def _decode(self, *args: Any, **kwargs: Any) -> str:
            return str(super()._decode(*args, **kwargs)).upper()

    loud = Loud(tokenizer_object=bpe.backend.backend_tokenizer)
    assert TransformersTokenizer(loud).decode(bpe.encode("the cat"), True) == "THE CAT"
