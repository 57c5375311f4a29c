"""A program that takes a stage's lease, saves and collects garbage until it is killed; tells what was acknowledged.

python killed_writer.py STORE_URI [NUM_STEPS]
"""

import random
import sys
import tempfile
from pathlib import Path

from stage_store import FINGERPRINT, choose_newest, write_files

from internvl_core.checkpoint.manifest import CheckpointKind
from internvl_core.checkpoint.store import Owner, StageStore

FILE_BYTES = 100_000


def make_contents(step: int) -> dict[str, bytes]:
    return {f"shard-{number}": random.Random(step * 10 + number).randbytes(FILE_BYTES) for number in range(4)}


def main(store_uri: str, num_steps: int) -> None:
    store = StageStore(store_uri, "stage", FINGERPRINT)
    lease = store.acquire(Owner.of_this_process("killed"), choose_base=choose_newest(store))
    first = lease.base.step + 1 if lease.base else 1
    print("from", first, flush=True)
    for step in range(first, first + num_steps):
        with tempfile.TemporaryDirectory() as folder:
            directory = write_files(Path(folder), make_contents(step))
            checkpoint = store.publish(
                directory, step=step, fence=lease.fence, kind=CheckpointKind.TRAINING, parent=None, info={}
            )
        print("acknowledged", step, flush=True)
        store.verify(checkpoint)
        lease.beat(step=step, phase="training")
        store.collect_garbage(lease.fence, keep=2)
    lease.release()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 1_000_000)
