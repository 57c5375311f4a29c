"""How a lease changes hands: only one of any number of takers gets it, and only from a holder that is gone.

A holder of this machine is dead when the kernel says so. Any other is watched: as long as its beat
changes it lives, and no clock but the watcher's own monotonic one is asked.
"""

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from internvl_core.checkpoint.backend import Backend, create_once, find_object
from internvl_core.checkpoint.commits import Commit, CommitName, Origin, list_commit_names
from internvl_core.checkpoint.handover import find_handover
from internvl_core.checkpoint.lease import (
    Lease,
    LeaseRecord,
    Owner,
    beat_path,
    find_lease,
    lease_path,
    list_fences,
    read_beat,
    tell_time,
)
from internvl_core.checkpoint.lineage import iter_verified
from internvl_core.checkpoint.pins import pin_base
from internvl_core.errors import CheckpointCorrupt, LeaseHeld, StoreUnavailable

logger = logging.getLogger(__name__)

BEAT_TTL_S = 90.0
"""A holder whose beat has not changed for so long is taken to be gone."""
WATCH_INTERVAL_S = 2.0

ChooseBase = Callable[[Iterable[Commit]], Commit | None]


class Clock(Protocol):
    """The two functions of `time` that watching needs."""

    def monotonic(self) -> float: ...

    def sleep(self, seconds: float, /) -> None: ...


@dataclass(frozen=True)
class _Sight:
    """What a taker saw; while it stays the same, nobody worked on the stage."""

    fence: int
    """Of the newest lease; 0: none."""
    names: list[CommitName]
    beat: bytes | None
    """None also where it does not matter."""


def acquire(
    backend: Backend, owner: Owner, *, choose_base: ChooseBase, takes_over: bool = False, clock: Clock = time
) -> Lease:
    """Take the lease of a stage.

    Args:
        backend: opened at the stage's directory.
        owner: the process that will hold it.
        choose_base: gets the live commits newest first and returns the one to go on with: the first that it could
            fetch and verify; or None to start from nothing, which makes all that is committed now history.
            Called again if the stage was worked on meanwhile.
        takes_over: do not ask whether the present holder lives.
        clock: for watching the holder.

    Raises:
        LeaseHeld: the present holder lives; says who it is.
    """
    while True:
        sight = _look(backend, sees_beat=not takes_over)
        if sight.fence and not takes_over:
            _check_holder_is_gone(backend, sight, owner, clock)
        base = choose_base(iter_verified(backend))
        fence = 1 + max([sight.fence, *(name.fence for name in sight.names)])
        pinned = pin_base(backend, fence, base.checkpoint) if base else None
        # A collector removes a commit only for newer ones. If we see none by now, then whoever
        # sees some will also see our pin, for it looks for pins last.
        is_unchanged = _look(backend, sees_beat=not takes_over) == sight
        if is_unchanged and _create_lease(backend, fence, owner, base):
            lease = Lease(fence, base, backend)
            _beat_first(lease)
            logger.info("Took lease %d of %s, to go on with %s.", fence, backend.uri, base.name if base else "nothing")
            return lease
        logger.info("%s: another process worked on it meanwhile; looking again.", backend.uri)
        if pinned:
            backend.remove(pinned)


def _look(backend: Backend, *, sees_beat: bool) -> _Sight:
    names = list_commit_names(backend)
    fence = max(list_fences(backend), default=0)
    return _Sight(fence, names, find_object(backend, beat_path(fence)) if fence and sees_beat else None)


def _create_lease(backend: Backend, fence: int, owner: Owner, base: Commit | None) -> bool:
    handover = find_handover(backend) if base else None
    finished = (handover.step, handover.fence) if handover else None
    record = LeaseRecord(owner, Origin(base.name if base else None, finished), time.time())
    return create_once(backend, lease_path(fence), record.to_bytes())


def _beat_first(lease: Lease) -> None:
    try:
        lease.beat(step=lease.base.step if lease.base else None, phase="starting")
    except StoreUnavailable as error:
        # The lease is ours all the same; others watch for as long as a holder may miss its beats.
        logger.warning("The first beat of lease %d was lost: %s", lease.fence, error)


def _check_holder_is_gone(backend: Backend, sight: _Sight, taker: Owner, clock: Clock) -> None:
    """Raise LeaseHeld unless the holder of the newest lease released it, is dead, or has not beaten for the TTL."""
    beat = read_beat(sight.beat)
    if beat and beat.is_released:
        return
    try:
        record = find_lease(backend, sight.fence)
    except CheckpointCorrupt as error:
        logger.warning("The newest lease is unreadable, so its holder is watched: %s", error)
        record = None
    # One of our own without a beat is one that we asked for, and the answer never came.
    is_alive = sight.beat is not None if record and record.owner == taker else record and record.owner.is_alive()
    if is_alive is None:
        is_alive = _has_new_beat(backend, sight, clock)
    if is_alive:
        raise _held(backend, sight, record)


def _has_new_beat(backend: Backend, sight: _Sight, clock: Clock) -> bool:
    """Watch a beat until it changes or the TTL is over."""
    logger.info("%s: watching the holder of lease %d for %g s.", backend.uri, sight.fence, BEAT_TTL_S)
    deadline = clock.monotonic() + BEAT_TTL_S
    while clock.monotonic() < deadline:
        clock.sleep(WATCH_INTERVAL_S)
        if find_object(backend, beat_path(sight.fence)) != sight.beat:
            return True
    return False


def _held(backend: Backend, sight: _Sight, record: LeaseRecord | None) -> LeaseHeld:
    who = f"by {record.owner} since {tell_time(record.taken_at)}" if record else "by somebody whose record is damaged"
    beat = read_beat(sight.beat)
    step = "" if beat is None or beat.step is None else f" at step {beat.step}"
    doing = f"{step} ({beat.phase})" if beat else ""
    return LeaseHeld(
        f"{backend.uri}: lease {sight.fence} is held {who}{doing}. Wait until that run ends or stop it; take over only "
        "if you know that it cannot write any more."
    )
