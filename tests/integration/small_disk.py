"""Small disks to fill."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """Mount a tmpfs at a folder, with options such as `size=1m`; skip the test where that cannot be."""
    if os.geteuid() != 0:
        pytest.skip("NOT TESTED: a full disk needs root, to mount a small tmpfs")
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"NOT TESTED: a full disk needs a small tmpfs: {done.stderr}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)
