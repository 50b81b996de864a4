"""Answers that the target itself writes: what a draft has to guess is learned from what comes."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from outrider.engine.llm import LLM
from outrider.errors import ConfigError
from outrider.request import SamplingParams
from outrider.train.heads.pieces import LEAST_PIECE, Piece, digest_of
from outrider.train.heads.texts import Text

AT_ONCE = 64  # prompts between two writes to the file of answers
FILE = "answers.jsonl"


class Asking(NamedTuple):
    """How answers are written.

    Attributes:
        target: as `LLM` takes it. temperature: 0 is greedy. max_tokens: of an answer.
        window: that prompt and answer must fit into.
        draft: head or draft model to write faster with; the answers are the same without.
    """

    target: str
    device: str
    dtype: str
    temperature: float
    max_tokens: int
    window: int
    seed: int
    draft: str | None = None

    def key(self, prompt: Sequence[int]) -> str:
        """Names one answer: whatever else changes, it stays the same."""
        told = (self.target, self.temperature, self.max_tokens, self.window, self.seed, self.dtype)
        return hashlib.sha256(f"{told}{digest_of(prompt)}".encode()).hexdigest()


def answered(
    pieces: Sequence[Piece],
    asking: Asking,
    folder: Path,
    *,
    report: Callable[[str], None] = lambda line: None,
    llm: Any = None,
) -> list[Piece]:
    """The pieces with answers by the target in the place of their own.

    Answers are kept in `folder`, so that a resumed run does not write them again. They come from
    the engine, many at a time, with whatever it speculates by.

    Args:
        llm: to ask; made from `asking` if None and anything is left to ask.

    Raises:
        ConfigError: no piece has a prompt that leaves room for an answer.
    """
    asked = [piece for piece in pieces if _has_room(piece.text, asking)]
    if not asked:
        raise ConfigError(
            "no text begins with a prompt that leaves room for an answer: raise window, or give "
            "shorter prompts"
        )
    path = folder / FILE
    known = _known(path)
    missing = [piece for piece in asked if asking.key(_prompt(piece.text)) not in known]
    if missing:
        report(f"the target writes {len(missing)} answers at temperature {asking.temperature:g}")
        known |= _write(missing, asking, path, llm)
    return [_with_answer(piece, known[asking.key(_prompt(piece.text))]) for piece in asked]


def _has_room(text: Text, asking: Asking) -> bool:
    return 0 < text.num_prompt <= asking.window - LEAST_PIECE


def _prompt(text: Text) -> list[int]:
    return text.tokens[: text.num_prompt]


def _with_answer(piece: Piece, answer: list[int]) -> Piece:
    text = piece.text
    prompt = _prompt(text)
    is_learned = [False] * len(prompt) + [True] * len(answer)
    whole = Text(text.name, prompt + answer, is_learned, len(prompt), text.domain)
    return Piece(whole, piece.unit, digest_of(whole.tokens))


def _write(pieces: Sequence[Piece], asking: Asking, path: Path, llm: Any) -> dict[str, list[int]]:
    if llm is None:
        llm = LLM(asking.target, draft_model=asking.draft, device=asking.device, dtype=asking.dtype)
    found: dict[str, list[int]] = {}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        for few in _portions(pieces):
            prompts = [_prompt(piece.text) for piece in few]
            keys = [asking.key(prompt) for prompt in prompts]
            sampling = [
                _sampling(asking, key, len(prompt))
                for key, prompt in zip(keys, prompts, strict=True)
            ]
            for key, output in zip(keys, llm.generate(prompts, sampling), strict=True):
                found[key] = list(output.token_ids)
                file.write(json.dumps({"key": key, "tokens": found[key]}) + "\n")
            file.flush()
    return found


def _sampling(asking: Asking, key: str, num_prompt: int) -> SamplingParams:
    return SamplingParams(
        temperature=asking.temperature,
        max_tokens=min(asking.max_tokens, asking.window - num_prompt),
        min_tokens=1,
        seed=int(key[:12], 16),
    )


def _portions(pieces: Sequence[Piece]) -> Iterator[Sequence[Piece]]:
    for start in range(0, len(pieces), AT_ONCE):
        yield pieces[start : start + AT_ONCE]


def _known(path: Path) -> dict[str, list[int]]:
    """Answers in the file; a line that was being written when a run ended is passed over."""
    if not path.is_file():
        return {}
    known: dict[str, list[int]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        known[row["key"]] = row["tokens"]
    return known
