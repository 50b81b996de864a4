"""The recipe of the demo pair: a small target, then a drafter distilled from it."""

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from outrider.train.card import Training, write_card
from outrider.train.corpus import Corpus, read_corpus
from outrider.train.evaluate import EvaluationConfig, evaluate_pair
from outrider.train.export import export, load_decoder
from outrider.train.losses import CrossEntropy, Distillation
from outrider.train.network import Decoder, DecoderShape
from outrider.train.packing import PackedBatches, pack
from outrider.train.trainer import Objective, Trainer, TrainerConfig
from outrider.train.vocabulary import VOCAB_SIZE, train_tokenizer

logger = logging.getLogger(__name__)

TARGET = DecoderShape(
    vocab_size=VOCAB_SIZE,
    hidden_size=384,
    intermediate_size=1024,
    num_layers=7,
    num_heads=6,
    num_kv_heads=2,
    head_dim=64,
)
DRAFT = DecoderShape(
    vocab_size=VOCAB_SIZE,
    hidden_size=160,
    intermediate_size=432,
    num_layers=2,
    num_heads=5,
    num_kv_heads=1,
    head_dim=32,
)
SHARES = {"code": 0.33, "docs": 0.24, "books": 0.18, "math": 0.17, "dialogue": 0.08}
WINDOW = 513
BATCH_SIZE = 16
NUM_TARGET_STEPS = 1120
NUM_DRAFT_STEPS = 700


def train_demo(
    out: Path,
    *,
    corpus: Path | None = None,
    work: Path | None = None,
    num_target_steps: int = NUM_TARGET_STEPS,
    num_draft_steps: int = NUM_DRAFT_STEPS,
    batch_size: int = BATCH_SIZE,
    evaluation: EvaluationConfig | None = None,
    seed: int = 0,
    device: str = "cpu",
    compiled: bool = False,
    resume: bool = True,
) -> None:
    """Train both models, evaluate them, and write `out/target` and `out/draft` with their cards.

    Args:
        corpus: folder with the optional sources; without it only the standard library is read.
        work: folder of the checkpoints, `out/work` unless given; a later call resumes from it.
        compiled: let torch.compile fuse the step; faster after a minute, needs a C++ compiler.

    Raises:
        ValueError: a folder without known sources, a step count below one, or checkpoints in
            `work` of other settings or of more steps.
    """
    recipe = _Recipe(
        out=out,
        work=out / "work" if work is None else work,
        batch_size=batch_size,
        seed=seed,
        device=device,
        compiled=compiled,
        resume=resume,
    )
    text = read_corpus(corpus)
    tokenizer = _tokenizer(text, recipe)
    streams = {domain.name: pack(tokenizer, domain.training) for domain in text.domains}
    target, target_training = _train(
        recipe, "target", TARGET, CrossEntropy(), tokenizer, streams, num_target_steps
    )
    imitation = Distillation(target)
    _, draft_training = _train(
        recipe, "draft", DRAFT, imitation, tokenizer, streams, num_draft_steps
    )
    trainings = {"target": target_training, "draft": draft_training}
    _evaluate(recipe, tokenizer, text, trainings, evaluation or EvaluationConfig())


@dataclass(frozen=True, kw_only=True)
class _Recipe:
    out: Path
    work: Path
    batch_size: int
    seed: int
    device: str
    compiled: bool
    resume: bool


def _tokenizer(text: Corpus, recipe: _Recipe) -> Tokenizer:
    path = recipe.work / "tokenizer.json"
    if recipe.resume and path.is_file():
        return Tokenizer.from_file(str(path))
    texts = (document.text for domain in text.domains for document in domain.training)
    tokenizer = train_tokenizer(texts)
    recipe.work.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path))
    return tokenizer


def _train(
    recipe: _Recipe,
    role: str,
    shape: DecoderShape,
    objective: Objective,
    tokenizer: Tokenizer,
    streams: dict[str, Tensor],
    num_steps: int,
) -> tuple[Decoder, Training]:
    """Train one model to its last step and write its folder."""
    # The drafter starts from other weights and sees the text in another order.
    seed = recipe.seed + (role == "draft")
    config = TrainerConfig(num_steps=num_steps, compiled=recipe.compiled)
    model = Decoder(shape)
    model.reset_parameters(torch.Generator().manual_seed(seed))
    trainer = Trainer(
        model,
        objective,
        PackedBatches(streams, SHARES, batch_size=recipe.batch_size, window=WINDOW, seed=seed),
        config,
        device=recipe.device,
        checkpoint=recipe.work / f"{role}.pt",
    )
    if recipe.resume and trainer.resume():
        logger.info("%s resumes from its checkpoint", role)
    curve = trainer.run()
    export(model, tokenizer, recipe.out / role)
    training = Training(
        shape=shape,
        num_parameters=sum(weight.numel() for weight in model.parameters()),
        config=config,
        batch_size=recipe.batch_size,
        window=WINDOW,
        seed=seed,
        device=recipe.device,
        tokens_by_domain={name: len(stream) for name, stream in streams.items()},
        shares=SHARES,
        curve=curve,
    )
    return model, training


def _evaluate(
    recipe: _Recipe,
    tokenizer: Tokenizer,
    text: Corpus,
    trainings: dict[str, Training],
    evaluation: EvaluationConfig,
) -> None:
    """Evaluate the weights as written, in bf16, and write both cards."""
    target, draft = (load_decoder(recipe.out / role) for role in trainings)
    results = evaluate_pair(target, draft, tokenizer, text, evaluation)
    for role, training in trainings.items():
        write_card(
            recipe.out / role,
            role=role,
            training=training,
            sources=text.sources,
            results=results,
            evaluation=evaluation,
        )
