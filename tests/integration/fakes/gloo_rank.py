"""A rank under real torchrun: agrees with the others, over gloo, on the step at which all stop and save."""

import json
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from internvl_core.contract import StageFailure
from internvl_core.errors import Preempted
from internvl_core.supervision.progress import Phase
from internvl_core.train.supervisor_link import SupervisorLink

STEP_S = 0.05


def main() -> int:
    options = dict(item.removeprefix("--").split("=", 1) for item in sys.argv[1:])
    directory = Path(options["attempt_dir"])
    link = SupervisorLink.connect()
    link.hear_signals()
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    step = 0
    while True:
        wishes = torch.tensor([float(link.is_set)])
        dist.all_reduce(wishes)
        if wishes.item() > 0:
            break
        step += 1
        link.tell(Phase.STEP, step)
        (directory / f"rank-{rank}.pid").touch()
        time.sleep(STEP_S)
    link.tell(Phase.SAVE, step)
    (directory / f"rank-{rank}.saved").write_text(json.dumps({"step": step, "argv": sys.argv[1:]}))
    dist.barrier()
    if rank == 0:
        StageFailure.from_exception(Preempted(f"Stopped at step {step}, committed."), rank=0).write_first(directory)
    dist.destroy_process_group()
    link.leave()
    return Preempted.exit_code


if __name__ == "__main__":
    sys.exit(main())
