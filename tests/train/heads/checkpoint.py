"""A tiny checkpoint with a tokenizer, and data that fits it, for runs from start to end."""

import json
from pathlib import Path
from typing import Any

from outrider.train.heads.settings import DraftTraining
from tests.engine.tiny_checkpoint import write_checkpoint

TEXT = "def main(argv):\n    return [line.strip() for line in argv]\n# the quick brown fox {}\n"
WORDS = ("jumps", "over", "lazy", "dogs", "and", "rests", "then", "sleeps")


def write_target(folder: Path, **options: Any) -> Path:
    return write_checkpoint(folder, **{"num_hidden_layers": 3, **options})


def write_texts(path: Path, count: int = 24) -> Path:
    """Rows of plain text, no two alike."""
    rows = [
        {"text": TEXT.format(" ".join(WORDS[i % 8 :] + WORDS[: i % 5])) * 2} for i in range(count)
    ]
    path.write_text("\n".join(json.dumps({**row, "n": i}) for i, row in enumerate(rows)))
    return path


def write_chats(path: Path, count: int = 12) -> Path:
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"the {WORDS[i % 8]} {i}"},
                {"role": "assistant", "content": f"return line {i} " * 3},
            ]
        }
        for i in range(count)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def small_run(target: Path, data: Path, out: Path, **options: Any) -> DraftTraining:
    """A few steps on few tokens."""
    given = {
        "kind": "eagle3",
        "steps": 4,
        "window": 64,
        "tokens_per_step": 128,
        "device": "cpu",
        **options,
    }
    return DraftTraining(target=str(target), data=(data,), out=out, **given)
