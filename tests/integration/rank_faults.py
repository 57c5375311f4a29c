"""Faults at an exact point of a real training: what happens, where, at which step or call, on which rank.

A test gives them to `stage_runs.launch(..., faults=[Fault(...)])`; the fake rank fakes/faulty_rank.py
carries them out inside the trainer. Nothing of a library is patched.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

START = "start"
CONTINUE_FILE = "continue"


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong, once."""

    action: str
    """raise, exit, hang, pause (until `let_go`), hold_gil, skip (only `package.module:name`), or a signal: SIGKILL."""
    at: str
    """start (connected, nothing imported yet), an event of TrainerCallback (on_step_end, after all other callbacks),
    or something of ours, just before it is called: package.module:function, package.module:Class.method. What a module
    has imported by name is replaced in that module: internvl_core.train.held_out:evaluate_held_out.
    """
    step: int | None = None
    """Only for events: the step that is finished (the trainer's global_step); None is the first time."""
    call: int = 1
    """Only for what is called: which call, from 1."""
    rank: int | None = None
    """None: every rank."""
    message: str = "a fault of the test"
    seconds: float = 600.0
    """Of hang and hold_gil."""

    def has_happened(self, attempt_dir: Path, rank: int) -> bool:
        return self.mark(attempt_dir, rank).exists()

    def mark(self, attempt_dir: Path, rank: int) -> Path:
        """Name the file that is made when the point is reached, just before the fault."""
        place = self.at.replace(":", ".")
        return attempt_dir / f"fault-{self.action}-{place}-rank-{rank}"


def let_go(attempt_dir: Path) -> None:
    """Let ranks that pause go on."""
    (attempt_dir / CONTINUE_FILE).touch()


def dump_faults(faults: Iterable[Fault]) -> str:
    return json.dumps([asdict(fault) for fault in faults])


def load_faults(text: str) -> list[Fault]:
    return [Fault(**fault) for fault in json.loads(text)]
