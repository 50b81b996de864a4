"""Workloads: answers that models gave to prompts, read from logs of several shapes.

Where a log is a conversation, each turn of the assistant is one record, and its prompt is the
conversation up to it.
"""

import json
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from lzma import LZMAError
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from outrider.errors import ConfigError, unknown
from outrider.tokenizer import Tokenizer

# A longer prompt keeps its end: near text repeats most, and real contexts are cut there too.
MAX_PROMPT_TOKENS = 4096
MAX_ID = 1 << 31  # token ids are counted in 32 bits

ANSWERS = ("output", "response")  # what the answer of a line may be called

Piece: TypeAlias = str | tuple[int, ...]


class Record(NamedTuple):
    """One answer and what came before it.

    Attributes:
        prompt: pieces in order, each a text or token ids. A piece is tokenised by itself, so that
            it reads the same wherever it stands.
        output: the answer.
        session: equal for records of one conversation; "" for a record of its own.
        prediction: text that the answer was expected to resemble, "" for none.
    """

    prompt: tuple[Piece, ...]
    output: Piece
    session: str = ""
    prediction: str = ""


class Encoded(NamedTuple):
    """A record in token ids."""

    prompt: list[int]
    output: tuple[int, ...]
    session: str
    prediction: tuple[int, ...]


class Source(NamedTuple):
    """Where a workload comes from: a file name, and how records are read from the file."""

    file: str
    read: Callable[[Path], Iterator[Record]]
    meaning: str


class Encoder:
    """Records into token ids; what was tokenised once is looked up."""

    def __init__(self, tokenizer: Tokenizer, max_prompt_tokens: int = MAX_PROMPT_TOKENS) -> None:
        self.max_prompt_tokens = max_prompt_tokens
        self._tokenizer = tokenizer
        self._seen: dict[str, tuple[int, ...]] = {}

    def __call__(self, record: Record) -> Encoded:
        """The end of the prompt; a text's answer ends with the tokenizer's end token, if any."""
        prompt = [token for piece in record.prompt for token in self._ids(piece)]
        end = self._tokenizer.eos_token_id if isinstance(record.output, str) else None
        return Encoded(
            prompt=prompt[-self.max_prompt_tokens :],
            output=self._ids(record.output) + (() if end is None else (end,)),
            session=record.session,
            prediction=self._ids(record.prediction),
        )

    def _ids(self, piece: Piece) -> tuple[int, ...]:
        if not isinstance(piece, str):
            return piece
        if piece not in self._seen:
            self._seen[piece] = tuple(self._tokenizer.encode(piece, add_special_tokens=False))
        return self._seen[piece]


def load(name: str, data: Path | None = None) -> list[Record]:
    """The records of a workload by name, or of a .jsonl file by its path.

    Raises:
        ConfigError: there is no such workload, or its file is not in `data` or cannot be read.
    """
    if name.endswith(".jsonl"):
        return _read(read_jsonl, Path(name))
    if name not in SOURCES:
        raise ConfigError(unknown("workload", name, [*SOURCES, "FILE.jsonl"]))
    source = SOURCES[name]
    path = None if data is None else find(source.file, data)
    if path is None:
        where = "no folder is given" if data is None else f"not in {str(data)!r}"
        raise ConfigError(f"workload {name!r} is read from {source.file}, {where}: use --data")
    return _read(source.read, path)


def available(data: Path) -> list[str]:
    """Names of the workloads whose files lie in a folder or below it."""
    return [name for name, source in SOURCES.items() if find(source.file, data) is not None]


def find(file: str, data: Path) -> Path | None:
    return next(iter(sorted(data.rglob(file))), None)


def _read(read: Callable[[Path], Iterator[Record]], path: Path) -> list[Record]:
    try:
        records = list(read(path))
    except ConfigError:
        raise
    except (OSError, LookupError, TypeError, ValueError, LZMAError, tarfile.TarError) as error:
        raise ConfigError(f"{str(path)!r} has another layout than expected ({error!r})") from error
    if not records:
        raise ConfigError(f"{str(path)!r} holds no answer: give another file")
    return records


def read_jsonl(path: Path) -> Iterator[Record]:
    """Lines {"prompt": text or ids, "output": text or ids, "session"?, "prediction"?}.

    The answer may also be called "response".
    """
    for number, values in _lines(path):
        answer = next((key for key in ANSWERS if isinstance(values, Mapping) and key in values), "")
        if not answer or "prompt" not in values:
            raise ConfigError(f'{path}:{number}: give an object with "prompt" and "output"')
        prompt, output = (_piece(values[key]) for key in ("prompt", answer))
        if not prompt or not output:
            raise ConfigError(f"{path}:{number}: prompt or output is empty; drop the line")
        told = (str(values.get(key, "")) for key in ("session", "prediction"))
        yield Record((prompt,), output, *told)


def read_mt_bench(path: Path) -> Iterator[Record]:
    """Answers of one model to MT-bench, two turns each; the questions lie in the same folder."""
    questions = path.with_name("mt_bench_question.jsonl")
    turns_of = {line["question_id"]: line["turns"] for _, line in _lines(questions)}
    for _, line in _lines(path):
        number = line["question_id"]
        pairs = zip(turns_of[number], line["choices"][0]["turns"], strict=False)
        messages = [
            {"role": role, "content": text}
            for pair in pairs
            for role, text in zip(("user", "assistant"), pair, strict=True)
        ]
        yield from turns(messages, str(number))


def read_gsm8k(path: Path) -> Iterator[Record]:
    """Solutions of one model: of several for a problem, each would give the next one away."""
    for _, line in _lines(path):
        solution = line["175b_verification"]["solution"]
        if solution:
            yield Record((line["question"], "\n"), solution)


def read_tau_bench(path: Path) -> Iterator[Record]:
    """Episodes of a tool-calling agent, in the order they were run."""
    for episode in json.loads(path.read_text(encoding="utf-8")):
        yield from turns(episode["traj"], f"{episode['task_id']}/{episode['trial']}")


def read_swe_agent(path: Path) -> Iterator[Record]:
    """Trajectories of a coding agent, packed as JSON files."""
    with tarfile.open(path) as archive:
        members = [member for member in archive.getmembers() if member.name.endswith(".traj")]
        for member in sorted(members, key=lambda member: member.name):
            file = archive.extractfile(member)
            assert file is not None
            yield from turns(json.load(file)["history"], member.name)


INSTRUCTION = re.compile(r"^@@@ #### (?P<text>.*?) @+$", re.MULTILINE)
EDIT = re.compile(
    r"^@@@ SEARCH: (?P<file>.+?) @+\n(?P<old>.*?)^@{20}\n(?P<new>.*?)^@@@ REPLACE @+$",
    re.MULTILINE | re.DOTALL,
)


def read_aider(path: Path) -> Iterator[Record]:
    """Edits: the prompt is the instruction and the old lines, the answer is the new lines.

    The old lines are the prediction too.
    """
    text = path.read_text(encoding="utf-8")
    instructions = [(match.start(), match["text"]) for match in INSTRUCTION.finditer(text)]
    for edit in EDIT.finditer(text):
        asked = [(at, told) for at, told in instructions if at < edit.start()]
        at, told = asked[-1] if asked else (0, "")
        if edit["new"]:
            prompt = (f"{told}\n{edit['file']}\n", edit["old"], "\n")
            yield Record(prompt, edit["new"], str(at), edit["old"])


SOURCES: dict[str, Source] = {
    "mt_bench": Source(
        "mt_bench_vicuna7b_answers.jsonl", read_mt_bench, "answers of a 7B model to MT-bench"
    ),
    "gsm8k": Source("gsm8k_model_solutions.jsonl", read_gsm8k, "solutions of a 175B model"),
    "tau_bench": Source(
        "tau_bench_gpt-4o-airline.json", read_tau_bench, "turns of a tool-calling agent"
    ),
    "swe_agent": Source(
        "sweagent_demonstrations.tar.xz", read_swe_agent, "turns of a coding agent"
    ),
    "aider": Source("aider_chat_history.txt", read_aider, "edits of source files"),
}


def turns(messages: Iterable[Mapping[str, Any]], session: str) -> Iterator[Record]:
    """One record per turn of the assistant that says or calls something."""
    before: tuple[Piece, ...] = ()
    for message in messages:
        before += (f"{message['role']}:\n",)
        text = _text(message)
        if message["role"] == "assistant" and text:
            yield Record(before, text, session)
        before += (text, "\n\n")


def _text(message: Mapping[str, Any]) -> str:
    """What a message says, and below it the functions that it calls."""
    content = message.get("content") or ""
    if not isinstance(content, str):
        content = "".join(part.get("text", "") for part in content)
    calls = [call["function"] for call in message.get("tool_calls") or ()]
    called = [json.dumps({key: call[key] for key in ("name", "arguments")}) for call in calls]
    return "\n".join(([content] if content else []) + called)


def _piece(value: Any) -> Piece:
    if isinstance(value, str):
        return value
    ids = [i for i in value if isinstance(i, int) and not isinstance(i, bool) and 0 <= i < MAX_ID]
    if len(ids) < len(value):
        raise TypeError(f"give a text or token ids from 0 to {MAX_ID - 1}, not {value!r:.60}")
    return tuple(ids)


def _lines(path: Path) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path}:{number}: no JSON ({error.msg}); repair the line") from error
