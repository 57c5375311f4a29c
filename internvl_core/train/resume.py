"""From which checkpoint training goes on, and that it holds all of the state."""

import logging
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from internvl_core.checkpoint.manifest import CheckpointKind, Manifest
from internvl_core.checkpoint.store import fetch
from internvl_core.checkpoint.training_files import TrainingLayout, check_complete, check_training_files
from internvl_core.contract import CheckpointRef
from internvl_core.train.reshard import RESHARDED_FOLDER, needs_resharding, reshard

if TYPE_CHECKING:
    from internvl_core.train.commit import Committed

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


def read_layout(info: Mapping[str, Any], present: TrainingLayout) -> TrainingLayout:
    """Read how a checkpoint is laid out; where its manifest is too old to say so, as this run does on as many ranks."""
    return TrainingLayout.from_info(info) or replace(present, world_size=info["world_size"])


def fit_to_ranks(committed: "Committed", *, training: Any, cache_dir: Path) -> Path:
    """Give the folder from which this run's ranks can load a checkpoint, on all ranks.

    Under DeepSpeed on another number of ranks that is a converted copy, made once for each machine, and DeepSpeed is
    told so.

    Args:
        committed: to resume from, verified, on this machine.
        training: Hugging Face's arguments, prepared for launch.

    Raises:
        ArgumentError, CheckpointCorrupt: they cannot.
    """
    present = build_layout(training)
    written = read_layout(committed.info, present)
    if not needs_resharding(written, present, where=committed.checkpoint.uri):
        return committed.path
    target = cache_dir / RESHARDED_FOLDER / f"{committed.checkpoint.digest[:16]}-{present.world_size}"
    with training.main_process_first(desc="converting the checkpoint to resume from"):
        if training.local_process_index == 0:
            reshard(committed.path, step=committed.step, target=target)
    # The engine's own copy of the configuration is made of this one.
    training.deepspeed_plugin.hf_ds_config.config["checkpoint"] = {"load_universal": True}
    return target


def describe_resume(committed: "Committed", versions: Mapping[str, str]) -> dict[str, Any]:
    """Describe for later manifests what was resumed from, and with which other libraries; warn of those.

    Nobody is kept from a newer image in the middle of a stage, but what came of it must be seen afterwards.

    Args:
        versions: of this process's libraries, by name.
    """
    written = committed.info.get("versions", {})
    changes = [
        f"{name} {written[name]} -> {versions[name]}"
        for name in sorted(written.keys() & versions.keys())
        if _get_minor(written[name]) != _get_minor(versions[name])
    ]
    if changes:
        logger.warning(
            "The checkpoint was written with other versions: %s. Its state is loaded, but training does not go on bit "
            "for bit as it would have.",
            ", ".join(changes),
        )
    earlier = committed.info.get("version_changes", [])
    return {
        "resumed_from": {**asdict(committed.checkpoint), "step": committed.step},
        "version_changes": [*earlier, *({"step": committed.step, "change": change} for change in changes)],
    }


def _get_minor(version: str) -> list[str]:
    return version.partition("+")[0].split(".")[:2]


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
    written = read_layout(manifest.info, layout)
    # Before the download.
    check_complete([entry.path for entry in manifest.files], written, step=manifest.step, where=checkpoint.uri)
    path = fetch(checkpoint, cache_dir)
    check_training_files(path, written, step=manifest.step)
    return path
