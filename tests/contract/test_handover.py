"""How a stage is declared finished: one suite that each protocol inherits."""

import pytest
from stage_store import (
    FINGERPRINT,
    InMemory,
    OnFiles,
    OnS3,
    OnSftp,
    Publish,
    StageStoreContract,
    commit_uri,
    do_first,
    flip_byte,
    overwrite,
    remove,
    take_lease,
    write,
)

from internvl_core.checkpoint.manifest import CheckpointKind
from internvl_core.checkpoint.record import pack_record
from internvl_core.checkpoint.store import StageStore
from internvl_core.errors import CheckpointCorrupt, CheckpointNotFound, Fenced


class HandoverContract(StageStoreContract):
    def test_a_handover_carries_the_result(self, store: StageStore, publish: Publish) -> None:
        final = publish(20, kind=CheckpointKind.FINAL)
        store.hand_over(final, {"metrics": {"accuracy": 0.97}})
        assert store.find_handover() == (final, {"metrics": {"accuracy": 0.97}})

    def test_the_same_handover_again_changes_nothing(self, store: StageStore, publish: Publish) -> None:
        final = publish(20, kind=CheckpointKind.FINAL)
        store.hand_over(final, {"accuracy": 0.97})
        store.hand_over(final, {"accuracy": 0.97})
        assert store.find_handover() == (final, {"accuracy": 0.97})

    def test_another_result_for_the_same_checkpoint_is_refused(self, store: StageStore, publish: Publish) -> None:
        final = publish(20, kind=CheckpointKind.FINAL)
        store.hand_over(final, {"accuracy": 0.97})
        with pytest.raises(Fenced, match="another result"):
            store.hand_over(final, {"accuracy": 0.5})
        assert store.find_handover() == (final, {"accuracy": 0.97})

    def test_a_damaged_handover_in_the_way_is_told_with_the_remedy(self, store: StageStore, publish: Publish) -> None:
        final = publish(20, kind=CheckpointKind.FINAL)
        store.hand_over(final, {"accuracy": 0.97})
        overwrite(f"{store.uri}/handover/{20:012d}.{1:06d}.json", flip_byte("last"))
        assert store.find_handover() is None
        with pytest.raises(CheckpointCorrupt, match="Remove it and run the stage again"):
            store.hand_over(final, {"accuracy": 0.97})

    def test_the_newest_handover_counts(self, store: StageStore, publish: Publish) -> None:
        first, second = publish(20, kind=CheckpointKind.FINAL), publish(20, fence=2, kind=CheckpointKind.FINAL)
        store.hand_over(second, {"run": 2})
        store.hand_over(first, {"run": 1})
        assert store.find_handover() == (second, {"run": 2})

    def test_a_handover_of_a_checkpoint_that_does_not_verify_is_passed_over(
        self, store: StageStore, publish: Publish
    ) -> None:
        first, second = publish(20, kind=CheckpointKind.FINAL), publish(20, fence=2, kind=CheckpointKind.FINAL)
        store.hand_over(first, {"run": 1})
        store.hand_over(second, {"run": 2})
        overwrite(f"{second.uri}/MANIFEST", flip_byte("middle"))
        assert store.find_handover() == (first, {"run": 1})

    def test_a_handover_of_a_checkpoint_that_is_history_is_passed_over(
        self, store: StageStore, publish: Publish
    ) -> None:
        base = publish(10, take_lease(store).fence)
        final = publish(20, kind=CheckpointKind.FINAL)
        store.hand_over(final, {"run": 1}, fence=1)
        overwrite(f"{final.uri}/model.safetensors", flip_byte("middle"))
        again = take_lease(store)
        assert again.base is not None
        assert again.base.checkpoint == base
        assert store.find_handover() is None
        second = publish(20, again.fence, CheckpointKind.FINAL)
        store.hand_over(second, {"run": 2}, fence=again.fence)
        assert store.find_handover() == (second, {"run": 2})

    @pytest.mark.parametrize("named", [None, {"data": "data/x"}, "data/x"])
    def test_a_record_that_is_no_handover_is_passed_over(
        self, store: StageStore, publish: Publish, named: object
    ) -> None:
        first = publish(10, kind=CheckpointKind.FINAL)
        store.hand_over(first, {"run": 1})
        write(f"{store.uri}/handover/{20:012d}.{1:06d}.json", pack_record({"checkpoint": named, "result": {}}))
        assert store.find_handover() == (first, {"run": 1})

    def test_a_handover_that_vanishes_while_it_is_looked_for_is_passed_over(
        self, store: StageStore, publish: Publish, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first, second = (publish(step, kind=CheckpointKind.FINAL) for step in (10, 20))
        store.hand_over(first, {"run": 1})
        store.hand_over(second, {"run": 2})
        vanishing = f"{store.uri}/handover/{20:012d}.{1:06d}.json"
        do_first(monkeypatch, store, "read", lambda: remove(vanishing), folder="handover/")
        assert store.find_handover() == (first, {"run": 1})

    def test_what_is_not_committed_cannot_be_handed_over(self, store: StageStore, publish: Publish) -> None:
        checkpoint = publish(20, kind=CheckpointKind.FINAL)
        remove(commit_uri(store, 20, kind="final"))
        with pytest.raises(CheckpointNotFound):
            store.hand_over(checkpoint, {})
        assert store.find_handover() is None

    def test_a_stage_hands_over_only_its_own_checkpoints(self, store_uri: str, publish: Publish) -> None:
        checkpoint = publish(20, kind=CheckpointKind.FINAL)
        other = StageStore(store_uri, "stage1", FINGERPRINT)
        with pytest.raises(CheckpointNotFound, match="is not a checkpoint of"):
            other.hand_over(checkpoint, {})


class TestFileHandover(OnFiles, HandoverContract):
    pass


class TestMemoryHandover(InMemory, HandoverContract):
    pass


@pytest.mark.integration
class TestS3Handover(OnS3, HandoverContract):
    pass


@pytest.mark.integration
class TestSftpHandover(OnSftp, HandoverContract):
    pass
