"""Send one attempt's saves to the store while its ranks train on: a process of its own, a child of rank 0.

    rank 0 ---- stdin: one path of an unsent save's record a line ----> uploader ----> store
           <--- stdout: one event a line, JSON ------------------------'

Hashing and a cloud SDK would hold the interpreter's lock that training needs, and a crash of either would end it.
The uploader also beats the lease, so that nobody takes the stage over while rank 0 is busy; end of file on
stdin ends it. Without torch.
"""

import argparse
import json
import logging
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from internvl_core.checkpoint.lease import Lease
from internvl_core.checkpoint.store import StageStore
from internvl_core.checkpoint.unsent import UnsentSave
from internvl_core.contract import METRICS_FILE
from internvl_core.errors import CheckpointError, Fenced, InternVLError
from internvl_core.supervision.stop_signals import STOP_SIGNALS

logger = logging.getLogger(__name__)

COMMITTED, VERIFIED, DONE, FAILED = "committed", "verified", "done", "failed"
"""The events of a save, in this order; `failed` at any time, also unasked when the lease is lost."""

BEAT_INTERVAL_S = 10.0
"""Nine times in the time after which a holder that is silent counts as gone."""

_TAIL_BYTES = 1 << 16


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve the saves of one fence until stdin ends."""
    parser = argparse.ArgumentParser(prog="python -m internvl_core.checkpoint.uploader", description=main.__doc__)
    parser.add_argument("--store", required=True, metavar="URI")
    parser.add_argument("--stage", required=True)
    parser.add_argument("--fingerprint", required=True)
    parser.add_argument("--fence", type=int, required=True)
    parser.add_argument("--keep", type=int, help="training checkpoints that stay in the store; left out: all")
    parser.add_argument("--attempt-dir", type=Path, required=True)
    options = parser.parse_args(arguments)
    for number in STOP_SIGNALS:
        # torchrun sends them to the whole group of rank 0, whose last save is still to go out.
        signal.signal(number, signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s [uploader] %(name)s: %(message)s")
    store = StageStore(options.store, options.stage, options.fingerprint)
    events = _Events()
    beat_arguments = (store, options.fence, options.attempt_dir / METRICS_FILE, events)
    threading.Thread(target=_beat, args=beat_arguments, daemon=True).start()
    for line in sys.stdin:
        for event, details in _send(store, Path(line.rstrip("\n")), keep=options.keep):
            events.tell(event, **details)
    return 0


class _Events:
    """Lines on stdout, each whole, from two threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def tell(self, event: str, **details: Any) -> None:
        with self._lock:
            sys.stdout.write(json.dumps({"event": event, **details}) + "\n")
            sys.stdout.flush()

    def tell_failure(self, error: BaseException) -> None:
        self.tell(FAILED, **_describe(error))


def _send(store: StageStore, record_path: Path, *, keep: int | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Publish a save, read it back, and make room in the store; yield what happens."""
    try:
        save = UnsentSave.load(record_path)
        started = time.monotonic()
        checkpoint = save.publish(store)
        committed_s = time.monotonic() - started
        yield COMMITTED, {"uri": checkpoint.uri, "digest": checkpoint.digest, "seconds": committed_s}
        store.verify(checkpoint)
        yield VERIFIED, {}
        _collect_garbage(store, save.fence, keep)
        yield DONE, {}
    except Exception as error:
        if not isinstance(error, CheckpointError):
            logger.exception("%s", record_path)
        yield FAILED, _describe(error)


def _collect_garbage(store: StageStore, fence: int, keep: int | None) -> None:
    try:
        report = store.collect_garbage(fence, keep=keep)
    except Fenced:
        raise
    except CheckpointError as error:
        # What is superseded is in nobody's way until the next save.
        logger.warning("What is superseded stays in the store for now: %s", error)
        return
    for name in report.removed:
        logger.info("Removed from the store, superseded: %s", name)


def _describe(error: BaseException) -> dict[str, str]:
    if isinstance(error, InternVLError):
        return {"error": type(error).__name__, "message": str(error)}
    return {"error": InternVLError.__name__, "message": f"The uploader failed: {type(error).__name__}: {error}"}


def _beat(store: StageStore, fence: int, metrics_path: Path, events: _Events) -> None:
    """Show that the holder is alive, and notice when it is the holder no more."""
    lease: Lease | None = None
    while True:
        try:
            lease = lease or store.open_lease(fence)
            lease.beat(step=_read_step(metrics_path), phase="at work")
            lease.check()
        except Fenced as error:
            events.tell_failure(error)
            return
        except (InternVLError, OSError) as error:
            # A store that is away for a while: the save says so if it lasts.
            logger.warning("No beat: %s", error)
        time.sleep(BEAT_INTERVAL_S)


def _read_step(metrics_path: Path) -> int | None:
    """Read the step of the last whole line; None before the first."""
    try:
        with metrics_path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - _TAIL_BYTES))
            lines = file.read().split(b"\n")[:-1]
        return int(json.loads(lines[-1])["step"]) if lines else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


if __name__ == "__main__":
    sys.exit(main())
