"""Worker: OpenVINO GenAI's continuous-batching pipeline on the CPU."""

from importlib.metadata import version
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as genai

from benchmarks.peers.protocol import Generate, options, serve

KV_CACHE_GB = 1


def load() -> tuple[Generate, dict[str, str]]:
    asked = options()
    method = asked["method"]
    scheduler = genai.SchedulerConfig()
    scheduler.cache_size = KV_CACHE_GB
    scheduler.max_num_seqs = asked["max_num_seqs"]
    scheduler.max_num_batched_tokens = 2048
    scheduler.enable_prefix_caching = False
    properties = _properties(asked)
    if method == "draft_model":
        properties["draft_model"] = genai.draft_model(asked["draft"], "CPU", **_properties(asked))
    if method == "ngram":
        properties["prompt_lookup"] = True
    pipeline = genai.ContinuousBatchingPipeline(asked["target"], scheduler, "CPU", properties)

    def generate(prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
        config = genai.GenerationConfig(max_new_tokens=num_tokens, ignore_eos=True, do_sample=False)
        if method != "off":
            config.num_assistant_tokens = asked["num_draft_tokens"]
        if method == "ngram":
            config.max_ngram_size = asked["lookup_max"]
        inputs = [ov.Tensor(np.array([ids], dtype=np.int64)) for ids in prompts]
        results = pipeline.generate(inputs, [config] * len(inputs))
        return [list(result.m_generation_ids[0]) for result in results]

    return generate, {name: version(name) for name in ("openvino-genai", "openvino")}


def _properties(asked: dict[str, Any]) -> dict[str, Any]:
    """fp32 is said outright, or bfloat16 would stand in for it where the processor has it."""
    common = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": asked["threads"]}
    if asked["precision"] != "fp32":
        return common
    return {**common, "INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}


if __name__ == "__main__":
    serve(load)
