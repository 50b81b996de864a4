"""Outrider beside plain and assisted generation of transformers: one pair, one process, in turns.

python -m benchmarks.assisted --corpus FOLDER
"""

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from benchmarks.prompts import held_out_prompts
from outrider.bench.provenance import as_markdown, provenance
from outrider.bench.statistics import paired_ratio
from outrider.engine.llm import LLM
from outrider.models.hub import resolve
from outrider.request import SamplingParams, SpeculationParams

Answer = Callable[[list[int]], list[int]]


def contenders(model: str, draft: str, max_tokens: int, k: int) -> tuple[LLM, dict[str, Answer]]:
    llm = LLM(model, draft_model=draft)
    target = AutoModelForCausalLM.from_pretrained(resolve(model), dtype=torch.float32).eval()
    assistant = AutoModelForCausalLM.from_pretrained(resolve(draft), dtype=torch.float32).eval()
    for model_of_pair in (target, assistant):
        model_of_pair.generation_config.eos_token_id = None  # go on past the end, as ignore_eos
    assistant.generation_config.num_assistant_tokens = k
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    assistant.generation_config.assistant_confidence_threshold = 0.0
    sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True)

    def ours(speculation: SpeculationParams) -> Answer:
        return lambda ids: llm.generate([ids], sampling, speculation)[0].token_ids

    def theirs(**options: object) -> Answer:
        def answer(ids: list[int]) -> list[int]:
            with torch.inference_mode():
                out = target.generate(
                    torch.tensor([ids]),
                    attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                    max_new_tokens=max_tokens,
                    do_sample=False,
                    **options,
                )
            return out[0, len(ids) :].tolist()

        return answer

    return llm, {
        "outrider plain": ours(SpeculationParams(method="off")),
        f"outrider draft_model K={k}": ours(
            SpeculationParams(method="draft_model", num_draft_tokens=k)
        ),
        "outrider ngram K=6": ours(SpeculationParams(method="ngram", num_draft_tokens=6)),
        "transformers plain": theirs(),
        f"transformers assisted K={k}": theirs(assistant_model=assistant),
        "transformers prompt lookup K=6": theirs(prompt_lookup_num_tokens=6),
    }


def main() -> None:
    args = _arguments()
    facts = provenance()
    llm, answers = contenders(args.model, args.draft_model, args.max_tokens, args.k)
    assert llm.tokenizer is not None
    found = held_out_prompts(llm.tokenizer, args.corpus, per_domain=args.per_domain)
    prompts = [ids for domain in found.values() for ids in domain]
    seconds: dict[str, list[float]] = {name: [] for name in answers}
    same = dict.fromkeys(answers, 0)
    for ids in prompts:
        truth = answers["outrider plain"](ids)
        for name, answer in [*answers.items(), *reversed(answers.items())]:
            start = time.perf_counter()
            tokens = answer(ids)
            seconds[name].append(time.perf_counter() - start)
            same[name] += tokens == truth
    for name, spent in seconds.items():
        pairs = zip(seconds["transformers plain"], spent, strict=True)
        logs = [math.log(base / mine) for base, mine in pairs]
        by_prompt = [(a + b) / 2 for a, b in zip(logs[::2], logs[1::2], strict=True)]
        ratio = paired_ratio([[each] for each in by_prompt])
        speed = args.max_tokens * len(spent) / sum(spent)
        print(
            f"| {name} | {speed:.0f} | {ratio.ratio:.2f} ({ratio.low:.2f} to {ratio.high:.2f}) | "
            f"{same[name]}/{len(spent)} |"
        )
    print("\n" + as_markdown(facts))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--draft-model", default="demo-draft")
    parser.add_argument("--corpus", type=Path)
    parser.add_argument("--per-domain", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--k", type=int, default=3)
    return parser.parse_args()


if __name__ == "__main__":
    main()
