"""The process boundary: the files through which a task and its trainer meet.

They live in the attempt's directory and carry `"version": 1`. The task writes stage.json
before it starts the supervisor; rank 0 appends metrics.jsonl and writes result.json last;
whichever rank fails first writes failure.json. Every file but metrics.jsonl and the log
appears atomically: a reader sees all of it or nothing. Standard library only.
"""

import hashlib
import json
import os
import tempfile
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from internvl_core.errors import InternVLError, find_error_class, find_tree_class

VERSION = 1
EVALUATION = "evaluation"
"""The entry that scores a checkpoint and trains nothing; no stage of a recipe has it."""

STAGE_FILE = "stage.json"
METRICS_FILE = "metrics.jsonl"
RESULT_FILE = "result.json"
FAILURE_FILE = "failure.json"
LOG_FILE = "trainer.log"
EXAMPLES_FILE = "examples.json"
"""A few held-out answers for people, written by rank 0: see `Example` of evaluate/examples.py."""

STATE_FILE = "supervisor.json"
"""Written by the supervisor: state, pid, started, step, exit_code, reason, killed."""
STACKS_DIR = "stacks"
STACKS_DIR_VARIABLE = "INTERNVL_STACKS_DIR"
"""Environment variable with the folder where each rank writes the stacks of its threads when it is asked to."""

SUPERVISOR_SOCKET_VARIABLE = "INTERNVL_SUPERVISOR_SOCKET"
"""Environment variable with the name of the supervisor's abstract unix socket, without the NUL."""


def get_stacks_path(directory: Path, rank: int) -> Path:
    return directory / f"rank-{rank}.txt"


@dataclass(frozen=True)
class CheckpointRef:
    """A committed checkpoint: where it is and the sha256 of its MANIFEST."""

    uri: str
    digest: str


@dataclass(frozen=True)
class _AtomicFile:
    """Read and write oneself as one JSON object in an attempt's directory."""

    def write(self, attempt_dir: Path) -> None:
        write_json_atomically(attempt_dir / self._file_name(), {"version": VERSION, **asdict(self)})

    @classmethod
    def find(cls, attempt_dir: Path) -> Self | None:
        """Read the file, or return None where it was never written."""
        try:
            content = json.loads((attempt_dir / cls._file_name()).read_text())
        except FileNotFoundError:
            return None
        if content.pop("version") != VERSION:
            raise InternVLError(f"{attempt_dir / cls._file_name()}: written by another version of the pipeline.")
        return cls.from_json(content)

    @classmethod
    def get(cls, attempt_dir: Path) -> Self:
        """Read the file; a missing one is a fault of the process that should have written it."""
        found = cls.find(attempt_dir)
        if found is None:
            raise InternVLError(f"{attempt_dir / cls._file_name()} was not written. See {LOG_FILE} beside it.")
        return found

    @classmethod
    def _file_name(cls) -> str:
        raise NotImplementedError

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Self:
        """Build from the JSON object without its version."""
        return cls(**content)


@dataclass(frozen=True)
class StageFile(_AtomicFile):
    """What a stage is to do: stage.json, written by the task."""

    run_id: str
    stage: str
    attempt: int
    fingerprint: str
    entry: str
    arguments: dict[str, Any]
    launcher: dict[str, Any]
    store_uri: str
    start_from: CheckpointRef | None
    resume: bool
    """Resume from any run's newest checkpoint of this fingerprint; False: from this run's own only, as a retry does."""
    save_budget_s: float
    inputs: dict[str, Any] = field(default_factory=dict)
    """What the fingerprint is the digest of."""
    resume_from: CheckpointRef | None = None
    """The training checkpoint that a person told it to go on from; what this run has committed since comes first."""

    @classmethod
    def _file_name(cls) -> str:
        return STAGE_FILE

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Self:
        start_from, resume_from = (
            CheckpointRef(**ref) if (ref := content.pop(name)) else None for name in ("start_from", "resume_from")
        )
        return cls(**content, start_from=start_from, resume_from=resume_from)


@dataclass(frozen=True)
class StageResult(_AtomicFile):
    """What a finished stage reports: result.json, written by rank 0, last."""

    step: int
    checkpoint: CheckpointRef
    metrics: dict[str, float]
    """first_loss, last_loss, accuracy, accuracy/<dataset>, tokens_per_s ..."""
    counters: dict[str, int]
    """trainable_parameters, total_parameters, samples, tokens ..."""
    seconds: dict[str, float]
    """setup, train, evaluate; first_step and checkpoint_stall are parts of train."""

    @property
    def total_s(self) -> float:
        return sum(spent for name, spent in self.seconds.items() if name not in ("first_step", "checkpoint_stall"))

    @classmethod
    def _file_name(cls) -> str:
        return RESULT_FILE

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Self:
        return cls(**{**content, "checkpoint": CheckpointRef(**content["checkpoint"])})


@dataclass(frozen=True)
class StageFailure(_AtomicFile):
    """Why a stage failed: failure.json, written by the rank that failed first."""

    error: str
    """Name of a class in errors.py."""
    message: str
    rank: int
    step: int | None = None
    sample_ids: list[str] = field(default_factory=list)
    traceback: str = ""

    @classmethod
    def _file_name(cls) -> str:
        return FAILURE_FILE

    @classmethod
    def from_exception(cls, error: BaseException, *, rank: int, step: int | None = None) -> Self:
        """Describe an exception; one from outside our error tree counts as an internal error."""
        known = isinstance(error, InternVLError)
        # Libraries write paragraphs; the whole of it is in the traceback.
        first_line = next(iter(str(error).splitlines()), "")
        return cls(
            error=find_tree_class(type(error)).__name__,
            message=str(error) if known else f"{type(error).__name__}: {first_line}",
            rank=rank,
            step=error.step if isinstance(error, InternVLError) and step is None else step,
            sample_ids=list(error.sample_ids) if isinstance(error, InternVLError) else [],
            traceback="".join(traceback.format_exception(error)),
        )

    def write_first(self, attempt_dir: Path) -> bool:
        """Write unless another rank was first; its cause is the one worth showing."""
        body = json.dumps({"version": VERSION, **asdict(self)}, indent=2)
        temporary = _write_temporary(attempt_dir, body)
        try:
            os.link(temporary, attempt_dir / FAILURE_FILE)
        except FileExistsError:
            return False
        finally:
            os.unlink(temporary)
        return True

    def to_exception(self) -> InternVLError:
        error = find_error_class(self.error)(self.message)
        error.step, error.sample_ids = self.step, list(self.sample_ids)
        return error


def write_json_atomically(path: Path, content: Mapping[str, Any]) -> None:
    """Write beside the target, sync, then rename over it."""
    temporary = _write_temporary(path.parent, json.dumps(content, indent=2))
    try:
        os.replace(temporary, path)
    except OSError:
        os.unlink(temporary)
        raise


def _write_temporary(directory: Path, body: str) -> str:
    descriptor, name = tempfile.mkstemp(dir=directory, prefix=".writing-")
    # mkstemp's 0600 would keep a team from reading its own runs.
    os.fchmod(descriptor, 0o644)
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(body)
            file.flush()
            os.fsync(file.fileno())
    except OSError:  # A full disk; the tracker tries again and again, and each try would leave a file.
        os.unlink(name)
        raise
    return name


def digest_json(content: Any) -> str:
    """Sha256 (hex) of a JSON value, independent of key order and white space."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
