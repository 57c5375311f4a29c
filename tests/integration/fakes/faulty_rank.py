"""A rank of our own trainer to which something happens at an exact point (rank_faults.py).

Usage under torchrun: faulty_rank.py ENTRY FAULTS --key=value ... with FAULTS as `dump_faults` writes them.
"""

import ctypes
import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from rank_faults import CONTINUE_FILE, START, Fault, load_faults

from internvl_core.train.supervisor_link import SupervisorLink

RANK = int(os.environ.get("RANK", "0"))
POLL_S = 0.02


def carry_out(fault: Fault) -> None:
    """Let it happen; the file that says so is there before."""
    attempt_dir = find_attempt_dir()
    fault.mark(attempt_dir, RANK).touch()
    match fault.action:
        case "raise":
            raise RuntimeError(fault.message)
        case "exit":
            os._exit(1)
        case "hang":
            end = time.monotonic() + fault.seconds
            while time.monotonic() < end:
                time.sleep(POLL_S)
        case "pause":
            while not (attempt_dir / CONTINUE_FILE).exists():
                time.sleep(POLL_S)
        case "hold_gil":
            # PyDLL does not let go of the GIL around the call.
            ctypes.PyDLL(None).sleep(int(fault.seconds))
        case "skip":
            pass
        case _:
            os.kill(os.getpid(), signal.Signals[fault.action])


def find_attempt_dir() -> Path:
    prefix = "--attempt_dir="
    return Path(next(item.removeprefix(prefix) for item in sys.argv if item.startswith(prefix)))


def hook_call(fault: Fault) -> None:
    """Replace something of ours by itself with the fault before it."""
    module_name, _, path = fault.at.partition(":")
    *parents, name = path.split(".")
    owner: Any = importlib.import_module(module_name)
    for parent in parents:
        owner = getattr(owner, parent)
    original: Callable[..., Any] = getattr(owner, name)
    num_calls = 0

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal num_calls
        num_calls += 1
        if num_calls == fault.call:
            carry_out(fault)
            if fault.action == "skip":
                return None
        return original(*args, **kwargs)

    setattr(owner, name, call)


def record_samples() -> None:
    """Write down which samples this rank trains on, a line a batch: the steps done before it, and their ids."""
    from internvl_core.train.ledger import SampleLedger

    original = SampleLedger.record
    path = find_attempt_dir() / f"trained-{RANK}.jsonl"

    def record(self: Any, sample_ids: Any, bad_samples: Any, *, step: int) -> None:
        with path.open("a") as file:
            file.write(json.dumps([step, list(sample_ids)]) + "\n")
        original(self, sample_ids, bad_samples, step=step)

    SampleLedger.record = record


def hook_events(faults: list[Fault]) -> None:
    from transformers import TrainerCallback

    from internvl_core.train import run

    class FaultCallback(TrainerCallback):
        """Carries out one fault at one event."""

        def __init__(self, fault: Fault) -> None:
            self._has_happened = False

            def happen(args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                if not self._has_happened and fault.step in (None, state.global_step):
                    self._has_happened = True
                    carry_out(fault)

            setattr(self, fault.at, happen)

    class FaultyTrainer(run.InternVLTrainer):
        """The trainer, with the faults behind all other callbacks."""

        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            for fault in faults:
                self.add_callback(FaultCallback(fault))

    run.InternVLTrainer = FaultyTrainer


def main() -> None:
    started = time.monotonic()
    entry, faults = sys.argv.pop(1), load_faults(sys.argv.pop(1))
    link = SupervisorLink.connect()
    link.hear_signals()
    mine = [fault for fault in faults if fault.rank in (None, RANK)]
    for fault in mine:
        if fault.at == START:
            carry_out(fault)

    from internvl_core.train.entry import main

    record_samples()
    for fault in mine:
        if ":" in fault.at:
            hook_call(fault)
    hook_events([fault for fault in mine if fault.at.startswith("on_")])
    main(entry, link, started)


if __name__ == "__main__":
    main()
