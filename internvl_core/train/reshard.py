"""Bring DeepSpeed's optimizer state to another number of ranks, by its own universal checkpoint.

The committed checkpoint is only read. What comes out is a folder of this machine's cache, made anew
for each resume: links to the files of the checkpoint, and beside them a file for each parameter and
state, of which every rank takes its part. In a process of its own: the conversion holds all shards
in memory, one after the other, and DeepSpeed unpickles them. So its input must have been verified
against the manifest of a checkpoint of this very training.

Usage: python -m internvl_core.train.reshard CHECKPOINT_DIR TARGET_DIR STEP
"""

import argparse
import logging
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from internvl_core.checkpoint.training_files import LATEST_FILE, TrainingLayout
from internvl_core.errors import ArgumentError, CheckpointCorrupt

logger = logging.getLogger(__name__)

RESHARDED_FOLDER = "resharded"
"""Below the cache."""

_STATES = ("fp32", "exp_avg", "exp_avg_sq")
_WORKERS = min(4, os.cpu_count() or 1)
_TOLD_CHARACTERS = 2000


def needs_resharding(written: TrainingLayout, present: TrainingLayout, *, where: str) -> bool:
    """Tell whether this run's ranks cannot take the state as it was written.

    Raises:
        ArgumentError: nor can it be brought into another form.
    """
    if not written.zero_stage or not present.zero_stage or written == present:
        return False
    if (written.zero_stage == 3) != (present.zero_stage == 3):
        raise ArgumentError(
            f"{where}: written under ZeRO-{written.zero_stage}, whose optimizer state does not fit ZeRO-"
            f"{present.zero_stage}. Resume with zero{written.zero_stage}, or train afresh (--fresh)."
        )
    if written.world_size == present.world_size:
        return False
    if present.zero_stage == 3 and present.has_scheduler_file:
        # DeepSpeed 0.19.8, stage3.py: every group of Trainer's would get the weight decay of the first.
        raise ArgumentError(
            f"{where}: written by {written.world_size} ranks under ZeRO-3 with several groups of parameters, which "
            f"DeepSpeed cannot bring to {present.world_size}. Resume on {written.world_size} ranks, or train afresh "
            "(--fresh)."
        )
    return True


def reshard(checkpoint_dir: Path, *, step: int, target: Path) -> None:
    """Convert a verified training checkpoint in a process of its own; what lay at the target is replaced.

    Raises:
        CheckpointCorrupt: the state could not be converted; the log has DeepSpeed's words.
    """
    shutil.rmtree(target, ignore_errors=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    logger.info("Bringing the optimizer state of %s to another number of ranks, in %s", checkpoint_dir, target)
    command = [sys.executable, "-m", __name__, str(checkpoint_dir), str(target), str(step)]
    # The variables of torchrun would make DeepSpeed look for other ranks.
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        shutil.rmtree(target, ignore_errors=True)
        logger.error("%s", done.stderr[-_TOLD_CHARACTERS:])
        last_line = next(reversed(done.stderr.split("\n")[:-1]), "no word")
        raise CheckpointCorrupt(
            f"{checkpoint_dir}: its optimizer state does not fit another number of ranks: {last_line}. Resume on "
            "the number of ranks that wrote it, or train afresh (--fresh)."
        )


def convert(checkpoint_dir: Path, target: Path, step: int) -> None:
    """Write the folder that DeepSpeed loads with `load_universal`.

    Raises:
        CheckpointCorrupt: what came out is not all of the state.
    """
    from deepspeed.checkpoint.ds_to_universal import main as convert_shards

    folder = f"global_step{step}"
    target.mkdir(parents=True)
    for path in checkpoint_dir.iterdir():
        if path.name not in (folder, LATEST_FILE):
            (target / path.name).symlink_to(path.absolute())
    convert_shards(
        argparse.Namespace(
            input_folder=str(checkpoint_dir / folder),
            output_folder=str(target / folder),
            num_extract_workers=_WORKERS,
            num_merge_workers=_WORKERS,
            keep_temp_folder=False,
            strict=True,
            # What tells how tensor-parallel parameters were cut, of which there are none.
            inject_missing_state=True,
        )
    )
    _check_converted(checkpoint_dir / folder, target / folder / "zero")


def _check_converted(shards: Path, converted: Path) -> None:
    """Check that every parameter that learns came out with all its states, in its size."""
    import torch

    model_file = min(shards.glob("*mp_rank_00_model_states.pt"))
    # Pickled objects of DeepSpeed; verified by the checkpoint's manifest.
    shapes: list[dict[str, Any]] = torch.load(model_file, map_location="cpu", weights_only=False)["param_shapes"]
    for name, shape in (item for group in shapes for item in group.items()):
        for state in _STATES:
            path = converted / name / f"{state}.pt"
            if not path.is_file():
                raise CheckpointCorrupt(f"{path} was not written")
            content = torch.load(path, map_location="cpu", weights_only=False)
            tensor = content["param"] if isinstance(content, dict) else content
            if tensor.numel() != math.prod(shape):
                raise CheckpointCorrupt(f"{path} has {tensor.numel()} elements instead of {math.prod(shape)}")


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
