"""Host overhead: what a step costs beside the passes of target and draft model.

python -m benchmarks.host_overhead
"""

import argparse
import statistics
import time
from typing import Any

from benchmarks.provenance import as_markdown, provenance
from outrider.engine.llm import LLM
from outrider.request import Request, SamplingParams, SpeculationParams

METHODS = {
    "off": SpeculationParams(method="off"),
    "ngram K=5": SpeculationParams(method="ngram", num_draft_tokens=5),
    "draft_model K=4": SpeculationParams(method="draft_model", num_draft_tokens=4),
}


class Timer:
    """Adds up the time inside the networks' forward calls."""

    def __init__(self, *networks: Any) -> None:
        self.seconds = 0.0
        for network in networks:
            self._wrap(network)

    def _wrap(self, network: Any) -> None:
        inner = network.forward

        def forward(*args: Any) -> Any:
            start = time.perf_counter()
            out = inner(*args)
            self.seconds += time.perf_counter() - start
            return out

        network.forward = forward


def step_times(llm: LLM, timer: Timer, batch: int, name: str, temperature: float) -> list[float]:
    """Seconds per decode step outside the networks."""
    sampling = SamplingParams(max_tokens=80, temperature=temperature, seed=0, ignore_eos=True)
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
        timer.seconds = 0.0
        start = time.perf_counter()
        llm.engine.step()
        spent.append(time.perf_counter() - start - timer.seconds)
    return spent[2:-4]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    args = parser.parse_args()
    facts = provenance()
    llm = LLM("demo")
    timer = Timer(
        llm.engine.runner.network,
        llm.engine.drafters["draft_model"].runner.network,  # type: ignore[attr-defined]
    )
    for temperature in (0.0, 0.8):
        for name in METHODS:
            cells = []
            for batch in args.batch:
                step_times(llm, timer, batch, name, temperature)
                spent = step_times(llm, timer, batch, name, temperature)
                cells.append(f"{statistics.median(spent) * 1e3:.2f}")
            print(f"| {temperature} | {name} | {' | '.join(cells)} |", flush=True)
    print("\n" + as_markdown(facts))


if __name__ == "__main__":
    main()
