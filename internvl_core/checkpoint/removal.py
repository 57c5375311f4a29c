"""Removal of a whole stage from a store: every commit of it, what it handed over, and the data.

Order as in garbage.py: first what names, then what is named. So whoever finds a record finds its
data, and a crash anywhere leaves only what the next removal, or the next run of the stage, sweeps.
The records of leases stay: the next run of these inputs must have a later one.
"""

import logging

from internvl_core.checkpoint.backend import Backend, open_backend
from internvl_core.checkpoint.base_model import BASE_FILE, read_base
from internvl_core.checkpoint.commits import COMMITS_FOLDER, DATA_FOLDER, read_manifest
from internvl_core.checkpoint.fetch import read_file
from internvl_core.checkpoint.handover import HANDOVER_FOLDER
from internvl_core.checkpoint.inventory import open_stage
from internvl_core.checkpoint.lease import Owner, check_fence
from internvl_core.checkpoint.pins import list_pinned
from internvl_core.contract import CheckpointRef
from internvl_core.errors import ArgumentError

logger = logging.getLogger(__name__)


def remove_stage(uri: str, run_id: str) -> None:
    """Remove all that a stage committed.

    Args:
        uri: of the stage's directory, or of a checkpoint in it.
        run_id: of who removes it, for the lease.

    Raises:
        CheckpointNotFound: there is no such stage.
        ArgumentError: a person pinned a checkpoint of it.
        LeaseHeld: a run is at work on it.
    """
    store = open_stage(uri)
    backend = open_backend(store.uri)
    _check_no_pin(backend)
    # Going on with what there is: a refusal must not make it history.
    lease = store.acquire(Owner.of_this_process(run_id), choose_base=lambda found: next(iter(found), None))
    try:
        # As late as can be.
        _check_no_pin(backend)
        check_fence(backend, lease.fence)
        for folder in (HANDOVER_FOLDER, COMMITS_FOLDER):
            _remove_records(backend, folder)
        backend.remove_all(DATA_FOLDER)
    finally:
        lease.release()
    logger.info("Removed all checkpoints of %s.", store.uri)


def list_bases(checkpoint: CheckpointRef) -> list[CheckpointRef]:
    """List the checkpoints that an adapter needs: what it was trained over, and what that was, and so on.

    Raises:
        CheckpointNotFound, CheckpointCorrupt: one of them is not there, or is damaged.
    """
    bases: list[CheckpointRef] = []
    while any(entry.path == BASE_FILE for entry in read_manifest(checkpoint).files):
        base = read_base(read_file(checkpoint, BASE_FILE), where=f"{checkpoint.uri}/{BASE_FILE}")
        if base.kind != "checkpoint":
            break
        checkpoint = CheckpointRef(base.name, base.digest)
        bases.append(checkpoint)
    return bases


def _check_no_pin(backend: Backend) -> None:
    pinned = list_pinned(backend)
    if pinned:
        raise ArgumentError(f"{backend.uri}: {', '.join(sorted(set(pinned.values())))}. Unpin it first.")


def _remove_records(backend: Backend, folder: str) -> None:
    for name in sorted(backend.list_names(folder)):
        backend.remove(f"{folder}/{name}")
