"""A rank without torch: works until it is asked to stop, saves for a while, says that it is preempted."""

import argparse
import ctypes
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

from internvl_core.contract import STATE_FILE, StageFailure
from internvl_core.errors import Preempted
from internvl_core.supervision.progress import Phase
from internvl_core.train.supervisor_link import SupervisorLink

POLL_S = 0.02
DATA_WORKER = "import signal; signal.pause()"


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--attempt_dir", type=Path, required=True)
    parser.add_argument("--save_s", type=float, default=0.0)
    parser.add_argument("--late_rank", type=int, help="connects only when the stop was asked for")
    parser.add_argument("--never_connect", action="store_true")
    parser.add_argument("--phase", default="step", help="what it is at, and stays at if that is not step")
    parser.add_argument("--lockstep", action="store_true", help="makes steps, each of which needs the other ranks")
    parser.add_argument("--hold_gil_rank", type=int, help="holds its GIL for ever at step 3")
    parser.add_argument("--use_memory_rank", type=int, help="uses memory without end")
    parser.add_argument("--cgroup", type=Path, help="where that one goes before it connects")
    parser.add_argument("--fail_rank", type=int, help="writes failure.json and stays")
    options = parser.parse_args()
    rank = int(os.environ["RANK"])
    directory: Path = options.attempt_dir

    print(f"rank {rank} starts", flush=True)
    subprocess.Popen([sys.executable, "-c", DATA_WORKER])
    if options.late_rank == rank:
        announce(directory / f"rank-{rank}.pid")
        wait_for(lambda: '"stopping"' in (directory / STATE_FILE).read_text())
    if options.never_connect:
        announce(directory / f"rank-{rank}.pid")
        signal.pause()
    if options.use_memory_rank == rank:
        (options.cgroup / "cgroup.procs").write_text(str(os.getpid()))
    link = SupervisorLink.connect()
    link.hear_signals()
    link.tell(Phase(options.phase), 7 if options.phase == "step" else None)
    announce(directory / f"rank-{rank}.pid")
    if options.fail_rank == rank:
        StageFailure(error="NonFinite", message="loss is nan", rank=rank).write_first(directory)
        signal.pause()
    if options.use_memory_rank == rank:
        use_memory()
    if options.lockstep:
        make_steps(link, rank, options)
    wait_for(lambda: link.is_set)
    if options.phase != "step":
        signal.pause()
    link.tell(Phase.SAVE, 7)

    end = time.monotonic() + options.save_s
    wait_for(lambda: time.monotonic() >= end)
    announce(directory / f"rank-{rank}.saved")
    wait_for(lambda: len(list(directory.glob("*.saved"))) == int(os.environ["WORLD_SIZE"]))
    if rank == 0:
        StageFailure.from_exception(Preempted("Stopped at step 7, committed."), rank=rank).write_first(directory)
    link.leave()
    return Preempted.exit_code


def make_steps(link: SupervisorLink, rank: int, options: argparse.Namespace) -> None:
    step = 0
    while not link.is_set:
        step += 1
        (options.attempt_dir / f"rank-{rank}.step-{step}").touch()
        link.tell(Phase.STEP, step)
        if options.hold_gil_rank == rank and step == 3:
            hold_gil()
        wait_for(partial(has_others, link, options.attempt_dir, step))


def has_others(link: SupervisorLink, directory: Path, step: int) -> bool:
    return link.is_set or len(list(directory.glob(f"*.step-{step}"))) == int(os.environ["WORLD_SIZE"])


def hold_gil() -> None:
    while True:
        # PyDLL does not let go of the GIL around the call. A signal ends the sleep.
        ctypes.PyDLL(None).sleep(600)


def use_memory() -> None:
    held = []
    while True:
        held.append(bytearray(b"x") * (1 << 20))


def announce(path: Path) -> None:
    temporary = path.with_suffix(".writing")
    temporary.write_text(str(os.getpid()))
    temporary.rename(path)


def wait_for(condition) -> None:
    while not condition():
        time.sleep(POLL_S)


if __name__ == "__main__":
    sys.exit(main())
