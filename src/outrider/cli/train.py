"""`outrider train`: the demo pair from its recipe, and a checkpoint grown to a larger shape."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import typer

from outrider.cli.train_draft import draft
from outrider.errors import ConfigError, OutriderError
from outrider.models.hub import SHIPPED, resolve
from outrider.train.demo import NUM_DRAFT_STEPS, NUM_TARGET_STEPS, train_demo
from outrider.train.folders import check_apart
from outrider.train.grow import grow as grow_checkpoint
from outrider.train.grow_heads import check_head, grow_head
from outrider.train.grow_pair import plan_pair

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
    folder, heads = resolve(source), _found(head or [])
    sizes = {
        "hidden_size": hidden_size,
        "num_layers": num_layers,
        "intermediate_size": intermediate_size,
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
    }
    if heads:
        pair = plan_pair(folder, out, size, sizes)
        for one in heads:  # before the target is written, which may take long
            with _naming(one.given):
                check_apart(out, one.folder, "head")
                check_head(one.folder, one.place(out), pair, dtype)
    grow_checkpoint(folder, out, size=size, **sizes, noise=noise, seed=seed, dtype=dtype)
    typer.echo(f"wrote {out}", err=True)
    for one in heads:
        place = one.place(out)
        with _naming(one.given):
            grow_head(
                one.folder,
                place,
                source_target=folder,
                grown_target=out,
                noise=noise,
                seed=seed,
                dtype=dtype,
            )
        typer.echo(f"wrote {place}", err=True)


class _Found(NamedTuple):
    """A head to grow along: as it was given, and where it is."""

    given: str
    folder: Path

    @property
    def name(self) -> str:
        """That the grown one gets; a head of the hub is named as there."""
        path = self.folder if self.given in SHIPPED else Path(self.given).expanduser().resolve()
        return path.name

    def place(self, out: Path) -> Path:
        """Where the grown one is written."""
        return out / "heads" / self.name


def _found(heads: list[str]) -> list[_Found]:
    """ConfigError if two would get one name."""
    found: dict[str, _Found] = {}
    for head in heads:
        with _naming(head):
            one = _Found(head, resolve(head))
            if one.name in found:
                raise ConfigError(
                    f"two heads would be written to heads/{one.name}; grow one of them into "
                    "another folder"
                )
            found[one.name] = one
    return list(found.values())


@contextmanager
def _naming(head: str) -> Iterator[None]:
    """Says of errors which head they are about."""
    try:
        yield
    except OutriderError as error:
        raise type(error)(f"--head {head!r}: {error}") from error
