"""The target's own text, which drafts are judged on: written by the engine, loops cut off."""

from collections.abc import Callable, Sequence as Items
from typing import NamedTuple

from outrider.engine.llm import LLM
from outrider.engine.prompts import Prompt, encode
from outrider.errors import ConfigError
from outrider.request import OFF, SamplingParams

MIN_PROMPTS = 16  # fewer are told of: intervals are over prompts
LEAST_TOKENS = 8  # of an answer, asked for
LONGEST_PROMPT = 1024  # tokens; longer ones are left out
LEAST_WRITTEN = 2  # tokens of an answer; of fewer nothing could have been drafted
ROUNDS, LEAST_LOOP = 3, 12  # repetitions, and tokens of them, that make a loop


class Text(NamedTuple):
    """A prompt and what the target wrote behind it.

    Attributes:
        prompt: number of the prompt; texts of one prompt are resampled together.
        is_sampled: at temperature 1; else greedy.
        num_looped: tokens cut off because they only said again what went before.
    """

    prompt: int
    tokens: tuple[int, ...]
    num_prompt: int
    is_sampled: bool
    num_looped: int = 0

    @property
    def num_written(self) -> int:
        return len(self.tokens) - self.num_prompt


class Written(NamedTuple):
    """All texts, and what is to be said about how they came about."""

    texts: tuple[Text, ...]
    notes: tuple[str, ...] = ()

    @property
    def num_positions(self) -> int:
        return sum(text.num_written for text in self.texts)


def write_texts(
    llm: LLM,
    prompts: Items[Prompt],
    *,
    num_positions: int = 2000,
    max_positions: int | None = None,
    seed: int = 0,
    tick: Callable[[int], None] = lambda done: None,
) -> Written:
    """Two answers to every prompt, one greedy and one sampled at temperature 1, without drafts.

    Args:
        num_positions: tokens to be written, all together.
        max_positions: longest text that the draft can read, if that is less than the target's.

    Raises:
        ConfigError: there is no prompt, or none that fits.
    """
    if not prompts:
        raise ConfigError("no prompts: give --prompts a file with some")
    longest = min(llm.engine.max_model_len, max_positions or llm.engine.max_model_len)
    each = max(LEAST_TOKENS, -(-num_positions // (2 * len(prompts))))
    room = min(longest - each, LONGEST_PROMPT)
    encoded = [list(encode(prompt, llm.tokenizer)) for prompt in prompts]
    kept = {number: ids for number, ids in enumerate(encoded) if 0 < len(ids) <= room}
    if not kept:
        raise ConfigError(
            f"none of the {len(prompts)} prompts fits: with {each} tokens of answer they may have "
            f"{max(room, 0)}; give shorter prompts, or ask for fewer positions"
        )
    asked = [(number, is_sampled) for number in kept for is_sampled in (False, True)]
    texts = []
    for start in range(0, len(asked), llm.engine.config.max_num_seqs):
        part = asked[start : start + llm.engine.config.max_num_seqs]
        texts += _written(llm, kept, part, each, seed)
        tick(start + len(part))
    long_enough = tuple(text for text in texts if text.num_written >= LEAST_WRITTEN)
    if not long_enough:
        raise ConfigError(
            "the target ends every answer at once, or only repeats itself: give other prompts"
        )
    return Written(long_enough, tuple(_notes(texts, len(prompts) - len(kept))))


def num_before_loop(tokens: Items[int]) -> int:
    """Tokens before a text only repeats itself; what is repeated counts once."""
    for period in range(1, len(tokens) // ROUNDS + 1):
        run = 0
        while run + period < len(tokens) and tokens[-1 - run] == tokens[-1 - run - period]:
            run += 1
        if run + period >= max(ROUNDS * period, LEAST_LOOP):
            return len(tokens) - run
    return len(tokens)


def _written(
    llm: LLM,
    kept: dict[int, list[int]],
    asked: Items[tuple[int, bool]],
    num_tokens: int,
    seed: int,
) -> list[Text]:
    sampling = [
        SamplingParams(
            max_tokens=num_tokens, temperature=float(is_sampled), seed=seed * 100_003 + number
        )
        for number, is_sampled in asked
    ]
    outputs = llm.generate([kept[number] for number, _ in asked], sampling, OFF)
    return [
        _text(llm, number, kept[number], output.token_ids, is_sampled)
        for (number, is_sampled), output in zip(asked, outputs, strict=True)
        if not output.error
    ]


def _text(llm: LLM, number: int, prompt: list[int], answer: list[int], is_sampled: bool) -> Text:
    """Without the token that ended it: nothing follows that."""
    if answer and answer[-1] in llm.engine.spec.eos_token_ids:
        answer = answer[:-1]
    num_kept = num_before_loop(answer)
    tokens = (*prompt, *answer[:num_kept])
    return Text(number, tokens, len(prompt), is_sampled, len(answer) - num_kept)


def _notes(texts: list[Text], num_left_out: int) -> list[str]:
    notes = []
    num_prompts = len({text.prompt for text in texts})
    if num_left_out:
        notes.append(f"{num_left_out} prompts were left out: they are empty or too long")
    if num_prompts < MIN_PROMPTS:
        notes.append(
            f"only {num_prompts} prompts: give {MIN_PROMPTS} or more, or intervals are guesses"
        )
    for is_sampled, kind in ((False, "greedy"), (True, "sampled")):
        mine = [text for text in texts if text.is_sampled == is_sampled]
        looping = [text for text in mine if text.num_looped]
        if looping:
            cut = sum(text.num_looped for text in looping)
            notes.append(
                f"{len(looping)} of {len(mine)} {kind} texts end in a loop: "
                f"{cut} tokens of it are left out"
            )
    return notes
