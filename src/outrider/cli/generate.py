"""`outrider generate`: one prompt in, text out; figures on stderr, or all as JSON."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from outrider.cli import options
from outrider.control.policies import DEFAULT
from outrider.engine.outputs import Completion, RequestOutput
from outrider.errors import RequestError
from outrider.request import SamplingParams


def generate(
    model: options.Model,
    draft_model: options.DraftModel = None,
    speculation: options.SpeculationJSON = None,
    policy: options.Policy = DEFAULT,
    prompt: Annotated[
        str | None, typer.Option(help='The prompt; "-" reads standard input.')
    ] = None,
    file: Annotated[
        Path | None, typer.Option(help='File that holds the prompt; "-" as above.')
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Wrap the prompt in the chat template.")
    ] = False,
    max_tokens: options.MaxTokens = 128,
    temperature: options.Temperature = 0.0,
    top_k: options.TopK = 0,
    top_p: options.TopP = 1.0,
    min_p: options.MinP = 0.0,
    seed: options.Seed = None,
    n: Annotated[int, typer.Option("--n", help="Completions of the prompt.")] = 1,
    stop: Annotated[
        list[str] | None, typer.Option(help="Text that ends the output (repeatable).")
    ] = None,
    json_schema: Annotated[
        str | None, typer.Option(help="JSON schema that the output must meet.")
    ] = None,
    regex: Annotated[
        str | None, typer.Option(help="Regular expression the output must match.")
    ] = None,
    more: Annotated[
        str | None,
        typer.Option(
            "--sampling",
            help="Sampling parameters without an option of their own, as JSON: "
            "'{\"repetition_penalty\": 1.2}'.",
        ),
    ] = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    kernels: options.Kernels = "auto",
    quantization: options.Quantization = None,
    draft_quantization: options.DraftQuantization = None,
    datastore: options.Datastore = None,
    drafter_settings: options.DrafterSettings = None,
    max_model_len: options.MaxModelLen = None,
    kv_cache_memory_bytes: options.KVCacheMemoryBytes = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Generate from one prompt."""
    params = options.read_speculation(speculation)
    named = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "seed": seed,
        "n": n,
        "stop": options.read_stop(stop),
        "json_schema": json_schema,
        "regex": regex,
    }
    sampling = SamplingParams.from_dict({**named, **options.read_sampling(more, named)})
    if sampling.logprobs is not None and not as_json:
        raise RequestError("logprobs are printed by --json only")
    text = options.read_prompt(prompt, file)
    llm = options.load(
        model,
        draft_model,
        params,
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
    output = llm.generate([[{"role": "user", "content": text}] if chat else text], sampling)[0]
    if as_json:
        typer.echo(json.dumps(to_json(model, output), ensure_ascii=False))
    else:
        for completion in output.completions:
            typer.echo(completion.text)
        typer.echo(_summary(output), err=True)
    errors = [c.error for c in output.completions if c.error]
    if errors:
        typer.echo(f"error: {errors[0]}", err=True)
        raise typer.Exit(1)


def to_json(model: str, output: RequestOutput) -> dict[str, Any]:
    """The whole answer with its figures, times in seconds."""
    return {
        "model": model,
        "prompt_token_ids": output.prompt_token_ids,
        "completions": [_completion(c) for c in output.completions],
        "time_to_first_token_s": output.time_to_first_token_s,
        "latency_s": output.latency_s,
    }


def _completion(completion: Completion) -> dict[str, Any]:
    metrics = completion.metrics
    return {
        "index": completion.index,
        "text": completion.text,
        "token_ids": completion.token_ids,
        "logprobs": [dataclasses.asdict(logprob) for logprob in completion.logprobs],
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
        "error": completion.error or None,
        "metrics": {
            **dataclasses.asdict(metrics),
            "acceptance_length": metrics.acceptance_length,
            "acceptance_rate": metrics.acceptance_rate,
            "tokens_per_step": metrics.tokens_per_step,
            "joint_acceptance": metrics.joint_acceptance,
        },
    }


def _summary(output: RequestOutput) -> str:
    metrics = output.metrics
    num_tokens = sum(len(c.token_ids) for c in output.completions)
    speed = num_tokens / output.latency_s if output.latency_s else 0.0
    drafted = (
        f"{metrics.drafter}, acceptance length {metrics.acceptance_length:.2f}"
        if metrics.drafter
        else "plain decoding"
    )
    return (
        f"[{num_tokens} tokens, {speed:.1f} tokens/s, first after "
        f"{(output.time_to_first_token_s or 0.0) * 1000:.0f} ms; {drafted}; {metrics.exactness}]"
    )
