"""Speed-up of speculation over plain decoding at concurrency 1, arm by arm, with intervals.

python -m benchmarks.speedup --model demo --corpus FOLDER --json speedup.json
"""

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.prompts import held_out_prompts
from outrider.bench.ab import Measured, Plan, measure
from outrider.bench.inprocess import InProcess
from outrider.bench.pairs import findings
from outrider.bench.provenance import as_markdown, provenance
from outrider.bench.target import Arm, Question
from outrider.engine.llm import LLM
from outrider.request import SamplingParams, SpeculationParams

PLAIN = Arm(name="plain", speculation=SpeculationParams(method="off"))


def arms(draft_ks: list[int], ngram_ks: list[int]) -> list[Arm]:
    asked = [("draft_model", k) for k in draft_ks] + [("ngram", k) for k in ngram_ks]
    return [
        Arm(
            name=f"{method} K={k}", speculation=SpeculationParams(method=method, num_draft_tokens=k)
        )
        for method, k in asked
    ]


def main() -> None:
    args = _arguments()
    facts = provenance()
    llm = LLM(args.model, draft_model=args.draft_model, dtype=args.dtype)
    assert llm.tokenizer is not None
    by_domain = held_out_prompts(llm.tokenizer, args.corpus, per_domain=args.per_domain)
    questions = tuple(
        Question(id=f"{domain} {i}", prompt=ids, domain=domain)
        for domain, found in by_domain.items()
        for i, ids in enumerate(found)
    )
    rows = []
    for temperature in args.temperature:
        plan = Plan(
            arms=(PLAIN, *arms(args.k, args.ngram_k)),
            questions=questions,
            sampling=SamplingParams(
                max_tokens=args.max_tokens, temperature=temperature, ignore_eos=True
            ),
            budget_s=args.budget,
            seed=1,
        )
        for row in table(measure(InProcess(llm), plan)):
            rows.append({"temperature": temperature, **row})
            print(line(rows[-1]), flush=True)
    print("\n" + as_markdown(facts))
    print(f"- prompts: {', '.join(f'{len(v)} {k}' for k, v in by_domain.items())}, held out")
    if args.json:
        args.json.write_text(json.dumps({"provenance": facts, "rows": rows}, indent=2) + "\n")


def table(measured: Measured) -> list[dict[str, Any]]:
    """Each arm beside plain decoding, and plain decoding beside itself first."""
    found = findings(measured)
    plain, *others = found["arms"]
    pairs = [pair for pair in found["pairs"] if pair["base"] == plain["name"]]
    null = {**pairs[0], **found["null"], "arm": "plain again"}
    both = zip([plain, *others], [null, *pairs], strict=True)
    return [{**pair, "plain": plain, "speed": arm} for arm, pair in both]


def line(row: dict[str, Any]) -> str:
    low, high = row["interval"]
    acceptance = row["speed"].get("acceptance", {}).get("acceptance_length", 1.0)
    return (
        f"| {row['temperature']} | {row['arm']} | {row['plain']['tokens_per_second']:.0f} | "
        f"{row['speed']['tokens_per_second']:.0f} | {row['ratio']:.2f} ({low:.2f} to {high:.2f}) | "
        f"{acceptance:.2f} | {row['num_identical']}/{row['num_prompts']} | {row['verdict']} |"
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
    parser.add_argument("--budget", type=float, default=300.0, help="seconds per temperature")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
