"""Acceptance length by how a draft model draws its tokens, and by the rule that decides.

python -m benchmarks.draft_sampling --corpus FOLDER
"""

import argparse
from pathlib import Path
from typing import Any

from benchmarks.prompts import held_out_prompts
from outrider.bench.provenance import as_markdown, provenance
from outrider.engine.llm import LLM
from outrider.request import SamplingParams, SpeculationParams

PAIRS = (("coupled", "sampled"), ("greedy", "sampled"), ("probabilistic", "rejection"))


def acceptance_length(
    llm: LLM, prompts: list[Any], sampling: SamplingParams, k: int, pair: tuple[str, str]
) -> float:
    """Weighted by draft, over all prompts together."""
    asked = SpeculationParams(
        method="draft_model", num_draft_tokens=k, draft_sample_method=pair[0], verifier=pair[1]
    )
    metrics = [output.metrics for output in llm.generate(prompts, sampling, asked)]
    return 1 + sum(m.num_accepted_tokens for m in metrics) / sum(m.num_drafts for m in metrics)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", type=Path)
    parser.add_argument("--per-domain", type=int, default=4)
    parser.add_argument("--k", type=int, default=3)
    parser.add_argument("--seed", type=int, nargs="+", default=[1, 2, 3])
    args = parser.parse_args()
    facts = provenance()
    llm = LLM("demo")
    assert llm.tokenizer is not None
    found = held_out_prompts(llm.tokenizer, args.corpus, per_domain=args.per_domain)
    prompts: list[Any] = [ids for domain in found.values() for ids in domain]
    for temperature in (0.6, 1.0):
        for pair in PAIRS:
            lengths = []
            for seed in args.seed:
                sampling = SamplingParams(
                    max_tokens=64, temperature=temperature, seed=seed, ignore_eos=True
                )
                lengths.append(acceptance_length(llm, prompts, sampling, args.k, pair))
            cells = " | ".join(f"{length:.2f}" for length in lengths)
            print(f"| {temperature} | {pair[0]} | {pair[1]} | {cells} |", flush=True)
    print("\n" + as_markdown(facts))


if __name__ == "__main__":
    main()
