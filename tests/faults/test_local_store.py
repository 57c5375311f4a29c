"""A store on a local disk that fills up, runs out of inodes, or fails to keep what was written."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from small_disk import mounted

from internvl_core.checkpoint.fetch import copy_checkpoint
from internvl_core.checkpoint.manifest import CheckpointKind
from internvl_core.checkpoint.store import StageStore, check_store
from internvl_core.contract import CheckpointRef
from internvl_core.errors import DiskFull

FINGERPRINT = "0123456789abcdef" * 4
PUBLISH = """
import sys
from pathlib import Path
from internvl_core.checkpoint.manifest import CheckpointKind
from internvl_core.checkpoint.store import StageStore
from internvl_core.errors import InternVLError

store = StageStore(sys.argv[1], "stage2", "0123456789abcdef" * 4)
try:
    store.publish(Path(sys.argv[2]), step=20, fence=1, kind=CheckpointKind.TRAINING, parent=None, info={})
except InternVLError as error:
    print(error)
    sys.exit(error.exit_code)
"""


def publish(store: StageStore, folder: Path, step: int, *, num_bytes: int = 1000, num_files: int = 1) -> CheckpointRef:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(num_files):
        (folder / f"shard-{number}.safetensors").write_bytes(os.urandom(num_bytes))
    return store.publish(folder, step=step, fence=1, kind=CheckpointKind.TRAINING, parent=None, info={})


@pytest.mark.fault(
    34,
    "the disk of a local store is full",
    how="tmpfs of 1 MiB",
    then="74; the commit before is whole; with room it goes on",
)
def test_a_store_that_is_full_keeps_what_it_has(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "size=1m") as disk:
        store = StageStore(f"file://{disk}/runs", "stage2", FINGERPRINT)
        older = publish(store, tmp_path / "10", 10)
        with pytest.raises(DiskFull, match=r"No space left on device.* Make room and run again"):
            publish(store, tmp_path / "20", 20, num_bytes=2 << 20)
        assert store.find_newest() == older
        store.verify(older)
        shutil.rmtree(next(Path(disk).glob("runs/*/data/000000000020.*")))
        store.verify(publish(store, tmp_path / "30", 30))


@pytest.mark.fault(
    34,
    "the disk of a local store is full at the start",
    how="tmpfs filled to the brim",
    then="74 before anything is trained",
)
def test_a_store_without_room_for_a_record_is_refused_at_the_start(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "size=64k") as disk:
        (disk / "runs").mkdir()
        with pytest.raises(OSError, match="No space left"):
            (disk / "full").write_bytes(bytes(1 << 20))
        with pytest.raises(DiskFull, match="Make room"):
            check_store(f"file://{disk}/runs")


@pytest.mark.fault(
    36, "a local store runs out of inodes", how="tmpfs with 30 inodes", then="74; the commit before is whole"
)
def test_a_store_without_inodes_keeps_what_it_has(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "nr_inodes=30") as disk:
        store = StageStore(f"file://{disk}/runs", "stage2", FINGERPRINT)
        older = publish(store, tmp_path / "10", 10)
        with pytest.raises(DiskFull, match="No space left on device"):
            publish(store, tmp_path / "20", 20, num_files=40)
        assert store.find_newest() == older
        store.verify(older)


@pytest.mark.fault(
    51, "the disk fills up in a download", how="tmpfs of 1 MiB", then="74; nothing half is left, and with room it works"
)
@pytest.mark.parametrize("protocol", ["file", pytest.param("s3", marks=pytest.mark.integration)])
def test_a_download_that_does_not_fit_leaves_nothing(
    protocol: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    store_uri = f"file://{tmp_path}/runs" if protocol == "file" else request.getfixturevalue("s3_bucket_uri")
    store = StageStore(store_uri, "stage2", FINGERPRINT)
    checkpoint = publish(store, tmp_path / "local", 10, num_bytes=(1 << 20) + 1, num_files=2)
    with mounted(tmp_path / "disk", "size=1m") as disk:
        with pytest.raises(DiskFull, match="No space left on device"):
            copy_checkpoint(checkpoint, disk / "fetched")
        assert list(disk.iterdir()) == []
    copy_checkpoint(checkpoint, tmp_path / "fetched")
    assert len(list((tmp_path / "fetched").iterdir())) == 2


@pytest.mark.fault(
    35,
    "a disk fails while a checkpoint is synced",
    how="strace: EIO from the n-th fsync",
    then="69, not asked again; what is there is whole",
)
@pytest.mark.parametrize("error", ["EIO", "EDQUOT"])
@pytest.mark.parametrize("number", range(1, 7))
def test_a_sync_that_fails_is_a_publication_that_failed(tmp_path: Path, number: int, error: str) -> None:
    store = StageStore(f"file://{tmp_path}/runs", "stage2", FINGERPRINT)
    older = publish(store, tmp_path / "10", 10)
    publish(store, tmp_path / "local", 15)
    done = run_under_strace(f"fsync:error={error}:when={number}", store, tmp_path / "local")
    assert done.returncode == (74 if error == "EDQUOT" else 69), done.stdout + done.stderr
    assert ("Disk quota exceeded" if error == "EDQUOT" else "Input/output error") in done.stdout
    assert len(done.stdout.splitlines()) == 1
    # Where the record itself was made before the sync of its folder failed, it is there, and whole.
    committed = [commit.checkpoint for commit in store.list_committed()]
    assert len(committed) == (3 if number == 6 else 2)
    assert older in committed
    for checkpoint in committed:
        store.verify(checkpoint)


def run_under_strace(injection: str, store: StageStore, directory: Path) -> subprocess.CompletedProcess[str]:
    """Publish step 20 in a process whose system calls fail as asked for."""
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("NOT TESTED: system calls that fail need strace: apt-get install strace")
    tracing = [
        strace,
        "-f",
        "-qq",
        "-o",
        "/dev/null",
        "-e",
        f"trace={injection.partition(':')[0]}",
        "-e",
        f"inject={injection}",
    ]
    if subprocess.run([strace, "-o", "/dev/null", "true"], capture_output=True, check=False).returncode:
        pytest.skip("NOT TESTED: this machine lets nobody trace a process")
    store_uri = store.uri.rpartition("/")[0]
    command = [*tracing, sys.executable, "-c", PUBLISH, store_uri, str(directory)]
    return subprocess.run(command, capture_output=True, text=True, check=False)
