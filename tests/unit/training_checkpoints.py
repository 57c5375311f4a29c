"""Training checkpoints without weights: every file that one must have, and what tells its step."""

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from internvl_core.checkpoint.manifest import MANIFEST_FILE
from internvl_core.checkpoint.store import StageStore, fetch, read_manifest
from internvl_core.checkpoint.training_files import LATEST_FILE, POSITION_FILE, TRAINER_FILE, TrainingLayout
from internvl_core.contract import CheckpointRef


def write_training_files(folder: Path, step: int, layout: TrainingLayout) -> Path:
    for what, patterns in layout.iter_files(step):
        path = folder / patterns[0].replace("*", "")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(what)
    (folder / TRAINER_FILE).write_text(json.dumps({"global_step": step}))
    (folder / POSITION_FILE).write_text(json.dumps({"step": step}))
    if layout.zero_stage is not None:
        (folder / LATEST_FILE).write_text(f"global_step{step}")
    return folder


def republish(checkpoint: CheckpointRef, change: Callable[[Path], object], folder: Path) -> CheckpointRef:
    """Commit a checkpoint of a `file://` store in its own place once more, changed, with a manifest that fits."""
    copy = Path(tempfile.mkdtemp(dir=folder))
    manifest = read_manifest(checkpoint)
    shutil.copytree(fetch(checkpoint, folder), copy, dirs_exist_ok=True)
    (copy / MANIFEST_FILE).unlink()
    change(copy)
    stage_uri = checkpoint.uri.rpartition("/data/")[0]
    stage_dir = Path(stage_uri.removeprefix("file://"))
    (record,) = stage_dir.glob(f"commits/{manifest.step:012d}.{manifest.fence:06d}.{manifest.kind}.json")
    record.unlink()
    store = StageStore(str(stage_dir.parent), manifest.stage, manifest.fingerprint)
    return store.publish(
        copy,
        step=manifest.step,
        fence=manifest.fence,
        kind=manifest.kind,
        parent=manifest.parent,
        info=manifest.info,
    )
