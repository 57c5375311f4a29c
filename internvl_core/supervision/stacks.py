"""What the processes of a run that stands still are doing.

Each rank has faulthandler write the stacks of its threads on a signal, which works while the GIL is
held. A rank that does not answer is stopped, or deep in the kernel: /proc says which.
Standard library only.
"""

import os
import time
from collections.abc import Mapping
from pathlib import Path

from internvl_core.contract import get_stacks_path
from internvl_core.supervision.progress import STACKS_SIGNAL

_PATIENCE_S = 3.0
_POLL_S = 0.1
_MAX_BYTES = 64 * 1024
_STATES = {
    "R": "running",
    "S": "sleeping",
    "D": "waiting for a device",
    "T": "stopped",
    "t": "traced",
    "Z": "dead",
    "X": "dead",
}


def collect_stacks(directory: Path, pids: Mapping[int, int]) -> str:
    """Ask ranks for the stacks of all their threads and return them, rank by rank.

    Args:
        directory: where their files are.
        pids: process of each rank; one that never registered the signal dies of it.
    """
    sizes = {rank: _get_size(directory, rank) for rank in pids}
    asked = [rank for rank in pids if _signal(pids[rank])]
    deadline = time.monotonic() + _PATIENCE_S
    last: dict[int, int] = {}
    while time.monotonic() < deadline:
        time.sleep(_POLL_S)
        now = {rank: _get_size(directory, rank) for rank in asked}
        # All have written something, and nothing since the last look.
        if all(now[rank] > sizes[rank] for rank in asked) and now == last:
            break
        last = now
    return "\n\n".join(_describe(directory, rank, pids[rank], sizes[rank]) for rank in sorted(pids))


def _signal(pid: int) -> bool:
    try:
        os.kill(pid, STACKS_SIGNAL)
    except ProcessLookupError:
        return False
    return True


def _describe(directory: Path, rank: int, pid: int, offset: int) -> str:
    head = f"rank {rank}, process {pid}, {_tell_state(pid)}"
    try:
        with get_stacks_path(directory, rank).open("rb") as file:
            file.seek(offset)
            stacks = file.read(_MAX_BYTES).decode(errors="replace").rstrip()
    except OSError:
        stacks = ""
    return f"{head}:\n{stacks}" if stacks else f"{head}: did not answer."


def _tell_state(pid: int) -> str:
    try:
        letter = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        place = Path(f"/proc/{pid}/wchan").read_text().strip()
    except OSError:
        return "gone"
    # "0" where there is none, or where the kernel does not tell us.
    return f"{_STATES.get(letter, letter)}{f' in {place}' if place not in ('', '0') else ''}"


def _get_size(directory: Path, rank: int) -> int:
    try:
        return get_stacks_path(directory, rank).stat().st_size
    except OSError:
        return 0
