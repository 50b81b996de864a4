"""A trained draft measured where it serves: in the engine, beside plain decoding.

Teacher-forced rates are a promise; these are what an engine commits.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from outrider.engine.llm import LLM
from outrider.engine.outputs import RequestOutput
from outrider.request import SamplingParams
from outrider.train.heads.pieces import Piece
from outrider.train.heads.promote import Tally


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


def drafting(model: str, folder: Path, **options: Any) -> LLM:
    """An engine of the target and the draft in `folder`; drafts are as long as they can be."""
    return LLM(model, draft_model=str(folder), policy="fixed", **options)


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
    llm = drafting(model, folder, **options)
    sampling = SamplingParams(temperature=temperature, max_tokens=max_tokens, seed=seed)
    asked = {"num_draft_tokens": num_draft_tokens, "width": 1, **(speculation or {})}
    drafted = llm.generate(list(prompts), sampling, asked)
    plain = llm.generate(list(prompts), sampling, "off")
    return counted(drafted, plain, num_draft_tokens)


def tally_served(
    model: str,
    folder: Path,
    pieces: Sequence[Piece],
    *,
    num_draft_tokens: int,
    seed: int = 0,
    **options: Any,
) -> Tally:
    """Has the target go on from the beginning of each piece, as far as the piece goes.

    At temperature 1, each with a seed of its own; the default rule draws the target's tokens by
    that seed alone, so drafts of every kind are held against the same text.

    Args:
        folder: of a head or a draft model.
        options: for `LLM` (device, dtype ...).

    Raises:
        ConfigError, ModelError, PairError: as `LLM`.
    """
    llm = drafting(model, folder, **options)
    asked = [piece for piece in pieces if 0 < piece.text.num_prompt < len(piece.text.tokens)]
    outputs = llm.generate(
        [piece.text.tokens[: piece.text.num_prompt] for piece in asked],
        [_going_on(piece, seed + number) for number, piece in enumerate(asked)],
        {"num_draft_tokens": num_draft_tokens, "width": 1},
    )
    found = Tally({}, {})
    for piece, output in zip(asked, outputs, strict=True):
        accepted, num_drafts = output.metrics.num_accepted_tokens, output.metrics.num_drafts
        if num_drafts:
            found.accepted[piece.unit] = found.accepted.get(piece.unit, 0.0) + accepted
            found.num_drafts[piece.unit] = found.num_drafts.get(piece.unit, 0) + num_drafts
    return found


def _going_on(piece: Piece, seed: int) -> SamplingParams:
    room = len(piece.text.tokens) - piece.text.num_prompt
    return SamplingParams(temperature=1.0, max_tokens=room, ignore_eos=True, seed=seed)


def counted(
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
