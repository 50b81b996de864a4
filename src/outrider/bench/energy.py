"""Energy: joules that the machine's own counters show, of processors and GPUs; never estimated."""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

POWERCAP = Path("/sys/class/powercap")
NVML = "libnvidia-ml.so.1"


class Counter(Protocol):
    """Counts joules from some start on.

    Attributes:
        name: of what. range_j: where it begins again at 0; None for never.
    """

    name: str
    range_j: float | None

    def joules(self) -> float:
        """OSError if it cannot be read."""
        ...


class Rapl:
    """A package domain of Linux's powercap: one processor socket, all that runs on it included."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "energy_uj"
        self.name = (folder / "name").read_text(encoding="utf-8").strip()
        most = (folder / "max_energy_range_uj").read_text(encoding="utf-8")
        self.range_j: float | None = int(most) / 1e6

    def joules(self) -> float:
        return int(self._file.read_text(encoding="utf-8")) / 1e6


class NvmlGpu:
    """A GPU's own counter since the driver was loaded (Volta and later)."""

    range_j: float | None = None

    def __init__(self, library: ctypes.CDLL, index: int) -> None:
        self.name = f"gpu {index}"
        self._library = library
        self._handle = ctypes.c_void_p()
        _check(library.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(self._handle)))

    def joules(self) -> float:
        millijoules = ctypes.c_ulonglong()
        _check(
            self._library.nvmlDeviceGetTotalEnergyConsumption(
                self._handle, ctypes.byref(millijoules)
            )
        )
        return millijoules.value / 1e3


class Spent(NamedTuple):
    """Joules by counter.

    Attributes:
        is_valid: every counter that was found could be read all along, and there is one.
        why_not: "" where it is.
    """

    by_counter: dict[str, float]
    is_valid: bool
    why_not: str = ""

    @property
    def joules(self) -> float | None:
        return sum(self.by_counter.values()) if self.is_valid else None


@dataclass
class EnergyMeter:
    """Adds up what counters show between `start` and `stop`.

    A counter that begins again is followed as long as `poll` is called once per round: every few
    minutes at the most.
    """

    counters: list[Counter] = field(default_factory=list)
    why_not: str = "no energy counter can be read here"

    def start(self) -> None:
        self._spent = dict.fromkeys((counter.name for counter in self.counters), 0.0)
        self._last: dict[str, float] = {}
        self._failed = "" if self.counters else self.why_not
        self.poll()

    def poll(self) -> None:
        for counter in self.counters:
            try:
                now = counter.joules()
            except OSError as error:
                self._failed = f"{counter.name}: {error}"
                continue
            gone = now - self._last.get(counter.name, now)
            if gone < 0.0:
                gone += counter.range_j or 0.0
            self._spent[counter.name] += gone
            self._last[counter.name] = now

    def stop(self) -> Spent:
        self.poll()
        return Spent(dict(self._spent), not self._failed, self._failed)


def find_counters(
    *,
    gpus: bool,
    folder: Path = POWERCAP,
    load: Callable[[str], ctypes.CDLL] = ctypes.CDLL,
) -> EnergyMeter:
    """All that this machine shows; says why where that is nothing.

    Args:
        gpus: whether the work runs on GPUs, without whose counters the sum would be too small.
    """
    found: list[Counter] = []
    reasons = []
    try:
        found += _packages(folder)
    except OSError as error:
        reasons.append(f"processor: {error}")
    try:
        found += _gpus(load) if gpus else []
    except OSError as error:
        reasons.append(f"GPU: {error}")
    if gpus and not any(isinstance(counter, NvmlGpu) for counter in found):
        found = []  # the share of the processor alone would pass for the whole
    return EnergyMeter(found, "; ".join(reasons) or "no energy counter can be read here")


def _packages(folder: Path) -> list[Counter]:
    """Top domains only: their parts are in them. OSError where they may not be read."""
    found: list[Counter] = []
    for domain in sorted(folder.glob("*-rapl:[0-9]*")):
        if domain.name.count(":") > 1 or not (domain / "energy_uj").exists():
            continue
        counter = Rapl(domain)
        counter.joules()
        counter.name = f"{counter.name} ({domain.name})"
        found.append(counter)
    return found


def _gpus(load: Callable[[str], ctypes.CDLL]) -> list[Counter]:
    library = load(NVML)
    _check(library.nvmlInit_v2())
    count = ctypes.c_uint()
    _check(library.nvmlDeviceGetCount_v2(ctypes.byref(count)))
    found: list[Counter] = [NvmlGpu(library, index) for index in range(count.value)]
    for counter in found:
        counter.joules()
    return found


def _check(status: int) -> None:
    if status:
        raise OSError(f"NVML error {status}")
