"""`outrider train`: the demo pair from its recipe, and a checkpoint grown to a larger shape."""

from pathlib import Path
from typing import Annotated

import torch
import typer

from outrider.cli.train_draft import draft
from outrider.errors import ConfigError
from outrider.models.hub import SHIPPED, resolve
from outrider.train.demo import NUM_DRAFT_STEPS, NUM_TARGET_STEPS, train_demo
from outrider.train.grow import grow as grow_checkpoint
from outrider.train.grow_heads import grow_head

app = typer.Typer(no_args_is_help=True, help="Train the demo pair, a draft, or grow a model.")
app.command("draft")(draft)


@app.command("demo")
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the two models.")] = Path("demo-pair"),
    corpus: Annotated[
        Path | None,
        typer.Option(help="Folder with further texts; without it the standard library is read."),
    ] = None,
    target_steps: Annotated[int, typer.Option(help="Steps of the target.")] = NUM_TARGET_STEPS,
    draft_steps: Annotated[int, typer.Option(help="Steps of the drafter.")] = NUM_DRAFT_STEPS,
    seed: Annotated[int, typer.Option(help="Of initial weights and order of the data.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda ...")] = "cpu",
    compiled: Annotated[
        bool, typer.Option("--compiled", help="Let torch.compile fuse the steps.")
    ] = False,
    resume: Annotated[
        bool, typer.Option(help="Go on from the last checkpoint in OUT/work.")
    ] = True,
) -> None:
    """Train target and drafter of the demo from scratch (about an hour on two cores)."""
    train_demo(
        out,
        corpus=corpus,
        num_target_steps=target_steps,
        num_draft_steps=draft_steps,
        seed=seed,
        device=device,
        compiled=compiled,
        resume=resume,
    )


@app.command("grow")
def grow(
    source: Annotated[str, typer.Argument(help='Checkpoint to grow: folder, hub id or "demo".')],
    out: Annotated[Path, typer.Argument(help="Folder for the grown checkpoint.")],
    size: Annotated[str | None, typer.Option(help='Preset shape, "135m" or "1b".')] = None,
    hidden_size: Annotated[int | None, typer.Option(help="Width of the residual stream.")] = None,
    num_layers: Annotated[int | None, typer.Option(help="Layers.")] = None,
    intermediate_size: Annotated[int | None, typer.Option(help="Width of the MLP.")] = None,
    num_heads: Annotated[int | None, typer.Option(help="Query heads.")] = None,
    num_kv_heads: Annotated[int | None, typer.Option(help="Key/value heads.")] = None,
    head: Annotated[
        list[str] | None,
        typer.Option(
            help="Draft head of SOURCE to grow along, into OUT/heads: folder, hub id or "
            '"demo-eagle3" and its like; repeatable.'
        ),
    ] = None,
    noise: Annotated[
        float, typer.Option(help="0 keeps the function; 0.1 blurs it a little.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the new weights.")] = 0,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
) -> None:
    """Grow a Llama checkpoint in width and depth: same function, real cost."""
    torch.manual_seed(seed)
    folder, heads = resolve(source), _named(head or [])
    grow_checkpoint(
        folder,
        out,
        size=size,
        hidden_size=hidden_size,
        num_layers=num_layers,
        intermediate_size=intermediate_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        noise=noise,
        seed=seed,
        dtype=dtype,
    )
    typer.echo(f"wrote {out}", err=True)
    for name, head_folder in heads.items():
        place = out / "heads" / name
        grow_head(
            head_folder, place, source_target=folder, grown_target=out, seed=seed, dtype=dtype
        )
        typer.echo(f"wrote {place}", err=True)


def _named(heads: list[str]) -> dict[str, Path]:
    """Folders of heads by the name that each grown one gets. ConfigError if two get the same."""
    folders: dict[str, Path] = {}
    for head in heads:
        folder = resolve(head)
        name = folder.name if head in SHIPPED else Path(head).expanduser().resolve().name
        if name in folders:
            raise ConfigError(
                f"--head {head!r}: two heads would be written to heads/{name}; grow one of them "
                "into another folder"
            )
        folders[name] = folder
    return folders
