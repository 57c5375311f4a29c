"""Own a tree of processes on Linux: adopt its orphans, find all of it, end all of it.

Groups and sessions do not bound a training (torchrun gives every rank its own), parenthood does,
as long as the owner is a subreaper. For single-threaded owners. Standard library only.
"""

import ctypes
import logging
import os
import signal
import stat
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

logger = logging.getLogger(__name__)

_KILL_PATIENCE_S = 10.0
_KILL_POLL_S = 0.01

# <linux/prctl.h>
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent dies, in place of init."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def die_with(owner: int) -> None:
    """Have the kernel kill this process when `owner`, its parent, dies; for `preexec_fn`.

    The signal is bound to the thread that forked, so the owner must fork from its main thread.
    """
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != owner:  # It died before the line above.
        os._exit(1)


def is_held(descriptor: int) -> bool:
    """Tell a pipe that another process holds from a terminal or /dev/null, whose end of file says nothing."""
    try:
        mode = os.fstat(descriptor).st_mode
    except OSError:  # Closed.
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)


def start_owned(command: Sequence[str], log_path: Path, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start a command in a session of its own, writing to a file, that dies with this process; for the main thread.

    Raises:
        OSError: there is no such command.
    """
    owner = os.getpid()
    with log_path.open("ab") as log:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
            preexec_fn=lambda: die_with(owner),
        )


def reap(process: subprocess.Popen[bytes]) -> bool:
    """Collect the dead, adopted orphans included; say whether `process` is one of them."""
    with suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0] != 0:
            if ended[0] == process.pid:
                process.returncode = os.waitstatus_to_exitcode(ended[1])
    return process.returncode is not None


def kill_descendants(process: subprocess.Popen[bytes]) -> int:
    """Kill all below this process, `process` included, until /proc shows none; return how many it took."""
    killed: set[int] = set()
    deadline = time.monotonic() + _KILL_PATIENCE_S
    while alive := find_descendants(os.getpid()):
        for pid in alive:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        killed |= alive
        if time.monotonic() > deadline:
            logger.error("still alive %g s after SIGKILL: %s", _KILL_PATIENCE_S, sorted(alive))
            break
        time.sleep(_KILL_POLL_S)
        reap(process)
    reap(process)
    return len(killed)


def find_descendants(root: int) -> set[int]:
    """Find the living processes below `root`; zombies are left out."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(FileNotFoundError, ProcessLookupError):
                # The name, in parentheses, may hold any bytes; after it: state, parent, ...
                state, parent = (entry / "stat").read_bytes().rpartition(b")")[2].split()[:2]
                if state not in (b"Z", b"X"):
                    parents[int(entry.name)] = int(parent)
    found: set[int] = set()
    generation = {root}
    while generation:
        generation = {pid for pid, parent in parents.items() if parent in generation}
        found |= generation
    return found


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}, {value}) failed")
