"""Counters of energy: only what can be read all along is told."""

import ctypes

import pytest

from outrider.bench.energy import EnergyMeter, NvmlGpu, find_counters


def package(folder, name, microjoules, range_uj=1000_000_000):
    domain = folder / name
    domain.mkdir(parents=True)
    (domain / "name").write_text("package-0\n")
    (domain / "energy_uj").write_text(f"{microjoules}\n")
    (domain / "max_energy_range_uj").write_text(f"{range_uj}\n")
    return domain / "energy_uj"


def no_library(name):
    raise OSError(f"{name}: cannot open shared object file")


def test_packages_are_added_up_and_their_parts_are_not(tmp_path):
    first = package(tmp_path, "intel-rapl:0", 5_000_000)
    second = package(tmp_path, "intel-rapl:1", 7_000_000)
    package(tmp_path, "intel-rapl:0:0", 1)
    meter = find_counters(gpus=False, folder=tmp_path)
    meter.start()
    first.write_text("8000000")
    second.write_text("9000000")
    spent = meter.stop()
    assert spent.is_valid
    assert spent.joules == pytest.approx(5.0)
    assert len(spent.by_counter) == 2


def test_a_counter_that_begins_again_is_followed(tmp_path):
    file = package(tmp_path, "intel-rapl:0", 999_000_000)
    meter = find_counters(gpus=False, folder=tmp_path)
    meter.start()
    for reading in (2_000_000, 500_000_000, 1_000_000):
        file.write_text(str(reading))
        meter.poll()
    assert meter.stop().joules == pytest.approx(3 + 498 + 501)


def test_a_counter_that_goes_away_makes_the_sum_void(tmp_path):
    file = package(tmp_path, "intel-rapl:0", 1_000_000)
    meter = find_counters(gpus=False, folder=tmp_path)
    meter.start()
    file.unlink()
    spent = meter.stop()
    assert not spent.is_valid
    assert spent.joules is None
    assert "energy_uj" in spent.why_not


def test_where_there_is_no_counter_it_says_so(tmp_path):
    meter = find_counters(gpus=False, folder=tmp_path)
    meter.start()
    spent = meter.stop()
    assert (spent.joules, spent.is_valid) == (None, False)
    assert spent.why_not == "no energy counter can be read here"


def test_the_processor_alone_does_not_pass_for_a_machine_with_gpus(tmp_path):
    package(tmp_path, "intel-rapl:0", 1_000_000)
    meter = find_counters(gpus=True, folder=tmp_path, load=no_library)
    meter.start()
    spent = meter.stop()
    assert not spent.is_valid
    assert "libnvidia-ml" in spent.why_not


class Library:
    """Stands for NVML: two GPUs, millijoules that rise by 500 per reading."""

    def __init__(self, status=0):
        self._status, self._millijoules = status, 1000

    def nvmlInit_v2(self):
        return 0

    def nvmlDeviceGetCount_v2(self, count):
        count._obj.value = 2
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index, handle):
        handle._obj.value = index + 1
        return 0

    def nvmlDeviceGetTotalEnergyConsumption(self, handle, millijoules):
        assert isinstance(handle, ctypes.c_void_p)
        self._millijoules += 500
        millijoules._obj.value = self._millijoules
        return self._status


def test_gpus_count_millijoules(tmp_path):
    meter = find_counters(gpus=True, folder=tmp_path, load=lambda name: Library())
    assert [type(counter) for counter in meter.counters] == [NvmlGpu, NvmlGpu]
    meter.start()
    spent = meter.stop()
    assert spent.joules == pytest.approx(2.0)  # each reading of one stands two further on


def test_gpus_that_do_not_count_are_told(tmp_path):
    meter = find_counters(gpus=True, folder=tmp_path, load=lambda name: Library(status=3))
    meter.start()
    assert meter.stop().why_not == "GPU: NVML error 3"


def test_a_meter_begins_anew(tmp_path):
    file = package(tmp_path, "intel-rapl:0", 1_000_000)
    meter = find_counters(gpus=False, folder=tmp_path)
    for _ in range(2):
        meter.start()
        file.write_text(str(int(file.read_text()) + 2_000_000))
        assert meter.stop().joules == pytest.approx(2.0)
    assert isinstance(meter, EnergyMeter)
