"""From which checkpoint training goes on, and that it holds all of the state."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from internvl_core.checkpoint.manifest import CheckpointKind, Manifest
from internvl_core.checkpoint.store import fetch
from internvl_core.checkpoint.training_files import TrainingLayout, check_complete, check_training_files
from internvl_core.contract import CheckpointRef

logger = logging.getLogger(__name__)


def build_layout(training: Any) -> TrainingLayout:
    """Tell how a stage spreads its training state over files.

    Args:
        training: Hugging Face's arguments, prepared for launch.
    """
    config = training.deepspeed
    if config is None:
        return TrainingLayout(training.world_size, has_scaler=bool(training.fp16))
    return TrainingLayout(
        training.world_size,
        zero_stage=int(config.get("zero_optimization", {}).get("stage", 0)),
        # Trainer makes the schedule itself where it makes the optimizer.
        has_scheduler_file="optimizer" not in config and "scheduler" not in config,
    )


def fetch_checked(checkpoint: CheckpointRef, manifest: Manifest, layout: TrainingLayout, cache_dir: Path) -> Path:
    """Bring a committed checkpoint of this stage to this machine; one to resume from must hold all of the state.

    Args:
        manifest: of the checkpoint.
        layout: of this run; for checkpoints whose manifests do not say how they are laid out.

    Raises:
        CheckpointCorrupt: the store's bytes are not those of the manifest, or something is missing.
    """
    if manifest.kind is not CheckpointKind.TRAINING:
        return fetch(checkpoint, cache_dir)
    written = TrainingLayout.from_info(manifest.info) or replace(layout, world_size=manifest.info["world_size"])
    # Before the download.
    check_complete([entry.path for entry in manifest.files], written, step=manifest.step, where=checkpoint.uri)
    path = fetch(checkpoint, cache_dir)
    check_training_files(path, written, step=manifest.step)
    return path
