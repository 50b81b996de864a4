"""`outrider demo`: the main job on the shipped pair, seen live, then measured."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from outrider.bench.ab import Measured, Plan, Progressed, measure
from outrider.bench.inprocess import InProcess
from outrider.bench.pairs import Pair, arms, pairs
from outrider.bench.target import Arm, Question
from outrider.cli import options
from outrider.engine.llm import LLM
from outrider.engine.prompts import Prompt
from outrider.request import SamplingParams, SpeculationParams
from outrider.stream.events import Committed

DRAFTED, OWN = "green", "bold yellow"
PLAIN = "plain"
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
    ngram = SpeculationParams(method="ngram", num_draft_tokens=5)
    measured = compare(
        llm, {f"draft model, K={num_draft_tokens}": model, "n-gram, K=5": ngram}, sampling
    )
    console.print(table(measured))
    console.print(
        "speed-up: of the time per token after the first, geometric mean over prompts, with its "
        "95 % interval; runs alternate (A B B A), plain decoding also against itself. acceptance: "
        "tokens per drafted step, the target's own included. same: prompts whose tokens equal "
        "plain decoding in every run. `outrider bench ab` measures longer, and on your prompts.",
        style="dim",
    )
    if as_json is not None:
        as_json.write_text(json.dumps(to_json(measured), indent=2) + "\n")


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


def compare(llm: LLM, asked: Mapping[str, SpeculationParams], sampling: SamplingParams) -> Measured:
    """Every arm and plain decoding on each prompt, with a progress bar where somebody watches."""
    plain = Arm(name=PLAIN, speculation=SpeculationParams(method="off"))
    plan = Plan(
        arms=(plain, *(Arm(name=name, speculation=each) for name, each in asked.items())),
        questions=tuple(Question(id=str(i), prompt=prompt) for i, prompt in enumerate(PROMPTS)),
        sampling=sampling,
        num_rounds=1,
        seed=sampling.seed or 0,
    )
    err = Console(stderr=True)
    with Progress(console=err, transient=True, disable=not err.is_terminal) as progress:
        task = progress.add_task("measuring", total=len(PROMPTS))

        def tick(at: Progressed) -> None:
            progress.update(task, completed=at.num_blocks)

        return measure(InProcess(llm), plan, tick=tick)


def table(measured: Measured) -> Table:
    found = Table(title="speculation against plain decoding", box=SIMPLE)
    found.add_column("", no_wrap=True)
    for name in ("tokens/s", "speed-up", "interval", "acceptance", "same"):
        found.add_column(name, justify="right", no_wrap=True)
    plain, *others = arms(measured)
    found.add_row("plain decoding", f"{plain['tokens_per_second']:.0f}")
    for arm, pair in zip(others, _against_plain(measured), strict=True):
        found.add_row(
            pair.arm.name,
            f"{arm['tokens_per_second']:.0f}",
            f"{pair.ratio.ratio:.2f}x",
            pair.interval_told,
            f"{_acceptance_length(arm):.2f}",
            f"{pair.num_identical}/{pair.num_prompts}",
        )
    return found


def to_json(measured: Measured) -> list[dict[str, Any]]:
    plain, *others = arms(measured)
    return [
        {
            "base": pair.base.name,
            "arm": pair.arm.name,
            "speculation": _given(pair.arm),
            "ratio": pair.ratio.ratio,
            "low": pair.ratio.interval[0] if pair.ratio.interval else None,
            "high": pair.ratio.interval[1] if pair.ratio.interval else None,
            "null_interval": pair.null.interval,
            "num_prompts": pair.num_prompts,
            "verdict": pair.verdict,
            "tokens_per_second": [plain["tokens_per_second"], arm["tokens_per_second"]],
            "acceptance_length": _acceptance_length(arm),
            "num_identical": pair.num_identical,
        }
        for arm, pair in zip(others, _against_plain(measured), strict=True)
    ]


def _against_plain(measured: Measured) -> list[Pair]:
    return [pair for pair in pairs(measured) if pair.base.name == PLAIN]


def _acceptance_length(arm: Mapping[str, Any]) -> float:
    return float(arm["acceptance"]["acceptance_length"]) if "acceptance" in arm else 1.0


def _given(arm: Arm) -> dict[str, Any]:
    assert arm.speculation is not None
    return dataclasses.asdict(arm.speculation)


def _coloured(llm: LLM, event: Committed) -> Text:
    """The event's text, cut where drafted tokens end and the target's own begin."""
    assert llm.tokenizer is not None
    drafted = llm.tokenizer.decode(list(event.token_ids[: event.num_from_draft]))
    if not event.text.startswith(drafted):
        return Text(event.text, style=OWN)  # a character that spans both
    return Text.assemble((drafted, DRAFTED), (event.text[len(drafted) :], OWN))
