"""Where a number comes from: machine, versions, commit; the head of every result."""

import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import torch


def provenance() -> dict[str, str]:
    return {
        "machine": f"{_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "load average at start": f"{os.getloadavg()[0]:.1f}",
        "commit": _commit(),
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {version('transformers')}",
        "command": " ".join(["python", *sys.argv]),
    }


def as_markdown(facts: dict[str, str]) -> str:
    return "\n".join(f"- {name}: {value}" for name, value in facts.items())


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            flags = Path("/proc/cpuinfo").read_text()
            vector = next((v for v in ("amx_tile", "avx512f", "avx2") if v in flags), "")
            return f"{line.partition(':')[2].strip()} ({vector})"
    return platform.processor() or platform.machine()


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"
