"""Draft heads on one target beside a draft model, n-grams and plain decoding, by domain.

Arms alternate on one engine; at temperature 0 and 1. Tiny targets loop at temperature 0, so the
figures at 1 are those that count.

python -m benchmarks.heads --heads demo-eagle3 demo-medusa demo-kv
"""

import argparse
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from outrider.bench.ab import Measured, Plan, measure
from outrider.bench.datasets import load_dataset
from outrider.bench.histogram import total
from outrider.bench.inprocess import InProcess
from outrider.bench.pairs import null, pair
from outrider.bench.provenance import Watch, as_markdown
from outrider.bench.target import Arm, Question
from outrider.engine.llm import LLM
from outrider.request import SamplingParams, SpeculationParams

OFF = Arm(name="plain", speculation=SpeculationParams(method="off"))
LAST = {"ngram": {"prompt_lookup_min": 1, "prompt_lookup_max": 1, "num_draft_tokens": 1}}
TREES = ("eagle", "medusa", "kv_draft")


def main() -> None:
    args = _arguments()
    watch = Watch()
    llm = LLM(args.model, draft_model=args.draft_model, heads=args.heads, max_num_seqs=8)
    target = InProcess(llm)
    tables = [
        _table(target, _arms(llm, args.k), temperature, args) for temperature in args.temperature
    ]
    facts = watch.facts()
    print("\n" + as_markdown(facts))
    if args.json:
        args.json.write_text(json.dumps({"provenance": facts, "tables": tables}, indent=2) + "\n")


def _arms(llm: LLM, depths: list[int]) -> list[Arm]:
    """Chains of each K from everybody, and trees of the last where a head drafts them."""
    names = llm.engine.drafters.names()
    settings: dict[str, Mapping[str, Any]] = {
        "last token again": {"method": "ngram", **LAST["ngram"]}
    }
    settings["ngram"] = {"method": "ngram"}
    for name in ("draft_model", "eagle", "mtp", "block", "medusa", "kv_draft"):
        for k in depths if name in names else ():
            settings[f"{name}, K={k}"] = {"method": name, "num_draft_tokens": k, "width": 1}
    k = depths[-1]
    for name in TREES:
        if name in names:
            tree = {"num_draft_tokens": k, "width": 3, "num_nodes": 3 * k}
            settings[f"{name}, tree of {3 * k}"] = {"method": name, **tree}
    return [
        Arm(name=name, speculation=SpeculationParams.from_dict({**one, "policy": "fixed"}))
        for name, one in settings.items()
    ]


def _some(questions: Sequence[Question], per_domain: int | None) -> tuple[Question, ...]:
    """The first so many of each domain."""
    seen: Counter[str] = Counter()
    chosen = []
    for question in questions:
        seen[question.domain] += 1
        if per_domain is None or seen[question.domain] <= per_domain:
            chosen.append(question)
    return tuple(chosen)


def _table(
    target: InProcess, arms: list[Arm], temperature: float, args: argparse.Namespace
) -> dict[str, Any]:
    questions = _some(load_dataset(args.prompts).questions, args.per_domain)
    sampling = SamplingParams(
        max_tokens=args.max_tokens, temperature=temperature, seed=1, ignore_eos=True
    )
    plan = Plan(arms=(OFF, *arms), questions=questions, sampling=sampling, budget_s=args.budget_s)
    measured = measure(target, plan)
    rows = list(_rows(measured))
    domains = list(rows[0]["domains"]) if rows else []
    print(f"\nTemperature {temperature:g}, {len(measured.kept)} blocks of one prompt\n")
    print("| drafter | times as fast (95 %) | acceptance length | " + " | ".join(domains) + " |")
    print("|---" * (3 + len(domains)) + "|")
    for row in rows:
        print(_line(row, domains), flush=True)
    return {"temperature": temperature, "rows": rows, "num_blocks": len(measured.kept)}


def _rows(measured: Measured) -> Iterator[dict[str, Any]]:
    noise = null(measured)
    for number in range(1, len(measured.plan.arms)):
        told = pair(measured, 0, number, noise)
        lengths = _lengths(measured, number)
        yield {
            "drafter": measured.plan.arms[number].name,
            "ratio": told.ratio.ratio,
            "interval": told.ratio.interval,
            "acceptance_length": lengths.pop(""),
            "domains": {
                domain: {
                    "ratio": ratio.ratio,
                    "interval": ratio.interval,
                    "acceptance_length": lengths.get(domain),
                }
                for domain, ratio in told.domains
            },
        }


def _lengths(measured: Measured, number: int) -> dict[str, float]:
    """Acceptance length by domain, and of all under ""."""
    domain_of = {question.id: question.domain for question in measured.plan.questions}
    found: dict[str, list[Any]] = {"": []}
    for block in measured.kept:
        counts = [run.acceptance for run in block.of(number) if run.acceptance is not None]
        found[""] += counts
        found.setdefault(domain_of[block.questions[0]], []).extend(counts)
    sums = {domain: total(counts) for domain, counts in found.items() if counts}
    return {domain: one.acceptance_length for domain, one in sums.items() if one is not None}


def _line(row: Mapping[str, Any], domains: list[str]) -> str:
    low, high = row["interval"] or (float("nan"), float("nan"))
    cells = [row["drafter"], f"**{row['ratio']:.2f}** ({low:.2f} to {high:.2f})"]
    cells.append(f"{row['acceptance_length']:.2f}")
    for domain in domains:
        one = row["domains"][domain]
        low, high = one["interval"] or (float("nan"), float("nan"))
        told = f"{one['ratio']:.2f} ({low:.2f} to {high:.2f})"
        cells.append(f"{told} / {one['acceptance_length'] or 1.0:.2f}")
    return "| " + " | ".join(cells) + " |"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--draft-model", default="demo-draft")
    parser.add_argument("--heads", nargs="+", required=True)
    parser.add_argument("--temperature", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--k", type=int, nargs="+", default=[4])
    parser.add_argument("--prompts", default="outrider")
    parser.add_argument("--per-domain", type=int, help="prompts of each domain; all by default")
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--budget-s", type=float, default=90.0, help="seconds per temperature")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
