"""Data sets: files of several layouts, and our own prompts, into questions of one form."""

import csv
import gzip
import hashlib
import io
import itertools
import json
import lzma
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence as Items
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from outrider.bench.layouts import LAYOUTS, Layout, Read, Row, Unusable, as_text, layout_of
from outrider.bench.result import content_hash
from outrider.bench.target import Question
from outrider.errors import ConfigError, unknown

OWN = "outrider"
OWN_FILE = "assets/prompts/outrider.jsonl"
OWN_LICENCE = "Apache-2.0, as this package"


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Questions, and where they come from.

    Attributes:
        questions: in the file's order, or spread over the domains after `take`.
        layout: how rows were read. licence: "" where it is the user's own affair.
        is_known: the file is, byte for byte, a published one that we know.
        path: the file as it was named; "" for our own set. sha256: of its bytes as they lie there.
        num_in_file: questions that it holds, those that a limit leaves out too.
        skipped: rows left out, by reason.
        note: what a reader of the numbers has to know; "" for nothing.
    """

    name: str
    questions: tuple[Question, ...]
    layout: str
    licence: str = ""
    is_known: bool = False
    path: str = ""
    sha256: str = ""
    num_in_file: int = 0
    skipped: Mapping[str, int]
    note: str = ""

    @property
    def origin(self) -> str:
        """Whose prompts these are: anybody can get the first two again, the third is in `path`."""
        if not self.path:
            return "shipped with outrider"
        return "a published file" if self.is_known else "a file of the user's own"

    @property
    def hash(self) -> str:
        """Of the questions in use, whatever file they lay in."""
        return content_hash([(q.id, q.prompt, q.domain, q.max_tokens) for q in self.questions])

    @property
    def domains(self) -> dict[str, int]:
        """Number of questions by domain, in order of appearance."""
        return dict(Counter(question.domain for question in self.questions))

    def take(self, limit: int | None) -> "Dataset":
        """The first ones of every domain in turn, so that a small share has all of them."""
        if limit is None or limit >= len(self.questions):
            return self
        by_domain: dict[str, list[Question]] = {}
        for question in self.questions:
            by_domain.setdefault(question.domain, []).append(question)
        rounds = itertools.zip_longest(*by_domain.values())
        kept = [question for one in rounds for question in one if question is not None]
        return replace(self, questions=tuple(kept[:limit]))

    def as_text(self) -> "Dataset":
        """Conversations as plain text, for models without a chat template."""
        texts = (replace(question, prompt=as_text(question.prompt)) for question in self.questions)
        return replace(self, questions=tuple(texts))

    def describe(self) -> dict[str, Any]:
        """For `Result.data`."""
        return {
            "name": self.name,
            "origin": self.origin,
            "path": self.path,
            "sha256": self.sha256,
            "hash": self.hash,
            "layout": self.layout,
            "num_questions": len(self.questions),
            "num_in_file": self.num_in_file,
            "domains": self.domains,
            "licence": self.licence,
            "skipped": dict(self.skipped),
            "note": self.note,
        }

    @property
    def _counted(self) -> str:
        count, of = len(self.questions), self.num_in_file
        return f"{count} prompt{'s' * (count != 1)}" + (f" of {of}" if of > count else "")

    def told(self) -> str:
        """What to say once, before anything is measured."""
        domains = len(self.domains)
        parts = [
            f"{self.name}: {self._counted}",
            f"{domains} domains" if domains > 1 else "",
            f"layout {self.layout}" + (", a published file" if self.is_known else ""),
            f"licence: {self.licence}" if self.licence else "",
            self.note,
            *(f"left out {count}: {reason}" for reason, count in self.skipped.items()),
        ]
        return "; ".join(filter(None, parts))


class Published(NamedTuple):
    """A published file that we know: its name, its licence, and where its makers offer it."""

    name: str
    licence: str
    where: str


# By SHA-256 of the file.
PUBLISHED = {
    "4b6d33e79484f9841c487ee87d1cf6aa8c6066f61d5d482ff09e5a007fafdf04": Published(
        "spec_bench",
        "Apache-2.0; parts from MT-bench, WMT14, CNN/DM, NQ, GSM8K and DPR",
        "hemingkx/Spec-Bench, data/spec_bench/question.jsonl",
    ),
    "119565adbab82227089cefdb44c8d7e2cf04dc0a0ec233634c82e7d4e2a944f7": Published(
        "mt_bench", "Apache-2.0", "lm-sys/FastChat, fastchat/llm_judge/data/mt_bench/question.jsonl"
    ),
    "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465": Published(
        "gsm8k_train", "MIT", "openai/grade-school-math, grade_school_math/data/train.jsonl"
    ),
    "4bc62db838f8418365d51c627bd66294cbdca9fb7f01519cb13f0dce8c51580b": Published(
        "gsm8k_test",
        "MIT",
        "openai/grade-school-math, grade_school_math/data/example_model_solutions.jsonl",
    ),
    "ccf64ceae9c5403bf50a044cb6d505bfd2a2963ee58338ba268fd65beab92a9f": Published(
        "mbpp", "CC-BY-4.0", "google-research/google-research, mbpp/mbpp.jsonl"
    ),
}
# Names that people type for files that we do not ship, and that we do not know by their bytes.
ELSEWHERE = {
    "speed_bench": "nvidia/SPEED-Bench on the hub, made readable by its own preparation",
    "humaneval": "openai/human-eval, data/HumanEval.jsonl.gz",
    "sharegpt": "ShareGPT_V3_unfiltered_cleaned_split.json on the hub",
    "longbench": "THUDM/LongBench on the hub",
}


def load_dataset(
    name: str,
    *,
    limit: int | None = None,
    count_tokens: Callable[[str], int] | None = None,
) -> Dataset:
    """Questions of our own set ("outrider", "outrider/code" ...) or of a file.

    Args:
        limit: questions at most, taken from all domains in turn.
        count_tokens: gives recorded answers' lengths, which then bound ours (`max_tokens`); None
            leaves lengths to the run.

    Raises:
        ConfigError: no such set or file, an unknown layout, or no question in it.
    """
    own, _, domain = name.partition("/")
    if own == OWN and not Path(name).is_file():
        return _own(domain).take(limit)
    path = Path(name)
    if not path.is_file():
        raise ConfigError(_not_there(name))
    raw = path.read_bytes()
    return replace(_dataset(path.name, raw, count_tokens), path=name).take(limit)


def own_domains() -> list[str]:
    """Domains of our own set."""
    return list(_own("").domains)


def _own(domain: str) -> Dataset:
    raw = files("outrider").joinpath(OWN_FILE).read_bytes()
    whole = replace(_dataset(OWN, raw, None), layout=OWN, licence=OWN_LICENCE)
    if not domain:
        return whole
    if domain not in whole.domains:
        raise ConfigError(unknown(f"domain of {OWN!r}", domain, list(whole.domains)))
    kept = tuple(question for question in whole.questions if question.domain == domain)
    return replace(whole, name=f"{OWN}/{domain}", questions=kept, num_in_file=len(kept))


def _dataset(name: str, raw: bytes, count_tokens: Callable[[str], int] | None) -> Dataset:
    sha256 = hashlib.sha256(raw).hexdigest()
    known = PUBLISHED.get(sha256)
    rows, layout = _rows(name, raw)
    skipped: Counter[str] = Counter()
    questions = tuple(_questions(rows, layout, skipped, count_tokens))
    if not questions:
        reasons = "; ".join(f"{count} rows: {reason}" for reason, count in skipped.items())
        raise ConfigError(f"{name!r} holds no prompt ({reasons or 'it is empty'}): give another")
    return Dataset(
        name=known.name if known else name,
        questions=questions,
        layout=layout.name,
        licence=known.licence if known else layout.licence,
        is_known=known is not None,
        sha256=sha256,
        num_in_file=len(questions),
        skipped=dict(skipped),
        note=layout.note,
    )


def _questions(
    rows: Items[Any],
    layout: Layout,
    skipped: Counter[str],
    count_tokens: Callable[[str], int] | None,
) -> Iterator[Question]:
    taken: set[str] = set()
    for number, row in enumerate(rows):
        try:
            read = _read(row, layout)
        except Unusable as reason:
            skipped[str(reason)] += 1
            continue
        own = read.id or f"row {number}"
        name = own if own not in taken else f"{own}, row {number}"
        taken.add(name)
        length = count_tokens(read.answer) if count_tokens and read.answer else None
        yield Question(
            id=name,
            prompt=read.prompt,
            domain=read.domain,
            max_tokens=read.max_tokens or length or None,
        )


def _read(row: Any, layout: Layout) -> Read:
    """A row of another shape than its neighbours is left out, and told."""
    if not isinstance(row, Mapping) or not layout.fits(row):
        raise Unusable(f"not of the layout {layout.name!r}")
    try:
        return layout.read(row)
    except (AttributeError, LookupError, TypeError) as error:
        raise Unusable(f"not of the layout {layout.name!r} inside ({error!r:.60})") from error


MIN_WORDS = 3  # a block of fewer is a heading or a number, and gives nothing to go on from


def _block(row: Row) -> Read:
    if len(row["prompt"].split()) < MIN_WORDS:
        raise Unusable(f"a block of fewer than {MIN_WORDS} words")
    return Read(row["prompt"])


PLAIN = Layout(
    "text",
    (frozenset({"prompt"}),),
    _block,
    note="each block between blank lines is a prompt to go on from",
)


def _rows(name: str, raw: bytes) -> tuple[Items[Any], Layout]:
    """Rows by content: JSON, JSON lines, a table, or blocks of plain text."""
    text = _text(name, raw)
    if text.lstrip()[:1] in ("{", "["):
        rows = _json_rows(name, text)
        return rows, layout_of(rows, name)
    if Path(name).suffix.lower() in (".csv", ".tsv"):
        dialect = "excel-tab" if name.lower().endswith(".tsv") else "excel"
        table = list(csv.DictReader(io.StringIO(text), dialect=dialect))
        return table, layout_of(table, name)
    blocks = text.split("\n\n") if "\n\n" in text.strip() else text.splitlines()
    return [{"prompt": block.strip("\n")} for block in blocks if block.strip()], PLAIN


def _text(name: str, raw: bytes) -> str:
    if raw[:4] == b"PAR1":
        raise ConfigError(f"{name!r} is Parquet, which is not read here: save it as JSON lines")
    try:
        if raw[:2] == b"\x1f\x8b":
            raw = gzip.decompress(raw)
        elif raw[:6] == b"\xfd7zXZ\x00":
            raw = lzma.decompress(raw)
        text = raw.decode("utf-8-sig").replace("\r\n", "\n")
    except (UnicodeDecodeError, OSError, EOFError, lzma.LZMAError) as error:
        raise ConfigError(f"{name!r} is no UTF-8 text ({error}): convert it first") from error
    if "\0" in text:
        raise ConfigError(f"{name!r} is no text (zero bytes in it): unpack or convert it first")
    return text


def _json_rows(name: str, text: str) -> Items[Any]:
    """A list, an object that holds one, or an object per line."""
    try:
        held = json.loads(text)
    except json.JSONDecodeError:
        return list(_json_lines(name, text))
    if not isinstance(held, Mapping):
        return held if isinstance(held, list) else [held]
    if any(layout.fits(held) for layout in LAYOUTS):
        return [held]
    lists = [value for value in held.values() if isinstance(value, list)]
    return max(lists, key=len, default=[held])


def _json_lines(name: str, text: str) -> Iterator[Any]:
    # Not splitlines(): JSON strings may hold U+2028, which is a line's end there.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{name}:{number}: no JSON ({error.msg}); repair the line") from error


def _not_there(name: str) -> str:
    offered = {known.name: known.where for known in PUBLISHED.values()} | ELSEWHERE
    if name in offered:
        return f"{name!r} is not shipped: fetch it ({offered[name]}) and give --prompts its file"
    if Path(name).is_dir():
        return f"{name!r} is a folder: give --prompts one file in it"
    return f'no file {name!r}: give --prompts a file, or "{OWN}" for the prompts shipped here'
