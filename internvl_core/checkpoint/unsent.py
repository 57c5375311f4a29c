"""Saves that lie on this machine and are not in the store yet: one small record each, in the attempt's directory.

A record appears when every rank has written its part, and goes when the store's copy is verified; until then the
save is nobody's to remove. Whoever finds records of an attempt that is over, sends them in its name.
"""

import json
import logging
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from internvl_core.checkpoint.fetch import adopt
from internvl_core.checkpoint.lease import read_boot_id
from internvl_core.checkpoint.manifest import CheckpointKind
from internvl_core.checkpoint.store import StageStore
from internvl_core.contract import CheckpointRef, write_json_atomically
from internvl_core.errors import DiskFull, Fenced, InternVLError, StoreUnavailable

logger = logging.getLogger(__name__)

UNSENT_FOLDER = "unsent"

_VERSION = 1


@dataclass(frozen=True)
class UnsentSave:
    """A whole save in a local directory, and all that its commit needs."""

    directory: Path
    step: int
    fence: int
    kind: CheckpointKind
    parent: CheckpointRef | None
    info: dict[str, Any]
    boot_id: str
    """Of the machine's run in which it was written: what was not synced does not outlive a power cut."""
    record_path: Path

    @classmethod
    def note(
        cls,
        attempt_dir: Path,
        directory: Path,
        *,
        step: int,
        fence: int,
        kind: CheckpointKind,
        parent: CheckpointRef | None,
        info: dict[str, Any],
    ) -> Self:
        """Write the record of a save that is complete."""
        folder = attempt_dir / UNSENT_FOLDER
        folder.mkdir(exist_ok=True)
        path = folder / f"{step:012d}.{kind}.json"
        save = cls(directory.absolute(), step, fence, kind, parent, info, read_boot_id(), path)
        content = {name: value for name, value in asdict(save).items() if name != "record_path"}
        write_json_atomically(path, {"version": _VERSION, **content, "directory": str(save.directory)})
        return save

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a record; KeyError, TypeError or ValueError for what is none."""
        content = json.loads(path.read_text())
        if content.pop("version") != _VERSION:
            raise ValueError("another version")
        parent = content.pop("parent")
        return cls(
            directory=Path(content.pop("directory")),
            kind=CheckpointKind(content.pop("kind")),
            parent=CheckpointRef(**parent) if parent else None,
            record_path=path,
            **content,
        )

    def publish(self, store: StageStore) -> CheckpointRef:
        """Commit the save, unless a try whose answer was lost has done so; the fence is nobody else's.

        Raises:
            Fenced: another run has taken the stage over.
            StoreUnavailable, DiskFull: nothing is committed.
        """
        committed = store.find_commit(self.step, self.fence, self.kind)
        if committed is not None:
            return committed
        # Before hours of sending, and not only behind them.
        store.open_lease(self.fence).check()
        return store.publish(
            self.directory, step=self.step, fence=self.fence, kind=self.kind, parent=self.parent, info=self.info
        )

    def forget(self) -> None:
        """Remove the record: the store has the save, or nobody wants it any more."""
        self.record_path.unlink(missing_ok=True)


def publish_unsent(
    attempts_dir: Path, store: StageStore, *, cache_dir: Path, run_id: str | None = None, must_send: bool = False
) -> None:
    """Send what attempts of a stage that are over left unsent on this machine, oldest first.

    Args:
        attempts_dir: of the stage, one directory for each attempt; no attempt may be running.
        cache_dir: where the newest stays for whoever resumes from it here.
        run_id: only what this run left; None: any run's.
        must_send: raise what keeps a save from being sent now but may not later. Otherwise it is logged: an attempt
            that begins in spite of it takes a lease that no longer knows the save.

    Raises:
        StoreUnavailable, DiskFull: a save could not be sent, and must be; it stays where it is.
    """
    for save in _iter_unsent(attempts_dir, store):
        if run_id is not None and save.info.get("run_id") != run_id:
            continue
        where = f"the save of step {save.step} ({save.kind}) in {save.directory}"
        try:
            checkpoint = save.publish(store)
            store.verify(checkpoint)
            save.forget()
            adopt(save.directory, checkpoint, cache_dir)
        except Fenced:
            logger.info("Removed, for another run has taken the stage over since: %s", where)
            _remove(save)
        except (StoreUnavailable, DiskFull) as error:
            if must_send:
                raise
            logger.warning("Not sent yet: %s. %s", where, error)
            return
        except (InternVLError, OSError) as error:
            logger.warning("Not sent: %s. %s", where, error)
        else:
            logger.info("Sent what an earlier attempt left behind: step %d (%s)", save.step, save.kind)


def _iter_unsent(attempts_dir: Path, store: StageStore) -> Iterator[UnsentSave]:
    boot_id = read_boot_id()
    for path in sorted(attempts_dir.glob(f"*/{UNSENT_FOLDER}/*.json"), key=lambda path: path.name):
        try:
            save = UnsentSave.load(path)
        except (ValueError, KeyError, TypeError) as error:
            logger.warning("%s: not the record of a save: %s. Left alone.", path, error)
            continue
        if not save.directory.is_dir():
            save.forget()
        elif save.boot_id == boot_id:
            yield save
        elif any(commit.step >= save.step for commit in store.list_committed()):
            logger.info("Removed, of before the machine restarted, and superseded: %s", save.directory)
            _remove(save)
        else:
            logger.warning("Left alone, for it may not be whole since the machine restarted: %s", save.directory)


def _remove(save: UnsentSave) -> None:
    save.forget()
    shutil.rmtree(save.directory, ignore_errors=True)
