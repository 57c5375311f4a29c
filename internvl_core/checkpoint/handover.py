"""The handovers of a stage: declarations that it is finished, with which checkpoint and which result.

    handover/<step>.<fence>.json        created exclusively; the fence is that of the lease of who declares

What a handover names is never collected as garbage.
"""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from internvl_core.checkpoint.backend import Backend, create_once, find_object
from internvl_core.checkpoint.commits import (
    DATA_FOLDER,
    CommitName,
    get_save,
    list_commit_names,
    read_manifest_in,
)
from internvl_core.checkpoint.lease import check_fence
from internvl_core.checkpoint.lineage import read_lineage
from internvl_core.checkpoint.record import pack_record, unpack_record
from internvl_core.contract import CheckpointRef
from internvl_core.errors import CheckpointCorrupt, CheckpointNotFound, Fenced

logger = logging.getLogger(__name__)

HANDOVER_FOLDER = "handover"

_HANDOVER_NAME = re.compile(r"(?P<step>\d{12})\.(?P<fence>\d{6})\.json")


@dataclass(frozen=True)
class Handover:
    """A handover that is readable."""

    step: int
    fence: int
    checkpoint: CheckpointRef
    result: dict[str, Any]


def hand_over(backend: Backend, checkpoint: CheckpointRef, result: Mapping[str, Any], *, fence: int | None) -> None:
    """Declare a stage finished with a checkpoint; the same again does nothing.

    Args:
        backend: opened at the stage's directory.
        checkpoint: a live commit of the stage.
        result: of the stage; plain JSON.
        fence: of the lease; None: that of the checkpoint, which is right only if its own holder declares.

    Raises:
        CheckpointNotFound: the checkpoint is not committed, not live, or not in this stage.
        Fenced: the lease is void, or it was handed over with another result.
        CheckpointCorrupt: an earlier handover of it is damaged and in the way.
    """
    save = get_save(backend, checkpoint)
    manifest = read_manifest_in(backend, checkpoint)
    fence = manifest.fence if fence is None else fence
    check_fence(backend, fence)
    path = _handover_path(manifest.step, fence)
    named = {"data": f"{DATA_FOLDER}/{save}", "digest": checkpoint.digest}
    if create_once(backend, path, pack_record({"checkpoint": named, "result": dict(result)})):
        return
    _read_handover(backend, manifest.step, fence)
    raise Fenced(f"{backend.uri}/{path} exists with another result: another process finished this stage.")


def find_handover(backend: Backend) -> Handover | None:
    """Find the newest live handover whose checkpoint is live and verifies (record and MANIFEST); None: not finished."""
    declared = _list_declared(backend)
    if not declared:
        return None
    lineage = read_lineage(backend, list_commit_names(backend))
    for step, fence in declared:
        if not lineage.is_live_handover(step, fence):
            continue
        try:
            handover = _read_handover(backend, step, fence)
            manifest = read_manifest_in(backend, handover.checkpoint)
        except (CheckpointCorrupt, CheckpointNotFound) as error:
            logger.warning("Passed over the handover of step %d: %s", step, error)
            continue
        if lineage.is_live(CommitName(manifest.step, manifest.fence, manifest.kind)):
            return handover
    return None


def list_handed_over(backend: Backend) -> dict[str | int, str]:
    """List what any handover names, live or not, with the reason to keep it.

    Returns:
        By the URI of the checkpoint; where the handover is damaged, by the step that its name tells.
    """
    kept: dict[str | int, str] = {}
    for step, fence in _list_declared(backend):
        try:
            kept[_read_handover(backend, step, fence).checkpoint.uri] = f"handed over at step {step}"
        except CheckpointCorrupt:
            kept[step] = f"perhaps handed over: {_handover_path(step, fence)} is damaged"
        except CheckpointNotFound:
            continue
    return kept


def _list_declared(backend: Backend) -> list[tuple[int, int]]:
    """List step and fence of every handover, newest first."""
    matches = [_HANDOVER_NAME.fullmatch(name) for name in backend.list_names(HANDOVER_FOLDER)]
    return sorted(((int(match["step"]), int(match["fence"])) for match in matches if match), reverse=True)


def _read_handover(backend: Backend, step: int, fence: int) -> Handover:
    path = _handover_path(step, fence)
    where = f"{backend.uri}/{path}"
    body = find_object(backend, path)
    if body is None:
        raise CheckpointNotFound(f"{where} does not exist.")
    try:
        content = unpack_record(body, where=where)
        named, result = content["checkpoint"], dict(content["result"])
        return Handover(step, fence, CheckpointRef(f"{backend.uri}/{named['data']}", str(named["digest"])), result)
    except CheckpointCorrupt as error:
        raise CheckpointCorrupt(f"{error} Remove it and run the stage again.") from error
    except (KeyError, TypeError) as error:
        raise CheckpointCorrupt(f"{where}: not a handover: {error}. Remove it and run the stage again.") from error


def _handover_path(step: int, fence: int) -> str:
    return f"{HANDOVER_FOLDER}/{step:012d}.{fence:06d}.json"
