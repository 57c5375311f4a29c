"""Run a module of the trainer that needs torch in a process of its own, so that the control plane does without."""

import logging
import subprocess
import sys

from internvl_core.errors import InternVLError

logger = logging.getLogger(__name__)


def run_module(module: str, *arguments: str, error: type[InternVLError] = InternVLError) -> str:
    """Run `python -m module arguments...` and return what it prints.

    Raises:
        InternVLError: `error`, or the class that the module's exit code stands for, with its last line of output.
    """
    completed = subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True, check=False)
    if completed.returncode:
        lines = [line for line in completed.stderr.splitlines() if line.strip()] or ["no output"]
        raise error(f"{module} failed with exit code {completed.returncode}: {lines[-1]}")
    return completed.stdout
