"""What people keep: one suite that each protocol inherits."""

import pytest
from stage_store import (
    InMemory,
    OnFiles,
    OnS3,
    OnSftp,
    Publish,
    StageStoreContract,
    commit_uri,
    do_first,
    remove,
    write,
)

from internvl_core.checkpoint.record import pack_record
from internvl_core.checkpoint.store import StageStore
from internvl_core.errors import ArgumentError, CheckpointNotFound


class PinContract(StageStoreContract):
    def test_pins_are_listed_by_name(self, store: StageStore, publish: Publish) -> None:
        first, second = publish(10), publish(20)
        store.pin("best", second)
        store.pin("a.first-1", first)
        assert store.list_pins() == {"a.first-1": first, "best": second}
        store.unpin("best")
        assert store.list_pins() == {"a.first-1": first}

    def test_the_same_pin_again_changes_nothing(self, store: StageStore, publish: Publish) -> None:
        checkpoint = publish(10)
        store.pin("best", checkpoint)
        store.pin("best", checkpoint)
        assert store.list_pins() == {"best": checkpoint}

    def test_a_name_pins_one_checkpoint(self, store: StageStore, publish: Publish) -> None:
        store.pin("best", publish(10))
        with pytest.raises(ArgumentError, match="pins another checkpoint"):
            store.pin("best", publish(20))

    @pytest.mark.parametrize("name", ["", ".hidden", "a/b", "../commits/x", "ä"])
    def test_a_name_that_is_no_file_name_is_refused(self, store: StageStore, publish: Publish, name: str) -> None:
        with pytest.raises(ArgumentError, match="cannot name a pin"):
            store.pin(name, publish(10))

    def test_only_what_is_committed_can_be_pinned(self, store: StageStore, publish: Publish) -> None:
        checkpoint = publish(10)
        remove(commit_uri(store, 10))
        with pytest.raises(CheckpointNotFound, match="never committed"):
            store.pin("best", checkpoint)
        assert store.list_pins() == {}

    def test_a_pin_that_came_too_late_is_taken_back(
        self, store: StageStore, publish: Publish, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        checkpoint = publish(10)
        do_first(monkeypatch, store, "create", lambda: remove(commit_uri(store, 10)))
        with pytest.raises(CheckpointNotFound, match="collected as garbage while it was being pinned"):
            store.pin("best", checkpoint)
        assert store.list_pins() == {}

    def test_a_pin_that_does_not_exist_is_answered_with_the_others(self, store: StageStore, publish: Publish) -> None:
        with pytest.raises(CheckpointNotFound, match="Pins: none"):
            store.unpin("best")
        store.pin("last", publish(10))
        with pytest.raises(CheckpointNotFound, match="Pins: last"):
            store.unpin("best")

    def test_a_pin_that_vanishes_while_it_is_listed_is_left_out(
        self, store: StageStore, publish: Publish, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store.pin("best", publish(10))
        do_first(monkeypatch, store, "read", lambda: store.unpin("best"), folder="pins/")
        assert store.list_pins() == {}

    @pytest.mark.parametrize("body", [b"", pack_record({"data": "data/x"})])
    def test_a_damaged_pin_is_left_out_of_the_list_with_a_warning(
        self, store: StageStore, publish: Publish, caplog: pytest.LogCaptureFixture, body: bytes
    ) -> None:
        store.pin("best", publish(10))
        write(f"{store.uri}/pins/worst.json", body)
        assert list(store.list_pins()) == ["best"]
        assert "pins/worst.json" in caplog.text


class TestFilePins(OnFiles, PinContract):
    pass


class TestMemoryPins(InMemory, PinContract):
    pass


@pytest.mark.integration
class TestS3Pins(OnS3, PinContract):
    pass


@pytest.mark.integration
class TestSftpPins(OnSftp, PinContract):
    pass
