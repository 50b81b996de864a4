"""A trained draft measured where it serves: in the engine, beside plain decoding.

Teacher-forced rates are a promise; these are what an engine commits.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from outrider.engine.llm import LLM
from outrider.engine.outputs import RequestOutput
from outrider.request import SamplingParams


class Served(NamedTuple):
    """What an engine did with a draft on some prompts.

    Attributes:
        acceptance_length: tokens per drafted step, the target's own included.
        joint: by depth, the share of drafted steps whose drafts stood at least so far.
        num_drafts: drafted steps.
        same_share: of the answers, those that are plain decoding's token by token. With a
            deterministic rule and kernels that are batch-invariant it is 1.
    """

    acceptance_length: float
    joint: tuple[float, ...]
    num_drafts: int
    same_share: float


def measure_served(
    model: str,
    folder: Path,
    prompts: Sequence[Any],
    *,
    num_draft_tokens: int = 4,
    max_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    speculation: Mapping[str, Any] | None = None,
    **options: Any,
) -> Served:
    """Serves the prompts with the draft in `folder`, a head or a draft model, and without.

    Args:
        prompts: as `LLM.generate` takes them.
        speculation: further keys, such as "verifier"; drafts are chains unless it says otherwise.
        options: for `LLM` (device, dtype ...).

    Raises:
        ConfigError, ModelError, RequestError: as `LLM` and `LLM.generate`.
    """
    llm = LLM(model, draft_model=str(folder), policy="fixed", **options)
    sampling = SamplingParams(temperature=temperature, max_tokens=max_tokens, seed=seed)
    asked = {"num_draft_tokens": num_draft_tokens, "width": 1, **(speculation or {})}
    drafted = llm.generate(list(prompts), sampling, asked)
    plain = llm.generate(list(prompts), sampling, "off")
    return _counted(drafted, plain, num_draft_tokens)


def _counted(
    drafted: Sequence[RequestOutput], plain: Sequence[RequestOutput], num_depths: int
) -> Served:
    counts = [0] * (num_depths + 1)
    for output in drafted:
        for accepted, count in enumerate(output.metrics.accepted_histogram):
            counts[min(accepted, num_depths)] += count
    num_drafts = sum(counts)
    stood = [sum(counts[depth:]) for depth in range(1, num_depths + 1)]
    joint = tuple(count / num_drafts if num_drafts else 0.0 for count in stood)
    same = [a.token_ids == b.token_ids for a, b in zip(drafted, plain, strict=True)]
    return Served(1.0 + sum(joint), joint, num_drafts, sum(same) / len(same))
