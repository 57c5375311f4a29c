"""A checkpoint read where it lies: one suite that each protocol inherits."""

import pytest
from stage_store import (
    InMemory,
    OnFiles,
    OnS3,
    OnSftp,
    Publish,
    StageStoreContract,
    do_first,
    flip_byte,
    overwrite,
    remove,
    take_lease,
)

from internvl_core.checkpoint.store import StageStore
from internvl_core.errors import CheckpointCorrupt, CheckpointNotFound


class VerifyContract(StageStoreContract):
    def test_what_was_published_verifies(self, store: StageStore, publish: Publish) -> None:
        store.verify(publish(10))

    @pytest.mark.parametrize("position", ["first", "middle", "last"])
    def test_a_flipped_byte_is_found_where_it_lies(self, store: StageStore, publish: Publish, position: str) -> None:
        checkpoint = publish(10)
        overwrite(f"{checkpoint.uri}/model.safetensors", flip_byte(position))
        with pytest.raises(CheckpointCorrupt, match=r"model\.safetensors: sha256 is"):
            store.verify(checkpoint)

    def test_a_short_file_is_found_by_its_size(self, store: StageStore, publish: Publish) -> None:
        checkpoint = publish(10)
        overwrite(f"{checkpoint.uri}/model.safetensors", lambda body: body[:-1])
        with pytest.raises(CheckpointCorrupt, match=r"model\.safetensors: 25599 bytes, the manifest says 25600"):
            store.verify(checkpoint)

    def test_a_missing_file_is_damage_while_the_record_is_there(self, store: StageStore, publish: Publish) -> None:
        checkpoint = publish(10)
        remove(f"{checkpoint.uri}/optimizer/rank-0.bin")
        with pytest.raises(CheckpointCorrupt, match=r"optimizer/rank-0\.bin: missing"):
            store.verify(checkpoint)

    @pytest.mark.parametrize("operation", ["get_sizes_bytes", "describe"])
    def test_what_is_collected_while_it_is_read_is_gone_not_damaged(
        self, store: StageStore, publish: Publish, monkeypatch: pytest.MonkeyPatch, operation: str
    ) -> None:
        lease = take_lease(store)
        checkpoint = publish(10)
        publish(20), publish(30)
        do_first(monkeypatch, store, operation, lambda: store.collect_garbage(lease.fence, keep=2))
        with pytest.raises(CheckpointNotFound, match="collected as garbage"):
            store.verify(checkpoint)

    def test_a_reader_that_is_overtaken_by_a_collector_finds_something_newer(
        self, store: StageStore, publish: Publish, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        lease = take_lease(store)
        publish(10)

        def overtake() -> None:
            publish(20), publish(30)
            store.collect_garbage(lease.fence, keep=2)

        do_first(monkeypatch, store, "read", overtake, folder="commits/")
        newest = store.find_newest()
        assert newest is not None
        assert newest.uri.rpartition("/")[2].startswith(f"{30:012d}")

    def test_a_checkpoint_of_another_stage_is_not_verified(self, store_uri: str, publish: Publish) -> None:
        checkpoint = publish(10)
        with pytest.raises(CheckpointNotFound, match="is not a checkpoint of"):
            StageStore(store_uri, "stage1", "f" * 64).verify(checkpoint)


class TestFileVerify(OnFiles, VerifyContract):
    pass


class TestMemoryVerify(InMemory, VerifyContract):
    pass


@pytest.mark.integration
class TestS3Verify(OnS3, VerifyContract):
    pass


@pytest.mark.integration
class TestSftpVerify(OnSftp, VerifyContract):
    pass
