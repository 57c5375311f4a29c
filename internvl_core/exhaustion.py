"""Recognise in an error of any library that the machine has run out of memory, or a disk of room.

Without torch, whose own errors are known by their words.
"""

import errno
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from internvl_core.errors import OutOfMemory

_OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory|std::bad_alloc|_ALLOC_FAILED")
_DISK_FULL = re.compile(r"No space left on device|Disk quota exceeded|\(os error (28|122)\)")
# torch 2.13: "[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534", whatever kept it from writing.
_CUT_SHORT = re.compile(r"inline_container\.cc|PytorchStreamWriter failed|iostream error")
_PROBE_BYTES = 1024 * 1024


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether an error is about memory, of the host or of a device."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError | OutOfMemory) or (
        isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(str(error)) is not None
    )


def is_disk_full(error: BaseException, folder: Path | None = None) -> bool:
    """Say whether an error is about room on a disk, or about a quota.

    Args:
        folder: what was written; torch does not tell why it could not write, so something else is written there.
    """
    for cause in _iter_causes(error):
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if _DISK_FULL.search(str(cause)):
            return True
    return folder is not None and _CUT_SHORT.search(str(error)) is not None and not _has_room(folder)


def _iter_causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)


def _has_room(folder: Path) -> bool:
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".room-") as file:
            file.write(os.urandom(_PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.errno not in (errno.ENOSPC, errno.EDQUOT)
    return True
