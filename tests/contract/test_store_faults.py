"""What a crash, a lost answer, a full disk or a lying store does to a commit: every write of it, each in turn."""

import errno
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from internvl_core.checkpoint import probe
from internvl_core.checkpoint.backend import open_backend
from internvl_core.checkpoint.manifest import CheckpointKind
from internvl_core.checkpoint.store import StageStore, check_store, fetch
from internvl_core.contract import CheckpointRef
from internvl_core.errors import DiskFull, StoreUnavailable

FINGERPRINT = "0123456789abcdef" * 4
FILES = {"model.safetensors": b"weights " * 64, "optimizer/rank-0.bin": b"moments " * 64}
# Two files, MANIFEST, commit record.
NUM_WRITES = 4


class PowerCut(BaseException):
    """Nothing catches this, as nothing catches SIGKILL."""


@dataclass
class Fault:
    """What happens at one write, counted from zero."""

    at: int
    kind: str
    num_times: int = 1
    num_writes: int = 0

    def strikes(self) -> bool:
        self.num_writes += 1
        return self.at < self.num_writes <= self.at + self.num_times


class FaultyFileSystem(MemoryFileSystem):
    """Files in memory whose n-th write goes wrong."""

    protocol = "faulty"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    fault: ClassVar[Fault] = Fault(at=-1, kind="none")

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        return super()._strip_protocol(str(path).removeprefix("faulty://"))

    def put_file(self, lpath: str, rpath: str, **kwargs: Any) -> None:
        self.pipe_file(rpath, Path(lpath).read_bytes())

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        kind = self.fault.kind if self.fault.strikes() else "none"
        if kind == "crash before":
            raise PowerCut
        if kind == "full":
            raise OSError(errno.ENOSPC, "No space left on device")
        if kind == "unavailable":
            raise OSError(errno.EIO, "Slow down")
        if kind == "short":
            value = value[:-1]
        super().pipe_file(path, value[: len(value) // 2] if kind.endswith("torn") else value, mode=mode)
        if kind in {"crash torn", "crash after"}:
            raise PowerCut
        if kind in {"answer lost", "answer lost, torn"}:
            raise TimeoutError("read timed out")


class LyingFileSystem(FaultyFileSystem):
    """A store that overwrites where it was told to create, as sshfs does."""

    protocol = "lying"

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        return super()._strip_protocol(str(path).removeprefix("lying://"))

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        super().pipe_file(path, value)


class LookingFileSystem(FaultyFileSystem):
    """A store that looks whether a name is taken and then writes, as fsspec does on local files."""

    protocol = "looking"
    everybody_looked: ClassVar[threading.Barrier] = threading.Barrier(probe.NUM_RACERS)

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        return super()._strip_protocol(str(path).removeprefix("looking://"))

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        if mode == "create" and self.exists(path):
            raise FileExistsError(path)
        if path.endswith("-race"):
            self.everybody_looked.wait()
        super().pipe_file(path, value)


class HangingFileSystem(FaultyFileSystem):
    """A store that never answers, like a network mount whose server is gone."""

    protocol = "hanging"
    released: ClassVar[threading.Event] = threading.Event()

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        self.released.wait()


for _filesystem in (FaultyFileSystem, LyingFileSystem, LookingFileSystem, HangingFileSystem):
    fsspec.register_implementation(_filesystem.protocol, _filesystem, clobber=True)


@pytest.fixture
def store() -> Iterator[StageStore]:
    FaultyFileSystem.store.clear()
    yield StageStore("faulty://runs", "stage2", FINGERPRINT)
    FaultyFileSystem.fault = Fault(at=-1, kind="none")


def publish(store: StageStore, tmp_path: Path, step: int, *, fence: int = 1) -> CheckpointRef:
    for path, body in FILES.items():
        (tmp_path / str(step) / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / str(step) / path).write_bytes(body + str(step).encode())
    return store.publish(
        tmp_path / str(step), step=step, fence=fence, kind=CheckpointKind.TRAINING, parent=None, info={}
    )


def test_a_commit_is_as_many_writes_as_these_tests_interrupt(store: StageStore, tmp_path: Path) -> None:
    FaultyFileSystem.fault = Fault(at=-1, kind="none")
    publish(store, tmp_path, 10)
    assert FaultyFileSystem.fault.num_writes == NUM_WRITES


@pytest.mark.parametrize("how", ["crash before", "crash torn", "crash after"])
@pytest.mark.parametrize("at", range(NUM_WRITES))
def test_a_crash_never_exposes_half_a_checkpoint(store: StageStore, tmp_path: Path, at: int, how: str) -> None:
    older = publish(store, tmp_path, 10)
    FaultyFileSystem.fault = Fault(at, how)
    with pytest.raises(PowerCut):
        publish(store, tmp_path, 20)
    found = store.find_newest()
    assert found is not None
    is_committed = at == NUM_WRITES - 1 and how == "crash after"
    assert (found != older) == is_committed
    step = "20" if is_committed else "10"
    assert (fetch(found, tmp_path / "cache") / "model.safetensors").read_bytes().endswith(step.encode())


@pytest.mark.parametrize("how", ["crash before", "crash torn", "crash after"])
@pytest.mark.parametrize("at", range(NUM_WRITES))
def test_the_attempt_after_a_crash_commits_the_same_step(store: StageStore, tmp_path: Path, at: int, how: str) -> None:
    FaultyFileSystem.fault = Fault(at, how)
    with pytest.raises(PowerCut):
        publish(store, tmp_path, 20)
    again = publish(store, tmp_path, 20, fence=2)
    assert store.find_newest() == again
    assert (fetch(again, tmp_path / "cache") / "model.safetensors").read_bytes().endswith(b"20")


@pytest.mark.parametrize("at", [NUM_WRITES - 2, NUM_WRITES - 1])
def test_a_lost_answer_to_a_creation_that_worked_is_no_failure(store: StageStore, tmp_path: Path, at: int) -> None:
    FaultyFileSystem.fault = Fault(at, "answer lost")
    checkpoint = publish(store, tmp_path, 10)
    assert store.find_newest() == checkpoint


def test_a_manifest_that_another_is_in_the_way_of_is_not_committed(store: StageStore, tmp_path: Path) -> None:
    FaultyFileSystem.fault = Fault(NUM_WRITES - 2, "answer lost, torn")
    with pytest.raises(StoreUnavailable, match="MANIFEST: other bytes arrived than were sent"):
        publish(store, tmp_path, 10)
    assert store.find_newest() is None


def test_a_store_that_recovers_at_once_is_tried_again(store: StageStore, tmp_path: Path) -> None:
    FaultyFileSystem.fault = Fault(NUM_WRITES - 1, "unavailable", num_times=2)
    checkpoint = publish(store, tmp_path, 10)
    assert store.find_newest() == checkpoint


@pytest.mark.parametrize("at", range(NUM_WRITES))
def test_an_outage_commits_nothing_and_says_why_on_one_line(store: StageStore, tmp_path: Path, at: int) -> None:
    FaultyFileSystem.fault = Fault(at, "unavailable", num_times=100)
    with pytest.raises(StoreUnavailable, match="Slow down") as caught:
        publish(store, tmp_path, 10)
    assert "\n" not in str(caught.value)
    assert store.find_newest() is None


@pytest.mark.parametrize("at", range(NUM_WRITES))
def test_a_full_store_is_told_apart_from_an_outage(store: StageStore, tmp_path: Path, at: int) -> None:
    FaultyFileSystem.fault = Fault(at, "full")
    with pytest.raises(DiskFull, match="No space left"):
        publish(store, tmp_path, 10)
    assert store.find_newest() is None


@pytest.mark.parametrize("at", [0, 1])
def test_a_file_that_arrives_short_is_not_committed(store: StageStore, tmp_path: Path, at: int) -> None:
    FaultyFileSystem.fault = Fault(at, "short")
    with pytest.raises(StoreUnavailable, match=r"513 bytes arrived, 514 were sent"):
        publish(store, tmp_path, 10)
    assert store.find_newest() is None


def test_an_outage_while_looking_for_the_newest_is_not_mistaken_for_damage(
    store: StageStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(store, tmp_path, 10)

    def refuse(self: Any, path: str, *args: Any, **kwargs: Any) -> bytes:
        raise OSError(errno.EIO, "Slow down")

    monkeypatch.setattr(FaultyFileSystem, "cat_file", refuse)
    with pytest.raises(StoreUnavailable, match="Slow down"):
        store.find_newest()


@pytest.mark.usefixtures("store")
def test_a_store_that_overwrites_instead_of_creating_is_refused() -> None:
    with pytest.raises(StoreUnavailable, match="created twice"):
        check_store("lying://runs")
    assert open_backend("lying://runs").list_names("") == []


@pytest.mark.usefixtures("store")
@pytest.mark.parametrize(
    ("operation", "answer", "message"),
    [
        ("cat_file", b"something else", "What was written is not what is read"),
        ("ls", [], "What was written is not listed"),
    ],
)
def test_a_store_that_does_not_show_what_was_written_is_refused(
    monkeypatch: pytest.MonkeyPatch, operation: str, answer: Any, message: str
) -> None:
    monkeypatch.setattr(FaultyFileSystem, operation, lambda *_, **__: answer)
    with pytest.raises(StoreUnavailable, match=message):
        check_store("faulty://runs")


@pytest.mark.usefixtures("store")
def test_a_probe_that_cannot_be_removed_is_told_and_no_reason_to_refuse(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(self: Any, path: str) -> None:
        raise OSError(errno.EIO, "Slow down")

    monkeypatch.setattr(FaultyFileSystem, "rm_file", refuse)
    check_store("faulty://runs")
    assert "could not be removed" in caplog.text


@pytest.mark.fault(
    47,
    "a store looks whether a name is taken, and then writes",
    how="eight creations at once, on a store in memory that does so",
    then="the start-up probe refuses it",
)
@pytest.mark.usefixtures("store")
def test_a_store_that_looks_and_then_writes_is_refused() -> None:
    with pytest.raises(StoreUnavailable, match="It lies: 8 of 8 racing writers"):
        check_store("looking://runs")
    assert open_backend("looking://runs").list_names("") == []


def test_a_store_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "PROBE_LIMIT_S", 0.2)
    try:
        with pytest.raises(StoreUnavailable, match="No answer within"):
            check_store("hanging://runs")
    finally:
        HangingFileSystem.released.set()


def test_an_s3_endpoint_where_nobody_listens_is_told_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{unused.getsockname()[1]}"
    for name, value in {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "canary-of-a-secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    filesystem = fsspec.get_filesystem_class("s3")
    # fsspec keeps one instance for equal arguments, and the endpoint is not among them.
    filesystem.clear_instance_cache()
    started = time.monotonic()
    try:
        with pytest.raises(StoreUnavailable, match=r"s3://bucket/runs cannot be used.*Could not connect") as caught:
            check_store("s3://bucket/runs")
    finally:
        filesystem.clear_instance_cache()
    assert time.monotonic() - started < probe.PROBE_LIMIT_S
    assert "canary" not in str(caught.value)
    assert "\n" not in str(caught.value)
