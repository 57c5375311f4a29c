"""Which commits and handovers belong to the present history of a stage.

Each lease names the commit that its holder goes on with. What an earlier holder commits after
that is not live, whenever it arrives: a commit of fence e is live if every later lease goes on
with e's work or a later one's, and with a commit that is not older. Nobody has to stop a zombie.
Without leases, as in stores of earlier versions, everything is live.
"""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from internvl_core.checkpoint.backend import Backend, find_object, open_backend
from internvl_core.checkpoint.commits import (
    Commit,
    CommitName,
    Origin,
    get_commit,
    is_save_uri,
    list_commit_names,
    not_committed,
    open_checkpoint,
    read_commit,
    read_manifest_file,
    tell_steps,
)
from internvl_core.checkpoint.lease import find_lease, list_fences
from internvl_core.checkpoint.manifest import CheckpointKind
from internvl_core.checkpoint.uri import normalize_uri
from internvl_core.contract import CheckpointRef
from internvl_core.errors import CheckpointCorrupt, CheckpointNotFound

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Lineage:
    """What every lease goes on with, by fence; leases of which nothing can be read are left out."""

    origins: Mapping[int, Origin]

    def is_live(self, name: CommitName) -> bool:
        """Tell whether a commit belongs to the history that the newest lease goes on with."""
        bases = [origin.base for fence, origin in self.origins.items() if fence > name.fence]
        return all(base and base.fence >= name.fence and base.age >= name.age for base in bases)

    def is_live_handover(self, step: int, fence: int) -> bool:
        """Tell the same of a handover, by its step and the fence of who declared it."""
        later = [origin.finished for own, origin in self.origins.items() if own > fence]
        return all(finished and finished[1] >= fence and finished[0] >= step for finished in later)


def read_lineage(backend: Backend, names: list[CommitName]) -> Lineage:
    """Read what all leases go on with.

    Args:
        backend: opened at the stage's directory.
        names: of the commits to be judged, listed before: so no lease is missed that is older than one of them.
    """
    origins: dict[int, Origin] = {}
    for fence in list_fences(backend):
        try:
            record = find_lease(backend, fence)
        except CheckpointCorrupt as error:
            logger.warning("A lease is unreadable: %s", error)
            record = None
        if record:
            origins[fence] = record.origin
    for name in names:
        if name.fence not in origins and (origin := _find_origin(backend, name)):
            origins[name.fence] = origin
    return Lineage(origins)


def list_live_names(backend: Backend) -> list[CommitName]:
    """List the names of the live commits, newest first."""
    names = list_commit_names(backend)
    lineage = read_lineage(backend, names)
    return [name for name in names if lineage.is_live(name)]


def iter_verified(backend: Backend, kind: CheckpointKind | None = None) -> Iterator[Commit]:
    """Yield the live commits whose record and MANIFEST verify, newest first; log the others with the reason.

    The data is not read: `fetch` and `verify` do that.

    Args:
        backend: opened at the stage's directory.
        kind: only these; None means all.
    """
    seen: set[CommitName] = set()
    is_complete = False
    while not is_complete:
        is_complete = True
        for name in [name for name in list_live_names(backend) if name not in seen and kind in {None, name.kind}]:
            seen.add(name)
            try:
                commit = read_commit(backend, name)
                read_manifest_file(backend, commit.checkpoint)
            except CheckpointNotFound:
                vanished = True
            except CheckpointCorrupt as error:
                vanished = find_object(backend, name.path) is None
                if not vanished:
                    logger.warning("Passed over %s: %s", name, error)
            else:
                yield commit
                continue
            if vanished:
                # Superseded and removed since it was listed: so there are newer ones.
                is_complete = False
                break


def resolve_checkpoint(uri: str) -> CheckpointRef:
    """Find the committed checkpoint that a person means by a URI.

    Args:
        uri: of a checkpoint's folder, live or not; or of a stage's directory: then its newest live final
            checkpoint, or the newest live one of any kind if none is final.

    Raises:
        CheckpointNotFound: nothing is committed there; lists what is.
        CheckpointCorrupt: there are commit records, but none that verifies.
    """
    uri = normalize_uri(uri)
    if is_save_uri(uri):
        backend, save = open_checkpoint(uri)
        checkpoint = get_commit(backend, save).checkpoint
        read_manifest_file(backend, checkpoint)
        return checkpoint
    backend = open_backend(uri)
    for kind in (CheckpointKind.FINAL, None):
        for commit in iter_verified(backend, kind):
            return commit.checkpoint
    if list_live_names(backend):
        raise CheckpointCorrupt(f"{uri}: none of its checkpoints verifies. Committed: {tell_steps(backend)}.")
    if steps := tell_steps(backend):
        raise CheckpointNotFound(
            f"{uri}: its newest run started afresh and has not committed yet. Committed before: {steps}; "
            "give the URI of one of these to use it all the same."
        )
    raise not_committed(uri, backend)


def _find_origin(backend: Backend, name: CommitName) -> Origin | None:
    """Find what a lease that is unreadable or gone went on with: its commits repeat it."""
    try:
        return read_commit(backend, name).origin
    except (CheckpointCorrupt, CheckpointNotFound):
        return None
