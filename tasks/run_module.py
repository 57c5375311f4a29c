"""Run a module of the trainer that needs torch in a process of its own, so that the control plane does without."""

import subprocess
import sys

from internvl_core.errors import ArgumentError, DataError, InternVLError

_CLASSES = {error.exit_code: error for error in (ArgumentError, DataError)}


def run_module(module: str, *arguments: str) -> str:
    """Run `python -m module arguments...` and return what it prints.

    Raises:
        InternVLError: of the class that the exit code stands for, with the last line of its output.
    """
    completed = subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True, check=False)
    if completed.returncode:
        lines = [line for line in completed.stderr.splitlines() if line.strip()] or ["no output"]
        kind = _CLASSES.get(completed.returncode, InternVLError)
        raise kind(f"{module} failed with exit code {completed.returncode}: {lines[-1]}")
    return completed.stdout
