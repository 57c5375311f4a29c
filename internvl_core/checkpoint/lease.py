"""The leases of a stage: who may commit to it, one after the other.

    lease/<fence>.json      created exclusively: the holder and what it goes on with
    lease/<fence>.beat      overwritten by the holder as long as it lives
    lease/<fence>.<nonce>.base      what somebody who is taking this lease is about to go on with

Fences are consecutive. A holder learns that it lost its lease by the existence of the next one;
that what it commits nevertheless is not live does not rest on its looking (see `lineage`).
"""

import itertools
import os
import re
import secrets
import socket
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from internvl_core.checkpoint.backend import Backend, find_object
from internvl_core.checkpoint.commits import Commit, Origin, read_commit
from internvl_core.checkpoint.record import pack_record, unpack_record
from internvl_core.errors import CheckpointCorrupt, CheckpointNotFound, Fenced

LEASE_FOLDER = "lease"

_LEASE_NAME = re.compile(r"(?P<fence>\d{6})\.json")
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class Owner:
    """A process, told apart from every other one of this and of other machines."""

    run_id: str
    host: str
    boot_id: str
    """Of the kernel's start; empty where there is no /proc."""
    pid_namespace: str
    pid: int
    start_ticks: int
    """When the process started, in the kernel's ticks since boot: pids are used again."""

    @classmethod
    def of_this_process(cls, run_id: str) -> Self:
        pid = os.getpid()
        boot_id, pid_namespace = _find_kernel()
        return cls(run_id, socket.gethostname(), boot_id, pid_namespace, pid, _find_start_ticks(pid) or 0)

    def is_alive(self) -> bool | None:
        """Tell whether the process runs; None if that cannot be seen from here."""
        if not self.boot_id or (self.boot_id, self.pid_namespace) != _find_kernel():
            return None
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            # Of another user, and perhaps hidden in /proc.
            pass
        start_ticks = _find_start_ticks(self.pid)
        return None if start_ticks is None else start_ticks == self.start_ticks

    def __str__(self) -> str:
        return f"run {self.run_id} (process {self.pid} on {self.host})"


@dataclass(frozen=True)
class LeaseRecord:
    """What a lease says."""

    owner: Owner
    origin: Origin
    taken_at: float
    """Seconds since 1970, by the holder's clock; for people, compared with nothing."""

    def to_bytes(self) -> bytes:
        return pack_record(
            {"owner": asdict(self.owner), "taken_at": self.taken_at, "nonce": secrets.token_hex(8)}
            | self.origin.to_json()
        )


@dataclass(frozen=True)
class Beat:
    """The last sign of life of a holder."""

    step: int | None
    phase: str
    is_released: bool


@dataclass
class Lease:
    """The right to commit to a stage."""

    fence: int
    base: Commit | None
    """What the holder goes on with; None: it starts from nothing, or the base was superseded and removed since."""
    _backend: Backend
    # Whoever watches compares bytes, so no two beats of a lease may be equal, whichever process they come from.
    _nonce: str = field(default_factory=lambda: secrets.token_hex(4))
    _counter: Any = field(default_factory=itertools.count)

    def check(self) -> None:
        """Learn that somebody else took over.

        Raises:
            Fenced: a later lease exists.
        """
        check_fence(self._backend, self.fence)

    def beat(self, *, step: int | None, phase: str) -> None:
        """Give a sign of life; others take the stage over when none comes for 90 s.

        Args:
            step: that the training has reached.
            phase: what the holder is doing, for people.
        """
        self._put_beat(step=step, phase=phase, released=False)

    def release(self) -> None:
        """Give the lease back; the next holder need not wait."""
        self._put_beat(step=None, phase="released", released=True)

    def _put_beat(self, **content: Any) -> None:
        body = {"nonce": self._nonce, "counter": next(self._counter)} | content
        self._backend.put(beat_path(self.fence), pack_record(body))


def lease_path(fence: int) -> str:
    return f"{LEASE_FOLDER}/{fence:06d}.json"


def beat_path(fence: int) -> str:
    return f"{LEASE_FOLDER}/{fence:06d}.beat"


def open_lease(backend: Backend, fence: int) -> Lease:
    """Go on with a lease that another process of the same holder took.

    Raises:
        CheckpointNotFound, CheckpointCorrupt: it does not exist, or is damaged.
    """
    record = find_lease(backend, fence)
    if record is None:
        raise CheckpointNotFound(f"{backend.uri}/{lease_path(fence)} does not exist: nobody took this lease.")
    try:
        base = read_commit(backend, record.origin.base) if record.origin.base else None
    except CheckpointNotFound:
        base = None
    return Lease(fence, base, backend)


def list_fences(backend: Backend) -> list[int]:
    """List the numbers of all leases, damaged or not, in order."""
    matches = [_LEASE_NAME.fullmatch(name) for name in backend.list_names(LEASE_FOLDER)]
    fences = sorted(int(match["fence"]) for match in matches if match)
    # A listing may be stale, the answer to a direct question is not; and the numbers have no gaps.
    while find_object(backend, lease_path(following := (fences[-1] if fences else 0) + 1)) is not None:
        fences.append(following)
    return fences


def check_fence(backend: Backend, fence: int) -> None:
    """Raise Fenced if a lease later than `fence` exists."""
    newest = max(list_fences(backend), default=0)
    if newest > fence:
        raise Fenced(
            f"{backend.uri}: lease {newest} was taken {_tell_holder(backend, newest)}; nothing more may be committed "
            f"with lease {fence}. Let this run end, or stop the other one and run this again."
        )


def find_lease(backend: Backend, fence: int) -> LeaseRecord | None:
    """Read a lease; None if there is none.

    Raises:
        CheckpointCorrupt: it is torn or damaged; its number is used up all the same.
    """
    where = f"{backend.uri}/{lease_path(fence)}"
    body = find_object(backend, lease_path(fence))
    if body is None:
        return None
    content = unpack_record(body, where=where)
    try:
        return LeaseRecord(Owner(**content["owner"]), Origin.from_json(content), float(content["taken_at"]))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointCorrupt(f"{where}: not a lease: {type(error).__name__}: {error}.") from error


def read_beat(body: bytes | None) -> Beat | None:
    """Read a beat's bytes; None if there are none, or not whole."""
    try:
        content = unpack_record(body or b"", where="the beat")
        return Beat(content["step"], str(content["phase"]), content["released"] is True)
    except (CheckpointCorrupt, KeyError):
        return None


def tell_time(seconds: float) -> str:
    """Tell people when something was, in UTC."""
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))


def _tell_holder(backend: Backend, fence: int) -> str:
    try:
        record = find_lease(backend, fence)
    except CheckpointCorrupt:
        record = None
    return f"by {record.owner} at {tell_time(record.taken_at)}" if record else "by somebody whose lease is unreadable"


def read_boot_id() -> str:
    """Read what names this start of this machine's kernel; empty where there is no /proc."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return ""


def _find_kernel() -> tuple[str, str]:
    """Find what tells kernels' starts and their pid namespaces apart; empty where there is no /proc."""
    try:
        return read_boot_id(), str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return "", ""


def _find_start_ticks(pid: int) -> int | None:
    """Find when a living process started; None if it cannot be seen; 0 for one that is dead but not yet collected."""
    try:
        # The name, in parentheses, may hold any bytes; after it: state, parent, ...; the start is field 22 of all.
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    return 0 if fields[0] in (b"Z", b"X") else int(fields[19])
