"""`outrider demo`: the main job on the shipped pair, seen live, then measured."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from outrider.bench.arms import Arm, Comparison, compare, num_calls
from outrider.cli import options
from outrider.engine.llm import LLM
from outrider.engine.prompts import Prompt
from outrider.request import SamplingParams, SpeculationParams
from outrider.stream.events import Committed

DRAFTED, OWN = "green", "bold yellow"
SHOWN = 'def read_lines(path, encoding=\'utf-8\'):\n    """Return the lines of a file."""\n'
PROMPTS: tuple[Prompt, ...] = (
    SHOWN,
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n",
    "import os\nimport sys\n\ndef main(argv=None):\n",
    [{"role": "user", "content": "I would like to order a large coffee, please."}],
    [{"role": "user", "content": "Tom has 12 apples and buys 7 more. How many does he have now?"}],
    "Abstract\n========\n\nThis PEP proposes a new syntax for\n",
    "# git commit\n\n> Commit files to the repository.\n",
    "The old man looked out of the window and",
)


def demo(
    max_tokens: Annotated[int, typer.Option(help="Tokens per answer.")] = 96,
    num_draft_tokens: Annotated[int, typer.Option(help="K of the draft model.")] = 3,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="For temperatures above 0.")] = 0,
    kernels: options.Kernels = "auto",
    quantization: options.Quantization = None,
    draft_quantization: options.DraftQuantization = None,
    as_json: Annotated[
        Path | None, typer.Option("--json", help="Also write the figures to this file.")
    ] = None,
) -> None:
    """Watch the demo pair speculate, then compare it with plain decoding on this machine."""
    console = Console()
    llm = LLM(
        "demo", kernels=kernels, quantization=quantization, draft_quantization=draft_quantization
    )
    sampling = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed)
    model = SpeculationParams(method="draft_model", num_draft_tokens=num_draft_tokens)
    show(console, llm, SHOWN, sampling, model)
    arms = [
        Arm(f"draft model, K={num_draft_tokens}", model),
        Arm("n-gram, K=5", SpeculationParams(method="ngram", num_draft_tokens=5)),
    ]
    comparisons = measure(llm, arms, sampling)
    console.print(table(comparisons))
    console.print(
        "speed-up: geometric mean over prompts, with its 95 % bootstrap interval; plain and "
        "speculative runs alternate (A B B A). acceptance: tokens per drafted step, the target's "
        "own included. same: prompts whose tokens equal plain decoding in every run.",
        style="dim",
    )
    if as_json is not None:
        as_json.write_text(json.dumps([to_json(c) for c in comparisons], indent=2) + "\n")


def show(
    console: Console,
    llm: LLM,
    prompt: Prompt,
    sampling: SamplingParams,
    speculation: SpeculationParams,
) -> None:
    """Prints an answer as it comes, each token in the colour of whoever wrote it."""
    legend = Text.assemble(
        ("drafted and accepted", DRAFTED), "  ", ("the target's own", OWN), "  prompt in plain\n"
    )
    console.print(legend)
    console.print(Text(str(prompt)), end="")
    for event in llm.stream([prompt], sampling, speculation):
        if isinstance(event, Committed):
            console.print(_coloured(llm, event), end="", soft_wrap=True)
            if event.metrics is not None:
                metrics = event.metrics
    console.print(
        f"\n\n{metrics.num_generated_tokens} tokens in {metrics.num_steps} target passes: "
        f"{metrics.num_accepted_tokens} of {metrics.num_draft_tokens} drafted tokens accepted, "
        f"acceptance length {metrics.acceptance_length:.2f}\n",
        style="dim",
    )


def measure(llm: LLM, arms: list[Arm], sampling: SamplingParams) -> list[Comparison]:
    """Every arm against plain decoding, with a progress bar where somebody watches."""
    plain = Arm("plain", SpeculationParams(method="off"))
    err = Console(stderr=True)
    with Progress(console=err, transient=True, disable=not err.is_terminal) as progress:
        task = progress.add_task("measuring", total=len(arms) * num_calls(len(PROMPTS)))
        return [
            compare(llm, PROMPTS, plain, arm, sampling, tick=lambda: progress.advance(task))
            for arm in arms
        ]


def table(comparisons: list[Comparison]) -> Table:
    found = Table(title="speculation against plain decoding", box=SIMPLE)
    found.add_column("", no_wrap=True)
    for name in ("tokens/s", "speed-up", "interval", "acceptance", "same"):
        found.add_column(name, justify="right", no_wrap=True)
    found.add_row("plain decoding", f"{comparisons[0].tokens_per_second[0]:.0f}")
    for c in comparisons:
        found.add_row(
            c.arm.name,
            f"{c.tokens_per_second[1]:.0f}",
            f"{c.speedup.ratio:.2f}x",
            f"{c.speedup.low:.2f} to {c.speedup.high:.2f}",
            f"{c.acceptance_length:.2f}",
            f"{c.num_identical}/{c.speedup.num_prompts}",
        )
    return found


def to_json(comparison: Comparison) -> dict[str, Any]:
    return {
        "base": comparison.base.name,
        "arm": comparison.arm.name,
        "speculation": dataclasses.asdict(comparison.arm.speculation),
        **dataclasses.asdict(comparison.speedup),
        "verdict": comparison.speedup.verdict,
        "tokens_per_second": comparison.tokens_per_second,
        "acceptance_length": comparison.acceptance_length,
        "num_identical": comparison.num_identical,
    }


def _coloured(llm: LLM, event: Committed) -> Text:
    """The event's text, cut where drafted tokens end and the target's own begin."""
    assert llm.tokenizer is not None
    drafted = llm.tokenizer.decode(list(event.token_ids[: event.num_from_draft]))
    if not event.text.startswith(drafted):
        return Text(event.text, style=OWN)  # a character that spans both
    return Text.assemble((drafted, DRAFTED), (event.text[len(drafted) :], OWN))
