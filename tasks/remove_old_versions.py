"""Keep the last versions of a registered model, and remove the checkpoints of those before them."""

import shutil
from collections.abc import Collection, Iterable
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger

from internvl_core.checkpoint.backend import open_backend
from internvl_core.checkpoint.removal import list_bases, remove_stage
from internvl_core.contract import CheckpointRef
from internvl_core.errors import InternVLError
from tasks.model_registry import ModelRegistry, ModelVersion


@task(name="remove old versions", cache_policy=NO_CACHE)
def remove_old_versions(
    registry: ModelRegistry, *, keep_last: int, protected: Collection[int], store_uri: str, cache_dir: Path, run_id: str
) -> list[int]:
    """Remove versions before the last ones, with their stages in the store.

    Those with an alias stay, and those that the adapters of one that stays were trained over. A stage's directory
    goes as a whole, so a version that shares one with what stays, trained afresh from the same inputs, stays too. What
    cannot be removed now is left for the next time: this raises nothing of ours.

    Uses: the model registry of MLflow, the store.

    Args:
        registry: of the model.
        keep_last: so many stay, whatever they are.
        protected: numbers of more versions that stay.
        store_uri: where this model's stages are, and nobody else's; versions from elsewhere stay.
        cache_dir: where copies of remote checkpoints are.
        run_id: of who removes them.

    Returns:
        The numbers of the versions that are gone.
    """
    log = get_run_logger()
    try:
        versions = registry.list_versions()
        staying = {version.number for version in versions[:keep_last]} | registry.list_aliased() | set(protected)
        kept = [version for version in versions if version.number in staying]
        needed = _list_needed(kept, store_uri)
    except InternVLError as error:
        log.warning("No old version is removed, for it is not known what is needed: %s", error)
        return []
    gone = []
    for version in versions:
        is_needed = version.number in staying or not needed.isdisjoint(_name_all(version.stages, store_uri))
        if is_needed or not all(_find_directory(stage, store_uri) for stage in version.stages):
            continue
        try:
            for stage in version.stages:
                _remove(stage, store_uri, run_id)
                shutil.rmtree(cache_dir / stage.digest[:16], ignore_errors=True)
            registry.remove(version)
        except InternVLError as error:
            log.warning("Version %d of %s is left: %s", version.number, registry.name, error)
            continue
        gone.append(version.number)
        log.info("Removed version %d of %s and its checkpoints", version.number, registry.name)
    return gone


def _list_needed(versions: Iterable[ModelVersion], store_uri: str) -> set[str]:
    """Name all stages of these versions, and what their adapters were trained over."""
    needed = set()
    for version in versions:
        needed |= _name_all([*version.stages, *list_bases(version.checkpoint)], store_uri)
    return needed


def _name_all(checkpoints: Iterable[CheckpointRef], store_uri: str) -> set[str]:
    """Name checkpoints by digest, for there are copies of them, and by the directories that would go with them."""
    names = set()
    for checkpoint in checkpoints:
        names.add(checkpoint.digest)
        directory = _find_directory(checkpoint, store_uri)
        if directory is not None:
            names.add(directory)
    return names


def _find_directory(checkpoint: CheckpointRef, store_uri: str) -> str | None:
    """Find the name of the directory of a checkpoint's stage; None: it is in another store."""
    prefix = f"{store_uri}/"
    return checkpoint.uri.removeprefix(prefix).partition("/")[0] if checkpoint.uri.startswith(prefix) else None


def _remove(stage: CheckpointRef, store_uri: str, run_id: str) -> None:
    names = open_backend(store_uri).list_names("")
    directory = _find_directory(stage, store_uri)
    # Gone already, by a hand or a night that was cut. Without any name nothing is known: a disk is not mounted.
    if directory in names or not names:
        remove_stage(stage.uri, run_id)
