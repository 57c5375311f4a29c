"""What rank 0's machine is doing: processor, memory, disk and GPUs, for the log line of a step."""

import logging
import time
from pathlib import Path
from typing import Any

import psutil

MIN_INTERVAL_S = 5.0
"""Between two readings; lines in between have none."""

logger = logging.getLogger(__name__)


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
        return {
            "system/cpu_percent": psutil.cpu_percent(),
            "system/memory_bytes": float(memory.total - memory.available),
            "system/disk_free_bytes": float(psutil.disk_usage(str(self._directory)).free),
            **{
                f"system/gpu_{number}_{name}": value
                for number, gpu in enumerate(self._gpus)
                for name, value in _read_gpu(gpu).items()
            },
        }


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


def _read_gpu(gpu: Any) -> dict[str, float]:
    import pynvml

    try:
        return {
            "utilization_percent": float(pynvml.nvmlDeviceGetUtilizationRates(gpu).gpu),
            "memory_bytes": float(pynvml.nvmlDeviceGetMemoryInfo(gpu).used),
            "power_w": pynvml.nvmlDeviceGetPowerUsage(gpu) / 1000,
            "temperature_c": float(pynvml.nvmlDeviceGetTemperature(gpu, pynvml.NVML_TEMPERATURE_GPU)),
        }
    except pynvml.NVMLError:  # What a card does not tell, or one that is lost just now.
        return {}
