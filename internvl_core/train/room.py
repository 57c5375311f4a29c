"""Room on the disk, asked for before a save is begun: a save that cannot end must not begin."""

import shutil
from pathlib import Path

from torch import nn

from internvl_core.errors import DiskFull
from internvl_core.model.trainable import count_parameters, count_trainable

_MARGIN = 1.05
"""Over the last save: metrics and the ledger grow."""
_RESERVE_BYTES = 64 << 20
"""For logs, indexes and whoever else writes there."""
_MOMENTS_BYTES = 8
"""Of Adam, per parameter that learns, in float32."""
_MASTER_BYTES = 4
"""Of DeepSpeed's own float32 copy of a parameter that learns."""


def estimate_weights_bytes(model: nn.Module) -> int:
    """Estimate the size of all weights."""
    return count_parameters(model) * next(model.parameters()).element_size()


def estimate_checkpoint_bytes(model: nn.Module, *, has_adapters: bool, has_masters: bool) -> int:
    """Estimate the size of a training checkpoint before the first one is written.

    Args:
        has_adapters: only what learns is saved.
        has_masters: DeepSpeed trains.
    """
    num_trainable = count_trainable(model)
    num_saved = num_trainable if has_adapters else count_parameters(model)
    width_bytes = next(model.parameters()).element_size()
    return num_saved * width_bytes + num_trainable * (_MOMENTS_BYTES + (_MASTER_BYTES if has_masters else 0))


class DiskRoom:
    """Whether the next checkpoint fits where checkpoints are written."""

    def __init__(self, directory: Path, *, size_bytes: int) -> None:
        """Begin with an estimate.

        Args:
            directory: on the disk in question; exists.
            size_bytes: of a checkpoint, until one is measured.
        """
        self._directory = directory
        self._size_bytes = size_bytes

    def measure(self, checkpoint_dir: Path) -> None:
        """Take the size of a checkpoint that was written as that of the next one."""
        self._size_bytes = sum(path.stat().st_size for path in checkpoint_dir.rglob("*") if path.is_file())

    def is_enough(self, size_bytes: int | None = None) -> bool:
        """Tell whether so much fits; None: as much as a training checkpoint."""
        return self._free_bytes >= self._find_needed_bytes(size_bytes)

    def check(self, step: int, size_bytes: int | None = None) -> None:
        """Refuse to save.

        Raises:
            DiskFull: says how much is needed, and how much there is.
        """
        if not self.is_enough(size_bytes):
            needed = _to_gib(self._find_needed_bytes(size_bytes))
            raise DiskFull(
                f"{self._directory}: a checkpoint of step {step} needs about {needed}, free are "
                f"{_to_gib(self._free_bytes)}. Nothing was written; the checkpoints before it are whole. Make room, or "
                "give the recipe a workspace on a larger disk, and run again."
            )

    def _find_needed_bytes(self, size_bytes: int | None) -> int:
        return int((self._size_bytes if size_bytes is None else size_bytes) * _MARGIN) + _RESERVE_BYTES

    @property
    def _free_bytes(self) -> int:
        return shutil.disk_usage(self._directory).free


def _to_gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
