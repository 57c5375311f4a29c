import uuid
from pathlib import Path

import fsspec
import pytest

from internvl_core.checkpoint.folder import fetch_folder
from internvl_core.checkpoint.manifest import CheckpointKind
from internvl_core.checkpoint.store import StageStore
from internvl_core.checkpoint.target import check_target, open_target
from internvl_core.contract import CheckpointRef
from internvl_core.errors import ArgumentError, CheckpointCorrupt, CheckpointNotFound

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
