"""Keep a second run on this machine out of a stage that is being trained."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from internvl_core.errors import LeaseHeld

LOCK_FILE = "lock"


@contextmanager
def hold_stage(attempts_dir: Path) -> Iterator[int]:
    """Hold the directory of a stage's attempts.

    Yields the descriptor of the lock. The kernel lets go when nobody has it open any more: a
    supervisor that inherits it keeps the stage while its ranks still save for a flow that is dead.

    Raises:
        LeaseHeld: another run trains the very same stage in the same workspace.
    """
    attempts_dir.mkdir(parents=True, exist_ok=True)
    with (attempts_dir / LOCK_FILE).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read() or "a run that is just starting"
            raise LeaseHeld(
                f"{attempts_dir.name} is being trained by {holder}. Wait for it, and its result is found; or stop it."
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} since {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC")
        file.flush()
        yield file.fileno()
