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

from internvl_core.checkpoint.manifest import CheckpointKind
from internvl_core.checkpoint.store import StageStore
from internvl_core.contract import CheckpointRef, write_json_atomically
from internvl_core.errors import CheckpointError, Fenced, StoreUnavailable

logger = logging.getLogger(__name__)

UNSENT_FOLDER = "unsent"

_VERSION = 1
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


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

    def find_committed(self, store: StageStore) -> CheckpointRef | None:
        """Find the commit of this very save, made by a try whose answer was lost; the fence is nobody else's."""
        for commit in store.list_committed():
            if (commit.step, commit.fence, commit.kind) == (self.step, self.fence, self.kind):
                return commit.checkpoint
        return None

    def publish(self, store: StageStore) -> CheckpointRef:
        """Commit the save, unless it is committed already.

        Raises:
            Fenced: another run has taken the stage over.
            StoreUnavailable, DiskFull: nothing is committed.
        """
        committed = self.find_committed(store)
        if committed is not None:
            return committed
        return store.publish(
            self.directory, step=self.step, fence=self.fence, kind=self.kind, parent=self.parent, info=self.info
        )

    def forget(self) -> None:
        """Remove the record: the store has the save, or nobody wants it any more."""
        self.record_path.unlink(missing_ok=True)


def publish_unsent(attempts_dir: Path, store: StageStore) -> None:
    """Send what attempts of a stage that are over left unsent on this machine, oldest first.

    Nothing is raised: what cannot be sent now stays where it is, and the log says why.

    Args:
        attempts_dir: of the stage, one directory for each attempt; no attempt may be running.
    """
    for save in _iter_unsent(attempts_dir):
        where = f"the save of step {save.step} ({save.kind}) in {save.directory}"
        try:
            checkpoint = save.publish(store)
            store.verify(checkpoint)
        except Fenced:
            logger.info("Not sent: %s. Another run has taken the stage over since.", where)
            save.forget()
        except StoreUnavailable as error:
            logger.warning("Not sent yet: %s. %s", where, error)
            return
        except CheckpointError as error:
            logger.warning("Not sent: %s. %s", where, error)
        else:
            logger.info("Sent what an earlier attempt left behind: step %d (%s)", save.step, save.kind)
            save.forget()
            shutil.rmtree(save.directory, ignore_errors=True)


def _iter_unsent(attempts_dir: Path) -> Iterator[UnsentSave]:
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


def read_boot_id() -> str:
    """Read what names this run of this machine's kernel; empty where there is no such thing."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return ""
