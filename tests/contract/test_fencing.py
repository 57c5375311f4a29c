"""What counts when two wrote to one stage: one suite that each protocol inherits."""

import pytest
from stage_store import (
    InMemory,
    OnFiles,
    OnS3,
    OnSftp,
    Publish,
    StageStoreContract,
    choose_nothing,
    do_first,
    flip_byte,
    lease_uri,
    make_owner,
    not_looking,
    overwrite,
    remove,
    take_lease,
)

from internvl_core.checkpoint.manifest import CheckpointKind
from internvl_core.checkpoint.store import StageStore, resolve_checkpoint
from internvl_core.errors import CheckpointNotFound, Fenced


class FencingContract(StageStoreContract):
    def test_a_zombie_is_told_when_it_commits(self, store: StageStore, publish: Publish) -> None:
        first = take_lease(store)
        second = take_lease(store, "second")
        with pytest.raises(Fenced, match=r"lease 2 was taken by run second"):
            publish(10, first.fence)
        assert store.find_newest() is None
        publish(10, second.fence)

    def test_a_zombie_that_is_fenced_while_it_sends_is_told_before_it_commits(
        self, store: StageStore, publish: Publish, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first = take_lease(store)
        do_first(monkeypatch, store, "get_sizes_bytes", lambda: take_lease(store, "second"))
        with pytest.raises(Fenced, match=r"lease 2 was taken by run second"):
            publish(10, first.fence)
        assert store.list_committed(include_dead=True) == []

    def test_what_a_zombie_commits_nevertheless_is_not_live(self, store: StageStore, publish: Publish) -> None:
        first = take_lease(store)
        base = publish(10, first.fence)
        second = take_lease(store)
        with not_looking():
            zombie = publish(20, first.fence)
        assert store.find_newest() == base
        assert [commit.checkpoint for commit in store.list_committed()] == [base]
        assert [commit.checkpoint for commit in store.list_committed(include_dead=True)] == [zombie, base]
        assert resolve_checkpoint(store.uri) == base
        own = publish(15, second.fence)
        assert store.find_newest() == own
        # Whoever names it by its own address means it.
        assert resolve_checkpoint(zombie.uri) == zombie

    def test_a_zombie_that_collects_while_it_is_fenced_leaves_the_new_holder_its_base(
        self, store: StageStore, publish: Publish, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first = take_lease(store)
        base = publish(10, first.fence)

        def wake() -> None:
            publish(20, first.fence), publish(30, first.fence)
            store.collect_garbage(first.fence, keep=2)

        do_first(monkeypatch, store, "create", wake, folder="lease/000002.json")
        second = take_lease(store)
        assert second.base is not None
        assert second.base.checkpoint == base
        assert store.find_newest() == base
        store.verify(base)

    def test_a_zombie_cannot_reach_behind_the_base_of_a_later_lease(self, store: StageStore, publish: Publish) -> None:
        first = take_lease(store)
        publish(10, first.fence)
        publish(30, take_lease(store).fence)
        take_lease(store)
        with not_looking():
            publish(20, first.fence)
        assert [commit.step for commit in store.list_committed()] == [30, 10]

    def test_final_weights_of_a_zombie_are_newer_than_a_training_state_of_the_same_step(
        self, store: StageStore, publish: Publish
    ) -> None:
        first = take_lease(store)
        base = publish(20, first.fence)
        take_lease(store)
        with not_looking():
            publish(20, first.fence, CheckpointKind.FINAL)
        assert store.find_newest() == base

    def test_a_fresh_start_makes_everything_before_it_history(self, store: StageStore, publish: Publish) -> None:
        old = publish(20, take_lease(store).fence, CheckpointKind.FINAL)
        store.hand_over(old, {"run": 1}, fence=1)
        fresh = store.acquire(make_owner("fresh"), choose_base=choose_nothing, takes_over=True)
        assert store.find_newest() is None
        assert store.find_handover() is None
        with pytest.raises(CheckpointNotFound, match=r"started afresh .*\. Committed before: 20"):
            resolve_checkpoint(store.uri)
        new = publish(5, fresh.fence)
        assert store.find_newest() == new
        assert take_lease(store).base == store.list_committed()[0]

    @pytest.mark.parametrize("damage", ["rotten", "removed"])
    def test_a_lease_that_is_lost_still_fences_for_its_commits_repeat_it(
        self, store: StageStore, publish: Publish, damage: str
    ) -> None:
        first = take_lease(store)
        publish(10, first.fence)
        own = publish(15, take_lease(store).fence)
        take_lease(store)
        if damage == "rotten":
            overwrite(lease_uri(store, 2), flip_byte("middle"))
        else:
            remove(lease_uri(store, 2))
        with not_looking():
            publish(12, first.fence)
        assert [commit.step for commit in store.list_committed()] == [15, 10]
        assert store.find_newest() == own

    def test_a_store_without_leases_is_read_as_before(self, store: StageStore, publish: Publish) -> None:
        publish(10, 1)
        publish(30, 2)
        publish(20, 4)
        assert [commit.step for commit in store.list_committed()] == [30, 20, 10]
        assert store.next_fence() == 5
        lease = take_lease(store)
        assert lease.fence == 5
        assert store.next_fence() == 6
        assert lease.base is not None
        assert lease.base.step == 30

    def test_a_handover_of_a_zombie_is_refused(self, store: StageStore, publish: Publish) -> None:
        final = publish(20, take_lease(store).fence, CheckpointKind.FINAL)
        take_lease(store)
        with pytest.raises(Fenced, match="lease 2 was taken"):
            store.hand_over(final, {"run": 1}, fence=1)

    def test_a_handover_that_a_zombie_made_nevertheless_does_not_count(
        self, store: StageStore, publish: Publish
    ) -> None:
        final = publish(20, take_lease(store).fence, CheckpointKind.FINAL)
        second = take_lease(store)
        with not_looking():
            store.hand_over(final, {"run": 1}, fence=1)
        assert store.find_handover() is None
        store.hand_over(final, {"run": 2}, fence=second.fence)
        assert store.find_handover() == (final, {"run": 2})
        take_lease(store)
        assert store.find_handover() == (final, {"run": 2})


class TestFileFencing(OnFiles, FencingContract):
    pass


class TestMemoryFencing(InMemory, FencingContract):
    pass


@pytest.mark.integration
class TestS3Fencing(OnS3, FencingContract):
    pass


@pytest.mark.integration
class TestSftpFencing(OnSftp, FencingContract):
    pass
