"""Stages as their tasks start them, small enough for a test: supervisor, torchrun, gloo ranks, a `file://` store.

To have something happen inside a rank at an exact point (raise at step 2 on rank 1, hang while the model
loads, die between two files of a save), give `launch` or `run` faults: rank_faults.py has them.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rank_faults import Fault, dump_faults
from safetensors.torch import load_file

from internvl_core import __version__
from internvl_core.argument_rules import fingerprint_arguments, resolve_arguments
from internvl_core.checkpoint.manifest import CheckpointKind
from internvl_core.checkpoint.store import Commit, StageStore, fetch
from internvl_core.contract import CheckpointRef, StageFailure, StageFile, StageResult
from internvl_core.errors import ArgumentError
from internvl_core.smoke.components import ComponentsSettings, generate_components
from internvl_core.smoke.digits import DigitsSettings, generate_digits
from tasks.launch import RunningStage, get_limits, launch_command, launch_stage
from tasks.torchrun_command import build_command

DEADLINE_S = 240
FINGERPRINT = "0" * 64
FAULTY_RANK = Path(__file__).parent / "fakes" / "faulty_rank.py"


@dataclass(frozen=True)
class Inputs:
    """Data and components that all runs share."""

    folder: Path

    @property
    def arguments(self) -> dict[str, Any]:
        return {
            "vision_path": str(self.folder / "components" / "vision"),
            "llm_path": str(self.folder / "components" / "llm"),
            "meta_path": str(self.folder / "data" / "finetune.json"),
            "eval_meta_path": str(self.folder / "data" / "finetune_held_out.json"),
            "eval_max_new_tokens": 4,
            "per_device_eval_batch_size": 7,
            "conv_style": "internvl2_5",
            "force_image_size": 32,
            "max_seq_length": 192,
            "min_num_frame": 2,
            "max_num_frame": 4,
            "grad_checkpoint": False,
            "per_device_train_batch_size": 4,
            "max_steps": 2,
            "learning_rate": 0.003,
            "save_strategy": "no",
            "logging_steps": 1,
        }


@dataclass(frozen=True)
class Attempt:
    """A finished attempt of a stage."""

    directory: Path
    store: StageStore
    exit_code: int

    @property
    def result(self) -> StageResult:
        assert self.exit_code == 0, self.log[-4000:]
        return StageResult.get(self.directory)

    @property
    def failure(self) -> StageFailure:
        return StageFailure.get(self.directory)

    @property
    def log(self) -> str:
        return (self.directory / "trainer.log").read_text()

    @property
    def curve(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.directory / "metrics.jsonl").read_text().splitlines()]

    @property
    def commits(self) -> list[Commit]:
        """Oldest first."""
        return self.store.list_committed()[::-1]

    @property
    def final_dir(self) -> Path:
        return fetch(self.result.checkpoint, self.directory)


def make_inputs(folder: Path) -> Inputs:
    generate_digits(folder / "data", DigitsSettings(40, 20))
    settings = ComponentsSettings(hidden_size=32, num_attention_heads=2)
    generate_components(folder / "components", folder / "data" / "annotations", settings)
    return Inputs(folder)


def launch(
    directory: Path,
    arguments: dict[str, Any],
    *,
    store: Path | None = None,
    store_uri: str | None = None,
    entry: str = "finetune",
    num_ranks: int = 2,
    start_from: CheckpointRef | None = None,
    resume_from: CheckpointRef | None = None,
    save_budget_s: float = 60,
    faults: Sequence[Fault] = (),
    ranks: Sequence[str] = (),
) -> RunningStage:
    """Start a stage.

    Args:
        ranks: script and first arguments of each rank, instead of the trainer's entry.
    """
    stage = StageFile(
        run_id="run",
        stage="stage",
        attempt=1,
        fingerprint=FINGERPRINT,
        entry=entry,
        arguments={"output_dir": str(directory / "output"), "cache_dir": str(directory / "cache"), **arguments},
        launcher={"kind": "local", "nproc_per_node": num_ranks},
        store_uri=store_uri or f"file://{store or directory.parent / 'store'}",
        start_from=start_from,
        resume=True,
        save_budget_s=save_budget_s,
        inputs=describe_inputs(arguments, entry=entry, num_ranks=num_ranks),
        resume_from=resume_from,
    )
    if faults:
        ranks = [str(FAULTY_RANK), entry, dump_faults(faults)]
    return _launch_other_ranks(stage, directory, ranks) if ranks else launch_stage(stage, directory)


def describe_inputs(arguments: dict[str, Any], *, entry: str, num_ranks: int) -> dict[str, Any]:
    """Describe what a stage depends on, as its plan does, without digests of data and components."""
    try:
        values = resolve_arguments(arguments)
    except ArgumentError:  # Left to the rank, for a test of what it says.
        return {}
    return {
        "entry": entry,
        "trainer": __version__.split(".")[0],
        "arguments": fingerprint_arguments(values, world_size=num_ranks),
    }


def _launch_other_ranks(stage: StageFile, directory: Path, ranks: Sequence[str]) -> RunningStage:
    """Start the stage as `launch_stage` does, with ranks to which something happens."""
    command = build_command(stage, directory)
    start = command.index("-m", command.index("torch.distributed.run"))
    command[start : start + 2] = ranks
    directory.mkdir(parents=True, exist_ok=True)
    stage.write(directory)
    return launch_command(command, directory, get_limits(stage))


def wait(running: RunningStage) -> Attempt:
    exit_code = running.process.wait(DEADLINE_S)
    stage = StageFile.get(running.attempt_dir)
    store = StageStore(stage.store_uri, stage.stage, stage.fingerprint)
    return Attempt(running.attempt_dir, store, exit_code)


def run(directory: Path, arguments: dict[str, Any], **options: Any) -> Attempt:
    with launch(directory, arguments, **options) as running:
        return wait(running)


def load_weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def check_equal_weights(found: Path, expected: Path) -> None:
    weights, expected_weights = load_file(found), load_file(expected)
    assert weights.keys() == expected_weights.keys()
    assert [name for name in weights if not torch.equal(weights[name], expected_weights[name])] == []


def find_training_commit(attempt: Attempt, step: int) -> Commit:
    """Find the commit to resume from that a stage made at a step."""
    (commit,) = (commit for commit in attempt.commits if (commit.step, commit.kind) == (step, CheckpointKind.TRAINING))
    return commit


def forget_commits(attempt: Attempt, store: Path, *, after_step: int) -> None:
    """Copy an attempt's store as it was when `after_step` had just been committed."""
    shutil.copytree(attempt.store.uri.removeprefix("file://"), store / f"stage-{FINGERPRINT[:16]}")
    shutil.rmtree(*store.glob("*/handover"))
    for commit in store.glob("*/commits/*"):
        if int(commit.name.split(".")[0]) > after_step:
            commit.unlink()
