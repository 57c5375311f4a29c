"""Keep a run off GPUs that the ranks of a run that is gone have not left yet."""

import fcntl
import logging
import os
import stat
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from pathlib import Path

from internvl_core.errors import LeaseHeld
from tasks.holder import describe_holder, read_holder, take, write_holder

_POLL_S = 0.2
_VISIBLE_GPUS = "CUDA_VISIBLE_DEVICES"

logger = logging.getLogger(__name__)


def find_gpus(num_ranks: int, *, devices_dir: Path = Path("/dev")) -> list[str]:
    """Name the GPUs that so many ranks would take, by their numbers or as CUDA_VISIBLE_DEVICES does; may be none."""
    devices = sorted(int(path.name.removeprefix("nvidia")) for path in devices_dir.glob("nvidia[0-9]*"))
    visible = os.environ.get(_VISIBLE_GPUS)
    names = [str(number) for number in devices] if visible is None else visible.split(",")
    return [name.strip() for name in names if name.strip()][:num_ranks] if devices else []


@contextmanager
def hold_gpus(
    gpus: Sequence[str],
    run_id: str,
    *,
    patience_s: float,
    directory: Path | None = None,
    check: Callable[[], None] = lambda: None,
) -> Iterator[list[int]]:
    """Wait for the GPUs on which a run that is gone still saves, and say that this run trains on them.

    A worker whose flow was cancelled takes the next one, of whatever recipe, while a supervisor may still see to the
    save of the last. Runs that are alive are not waited for: whoever starts two on one GPU may. Yields the descriptor
    of its lock, for the supervisor to inherit as that of `hold_stage`; none where there is nothing to hold.

    Args:
        gpus: their names; none: nothing is held.
        run_id: of who wants them.
        patience_s: how long others, if this run is gone, wait for its ranks.
        directory: of the locks, one for all workspaces of this user; for tests.
        check: called while it waits; what it raises ends that.

    Raises:
        LeaseHeld: they were not free in the time that the other run gave itself.
    """
    if not gpus:
        yield []
        return
    # Not XDG_RUNTIME_DIR: a login shell has one, a worker that is a system service has none.
    directory = directory or Path(tempfile.gettempdir()) / f"internvl-gpus-{os.getuid()}"
    if not _is_own(directory):
        logger.warning("%s is not this user's own folder: other runs on GPUs are not waited for.", directory)
        yield []
        return
    for path in sorted(directory.glob("*.json")):
        # Another run may just have removed it.
        with suppress(FileNotFoundError), path.open("r+") as file:
            if _await_left(file, set(gpus), check):
                path.unlink(missing_ok=True)
    path = directory / f"{uuid.uuid4().hex}.new"
    with path.open("x+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        write_holder(file, run_id, gpus=list(gpus), patience_s=patience_s)
        # Others look at what is locked and whole: what nobody locks they remove.
        path.rename(path.with_suffix(".json"))
        yield [file.fileno()]


def _is_own(directory: Path) -> bool:
    """Make the folder if need be; tell whether nobody else can write into it."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = directory.lstat()
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o022


def _await_left(file: TextIOWrapper, gpus: set[str], check: Callable[[], None]) -> bool:
    """Wait until a run has left its GPUs, if it is gone and they are among these; tell whether it has."""
    began = time.monotonic()
    is_told = False
    while not take(file):
        check()
        content = read_holder(file)
        holder, is_gone = describe_holder(content)
        shared = gpus & set(content["gpus"]) if content else set()
        if content is None or not is_gone or not shared:
            return False
        where = f"GPU {', '.join(sorted(shared))}"
        if time.monotonic() - began > content["patience_s"]:
            raise LeaseHeld(f"{where}: the ranks of {holder} have not left. Look for them, and end them.")
        if not is_told:
            logger.warning("%s: %s is gone, and its ranks still save; waiting for them.", where, holder)
            is_told = True
        time.sleep(_POLL_S)
    return True
