"""A trained draft in the engine, by domain of the held-out text and by place in the draft.

Teacher-forced rates are given the text; here the target goes on by itself from held-out prompts.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from outrider.engine.llm import LLM
from outrider.engine.outputs import RequestOutput
from outrider.request import SamplingParams
from outrider.train.heads.pieces import Piece
from outrider.train.heads.serving import Served, counted
from outrider.train.heads.tables import rate, table

MAX_TOKENS = 64  # of an answer
ALL = "**all**"  # the last row of the table
KINDS = {"sampled": 1.0, "greedy": 0.0}  # temperature


class Figures(NamedTuple):
    """Of all answers, and by domain."""

    total: Served
    domains: Mapping[str, Served]

    def to_json(self) -> dict[str, Any]:
        domains = {domain: served._asdict() for domain, served in self.domains.items()}
        return {"total": self.total._asdict(), "domains": domains}


class ByDomain(NamedTuple):
    """What an engine did with a draft.

    Attributes:
        num_prompts: that were answered, once per temperature.
        num_draft_tokens: K of the chains that were drafted.
        kinds: "sampled" at temperature 1 and "greedy", each in total and by domain.
    """

    num_prompts: int
    num_draft_tokens: int
    kinds: Mapping[str, Figures]

    def to_json(self) -> dict[str, Any]:
        return {
            "num_prompts": self.num_prompts,
            "num_draft_tokens": self.num_draft_tokens,
            **{kind: figures.to_json() for kind, figures in self.kinds.items()},
        }


def serve(
    target: str,
    folder: Path,
    pieces: Sequence[Piece],
    *,
    num_draft_tokens: int,
    num_prompts: int,
    seed: int = 0,
    **options: Any,
) -> ByDomain | None:
    """Answers prompts of held-out text with the draft in `folder`, and without.

    Args:
        pieces: whose beginnings are the prompts; `num_prompts` of them, of all domains alike.
        options: for `LLM` (device, dtype ...).

    Returns:
        None where no piece has a prompt.

    Raises:
        OutriderError: as `LLM` and `LLM.generate`.
    """
    chosen = spread(pieces, num_prompts)
    if not chosen:
        return None
    llm = LLM(target, draft_model=str(folder), policy="fixed", **options)
    chain = {"num_draft_tokens": num_draft_tokens, "width": 1}
    kinds = {}
    for kind, temperature in KINDS.items():
        sampling = [
            SamplingParams(temperature=temperature, max_tokens=MAX_TOKENS, seed=seed + number)
            for number in range(len(chosen))
        ]
        prompts = [piece.text.tokens[: piece.text.num_prompt] for piece in chosen]
        drafted = llm.generate(prompts, sampling, chain)
        plain = llm.generate(prompts, sampling, "off")
        kinds[kind] = _figures(chosen, drafted, plain, num_draft_tokens)
    return ByDomain(len(chosen), num_draft_tokens, kinds)


def spread(pieces: Sequence[Piece], num_prompts: int) -> list[Piece]:
    """The first of each domain, then the second of each, in the order of their digests."""
    queues: dict[str, list[Piece]] = {}
    for piece in sorted(pieces, key=lambda piece: piece.digest):
        if piece.text.num_prompt:
            queues.setdefault(piece.text.domain, []).append(piece)
    chosen: list[Piece] = []
    for turn in range(max(map(len, queues.values()), default=0)):
        chosen += [queues[name][turn] for name in sorted(queues) if turn < len(queues[name])]
    return chosen[:num_prompts]


def served_table(found: ByDomain) -> str:
    """Markdown: by domain, acceptance lengths and, at temperature 1, rates by place."""
    depths = [str(depth) for depth in range(1, found.num_draft_tokens + 1)]
    rows = []
    for domain, sampled, greedy in _lines(found.kinds["sampled"], found.kinds["greedy"]):
        lengths = f"{sampled.acceptance_length:.2f}", f"{greedy.acceptance_length:.2f}"
        rows.append([domain, *lengths, *map(rate, sampled.joint), str(sampled.num_drafts)])
    return table(["in the engine", "length, sampled", "length, greedy", *depths, "drafts"], rows)


def served_told(found: ByDomain) -> str:
    """What the table is of, and whether outputs stayed what they were."""
    shares = [figures.total.same_share for figures in found.kinds.values()]
    same = round(sum(shares) * found.num_prompts)
    return (
        f"The target went on from {found.num_prompts} held-out prompts, up to {MAX_TOKENS} tokens, "
        f"at temperature 1 (*sampled*) and 0 (*greedy*), with chains of {found.num_draft_tokens} "
        "and the default rule. Columns 1, 2, ... say how often the first so many tokens of a "
        f"draft stood at temperature 1. {same} of {2 * found.num_prompts} answers were those of "
        "plain decoding, token for token."
    )


def _lines(sampled: Figures, greedy: Figures) -> Iterator[tuple[str, Served, Served]]:
    """Of the table; a domain alone would say what all of them say."""
    if len(sampled.domains) > 1:
        for domain, served in sampled.domains.items():
            yield domain, served, greedy.domains[domain]
    yield ALL, sampled.total, greedy.total


def _figures(
    pieces: Sequence[Piece],
    drafted: Sequence[RequestOutput],
    plain: Sequence[RequestOutput],
    num_depths: int,
) -> Figures:
    places: dict[str, list[int]] = {}
    for place, piece in enumerate(pieces):
        places.setdefault(piece.text.domain, []).append(place)
    domains = {
        domain: counted([drafted[at] for at in mine], [plain[at] for at in mine], num_depths)
        for domain, mine in sorted(places.items())
    }
    return Figures(counted(drafted, plain, num_depths), domains)
