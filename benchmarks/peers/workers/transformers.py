"""Worker: `generate` of transformers, plain, assisted by a draft model, or with prompt lookup."""

from importlib.metadata import version
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.peers.protocol import Generate, options, serve


def load() -> tuple[Generate, dict[str, str]]:
    asked = options()
    torch.set_num_threads(asked["threads"])
    model = _load_model(asked["target"])
    extra = _speculation(asked)

    def generate(prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
        ids = torch.tensor(prompts)  # of equal length: nothing is padded
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=num_tokens,
                do_sample=False,
                **extra,
            )
        return out[:, ids.shape[1] :].tolist()

    return generate, {name: version(name) for name in ("transformers", "torch")}


def _load_model(folder: str) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None  # goes on past the end
    return model


def _speculation(asked: dict[str, Any]) -> dict[str, Any]:
    method, num_draft_tokens = asked["method"], asked["num_draft_tokens"]
    if method == "off":
        return {}
    if method == "ngram":
        sizes = {"prompt_lookup_num_tokens": num_draft_tokens}
        return {**sizes, "max_matching_ngram_size": asked["lookup_max"]}
    assistant = _load_model(asked["draft"])
    config = assistant.generation_config
    config.num_assistant_tokens = num_draft_tokens
    config.num_assistant_tokens_schedule = "constant"
    config.assistant_confidence_threshold = 0.0
    return {"assistant_model": assistant}


if __name__ == "__main__":
    serve(load)
