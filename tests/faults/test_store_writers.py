"""What becomes of commits when their writer dies, loses its store, or is not alone."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from stage_store import (
    FINGERPRINT,
    PresetClock,
    choose_newest,
    make_owner,
    read_files,
    take_lease,
    write_files,
)
from store_processes import START_LIMIT_S, await_line, kill_at, list_saves, living_writer, read_newest, run_writer
from store_writer import STAGE, make_contents
from tcp_proxy import TcpProxy

from internvl_core.checkpoint.manifest import CheckpointKind
from internvl_core.checkpoint.store import Owner, StageStore, fetch
from internvl_core.contract import CheckpointRef
from internvl_core.errors import Fenced, LeaseHeld

pytestmark = pytest.mark.integration

Publish = Callable[..., CheckpointRef]


@pytest.mark.fault(
    38,
    "a writer dies between its data and its commit record",
    how="SIGKILL right before the record is created",
    then="no reader sees the save; the next holder commits the step and sweeps the rest",
)
def test_a_save_without_its_record_is_invisible_and_swept_later(
    store: StageStore, store_uri: str, tmp_path: Path
) -> None:
    assert kill_at(store_uri, "create:commits/000000000001:before") == []
    assert read_newest(store, tmp_path / "cache") is None
    assert len(list_saves(store)) == 1
    with run_writer(store_uri, "--steps", "2") as process:
        assert process.wait(START_LIMIT_S) == 0
    assert read_newest(store, tmp_path / "cache") == 2
    assert len(list_saves(store)) == 2


@pytest.mark.fault(
    39,
    "a collector of garbage dies",
    how="SIGKILL after the first record is gone, or before any data of it is",
    then="nothing is lost; the next collection leaves nothing behind",
)
@pytest.mark.parametrize("operation", ["remove:commits/:before", "remove:commits/:after", "remove_all:data/:before"])
def test_a_collector_that_dies_loses_nothing_and_leaks_nothing(
    store: StageStore, store_uri: str, tmp_path: Path, operation: str
) -> None:
    assert kill_at(store_uri, operation) == [1, 2, 3]
    assert read_newest(store, tmp_path / "cache") == 3
    assert len(list_saves(store)) == 3
    with run_writer(store_uri, "--steps", "1") as process:
        assert process.wait(START_LIMIT_S) == 0
    assert read_newest(store, tmp_path / "cache") == 4
    assert len(list_saves(store)) == 2


@pytest.mark.fault(
    71,
    "the writer dies while it hands over; its parent collects garbage meanwhile",
    how="SIGKILL right before and right after the record is created",
    then="finished or not, never half; what was handed over is never removed",
)
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_handover_is_there_or_not_and_keeps_its_checkpoint(
    store: StageStore, store_uri: str, publish: Publish, tmp_path: Path, when: str
) -> None:
    kill_at(store_uri, f"create:handover/:{when}", "--steps", "2", "--hand-over")
    assert (store.find_handover() is not None) == (when == "after")
    lease = take_lease(store)
    assert lease.base is not None
    assert lease.base.kind is CheckpointKind.FINAL
    store.hand_over(lease.base.checkpoint, {"accuracy": 1.0}, fence=lease.fence)
    for step in (10, 20, 30):
        publish(step, lease.fence)
    store.collect_garbage(lease.fence, keep=2)
    assert [commit.step for commit in store.list_committed()] == [30, 20, 2]
    found = store.find_handover()
    assert found is not None
    assert found[0] == lease.base.checkpoint
    assert read_files(fetch(found[0], tmp_path / "cache")) == make_contents(2)


@pytest.mark.fault(
    61,
    "the same stage is started again while it runs",
    how="a second run, then one that takes over by force",
    then="73 with who holds the stage; taken over, the first ends with 76 at its next save",
)
def test_a_second_run_is_refused_and_a_run_that_is_taken_over_ends(
    store: StageStore, store_uri: str, publish: Publish
) -> None:
    taker = Owner.of_this_process("mine")
    with living_writer(store_uri) as writer:
        with pytest.raises(LeaseHeld, match=rf"lease 1 is held by run writer \(process {writer.pid} on"):
            store.acquire(taker, choose_base=choose_newest(store))
        lease = store.acquire(taker, choose_base=choose_newest(store), takes_over=True)
        assert lease.fence == 2
        assert "lease 2 was taken by run mine" in await_line(writer, "Fenced")
        assert writer.wait(START_LIMIT_S) == Fenced.exit_code
    assert lease.base is not None
    assert store.find_newest() == lease.base.checkpoint
    mine = publish(lease.base.step + 1, lease.fence)
    assert store.find_newest() == mine


@pytest.mark.fault(
    64,
    "two machines run one stage; the first loses the network",
    how="a proxy before S3 goes down for one of them",
    then="after 90 s without a sign of life the other goes on; the first ends with 76 once it is back",
)
def test_a_machine_that_comes_back_finds_that_it_lost_its_stage(
    s3_bucket_uri: str, far_store: TcpProxy, tmp_path: Path
) -> None:
    store = StageStore(s3_bucket_uri, STAGE, FINGERPRINT)
    with living_writer(s3_bucket_uri, "--host", "far away", AWS_ENDPOINT_URL=far_store.url) as writer:
        far_store.go_down()
        clock = PresetClock()
        lease = store.acquire(make_owner("mine", "near"), choose_base=choose_newest(store), clock=clock)
        assert clock.now_s - 1000.0 >= 90.0
        assert lease.base is not None
        directory = write_files(tmp_path / "next", make_contents(lease.base.step + 1))
        mine = store.publish(
            directory,
            step=lease.base.step + 1,
            fence=lease.fence,
            kind=CheckpointKind.TRAINING,
            parent=None,
            info={},
        )
        far_store.come_up()
        await_line(writer, "Fenced")
        assert writer.wait(START_LIMIT_S) == Fenced.exit_code
    assert store.find_newest() == mine
    assert read_newest(store, tmp_path / "cache") == lease.base.step + 1


@pytest.mark.fault(
    42,
    "the answer to a commit is lost",
    how="a proxy before S3 passes the request on and cuts the connection",
    then="the record is read back: one commit, and the run goes on",
)
@pytest.mark.parametrize("record", [b"/commits/", b"/lease/000001.json", b"/MANIFEST", b"/handover/"])
def test_a_lost_answer_to_a_creation_that_worked_is_no_failure(
    s3_bucket_uri: str, far_store: TcpProxy, tmp_path: Path, record: bytes
) -> None:
    far_store.loses_answer_to = record
    with run_writer(s3_bucket_uri, "--steps", "2", "--hand-over", AWS_ENDPOINT_URL=far_store.url) as process:
        assert process.wait(START_LIMIT_S) == 0
    assert far_store.loses_answer_to is None
    store = StageStore(s3_bucket_uri, STAGE, FINGERPRINT)
    assert [(commit.step, commit.fence) for commit in store.list_committed()] == [(2, 1), (2, 1), (1, 1)]
    assert read_newest(store, tmp_path / "cache") == 2
    assert store.find_handover() is not None


@pytest.mark.fault(
    65,
    "clocks jump",
    how="the holder's clock is a day ahead, the taker's a day behind, and back",
    then="nothing changes: only the taker's own monotonic clock counts",
)
def test_a_holder_with_another_time_of_day_keeps_its_lease_for_as_long_as_it_beats(
    store: StageStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease = store.acquire(make_owner(), choose_base=choose_newest(store))
    day_s = 86400.0
    now_s = time.time()

    def jump(now: float) -> None:
        monkeypatch.setattr(time, "time", lambda: now_s + (day_s if int(now) % 4 else -day_s))
        if now > 1000.0 + 80:
            lease.beat(step=1, phase="training")

    with pytest.raises(LeaseHeld):
        store.acquire(make_owner("mine"), choose_base=choose_newest(store), clock=PresetClock(jump))
    assert store.acquire(make_owner("mine"), choose_base=choose_newest(store), clock=PresetClock()).fence == 2
