"""What a benchmark ran on."""

import platform
from pathlib import Path


def name_processor() -> str:
    info = Path("/proc/cpuinfo").read_text()
    models = [line.partition(":")[2].strip() for line in info.splitlines() if line.startswith("model name")]
    return models[0] if models else platform.processor()
