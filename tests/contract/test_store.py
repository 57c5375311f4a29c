"""What every store must do, proven by one suite that each protocol inherits."""

import logging
import os
import shutil
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from stage_store import (
    CONTENT,
    FINGERPRINT,
    InMemory,
    OnFiles,
    OnS3,
    Publish,
    StageStoreContract,
    commit_uri,
    flip_byte,
    open_uri,
    overwrite,
    read_files,
    remove,
    write_files,
)

from internvl_core.checkpoint.backend import open_backend
from internvl_core.checkpoint.manifest import CheckpointKind
from internvl_core.checkpoint.record import pack_record
from internvl_core.checkpoint.store import (
    StageStore,
    check_store,
    fetch,
    read_file,
    read_manifest,
    resolve_checkpoint,
)
from internvl_core.contract import CheckpointRef
from internvl_core.errors import CheckpointCorrupt, CheckpointNotFound, Fenced, StoreUnavailable

NUM_WRITERS = 8
NUM_RACES = 20


class StoreContract(StageStoreContract):
    def test_the_probe_accepts_the_store_and_leaves_nothing_behind(self, store_uri: str) -> None:
        check_store(store_uri)
        filesystem, path = open_uri(store_uri)
        assert filesystem.find(path) == []

    def test_what_is_published_is_fetched_unchanged(self, publish: Publish, tmp_path: Path) -> None:
        checkpoint = publish(7)
        fetched = fetch(checkpoint, tmp_path / "cache")
        assert read_files(fetched) == {**CONTENT, "step.txt": b"7"}

    def test_the_manifest_tells_where_a_checkpoint_came_from(self, store: StageStore, tmp_path: Path) -> None:
        directory = write_files(tmp_path / "local", CONTENT)
        parent = CheckpointRef("s3://elsewhere/stage1", "ab" * 32)
        info: dict[str, Any] = {"arguments": {"learning_rate": 4e-5}, "world_size": 2}
        checkpoint = store.publish(directory, step=3, fence=2, kind=CheckpointKind.FINAL, parent=parent, info=info)
        manifest = read_manifest(checkpoint)
        assert (manifest.stage, manifest.fingerprint, manifest.step, manifest.fence) == ("stage2", FINGERPRINT, 3, 2)
        assert (manifest.kind, manifest.parent, manifest.info) == (CheckpointKind.FINAL, parent, info)
        assert manifest.digest == checkpoint.digest
        assert {entry.path: entry.size_bytes for entry in manifest.files} == {k: len(v) for k, v in CONTENT.items()}

    def test_the_local_directory_is_left_as_it_was(self, store: StageStore, tmp_path: Path) -> None:
        directory = write_files(tmp_path / "local", CONTENT)
        store.publish(directory, step=1, fence=1, kind=CheckpointKind.FINAL, parent=None, info={})
        assert read_files(directory) == CONTENT

    def test_a_stage_without_commits_has_nothing_to_find(self, store: StageStore) -> None:
        assert store.find_newest() is None
        assert store.find_handover() is None
        assert store.list_committed() == []

    def test_the_newest_is_the_highest_step_then_the_highest_fence(self, store: StageStore, publish: Publish) -> None:
        publish(20)
        publish(9)
        newest = publish(20, fence=2)
        assert store.find_newest() == newest
        assert [(commit.step, commit.fence) for commit in store.list_committed()] == [(20, 2), (20, 1), (9, 1)]

    def test_a_step_can_be_committed_to_resume_from_and_as_final_weights(
        self, store: StageStore, publish: Publish
    ) -> None:
        final = publish(20, kind=CheckpointKind.FINAL)
        training = publish(20)
        assert store.find_newest() == final
        assert store.find_newest(CheckpointKind.TRAINING) == training
        assert store.find_newest(CheckpointKind.FINAL) == final

    def test_stages_and_fingerprints_do_not_see_each_other(self, store_uri: str, publish: Publish) -> None:
        publish(20)
        assert StageStore(store_uri, "stage2", "f" * 64).find_newest() is None
        assert StageStore(store_uri, "stage1", FINGERPRINT).find_newest() is None

    @pytest.mark.parametrize("position", ["first", "middle", "last"])
    @pytest.mark.parametrize("path", ["model.safetensors", "optimizer/rank-0.bin", "step.txt"])
    def test_a_flipped_byte_is_caught_before_use(
        self, publish: Publish, tmp_path: Path, path: str, position: str
    ) -> None:
        checkpoint = publish(7)
        overwrite(f"{checkpoint.uri}/{path}", flip_byte(position))
        with pytest.raises(CheckpointCorrupt, match=path):
            fetch(checkpoint, tmp_path / "cache")
        with pytest.raises(CheckpointCorrupt, match=path):
            read_file(checkpoint, path)
        assert list((tmp_path / "cache").glob("*")) == []

    def test_a_truncated_file_is_caught_with_both_sizes(self, publish: Publish, tmp_path: Path) -> None:
        checkpoint = publish(7)
        overwrite(f"{checkpoint.uri}/model.safetensors", lambda body: body[:-1])
        with pytest.raises(CheckpointCorrupt, match=r"model\.safetensors: 25599 bytes, the manifest says 25600"):
            fetch(checkpoint, tmp_path / "cache")

    def test_a_missing_file_is_caught(self, publish: Publish, tmp_path: Path) -> None:
        checkpoint = publish(7)
        remove(f"{checkpoint.uri}/optimizer/rank-0.bin")
        with pytest.raises(CheckpointCorrupt, match=r"optimizer/rank-0\.bin: missing"):
            fetch(checkpoint, tmp_path / "cache")

    def test_a_small_file_is_read_without_the_others(self, publish: Publish) -> None:
        assert read_file(publish(7), "metrics.jsonl") == CONTENT["metrics.jsonl"]

    def test_a_file_that_was_never_published_is_not_found(self, publish: Publish) -> None:
        with pytest.raises(CheckpointNotFound, match="no such file"):
            read_file(publish(7), "../commits/x")

    def test_without_its_commit_record_a_save_does_not_exist(
        self, store: StageStore, publish: Publish, tmp_path: Path
    ) -> None:
        older, newer = publish(10), publish(20)
        remove(commit_uri(store, 20))
        assert store.find_newest() == older
        with pytest.raises(CheckpointNotFound, match="never committed"):
            fetch(newer, tmp_path / "cache")

    def test_an_uncommitted_save_is_answered_with_the_committed_steps(
        self, store: StageStore, publish: Publish
    ) -> None:
        publish(2000)
        publish(3000)
        uncommitted = publish(4000)
        remove(commit_uri(store, 4000))
        with pytest.raises(
            CheckpointNotFound, match=r"has no commit record, so it was never committed\. Committed: 2000, 3000\."
        ):
            resolve_checkpoint(uncommitted.uri)

    def test_a_directory_without_commits_is_answered_with_nothing(self, store: StageStore) -> None:
        with pytest.raises(CheckpointNotFound, match=r"never committed\. Committed: nothing\."):
            resolve_checkpoint(store.uri)

    @pytest.mark.parametrize("position", ["first", "middle", "last"])
    @pytest.mark.parametrize("target", ["commit record", "MANIFEST"])
    def test_a_damaged_record_is_passed_over_with_the_reason(
        self, store: StageStore, publish: Publish, caplog: pytest.LogCaptureFixture, target: str, position: str
    ) -> None:
        older, newer = publish(10), publish(20)
        uri = commit_uri(store, 20) if target == "commit record" else f"{newer.uri}/MANIFEST"
        overwrite(uri, flip_byte(position))
        with caplog.at_level(logging.WARNING):
            assert store.find_newest() == older
        assert "Passed over step 20" in caplog.text
        assert uri in caplog.text
        with pytest.raises(CheckpointCorrupt):
            read_manifest(newer)

    def test_a_missing_manifest_is_passed_over(self, store: StageStore, publish: Publish) -> None:
        older, newer = publish(10), publish(20)
        remove(f"{newer.uri}/MANIFEST")
        assert store.find_newest() == older

    def test_a_whole_manifest_of_another_checkpoint_is_not_believed(self, store: StageStore, publish: Publish) -> None:
        older, newer = publish(10), publish(20)
        filesystem, path = open_uri(f"{older.uri}/MANIFEST")
        manifest = filesystem.cat_file(path)
        overwrite(f"{newer.uri}/MANIFEST", lambda _: manifest)
        assert store.find_newest() == older
        with pytest.raises(CheckpointCorrupt, match="the commit record says"):
            read_manifest(newer)

    def test_a_record_under_another_name_is_not_believed(self, store: StageStore, publish: Publish) -> None:
        publish(10)
        older, newer = publish(20), publish(30)
        filesystem, path = open_uri(commit_uri(store, 20))
        record = filesystem.cat_file(path)
        overwrite(commit_uri(store, 30), lambda _: record)
        assert store.find_newest() == older
        with pytest.raises(CheckpointCorrupt, match="not what its name says"):
            read_manifest(newer)

    @pytest.mark.parametrize("content", [{}, {"data": "x", "manifest": "y", "kind": "training", "origin": {}}])
    def test_a_record_that_is_no_commit_is_not_believed(
        self, store: StageStore, publish: Publish, content: dict[str, object]
    ) -> None:
        older, newer = publish(10), publish(20)
        overwrite(commit_uri(store, 20), lambda _: pack_record(content))
        assert store.find_newest() == older
        with pytest.raises(CheckpointCorrupt, match="not a commit record"):
            read_manifest(newer)

    def test_a_damaged_record_beside_the_right_one_is_in_nobodys_way(self, store: StageStore, publish: Publish) -> None:
        publish(20)
        final = publish(20, kind=CheckpointKind.FINAL)
        overwrite(commit_uri(store, 20), flip_byte("last"))
        assert resolve_checkpoint(final.uri) == final

    def test_a_checkpoint_that_is_not_in_a_store_is_not_found(self, store: StageStore) -> None:
        with pytest.raises(CheckpointNotFound, match="never committed"):
            read_manifest(CheckpointRef(f"{store.uri}/elsewhere", "0" * 64))

    def test_a_commit_is_found_by_its_name(self, store: StageStore, publish: Publish) -> None:
        checkpoint = publish(10)
        assert store.find_commit(10, 1, CheckpointKind.TRAINING) == checkpoint
        assert store.find_commit(10, 1, CheckpointKind.FINAL) is None

    def test_a_digest_that_is_not_the_committed_one_is_refused(self, publish: Publish, tmp_path: Path) -> None:
        checkpoint = publish(10)
        with pytest.raises(CheckpointCorrupt, match="asked for"):
            fetch(CheckpointRef(checkpoint.uri, "0" * 64), tmp_path / "cache")

    def test_a_second_commit_of_the_same_step_and_fence_is_refused(self, store: StageStore, publish: Publish) -> None:
        first = publish(10)
        with pytest.raises(Fenced, match="another process committed step 10 with fence 1"):
            publish(10)
        assert store.find_newest() == first

    def test_a_data_directory_resolves_to_its_checkpoint(self, publish: Publish) -> None:
        older = publish(10)
        publish(20)
        assert resolve_checkpoint(older.uri + "/") == older

    def test_a_stage_directory_resolves_to_its_newest_final_weights(self, store: StageStore, publish: Publish) -> None:
        final = publish(10, kind=CheckpointKind.FINAL)
        newest = publish(20)
        assert resolve_checkpoint(store.uri) == final
        remove(commit_uri(store, 10, kind="final"))
        assert resolve_checkpoint(store.uri) == newest

    def test_a_stage_directory_where_nothing_verifies_is_corrupt_not_empty(
        self, store: StageStore, publish: Publish
    ) -> None:
        overwrite(f"{publish(10).uri}/MANIFEST", flip_byte("last"))
        with pytest.raises(CheckpointCorrupt, match="none of its checkpoints verifies"):
            resolve_checkpoint(store.uri)


class RemoteStoreContract(StoreContract):
    """A store whose files have to be downloaded."""

    def test_a_verified_download_is_used_again(self, publish: Publish, tmp_path: Path) -> None:
        checkpoint = publish(7)
        first = fetch(checkpoint, tmp_path / "cache")
        inode = (first / "model.safetensors").stat().st_ino
        assert fetch(checkpoint, tmp_path / "cache") == first == tmp_path / "cache" / checkpoint.digest[:16]
        assert (first / "model.safetensors").stat().st_ino == inode

    def test_a_damaged_download_is_fetched_again(self, publish: Publish, tmp_path: Path) -> None:
        checkpoint = publish(7)
        (fetch(checkpoint, tmp_path / "cache") / "model.safetensors").write_bytes(b"rotten")
        assert read_files(fetch(checkpoint, tmp_path / "cache")) == {**CONTENT, "step.txt": b"7"}
        assert [path.name for path in (tmp_path / "cache").iterdir()] == [checkpoint.digest[:16]]


class SharedStoreContract(StoreContract):
    """A store that several processes use at once; in memory there is but one, and fsspec's is not made for threads."""

    def test_of_racing_creations_exactly_one_wins(self, store_uri: str) -> None:
        backend = open_backend(store_uri)
        start = threading.Barrier(NUM_WRITERS)

        def race(name: str, body: bytes) -> bool:
            start.wait()
            try:
                backend.create(name, body)
            except FileExistsError:
                return False
            return True

        with ThreadPoolExecutor(NUM_WRITERS) as pool:
            for number in range(NUM_RACES):
                name, bodies = f"race-{number}", [bytes([writer]) * 100 for writer in range(NUM_WRITERS)]
                has_won = list(pool.map(race, [name] * NUM_WRITERS, bodies))
                assert sum(has_won) == 1
                assert backend.read(name) == bodies[has_won.index(True)]

    def test_of_racing_commits_exactly_one_wins(self, store: StageStore, publish: Publish, tmp_path: Path) -> None:
        start = threading.Barrier(NUM_WRITERS)

        def race(_: int) -> CheckpointRef | None:
            start.wait()
            try:
                return publish(10)
            except Fenced:
                return None

        with ThreadPoolExecutor(NUM_WRITERS) as pool:
            winners = [won for won in pool.map(race, range(NUM_WRITERS)) if won is not None]
        assert len(winners) == 1
        assert store.find_newest() == winners[0]
        assert read_files(fetch(winners[0], tmp_path / "cache")) == {**CONTENT, "step.txt": b"10"}


class TestFileStore(OnFiles, SharedStoreContract):
    def test_nothing_is_copied_on_one_file_system(self, store: StageStore, tmp_path: Path) -> None:
        directory = write_files(tmp_path / "local", CONTENT)
        checkpoint = store.publish(directory, step=1, fence=1, kind=CheckpointKind.FINAL, parent=None, info={})
        fetched = fetch(checkpoint, tmp_path / "cache")
        assert f"file://{fetched}" == checkpoint.uri
        assert (fetched / "model.safetensors").samefile(directory / "model.safetensors")

    def test_files_of_another_file_system_are_copied(self, store: StageStore, tmp_path: Path) -> None:
        memory = Path("/dev/shm")
        if not memory.is_dir() or memory.stat().st_dev == tmp_path.stat().st_dev:
            pytest.skip("needs a second file system at /dev/shm")
        directory = memory / f"test-store-{uuid.uuid4().hex}"
        try:
            write_files(directory, CONTENT)
            checkpoint = store.publish(directory, step=1, fence=1, kind=CheckpointKind.FINAL, parent=None, info={})
        finally:
            shutil.rmtree(directory)
        assert read_files(fetch(checkpoint, tmp_path / "cache")) == CONTENT

    def test_a_plain_absolute_path_is_the_same_store(self, store_uri: str, publish: Publish) -> None:
        checkpoint = publish(10)
        plain = StageStore(store_uri.removeprefix("file://") + "/", "stage2", FINGERPRINT)
        assert plain.find_newest() == checkpoint

    def test_a_store_that_was_moved_still_works(self, publish: Publish, tmp_path: Path) -> None:
        publish(10)
        (tmp_path / "runs").rename(tmp_path / "moved")
        newest = StageStore(f"file://{tmp_path}/moved", "stage2", FINGERPRINT).find_newest()
        assert newest is not None
        assert read_files(fetch(newest, tmp_path / "cache")) == {**CONTENT, "step.txt": b"10"}

    def test_a_file_that_was_planted_beside_the_others_is_refused(self, publish: Publish, tmp_path: Path) -> None:
        checkpoint = publish(10)
        Path(checkpoint.uri.removeprefix("file://"), "scheduler.pt").write_bytes(b"planted")
        with pytest.raises(CheckpointCorrupt, match=r"scheduler\.pt: not named by the manifest"):
            fetch(checkpoint, tmp_path / "cache")

    def test_a_folder_that_takes_no_files_is_refused(self) -> None:
        with pytest.raises(StoreUnavailable, match=r"file:///proc/runs cannot be used.*Creating /proc/runs"):
            check_store("file:///proc/runs")

    def test_a_file_in_the_way_of_the_store_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "runs").write_text("not a folder")
        with pytest.raises(StoreUnavailable, match="cannot be used as a checkpoint store"):
            check_store(f"file://{tmp_path}/runs/here")


class TestMemoryStore(InMemory, RemoteStoreContract):
    pass


@pytest.mark.integration
class TestS3Store(OnS3, RemoteStoreContract, SharedStoreContract):
    def test_a_large_file_arrives_in_parts(self, store: StageStore, tmp_path: Path) -> None:
        body = os.urandom(1 << 20) * 40
        directory = write_files(tmp_path / "local", {"model.safetensors": body})
        checkpoint = store.publish(directory, step=1, fence=1, kind=CheckpointKind.FINAL, parent=None, info={})
        assert (fetch(checkpoint, tmp_path / "cache") / "model.safetensors").read_bytes() == body

    def test_processes_that_fetch_at_once_share_one_copy(self, publish: Publish, tmp_path: Path) -> None:
        checkpoint = publish(7)
        with ThreadPoolExecutor(4) as pool:
            fetched = list(pool.map(lambda _: fetch(checkpoint, tmp_path / "cache"), range(4)))
        assert set(fetched) == {tmp_path / "cache" / checkpoint.digest[:16]}
        assert read_files(fetched[0]) == {**CONTENT, "step.txt": b"7"}

    def test_a_bucket_that_does_not_exist_is_refused(self, s3_endpoint: str) -> None:
        with pytest.raises(StoreUnavailable, match="does not exist"):
            check_store("s3://no-such-bucket/runs")
