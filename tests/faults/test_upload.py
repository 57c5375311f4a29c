"""What becomes of saves on their way to the store, when it is not there or their sender is not."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tcp_proxy import TcpProxy
from upload_attempts import DEADLINE_S, FINGERPRINT, Attempt

from internvl_core.checkpoint.lease import Owner
from internvl_core.checkpoint.manifest import CheckpointKind
from internvl_core.checkpoint.store import StageStore
from internvl_core.checkpoint.unsent import UnsentSave, publish_unsent
from internvl_core.errors import Fenced, StoreUnavailable

pytestmark = pytest.mark.integration


@pytest.mark.fault(
    43,
    "the store is down for a while",
    how="a proxy before S3 refuses connections",
    then="training goes on; saves wait on the disk and are committed in their order",
)
def test_training_goes_on_while_the_store_is_down_and_everything_arrives_in_order(
    start_attempt: Callable[..., Attempt], far_store: TcpProxy, s3_bucket_uri: str
) -> None:
    attempt = start_attempt(s3_bucket_uri, far_store=far_store)
    attempt.acquire()
    far_store.go_down()
    started = time.monotonic()
    for step in (10, 20):
        assert attempt.uploads.has_room
        attempt.save(step)
    assert time.monotonic() - started < 5
    assert not attempt.uploads.has_room
    attempt.uploads.check()
    assert attempt.list_steps() == []
    far_store.come_up()
    attempt.await_all()
    assert [attempt.read_step(step) for step in (10, 20)] == [10, 20]


@pytest.mark.fault(
    40,
    "the next save comes while the last is still being sent",
    how="a proxy before S3 delays every chunk",
    then="it waits in a queue of two; with one more to save, training waits and says why",
)
def test_a_slow_store_holds_nothing_up_until_too_much_waits(
    start_attempt: Callable[..., Attempt], far_store: TcpProxy, s3_bucket_uri: str
) -> None:
    attempt = start_attempt(s3_bucket_uri, far_store=far_store)
    attempt.acquire()
    far_store.pause_s = 0.05
    for step in (10, 20):
        attempt.save(step, num_bytes=4 << 20)
    assert not attempt.uploads.wait(lambda: attempt.uploads.has_room, 0.1)
    assert "step 10, 20" in attempt.uploads.describe_backlog()
    far_store.pause_s = 0
    attempt.await_all()
    assert attempt.read_step(20) == 20


@pytest.mark.fault(
    43,
    "the store is down for good",
    how="a proxy before S3 refuses connections",
    then="exit 69 after store_patience_s; what is unsent stays, and the next run on the machine sends it",
)
def test_a_store_that_stays_away_ends_the_stage_and_what_is_unsent_is_sent_by_the_next_run(
    start_attempt: Callable[..., Attempt], far_store: TcpProxy, s3_bucket_uri: str, tmp_path: Path
) -> None:
    attempt = start_attempt(s3_bucket_uri, far_store=far_store, patience_s=2)
    attempt.acquire()
    far_store.go_down()
    saves = [attempt.save(10), attempt.save(20)]
    with pytest.raises(StoreUnavailable, match=r"Step 10 could not be stored for \d+ s.*Nothing is lost"):
        attempt.uploads.wait(lambda: attempt.uploads.num_unsent == 0, DEADLINE_S)
    with pytest.raises(StoreUnavailable):
        attempt.uploads.check()
    attempt.commits.close()
    assert all(save.directory.exists() and save.record_path.exists() for save in saves)

    publish_unsent(tmp_path / "attempts", attempt.store, cache_dir=tmp_path / "cache")
    assert [attempt.read_step(step) for step in (10, 20)] == [10, 20]
    assert not any(save.directory.exists() or save.record_path.exists() for save in saves)


@pytest.mark.fault(
    38,
    "the uploader is killed while it publishes",
    how="SIGKILL at three moments",
    then="it is started again; one whole commit",
)
@pytest.mark.parametrize("after_s", [0.0, 0.3, 1.0])
def test_an_uploader_that_is_killed_is_started_again(
    start_attempt: Callable[..., Attempt], far_store: TcpProxy, s3_bucket_uri: str, after_s: float
) -> None:
    attempt = start_attempt(s3_bucket_uri, far_store=far_store)
    attempt.acquire()
    far_store.pause_s = 0.05
    attempt.save(10, num_bytes=1 << 20)
    time.sleep(after_s)
    os.kill(attempt.uploads.pid, signal.SIGKILL)
    far_store.pause_s = 0
    attempt.await_all()
    assert attempt.list_steps() == [10]
    assert attempt.read_step(10) == 10


@pytest.mark.fault(
    64,
    "another run takes the stage over",
    how="a lease is taken over",
    then="exit 76; what the first run saves is committed neither now nor later",
)
def test_a_run_that_was_taken_over_is_told_and_its_save_does_not_count(
    start_attempt: Callable[..., Attempt], tmp_path: Path
) -> None:
    attempt = start_attempt(f"file://{tmp_path}/store")
    attempt.acquire()
    attempt.store.acquire(Owner.of_this_process("other"), choose_base=lambda commits: None, takes_over=True)
    save = attempt.save(10)
    with pytest.raises(Fenced):
        attempt.uploads.wait(lambda: attempt.uploads.num_unsent == 0, DEADLINE_S)
    assert attempt.list_steps() == []
    assert save.directory.exists()
    attempt.commits.close()
    publish_unsent(tmp_path / "attempts", attempt.store, cache_dir=tmp_path / "cache")
    assert attempt.list_steps() == []
    assert not save.record_path.exists()
    assert not save.directory.exists()


@pytest.mark.fault(
    63,
    "the machine restarts with a save unsent",
    how="the boot id of another start",
    then="the save is not sent: it may not be whole",
)
def test_a_machine_that_restarted_does_not_send_what_may_never_have_reached_its_disk(
    start_attempt: Callable[..., Attempt], tmp_path: Path
) -> None:
    attempt = start_attempt(f"file://{tmp_path}/store")
    attempt.acquire()
    attempt.commits.close()
    directory = tmp_path / "attempts/1/output/checkpoint-10"
    directory.mkdir(parents=True)
    (directory / "model.safetensors").write_bytes(b"weights")
    save = UnsentSave.note(
        tmp_path / "attempts/1", directory, step=10, fence=1, kind=CheckpointKind.TRAINING, parent=None, info={}
    )
    record = json.loads(save.record_path.read_text())
    save.record_path.write_text(json.dumps({**record, "boot_id": "another boot"}))
    publish_unsent(tmp_path / "attempts", attempt.store, cache_dir=tmp_path / "cache")
    assert attempt.list_steps() == []
    assert directory.exists()


@pytest.mark.fault(
    43,
    "the store is still down when the stage is run again",
    how="a proxy before S3 refuses connections",
    then="no attempt begins, which would take a lease that does not know the unsent save",
)
def test_no_attempt_begins_before_what_is_unsent_is_sent(
    start_attempt: Callable[..., Attempt], far_store: TcpProxy, s3_bucket_uri: str, tmp_path: Path
) -> None:
    attempt = start_attempt(s3_bucket_uri, far_store=far_store, patience_s=0)
    attempt.acquire()
    far_store.go_down()
    save = attempt.save(10)
    with pytest.raises(StoreUnavailable):
        attempt.uploads.wait(lambda: attempt.uploads.num_unsent == 0, DEADLINE_S)
    attempt.commits.close()
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("AWS_ENDPOINT_URL", far_store.url)
        away = StageStore(s3_bucket_uri, "stage1", FINGERPRINT)
        with pytest.raises(StoreUnavailable):
            publish_unsent(tmp_path / "attempts", away, cache_dir=tmp_path / "cache", must_send=True)
    assert save.directory.exists()
    assert save.record_path.exists()


@pytest.mark.fault(
    38,
    "the uploader is killed while there is nothing to send",
    how="SIGKILL",
    then="it is started again, for somebody has to beat the lease",
)
def test_an_uploader_that_dies_between_saves_is_started_again(
    start_attempt: Callable[..., Attempt], tmp_path: Path
) -> None:
    attempt = start_attempt(f"file://{tmp_path}/store")
    attempt.acquire()
    first = attempt.uploads.pid
    os.kill(first, signal.SIGKILL)
    end = time.monotonic() + DEADLINE_S
    while attempt.uploads.pid == first:
        assert time.monotonic() < end
        time.sleep(0.05)
    attempt.commit(10)
    assert attempt.list_steps() == [10]
