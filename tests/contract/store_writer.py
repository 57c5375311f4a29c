"""A program that takes a stage's lease, saves and collects garbage until it is killed; tells what was acknowledged.

    python store_writer.py STORE_URI [--steps N] [--hand-over] [--host NAME] [--die-at OPERATION:PREFIX:before|after]

It outwaits a store that is not there, and ends with the exit code of any other error.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

from stage_store import FINGERPRINT, choose_newest, make_owner, write_files

from internvl_core.checkpoint.manifest import CheckpointKind
from internvl_core.checkpoint.store import Lease, Owner, StageStore
from internvl_core.contract import CheckpointRef
from internvl_core.errors import CheckpointError, StoreUnavailable

FILE_BYTES = 100_000
STAGE = "stage"


def make_contents(step: int) -> dict[str, bytes]:
    return {f"shard-{number}": random.Random(step * 10 + number).randbytes(FILE_BYTES) for number in range(4)}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("store_uri")
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--hand-over", action="store_true")
    parser.add_argument("--host")
    parser.add_argument("--die-at")
    options = parser.parse_args()
    store = StageStore(options.store_uri, STAGE, FINGERPRINT)
    if options.die_at:
        die_at(store, *options.die_at.split(":"))
    owner = make_owner("writer", options.host) if options.host else Owner.of_this_process("writer")
    try:
        lease = store.acquire(owner, choose_base=choose_newest(store))
        train(store, lease, options.steps, hands_over=options.hand_over)
    except CheckpointError as error:
        print(type(error).__name__, error, flush=True)
        return error.exit_code
    return 0


def train(store: StageStore, lease: Lease, num_steps: int, *, hands_over: bool) -> None:
    first = lease.base.step + 1 if lease.base else 1
    print("from", first, flush=True)
    for step in range(first, first + num_steps):
        checkpoint = save(store, lease, step, CheckpointKind.TRAINING)
        print("acknowledged", step, flush=True)
        try:
            lease.beat(step=step, phase="training")
            store.verify(checkpoint)
            store.collect_garbage(lease.fence, keep=2)
        except StoreUnavailable as error:
            print("later:", error, flush=True)
    if hands_over:
        final = save(store, lease, first + num_steps - 1, CheckpointKind.FINAL)
        store.hand_over(final, {"accuracy": 1.0}, fence=lease.fence)
        print("handed over", flush=True)
    lease.release()


def save(store: StageStore, lease: Lease, step: int, kind: CheckpointKind) -> CheckpointRef:
    with tempfile.TemporaryDirectory() as folder:
        directory = write_files(Path(folder), make_contents(step))
        while True:
            try:
                return store.publish(directory, step=step, fence=lease.fence, kind=kind, parent=None, info={})
            except StoreUnavailable as error:
                print("waiting:", error, flush=True)
                time.sleep(0.2)


def die_at(store: StageStore, operation: str, prefix: str, when: str) -> None:
    """Be killed right before, or after, the first operation on a name with a prefix."""
    run = getattr(store._backend, operation)

    def run_and_die(name: str, *arguments: object) -> object:
        if not name.startswith(prefix):
            return run(name, *arguments)
        if when == "after":
            run(name, *arguments)
        os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError("never reached")

    setattr(store._backend, operation, run_and_die)


if __name__ == "__main__":
    sys.exit(main())
