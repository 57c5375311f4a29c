"""A stage's store on every protocol, for the suites of this folder to inherit."""

import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from internvl_core.checkpoint import handover, publication
from internvl_core.checkpoint.backend import open_backend
from internvl_core.checkpoint.manifest import CheckpointKind
from internvl_core.checkpoint.remote_backend import open_filesystem
from internvl_core.checkpoint.store import Commit, Lease, Owner, StageStore, fetch
from internvl_core.contract import CheckpointRef
from internvl_core.errors import CheckpointCorrupt

FINGERPRINT = "0123456789abcdef" * 4
CONTENT = {
    "model.safetensors": bytes(range(256)) * 100,
    "optimizer/rank-0.bin": b"moments of rank 0",
    "metrics.jsonl": b'{"step": 1}\n',
    "empty.txt": b"",
}

Publish = Callable[..., CheckpointRef]


class StageStoreContract:
    """Subclasses provide the fixture `store_uri`: an empty store."""

    @pytest.fixture
    def store(self, store_uri: str) -> StageStore:
        return StageStore(store_uri, "stage2", FINGERPRINT)

    @pytest.fixture
    def publish(self, store: StageStore, tmp_path: Path) -> Publish:
        """Publish CONTENT, plus one file that says which step it is."""

        def publish(step: int, fence: int = 1, kind: CheckpointKind = CheckpointKind.TRAINING) -> CheckpointRef:
            directory = write_files(tmp_path / uuid.uuid4().hex, {**CONTENT, "step.txt": str(step).encode()})
            return store.publish(directory, step=step, fence=fence, kind=kind, parent=None, info={"step": step})

        return publish


class OnFiles:
    @pytest.fixture
    def store_uri(self, tmp_path: Path) -> str:
        return f"file://{tmp_path}/runs"


class InMemory:
    @pytest.fixture
    def store_uri(self) -> str:
        return f"memory://{uuid.uuid4().hex}/runs"


class OnS3:
    """Its users are marked `integration`."""

    @pytest.fixture
    def store_uri(self, s3_bucket_uri: str) -> str:
        return f"{s3_bucket_uri}/runs"


class OnSftp:
    """Its users are marked `integration`."""

    @pytest.fixture
    def store_uri(self, sftp_uri: str) -> str:
        return sftp_uri


class PresetClock:
    """A monotonic clock that only moves when somebody sleeps, and tells a witness."""

    def __init__(self, on_sleep: Callable[[float], object] = lambda _: None) -> None:
        self.now_s = 1000.0
        self._on_sleep = on_sleep

    def monotonic(self) -> float:
        return self.now_s

    def sleep(self, seconds: float, /) -> None:
        self.now_s += seconds
        assert self.now_s < 2000, "nobody is watched for so long"
        self._on_sleep(self.now_s)


def make_owner(run_id: str = "run", host: str = "elsewhere") -> Owner:
    """Make an owner on another machine, about which this one knows nothing."""
    return replace(Owner.of_this_process(run_id), host=host, boot_id=f"boot of {host}")


def take_lease(store: StageStore, run_id: str = "run") -> Lease:
    """Take the lease from whoever has it, as a process on another machine, to go on with what verifies."""
    return store.acquire(make_owner(run_id), choose_base=choose_newest(store), takes_over=True)


def choose_newest(store: StageStore) -> Callable[[Iterable[Commit]], Commit | None]:
    """Make a choice of the base that reads everything, as a download would."""

    def choose(commits: Iterable[Commit]) -> Commit | None:
        for commit in commits:
            try:
                store.verify(commit.checkpoint)
            except CheckpointCorrupt:
                continue
            return commit
        return None

    return choose


def choose_nothing(commits: Iterable[Commit]) -> None:
    """Start afresh."""


@contextmanager
def not_looking() -> Iterator[None]:
    """Let a zombie commit without a look at the leases: as if it had looked just before it was fenced."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (handover, publication):
            patch.setattr(module, "check_fence", lambda backend, fence: None)
        yield


def fetch_steps(store: StageStore, tmp_path: Path, *, passes_over: Iterable[int] = ()) -> list[int]:
    """Fetch everything that is committed and live, and read from each which step it is."""
    return [
        int((fetch(commit.checkpoint, tmp_path / "cache") / "step.txt").read_text())
        for commit in store.list_committed()
        if commit.step not in passes_over
    ]


def do_first(
    patch: pytest.MonkeyPatch, store: StageStore, operation: str, act: Callable[[], object], *, folder: str = ""
) -> None:
    """Have something happen right before an operation of a store's backend, the first one in a folder."""
    run = getattr(store._backend, operation)

    def act_and_run(name: str, *arguments: object) -> object:
        if name.startswith(folder):
            patch.undo()
            act()
        return run(name, *arguments)

    patch.setattr(store._backend, operation, act_and_run)


def write_files(directory: Path, content: dict[str, bytes]) -> Path:
    for path, body in content.items():
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        (directory / path).write_bytes(body)
    return directory


def read_files(directory: Path) -> dict[str, bytes]:
    found = {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }
    found.pop("MANIFEST", None)
    return found


def list_objects(store: StageStore) -> set[str]:
    """List every object of a stage by its path in the stage's directory."""
    filesystem, path = open_uri(store.uri)
    return {str(found).removeprefix(path).lstrip("/") for found in filesystem.find(path)}


def open_uri(uri: str) -> tuple[Any, str]:
    filesystem = open_filesystem(uri)
    return filesystem, filesystem._strip_protocol(uri)


def write(uri: str, body: bytes) -> None:
    """Put an object where it may be or not be, behind the store's back."""
    folder, _, name = uri.rpartition("/")
    open_backend(folder).put(name, body)


def overwrite(uri: str, change: Callable[[bytes], bytes]) -> None:
    """Change an object behind the store's back."""
    filesystem, path = open_uri(uri)
    filesystem.pipe_file(path, change(filesystem.cat_file(path)))


def remove(uri: str) -> None:
    filesystem, path = open_uri(uri)
    filesystem.rm_file(path)


def flip_byte(position: str) -> Callable[[bytes], bytes]:
    def flip(body: bytes) -> bytes:
        at = {"first": 0, "middle": len(body) // 2, "last": len(body) - 1}[position]
        return body[:at] + bytes([body[at] ^ 1]) + body[at + 1 :]

    return flip


def commit_uri(store: StageStore, step: int, *, kind: str = "training", fence: int = 1) -> str:
    return f"{store.uri}/commits/{step:012d}.{fence:06d}.{kind}.json"


def lease_uri(store: StageStore, fence: int) -> str:
    return f"{store.uri}/lease/{fence:06d}.json"
