"""Whether two models fit together: vocabulary, special tokens, chat template, positions, dtype."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from outrider.models.base import ModelSpec
from outrider.models.checkpoint import read_config
from outrider.models.hub import resolve
from outrider.models.loader import stored_dtype
from outrider.tokenizer import Tokenizer, same_vocabulary

GOOD, NOTE, FAULT = "good", "note", "fault"


class Check(NamedTuple):
    """One thing that was looked at.

    Attributes:
        verdict: "good", "note" (works, but see what it costs), or "fault".
    """

    verdict: str
    about: str
    told: str


def check_models(
    target: ModelSpec,
    draft: ModelSpec,
    tokenizers: tuple[Tokenizer | None, Tokenizer | None],
    names: tuple[str, str],
) -> list[Check]:
    """Of a target and a draft model.

    Args:
        tokenizers: of both; None where one has none in its folder.
        names: as both were given.
    """
    mine, its = tokenizers
    checks = [*_vocabulary(target, draft, mine, its)]
    if mine is not None and its is not None:
        checks += [*_special(target, draft), *_template(mine, its)]
    return [*checks, *_positions(target, draft), *_dtype(names), *_size(target, draft)]


def _vocabulary(
    target: ModelSpec, draft: ModelSpec, mine: Tokenizer | None, its: Tokenizer | None
) -> Iterator[Check]:
    about = "vocabulary"
    if mine is None or its is None:
        if target.vocab_size == draft.vocab_size:
            told = "both have as many tokens; only one has a tokenizer, so no more can be said"
            yield Check(NOTE, about, told)
        else:
            told = f"{draft.vocab_size} tokens beside {target.vocab_size}, and no tokenizer to see"
            yield Check(FAULT, about, f"{told}: copy tokenizer.json into the draft's folder")
        return
    reason = same_vocabulary(mine, its)
    if reason:
        told = f"not the same ({reason}): drafts are translated, which costs time and acceptance"
        yield Check(
            NOTE, about, f"{told}; take a draft model of the target's family if there is one"
        )
        return
    padding = f"; laws of {draft.vocab_size} and {target.vocab_size} values are cut to fit"
    told = "the same" + (padding if draft.vocab_size != target.vocab_size else "")
    yield Check(GOOD, about, told)


def _special(target: ModelSpec, draft: ModelSpec) -> Iterator[Check]:
    mine, its = set(target.eos_token_ids), set(draft.eos_token_ids)
    if mine == its:
        yield Check(GOOD, "tokens that end an answer", "the same")
        return
    told = f"{sorted(its)} beside the target's {sorted(mine)}: the draft guesses other ends"
    yield Check(NOTE, "tokens that end an answer", told)


def _template(mine: Tokenizer, its: Tokenizer) -> Iterator[Check]:
    """Of tokenizers that may have one."""
    templates = [getattr(one.backend, "chat_template", None) for one in (mine, its)]
    if templates[0] == templates[1]:
        yield Check(GOOD, "chat template", "the same" if templates[0] else "none in either")
    elif templates[0] is None:
        yield Check(NOTE, "chat template", "only the draft model has one: the target is given text")
    else:
        told = "has none" if templates[1] is None else "has another one"
        yield Check(
            NOTE,
            "chat template",
            f"the draft model {told} and reads the target's: conversations look unfamiliar to it",
        )


def _positions(target: ModelSpec, draft: ModelSpec) -> Iterator[Check]:
    if draft.max_positions >= target.max_positions:
        yield Check(GOOD, "positions", f"{draft.max_positions}")
        return
    yield Check(
        NOTE,
        "positions",
        f"{draft.max_positions} beside the target's {target.max_positions}: longer texts are not "
        "drafted for",
    )


def _dtype(names: tuple[str, str]) -> Iterator[Check]:
    mine, its = (_stored(name) for name in names)
    if mine == its:
        yield Check(GOOD, "dtype", f"both are stored as {mine or 'unknown'}")
        return
    told = f"stored as {its or 'unknown'}, the target as {mine or 'unknown'}"
    yield Check(NOTE, "dtype", f"{told}: both run in the engine's, so laws may differ in rounding")


def _size(target: ModelSpec, draft: ModelSpec) -> Iterator[Check]:
    share = draft.num_parameters / max(target.num_parameters, 1)
    told = f"{100 * share:.0f} % of the target's {target.num_parameters:,} parameters"
    is_large = share > 0.25
    more = ": a draft of a tenth or less usually pays better" if is_large else ""
    yield Check(NOTE if is_large else GOOD, "size", told + more)


def _stored(name: str) -> Any:
    return stored_dtype(read_config(resolve(name)))
