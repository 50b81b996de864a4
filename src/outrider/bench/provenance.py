"""Provenance: machine, versions, commit and conditions that a number comes from."""

import hashlib
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch

import outrider

PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "xgrammar")
VECTOR_UNITS = ("amx_tile", "avx512f", "avx2", "neon", "asimd")
ALLOCATOR_SETTINGS = ("LD_PRELOAD", "MALLOC_ARENA_MAX", "PYTORCH_ALLOC_CONF", "OMP_PROC_BIND")
GPU_FIELDS = (
    "driver_version",
    "clocks.sm",
    "clocks.mem",
    "power.limit",
    "clocks_event_reasons.active",
)
CPU_FREQUENCY = Path("/sys/devices/system/cpu/cpu0/cpufreq")


class Watch:
    """Facts of a run, from its start to the moment they are asked for.

    Make one before the first measurement and ask for `facts()` after the last, so that load, heat
    and the processor time of other processes are those of the run.
    """

    def __init__(self) -> None:
        self._started_at = datetime.now(UTC).isoformat(timespec="seconds")
        self._start_s = time.monotonic()
        self._load = _load_average()
        self._frequency_mhz = frequency_mhz()
        self._busy = _Busy.now()

    def facts(self) -> dict[str, Any]:
        """Everything known, of types that JSON has; what cannot be read is left out."""
        gpus = _gpus()
        return {
            "command": command(),
            "commit": commit(),
            "versions": versions(),
            "machine": machine(),
            "conditions": _known(
                started_at=self._started_at,
                seconds=round(time.monotonic() - self._start_s, 3),
                load_average=_pair(self._load, _load_average()),
                frequency_mhz=_pair(self._frequency_mhz, frequency_mhz()),
                governor=_text(CPU_FREQUENCY / "scaling_governor"),
                other_cpu_share=_share_of_others(self._busy, _Busy.now()),
                threads=torch.get_num_threads(),
                pinned_to=_pinned_to(),
                allocator={
                    name: os.environ[name] for name in ALLOCATOR_SETTINGS if name in os.environ
                }
                or None,
                gpus=gpus or None,
            ),
        }


def provenance() -> dict[str, Any]:
    """Facts as of now; a run that takes long is told better by a `Watch`."""
    return Watch().facts()


def as_markdown(facts: Mapping[str, Any]) -> str:
    """A list, one line per fact."""
    return "\n".join(f"- {name.replace('_', ' ')}: {value}" for name, value in as_text(facts))


def as_text(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Names and what to print beside them, a mapping inside in one line."""
    return [(name, _line(value)) for name, value in facts.items() if value not in (None, "", {})]


def command() -> str:
    """What was typed, as somebody else would type it: no folder of this machine in front."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    if spec is not None:
        return shlex.join(["python", "-m", spec.name.removesuffix(".__main__"), *sys.argv[1:]])
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def versions() -> dict[str, str]:
    found = {"outrider": outrider.__version__, "Python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """What does not change from run to run."""
    return _known(
        processor=_processor(),
        vector_unit=_vector_unit(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        memory_gib=_memory_gib(),
        system=f"{platform.system()} {platform.release()}",
        gpus=[torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] or None,
    )


def machine_fingerprint() -> str:
    """Equal where a timing may be taken over: same processor, cores, threads, torch and GPUs.

    Of this process as it stands: cores are those it may run on, threads those that torch computes
    with now (`torch.get_num_threads()`), so it changes where either is changed. Whoever keeps
    timings takes it before the first of them.
    """
    facts = {**machine(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    for name in ("system", "memory_gib"):  # neither changes what a pass takes
        facts.pop(name, None)
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def commit() -> str:
    """Of this package's own checkout, "-dirty" if edited; the release where it is no checkout."""
    root = Path(outrider.__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return f"release {outrider.__version__}"
    return _output(["git", "-C", str(root), "describe", "--always", "--dirty"]) or "unknown"


def frequency_mhz() -> float | None:
    """Of the first core, as the system tells it now."""
    told = _text(CPU_FREQUENCY / "scaling_cur_freq")  # kHz
    if told is not None:
        return int(told) / 1e3
    line = _cpuinfo("cpu MHz")
    return float(line) if line else None


class _Busy(NamedTuple):
    """Processor seconds since the machine's start: all cores' busy ones, all, and our own."""

    busy: float
    total: float
    own: float

    @classmethod
    def now(cls) -> "_Busy | None":
        text = _text(Path("/proc/stat"))
        if text is None:
            return None
        # cpu  user nice system idle iowait irq softirq steal ..., in ticks of 1/SC_CLK_TCK s
        ticks = [int(field) for field in text.splitlines()[0].split()[1:9]]
        per_second = os.sysconf("SC_CLK_TCK")
        idle = ticks[3] + ticks[4]
        own = os.times()
        return cls((sum(ticks) - idle) / per_second, sum(ticks) / per_second, own.user + own.system)


def _share_of_others(start: _Busy | None, end: _Busy | None) -> float | None:
    """Of all cores' time, what processes other than this one took: 0 to 1."""
    if start is None or end is None or end.total - start.total < 0.1:
        return None
    others = (end.busy - start.busy) - (end.own - start.own)
    return round(min(1.0, max(0.0, others / (end.total - start.total))), 4)


def _gpus() -> list[dict[str, str]]:
    """Clocks and throttle reasons as the driver tells them."""
    if not torch.cuda.is_available():
        return []
    command = ["nvidia-smi", f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader"]
    lines = _output(command).splitlines()
    return [dict(zip(GPU_FIELDS, line.split(", "), strict=False)) for line in lines]


def _processor() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _vector_unit() -> str | None:
    flags = (_cpuinfo("flags") or _cpuinfo("Features") or "").split()
    return next((unit for unit in VECTOR_UNITS if unit in flags), None)


def _cpuinfo(key: str) -> str | None:
    """The first core's value."""
    for line in (_text(Path("/proc/cpuinfo")) or "").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return None


def _memory_gib() -> float | None:
    for line in (_text(Path("/proc/meminfo")) or "").splitlines():
        if line.startswith("MemTotal:"):
            return round(int(line.split()[1]) / (1 << 20), 1)
    return None


def _pinned_to() -> list[int] | None:
    """Cores this process may use, where that is not all of them."""
    if not hasattr(os, "sched_getaffinity"):
        return None
    cores = sorted(os.sched_getaffinity(0))
    return cores if len(cores) < (os.cpu_count() or 0) else None


def _load_average() -> float | None:
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def _pair(start: float | None, end: float | None) -> list[float] | None:
    """At the start and at the end."""
    return None if start is None or end is None else [start, end]


def _known(**facts: Any) -> dict[str, Any]:
    return {name: value for name, value in facts.items() if value is not None}


def _line(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(
            f"{name.replace('_', ' ')} {_line(inner)}" for name, inner in value.items()
        )
    if isinstance(value, list | tuple):
        return " ".join(_line(inner) for inner in value)
    return str(value)


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return None


def _output(command: list[str]) -> str:
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return found.stdout.strip()
