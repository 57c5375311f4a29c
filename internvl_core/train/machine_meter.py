"""What rank 0's machine is doing: processor, memory, disk and GPUs, for the log line of a step."""

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

MIN_INTERVAL_S = 5.0
"""Between two readings; lines in between have none."""


class MachineMeter:
    """Reads at most every few seconds. GPUs are all that the machine shows, where NVIDIA's library is installed."""

    def __init__(self, directory: Path, *, clock: Any = time) -> None:
        """Open what can be read.

        Args:
            directory: whose disk is watched.
            clock: with `monotonic`.
        """
        self._directory = directory
        self._clock = clock
        self._read_at: float | None = None
        self._gpus = _open_gpus()
        # The first answer compares with the start of the process.
        psutil.cpu_percent()

    def read(self) -> dict[str, float]:
        """Read shares in percent and sizes in bytes; empty where the last reading is younger than the interval."""
        now = self._clock.monotonic()
        if self._read_at is not None and now - self._read_at < MIN_INTERVAL_S:
            return {}
        self._read_at = now
        memory = psutil.virtual_memory()
        read = {
            "system/cpu_percent": psutil.cpu_percent(),
            "system/memory_bytes": float(memory.total - memory.available),
        }
        # A disk that is gone is for whoever writes to it to say.
        with suppress(OSError):
            read["system/disk_free_bytes"] = float(psutil.disk_usage(str(self._directory)).free)
        for number, gpu in enumerate(self._gpus):
            read |= {f"system/gpu_{number}_{name}": value for name, value in _iter_readings(gpu)}
        return read


def _open_gpus() -> list[Any]:
    try:
        import pynvml
    except ImportError:
        return []
    try:
        pynvml.nvmlInit()
        return [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError:  # No driver: a machine without GPUs.
        return []


def _iter_readings(gpu: Any) -> Iterator[tuple[str, float]]:
    """Read what a card tells: not every one has all of it, and one may be lost just now."""
    import pynvml

    questions: dict[str, Callable[[], float]] = {
        "utilization_percent": lambda: float(pynvml.nvmlDeviceGetUtilizationRates(gpu).gpu),
        "memory_bytes": lambda: float(pynvml.nvmlDeviceGetMemoryInfo(gpu).used),
        "power_w": lambda: pynvml.nvmlDeviceGetPowerUsage(gpu) / 1000,
        "temperature_c": lambda: float(pynvml.nvmlDeviceGetTemperature(gpu, pynvml.NVML_TEMPERATURE_GPU)),
    }
    for name, ask in questions.items():
        with suppress(pynvml.NVMLError):
            yield name, ask()
