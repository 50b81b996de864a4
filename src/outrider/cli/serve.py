"""`outrider serve`: an HTTP server over one model, until it is told to stop."""

import hashlib
import math
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import typer

from outrider.cli import options
from outrider.control.policies import DEFAULT
from outrider.engine.async_llm import AsyncLLM
from outrider.engine.config import EngineConfig
from outrider.engine.llm import LLM
from outrider.errors import ConfigError
from outrider.serve.config import ServeConfig

TOLD_ROWS, TOLD_DEPTH = (1, 4, 16, 64), 4
KEYS_VARIABLE = "OUTRIDER_API_KEYS"
_KEY_FORM = "KEY, or TENANT:KEY"
_defaults: dict[str, Any] = {f.name: f.default for f in fields(ServeConfig)}
_engine: dict[str, Any] = {f.name: f.default for f in fields(EngineConfig)}


def serve(
    model: options.Model,
    draft_model: options.DraftModel = None,
    speculation: options.SpeculationJSON = None,
    policy: options.Policy = DEFAULT,
    calibrate_s: float = typer.Option(
        2.0,
        help="Most seconds to time passes and drafting at the first start on this machine; they "
        "are kept and refined. 0 never does; then they are learned while requests run.",
    ),
    host: str = typer.Option(
        _defaults["host"], help="Address to listen on; the default is this machine only."
    ),
    port: int = typer.Option(_defaults["port"], help="0 takes a free one."),
    served_model_name: str | None = typer.Option(
        None, help="What clients call the model; its own name if unset."
    ),
    api_key: list[str] | None = typer.Option(
        None,
        help=f"{_KEY_FORM}; may be repeated. Others see a command line: prefer "
        f"--api-keys-file, or the variable {KEYS_VARIABLE} (with commas between).",
    ),
    api_keys_file: Path | None = typer.Option(None, help=f"File with {_KEY_FORM} on each line."),
    allowed_origin: list[str] | None = typer.Option(
        None, help="Web origin that browsers let in (CORS); may be repeated; none by default."
    ),
    allowed_host: list[str] | None = typer.Option(
        None,
        help="Name by which clients may call the server (their Host header), besides those of this "
        "machine; may be repeated; .example.org is all names below it, * is any. Without it any "
        "name is let in if --host is not this machine.",
    ),
    max_body_bytes: int = typer.Option(
        _defaults["max_body_bytes"], help="Longest body of a request."
    ),
    max_waiting: int = typer.Option(
        _defaults["max_waiting"], help="Requests that may wait; more are refused with 429."
    ),
    max_concurrent: int = typer.Option(
        _defaults["max_concurrent"], help="Requests in the engine at once."
    ),
    request_timeout_s: float = typer.Option(
        _defaults["request_timeout_s"], help="Longest time from arrival to the last token."
    ),
    write_timeout_s: float = typer.Option(
        _defaults["write_timeout_s"],
        help="Time after which a client that takes nothing of its answer is dropped.",
    ),
    drain_s: float = typer.Option(
        _defaults["drain_s"], help="Time that running requests get after SIGTERM."
    ),
    state_dir: Path | None = typer.Option(
        None, help="Folder of sessions and their warm state; in memory if unset."
    ),
    max_session_tokens: int | None = typer.Option(
        None, help="Most tokens that one tenant's sessions may hold; no limit if unset."
    ),
    max_sessions: int | None = typer.Option(
        None,
        help="Most sessions of one tenant, those of stored responses among them; no limit if "
        "unset.",
    ),
    allow_lossy: bool = typer.Option(
        _defaults["allow_lossy"], help="Let requests choose rules that change the output's law."
    ),
    allow_synthetic: bool = typer.Option(
        _defaults["allow_synthetic"], help="Let requests choose made-up acceptance (benchmarks)."
    ),
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    kernels: options.Kernels = "auto",
    quantization: options.Quantization = None,
    draft_quantization: options.DraftQuantization = None,
    datastore: options.Datastore = None,
    drafter_settings: options.DrafterSettings = None,
    max_model_len: options.MaxModelLen = None,
    kv_cache_memory_bytes: options.KVCacheMemoryBytes = None,
    max_num_seqs: int = typer.Option(
        _engine["max_num_seqs"], help="Sequences (answers) that share a step."
    ),
    max_num_batched_tokens: int = typer.Option(
        _engine["max_num_batched_tokens"], help="Tokens and draft nodes that share a step."
    ),
) -> None:
    """Serve a model over HTTP: the APIs of OpenAI and Anthropic, sessions, and a page at /."""
    config = ServeConfig(
        host=host,
        port=port,
        served_model_name=served_model_name,
        api_keys=_read_keys(api_key or (), api_keys_file),
        allowed_origins=tuple(allowed_origin or ()),
        allowed_hosts=tuple(allowed_host or ()),
        max_body_bytes=max_body_bytes,
        max_waiting=max_waiting,
        max_concurrent=max_concurrent,
        request_timeout_s=request_timeout_s,
        write_timeout_s=write_timeout_s,
        drain_s=drain_s,
        state_dir=state_dir,
        max_session_tokens=max_session_tokens,
        max_sessions=max_sessions,
        allow_lossy=allow_lossy,
        allow_synthetic=allow_synthetic,
    )
    check_installed()
    options.check_policy(policy)
    _check_calibration(calibrate_s)
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
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
    )
    if calibrate_s:
        typer.echo(calibrated(llm, calibrate_s), err=True)
    from outrider.serve.app import create_app
    from outrider.serve.process import Process

    app = create_app(AsyncLLM(llm), config)
    name = app.state.server.model_name
    Process(app, lambda url: typer.echo(f"serving {name} at {url}", err=True)).serve_until_told()
    llm.save_prices()


def calibrated(llm: LLM, budget_s: float) -> str:
    """Times what is not known yet; one line of what things cost here."""
    start = time.perf_counter()
    is_timed = llm.calibrate(budget_s)
    took = time.perf_counter() - start
    told = f"calibrated in {took:.1f} s" if is_timed else "prices known from an earlier start"
    policy = llm.engine.controller.policies[DEFAULT]
    return f"{told}: {_costs(policy.explain()['cost'])}"


def _costs(cost: Mapping[str, Any]) -> str:
    """Of some passes, and of drafting for one sequence."""
    table = dict(zip(cost["passes"]["rows"], cost["passes"]["seconds"], strict=True))
    passes = ", ".join(f"{rows} {1e3 * table[rows]:.3g} ms" for rows in TOLD_ROWS)
    parts = [f"a pass by rows: {passes}"]
    for name, drafting in cost["drafts"].items():
        call, depth, row, node, _ = (max(price, 0.0) for price in drafting["prices"])
        seconds = call + row + TOLD_DEPTH * (depth + node)
        parts.append(f"{TOLD_DEPTH} drafted by {name}: {1e3 * seconds:.3g} ms")
    return "; ".join(parts)


def _check_calibration(seconds: float) -> None:
    if not 0 <= seconds < math.inf:
        raise ConfigError(f"calibrate_s={seconds!r}: must be seconds, or 0 for never")


def check_installed() -> None:
    """ConfigError where the packages of the server are missing."""
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ModuleNotFoundError as error:
        raise ConfigError(f'{error.name} is not installed: pip install "outrider[serve]"') from None


def _read_keys(given: Iterable[str], file: Path | None) -> dict[str, str]:
    """key -> tenant, from options, file and environment together."""
    lines = [*given, *os.environ.get(KEYS_VARIABLE, "").split(",")]
    if file is not None:
        try:
            lines += file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--api-keys-file {str(file)!r} cannot be read: {error}") from None
    stripped = [line.strip() for line in lines]
    keys = dict(_read_key(line) for line in stripped if line and not line.startswith("#"))
    if file is not None and not keys:
        raise ConfigError(f"--api-keys-file {str(file)!r} holds no key: write {_KEY_FORM}")
    return keys


def _read_key(text: str) -> tuple[str, str]:
    """A key without a tenant is a tenant of its own, named so that the name tells nothing."""
    tenant, is_named, key = text.rpartition(":")
    if is_named and not (tenant and key):
        raise ConfigError(f"an API key is malformed: write {_KEY_FORM}")
    return key, tenant or f"key-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
