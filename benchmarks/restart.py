"""The turn after a restart: nothing restored, the target's KV alone, KV and speculation state.

python -m benchmarks.restart --data FOLDER
"""

import argparse
import json
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from benchmarks.sessions import episodes
from outrider.bench.provenance import Watch, as_markdown

ARMS = ("nothing", "KV", "KV and speculation")
TARGET = "target"
NUM_RESAMPLES = 2000
WARM_UP = "Say something about the weather of the last week, and of the next."


class Turn(NamedTuple):
    """What a client saw of one turn, and what the server said of it.

    Attributes:
        first_s: from the request to the first text.
        tokens_per_second: behind the first text.
        hit: tokens of the prompt that had KV. ready: those the drafter had nothing to do for.
    """

    first_s: float
    tokens_per_second: float
    acceptance_length: float
    hit: int
    ready: int
    restore_ms: float
    text: str


@contextmanager
def serving(model: list[str], state: Path) -> Iterator[httpx.Client]:
    """`outrider serve` in a process of its own; when it ends it writes out what is warm."""
    entry = "from outrider.cli.main import app; app()"
    command = [sys.executable, "-c", entry, "serve", *model, "--port", "0", "--state-dir"]
    process = subprocess.Popen([*command, str(state)], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        for line in process.stderr:
            if found := re.search(r"serving \S+ at (\S+)", line):
                break
        else:
            raise RuntimeError(f"{command} ended before it served")
        with httpx.Client(base_url=found[1], timeout=300) as client:
            yield client
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=120)


def body(said: str, num_tokens: int, seed: int) -> dict[str, Any]:
    return {
        "input": said,
        "max_output_tokens": num_tokens,
        "temperature": 0.8,
        "seed": seed,
        "ignore_eos": True,
        "speculation": {"method": "draft_model", "policy": "fixed"},  # no clock decides
        "stream": True,
    }


def ask(client: httpx.Client, path: str, asked: dict[str, Any]) -> Turn:
    start = time.perf_counter()
    first_s, text = 0.0, ""
    with client.stream("POST", path, json=asked) as answer:
        for line in answer.iter_lines():
            if not line.startswith("data: "):
                continue
            event = json.loads(line.removeprefix("data: "))
            if event["type"] == "response.output_text.delta":
                first_s = first_s or time.perf_counter() - start
                text += event["delta"]
        took = time.perf_counter() - start - first_s
    response = event["response"]
    assert response["status"] in ("completed", "incomplete"), response
    session = response["outrider"].get("session", {})
    count = response["usage"]["output_tokens"] - 1
    return Turn(
        first_s=first_s,
        tokens_per_second=count / took,
        acceptance_length=response["metrics"]["speculative_decoding"]["mean_acceptance_length"],
        hit=session.get("kv_hit_tokens", 0),
        ready=session.get("spec", {}).get("ready_upto", 0),
        restore_ms=session.get("restore_ms", 0.0),
        text=text,
    )


def talk(client: httpx.Client, turns: list[str], num_tokens: int) -> str:
    """A session of that many turns; returns its id."""
    session = str(client.post("/v1/sessions", json={}).raise_for_status().json()["id"])
    for seed, said in enumerate(turns):
        ask(client, f"/v1/sessions/{session}/responses", body(said, num_tokens, seed))
    return session


def strip(state: Path, arm: str) -> None:
    """Takes away what an arm does not restore: everything warm, or all but the target's bundles."""
    warm = state / "warm"
    if arm == ARMS[0]:
        shutil.rmtree(warm)
    if arm == ARMS[1]:
        for manifest in warm.glob("*.bundle.json"):
            bundle = json.loads(manifest.read_text())
            if bundle["fingerprint"]["part"] != TARGET:
                manifest.unlink()
                (warm / bundle["file"]).unlink()


def after_a_restart(
    args: argparse.Namespace, state: Path, arm: str, said: dict[str, str]
) -> dict[str, Turn]:
    """The next turn of every session, in a server that has just been started."""
    with tempfile.TemporaryDirectory(dir=state.parent) as folder:
        copy = Path(folder) / "state"
        shutil.copytree(state, copy)
        strip(copy, arm)
        with serving(args.model, copy) as client:
            for seed in range(3):  # what a process does once is not what is asked here
                warm_up = {**body(WARM_UP, args.answer, seed), "store": False}
                ask(client, "/v1/responses", warm_up)
            return {
                session: ask(
                    client, f"/v1/sessions/{session}/responses", body(text, args.answer, 99)
                )
                for session, text in said.items()
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with tau-bench episodes")
    parser.add_argument("--turns", type=int, default=20, help="before the restart")
    parser.add_argument("--tokens", type=int, default=20, help="of an answer before")
    parser.add_argument("--answer", type=int, default=100, help="tokens behind the restart")
    parser.add_argument("--length", type=int, default=30, help="characters of what a user says")
    parser.add_argument("--sessions", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3, help="restarts of each arm")
    parser.add_argument("--state", type=Path, help="sessions of an earlier run, or where to keep")
    parser.add_argument("model", nargs="*", default=["demo"], help="as for `outrider serve`")
    args = parser.parse_args()
    watch = Watch()
    with tempfile.TemporaryDirectory() as folder:
        place = args.state or Path(folder) / "kept"
        state, names = place / "state", place / "sessions.json"
        if not names.exists():
            place.mkdir(parents=True)
            found = [
                [text[: args.length] for text in turns]
                for turns in episodes(args.data, args.turns + 1, args.sessions)
            ]
            with serving(args.model, state) as client:
                said = {talk(client, turns[:-1], args.tokens): turns[-1] for turns in found}
            names.write_text(json.dumps(said))
        said = json.loads(names.read_text())
        told: dict[str, list[dict[str, Turn]]] = {arm: [] for arm in ARMS}
        for number in range(args.rounds):
            for arm in ARMS if number % 2 else reversed(ARMS):  # in turn, forth and back
                told[arm].append(after_a_restart(args, state, arm, said))
                texts = {session: turn.text for session, turn in told[arm][-1].items()}
                first = next(turns for turns in told.values() if turns)[0]
                assert texts == {session: turn.text for session, turn in first.items()}
    print_table(told)
    print(as_markdown(watch.facts()))


def print_table(told: dict[str, list[dict[str, Turn]]]) -> None:
    print("| restored | first text, ms | tokens/s behind it | acceptance length | tokens with KV |"
          " drafter ready for | restore, ms |\n|---|---|---|---|---|---|---|")  # fmt: skip
    for arm, rounds in told.items():
        sessions = [[turns[name] for turns in rounds] for name in rounds[0]]
        cells = [
            _interval(sessions, lambda turn: 1e3 * turn.first_s, ".1f"),
            _interval(sessions, lambda turn: turn.tokens_per_second, ".0f"),
            _interval(sessions, lambda turn: turn.acceptance_length, ".2f"),
            _interval(sessions, lambda turn: turn.hit, ".0f"),
            _interval(sessions, lambda turn: turn.ready, ".0f"),
            _interval(sessions, lambda turn: turn.restore_ms, ".1f"),
        ]
        print(f"| {arm} | {' | '.join(cells)} |")
    print()


def _interval(sessions: list[list[Turn]], value: Callable[[Turn], float], form: str) -> str:
    """Mean over sessions of the medians over restarts, with a 95 % bootstrap over sessions."""
    values = [statistics.median(value(turn) for turn in turns) for turns in sessions]
    draw = random.Random(0)
    means = sorted(
        statistics.fmean(draw.choices(values, k=len(values))) for _ in range(NUM_RESAMPLES)
    )
    low, high = means[int(0.025 * NUM_RESAMPLES)], means[int(0.975 * NUM_RESAMPLES)]
    return f"{statistics.fmean(values):{form}} [{low:{form}}, {high:{form}}]"


if __name__ == "__main__":
    main()
