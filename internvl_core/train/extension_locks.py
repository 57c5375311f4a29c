"""Locks that killed ranks left beside torch's compiled extensions.

DeepSpeed compiles or loads an extension at the start of a run (`deepspeed_shm_comm` on a CPU, its Adam
where the optimizer is offloaded). torch 2.13 guards that by a file that is there while somebody
works, and waits for it to go away for ever. A rank that is killed in those seconds leaves the file, and no later
run on the machine would get past it. Whoever works has the file open; so one that nobody has open is
left over. A folder that several machines share needs TORCH_EXTENSIONS_DIR on a disk of each machine's own.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

logger = logging.getLogger(__name__)

LOCK_FILE = "lock"


def clear_left_locks(root: Path | None = None) -> list[Path]:
    """Remove the locks that no process of this machine has open.

    Args:
        root: folder of the extensions; None stands for torch's.

    Returns:
        What was removed.
    """
    locks = list((root or find_extensions_dir()).glob(f"**/{LOCK_FILE}"))
    if not locks:
        return []
    held = set(_iter_open_files())
    removed = []
    for path in locks:
        if str(path.resolve()) not in held:
            logger.warning("Removing %s: a run that was killed left it, and this one would wait for ever.", path)
            path.unlink(missing_ok=True)
            removed.append(path)
    return removed


def find_extensions_dir() -> Path:
    """Find the folder that torch compiles extensions below."""
    told = os.environ.get("TORCH_EXTENSIONS_DIR")
    if told is not None:
        return Path(told)
    from torch.utils.cpp_extension import get_default_build_root

    return Path(get_default_build_root())


def _iter_open_files() -> Iterator[str]:
    """Yield the paths that the processes of this machine have open, as far as we may look."""
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        with suppress(OSError):
            yield str(descriptor.readlink())
