"""Speed-up of speculation over plain decoding at concurrency 1, arm by arm, with intervals.

python -m benchmarks.speedup --model demo --corpus FOLDER --json speedup.json
"""

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.prompts import held_out_prompts
from benchmarks.provenance import as_markdown, provenance
from outrider.bench.arms import Arm, compare
from outrider.cli.demo import to_json
from outrider.engine.llm import LLM
from outrider.request import SamplingParams, SpeculationParams


def arms(draft_ks: list[int], ngram_ks: list[int]) -> list[Arm]:
    model = [
        Arm(f"draft_model K={k}", SpeculationParams(method="draft_model", num_draft_tokens=k))
        for k in draft_ks
    ]
    ngram = [
        Arm(f"ngram K={k}", SpeculationParams(method="ngram", num_draft_tokens=k)) for k in ngram_ks
    ]
    return [Arm("plain again", SpeculationParams(method="off")), *model, *ngram]


def main() -> None:
    args = _arguments()
    facts = provenance()
    llm = LLM(args.model, draft_model=args.draft_model, dtype=args.dtype)
    assert llm.tokenizer is not None
    by_domain = held_out_prompts(llm.tokenizer, args.corpus, per_domain=args.per_domain)
    prompts: list[Any] = [ids for found in by_domain.values() for ids in found]
    plain = Arm("plain", SpeculationParams(method="off"))
    rows = []
    for temperature in args.temperature:
        sampling = SamplingParams(
            max_tokens=args.max_tokens, temperature=temperature, seed=1, ignore_eos=True
        )
        for arm in arms(args.k, args.ngram_k):
            row = to_json(compare(llm, prompts, plain, arm, sampling))
            rows.append({"temperature": temperature, **row})
            print(line(rows[-1]), flush=True)
    print("\n" + as_markdown(facts))
    print(f"- prompts: {', '.join(f'{len(v)} {k}' for k, v in by_domain.items())}, held out")
    if args.json:
        args.json.write_text(json.dumps({"provenance": facts, "rows": rows}, indent=2) + "\n")


def line(row: dict[str, Any]) -> str:
    return (
        f"| {row['temperature']} | {row['arm']} | {row['tokens_per_second'][0]:.0f} | "
        f"{row['tokens_per_second'][1]:.0f} | {row['ratio']:.2f} "
        f"({row['low']:.2f} to {row['high']:.2f}) | {row['acceptance_length']:.2f} | "
        f"{row['num_identical']}/{row['num_prompts']} | {row['verdict']} |"
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--draft-model")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--corpus", type=Path)
    parser.add_argument("--per-domain", type=int, default=4)
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--temperature", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--k", type=int, nargs="*", default=[1, 2, 3, 4, 6])
    parser.add_argument("--ngram-k", type=int, nargs="*", default=[3, 6])
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
