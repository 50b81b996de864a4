"""Is speculation ever slower than plain decoding? The adaptive policy against off and fixed K.

Good, poor and useless drafters, greedy and drawn, at rising concurrency; the arms of a cell run on
one engine in alternation, beside a null arm.

python -m benchmarks.never_slower --json never_slower.json
python -m benchmarks.never_slower --model grown-135m --drafter good --concurrency 1 4 16
"""

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from outrider.bench.ab import Measured, Plan, measure
from outrider.bench.datasets import load_dataset
from outrider.bench.inprocess import InProcess
from outrider.bench.pairs import Pair, null, pair
from outrider.bench.provenance import Watch, as_markdown
from outrider.bench.target import Arm, Question
from outrider.engine.llm import LLM
from outrider.models.hub import resolve
from outrider.request import SamplingParams, SpeculationParams

OFF = Arm(name="off", speculation=SpeculationParams(method="off"))
ADAPTIVE = Arm(name="adaptive", speculation=SpeculationParams(policy="adaptive"))
BLUR = {"good": 0.0, "poor": 0.35, "useless": 4.0}  # noise on the weights, in their deviations


def main() -> None:
    args = _arguments()
    watch = Watch()
    rows = list(_rows(args))
    facts = watch.facts()
    print("\n" + as_markdown(facts))
    if args.json:
        args.json.write_text(json.dumps({"provenance": facts, "rows": rows}, indent=2) + "\n")


def _rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    fixed = [Arm(name=f"K={k}", speculation=SpeculationParams(num_draft_tokens=k)) for k in args.k]
    questions = tuple(load_dataset("outrider").questions)
    print(HEAD)
    for drafter in args.drafter:
        with tempfile.TemporaryDirectory() as folder:
            draft = blurred(args.draft_model, Path(folder), BLUR[drafter])
            llm = LLM(args.model, draft_model=draft, max_num_seqs=max(args.concurrency))
            llm.calibrate(args.calibrate_s)
            for temperature in args.temperature:
                _serve(llm, questions[len(questions) - args.served :], temperature, args.max_tokens)
            target = InProcess(llm)
            for temperature in args.temperature:
                for concurrency in args.concurrency:
                    measured = _cell(
                        target, (OFF, *fixed, ADAPTIVE), questions, temperature, concurrency, args
                    )
                    row = {"drafter": drafter, "temperature": temperature, **_row(measured)}
                    print(_line(row), flush=True)
                    yield row


def _serve(llm: LLM, questions: tuple[Question, ...], temperature: float, max_tokens: int) -> None:
    """Answers some requests, so that every arm's policy begins with what was seen of drafts."""
    sampling = SamplingParams(max_tokens=max_tokens, temperature=temperature, ignore_eos=True)
    for question in questions:
        llm.generate(question.prompt, sampling, ADAPTIVE.speculation)


def _cell(
    target: InProcess,
    arms: tuple[Arm, ...],
    questions: tuple[Question, ...],
    temperature: float,
    concurrency: int,
    args: argparse.Namespace,
) -> Measured:
    sampling = SamplingParams(
        max_tokens=args.max_tokens, temperature=temperature, seed=1, ignore_eos=True
    )
    plan = Plan(
        arms=arms,
        questions=questions,
        sampling=sampling,
        concurrency=concurrency,
        batch=None if concurrency == 1 else min(args.rounds * concurrency, len(questions)),
        budget_s=args.budget_s,
    )
    return measure(target, plan)


def _row(measured: Measured) -> dict[str, Any]:
    """The adaptive arm, which is the last, against off and against the best fixed K."""
    arms, noise = measured.plan.arms, null(measured)
    last = len(arms) - 1
    fixed = {number: pair(measured, 0, number, noise) for number in range(1, last)}
    best = max(fixed, key=lambda number: fixed[number].ratio.ratio)
    best_or_off = best if fixed[best].ratio.ratio > 1.0 else 0
    return {
        "concurrency": measured.plan.concurrency,
        "fixed": {arms[number].name: _told(one) for number, one in fixed.items()},
        "adaptive": _told(pair(measured, 0, last, noise)),
        "best": arms[best_or_off].name,
        "of_best": _told(pair(measured, best_or_off, last, noise)),
        "null": noise.interval,
        "num_blocks": len(measured.kept),
    }


def _told(one: Pair) -> dict[str, Any]:
    return {"ratio": one.ratio.ratio, "interval": one.ratio.interval, "verdict": one.verdict}


HEAD = (
    "| drafter | T | at once | fixed K | adaptive over off (95 %) | best | adaptive over best "
    "(95 %) | null | blocks |\n|---|---|---|---|---|---|---|---|---|"
)


def _line(row: dict[str, Any]) -> str:
    fixed = ", ".join(f"{name} {one['ratio']:.2f}" for name, one in row["fixed"].items())
    return (
        f"| {row['drafter']} | {row['temperature']:g} | {row['concurrency']} | {fixed} | "
        f"{_ratio(row['adaptive'])} | {row['best']} | {_ratio(row['of_best'])} | "
        f"{_range(row['null'])} | {row['num_blocks']} |"
    )


def _ratio(told: dict[str, Any]) -> str:
    if told["interval"] is None:
        return f"**{told['ratio']:.2f}**"
    low, high = told["interval"]
    return f"**{told['ratio']:.2f}** ({low:.2f} to {high:.2f})"


def _range(interval: Sequence[float] | None) -> str:
    return "unknown" if interval is None else f"{interval[0]:.2f} to {interval[1]:.2f}"


def blurred(name: str, folder: Path, blur: float) -> str:
    """A draft model with noise on its weights; itself where there is none."""
    if not blur:
        return name
    source = resolve(name)
    for file in source.iterdir():
        if file.is_file() and file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    weights = load_file(source / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for key, weight in weights.items():
        if weight.dim() == 2:
            noise = torch.randn(weight.shape, generator=generator)
            weight += (blur * weight.float().std() * noise).to(weight.dtype)
        weights[key] = weight.contiguous()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--draft-model", default="demo-draft")
    parser.add_argument("--drafter", nargs="+", choices=BLUR, default=list(BLUR))
    parser.add_argument("--temperature", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--k", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3, help="prompts of a block, per seat")
    parser.add_argument("--budget-s", type=float, default=20.0, help="seconds per cell")
    parser.add_argument("--calibrate-s", type=float, default=3.0)
    parser.add_argument(
        "--served", type=int, default=0, help="requests answered before, of each temperature"
    )
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
