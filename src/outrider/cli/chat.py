"""`outrider chat`: a conversation in the terminal; earlier turns stay in the prefix cache."""

from collections.abc import Iterator

import typer

from outrider.cli import options
from outrider.control.policies import DEFAULT
from outrider.engine.llm import LLM
from outrider.errors import RequestError
from outrider.request import SamplingParams
from outrider.stream.events import Committed, RequestMetrics

HELP = "/reset forgets the conversation, /exit leaves (so does the end of input)"


def chat(
    model: options.Model,
    draft_model: options.DraftModel = None,
    speculation: options.SpeculationJSON = None,
    policy: options.Policy = DEFAULT,
    system: str = typer.Option("", help="System message."),
    max_tokens: options.MaxTokens = 256,
    temperature: options.Temperature = 0.7,
    top_p: options.TopP = 0.95,
    seed: options.Seed = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    kernels: options.Kernels = "auto",
    quantization: options.Quantization = None,
    draft_quantization: options.DraftQuantization = None,
    datastore: options.Datastore = None,
    drafter_settings: options.DrafterSettings = None,
    max_model_len: options.MaxModelLen = None,
    kv_cache_memory_bytes: options.KVCacheMemoryBytes = None,
) -> None:
    """Talk with a model, turn by turn."""
    sampling = SamplingParams(
        max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed
    )
    llm = options.load(
        model,
        draft_model,
        options.read_speculation(speculation),
        dtype,
        device,
        kernels,
        quantization,
        draft_quantization,
        datastore,
        drafter_settings,
        policy,
        max_model_len=max_model_len,
        kv_cache_memory_bytes=kv_cache_memory_bytes,
    )
    start = [{"role": "system", "content": system}] if system else []
    messages = list(start)
    typer.echo(HELP, err=True)
    for line in _lines():
        if line == "/exit":
            return
        if line == "/reset":
            messages = list(start)
            continue
        turn = [*messages, {"role": "user", "content": line}]
        try:
            answer = _answer(llm, turn, sampling)
        except RequestError as error:
            if not _is_terminal():
                raise
            typer.echo(f"error: {error} (/reset starts over)", err=True)
            continue
        messages = [*turn, {"role": "assistant", "content": answer}]


def _answer(llm: LLM, messages: list[dict[str, str]], sampling: SamplingParams) -> str:
    """Prints the next turn as it comes, then its figures. RequestError where it breaks off."""
    answer = ""
    for event in llm.stream([messages], sampling):
        if isinstance(event, Committed):
            typer.echo(event.text, nl=False)
            answer += event.text
            if event.metrics is not None:
                typer.echo("")
                typer.echo(_summary(event.metrics), err=True)
            if event.error:
                raise RequestError(event.error)
    return answer


def _summary(metrics: RequestMetrics) -> str:
    return (
        f"[{metrics.num_generated_tokens} tokens, acceptance length "
        f"{metrics.acceptance_length:.2f}, {metrics.num_cached_tokens} of "
        f"{metrics.num_prompt_tokens} prompt tokens from the cache]"
    )


def _lines() -> Iterator[str]:
    """Lines the user types; a prompt sign only where somebody sees it."""
    stdin = typer.get_text_stream("stdin")
    while True:
        if _is_terminal():
            typer.echo("> ", nl=False, err=True)
        line = stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()


def _is_terminal() -> bool:
    return typer.get_text_stream("stdin").isatty()
