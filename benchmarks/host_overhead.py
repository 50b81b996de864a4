"""Host overhead: what a step costs beside the passes of target and draft model.

python -m benchmarks.host_overhead
python -m benchmarks.host_overhead --real
"""

import argparse
import statistics
import time
from typing import Any

from benchmarks.scripted import script
from outrider.bench.provenance import as_markdown, provenance
from outrider.engine.llm import LLM
from outrider.request import Request, SamplingParams, SpeculationParams

METHODS = {
    "off": SpeculationParams(method="off"),
    "ngram K=5": SpeculationParams(method="ngram", num_draft_tokens=5),
    "draft_model K=4": SpeculationParams(method="draft_model", num_draft_tokens=4),
}
NUM_TOKENS = 80


class Timer:
    """Adds up the time inside the calls it was set to watch."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def watch(self, owner: Any, name: str) -> None:
        inner = getattr(owner, name)

        def call(*args: Any) -> Any:
            start = time.perf_counter()
            out = inner(*args)
            self.seconds += time.perf_counter() - start
            return out

        setattr(owner, name, call)


def step_times(llm: LLM, timer: Timer, batch: int, name: str, temperature: float) -> list[float]:
    """Seconds per decode step of the full batch, outside of what the timer watches."""
    sampling = SamplingParams(
        max_tokens=NUM_TOKENS, temperature=temperature, seed=0, ignore_eos=True
    )
    for i in range(batch):
        prompt = tuple(5 + (i * 37 + j * 11) % 3000 for j in range(32))
        llm.engine.add(
            Request(
                id=f"{name} {batch} {temperature} {i}",
                prompt_token_ids=prompt,
                sampling=sampling,
                speculation=METHODS[name],
                seed=i,
            )
        )
    spent = []
    while llm.engine.has_work():
        num_running = len(llm.engine.scheduler.running)
        timer.seconds = 0.0
        start = time.perf_counter()
        llm.engine.step()
        if num_running == batch == len(llm.engine.scheduler.running):
            spent.append(time.perf_counter() - start - timer.seconds)
    return spent


def best_median(llm: LLM, timer: Timer, batch: int, name: str, temperature: float) -> float:
    """The least of five runs' medians: other users of the machine only ever add."""
    step_times(llm, timer, batch, name, temperature)
    return min(
        statistics.median(step_times(llm, timer, batch, name, temperature)) for _ in range(5)
    )


def accepted(llm: LLM, before: tuple[int, int]) -> str:
    drafted, taken = llm.engine.stats.num_draft_tokens, llm.engine.stats.num_accepted_tokens
    return f"{(taken - before[1]) / (drafted - before[0]):.0%}" if drafted > before[0] else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--temperature", type=float, nargs="+", default=[0.0, 0.8])
    parser.add_argument("--method", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument(
        "--real",
        action="store_true",
        help="run the demo pair: its index tables and argmax count too",
    )
    args = parser.parse_args()
    facts = provenance()
    llm, timer = LLM("demo", max_num_seqs=max(64, *args.batch)), Timer()
    if not args.real:
        script(llm)
    timer.watch(llm.engine.runner.network, "forward")
    timer.watch(llm.engine.drafters["draft_model"].runner.network, "forward")  # type: ignore[attr-defined]
    for temperature in args.temperature:
        for name in args.method:
            stats = llm.engine.stats
            before = stats.num_draft_tokens, stats.num_accepted_tokens
            cells = [
                f"{best_median(llm, timer, batch, name, temperature) * 1e3:.2f}"
                for batch in args.batch
            ]
            share = accepted(llm, before)
            print(f"| {temperature} | {name} | {share} | {' | '.join(cells)} |", flush=True)
    print("\n" + as_markdown(facts))


if __name__ == "__main__":
    main()
