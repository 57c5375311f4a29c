"""What a new process reads from the model of a store, and what should not be there."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

from protocol_model import FILES, ModelBackend
from protocol_writer import KEEP, TRAINING, is_whole

from internvl_core.checkpoint import handover
from internvl_core.checkpoint.commits import DATA_FOLDER, CommitName, find_commit, list_commit_names, read_commit
from internvl_core.checkpoint.lineage import iter_verified
from internvl_core.contract import CheckpointRef
from internvl_core.errors import CheckpointCorrupt


@dataclass(frozen=True)
class Found:
    """What a reader would use."""

    name: CommitName
    content: dict[str, bytes]


def read_newest(objects: Mapping[str, bytes]) -> Found | None:
    """Read as a new process does: the newest live commit of which every byte verifies."""
    backend = ModelBackend(dict(objects))
    for commit in iter_verified(backend):
        if is_whole(backend, commit):
            return Found(commit.name, read_content(objects, commit.checkpoint))
    return None


def list_whole(objects: Mapping[str, bytes]) -> list[CommitName]:
    """List the live commits of which every byte verifies."""
    backend = ModelBackend(dict(objects))
    return [commit.name for commit in iter_verified(backend) if is_whole(backend, commit)]


def read_content(objects: Mapping[str, bytes], checkpoint: CheckpointRef) -> dict[str, bytes]:
    folder = checkpoint.uri.removeprefix(f"{ModelBackend.uri}/")
    return {path: objects[f"{folder}/{path}"] for path in FILES}


def list_dangling(objects: Mapping[str, bytes]) -> list[CommitName]:
    """List readable commits, live or not, whose data is not whole: without rot there is none."""
    backend = ModelBackend(dict(objects))
    dangling = []
    for name in list_commit_names(backend):
        with suppress(CheckpointCorrupt):
            commit = read_commit(backend, name)
            if not is_whole(backend, commit):
                dangling.append(name)
    return dangling


def list_leaks(objects: Mapping[str, bytes]) -> list[str]:
    """List what a collection should not have left: data that no record names, pins of bases, superseded commits."""
    backend = ModelBackend(dict(objects))
    saves = {name.split("/")[1] for name in objects if name.startswith(f"{DATA_FOLDER}/")}
    leaks = [name for name in objects if name.endswith(".base")]
    for save in saves:
        with suppress(CheckpointCorrupt):
            if find_commit(backend, save) is None:
                leaks.append(save)
    # A torn handover keeps what its name tells.
    handed_over = handover.list_handed_over(backend)
    training = [name for name in list_commit_names(backend) if name.kind is TRAINING and name.step not in handed_over]
    return leaks + [str(name) for name in training[KEEP:]]
