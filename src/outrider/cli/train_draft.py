"""`outrider train draft`: a draft head or a small draft model for a target, in one command."""

from pathlib import Path
from typing import Annotated

import typer

from outrider.cli import options
from outrider.errors import ConfigError
from outrider.train.heads.kinds import KINDS
from outrider.train.heads.losses import LOSSES
from outrider.train.heads.session import train_draft
from outrider.train.heads.settings import DraftTraining


def draft(
    kind: Annotated[str, typer.Option(help=f"What to train: {', '.join(KINDS)}.")],
    target: Annotated[str, typer.Option(help='Hub id, folder, or "demo"; it stays as it is.')],
    data: Annotated[
        list[Path],
        typer.Option(
            help="Text, or rows of .jsonl (messages, prompt and response, text); repeatable."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the draft and its card.")],
    held_out: Annotated[
        list[Path] | None,
        typer.Option(help="Files to evaluate on, instead of a part of the data; repeatable."),
    ] = None,
    on_policy: Annotated[
        bool, typer.Option("--on-policy", help="Learn from answers that the target writes itself.")
    ] = False,
    temperature: Annotated[float, typer.Option(help="Of those answers; 0 is greedy.")] = 1.0,
    answers: Annotated[int, typer.Option(help="How many are written.")] = 512,
    answer_tokens: Annotated[int, typer.Option(help="Most tokens of one.")] = 256,
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = 1000,
    depths: Annotated[
        int | None,
        typer.Option(help="Drafted tokens that are trained: heads of medusa, steps of eagle3, kv."),
    ] = None,
    layers: Annotated[int | None, typer.Option(help="Layers (blocks) of the draft.")] = None,
    draft_vocab: Annotated[
        int | None,
        typer.Option(help="Tokens it can say; all of up to 32,768, else 32,000, by default."),
    ] = None,
    feature_layers: Annotated[
        str | None,
        typer.Option(help='States that eagle3 reads, as "2,14,25": 0 is the embedding.'),
    ] = None,
    loss: Annotated[str, typer.Option(help=f"{', '.join(LOSSES)}.")] = "kl",
    layout: Annotated[
        str | None, typer.Option(help="How it is written: speculators or eagle (of eagle3).")
    ] = None,
    window: Annotated[int, typer.Option(help="Longest piece of text, in tokens.")] = 512,
    tokens_per_step: Annotated[int, typer.Option(help="Tokens packed into one step.")] = 2048,
    rate: Annotated[
        float | None, typer.Option(help="Peak learning rate; by default by the target's width.")
    ] = None,
    promote: Annotated[
        Path | None,
        typer.Option(help="Folder of the draft in use; replaced if the new one is surely better."),
    ] = None,
    concurrency: Annotated[
        int, typer.Option(help="Requests at a time that the speed-up is projected for.")
    ] = 1,
    served_prompts: Annotated[
        int,
        typer.Option(help="Held-out prompts that the engine answers with it at the end; 0: none."),
    ] = 24,
    patience: Annotated[
        int, typer.Option(help="Evaluations without progress that end training; 0 for none.")
    ] = 5,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint in OUT/work.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of initial weights and order of the data.")] = 0,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
) -> None:
    """Train a draft for a frozen target: evaluated on held-out text, written, read back."""
    settings = DraftTraining(
        kind=kind,
        target=target,
        data=tuple(data),
        out=out,
        held_out=tuple(held_out or ()),
        on_policy=on_policy,
        temperature=temperature,
        num_answers=answers,
        answer_tokens=answer_tokens,
        steps=steps,
        depths=depths,
        num_layers=layers,
        draft_vocab=draft_vocab,
        feature_layers=_layers(feature_layers),
        loss=loss,
        layout=layout,
        window=window,
        tokens_per_step=tokens_per_step,
        rate=rate,
        promote=promote,
        concurrency=concurrency,
        served_prompts=served_prompts,
        patience=patience,
        resume=resume,
        seed=seed,
        device=device,
        dtype=dtype,
    )
    train_draft(settings, report=lambda line: typer.echo(line, err=True))


def _layers(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(
            f"--feature-layers {text!r}: give numbers of layers, as 2,14,25"
        ) from None
