"""Files of text or conversations as token ids, with marks on the tokens that are learned from.

In a conversation those are the assistant's; in plain text all of them.
"""

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from outrider.errors import ConfigError, TokenizerError
from outrider.tokenizer import NO_TEMPLATE, Tokenizer, check_messages

ROWS = (".jsonl", ".json")
PROMPT_OF_TEXT = 64
SPEAKERS = {"human": "user", "gpt": "assistant", "bot": "assistant"}
PAIRS = (
    ("prompt", "response"),
    ("prompt", "completion"),
    ("question", "answer"),
    ("instruction", "output"),
)

QUESTIONS = ("prompt", "question", "instruction", "turns")  # alone: answers are to be written


DOMAINS = ("domain", "category")


class Text(NamedTuple):
    """One document, or a piece of one.

    Attributes:
        name: unique among the texts of a run.
        is_learned: per token, whether the law that yields it is learned.
        num_prompt: tokens that come before the answer, for who writes another one.
        domain: what it is about, as its row says; else the name of its file.
    """

    name: str
    tokens: list[int]
    is_learned: list[bool]
    num_prompt: int
    domain: str = ""


def read_texts(paths: Sequence[Path], tokenizer: Tokenizer) -> list[Text]:
    """All documents of the files: a text file is one, a row of a .jsonl (.json) file is one.

    Raises:
        ConfigError: a file is absent or empty, is no such text, or holds a row that is neither a
            conversation nor a text.
        TokenizerError: there are conversations, and the target has no chat template.
    """
    # It warns of texts longer than the model's context; pieces are cut later.
    logging.getLogger("transformers.tokenization_utils_base").setLevel(logging.ERROR)
    texts: list[Text] = []
    for path in paths:
        if not path.is_file():
            raise ConfigError(f"no file {str(path)!r}: name one with text or conversations")
        found = list(_read(path, tokenizer))
        if not found:
            raise ConfigError(f"{str(path)!r} holds nothing to learn from: leave it out")
        texts += found
    return texts


def plain(name: str, text: str, tokenizer: Tokenizer) -> Text:
    """A text that is learned whole, closed by the end token."""
    tokens = tokenizer.encode(text)
    if tokenizer.eos_token_id is not None:
        tokens.append(tokenizer.eos_token_id)
    return Text(name, tokens, [True] * len(tokens), min(PROMPT_OF_TEXT, len(tokens) // 2))


def conversation(name: str, messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer) -> Text:
    """A conversation in the target's own template; each side is tokenised as serving would.

    Where the template writes earlier turns otherwise once later ones follow (some drop thoughts),
    only the last answer is learned.
    """
    check_messages(messages)
    render = _renderer(tokenizer)
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    whole = render(messages, False)
    spans = [_span(render, messages, turn) for turn in turns]
    if not all(whole.startswith(after) for _, after in spans):
        turns, spans = turns[-1:], spans[-1:]
        whole = spans[0][1]
    tokens: list[int] = []
    is_learned: list[bool] = []
    at = num_prompt = 0
    for before, after in spans:
        for text, learned in ((whole[at : len(before)], False), (after[len(before) :], True)):
            ids = tokenizer.encode(text, add_special_tokens=False) if text else []
            num_prompt = len(tokens) if learned else num_prompt
            tokens += ids
            is_learned += [learned] * len(ids)
        at = len(after)
    if not turns:
        tokens = tokenizer.encode(render(messages, True), add_special_tokens=False)
        return Text(name, tokens, [False] * len(tokens), len(tokens))
    return Text(name, tokens, is_learned, num_prompt)


Render = Callable[[Sequence[Mapping[str, Any]], bool], str]


def _renderer(tokenizer: Tokenizer) -> Render:
    backend = tokenizer.backend
    if not getattr(backend, "chat_template", None):
        raise TokenizerError(NO_TEMPLATE)

    def render(messages: Sequence[Mapping[str, Any]], asks: bool) -> str:
        return str(
            backend.apply_chat_template(
                [dict(message) for message in messages],
                tokenize=False,
                add_generation_prompt=asks,
            )
        )

    return render


def _span(render: Render, messages: Sequence[Mapping[str, Any]], turn: int) -> tuple[str, str]:
    """The text up to an answer, and up to its end."""
    before, after = render(messages[:turn], True), render(messages[: turn + 1], False)
    if not after.startswith(before):
        raise ConfigError(
            "the chat template does not begin an answer as it asks for one, so the answer cannot "
            "be told from its prompt: give the texts themselves, as rows with a 'text'"
        )
    return before, after


def _read(path: Path, tokenizer: Tokenizer) -> Iterator[Text]:
    try:
        raw = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{str(path)!r} is no UTF-8 text: leave it out") from error
    if path.suffix not in ROWS:
        if raw.strip():
            yield plain(str(path), raw, tokenizer)._replace(domain=path.stem)
        return
    for number, row in enumerate(_rows(path, raw), 1):
        text = _row(f"{path}:{number}", row, tokenizer)
        yield text._replace(domain=_domain(row) or path.stem)


def _rows(path: Path, raw: str) -> list[Any]:
    try:
        if path.suffix == ".json":
            rows = json.loads(raw)
            return rows if isinstance(rows, list) else [rows]
        return [json.loads(line) for line in raw.splitlines() if line.strip()]
    except json.JSONDecodeError as error:
        raise ConfigError(f"{str(path)!r} is not JSON ({error}): mend it") from error


def _row(name: str, row: Any, tokenizer: Tokenizer) -> Text:
    if not isinstance(row, Mapping):
        raise ConfigError(f"{name}: a row must be a mapping, got {type(row).__name__}")
    messages = _messages(row)
    if messages is not None:
        return conversation(name, messages, tokenizer)
    text = row.get("text") or row.get("content")
    if isinstance(text, str) and text:
        return plain(name, text, tokenizer)
    known = ", ".join(f"{a!r} and {b!r}" for a, b in PAIRS)
    raise ConfigError(
        f"{name}: found {sorted(map(str, row))}, need 'messages', 'conversations', {known}, "
        "or 'text'"
    )


def _domain(row: Mapping[str, Any]) -> str:
    found = (row[name] for name in DOMAINS if isinstance(row.get(name), str))
    return next(found, "")


def _messages(row: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    if isinstance(row.get("messages"), list):
        return list(row["messages"])
    if isinstance(row.get("conversations"), list):
        return [_shared(turn) for turn in row["conversations"]]
    for question, answer in PAIRS:
        if isinstance(row.get(question), str) and isinstance(row.get(answer), str):
            return [
                {"role": "user", "content": row[question]},
                {"role": "assistant", "content": row[answer]},
            ]
    alone = next((row[key] for key in QUESTIONS if row.get(key)), None)
    first = alone[0] if isinstance(alone, list) else alone
    return [{"role": "user", "content": first}] if isinstance(first, str) else None


def _shared(turn: Mapping[str, Any]) -> dict[str, Any]:
    """A turn as ShareGPT writes it, or as everybody else."""
    speaker = str(turn.get("from", turn.get("role", "")))
    return {
        "role": SPEAKERS.get(speaker, speaker),
        "content": turn.get("value", turn.get("content")),
    }
