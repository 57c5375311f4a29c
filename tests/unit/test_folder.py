import uuid
from pathlib import Path

import fsspec
import pytest

from internvl_core.checkpoint.folder import (
    RemoteFolder,
    digest_file,
    digest_folder,
    digest_model,
    fetch_folder,
    resolve_folder,
)
from internvl_core.checkpoint.manifest import CheckpointKind
from internvl_core.checkpoint.store import StageStore
from internvl_core.checkpoint.target import check_target, open_target
from internvl_core.contract import CheckpointRef
from internvl_core.errors import ArgumentError, CheckpointCorrupt, CheckpointNotFound, StoreUnavailable

CONTENT = {"config.json": b"{}", "model.safetensors": b"weights"}


@pytest.fixture
def memory_uri() -> str:
    return f"memory://{uuid.uuid4().hex}/model"


def write_remote(uri: str, content: dict[str, bytes]) -> None:
    for name, body in content.items():
        fsspec.filesystem("memory").pipe_file(f"{uri.removeprefix('memory:/')}/{name}", body)


def read_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "MANIFEST"}


def publish(store_uri: str, folder: Path, *, step: int = 1) -> tuple[StageStore, CheckpointRef]:
    folder.mkdir(exist_ok=True)
    for name, body in CONTENT.items():
        (folder / name).write_bytes(body)
    store = StageStore(store_uri, "stage", "0" * 16)
    return store, store.publish(folder, step=step, fence=step, kind=CheckpointKind.FINAL, parent=None, info={})


@pytest.mark.parametrize("prefix", ["", "file://"])
def test_a_local_folder_is_handed_out_as_it_is(tmp_path: Path, prefix: str) -> None:
    assert fetch_folder(f"{prefix}{tmp_path}/", tmp_path / "cache") == tmp_path
    assert not (tmp_path / "cache").exists()


def test_a_relative_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    assert fetch_folder("model", tmp_path / "cache") == tmp_path / "model"


def test_a_remote_folder_is_copied_once(tmp_path: Path, memory_uri: str) -> None:
    write_remote(memory_uri, CONTENT)
    folder = fetch_folder(memory_uri, tmp_path)
    assert read_files(folder) == CONTENT
    (folder / "config.json").write_bytes(b"mark")
    assert read_files(fetch_folder(f"{memory_uri}/", tmp_path))["config.json"] == b"mark"
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_file_written_anew_is_fetched_again_though_its_size_is_the_same(tmp_path: Path, memory_uri: str) -> None:
    write_remote(memory_uri, CONTENT)
    fetch_folder(memory_uri, tmp_path)
    write_remote(memory_uri, {"model.safetensors": b"WEIGHTS"})
    assert read_files(fetch_folder(memory_uri, tmp_path))["model.safetensors"] == b"WEIGHTS"


def test_weights_that_nobody_reads_stay_where_they_are(tmp_path: Path, memory_uri: str) -> None:
    unread = {"pytorch_model.bin": b"p", "flax_model.msgpack": b"f", "model.gguf": b"g", "optimizer/state.bin": b"o"}
    write_remote(memory_uri, CONTENT | unread)
    assert read_files(fetch_folder(memory_uri, tmp_path)) == CONTENT


def test_pickled_weights_are_fetched_where_there_are_no_others(tmp_path: Path, memory_uri: str) -> None:
    write_remote(memory_uri, {"pytorch_model.bin": b"p"})
    assert read_files(fetch_folder(memory_uri, tmp_path)) == {"pytorch_model.bin": b"p"}


def test_a_committed_checkpoint_is_verified(tmp_path: Path, memory_uri: str) -> None:
    _, checkpoint = publish(memory_uri, tmp_path / "saved")
    assert read_files(fetch_folder(checkpoint.uri, tmp_path / "cache")) == CONTENT
    write_remote(checkpoint.uri, {"model.safetensors": b"WEIGHTS"})
    with pytest.raises(CheckpointCorrupt):
        fetch_folder(checkpoint.uri, tmp_path / "another cache")


def test_a_stage_stands_for_its_newest_final_checkpoint(tmp_path: Path) -> None:
    publish(str(tmp_path / "store"), tmp_path / "saved")
    store, newest = publish(str(tmp_path / "store"), tmp_path / "saved", step=2)
    assert fetch_folder(store.uri, tmp_path / "cache") == Path(newest.uri.removeprefix("file://"))


def test_a_save_that_was_never_committed_is_no_checkpoint(tmp_path: Path) -> None:
    store, checkpoint = publish(str(tmp_path / "store"), tmp_path / "saved")
    for record in Path(store.uri.removeprefix("file://"), "commits").iterdir():
        record.unlink()
    with pytest.raises(CheckpointNotFound):
        fetch_folder(checkpoint.uri, tmp_path / "cache")


@pytest.mark.parametrize("is_remote", [False, True])
def test_a_stage_with_nothing_but_uncommitted_saves_is_no_folder_of_a_model(
    tmp_path: Path, memory_uri: str, is_remote: bool
) -> None:
    store_uri = memory_uri if is_remote else f"file://{tmp_path}/store"
    store, checkpoint = publish(store_uri, tmp_path / "saved")
    filesystem, root = fsspec.core.url_to_fs(store.uri)
    filesystem.rm(f"{root}/commits", recursive=True)
    # As if somebody had put a model there as well.
    filesystem.pipe_file(f"{root}/config.json", b"{}")
    for uri in (store.uri, checkpoint.uri):
        for look in (resolve_folder, digest_model):
            with pytest.raises(CheckpointNotFound, match=r"never committed\. Committed: nothing"):
                look(uri)


def test_a_committed_checkpoint_counts_by_its_manifest(tmp_path: Path, memory_uri: str) -> None:
    store, checkpoint = publish(memory_uri, tmp_path / "saved")
    assert digest_model(store.uri) == digest_model(checkpoint.uri) == checkpoint.digest


def test_a_local_folder_counts_by_its_content(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("model", "copy", "other")]
    for folder, body in zip(folders, (b"weights", b"weights", b"WEIGHTS"), strict=True):
        (folder / "deep").mkdir(parents=True)
        (folder / "deep/a.bin").write_bytes(body)
    digests = [digest_model(f"file://{folder}") for folder in folders]
    assert digests == [digest_folder(folder) for folder in folders]
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize("place", ["memory", "s3"])
def test_a_remote_folder_counts_by_its_listing(request: pytest.FixtureRequest, place: str) -> None:
    uri = request.getfixturevalue("memory_uri" if place == "memory" else "s3_bucket_uri") + "/deep/model"
    filesystem, root = fsspec.core.url_to_fs(uri, use_listings_cache=False)

    def digest(content: dict[str, bytes]) -> str:
        for name, body in content.items():
            filesystem.pipe_file(f"{root}/{name}", body)
        return digest_model(uri)

    unread = {"a/b": b"", "a.h5": b""}
    changes = (CONTENT, {"model.safetensors": b"WEIGHTS"}, {"tokenizer.json": b"{}"}, unread)
    found = [digest(content) for content in changes]
    assert len(set(found)) == 3
    assert found[2] == found[3] == digest_model(uri + "/")


def test_a_file_counts_by_its_content_or_by_what_its_store_says(tmp_path: Path, memory_uri: str) -> None:
    store, checkpoint = publish(str(tmp_path / "store"), tmp_path / "saved")
    name = "model.safetensors"
    local = digest_file(f"file://{tmp_path}/saved/{name}")
    assert local == digest_file(f"{checkpoint.uri}/{name}") == digest_file(f"{store.uri}/{name}")
    write_remote(memory_uri, CONTENT)
    remote = digest_file(f"{memory_uri}/{name}")
    write_remote(memory_uri, {"config.json": b"[]"})
    assert digest_file(f"{memory_uri}/{name}") == remote
    write_remote(memory_uri, {name: b"WEIGHTS"})
    assert digest_file(f"{memory_uri}/{name}") != remote
    for folder in (memory_uri, checkpoint.uri, f"file://{tmp_path}/saved"):
        with pytest.raises(ArgumentError, match=r"mlp\.pth: there is no such file"):
            digest_file(f"{folder}/mlp.pth")


def test_a_file_that_changes_while_it_is_read_is_not_taken(memory_uri: str) -> None:
    write_remote(memory_uri, CONTENT)
    folder = resolve_folder(memory_uri)
    assert isinstance(folder, RemoteFolder)
    assert folder.read("config.json") == b"{}"
    write_remote(memory_uri, {"config.json": b"{  }"})
    with pytest.raises(StoreUnavailable, match="4 bytes arrived, the store says 2"):
        folder.read("config.json")
    fsspec.filesystem("memory").rm(memory_uri.removeprefix("memory:/") + "/config.json")
    with pytest.raises(StoreUnavailable, match="vanished"):
        folder.read("config.json")


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("/no/such/folder", "no such folder"),
        ("memory://nothing/here", "no such folder, or no file in it"),
        ("magic://bucket/model", "Unknown protocol magic://"),
        ("no/such/folder", "relative path"),
    ],
)
def test_what_is_not_there_is_refused(tmp_path: Path, uri: str, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        fetch_folder(uri, tmp_path)


def test_files_for_a_remote_target_leave_this_machine_one_by_one(tmp_path: Path, memory_uri: str) -> None:
    with open_target(memory_uri, scratch_dir=tmp_path) as target:
        for name, body in CONTENT.items():
            (target.folder / name).write_bytes(body)
            target.store(target.folder / name)
            assert not any(target.folder.iterdir())
    assert target.sizes_bytes == {name: len(body) for name, body in CONTENT.items()}
    assert not any(tmp_path.iterdir())
    assert read_files(fetch_folder(memory_uri, tmp_path)) == CONTENT


def test_files_for_a_local_target_are_written_in_place(tmp_path: Path) -> None:
    with open_target(str(tmp_path / "deep" / "target"), scratch_dir=tmp_path / "scratch") as target:
        (target.folder / "a").write_bytes(b"abc")
        target.store(target.folder / "a")
    assert read_files(tmp_path / "deep" / "target") == {"a": b"abc"}
    assert not (tmp_path / "scratch").exists()


def test_a_target_that_has_files_is_refused(tmp_path: Path, memory_uri: str) -> None:
    write_remote(memory_uri, {"README.md": b""})
    (tmp_path / "a").touch()
    for uri, message in (
        (memory_uri, "is not empty"),
        (str(tmp_path), "is not empty"),
        (str(tmp_path / "a"), "is a file"),
        ("memory://bucket", "is a whole bucket"),
        ("magic://bucket/a", "Unknown protocol"),
    ):
        with pytest.raises(ArgumentError, match=message):
            check_target(uri)
