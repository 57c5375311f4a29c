"""Saves on their way to the store while training goes on: the queue that rank 0 fills and waits for.

A save is unsent until the store's copy of it is verified; until then its local directory stays. A store that
fails is tried again with growing pauses. When it has failed without a break for longer than it is borne, or in a
way that no try helps, the error waits for `check`, which the training loop calls at each step.
"""

import logging
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from internvl_core.checkpoint.unsent import UnsentSave
from internvl_core.checkpoint.uploader import COMMITTED, VERIFIED
from internvl_core.contract import CheckpointRef
from internvl_core.errors import CheckpointCorrupt, DiskFull, InternVLError, StoreUnavailable
from internvl_core.train.uploader_process import UploaderProcess

logger = logging.getLogger(__name__)

# Time or a person may help: an outage ends, what was read wrong is read right, somebody makes room.
_BORNE = (StoreUnavailable, CheckpointCorrupt, DiskFull)
_SLOWEST_BYTES_PER_S = 2e6
"""A store that takes less in a second, sent and read back, is not there."""
_FIRST_PAUSE_S = 1.0
_LONGEST_PAUSE_S = 60.0
_CLOSE_PATIENCE_S = 5.0


@dataclass(frozen=True)
class UploadLimits:
    """How long training bears with a store."""

    max_unsent: int
    """Saves that may wait while training goes on."""
    patience_s: float
    """How long the store may fail without a break."""


class Uploads:
    """The saves of one attempt, in the order in which they were made."""

    def __init__(
        self, command: Sequence[str], limits: UploadLimits, *, on_verified: Callable[[UnsentSave, CheckpointRef], None]
    ) -> None:
        """Start the process that sends them.

        Args:
            command: runs `checkpoint/uploader.py`.
            limits: after which the store is given up.
            on_verified: told, in another thread, when a save's copy is verified: its local directory may go.
        """
        self._limits = limits
        self._on_verified = on_verified
        self._changed = threading.Condition()
        self._queue: list[UnsentSave] = []
        self._committed: dict[Path, CheckpointRef] = {}
        self._error: InternVLError | None = None
        self._failing_since: float | None = None
        self._num_failures = 0
        self._last_failure = ""
        self._closing = threading.Event()
        self._process = UploaderProcess(command, on_fenced=self._give_up, on_end=self._wake)
        self._thread = threading.Thread(target=self._run, name="uploads", daemon=True)
        self._thread.start()

    @property
    def pid(self) -> int:
        """Of the process that sends."""
        return self._process.pid

    @property
    def num_unsent(self) -> int:
        return len(self._queue)

    @property
    def has_room(self) -> bool:
        """Whether one more save may wait."""
        return len(self._queue) < self._limits.max_unsent

    @property
    def are_committed(self) -> bool:
        """Whether all saves have their commit record, verified or not."""
        with self._changed:
            return all(save.record_path in self._committed for save in self._queue)

    def submit(self, save: UnsentSave) -> None:
        """Queue a save; returns at once."""
        with self._changed:
            self._queue.append(save)
            self._changed.notify_all()

    def check(self) -> None:
        """Raise what ended the uploads for good, if anything did."""
        if self._error is not None:
            raise self._error

    def wait(self, is_reached: Callable[[], bool], timeout_s: float) -> bool:
        """Wait until something that the queue decides is true; say whether it is.

        Raises:
            StoreUnavailable, DiskFull, Fenced: it never will be.
        """
        with self._changed:
            is_over = self._changed.wait_for(lambda: self._error is not None or is_reached(), timeout_s)
        self.check()
        return is_over

    def find_committed(self, save: UnsentSave) -> CheckpointRef | None:
        """Find what a save became; None while it is not committed."""
        return self._committed.get(save.record_path)

    def describe_backlog(self) -> str:
        """Say what waits and why."""
        steps = ", ".join(str(save.step) for save in self._queue) or "none"
        cause = f" The store fails: {self._last_failure}" if self._failing_since is not None else ""
        return f"Saved and not in the store yet: step {steps}.{cause}"

    def close(self) -> None:
        """End the process; what is unsent stays on the disk, with its record."""
        self._closing.set()
        with self._changed:
            self._changed.notify_all()
        self._process.close()
        # It may wait for what hangs; it is a daemon.
        self._thread.join(_CLOSE_PATIENCE_S)

    def _run(self) -> None:
        while (save := self._take()) is not None:
            began = time.monotonic()
            try:
                for event in self._process.send(save.record_path, limit_s=self._find_limit(save)):
                    self._advance(save, event)
            except InternVLError as error:
                if save.record_path.exists() and not self._closing.is_set():
                    self._bear(save, error, began)
                self._restart()
            except Exception as error:  # noqa: BLE001  this thread's outermost frame: whoever waits for it must hear
                self._give_up(InternVLError(f"The uploads ended: {type(error).__name__}: {error}"))
            if not save.record_path.exists():
                with self._changed:
                    self._failing_since, self._num_failures = None, 0
                    self._queue.remove(save)
                    self._changed.notify_all()

    def _take(self) -> UnsentSave | None:
        """Wait for the next save; None when no more will be sent. Meanwhile see that somebody beats the lease."""
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._queue or self._closing.is_set() or self._error is not None or self._process.is_gone
                )
                if self._closing.is_set() or self._error is not None:
                    return None
                if self._queue:
                    return self._queue[0]
            # One that dies at once is not to be started as often as can be.
            self._closing.wait(_FIRST_PAUSE_S)
            self._restart()

    def _restart(self) -> None:
        try:
            self._process.restart()
        except OSError as error:
            self._give_up(InternVLError(f"The uploader cannot be started: {error}"))

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _find_limit(self, save: UnsentSave) -> float:
        """Find how many seconds a save may take that is sent, read back, and not alone on a slow line."""
        size_bytes = sum(path.stat().st_size for path in save.directory.rglob("*") if path.is_file())
        return self._limits.patience_s + size_bytes / _SLOWEST_BYTES_PER_S

    def _advance(self, save: UnsentSave, event: dict[str, Any]) -> None:
        if event["event"] == COMMITTED:
            checkpoint = CheckpointRef(event["uri"], event["digest"])
            logger.info("Committed step %d (%s) in %.1f s: %s", save.step, save.kind, event["seconds"], checkpoint.uri)
            with self._changed:
                self._committed[save.record_path] = checkpoint
                self._changed.notify_all()
        elif event["event"] == VERIFIED:
            save.forget()
            self._on_verified(save, self._committed[save.record_path])

    def _bear(self, save: UnsentSave, error: InternVLError, began: float) -> None:
        """Pause before the next try, or give up; the try that failed counts from its beginning."""
        now = time.monotonic()
        self._failing_since = self._failing_since or began
        self._num_failures += 1
        self._last_failure = str(error)
        failing_s = now - self._failing_since
        if not isinstance(error, _BORNE):
            self._give_up(error)
        elif failing_s >= self._limits.patience_s:
            self._give_up(
                type(error)(
                    f"Step {save.step} could not be stored for {failing_s:.0f} s, in {self._num_failures} tries: "
                    f"{error} Nothing is lost: what is unsent waits in {save.directory.parent}, and the next run of "
                    "this stage on this machine sends it."
                )
            )
        else:
            # Half of it drawn, so that runs that lost the same store do not come back at the same moment.
            longest_s = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2 ** (self._num_failures - 1))
            pause_s = min(random.uniform(0.5, 1) * longest_s, self._limits.patience_s - failing_s)  # noqa: S311
            logger.warning("Step %d is not in the store yet, next try in %.0f s: %s", save.step, pause_s, error)
            self._closing.wait(pause_s)

    def _give_up(self, error: InternVLError) -> None:
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()
