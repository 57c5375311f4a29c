"""Who may commit to a stage, and how that changes hands: one suite that each protocol inherits."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from stage_store import (
    InMemory,
    OnFiles,
    OnS3,
    OnSftp,
    PresetClock,
    Publish,
    StageStoreContract,
    choose_newest,
    choose_nothing,
    commit_uri,
    do_first,
    flip_byte,
    lease_uri,
    list_objects,
    make_owner,
    overwrite,
    remove,
    take_lease,
    write,
    write_files,
)

from internvl_core.checkpoint.acquisition import BEAT_TTL_S
from internvl_core.checkpoint.manifest import CheckpointKind
from internvl_core.checkpoint.record import pack_record
from internvl_core.checkpoint.store import Commit, Owner, StageStore
from internvl_core.errors import CheckpointCorrupt, CheckpointNotFound, Fenced, LeaseHeld, StoreUnavailable

NUM_TAKERS = 8
TELL_OWNER = """
import dataclasses, json, sys
from internvl_core.checkpoint.lease import Owner
print(json.dumps(dataclasses.asdict(Owner.of_this_process("theirs"))), flush=True)
sys.stdin.read()
"""


@contextmanager
def another_process() -> Iterator[Owner]:
    """A living process of this machine; dead, and collected, afterwards."""
    with subprocess.Popen([sys.executable, "-c", TELL_OWNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        yield Owner(**json.loads(process.stdout.readline()))
        process.communicate()


class LeaseContract(StageStoreContract):
    def test_the_first_lease_of_a_stage_starts_from_nothing(self, store: StageStore) -> None:
        lease = store.acquire(Owner.of_this_process("mine"), choose_base=choose_newest(store))
        assert (lease.fence, lease.base) == (1, None)
        lease.check()

    def test_a_lease_goes_on_with_the_newest_commit_that_verifies(self, store: StageStore, publish: Publish) -> None:
        first = take_lease(store)
        older, newer = publish(10, first.fence), publish(20, first.fence)
        overwrite(f"{newer.uri}/model.safetensors", flip_byte("middle"))
        second = take_lease(store)
        assert second.fence == 2
        assert second.base is not None
        assert second.base.checkpoint == older
        assert store.find_newest() == older

    def test_a_living_process_of_this_machine_keeps_its_lease(self, store: StageStore) -> None:
        with another_process() as owner:
            store.acquire(owner, choose_base=choose_nothing).beat(step=7, phase="training")
            with pytest.raises(LeaseHeld, match=rf"lease 1 is held by run theirs \(process {owner.pid} on .*step 7"):
                store.acquire(Owner.of_this_process("mine"), choose_base=choose_nothing)

    def test_a_dead_process_of_this_machine_loses_its_lease_at_once(self, store: StageStore) -> None:
        with another_process() as owner:
            store.acquire(owner, choose_base=choose_nothing)
        clock = PresetClock()
        assert store.acquire(Owner.of_this_process("mine"), choose_base=choose_nothing, clock=clock).fence == 2
        assert clock.now_s == 1000.0

    def test_a_pid_that_another_process_has_now_keeps_no_lease(self, store: StageStore) -> None:
        mine = Owner.of_this_process("mine")
        store.acquire(replace(mine, start_ticks=mine.start_ticks - 1), choose_base=choose_nothing)
        assert store.acquire(mine, choose_base=choose_nothing).fence == 2

    def test_a_process_does_not_take_its_own_lease_twice(self, store: StageStore) -> None:
        mine = Owner.of_this_process("mine")
        store.acquire(mine, choose_base=choose_nothing)
        with pytest.raises(LeaseHeld, match="run mine"):
            store.acquire(mine, choose_base=choose_nothing)

    def test_a_lease_whose_taker_never_heard_of_it_can_be_taken_again(self, store: StageStore) -> None:
        mine = Owner.of_this_process("mine")
        store.acquire(mine, choose_base=choose_nothing)
        remove(f"{store.uri}/lease/000001.beat")
        assert store.acquire(mine, choose_base=choose_nothing).fence == 2

    def test_a_holder_elsewhere_whose_beat_moves_keeps_its_lease(self, store: StageStore) -> None:
        lease = store.acquire(make_owner(), choose_base=choose_nothing)
        lease.beat(step=7, phase="training")

        def beat_at_last(now_s: float) -> None:
            if now_s > 1000.0 + BEAT_TTL_S - 5:
                lease.beat(step=7, phase="training")

        with pytest.raises(LeaseHeld, match=r"lease 1 is held by run run .*elsewhere.* at step 7 \(training\)"):
            store.acquire(make_owner("mine"), choose_base=choose_nothing, clock=PresetClock(beat_at_last))

    def test_a_holder_elsewhere_whose_beat_stands_still_loses_its_lease(self, store: StageStore) -> None:
        store.acquire(make_owner(), choose_base=choose_nothing)
        clock = PresetClock()
        assert store.acquire(make_owner("mine"), choose_base=choose_nothing, clock=clock).fence == 2
        assert BEAT_TTL_S <= clock.now_s - 1000.0 < BEAT_TTL_S + 5

    def test_a_released_lease_is_free_at_once(self, store: StageStore) -> None:
        store.acquire(make_owner(), choose_base=choose_nothing).release()
        clock = PresetClock()
        assert store.acquire(make_owner("mine"), choose_base=choose_nothing, clock=clock).fence == 2
        assert clock.now_s == 1000.0

    def test_a_person_can_take_over_from_a_living_holder(self, store: StageStore, publish: Publish) -> None:
        lease = store.acquire(Owner.of_this_process("theirs"), choose_base=choose_nothing)
        mine = store.acquire(Owner.of_this_process("mine"), choose_base=choose_nothing, takes_over=True)
        assert mine.fence == 2
        with pytest.raises(Fenced, match=r"lease 2 was taken by run mine"):
            lease.check()

    @pytest.mark.parametrize("jump_s", [-86400.0, 86400.0])
    def test_jumps_of_the_clock_on_the_wall_change_nothing(
        self, store: StageStore, monkeypatch: pytest.MonkeyPatch, jump_s: float
    ) -> None:
        store.acquire(make_owner(), choose_base=choose_nothing)
        now = time.time()
        monkeypatch.setattr(time, "time", lambda: now + jump_s)
        clock = PresetClock()
        assert store.acquire(make_owner("mine"), choose_base=choose_nothing, clock=clock).fence == 2
        assert clock.now_s - 1000.0 >= BEAT_TTL_S

    @pytest.mark.parametrize("content", [b"", b"0123", b"not a record\n{}"])
    def test_a_torn_lease_uses_its_number_up_and_fences_nobody(
        self, store: StageStore, publish: Publish, content: bytes
    ) -> None:
        commit = publish(10, take_lease(store).fence)
        write(lease_uri(store, 2), content)
        assert store.find_newest() == commit
        clock = PresetClock()
        third = store.acquire(make_owner("mine"), choose_base=choose_newest(store), clock=clock)
        assert third.fence == 3
        assert third.base is not None
        assert third.base.checkpoint == commit
        # Nobody knows whether its taker lives.
        assert clock.now_s - 1000.0 >= BEAT_TTL_S

    def test_a_torn_beat_is_no_release_and_no_sign_of_life(self, store: StageStore) -> None:
        store.acquire(make_owner(), choose_base=choose_nothing).release()
        overwrite(f"{store.uri}/lease/000001.beat", lambda body: body[:-1])
        clock = PresetClock()
        assert store.acquire(make_owner("mine"), choose_base=choose_nothing, clock=clock).fence == 2
        assert clock.now_s - 1000.0 >= BEAT_TTL_S

    def test_work_that_appears_while_the_base_is_fetched_is_not_lost(self, store: StageStore, publish: Publish) -> None:
        first = take_lease(store)
        publish(10, first.fence)
        late = []

        def choose(commits: Iterable[Commit]) -> Commit | None:
            base = choose_newest(store)(commits)
            if not late:
                late.append(publish(20, first.fence))
            return base

        second = store.acquire(make_owner("mine"), choose_base=choose, takes_over=True)
        assert second.base is not None
        assert second.base.checkpoint == late[0]

    def test_a_holder_that_wakes_while_the_base_is_fetched_keeps_its_lease(self, store: StageStore) -> None:
        lease = store.acquire(make_owner(), choose_base=choose_nothing)
        lease.beat(step=1, phase="training")

        num_choices = iter(range(3))

        def wake(commits: Iterable[Commit]) -> None:
            # A taker that never sees it would choose for ever.
            next(num_choices)
            lease.beat(step=1, phase="training")

        with pytest.raises(LeaseHeld):
            store.acquire(
                make_owner("mine"),
                choose_base=wake,
                clock=PresetClock(lambda now: now > 1100 and lease.beat(step=1, phase="training")),
            )

    def test_a_taker_that_loses_the_race_leaves_no_pin(self, store: StageStore, publish: Publish) -> None:
        publish(10, take_lease(store).fence)
        rivals = []

        def choose(commits: Iterable[Commit]) -> Commit | None:
            if not rivals:
                rivals.append(take_lease(store, "rival"))
            return choose_newest(store)(commits)

        mine = store.acquire(make_owner("mine"), choose_base=choose, takes_over=True)
        assert (rivals[0].fence, mine.fence) == (2, 3)
        names = {name for name in list_objects(store) if name.endswith(".base")}
        assert sorted(name[:12] for name in names) == ["lease/000002", "lease/000003"]

    def test_a_lease_whose_first_beat_is_lost_is_held_all_the_same(
        self, store: StageStore, publish: Publish, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        def refuse() -> None:
            raise StoreUnavailable("Slow down.")

        do_first(monkeypatch, store, "put", refuse, folder="lease/")
        lease = take_lease(store)
        assert "The first beat of lease 1 was lost: Slow down." in caplog.text
        checkpoint = publish(10, lease.fence)
        assert store.find_newest() == checkpoint

    def test_another_process_of_the_holder_goes_on_with_its_lease(self, store: StageStore, publish: Publish) -> None:
        commit = publish(10, take_lease(store).fence)
        take_lease(store)
        lease = store.open_lease(2)
        assert lease.base is not None
        assert lease.base.checkpoint == commit
        lease.beat(step=11, phase="uploading")
        lease.check()
        remove(commit_uri(store, 10))
        assert store.open_lease(2).base is None

    def test_a_lease_that_nobody_took_or_can_read_is_not_gone_on_with(self, store: StageStore) -> None:
        with pytest.raises(CheckpointNotFound, match="nobody took this lease"):
            store.open_lease(1)
        take_lease(store)
        overwrite(lease_uri(store, 1), flip_byte("last"))
        with pytest.raises(CheckpointCorrupt):
            store.open_lease(1)

    @pytest.mark.parametrize("owner", [{}, {"pid": 1}, None])
    def test_a_record_that_is_no_lease_is_not_gone_on_with(self, store: StageStore, owner: object) -> None:
        write(lease_uri(store, 1), pack_record({"owner": owner, "taken_at": 0, "base": None, "finished": None}))
        with pytest.raises(CheckpointCorrupt, match="not a lease"):
            store.open_lease(1)

    def test_a_save_that_is_tried_again_is_the_same_commit(self, store: StageStore, publish: Publish) -> None:
        lease = take_lease(store)
        first = publish(10, lease.fence)
        assert publish(10, lease.fence) == first
        store.collect_garbage(lease.fence, keep=2)
        store.verify(first)

    def test_other_files_for_a_committed_step_are_refused(
        self, store: StageStore, publish: Publish, tmp_path: Path
    ) -> None:
        lease = take_lease(store)
        publish(10, lease.fence)
        with pytest.raises(Fenced, match="another process committed step 10 with fence 1"):
            store.publish(
                write_files(tmp_path / "other", {"model": b"other"}),
                step=10,
                fence=lease.fence,
                kind=CheckpointKind.TRAINING,
                parent=None,
                info={},
            )

    def test_a_holder_whose_lease_rots_can_still_commit(self, store: StageStore, publish: Publish) -> None:
        lease = take_lease(store)
        overwrite(lease_uri(store, 1), flip_byte("last"))
        assert store.find_newest() is None
        checkpoint = publish(10, lease.fence)
        assert store.find_newest() == checkpoint

    def test_a_holder_that_is_fenced_by_an_unreadable_lease_is_told(self, store: StageStore) -> None:
        lease = take_lease(store)
        write(lease_uri(store, 2), b"torn")
        with pytest.raises(Fenced, match="lease 2 was taken by somebody whose lease is unreadable"):
            lease.check()


class LeaseRaceContract(StageStoreContract):
    def test_of_racing_takers_exactly_one_gets_each_lease(self, store: StageStore) -> None:
        start = threading.Barrier(NUM_TAKERS)

        def race(number: int) -> int | None:
            start.wait()
            try:
                return store.acquire(Owner.of_this_process(f"run {number}"), choose_base=choose_nothing).fence
            except LeaseHeld:
                return None

        with ThreadPoolExecutor(NUM_TAKERS) as pool:
            fences = [fence for fence in pool.map(race, range(NUM_TAKERS)) if fence is not None]
        assert fences == [1]


class TestFileLeases(OnFiles, LeaseContract, LeaseRaceContract):
    pass


class TestMemoryLeases(InMemory, LeaseContract):
    pass


@pytest.mark.integration
class TestS3Leases(OnS3, LeaseContract, LeaseRaceContract):
    pass


@pytest.mark.integration
class TestSftpLeases(OnSftp, LeaseContract, LeaseRaceContract):
    pass
