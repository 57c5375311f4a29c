"""What a checkpoint to resume from must hold, by how its stage trains.

Trainer goes on without a word where a file of its state is missing, with that state as it is at the
start. So nobody loads a training checkpoint, and nobody commits one, before `check_training_files`
has found all of it. No torch: names and JSON only.
"""

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Self

from internvl_core.contract import METRICS_FILE
from internvl_core.errors import CheckpointCorrupt

POSITION_FILE = "data_position.json"
"""Where in the data its step stands."""
LEDGER_FILE = "samples.json"
"""What became of the samples up to its step."""
TRAINER_FILE = "trainer_state.json"
LATEST_FILE = "latest"
"""Names the folder with DeepSpeed's part."""

LAYOUT_KEY = "layout"
"""In a manifest's info: the `TrainingLayout` of who wrote the checkpoint."""

_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")


@dataclass(frozen=True)
class TrainingLayout:
    """How a stage's training state is spread over files."""

    world_size: int
    """Ranks that write."""
    zero_stage: int | None = None
    """Of DeepSpeed; None without it."""
    has_scheduler_file: bool = True
    """Whether the schedule is Trainer's; with its own optimizer DeepSpeed keeps it."""
    has_scaler: bool = False
    """Whether losses are scaled by torch, as in fp16 without DeepSpeed."""

    @classmethod
    def from_info(cls, info: Mapping[str, Any]) -> Self | None:
        """Read the layout from a manifest's info; None where it was written before manifests said it."""
        return cls(**info[LAYOUT_KEY]) if LAYOUT_KEY in info else None

    def iter_files(self, step: int) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Yield what the checkpoint of a step consists of: what it is, and its path or patterns, any of which will do.

        Configuration and tokenizer are left out: without them a model does not load at all.
        """
        yield "the weights", _WEIGHTS
        yield "the step and what was logged", (TRAINER_FILE,)
        yield "the position in the data", (POSITION_FILE,)
        yield "the counts of samples", (LEDGER_FILE,)
        yield "the loss curve", (METRICS_FILE,)
        for rank in range(self.world_size):
            name = "rng_state.pth" if self.world_size == 1 else f"rng_state_{rank}.pth"
            yield f"the random state of rank {rank}", (name,)
        if self.has_scheduler_file:
            yield "the learning rate schedule", ("scheduler.pt",)
        if self.has_scaler:
            yield "the scale of the loss", ("scaler.pt",)
        if self.zero_stage is None:
            yield "the optimizer state", ("optimizer.pt",)
        else:
            yield from self._iter_deepspeed_files(step)

    def _iter_deepspeed_files(self, step: int) -> Iterator[tuple[str, tuple[str, ...]]]:
        yield "the name of DeepSpeed's folder", (LATEST_FILE,)
        folder = f"global_step{step}"
        if self.zero_stage != 3:
            yield "DeepSpeed's weights and schedule", (f"{folder}/mp_rank_00_model_states.pt",)
        for rank in range(self.world_size):
            # In bf16 the names begin with it.
            shard = f"{folder}/*zero_pp_rank_{rank}_mp_rank_00_"
            if self.zero_stage == 3:
                yield f"DeepSpeed's weights and schedule of rank {rank}", (f"{shard}model_states.pt",)
            if self.zero_stage:
                yield f"the optimizer state of rank {rank}", (f"{shard}optim_states.pt",)


def check_complete(paths: Collection[str], layout: TrainingLayout, *, step: int, where: str) -> None:
    """Check that nothing to resume from is missing.

    Args:
        paths: of the checkpoint's files, relative to it.

    Raises:
        CheckpointCorrupt: names all that is missing.
    """
    missing = [
        f"{patterns[0]} ({what})"
        for what, patterns in layout.iter_files(step)
        if not any(fnmatchcase(path, pattern) for path in paths for pattern in patterns)
    ]
    if missing:
        raise CheckpointCorrupt(
            f"{where}: {', '.join(missing)} missing. Trainer would go on with a new one in its place, so the "
            "checkpoint is not resumed from. Resume from another, or train the stage afresh (--fresh)."
        )


def check_training_files(directory: Path, layout: TrainingLayout, *, step: int) -> None:
    """Check that a training checkpoint on this machine is complete, and that all of it is of one step.

    Raises:
        CheckpointCorrupt: names what is missing, or what is of another step.
    """
    paths = {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}
    check_complete(paths, layout, step=step, where=str(directory))
    for name, found in _iter_steps(directory, layout):
        if found != step:
            raise CheckpointCorrupt(
                f"{directory}/{name}: of step {found}, in a checkpoint of step {step}. It is not resumed from."
            )


def _iter_steps(directory: Path, layout: TrainingLayout) -> Iterator[tuple[str, int | str]]:
    yield TRAINER_FILE, json.loads((directory / TRAINER_FILE).read_text())["global_step"]
    yield POSITION_FILE, json.loads((directory / POSITION_FILE).read_text())["step"]
    if layout.zero_stage is not None:
        folder = (directory / LATEST_FILE).read_text().strip()
        number = folder.removeprefix("global_step")
        yield LATEST_FILE, int(number) if number.isdigit() else folder
