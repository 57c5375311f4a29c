"""A rank that waits at each save until the store has the checkpoint and has read it back."""

import time

from internvl_core.train.commit_queue import WAIT_S, CommitQueue
from internvl_core.train.entry import main
from internvl_core.train.supervisor_link import SupervisorLink

submit = CommitQueue.submit


def submit_and_wait(queue: CommitQueue, step: int) -> None:
    submit(queue, step)
    uploads = queue._commits.uploads
    while not uploads.wait(lambda: uploads.num_unsent == 0, WAIT_S):
        pass


if __name__ == "__main__":
    CommitQueue.submit = submit_and_wait
    link = SupervisorLink.connect()
    link.hear_signals()
    main("finetune", link, time.monotonic())
