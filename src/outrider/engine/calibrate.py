"""calibrate: times passes and drafting on an engine, so that its controller begins with prices.

What was learned is kept per machine and models, and refined by every step that is served.
"""

import hashlib
import json
import logging
import os
import platform
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch

from outrider.draft.base import EndsAtDepth
from outrider.engine.engine import Engine
from outrider.engine.stats import EngineStats
from outrider.errors import ConfigError
from outrider.ops.cpu.build import cache_folder
from outrider.request import Request, SamplingParams, SpeculationParams

TENANT = "\0calibration"
PROMPT_TOKENS = 24
SHORT_PROMPT_TOKENS = 8  # of many at once, whose prompts would cost more than what is timed
LONG_PROMPT_TOKENS = 512
STEPS = 4  # timed per group
DEPTHS = (1, 4, 8)
logger = logging.getLogger(__name__)


@runtime_checkable
class KeepsPrices(Protocol):
    """A policy whose prices can be saved."""

    def prices(self) -> dict[str, Any]:
        """JSON-like; `take_prices` of another engine on this machine takes it."""
        ...

    def take_prices(self, saved: dict[str, Any]) -> None:
        """ValueError where they are of another form; then nothing changed."""
        ...

    def forget_texts(self) -> None:
        """Drops what was learned of acceptance: the texts meant nothing."""
        ...


class Group(NamedTuple):
    """Requests that run side by side and draft equally far."""

    size: int
    depth: int
    num_prompt: int = PROMPT_TOKENS
    temperature: float = 0.0


def calibrate(engine: Engine, budget_s: float = 2.0) -> int:
    """Runs short requests of random tokens at rising batch sizes and depths, and times them.

    Answers of other requests are not touched: nothing else may run. Counters of the engine start
    anew.

    Args:
        budget_s: stops after so many seconds, never in the midst of a step; what matters most
            comes first.

    Returns:
        Groups that were timed; 0 where no policy keeps prices.

    Raises:
        ConfigError: the engine is serving.
    """
    if engine.has_work():
        raise ConfigError("calibrate: requests are running; do it before the first one")
    policies = [p for p in engine.controller.policies.values() if isinstance(p, KeepsPrices)]
    if not policies:
        return 0
    before = [policy.prices() for policy in policies]
    rng = random.Random(0)
    end = time.perf_counter() + budget_s
    count = 0
    for group in _groups(engine):
        if time.perf_counter() >= end:
            break
        _run(engine, group, count, rng, end)
        count += 1
    engine.stats = EngineStats()
    engine.controller.forget_seconds()
    for policy, known in zip(policies, before, strict=True):
        policy.forget_texts()
        if known.get("acceptance"):  # of real texts, which random tokens say nothing of
            policy.take_prices({**policy.prices(), "acceptance": known["acceptance"]})
    return count


def load_prices(engine: Engine, folder: Path | None = None) -> bool:
    """Whether prices of this machine and these models were found, and taken."""
    path = price_file(engine, folder)
    policy = _keeper(engine)
    if policy is None or not path.is_file():
        return False
    try:
        policy.take_prices(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        logger.warning("%s: prices are measured anew (%s)", path, error)
        return False
    return True


def save_prices(engine: Engine, folder: Path | None = None) -> Path | None:
    """Writes what is known of prices at once or not at all; the file, or None where none are."""
    policy = _keeper(engine)
    if policy is None:
        return None
    path = price_file(engine, folder)
    part = path.with_suffix(f".{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(policy.prices()), encoding="utf-8")
        part.replace(path)
    except OSError as error:
        logger.warning("%s: prices are not kept (%s)", path, error)
        return None
    return path


def price_file(engine: Engine, folder: Path | None = None) -> Path:
    """Where prices of this machine and these models are kept."""
    told = json.dumps(_identity(engine), sort_keys=True)
    name = hashlib.sha256(told.encode()).hexdigest()[:20]
    return (folder or cache_folder() / "prices") / f"{name}.json"


def _identity(engine: Engine) -> dict[str, Any]:
    """All that prices depend on."""
    spec, device = engine.spec, engine.spec.device
    return {
        "target": spec.fingerprint,
        "kernels": type(engine.runner.network.ops).__name__,
        "network": type(engine.runner.network).__name__,
        "drafter": engine.default_drafter,
        "draft_model": engine.draft_fingerprint,
        "dtype": str(spec.dtype),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "block_size": engine.config.block_size,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line for line in lines if line.startswith("model name")), platform.machine())


def _keeper(engine: Engine) -> KeepsPrices | None:
    policies = engine.controller.policies.values()
    return next((policy for policy in policies if isinstance(policy, KeepsPrices)), None)


def _groups(engine: Engine) -> Iterator[Group]:
    """One request, drafted for and not; then passes of all sizes; then all depths, texts, laws.

    So a budget that is soon used up, as of a large model, has bought what matters most: what one
    draft costs, and where passes begin to take longer for more rows.
    """
    depths = sorted({min(depth, _deepest(engine)) for depth in DEPTHS})
    deep = min(4, _deepest(engine)) if engine.default_drafter else 0
    sizes = list(_sizes(engine.config.max_num_seqs))
    yield Group(1, 0)
    if deep:
        yield Group(1, deep)
    yield from (Group(size, 0, SHORT_PROMPT_TOKENS) for size in sizes[1:])
    for size in sizes:
        if deep and size < 64:
            yield from (Group(size, depth) for depth in depths if size > 1 or depth != deep)
        if size == 1:
            yield Group(1, deep, temperature=1.0)
        if size == 4:
            most = min(LONG_PROMPT_TOKENS, engine.max_model_len // 2)
            if most > 2 * PROMPT_TOKENS:
                yield Group(1, deep, most)
            yield Group(4, 0, temperature=1.0)


def _deepest(engine: Engine) -> int:
    drafter = engine.drafters[engine.default_drafter] if engine.default_drafter else None
    return drafter.max_draft_tokens if isinstance(drafter, EndsAtDepth) else max(DEPTHS)


def _sizes(most: int) -> Iterator[int]:
    size = 1
    while size <= min(most, 64):
        yield size
        size *= 2


def _run(engine: Engine, group: Group, number: int, rng: random.Random, end: float) -> None:
    depth = group.depth
    speculation = (
        SpeculationParams(num_draft_tokens=depth) if depth else SpeculationParams(method="off")
    )
    num_prompt = min(group.num_prompt, max(engine.max_model_len - (STEPS + 1) * (depth + 1), 1))
    ids = [f"calibration-{number}-{index}" for index in range(group.size)]
    for name in ids:
        sampling = SamplingParams(
            max_tokens=STEPS * (depth + 1) + 1, ignore_eos=True, temperature=group.temperature
        )
        prompt = tuple(rng.randrange(engine.spec.vocab_size) for _ in range(num_prompt))
        engine.add(
            Request(
                id=name,
                prompt_token_ids=prompt,
                sampling=sampling,
                speculation=speculation,
                tenant=TENANT,
            )
        )
    for _ in range(STEPS + 1):
        if not engine.has_work() or time.perf_counter() > end + 1.0:
            break
        engine.step()
    for name in ids:
        engine.abort(name)
    while engine.has_work():
        engine.step()
