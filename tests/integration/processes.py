"""Processes that a test has started: waiting for what they do, and finding those that are left."""

import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def wait_until(
    condition: Callable[[], Any], message: str | Callable[[], str] = "it did not come true", *, deadline_s: float = 60
) -> Any:
    """Look until a condition is true; returns what it came to."""
    end = time.monotonic() + deadline_s
    while not (found := condition()):
        assert time.monotonic() < end, message if isinstance(message, str) else message()
        time.sleep(0.05)
    return found


def find_free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def list_processes(marker: Path | str, word: str = "") -> dict[int, str]:
    """List living processes whose command line or environment has a marker, and their command lines.

    Args:
        marker: a directory or a run's id, for one.
        word: in the command line.
    """
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                command = (entry / "cmdline").read_bytes()
                # That of a zombie is empty.
                if command and str(marker).encode() in command + (entry / "environ").read_bytes():
                    found[int(entry.name)] = command.replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
    return {pid: command for pid, command in found.items() if word in command}


def find_ranks(directory: Path) -> list[int]:
    """Find the ranks of attempts in a directory, and their workers; torchrun and the supervisor are none."""
    found = list_processes(directory, f"--attempt_dir={directory}")
    return [pid for pid, command in found.items() if "torch.distributed.run" not in command]
