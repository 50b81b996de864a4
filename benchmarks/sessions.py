"""Turn by turn: what a session keeps warm, against prefix caching alone and against nothing.

python -m benchmarks.sessions --data FOLDER
"""

import argparse
import json
import time
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from outrider.bench import workloads
from outrider.bench.provenance import Watch, as_markdown
from outrider.draft.base import Drafter, ModelParts, Surroundings
from outrider.draft.drafters import Drafters
from outrider.engine.llm import LLM
from outrider.registry import DRAFTERS
from outrider.request import SamplingParams, SpeculationParams
from outrider.stream.events import Committed

ARMS = ("cold", "prefix cache", "session")
METHODS = ("draft_model", "suffix")
TEMPERATURE = 0.8  # greedy answers of the demo pair repeat themselves


class Turn(NamedTuple):
    """Seconds to the first token, tokens per second behind it, and tokens per drafted step."""

    first_token_s: float
    tokens_per_second: float
    acceptance_length: float
    token_ids: tuple[int, ...]


def with_new_drafters(llm: LLM) -> None:
    """Forgets all that drafters know; the target's KV stays."""
    engine, tokenizer = llm.engine, llm.tokenizer
    model: Any = engine.drafters["draft_model"]
    model.manager.reset_prefix_cache()
    around = Surroundings(
        target=ModelParts(runner=engine.runner, manager=engine.manager, tokenizer=tokenizer),
        draft=ModelParts(runner=model.runner, manager=model.manager, tokenizer=tokenizer),
    )
    made: list[Drafter] = []
    for name in METHODS:
        found = DRAFTERS.load(name)
        made.append(found.build(around) if hasattr(found, "build") else found())
    engine.drafters = Drafters(made)


def answer(llm: LLM, log: list[int], method: str, tenant: str, count: int) -> Turn:
    sampling = SamplingParams(
        max_tokens=count, temperature=TEMPERATURE, seed=len(log), ignore_eos=True
    )
    start = time.perf_counter()
    first, tokens, metrics = 0.0, [], None
    for event in llm.stream(
        [log], sampling, SpeculationParams(method=method, policy="fixed"), tenant=tenant
    ):
        if isinstance(event, Committed):
            if not tokens:
                first = time.perf_counter() - start
                num_first = len(event.token_ids)
            tokens += event.token_ids
            metrics = event.metrics or metrics
    took = time.perf_counter() - start - first
    assert metrics is not None
    speed = (len(tokens) - num_first) / took if took > 0 else 0.0
    return Turn(first, speed, metrics.acceptance_length, tuple(tokens))


def conversation(
    llm: LLM, arm: str, method: str, users: list[list[int]], count: int, name: str
) -> list[Turn]:
    """All turns of one conversation; every arm has the same log, for tokens do not depend on it."""
    with_new_drafters(llm)
    log: list[int] = []
    turns = []
    for number, said in enumerate(users):
        log += said
        if arm != "session":
            with_new_drafters(llm)
        alone = number if arm == "cold" else ""
        tenant = f"{method} {arm} {name} {alone}"
        turns.append(answer(llm, log, method, tenant, count))
        log += turns[-1].token_ids
    return turns


def episodes(data: Path, num_turns: int, count: int) -> list[list[str]]:
    """What users and tools said to the assistant in tau-bench episodes, turn by turn."""
    said: dict[str, list[str]] = defaultdict(list)
    for record in workloads.load("tau_bench", data):
        text, _, _ = record.prompt[-3:]  # behind it a blank line and whose turn it is
        said[record.session].append(str(text))
    long = [turns[:num_turns] for turns in said.values() if len(turns) >= num_turns]
    assert long, f"no episode has {num_turns} turns: use fewer"
    return long[:: max(1, len(long) // count)][:count]


def user_turns(llm: LLM, data: Path, num_turns: int, length: int, count: int) -> list[Any]:
    """The same in token ids, cut to `length` tokens a turn."""
    tokenizer = llm.tokenizer
    assert tokenizer is not None
    return [
        [tokenizer.encode(said, add_special_tokens=False)[:length] for said in turns]
        for turns in episodes(data, num_turns, count)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with tau-bench episodes")
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=24, help="of an answer")
    parser.add_argument("--length", type=int, default=20, help="tokens of what a user says")
    parser.add_argument("--conversations", type=int, default=6)
    args = parser.parse_args()
    watch, llm = Watch(), LLM("demo")
    found = user_turns(llm, args.data, args.turns, args.length, args.conversations)
    shown = sorted({0, 1, args.turns // 4, args.turns // 2, args.turns - 1})
    for method in METHODS:
        told: dict[str, list[list[Turn]]] = {arm: [] for arm in ARMS}
        conversation(llm, "session", method, found[0], args.tokens, "warm-up")
        for number, users in enumerate(found):
            for arm in ARMS if number % 2 else reversed(ARMS):  # in turn, forth and back
                turns = conversation(llm, arm, method, users, args.tokens, str(number))
                told[arm].append(turns)
            logs = {json.dumps([t.token_ids for t in told[arm][-1]]) for arm in ARMS}
            assert len(logs) == 1, "the arms said different things"
        _print(method, told, shown)
    print(as_markdown(watch.facts()))


def _print(method: str, told: dict[str, list[list[Turn]]], shown: list[int]) -> None:
    heads = " | ".join(f"turn {n + 1}" for n in shown)
    print(f"| `{method}` | {heads} | all turns |\n{'|---' * (len(shown) + 2)}|")
    for arm, conversations in told.items():
        cells = [_cell([turns[n] for turns in conversations]) for n in shown]
        cells.append(_cell([turn for c in conversations for turn in c]))
        print(f"| {arm} | {' | '.join(cells)} |")
    print()


def _cell(turns: list[Turn]) -> str:
    first = 1e3 * median(turn.first_token_s for turn in turns)
    speed = median(turn.tokens_per_second for turn in turns)
    return f"{first:.1f} / {speed:.0f} / {sum(t.acceptance_length for t in turns) / len(turns):.2f}"


if __name__ == "__main__":
    main()
