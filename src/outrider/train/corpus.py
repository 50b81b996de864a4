"""The training text: documents by domain, each from a source with a licence, a few held out.

Only the sources listed here are read; whatever else a corpus folder holds stays unseen.
"""

import hashlib
import json
import lzma
import re
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from outrider.train.vocabulary import Message, render_chat

DOMAINS = ("code", "docs", "books", "math", "dialogue")
MIN_HELD_OUT = 4
MAX_BOOK_CHARACTERS = 80_000
_SKIPPED_FOLDERS = {"test", "tests", "idlelib", "lib2to3", "site-packages", "encodings"}


class Document(NamedTuple):
    """One text that belongs together; `name` is unique within its source."""

    name: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where documents of one domain come from, and on what terms; `path` None needs no folder."""

    name: str
    domain: str
    licence: str
    attribution: str
    path: str | None
    read: Callable[[Path], Iterator[Document]]


@dataclass(frozen=True, kw_only=True)
class Domain:
    """Documents of one kind: those to learn from and those never trained on."""

    name: str
    training: tuple[Document, ...]
    held_out: tuple[Document, ...]


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """All domains that have documents, and the sources that gave them."""

    domains: tuple[Domain, ...]
    sources: tuple[Source, ...]


def read_corpus(folder: Path | None = None) -> Corpus:
    """Read the standard library of this Python and, when given, the sources found in `folder`.

    Raises:
        ValueError: `folder` is given but is no folder, or holds none of the known files.
    """
    sources = [source for source in SOURCES if _is_present(source, folder)]
    if folder is not None and len(sources) == 1:
        known = ", ".join(source.path for source in SOURCES if source.path)
        raise ValueError(f"corpus folder {str(folder)!r} has none of: {known}; name another one")
    documents: dict[str, list[tuple[str, Document]]] = {name: [] for name in DOMAINS}
    for source in sources:
        place = (
            _standard_library() if folder is None or source.path is None else folder / source.path
        )
        for document in source.read(place):
            documents[source.domain].append((f"{source.name}/{document.name}", document))
    domains = tuple(_split(name, documents[name]) for name in DOMAINS if documents[name])
    return Corpus(domains=domains, sources=tuple(sources))


def _is_present(source: Source, folder: Path | None) -> bool:
    return source.path is None or (folder is not None and (folder / source.path).is_file())


def _split(name: str, documents: list[tuple[str, Document]]) -> Domain:
    """Hold out the hundredth part whose names hash lowest; texts seen before are dropped."""
    unique = {document.text: (_digest(key), document) for key, document in reversed(documents)}
    ranked = sorted(unique.values(), key=lambda pair: pair[0])
    num_held_out = min(max(MIN_HELD_OUT, len(ranked) // 100), len(ranked) // 2)
    ordered = [document for _, document in ranked]
    return Domain(
        name=name,
        training=tuple(ordered[num_held_out:]),
        held_out=tuple(ordered[:num_held_out]),
    )


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _standard_library() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _read_standard_library(folder: Path) -> Iterator[Document]:
    for path in sorted(folder.rglob("*.py")):
        name = path.relative_to(folder)
        # _sysconfigdata records the folders of the machine that built this Python.
        if _SKIPPED_FOLDERS & set(name.parts) or name.name.startswith("_sysconfigdata"):
            continue
        text = path.read_text(encoding="utf-8", errors="ignore").strip()
        if text:
            yield Document(name.as_posix(), text)


def _read_algorithms(path: Path) -> Iterator[Document]:
    return _read_marked(path, r"^# <<<(.+)>>>\n")


def _read_books(path: Path) -> Iterator[Document]:
    """Only the opening of each book, cut at a paragraph, so that all authors are heard."""
    for book in _read_marked(path, r"^<<<(.+)>>>\n"):
        end = book.text.rfind("\n\n", 0, MAX_BOOK_CHARACTERS)
        is_long = len(book.text) > MAX_BOOK_CHARACTERS and end > 0
        yield Document(book.name, book.text[:end] if is_long else book.text)


def _read_marked(path: Path, pattern: str) -> Iterator[Document]:
    pieces = re.split(pattern, _read_xz(path), flags=re.MULTILINE)
    for name, text in zip(pieces[1::2], pieces[2::2], strict=True):
        if text.strip():
            yield Document(name, text.strip())


def _read_proposals(path: Path) -> Iterator[Document]:
    for text in re.split(r"\n\n\n(?=PEP: \d+\n)", _read_xz(path)):
        yield Document(text.split("\n", 1)[0], text.strip())


def _read_help_pages(path: Path) -> Iterator[Document]:
    """Each page becomes the answer to a question about its command."""
    for index, text in enumerate(re.split(r"\n\n\n(?=# )", _read_xz(path))):
        command = text.lstrip("# ").split("\n", 1)[0]
        question = Message("user", f"How do I use {command}?")
        chat = (question, Message("assistant", text.strip()))
        yield Document(f"{index} {command}", render_chat(chat))


def _read_problems(path: Path) -> Iterator[Document]:
    for index, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
        row = json.loads(line)
        answer = re.sub(r"<<.*?>>", "", row["answer"])
        chat = (Message("user", row["question"]), Message("assistant", answer))
        yield Document(str(index), render_chat(chat))


def _read_dialogues(path: Path) -> Iterator[Document]:
    for line in _read_xz(path).splitlines():
        row = json.loads(line)
        yield Document(row["id"], render_chat(_merge_turns(row["turns"])))


def _merge_turns(turns: list[tuple[str, str]]) -> tuple[Message, ...]:
    """Join what one speaker says in a row, so that roles alternate."""
    messages: list[Message] = []
    for speaker, text in turns:
        role = "user" if speaker == "U" else "assistant"
        if messages and messages[-1].role == role:
            text = f"{messages.pop().content} {text}"
        messages.append(Message(role, text))
    return tuple(messages)


def _read_xz(path: Path) -> str:
    with lzma.open(path, "rt", encoding="utf-8") as file:
        return file.read()


SOURCES = (
    Source(
        name="Python standard library",
        domain="code",
        licence="PSF-2.0",
        attribution="Python Software Foundation and contributors, CPython",
        path=None,
        read=_read_standard_library,
    ),
    Source(
        name="TheAlgorithms/Python",
        domain="code",
        licence="MIT",
        attribution="TheAlgorithms and contributors",
        path="text/thealgorithms_python.py.xz",
        read=_read_algorithms,
    ),
    Source(
        name="Python Enhancement Proposals",
        domain="docs",
        licence="public domain or CC0-1.0",
        attribution="the authors of the PEPs, python/peps",
        path="text/peps.rst.xz",
        read=_read_proposals,
    ),
    Source(
        name="tldr pages (English)",
        domain="docs",
        licence="CC BY 4.0",
        attribution="the tldr-pages team and contributors, tldr-pages/tldr; pages put in chat form",
        path="text/tldr_en.md.xz",
        read=_read_help_pages,
    ),
    Source(
        name="Classic books",
        domain="books",
        licence="public domain",
        attribution="19th and early 20th century authors, mlschmitt/classic-books-markdown",
        path="text/classic_books.md.xz",
        read=_read_books,
    ),
    Source(
        name="GSM8K training problems",
        domain="math",
        licence="MIT",
        attribution="Cobbe et al. 2021, openai/grade-school-math; calculator marks removed",
        path="prompts/gsm8k_train.jsonl",
        read=_read_problems,
    ),
    Source(
        name="Taskmaster-4",
        domain="dialogue",
        licence="CC BY 4.0",
        attribution="Google Research Datasets, Taskmaster; turns put in chat form",
        path="text/taskmaster4_turns.jsonl.xz",
        read=_read_dialogues,
    ),
)
