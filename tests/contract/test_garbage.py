"""What is removed from a store, and what never is: one suite that each protocol inherits."""

import logging
from pathlib import Path

import pytest
from stage_store import (
    InMemory,
    OnFiles,
    OnS3,
    OnSftp,
    Publish,
    StageStoreContract,
    choose_nothing,
    commit_uri,
    do_first,
    fetch_steps,
    flip_byte,
    list_objects,
    make_owner,
    not_looking,
    overwrite,
    remove,
    take_lease,
    write,
)

from internvl_core.checkpoint.manifest import CheckpointKind
from internvl_core.checkpoint.pins import pin_base
from internvl_core.checkpoint.store import Lease, StageStore, fetch
from internvl_core.errors import ArgumentError, Fenced


def list_saves(store: StageStore) -> set[str]:
    return {name.split("/")[1] for name in list_objects(store) if name.startswith("data/")}


def list_steps(store: StageStore) -> list[int]:
    return [commit.step for commit in store.list_committed(include_dead=True)]


class GarbageContract(StageStoreContract):
    @pytest.fixture
    def lease(self, store: StageStore) -> Lease:
        return take_lease(store)

    def test_what_newer_verified_commits_supersede_goes(
        self, store: StageStore, lease: Lease, publish: Publish, tmp_path: Path
    ) -> None:
        for step in (10, 20, 30, 40):
            publish(step)
        report = store.collect_garbage(lease.fence, keep=2)
        assert [name.step for name in report.removed] == [10, 20]
        assert sorted(save[:12] for save in report.swept) == [f"{10:012d}", f"{20:012d}"]
        assert set(report.kept.values()) == {"one of the newest that verify"}
        assert list_steps(store) == [40, 30]
        assert fetch_steps(store, tmp_path) == [40, 30]
        assert len(list_saves(store)) == 2

    def test_where_all_are_to_stay_only_what_crashed_saves_left_goes(
        self, store: StageStore, lease: Lease, publish: Publish
    ) -> None:
        for step in (10, 20, 30, 40):
            publish(step)
        remove(commit_uri(store, 20, fence=lease.fence))
        report = store.collect_garbage(lease.fence, keep=None)
        assert (report.removed, [save[:12] for save in report.swept]) == ([], [f"{20:012d}"])
        assert set(report.kept.values()) == {"all are to stay"}
        assert list_steps(store) == [40, 30, 10]

    def test_nothing_goes_while_too_few_verify(
        self, store: StageStore, lease: Lease, publish: Publish, caplog: pytest.LogCaptureFixture
    ) -> None:
        for step in (10, 20, 30):
            overwrite(f"{publish(step).uri}/model.safetensors", flip_byte("middle")) if step > 10 else publish(step)
        with caplog.at_level(logging.WARNING):
            report = store.collect_garbage(lease.fence, keep=2)
        assert report.refusal == "only 1 of the 2 checkpoints to be kept verify"
        assert (report.removed, report.swept) == ([], [])
        assert list_steps(store) == [30, 20, 10]
        assert "step 30 (training, fence 1) does not count" in caplog.text

    @pytest.mark.parametrize("damage", ["flipped", "short", "missing", "manifest", "record", "planted"])
    def test_what_does_not_verify_does_not_count(
        self, store: StageStore, lease: Lease, publish: Publish, tmp_path: Path, damage: str
    ) -> None:
        for step in (10, 20, 30):
            publish(step)
        damaged = publish(40)
        match damage:
            case "flipped":
                overwrite(f"{damaged.uri}/optimizer/rank-0.bin", flip_byte("last"))
            case "short":
                overwrite(f"{damaged.uri}/model.safetensors", lambda body: body[:-1])
            case "missing":
                remove(f"{damaged.uri}/empty.txt")
            case "manifest":
                overwrite(f"{damaged.uri}/MANIFEST", flip_byte("last"))
            case "record":
                overwrite(commit_uri(store, 40), flip_byte("last"))
            case "planted":
                write(f"{damaged.uri}/scheduler.pt", b"planted")
        report = store.collect_garbage(lease.fence, keep=2)
        assert [name.step for name in report.removed] == [10]
        assert fetch_steps(store, tmp_path, passes_over=(40,)) == [30, 20]
        # It is left for a person to look at, until newer ones supersede it too.
        assert damaged.uri.rpartition("/")[2] in list_saves(store)

    def test_the_damaged_go_when_they_are_superseded(self, store: StageStore, lease: Lease, publish: Publish) -> None:
        overwrite(f"{publish(10).uri}/MANIFEST", flip_byte("last"))
        publish(20)
        overwrite(commit_uri(store, 20), flip_byte("first"))
        for step in (30, 40):
            publish(step)
        store.collect_garbage(lease.fence, keep=2)
        assert len(list_saves(store)) == 2

    def test_final_weights_stay(self, store: StageStore, lease: Lease, publish: Publish) -> None:
        publish(10, kind=CheckpointKind.FINAL)
        for step in (20, 30):
            publish(step)
        report = store.collect_garbage(lease.fence, keep=2)
        assert report.removed == []
        assert list(report.kept.values())[-1] == "final weights"

    def test_what_is_pinned_or_handed_over_stays(
        self, store: StageStore, lease: Lease, publish: Publish, tmp_path: Path
    ) -> None:
        checkpoints = [publish(step) for step in (10, 20, 30, 40, 50)]
        store.pin("best", checkpoints[0])
        store.hand_over(checkpoints[1], {"accuracy": 1.0}, fence=lease.fence)
        report = store.collect_garbage(lease.fence, keep=2)
        assert [name.step for name in report.removed] == [30]
        assert list(report.kept.values())[2:] == ["handed over at step 20", "pinned as best"]
        assert fetch_steps(store, tmp_path) == [50, 40, 20, 10]
        store.unpin("best")
        assert [name.step for name in store.collect_garbage(lease.fence, keep=2).removed] == [10]

    def test_a_pinned_commit_of_a_zombie_stays(self, store: StageStore, publish: Publish, tmp_path: Path) -> None:
        publish(10, take_lease(store).fence)
        second = take_lease(store)
        with not_looking():
            zombie = publish(99, fence=1)
        store.pin("rescued", zombie)
        for step in (20, 30):
            publish(step, second.fence)
        store.collect_garbage(second.fence, keep=2)
        assert list_steps(store) == [99, 30, 20]
        fetch(zombie, tmp_path / "cache")

    def test_what_a_damaged_handover_may_name_stays(self, store: StageStore, lease: Lease, publish: Publish) -> None:
        checkpoints = [publish(step) for step in (10, 20, 30, 40)]
        store.hand_over(checkpoints[1], {}, fence=lease.fence)
        overwrite(f"{store.uri}/handover/{20:012d}.{1:06d}.json", flip_byte("last"))
        report = store.collect_garbage(lease.fence, keep=2)
        assert [name.step for name in report.removed] == [10]
        assert list(report.kept.values())[-1].startswith("perhaps handed over")

    def test_nothing_goes_while_it_is_unknown_what_a_pin_keeps(
        self, store: StageStore, lease: Lease, publish: Publish
    ) -> None:
        checkpoints = [publish(step) for step in (10, 20, 30, 40)]
        store.pin("best", checkpoints[0])
        overwrite(f"{store.uri}/pins/best.json", flip_byte("last"))
        report = store.collect_garbage(lease.fence, keep=2)
        assert report.refusal is not None
        assert report.refusal.startswith("it is not known what is to be kept")
        assert list_steps(store) == [40, 30, 20, 10]

    def test_history_that_a_fresh_start_left_behind_goes(
        self, store: StageStore, lease: Lease, publish: Publish
    ) -> None:
        final = publish(50, kind=CheckpointKind.FINAL)
        publish(60)
        fresh = store.acquire(make_owner("fresh"), choose_base=choose_nothing, takes_over=True)
        publish(1, fresh.fence)
        assert store.collect_garbage(fresh.fence, keep=2).removed == []
        publish(2, fresh.fence)
        assert [name.step for name in store.collect_garbage(fresh.fence, keep=2).removed] == [60]
        assert store.list_committed(include_dead=True)[0].checkpoint == final

    def test_only_the_newest_lease_collects(self, store: StageStore, lease: Lease, publish: Publish) -> None:
        for step in (10, 20, 30):
            publish(step)
        take_lease(store)
        with pytest.raises(Fenced):
            store.collect_garbage(lease.fence, keep=2)
        assert list_steps(store) == [30, 20, 10]

    def test_a_collector_that_is_fenced_while_it_reads_removes_nothing(
        self, store: StageStore, lease: Lease, publish: Publish, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for step in (10, 20, 30):
            publish(step)
        do_first(monkeypatch, store, "describe", lambda: take_lease(store))
        with pytest.raises(Fenced):
            store.collect_garbage(lease.fence, keep=2)
        assert list_steps(store) == [30, 20, 10]

    def test_what_crashed_saves_left_is_swept(self, store: StageStore, lease: Lease, publish: Publish) -> None:
        crashed = publish(10)
        remove(commit_uri(store, 10))
        write(f"{store.uri}/data/000000000011.000001.0123abcd/model.safetensors", b"half")
        kept = publish(20)
        report = store.collect_garbage(lease.fence, keep=2)
        assert report.swept == [crashed.uri.rpartition("/")[2], "000000000011.000001.0123abcd"]
        assert list_saves(store) == {kept.uri.rpartition("/")[2]}

    def test_data_of_later_leases_and_of_strangers_is_not_touched(
        self, store: StageStore, lease: Lease, publish: Publish
    ) -> None:
        uris = [f"{store.uri}/data/{name}/file" for name in ("000000000011.000002.0123abcd", "notes")]
        for uri in uris:
            write(uri, b"theirs")
        assert store.collect_garbage(lease.fence, keep=2).swept == []
        assert len(list_saves(store)) == 2

    def test_a_save_in_progress_is_not_swept(
        self, store: StageStore, lease: Lease, publish: Publish, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        reports = []
        do_first(
            monkeypatch,
            store,
            "get_sizes_bytes",
            lambda: reports.append(store.collect_garbage(lease.fence, keep=2)),
        )
        checkpoint = publish(10)
        assert reports[0].swept == []
        store.verify(checkpoint)

    def test_data_that_a_damaged_record_may_name_is_not_swept(
        self, store: StageStore, lease: Lease, publish: Publish
    ) -> None:
        checkpoint = publish(10)
        overwrite(commit_uri(store, 10), flip_byte("last"))
        assert store.collect_garbage(lease.fence, keep=2).swept == []
        assert checkpoint.uri.rpartition("/")[2] in list_saves(store)

    def test_pins_of_bases_go_when_their_lease_is_history(
        self, store: StageStore, lease: Lease, publish: Publish
    ) -> None:
        publish(10)
        second = take_lease(store)
        assert any(name.endswith(".base") for name in list_objects(store))
        store.collect_garbage(second.fence, keep=2)
        assert not any(name.endswith(".base") for name in list_objects(store))

    def test_a_base_that_somebody_is_about_to_go_on_with_stays(
        self, store: StageStore, lease: Lease, publish: Publish
    ) -> None:
        base = publish(10)
        for step in (20, 30):
            publish(step)
        pin_base(store._backend, 2, base)
        report = store.collect_garbage(lease.fence, keep=2)
        assert report.removed == []
        assert list(report.kept.values())[-1] == "about to be the base of lease 2"

    @pytest.mark.parametrize("folder", ["pins/", "handover/", "lease/000002."])
    def test_what_vanishes_while_it_is_looked_at_protects_nothing(
        self, store: StageStore, lease: Lease, publish: Publish, monkeypatch: pytest.MonkeyPatch, folder: str
    ) -> None:
        oldest, *_ = [publish(step) for step in (10, 20, 30)]
        match folder:
            case "pins/":
                store.pin("best", oldest)
            case "handover/":
                store.hand_over(oldest, {}, fence=lease.fence)
            case _:
                pin_base(store._backend, 2, oldest)
        (protection,) = [name for name in list_objects(store) if name.startswith(folder)]
        do_first(monkeypatch, store, "read", lambda: remove(f"{store.uri}/{protection}"), folder=folder)
        assert [name.step for name in store.collect_garbage(lease.fence, keep=2).removed] == [10]

    def test_a_rehearsal_tells_and_removes_nothing(self, store: StageStore, lease: Lease, publish: Publish) -> None:
        for step in (10, 20, 30):
            publish(step)
        write(f"{store.uri}/data/000000000011.000001.0123abcd/model.safetensors", b"half")
        before = list_objects(store)
        rehearsed = store.collect_garbage(store.next_fence(), keep=2, is_rehearsal=True)
        assert list_objects(store) == before
        assert store.collect_garbage(lease.fence, keep=2) == rehearsed

    def test_one_is_too_few_to_keep(self, store: StageStore, lease: Lease) -> None:
        with pytest.raises(ArgumentError, match="Keep at least 2"):
            store.collect_garbage(lease.fence, keep=1)

    def test_what_was_verified_once_is_not_read_again(
        self, store: StageStore, lease: Lease, publish: Publish, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for step in (10, 20, 30):
            store.verify(publish(step))

        def refuse(*arguments: object) -> None:
            raise AssertionError("read again")

        with monkeypatch.context() as patch:
            patch.setattr(store._backend, "describe", refuse)
            assert [name.step for name in store.collect_garbage(lease.fence, keep=2).removed] == [10]
        # But it is looked at.
        overwrite(f"{publish(40).uri}/model.safetensors", lambda body: body[:-1])
        overwrite(f"{store.list_committed()[1].checkpoint.uri}/model.safetensors", lambda body: body[:-1])
        assert store.collect_garbage(lease.fence, keep=2).refusal is not None

    def test_runs_that_crash_again_and_again_leak_nothing(self, store: StageStore, publish: Publish) -> None:
        step = 0
        for run in range(1, 5):
            lease = take_lease(store)
            for _ in range(2):
                step += 1
                publish(step, lease.fence)
                remove(commit_uri(store, step, fence=lease.fence)) if step % 3 == 0 else None
            if run % 2:
                store.collect_garbage(lease.fence, keep=2)
        lease = take_lease(store)
        store.collect_garbage(lease.fence, keep=2)
        objects = list_objects(store)
        assert len([name for name in objects if name.startswith("commits/")]) == 2
        assert len(list_saves(store)) == 2
        # A lease is never removed: it is what fences.
        assert len([name for name in objects if name.startswith("lease/")]) == 2 * lease.fence


class TestFileGarbage(OnFiles, GarbageContract):
    @pytest.mark.parametrize("folder", ["lease", "commits", "handover", "pins"])
    def test_temporary_files_of_killed_processes_go(self, store: StageStore, publish: Publish, folder: str) -> None:
        lease = take_lease(store)
        write(f"{store.uri}/{folder}/.000000000010.000001.training.json.0123abcd", b"half")
        store.collect_garbage(lease.fence, keep=2)
        assert not any("/." in name for name in list_objects(store))

    def test_the_temporary_file_of_ones_own_beat_stays(self, store: StageStore) -> None:
        lease = take_lease(store)
        write(f"{store.uri}/lease/.000001.beat.0123abcd", b"half")
        store.collect_garbage(lease.fence, keep=2)
        assert "lease/.000001.beat.0123abcd" in list_objects(store)


class TestMemoryGarbage(InMemory, GarbageContract):
    pass


@pytest.mark.integration
class TestS3Garbage(OnS3, GarbageContract):
    pass


@pytest.mark.integration
class TestSftpGarbage(OnSftp, GarbageContract):
    pass
