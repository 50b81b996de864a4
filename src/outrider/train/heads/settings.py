"""DraftTraining: what one run of `outrider train draft` is asked for."""

from dataclasses import dataclass
from pathlib import Path

from outrider.errors import ConfigError

SMALL_VOCAB = 32_768
LARGE_DRAFT_VOCAB = 32_000
FASTEST_RATE, SLOWEST_RATE = 1e-3, 1e-4
WIDTH_OF_FASTEST = 512


@dataclass(frozen=True, kw_only=True)
class DraftTraining:
    """One run. None means the kind's own default.

    Attributes:
        kind: name in `kinds.KINDS`.
        target: folder, hub id, or "demo".
        data: text (.txt, .md, .py ...) or rows (.jsonl, .json) to learn from.
        out: folder of the head; `out/work` holds what a resumed run needs.
        held_out: files to evaluate on; without any, a part of `data` is kept back.
        steps: optimiser steps.
        depths: steps of training-time test (eagle3), or heads (medusa).
        num_layers: of the head.
        draft_vocab: tokens the head can say; None is all of up to 32,768, else 32,000.
        loss: name in `losses.LOSSES`.
        layout: how the head is written; see the kind's `layouts`.
        feature_layers: boundaries of the target that are read (0 embedding, L last state).
        window: longest piece of text, in tokens. tokens_per_step: at most, packed.
        rate: peak learning rate; None falls from 1e-3 to 1e-4 with the target's width.
        on_policy: the target writes the answers that are learned from, at `temperature`.
        num_answers, answer_tokens: how many, and how long at most.
        promote: folder of the head in use, replaced if the new one is surely better.
        served_prompts: held-out prompts that the engine answers with the draft at the end; 0 leaves
            that out.
        concurrency: requests at a time that the speed-up is projected for.
        patience: evaluations without progress after which training stops; 0 never stops.
        device: "auto" is a GPU if there is one. dtype: of the target, as `load_network` has it.
    """

    kind: str
    target: str
    data: tuple[Path, ...]
    out: Path
    held_out: tuple[Path, ...] = ()
    steps: int = 1000
    depths: int | None = None
    num_layers: int | None = None
    draft_vocab: int | None = None
    loss: str = "kl"
    layout: str | None = None
    feature_layers: tuple[int, ...] | None = None
    window: int = 512
    tokens_per_step: int = 2048
    rate: float | None = None
    on_policy: bool = False
    temperature: float = 1.0
    num_answers: int = 512
    answer_tokens: int = 256
    promote: Path | None = None
    served_prompts: int = 24
    concurrency: int = 1
    patience: int = 5
    resume: bool = False
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"

    def __post_init__(self) -> None:
        counts = ("steps", "window", "tokens_per_step", "num_answers", "answer_tokens")
        for name in (*counts, "concurrency", "depths", "num_layers", "draft_vocab"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value}: must be at least 1")
        if self.window > self.tokens_per_step:
            raise ConfigError(
                f"window={self.window} is longer than tokens_per_step={self.tokens_per_step}: "
                "lower it, or raise tokens_per_step"
            )
        for name in ("patience", "temperature", "served_prompts"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)}: must not be negative")
        if self.rate is not None and not self.rate > 0.0:
            raise ConfigError(f"rate={self.rate}: must be positive")
        if not self.data:
            raise ConfigError("no data: name at least one file of text or conversations")

    @property
    def work(self) -> Path:
        """Folder of what is kept between runs."""
        return self.out / "work"

    def vocabulary_size(self, num_target: int) -> int:
        """Tokens of the draft vocabulary."""
        if self.draft_vocab is not None:
            return min(self.draft_vocab, num_target)
        return num_target if num_target <= SMALL_VOCAB else LARGE_DRAFT_VOCAB

    def peak_rate(self, hidden_size: int) -> float:
        """The learning rate after warm-up, for a target of this width."""
        if self.rate is not None:
            return self.rate
        usual = FASTEST_RATE * WIDTH_OF_FASTEST / hidden_size
        return min(FASTEST_RATE, max(SLOWEST_RATE, usual))
