"""Keep a second run on this machine out of a stage that is being trained."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from internvl_core.errors import LeaseHeld
from tasks.holder import describe_holder, read_holder, take, write_holder

LOCK_FILE = "lock"

_POLL_S = 0.2

logger = logging.getLogger(__name__)


@contextmanager
def hold_stage(attempts_dir: Path, run_id: str, *, patience_s: float) -> Iterator[int]:
    """Hold the directory of a stage's attempts.

    Yields the descriptor of the lock. The kernel lets go when nobody has it open any more: a
    supervisor that inherits it keeps the stage while its ranks still save for a flow that is dead.

    Args:
        attempts_dir: of the stage; made if need be.
        run_id: of who wants it, for the message to others.
        patience_s: how long to wait for the ranks of a run that is gone, which save and leave by themselves.

    Raises:
        LeaseHeld: another run trains the very same stage in the same workspace.
    """
    attempts_dir.mkdir(parents=True, exist_ok=True)
    with (attempts_dir / LOCK_FILE).open("a+") as file:
        end = time.monotonic() + patience_s
        is_told = False
        while not take(file):
            holder, is_gone = describe_holder(read_holder(file))
            if not is_gone or time.monotonic() > end:
                raise LeaseHeld(
                    f"{attempts_dir.name} is being trained by {holder}. Wait, and its result is found; or stop it."
                )
            if not is_told:
                logger.info("%s: %s is gone, and its ranks still save; waiting for them.", attempts_dir.name, holder)
                is_told = True
            time.sleep(_POLL_S)
        write_holder(file, run_id)
        yield file.fileno()
