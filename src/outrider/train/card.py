"""The model card: what a trained model is, what it learned from, and how well it does."""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from outrider.train.corpus import Source
from outrider.train.evaluate import TEMPERATURES, DomainResult, EvaluationConfig
from outrider.train.network import DecoderShape
from outrider.train.trainer import LossPoint, TrainerConfig

_HOW_MEASURED = """\
Loss: every token of at most {max_windows} windows of {window} tokens per domain, taken at even
distances from documents that were never trained on (the hundredth part of each domain whose
names hash lowest, at least four documents). Bits per byte divide the same sum by the bytes of
the text; special tokens cost nats but count no bytes. Weights as stored, in bfloat16; arithmetic
in float32.

Acceptance length: tokens committed per speculative step, the target's own token included, with
K = {num_draft_tokens} drafts per step. The first {prompt_length} tokens of up to {num_prompts}
held-out pieces per domain are the prompts; the target continues each by {num_generated} tokens, on
past end tokens. On that text the number of steps is computed, not timed: a drafted token stands
with probability min(1, q/p) of the token the target produced, which is the acceptance law of
rejection sampling given the outcome, and at temperature 0 is one where both models' best tokens
agree. A step ends at the first rejection. No engine took part; a running engine may cut drafts at
block or length limits. `repeat last` drafts the last token K times; `n-gram 3..1` drafts what
followed the latest earlier occurrence of the last 3, 2 or 1 tokens. The last step of a
continuation is cut off at its end, which lowers all lengths a little."""

_USES = """\
For demonstrations, tests and benchmarks of speculative decoding: the pair is small enough to run
anywhere, and speaks like its data often enough that drafts are sometimes right and sometimes
wrong. It is no assistant. It states falsehoods, computes wrongly, repeats its training text,
coffee orders above all, and knows English and Python only. Windows of {window} tokens were
trained on: text past that position is worse, up to the limit of {max_positions}."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """What is known about one finished training run; `wall_seconds` counts its steps only."""

    shape: DecoderShape
    num_parameters: int
    config: TrainerConfig
    batch_size: int
    window: int
    seed: int
    device: str
    tokens_by_domain: Mapping[str, int]
    shares: Mapping[str, float]
    curve: Sequence[LossPoint]

    @property
    def num_tokens(self) -> int:
        return self.config.num_steps * self.batch_size * (self.window - 1)

    @property
    def wall_seconds(self) -> float:
        return self.curve[-1].seconds if self.curve else 0.0


def write_card(
    folder: Path,
    *,
    role: str,
    training: Training,
    sources: Sequence[Source],
    results: Sequence[DomainResult],
    evaluation: EvaluationConfig,
) -> None:
    """Write README.md; `role` is "target" or "draft", and decides which loss is shown."""
    sections = [
        _front(role, sources),
        _summary(role, training),
        "## Data\n\n" + _sources_table(sources) + "\n\n" + _domains_table(training),
        "## Recipe\n\n" + _recipe(role, training),
        "## Results on held-out documents\n\n" + _loss_table(role, results),
        _acceptance_table(results),
        "### How these numbers were computed\n\n" + _HOW_MEASURED.format(**vars(evaluation)),
        "## Intended use and limits\n\n"
        + _USES.format(window=training.window - 1, max_positions=training.shape.max_positions),
    ]
    (folder / "README.md").write_text("\n\n".join(sections) + "\n", encoding="utf-8")


def _front(role: str, sources: Sequence[Source]) -> str:
    licences = ", ".join(sorted({source.licence for source in sources}))
    return (
        f"---\nlibrary_name: transformers\npipeline_tag: text-generation\nlanguage: en\n---\n\n"
        f"# Outrider demo {role}\n\nTrained on text under these terms: {licences}."
    )


def _summary(role: str, training: Training) -> str:
    shape, millions = training.shape, training.num_parameters / 1e6
    partner = (
        "It is the model whose output is promised; `draft` guesses ahead of it."
        if role == "target"
        else "It guesses ahead of `target`, from which it was distilled."
    )
    return (
        f"A Llama decoder of {millions:.2f}M parameters. {partner}\n\n"
        f"| hidden | layers | heads | kv heads | head width | feed-forward "
        f"| vocabulary | positions |\n"
        f"|---|---|---|---|---|---|---|---|\n"
        f"| {shape.hidden_size} | {shape.num_layers} | {shape.num_heads} | {shape.num_kv_heads} "
        f"| {shape.head_dim} | {shape.intermediate_size} | {shape.vocab_size} "
        f"| {shape.max_positions} |"
    )


def _sources_table(sources: Sequence[Source]) -> str:
    rows = [(s.name, s.domain, s.licence, s.attribution) for s in sources]
    return _table(("source", "domain", "licence", "attribution"), rows)


def _domains_table(training: Training) -> str:
    total = sum(training.shares[name] for name in training.tokens_by_domain)
    rows = []
    for name, num_tokens in training.tokens_by_domain.items():
        share = training.shares[name] / total
        passes = share * training.num_tokens / num_tokens
        rows.append((name, f"{num_tokens:,}", f"{share:.2f}", f"{passes:.1f}"))
    return _table(("domain", "distinct tokens", "share of batches", "passes"), rows)


def _recipe(role: str, training: Training) -> str:
    config = training.config
    loss = (
        "cross-entropy"
        if role == "target"
        else "0.9 KL(target || draft) + 0.1 cross-entropy, temperature 1, on the same text"
    )
    final = f"{training.curve[-1].loss:.3f}" if training.curve else "unknown"
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "tokenizers"))
    return (
        f"{config.num_steps:,} steps of {training.batch_size} windows of {training.window - 1} "
        f"tokens: {training.num_tokens / 1e6:.1f}M tokens, seed {training.seed}. Loss: {loss}. "
        f"Muon (rate {config.matrix_rate:g}, weight decay {config.weight_decay:g}) for hidden "
        f"matrices, AdamW (rate {config.other_rate:g}) for embedding and norms, warm-up of "
        f"{config.num_warmup_steps} steps, linear decay to zero over the last "
        f"{config.decay_share:.0%}, gradients clipped at norm {config.max_gradient_norm:g}, "
        f"bfloat16 autocast. Documents are packed one after another; attention crosses their "
        f"borders. The last training loss was {final} after {training.wall_seconds / 60:.0f} "
        f"minutes of steps on {training.device} ({packages}, Python {platform.python_version()})."
    )


def _loss_table(role: str, results: Sequence[DomainResult]) -> str:
    rows = []
    for result in results:
        loss = result.target_loss if role == "target" else result.draft_loss
        nats, bits = f"{loss.nats_per_token:.3f}", f"{loss.bits_per_byte:.3f}"
        rows.append((result.domain, nats, bits, f"{loss.num_tokens:,}"))
    return _table(("domain", "nats per token", "bits per byte", "tokens scored"), rows)


def _acceptance_table(results: Sequence[DomainResult]) -> str:
    names = list(dict.fromkeys(name for r in results for name, _ in r.acceptance_length))
    columns = [(name, temperature) for temperature in TEMPERATURES for name in names]
    head = ["acceptance length", "prompts", *(f"{name}, T={t:g}" for name, t in columns)]
    rows = []
    for result in results:
        lengths = (f"{result.acceptance_length[column]:.2f}" for column in columns)
        rows.append((result.domain, str(result.num_prompts), *lengths))
    return _table(head, rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
