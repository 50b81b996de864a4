"""Text to token ids and back: tokenizers of `transformers`, and bare SentencePiece models."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from outrider.errors import RequestError, TokenizerError

Message = Mapping[str, Any]

SENTENCEPIECE = "tokenizer.model"
TRANSFORMERS = ("tokenizer.json", "tokenizer_config.json", "vocab.json")
NO_TEMPLATE = "the tokenizer has no chat template: send a plain prompt, or use an instruct model"


class Tokenizer(Protocol):
    """What the engine asks of any tokenizer.

    Attributes:
        vocab_size: ids are below it (added tokens counted); a model may have more logits.
        special_ids: ids that stand for no text (begin, end, padding, roles).
        backend: what a grammar compiler understands: the transformers tokenizer, or an object
            whose `token_bytes()` gives the bytes of every token.
    """

    vocab_size: int
    eos_token_id: int | None
    special_ids: frozenset[int]
    backend: Any

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, with the tokenizer's own begin and end tokens if wanted."""
        ...

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of the ids, spaces as they are; ids beyond the vocabulary stand for nothing.

        Bytes that are not (yet) a character come out as U+FFFD.
        """
        ...

    def apply_chat_template(
        self, messages: Sequence[Message], variables: Mapping[str, Any] | None = None
    ) -> list[int]:
        """Token ids of a conversation, up to where the assistant's next turn begins.

        Args:
            messages: mappings with `role` and `content` (or `tool_calls`).
            variables: further names the template reads, such as `tools` or `enable_thinking`.

        Raises:
            TokenizerError: there is no template.
            RequestError: a message is malformed, or the template refuses the conversation.
        """
        ...

    def token_text(self, token_id: int) -> str:
        """The token as it stands in the vocabulary ("▁the", "<0x0A>"); "" beyond it."""
        ...

    def vocabulary(self) -> dict[str, int]:
        """Every token, as in `token_text`, and its id."""
        ...

    def fingerprint(self) -> str:
        """Hex digest of the vocabulary; equal where `same_vocabulary` finds no difference."""
        ...


def load_tokenizer(folder: Path | str) -> Tokenizer:
    """The tokenizer of a checkpoint folder.

    Raises:
        TokenizerError: there is none, or it cannot be read.
    """
    folder = Path(folder)
    if any((folder / name).is_file() for name in TRANSFORMERS):
        return _load_transformers(folder)
    if (folder / SENTENCEPIECE).is_file():
        return _load_sentencepiece(folder / SENTENCEPIECE)
    raise TokenizerError(
        f"no tokenizer in {str(folder)!r}: copy tokenizer.json (or tokenizer.model) into it"
    )


def same_vocabulary(a: Tokenizer, b: Tokenizer) -> str | None:
    """Why two tokenizers do not share their token ids, with an example; None if they do."""
    a_ids, b_ids = a.vocabulary(), b.vocabulary()
    for token, token_id in sorted(a_ids.items(), key=lambda item: item[1]):
        if b_ids.get(token) != token_id:
            return (
                f"token {token!r} is {_place(a_ids, token)} here and {_place(b_ids, token)} there"
            )
    extra = sorted(b_ids.keys() - a_ids.keys(), key=lambda token: b_ids[token])
    if extra:
        return f"token {extra[0]!r} is not here and {_place(b_ids, extra[0])} there"
    return None


class TransformersTokenizer:
    """A `Tokenizer` around one of `transformers`."""

    def __init__(self, backend: Any) -> None:
        self.backend = backend
        self.vocab_size = max(backend.get_vocab().values(), default=-1) + 1
        self.eos_token_id: int | None = backend.eos_token_id
        self.special_ids = frozenset(backend.all_special_ids)
        self._decode = _decoder(backend, self.vocab_size)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(self.backend.encode(text, add_special_tokens=add_special_tokens))

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self._decode(ids, skip_special_tokens)

    def apply_chat_template(
        self, messages: Sequence[Message], variables: Mapping[str, Any] | None = None
    ) -> list[int]:
        check_messages(messages)
        if not self.backend.chat_template:
            raise TokenizerError(NO_TEMPLATE)
        try:
            text = self.backend.apply_chat_template(
                [dict(message) for message in messages],
                tokenize=False,
                add_generation_prompt=True,
                **(variables or {}),
            )
        except Exception as error:
            # A template is a program of the model's author: it may raise anything.
            raise RequestError(f"the chat template refuses the messages: {error}") from error
        return self.encode(text, add_special_tokens=False)

    def token_text(self, token_id: int) -> str:
        return (self.backend.convert_ids_to_tokens(token_id) or "") if token_id >= 0 else ""

    def vocabulary(self) -> dict[str, int]:
        return dict(self.backend.get_vocab())

    def fingerprint(self) -> str:
        return _digest(self.vocabulary())


class SentencePieceTokenizer:
    """A `Tokenizer` around a bare `tokenizer.model`: a begin token, no chat template (Llama 2)."""

    def __init__(self, processor: Any) -> None:
        self.backend = self
        self.vocab_size = int(processor.vocab_size())
        self.eos_token_id = int(processor.eos_id()) if processor.eos_id() >= 0 else None
        self.special_ids = frozenset(
            token_id
            for token_id in range(self.vocab_size)
            if processor.IsControl(token_id) or processor.IsUnknown(token_id)
        )
        self._bos = [int(processor.bos_id())] if processor.bos_id() >= 0 else []
        self._processor = processor

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return (self._bos if add_special_tokens else []) + list(self._processor.encode(text))

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        known = [token_id for token_id in ids if 0 <= token_id < self.vocab_size]
        if skip_special_tokens:
            return str(self._processor.decode([i for i in known if i not in self.special_ids]))
        return "".join(self._runs(known))

    def apply_chat_template(
        self, messages: Sequence[Message], variables: Mapping[str, Any] | None = None
    ) -> list[int]:
        check_messages(messages)
        raise TokenizerError(NO_TEMPLATE)

    def token_text(self, token_id: int) -> str:
        return str(self._processor.id_to_piece(token_id)) if 0 <= token_id < self.vocab_size else ""

    def vocabulary(self) -> dict[str, int]:
        return {self.token_text(token_id): token_id for token_id in range(self.vocab_size)}

    def token_bytes(self) -> list[bytes]:
        """Per token id its bytes inside a text; b"" for special tokens."""
        return [self._bytes_of(token_id) for token_id in range(self.vocab_size)]

    def fingerprint(self) -> str:
        return _digest(self.vocabulary())

    def _bytes_of(self, token_id: int) -> bytes:
        if token_id in self.special_ids:
            return b""
        piece = self.token_text(token_id)
        if self._processor.IsByte(token_id):
            return bytes.fromhex(piece[3:5])  # <0x0A>
        return piece.replace("▁", " ").encode()

    def _runs(self, ids: Sequence[int]) -> Iterator[str]:
        """Texts between special tokens, and the special tokens as they are written."""
        run: list[int] = []
        for token_id in ids:
            if token_id in self.special_ids:
                yield str(self._processor.decode(run))
                yield self.token_text(token_id)
                run = []
            else:
                run.append(token_id)
        yield str(self._processor.decode(run))


def check_messages(messages: Sequence[Message]) -> None:
    """RequestError unless every message has a role, and a content or tool calls."""
    if isinstance(messages, str | Mapping) or not messages:
        raise RequestError(f"messages={messages!r}: must be a list of at least one message")
    for index, message in enumerate(messages):
        name = f"messages[{index}]"
        if not isinstance(message, Mapping):
            raise RequestError(f"{name}={message!r}: must be a mapping with role and content")
        role = message.get("role")
        if not isinstance(role, str) or not role:
            raise RequestError(f"{name}.role={role!r}: must be a text such as 'user'")
        content = message.get("content")
        is_call = content is None and bool(message.get("tool_calls"))
        if not isinstance(content, str | list) and not is_call:
            raise RequestError(f"{name}.content={content!r}: must be a text")


def _load_transformers(folder: Path) -> Tokenizer:
    from transformers import AutoTokenizer  # takes seconds to import

    try:
        backend = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:
        # Tokenizer classes fail in as many ways as there are formats.
        raise _unreadable(folder, error) from error
    return TransformersTokenizer(backend)


def _decoder(backend: Any, vocab_size: int) -> Callable[[Sequence[int], bool], str]:
    """The backend's way from ids to text; its Rust part directly where nothing else has a say."""
    from transformers import PreTrainedTokenizerFast

    def decode(ids: Sequence[int], skips_special: bool) -> str:
        known = [token_id for token_id in ids if 0 <= token_id < vocab_size]
        return str(
            backend.decode(
                known, skip_special_tokens=skips_special, clean_up_tokenization_spaces=False
            )
        )

    names = ("decode", "_decode")
    if any(getattr(type(backend), n, n) is not getattr(PreTrainedTokenizerFast, n) for n in names):
        return decode
    rust: Callable[[Sequence[int], bool], str] = backend.backend_tokenizer.decode
    return rust


def _load_sentencepiece(path: Path) -> Tokenizer:
    from sentencepiece import SentencePieceProcessor

    try:
        return SentencePieceTokenizer(SentencePieceProcessor(model_file=str(path)))
    except (RuntimeError, OSError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> TokenizerError:
    first_line = (str(error).splitlines() or [type(error).__name__])[0]
    return TokenizerError(
        f"the tokenizer in {str(path)!r} cannot be read ({first_line}): download it again"
    )


def _digest(vocabulary: Mapping[str, int]) -> str:
    digest = hashlib.sha256()
    for token, token_id in sorted(vocabulary.items(), key=lambda item: (item[1], item[0])):
        digest.update(f"{token_id}:{token}\n".encode(errors="surrogatepass"))
    return digest.hexdigest()


def _place(vocabulary: Mapping[str, int], token: str) -> str:
    return f"id {vocabulary[token]}" if token in vocabulary else "not"
