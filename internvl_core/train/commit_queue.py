"""Training checkpoints between the disk and where they are committed, as rank 0 hands them over."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from internvl_core.checkpoint.manifest import CheckpointKind
from internvl_core.train.ledger import SampleLedger
from internvl_core.train.local_saves import LocalSaves
from internvl_core.train.room import DiskRoom
from internvl_core.train.sampler import StepSampler

logger = logging.getLogger(__name__)

WAIT_S = 5.0
"""How long rank 0 waits at a time; the other ranks wait in a collective meanwhile."""


class Commits(Protocol):
    """What commits checkpoints."""

    def check(self) -> None:
        """Raise what keeps checkpoints from ever being committed."""

    def wait_for_room(self, has_room_on_disk: Callable[[], bool], timeout_s: float) -> bool:
        """Wait until one more save may be made, as far as it will be."""
        ...

    def drop_cached(self) -> None:
        """Make room on the disk by what can be had from the store again."""

    def describe_backlog(self) -> str:
        """Say what is waited for."""
        ...

    def submit(
        self, directory: Path, step: int, kind: CheckpointKind, counters: Mapping[str, int] | None = None
    ) -> object:
        """Take a complete directory."""
        ...


class CommitQueue:
    """Completes what Trainer saved with what it knows nothing of, and has it committed."""

    def __init__(
        self,
        commits: Commits,
        room: DiskRoom,
        ledger: SampleLedger,
        sampler: StepSampler,
        *,
        saves_dir: Path,
        note_base: Callable[[Path], None],
    ) -> None:
        """Begin with an empty queue.

        Args:
            commits: of a stage that is acquired.
            room: on the disk where checkpoints are written.
            saves_dir: where Trainer writes them.
            note_base: writes into an adapter's folder what it belongs to.
        """
        self._commits = commits
        self._room = room
        self._ledger = ledger
        self._sampler = sampler
        self._saves_dir = saves_dir
        self._note_base = note_base
        self._told_step: int | None = None

    def check(self) -> None:
        """Raise what keeps checkpoints from ever being committed."""
        self._commits.check()

    def has_room(self, step: int, *, size_bytes: int | None = None) -> bool:
        """Wait a few seconds until one more may be written.

        Args:
            size_bytes: of what is to be written; None: of a training checkpoint.

        Raises:
            DiskFull: there is no room, and nothing is left to be sent.
            StoreUnavailable: the store failed for too long.
        """
        # The first time only a look: the other ranks wait already.
        timeout_s = WAIT_S if self._told_step == step else 0
        if not self._commits.wait_for_room(lambda: self._room.is_enough(size_bytes), timeout_s):
            if self._told_step != step:
                logger.warning("Step %d waits to be saved. %s", step, self._commits.describe_backlog())
                self._told_step = step
            return False
        if not self._room.is_enough(size_bytes):
            self._commits.drop_cached()
        self._room.check(step, size_bytes)
        return True

    def submit(self, step: int) -> None:
        """Take the checkpoint of a step that every rank has written."""
        directory = self._saves_dir / f"checkpoint-{step}"
        with LocalSaves().writing(directory, is_begun=True):
            self._ledger.save(directory)
            self._sampler.save(directory, step)
            self._note_base(directory)
        self._room.measure(directory)
        self._commits.submit(directory, step, CheckpointKind.TRAINING)
