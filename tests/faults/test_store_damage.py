"""What becomes of commits when the store loses, spoils or misunderstands what it is given."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from stage_store import (
    FINGERPRINT,
    do_first,
    flip_byte,
    list_objects,
    not_looking,
    overwrite,
    remove,
    take_lease,
    write_files,
)
from store_processes import START_LIMIT_S, read_newest, run_writer
from store_writer import STAGE, make_contents
from tcp_proxy import TcpProxy

from internvl_core.checkpoint.manifest import CheckpointKind
from internvl_core.checkpoint.store import StageStore, check_store, fetch, resolve_checkpoint
from internvl_core.contract import CheckpointRef
from internvl_core.errors import CheckpointCorrupt, Fenced, StoreUnavailable

pytestmark = pytest.mark.integration

Publish = Callable[..., CheckpointRef]


@pytest.mark.fault(
    45,
    "the store acknowledges a file that is not what was sent",
    how="it is cut short, or overwritten with zeros, before the commit",
    then="short: not committed; zeros: found when it is read back, never fetched, never counted",
)
@pytest.mark.parametrize("damage", ["short", "zeros"])
def test_a_file_that_the_store_spoilt_is_found(
    store: StageStore, publish: Publish, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    lease = take_lease(store)
    publish(1, lease.fence), publish(2, lease.fence)

    def spoil() -> None:
        (name,) = [name for name in list_objects(store) if name.startswith(f"data/{3:012d}") and "shard-2" in name]
        change = (lambda body: body[:-1]) if damage == "short" else (lambda body: bytes(len(body)))
        overwrite(f"{store.uri}/{name}", change)

    do_first(monkeypatch, store, "get_sizes_bytes", spoil, folder=f"data/{3:012d}")
    if damage == "short":
        with pytest.raises(StoreUnavailable, match=r"shard-2: 99999 bytes arrived, 100000 were sent"):
            publish(3, lease.fence)
    else:
        with pytest.raises(CheckpointCorrupt, match=r"shard-2: sha256 is"):
            store.verify(publish(3, lease.fence))
    assert store.collect_garbage(lease.fence, keep=2).removed == []
    assert read_newest(store, tmp_path / "cache") == 2


@pytest.mark.fault(
    47,
    "a store overwrites where it should create",
    how="a proxy takes If-None-Match out of what S3 is sent",
    then="the start-up probe refuses it before anything is trained",
)
def test_a_store_that_ignores_exclusive_creation_is_refused(
    s3_bucket_uri: str, far_store: TcpProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    far_store.replaces = (b"If-None-Match", b"X-Nothing-at-A")
    monkeypatch.setenv("AWS_ENDPOINT_URL", far_store.url)
    with pytest.raises(StoreUnavailable, match="created twice"):
        check_store(s3_bucket_uri)


@pytest.mark.fault(
    48,
    "a listing is stale",
    how="listings of leases that do not show the newest",
    then="the next lease is asked for by its name: the zombie is fenced, the taker takes the one after",
)
def test_a_stale_listing_hides_no_lease(store: StageStore, publish: Publish, monkeypatch: pytest.MonkeyPatch) -> None:
    first = take_lease(store)
    publish(1, first.fence)
    list_names = store._backend.list_names
    stale = list_names("lease")
    second = take_lease(store)
    monkeypatch.setattr(store._backend, "list_names", lambda folder: stale if folder == "lease" else list_names(folder))
    with pytest.raises(Fenced, match="lease 2 was taken"):
        publish(2, first.fence)
    with not_looking():
        publish(3, first.fence)
    assert [commit.step for commit in store.list_committed()] == [1]
    second.check()
    assert take_lease(store).fence == 3


@pytest.mark.fault(
    68,
    "any file of a checkpoint rots at rest",
    how="the first, middle or last bit of each object of the newest commit",
    then="found before any byte is used; the commit before is used",
)
def test_rot_in_any_object_of_the_newest_commit_falls_back_to_the_one_before(
    store: StageStore, publish: Publish, tmp_path: Path
) -> None:
    lease = take_lease(store)
    publish(1, lease.fence)
    newest = publish(2, lease.fence)
    names = [name for name in list_objects(store) if name.split("/")[1].startswith(f"{2:012d}")]
    assert len(names) == 6
    for number, (name, position) in enumerate((name, where) for name in names for where in ("first", "middle", "last")):
        overwrite(f"{store.uri}/{name}", flip_byte(position))
        with pytest.raises(CheckpointCorrupt):
            fetch(newest, tmp_path / f"cache-{number}")
        assert read_newest(store, tmp_path / f"cache-{number}") == 1, name
        overwrite(f"{store.uri}/{name}", flip_byte(position))
    assert read_newest(store, tmp_path / "cache") == 2


@pytest.mark.fault(
    69,
    "the two newest commits are damaged",
    how="a flipped bit in each",
    then="the third is used; a collection counts what verifies and removes nothing",
)
def test_with_the_two_newest_damaged_the_third_is_used_and_kept(
    store: StageStore, publish: Publish, tmp_path: Path
) -> None:
    lease = take_lease(store)
    for step in (1, 2, 3, 4):
        checkpoint = publish(step, lease.fence)
        if step > 2:
            overwrite(f"{checkpoint.uri}/shard-1", flip_byte("middle"))
    assert read_newest(store, tmp_path / "cache") == 2
    assert store.collect_garbage(lease.fence, keep=2).removed == []
    again = take_lease(store)
    assert again.base is not None
    assert again.base.step == 2
    # What is history now, damaged or not, goes as soon as two others verify.
    publish(3, again.fence)
    assert [name.step for name in store.collect_garbage(again.fence, keep=2).removed] == [1, 3, 4]
    assert [(commit.step, commit.fence) for commit in store.list_committed(include_dead=True)] == [(3, 2), (2, 1)]


@pytest.mark.fault(
    70,
    "somebody deletes by hand",
    how="a file, the MANIFEST, the record, or all of the newest commit's data",
    then="the commit before is used; nobody crashes",
)
@pytest.mark.parametrize("what", ["a file", "the manifest", "the record", "the data"])
def test_what_was_deleted_by_hand_is_passed_over(
    store: StageStore, publish: Publish, tmp_path: Path, what: str
) -> None:
    lease = take_lease(store)
    publish(1, lease.fence), publish(2, lease.fence)
    newest = publish(3, lease.fence)
    save = newest.uri.removeprefix(f"{store.uri}/")
    names = {
        "a file": [f"{save}/shard-0"],
        "the manifest": [f"{save}/MANIFEST"],
        "the record": [name for name in list_objects(store) if name.startswith(f"commits/{3:012d}")],
        "the data": [name for name in list_objects(store) if name.startswith(save)],
    }[what]
    for name in names:
        remove(f"{store.uri}/{name}")
    assert read_newest(store, tmp_path / "cache") == 2
    if what != "a file":
        assert resolve_checkpoint(store.uri).uri != newest.uri
    assert store.collect_garbage(lease.fence, keep=2).removed == []
    again = take_lease(store)
    assert again.base is not None
    assert again.base.step == 2


@pytest.mark.fault(
    37,
    "power fails: what was written later is on the disk, what was written before is not",
    how="the order of every fsync and link of a commit; data that came back as zeros",
    then="all of a save is synced before its record has a name; what is missing is found, the commit before is used",
)
def test_everything_of_a_save_is_on_the_disk_before_its_record_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = StageStore(f"file://{tmp_path}/store", STAGE, FINGERPRINT)
    lease = take_lease(store)
    synced: set[str] = set()
    at_commit: list[set[str]] = []
    fsync, link = os.fsync, os.link

    def note_fsync(descriptor: int) -> None:
        fsync(descriptor)
        synced.add(str(Path(f"/proc/self/fd/{descriptor}").readlink()))

    def note_link(source: Any, target: Any) -> None:
        if "/commits/" in str(target):
            at_commit.append({*synced, str(source)} if str(source) in synced else set(synced))
        link(source, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "link", note_link)
    directory = write_files(tmp_path / "save", make_contents(1) | {"deep/er/file": b"deep"})
    checkpoint = store.publish(directory, step=1, fence=lease.fence, kind=CheckpointKind.TRAINING, parent=None, info={})
    monkeypatch.undo()
    save = Path(checkpoint.uri.removeprefix("file://"))
    needed = {str(path) for path in save.rglob("*") if path.name != "MANIFEST"} | {str(save), str(save.parent)}
    assert needed <= at_commit[0]
    # MANIFEST and record are synced under another name, and then linked.
    assert any(".MANIFEST." in path for path in at_commit[0])
    assert any(f".{1:012d}.{1:06d}.training.json." in path for path in at_commit[0])
    assert str(save.parent.parent / "commits") in synced


@pytest.mark.fault(
    37,
    "power fails: what was written later is on the disk, what was written before is not",
    how="the newest commit's files come back empty, as zeros, or not at all",
    then="they are not the manifest's; the commit before is used",
)
@pytest.mark.parametrize("damage", ["empty", "zeros", "gone"])
def test_a_commit_whose_data_did_not_survive_a_power_failure_is_passed_over(tmp_path: Path, damage: str) -> None:
    store = StageStore(f"file://{tmp_path}/store", STAGE, FINGERPRINT)
    with run_writer(f"file://{tmp_path}/store", "--steps", "2") as process:
        assert process.wait(START_LIMIT_S) == 0
    newest = Path(store.list_committed()[0].checkpoint.uri.removeprefix("file://"))
    match damage:
        case "gone":
            shutil.rmtree(newest)
        case _:
            for path in newest.glob("shard-*"):
                path.write_bytes(b"" if damage == "empty" else bytes(path.stat().st_size))
    assert read_newest(store, tmp_path / "cache") == 1
