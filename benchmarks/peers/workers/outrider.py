"""Worker: Outrider itself."""

from importlib.metadata import version
from typing import Any

from benchmarks.peers.protocol import Generate, options, serve
from outrider.engine.llm import LLM
from outrider.request import SamplingParams


def load() -> tuple[Generate, dict[str, str]]:
    asked = options()
    llm = LLM(
        asked["target"],
        draft_model=asked["draft"] if asked["method"] == "draft_model" else None,
        speculation=_speculation(asked),
        max_num_seqs=asked["max_num_seqs"],
        enable_prefix_caching=False,
        **asked["llm"],
    )

    def generate(prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
        sampling = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
        return [output.token_ids for output in llm.generate(prompts, sampling)]

    return generate, {"torch": version("torch")}


def _speculation(asked: dict[str, Any]) -> dict[str, Any]:
    if asked["method"] == "off":
        return {"method": "off"}
    keys = {"method": asked["method"], "num_draft_tokens": asked["num_draft_tokens"]}
    if asked["method"] == "draft_model":
        return keys
    sizes = {f"prompt_lookup_{end}": asked[f"lookup_{end}"] for end in ("min", "max")}
    return {**keys, **sizes}


if __name__ == "__main__":
    serve(load)
