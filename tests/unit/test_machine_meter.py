"""Processor, memory, disk and GPUs in the log line of a step."""

# ruff: noqa: N802  (NVIDIA's names)

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from internvl_core.train.machine_meter import MIN_INTERVAL_S, MachineMeter


class Clock:
    """Stands still until it is set."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


class FakeNvidia(ModuleType):
    """NVIDIA's library on a machine with two cards, of which the second does not tell two things."""

    NVML_TEMPERATURE_GPU = 0

    class NVMLError(Exception):
        pass

    def nvmlInit(self) -> None: ...

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetUtilizationRates(self, gpu: int) -> SimpleNamespace:
        if gpu == 1:
            raise self.NVMLError("Not Supported")
        return SimpleNamespace(gpu=87)

    def nvmlDeviceGetMemoryInfo(self, gpu: int) -> SimpleNamespace:
        return SimpleNamespace(used=40 << 30)

    def nvmlDeviceGetPowerUsage(self, gpu: int) -> int:
        if gpu == 1:
            raise self.NVMLError("Not Supported")
        return 612_500

    def nvmlDeviceGetTemperature(self, gpu: int, kind: int) -> int:
        return 71


@pytest.fixture
def nvidia(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvidia("pynvml"))


def test_a_machine_without_gpus_tells_processor_memory_and_disk(tmp_path: Path) -> None:
    read = MachineMeter(tmp_path).read()
    assert {"system/cpu_percent", "system/memory_bytes", "system/disk_free_bytes"} <= read.keys()
    assert read["system/memory_bytes"] > 1e6
    assert 0 <= read["system/cpu_percent"] <= 100


def test_readings_are_some_seconds_apart(tmp_path: Path) -> None:
    clock = Clock()
    meter = MachineMeter(tmp_path, clock=clock)
    assert meter.read()
    clock.now = MIN_INTERVAL_S - 0.1
    assert meter.read() == {}
    clock.now = MIN_INTERVAL_S
    assert meter.read()


@pytest.mark.usefixtures("nvidia")
def test_each_gpu_tells_what_it_can(tmp_path: Path) -> None:
    read = MachineMeter(tmp_path).read()
    assert {name: value for name, value in read.items() if "gpu" in name} == {
        "system/gpu_0_utilization_percent": 87.0,
        "system/gpu_0_memory_bytes": float(40 << 30),
        "system/gpu_0_power_w": 612.5,
        "system/gpu_0_temperature_c": 71.0,
        "system/gpu_1_memory_bytes": float(40 << 30),
        "system/gpu_1_temperature_c": 71.0,
    }
