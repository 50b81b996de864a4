"""`outrider chat`: a conversation in the terminal; earlier turns stay in the prefix cache."""

from collections.abc import Iterator

import typer

from outrider.cli import options
from outrider.request import SamplingParams, StreamParams
from outrider.stream.events import Committed

HELP = "/reset forgets the conversation, /exit leaves (so does the end of input)"


def chat(
    model: options.Model,
    draft_model: options.DraftModel = None,
    speculation: options.SpeculationJSON = None,
    system: str = typer.Option("", help="System message."),
    max_tokens: options.MaxTokens = 256,
    temperature: options.Temperature = 0.7,
    top_p: options.TopP = 0.95,
    seed: options.Seed = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
) -> None:
    """Talk with a model, turn by turn."""
    sampling = SamplingParams(
        max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed
    )
    llm = options.load(model, draft_model, options.read_speculation(speculation), dtype, device)
    start = [{"role": "system", "content": system}] if system else []
    messages = list(start)
    typer.echo(HELP, err=True)
    for line in _lines():
        if line == "/exit":
            return
        if line == "/reset":
            messages = list(start)
            continue
        messages.append({"role": "user", "content": line})
        answer, summary = [], ""
        for event in llm.stream([messages], sampling, stream=StreamParams()):
            if isinstance(event, Committed):
                typer.echo(event.text, nl=False)
                answer.append(event.text)
                if event.metrics is not None:
                    cached = event.metrics.num_cached_tokens
                    summary = (
                        f"[{event.metrics.num_generated_tokens} tokens, acceptance length "
                        f"{event.metrics.acceptance_length:.2f}, {cached} of "
                        f"{event.metrics.num_prompt_tokens} prompt tokens from the cache]"
                    )
        typer.echo("")
        typer.echo(summary, err=True)
        messages.append({"role": "assistant", "content": "".join(answer)})


def _lines() -> Iterator[str]:
    """Lines the user types; a prompt sign only where somebody sees it."""
    stdin = typer.get_text_stream("stdin")
    while True:
        if stdin.isatty():
            typer.echo("> ", nl=False, err=True)
        line = stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()
