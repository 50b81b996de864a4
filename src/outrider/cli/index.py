"""`outrider index`: a corpus of texts becomes the datastore that method "rest" drafts from."""

import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from outrider.draft.datastore import Datastore
from outrider.errors import ConfigError
from outrider.models.hub import resolve
from outrider.tokenizer import Tokenizer, load_tokenizer

app = typer.Typer(no_args_is_help=True, help="Make the datastore of a corpus.")


@app.command("build")
def build(
    corpus: Annotated[
        list[Path], typer.Argument(help="Text files, or folders of them; a file is a document.")
    ],
    model: Annotated[str, typer.Option(help='Whose tokenizer is used: hub id, folder, or "demo".')],
    output: Annotated[Path, typer.Option(help="Folder for the datastore.")],
) -> None:
    """Tokenise texts and index every place in them; prints the figures as JSON."""
    paths = list(_files(corpus))
    tokenizer = load_tokenizer(resolve(model))
    # It warns of texts longer than the model's context; documents may be.
    logging.getLogger("transformers.tokenization_utils_base").setLevel(logging.ERROR)
    err = Console(stderr=True)
    with Progress(console=err, transient=True, disable=not err.is_terminal) as progress:
        tracked = progress.track(paths, description="tokenising")
        documents = list(_documents(tracked, set(corpus), tokenizer))
        progress.add_task("sorting", total=None)
        datastore = Datastore.build(
            documents, fingerprint=tokenizer.fingerprint(), vocab_size=tokenizer.vocab_size
        )
        datastore.save(output)
    summary = {
        "datastore": str(output),
        "num_tokens": datastore.header.num_tokens,
        "num_documents": datastore.header.num_documents,
        "num_skipped_files": len(paths) - len(documents),
        "vocab_size": datastore.header.vocab_size,
    }
    typer.echo(json.dumps(summary, ensure_ascii=False))


def _files(corpus: Sequence[Path]) -> Iterator[Path]:
    """The files named, and those inside the folders named, in order; hidden ones are left out."""
    for path in corpus:
        if path.is_dir():
            inside = sorted(found for found in path.rglob("*") if found.is_file())
            yield from (found for found in inside if not _is_hidden(found.relative_to(path)))
        elif path.is_file():
            yield path
        else:
            raise ConfigError(f"no file or folder {str(path)!r}: name one with text")


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _documents(
    paths: Iterable[Path], named: set[Path], tokenizer: Tokenizer
) -> Iterator[list[int]]:
    """Token ids per file; what is no text is passed over, unless it was named itself."""
    for path in paths:
        try:
            text = _text(path)
        except ConfigError:
            if path in named:
                raise
            continue
        if text.strip():
            yield tokenizer.encode(text, add_special_tokens=False)


def _text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise ConfigError(f"{str(path)!r} is no UTF-8 text: leave it out")
    return text
