"""A whole stage is removed from a store: nothing of it is found afterwards, and nothing that is wanted goes."""

import json
from pathlib import Path

import pytest
from stage_store import (
    FINGERPRINT,
    InMemory,
    OnFiles,
    OnS3,
    OnSftp,
    Publish,
    StageStoreContract,
    choose_nothing,
    list_objects,
    take_lease,
    write_files,
)

from internvl_core.checkpoint.base_model import BASE_FILE
from internvl_core.checkpoint.manifest import CheckpointKind
from internvl_core.checkpoint.removal import list_bases, remove_stage
from internvl_core.checkpoint.store import Owner, StageStore
from internvl_core.contract import CheckpointRef
from internvl_core.errors import ArgumentError, LeaseHeld


class RemovalContract(StageStoreContract):
    def test_nothing_of_the_stage_is_found_and_it_can_be_trained_again(
        self, store: StageStore, publish: Publish
    ) -> None:
        lease = take_lease(store)
        publish(10)
        final = publish(20, kind=CheckpointKind.FINAL)
        store.hand_over(final, {"step": 20})
        lease.release()
        remove_stage(final.uri, "nightly")
        assert store.find_handover() is None
        assert store.list_committed(include_dead=True) == []
        assert not [name for name in list_objects(store) if name.startswith(("data/", "commits/", "handover/"))]
        again = take_lease(store)
        assert again.fence > lease.fence + 1
        publish(10, fence=again.fence)
        assert [commit.step for commit in store.list_committed()] == [10]

    def test_what_a_person_pinned_stays(self, store: StageStore, publish: Publish) -> None:
        lease = take_lease(store)
        checkpoint = publish(10, kind=CheckpointKind.FINAL)
        store.hand_over(checkpoint, {"step": 10})
        store.pin("for-the-paper", checkpoint)
        lease.release()
        with pytest.raises(ArgumentError, match=r"pinned as for-the-paper\. Unpin it first\."):
            remove_stage(store.uri, "nightly")
        assert store.find_handover() == (checkpoint, {"step": 10})

    def test_a_stage_that_is_being_trained_stays(self, store: StageStore, publish: Publish) -> None:
        store.acquire(Owner.of_this_process("another"), choose_base=choose_nothing)
        checkpoint = publish(10)
        with pytest.raises(LeaseHeld):
            remove_stage(store.uri, "nightly")
        store.verify(checkpoint)

    def test_the_bases_of_adapters_are_listed_to_the_last(
        self, store: StageStore, store_uri: str, tmp_path: Path
    ) -> None:
        chain: list[CheckpointRef] = []
        for number, name in enumerate(("first", "second", "third")):
            stage = StageStore(store_uri, name, FINGERPRINT)
            take_lease(stage)
            files = {"adapter_model.safetensors": b"weights"}
            if chain:
                base = {"uri": chain[-1].uri, "digest": chain[-1].digest}
                files[BASE_FILE] = json.dumps(base).encode()
            directory = write_files(tmp_path / name, files)
            kind = CheckpointKind.FINAL
            chain.append(stage.publish(directory, step=number, fence=1, kind=kind, parent=None, info={}))
        assert list_bases(chain[2]) == [chain[1], chain[0]]
        assert list_bases(chain[0]) == []


class TestOnFiles(OnFiles, RemovalContract):
    pass


class TestInMemory(InMemory, RemovalContract):
    pass


@pytest.mark.integration
class TestOnS3(OnS3, RemovalContract):
    pass


@pytest.mark.integration
class TestOnSftp(OnSftp, RemovalContract):
    pass
