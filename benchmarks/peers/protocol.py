"""JSON lines between the driver and a worker: one engine in a process of its own.

Standard library only: it runs in every peer's environment.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

Generate = Callable[[list[list[int]], int], list[list[int]]]


class Answer(NamedTuple):
    """What a worker says to one request: seconds of all calls, and the new tokens by prompt."""

    seconds: float
    tokens: list[list[int]]


def options() -> dict[str, Any]:
    """What the driver asks of this worker: its one argument, a JSON object."""
    found: dict[str, Any] = json.loads(sys.argv[1])
    return found


def serve(load: Callable[[], tuple[Generate, dict[str, str]]]) -> None:
    """Load the engine, then answer requests until stdin ends; waiting blocks, it does not spin.

    Whatever libraries print goes to stderr: stdout carries answers only.
    """
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    generate, facts = load()
    print(json.dumps(facts), file=answers)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(_timed(generate, **request)), file=answers)


def _timed(
    generate: Generate, prompts: list[list[int]], num_tokens: int, concurrency: int
) -> dict[str, Any]:
    tokens: list[list[int]] = []
    start = time.perf_counter()
    for first in range(0, len(prompts), concurrency):
        tokens += generate(prompts[first : first + concurrency], num_tokens)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "tokens": tokens}


class Worker:
    """The driver's end of a worker process.

    Args:
        log: file that takes what the worker prints.
    """

    def __init__(
        self, python: Path, module: str, options: dict[str, Any], env: dict[str, str], log: Path
    ) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                [str(python), "-m", module, json.dumps(options)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, **env},
            )
        self._log = log
        self.facts: dict[str, str] = self._read()

    def ask(self, prompts: list[list[int]], num_tokens: int, concurrency: int) -> Answer:
        """RuntimeError, with the place of its log, when the worker is gone."""
        request = {"prompts": prompts, "num_tokens": num_tokens, "concurrency": concurrency}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return Answer(**self._read())

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"worker ended with {self._process.wait()}; see {self._log}")
        answer: dict[str, Any] = json.loads(line)
        return answer
