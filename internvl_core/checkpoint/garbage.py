"""Removal of what newer, verified checkpoints supersede, and of what crashed saves left behind.

Order is everything: first count what verifies, then read what is pinned, then make sure that the
lease still holds, then remove commit records, and the data of a save only when no record names it.
So whoever finds a record finds its data, and a crash anywhere leaves only what the next run sweeps.
"""

import logging
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from internvl_core.checkpoint.backend import Backend
from internvl_core.checkpoint.commits import (
    COMMITS_FOLDER,
    DATA_FOLDER,
    CommitName,
    find_commit,
    get_save_fence,
    list_commit_names,
    read_commit,
)
from internvl_core.checkpoint.handover import HANDOVER_FOLDER, list_handed_over
from internvl_core.checkpoint.lease import LEASE_FOLDER, beat_path, check_fence
from internvl_core.checkpoint.lineage import iter_verified, read_lineage
from internvl_core.checkpoint.manifest import CheckpointKind
from internvl_core.checkpoint.pins import PINS_FOLDER, list_pinned, list_pinned_bases
from internvl_core.checkpoint.verify import verify, verify_sizes
from internvl_core.errors import CheckpointCorrupt, CheckpointNotFound

logger = logging.getLogger(__name__)

MIN_KEPT = 2
"""Checkpoints that stay at the least: the newest may turn out to be damaged."""


@dataclass
class GarbageReport:
    """What a collection did."""

    removed: list[CommitName] = field(default_factory=list)
    """Commits that are gone now."""
    swept: list[str] = field(default_factory=list)
    """Folders of `data/` that are gone now: those of the removed commits, and what crashed saves left."""
    kept: dict[CommitName, str] = field(default_factory=dict)
    """Commits that are left, with the reason."""
    refusal: str | None = None
    """Why no commit may be removed."""


def collect_garbage(
    backend: Backend,
    fence: int,
    *,
    keep: int | None,
    verified: set[str],
    in_progress: Collection[str] = (),
    is_rehearsal: bool = False,
) -> GarbageReport:
    """Remove commits that `keep` newer verified ones supersede, and data that no commit names.

    Args:
        backend: opened at the stage's directory.
        fence: of the collector's lease.
        keep: live commits that must verify before anything older goes; None: every commit stays, and only the data
            that none names goes.
        verified: digests of checkpoints that this process has read through before, of which only the sizes are
            looked at; those read now are added.
        in_progress: folders of `data/` that this process is filling just now.
        is_rehearsal: only tell what would be removed by the holder of this lease, which nobody needs to have taken.

    Raises:
        Fenced: a later lease exists; nothing is removed from then on.
    """
    check_fence(backend, fence)
    report = GarbageReport()
    names = list_commit_names(backend)
    counted = [] if keep is None else _count_verified(backend, keep, verified)
    try:
        protected = _list_protected(backend, fence)
    except CheckpointCorrupt as error:
        report.refusal, protected = f"it is not known what is to be kept: {error}", {}
    if keep is None:
        report.refusal = "all are to stay"
    elif len(counted) < keep:
        report.refusal = f"only {len(counted)} of the {keep} checkpoints to be kept verify"
    doomed = _choose_doomed(backend, names, counted, protected, report)
    if is_rehearsal:
        report.removed = doomed[::-1]
        report.swept = list(_iter_unnamed(backend, fence, protected, in_progress, without=set(doomed)))
        return report
    # As late as can be. Whoever takes the lease after this has pinned what it needs before we read the pins.
    check_fence(backend, fence)
    for name in reversed(doomed):
        backend.remove(name.path)
        report.removed.append(name)
    _sweep_data(backend, fence, protected, in_progress, report)
    _sweep_records(backend, fence)
    return report


def _count_verified(backend: Backend, keep: int, verified: set[str]) -> list[CommitName]:
    """Find the `keep` newest live commits that verify."""
    counted: list[CommitName] = []
    for commit in iter_verified(backend):
        try:
            if commit.checkpoint.digest in verified:
                verify_sizes(backend, commit.checkpoint)
            else:
                verify(backend, commit.checkpoint)
        except (CheckpointCorrupt, CheckpointNotFound) as error:
            verified.discard(commit.checkpoint.digest)
            logger.warning("%s does not count: %s", commit.name, error)
            continue
        verified.add(commit.checkpoint.digest)
        counted.append(commit.name)
        if len(counted) == keep:
            break
    return counted


def _list_protected(backend: Backend, fence: int) -> dict[str | int, str]:
    """List what must not go, by URI or, where that is unknown, by step; with the reason."""
    # Bases of leases up to this one are history: those leases are taken, or never will be.
    bases: dict[str | int, str] = {
        uri: f"about to be the base of lease {taken}"
        for taken, uri in list_pinned_bases(backend).values()
        if uri and taken > fence
    }
    return bases | list_handed_over(backend) | list_pinned(backend)


def _choose_doomed(
    backend: Backend,
    names: list[CommitName],
    counted: list[CommitName],
    protected: dict[str | int, str],
    report: GarbageReport,
) -> list[CommitName]:
    """Choose the commits to remove; note why the others stay."""
    lineage = read_lineage(backend, names)
    doomed = []
    for name in names:
        is_superseded = not lineage.is_live(name) or (bool(counted) and name.order < counted[-1].order)
        if name in counted:
            report.kept[name] = "one of the newest that verify"
        elif name.kind is CheckpointKind.FINAL:
            report.kept[name] = "final weights"
        elif reason := _find_protection(backend, name, protected):
            report.kept[name] = reason
        elif report.refusal:
            report.kept[name] = report.refusal
        elif not is_superseded:
            report.kept[name] = "newer than the oldest that is kept, though it does not verify"
        else:
            doomed.append(name)
    return doomed


def _find_protection(backend: Backend, name: CommitName, protected: dict[str | int, str]) -> str | None:
    if name.step in protected:
        return protected[name.step]
    try:
        return protected.get(read_commit(backend, name).checkpoint.uri)
    except (CheckpointCorrupt, CheckpointNotFound):
        # It cannot say which of the saves of its step it names.
        start = f"{backend.uri}/{DATA_FOLDER}/{name.step:012d}.{name.fence:06d}."
        return next((reason for kept, reason in protected.items() if str(kept).startswith(start)), None)


def _sweep_data(
    backend: Backend, fence: int, protected: Collection[str | int], in_progress: Collection[str], report: GarbageReport
) -> None:
    """Remove the data of saves that no record names, unless a later lease may be about to name it."""
    for save in _iter_unnamed(backend, fence, protected, in_progress):
        backend.remove_all(f"{DATA_FOLDER}/{save}")
        report.swept.append(save)


def _iter_unnamed(
    backend: Backend,
    fence: int,
    protected: Collection[str | int],
    in_progress: Collection[str],
    *,
    without: Collection[CommitName] = (),
) -> Iterator[str]:
    """Yield the saves that no record names, or none but those of the commits `without`."""
    for save in sorted(backend.list_names(DATA_FOLDER)):
        save_fence = get_save_fence(save)
        if save_fence is None or save_fence > fence or save in in_progress:
            continue
        if f"{backend.uri}/{DATA_FOLDER}/{save}" in protected:
            continue
        try:
            commit = find_commit(backend, save)
        except CheckpointCorrupt:
            continue  # Perhaps a record names it; it goes when that record goes.
        if commit is None or commit.name in without:
            yield save


def _sweep_records(backend: Backend, fence: int) -> None:
    """Remove pins of bases that have done their service, and temporary files of processes that were killed."""
    for path, (taken, _) in list_pinned_bases(backend).items():
        if taken <= fence:
            backend.remove(path)
    # Not those of our own beat: another thread may be writing it. Whoever loses one otherwise tries again.
    own_beat = f".{beat_path(fence).removeprefix(f'{LEASE_FOLDER}/')}."
    for folder in (LEASE_FOLDER, COMMITS_FOLDER, HANDOVER_FOLDER, PINS_FOLDER):
        for name in backend.list_names(folder):
            if name.startswith(".") and not name.startswith(own_beat):
                backend.remove(f"{folder}/{name}")
