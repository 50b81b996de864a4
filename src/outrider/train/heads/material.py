"""What a run learns from and is judged by, and the words it may say: from files or the target."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from outrider.errors import ConfigError, TokenizerError
from outrider.models.checkpoint import eos_token_ids
from outrider.tokenizer import Tokenizer, load_tokenizer
from outrider.train.heads.answers import Asking, answered
from outrider.train.heads.pieces import Split, cut, split
from outrider.train.heads.settings import DraftTraining
from outrider.train.heads.student import Student
from outrider.train.heads.teacher import Teacher
from outrider.train.heads.texts import read_texts
from outrider.train.heads.vocabulary import draft_vocabulary

ANSWERS_HELD_OUT = 64
MOST_MARKS = 512  # tokens added to a vocabulary; where there are more, most are no marks

Report = Callable[[str], None]


def gather(settings: DraftTraining, teacher: Teacher, report: Report) -> tuple[Split, Tokenizer]:
    """Pieces to learn from and to evaluate on, and the tokenizer they were made with."""
    folder = teacher.target.folder
    assert folder is not None
    tokenizer = load_tokenizer(folder)
    if tokenizer.vocab_size > teacher.target.vocab_size:
        raise TokenizerError(
            f"the tokenizer of {settings.target!r} has {tokenizer.vocab_size} tokens, the model "
            f"{teacher.target.vocab_size}: one of them belongs to another model"
        )
    window = min(settings.window, teacher.spec.max_positions)
    pieces = cut(read_texts(settings.data, tokenizer), window)
    if settings.held_out:
        held_out = cut(read_texts(settings.held_out, tokenizer), window)
        kept_back = {piece.digest for piece in held_out}
        data = Split([piece for piece in pieces if piece.digest not in kept_back], held_out)
    else:
        data = split(pieces)
    if settings.on_policy:
        return _answered(settings, data, window, report), tokenizer
    learned = Split(*([p for p in part if any(p.text.is_learned)] for part in data))
    if not all(learned):
        raise ConfigError(
            "the data holds prompts without answers: add answers, or have the target write them "
            "with on_policy"
        )
    return learned, tokenizer


def _answered(settings: DraftTraining, data: Split, window: int, report: Report) -> Split:
    """With answers by the target, of which those to learn from come in the order of digests."""
    asking = Asking(
        target=settings.target,
        device=device_of(settings),
        dtype=settings.dtype,
        temperature=settings.temperature,
        max_tokens=settings.answer_tokens,
        window=window,
        seed=settings.seed,
        draft=None if settings.promote is None else str(settings.promote),
    )
    chosen = sorted(data.training, key=lambda piece: piece.digest)[: settings.num_answers]
    held_out = sorted(data.held_out, key=lambda piece: piece.digest)[:ANSWERS_HELD_OUT]
    wanted = answered([*chosen, *held_out], asking, settings.work, report=report)
    units = {piece.unit for piece in held_out}
    return Split(
        [piece for piece in wanted if piece.unit not in units],
        [piece for piece in wanted if piece.unit in units],
    )


def vocabulary_of(
    settings: DraftTraining,
    kind: type[Student],
    teacher: Teacher,
    tokenizer: Tokenizer,
    data: Split,
) -> Tensor | None:
    num_target = teacher.target.vocab_size
    if not kind.has_draft_vocabulary:
        if settings.draft_vocab is not None:
            raise ConfigError(
                f"draft_vocab={settings.draft_vocab}: kind {settings.kind!r} speaks the target's "
                "whole vocabulary; leave it out"
            )
        return None
    ids_D = draft_vocabulary(
        data.training,
        size=settings.vocabulary_size(num_target),
        num_target=num_target,
        always=_always(teacher, tokenizer),
    )
    return None if ids_D is None else ids_D.to(teacher.spec.device)


def _always(teacher: Teacher, tokenizer: Tokenizer) -> Iterable[int]:
    """Tokens that must be there: special ones, those of the template, whatever ends an answer."""
    folder = teacher.target.folder
    ends = eos_token_ids(folder) if folder is not None else ()
    own = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
    added: dict[str, int] = getattr(tokenizer.backend, "get_added_vocab", dict)()
    marks = added.values() if len(added) <= MOST_MARKS else ()
    return {*tokenizer.special_ids, *marks, *ends, *own}


def device_of(settings: DraftTraining) -> str:
    if settings.device != "auto":
        return settings.device
    return "cuda" if torch.cuda.is_available() else "cpu"
