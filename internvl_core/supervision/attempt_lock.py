"""One supervisor an attempt. Standard library only."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from internvl_core.contract import FAILURE_FILE, RESULT_FILE
from internvl_core.errors import ArgumentError, LeaseHeld

LOCK_FILE = "supervisor.lock"


@contextmanager
def hold_attempt(attempt_dir: Path) -> Iterator[None]:
    """Keep a second supervisor out of the attempt; the kernel lets go when this process dies.

    Raises:
        LeaseHeld: another supervisor is at work here.
        ArgumentError: there is no such directory, or its attempt is over.
    """
    if not attempt_dir.is_dir():
        raise ArgumentError(
            f"{attempt_dir} is no directory; the attempt's directory has to exist before the supervisor."
        )
    with (attempt_dir / LOCK_FILE).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read() or "a supervisor that is just starting"
            raise LeaseHeld(f"{attempt_dir} is being run by {holder}. Wait for it, or stop it by SIGTERM.") from None
        for outcome in (RESULT_FILE, FAILURE_FILE):
            if (attempt_dir / outcome).exists():
                raise ArgumentError(
                    f"{attempt_dir} has a {outcome}: that attempt is over. A new one needs its own directory."
                )
        file.truncate(0)
        file.write(f"pid {os.getpid()} on {socket.gethostname()} since {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC")
        file.flush()
        yield
