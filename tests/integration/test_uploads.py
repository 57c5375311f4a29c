"""The uploader as a real process, against real stores: what waits, what is borne, what is left behind."""

import json
import os
import signal
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tcp_proxy import TcpProxy
from training_checkpoints import republish, write_training_files

from internvl_core.checkpoint.lease import Owner
from internvl_core.checkpoint.manifest import CheckpointKind
from internvl_core.checkpoint.store import StageStore, fetch
from internvl_core.checkpoint.training_files import TrainingLayout
from internvl_core.checkpoint.unsent import UnsentSave, publish_unsent
from internvl_core.contract import CheckpointRef, StageFile
from internvl_core.errors import CheckpointCorrupt, Fenced, StoreUnavailable
from internvl_core.train.commit import Committed, StageCommits
from internvl_core.train.metrics import MetricsFile
from internvl_core.train.upload import UploadLimits, Uploads

pytestmark = pytest.mark.integration

DEADLINE_S = 60.0
FINGERPRINT = "0123456789abcdef" * 4
LAYOUT = TrainingLayout(1)


class Attempt:
    """An attempt of a stage without its training: it saves what it is told to."""

    def __init__(
        self,
        folder: Path,
        store_uri: str,
        *,
        number: int = 1,
        run_id: str = "run",
        resume: bool = True,
        resume_from: CheckpointRef | None = None,
        far_store: TcpProxy | None = None,
        **limits: float,
    ) -> None:
        self.directory = folder / "attempts" / str(number)
        self.directory.mkdir(parents=True)
        self.store = StageStore(store_uri, "stage1", FINGERPRINT)
        stage = StageFile(
            run_id=run_id,
            stage="stage1",
            attempt=number,
            fingerprint=FINGERPRINT,
            entry="pretrain",
            arguments={},
            launcher={"kind": "local", "nproc_per_node": 1},
            store_uri=store_uri,
            start_from=None,
            resume=resume,
            save_budget_s=1,
            resume_from=resume_from,
        )
        self.commits = StageCommits(
            stage,
            layout=LAYOUT,
            metrics=MetricsFile(self.directory / "metrics.jsonl"),
            cache_dir=folder / "cache",
            limits=UploadLimits(**{"max_unsent": 2, "patience_s": DEADLINE_S, **limits}),
            save_total_limit=1,
        )

        self._far_store = far_store
        # Connects, and keeps the address it connected to.
        self.store.list_committed()

    def acquire(self) -> Committed | None:
        """Take the stage; the uploader goes to the store by the proxy, if there is one, and this process directly."""
        with pytest.MonkeyPatch.context() as environment:
            if self._far_store is not None:
                environment.setenv("AWS_ENDPOINT_URL", self._far_store.url)
            return self.commits.acquire()

    @property
    def uploads(self) -> Uploads:
        return self.commits.uploads

    def save(self, step: int, *, num_bytes: int = 1000, kind: CheckpointKind = CheckpointKind.TRAINING) -> UnsentSave:
        directory = self.directory / "output" / f"checkpoint-{step}"
        write_training_files(directory, step, LAYOUT)
        (directory / "model.safetensors").write_bytes(step.to_bytes(4) + os.urandom(num_bytes))
        return self.commits.submit(directory, step, kind)

    def commit(self, step: int) -> CheckpointRef:
        save = self.save(step)
        self.await_all()
        checkpoint = self.uploads.find_committed(save)
        assert checkpoint is not None
        return checkpoint

    def await_all(self) -> None:
        assert self.uploads.wait(lambda: self.uploads.num_unsent == 0, DEADLINE_S), self.uploads.describe_backlog()

    def list_steps(self) -> list[int]:
        return [commit.step for commit in self.store.list_committed()]

    def read_step(self, step: int) -> int:
        """Read from the store which step the weights of a commit say they are."""
        (commit,) = [commit for commit in self.store.list_committed() if commit.step == step]
        folder = fetch(commit.checkpoint, self.directory / uuid.uuid4().hex)
        return int.from_bytes((folder / "model.safetensors").read_bytes()[:4])


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Attempt]]:
    started: list[Attempt] = []

    def start(store_uri: str, **options: object) -> Attempt:
        attempt = Attempt(tmp_path, store_uri, **options)
        started.append(attempt)
        return attempt

    yield start
    for attempt in started:
        attempt.commits.close()


@pytest.fixture
def far_store(s3_endpoint: str) -> Iterator[TcpProxy]:
    """A proxy between uploaders and the S3 server."""
    with TcpProxy(s3_endpoint) as proxy:
        yield proxy


def test_a_save_is_committed_read_back_and_gone_from_the_disk(start: Callable[..., Attempt], tmp_path: Path) -> None:
    attempt = start(f"file://{tmp_path}/store")
    assert attempt.acquire() is None
    save = attempt.save(10)
    assert save.record_path.exists()
    attempt.await_all()
    assert attempt.uploads.find_committed(save) == attempt.store.find_newest()
    assert attempt.read_step(10) == 10
    assert not save.directory.exists()
    assert not save.record_path.exists()


def test_training_goes_on_while_the_store_is_down_and_everything_arrives_in_order(
    start: Callable[..., Attempt], far_store: TcpProxy, s3_bucket_uri: str
) -> None:
    attempt = start(s3_bucket_uri, far_store=far_store)
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


def test_a_slow_store_holds_nothing_up_until_too_much_waits(
    start: Callable[..., Attempt], far_store: TcpProxy, s3_bucket_uri: str
) -> None:
    attempt = start(s3_bucket_uri, far_store=far_store)
    attempt.acquire()
    far_store.pause_s = 0.05
    for step in (10, 20):
        attempt.save(step, num_bytes=4 << 20)
    assert not attempt.uploads.wait(lambda: attempt.uploads.has_room, 0.1)
    assert "step 10, 20" in attempt.uploads.describe_backlog()
    far_store.pause_s = 0
    attempt.await_all()
    assert attempt.read_step(20) == 20


def test_a_store_that_stays_away_ends_the_stage_and_what_is_unsent_is_sent_by_the_next_run(
    start: Callable[..., Attempt], far_store: TcpProxy, s3_bucket_uri: str, tmp_path: Path
) -> None:
    attempt = start(s3_bucket_uri, far_store=far_store, patience_s=2)
    attempt.acquire()
    far_store.go_down()
    saves = [attempt.save(10), attempt.save(20)]
    with pytest.raises(StoreUnavailable, match=r"Step 10 could not be stored for \d+ s.*Nothing is lost"):
        attempt.uploads.wait(lambda: attempt.uploads.num_unsent == 0, DEADLINE_S)
    with pytest.raises(StoreUnavailable):
        attempt.uploads.check()
    attempt.commits.close()
    assert all(save.directory.exists() and save.record_path.exists() for save in saves)

    publish_unsent(tmp_path / "attempts", attempt.store)
    assert [attempt.read_step(step) for step in (10, 20)] == [10, 20]
    assert not any(save.directory.exists() or save.record_path.exists() for save in saves)


@pytest.mark.parametrize("after_s", [0.0, 0.3, 1.0])
def test_an_uploader_that_is_killed_is_started_again(
    start: Callable[..., Attempt], far_store: TcpProxy, s3_bucket_uri: str, after_s: float
) -> None:
    attempt = start(s3_bucket_uri, far_store=far_store)
    attempt.acquire()
    far_store.pause_s = 0.05
    attempt.save(10, num_bytes=1 << 20)
    time.sleep(after_s)
    os.kill(attempt.uploads.pid, signal.SIGKILL)
    far_store.pause_s = 0
    attempt.await_all()
    assert attempt.list_steps() == [10]
    assert attempt.read_step(10) == 10


def test_a_run_that_was_taken_over_is_told_and_its_save_does_not_count(
    start: Callable[..., Attempt], tmp_path: Path
) -> None:
    attempt = start(f"file://{tmp_path}/store")
    attempt.acquire()
    attempt.store.acquire(Owner.of_this_process("other"), choose_base=lambda commits: None, takes_over=True)
    save = attempt.save(10)
    with pytest.raises(Fenced):
        attempt.uploads.wait(lambda: attempt.uploads.num_unsent == 0, DEADLINE_S)
    assert attempt.list_steps() == []
    assert save.directory.exists()
    attempt.commits.close()
    publish_unsent(tmp_path / "attempts", attempt.store)
    assert attempt.list_steps() == []
    assert not save.record_path.exists()


def test_the_next_attempt_need_not_wait_for_the_lease_of_one_that_closed(
    start: Callable[..., Attempt], tmp_path: Path
) -> None:
    first = start(f"file://{tmp_path}/store")
    first.acquire()
    first.save(10)
    first.await_all()
    first.commits.close()
    found = start(f"file://{tmp_path}/store", number=2).acquire()
    assert found is not None
    assert found.step == 10
    assert found.size_bytes > 1000


def test_superseded_checkpoints_go_and_two_stay(start: Callable[..., Attempt], tmp_path: Path) -> None:
    attempt = start(f"file://{tmp_path}/store")
    attempt.acquire()
    for step in (10, 20, 30, 40):
        attempt.save(step)
        attempt.await_all()
    assert attempt.list_steps() == [40, 30]


def test_a_machine_that_restarted_does_not_send_what_may_never_have_reached_its_disk(
    start: Callable[..., Attempt], tmp_path: Path
) -> None:
    attempt = start(f"file://{tmp_path}/store")
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
    publish_unsent(tmp_path / "attempts", attempt.store)
    assert attempt.list_steps() == []
    assert directory.exists()


@pytest.mark.parametrize(
    ("run_id", "resume", "is_found"),
    [
        pytest.param("second", True, True, id="another run goes on"),
        pytest.param("second", False, False, id="a fresh run does not"),
        pytest.param("first", False, True, id="but a retry of a fresh run does"),
    ],
)
def test_who_may_resume_from_a_checkpoint(
    start: Callable[..., Attempt], tmp_path: Path, run_id: str, resume: bool, is_found: bool
) -> None:
    first = start(f"file://{tmp_path}/store", run_id="first")
    first.acquire()
    checkpoint = first.commit(3)
    first.commits.close()
    found = start(f"file://{tmp_path}/store", number=2, run_id=run_id, resume=resume).acquire()
    assert (found.checkpoint if found else None) == (checkpoint if is_found else None)


def lose_optimizer(folder: Path) -> None:
    (folder / "optimizer.pt").unlink()


def test_an_incomplete_checkpoint_is_passed_over_for_an_older_one(
    start: Callable[..., Attempt], tmp_path: Path
) -> None:
    first = start(f"file://{tmp_path}/store")
    first.acquire()
    older, newer = first.commit(3), first.commit(4)
    first.commits.close()
    republish(newer, lose_optimizer, tmp_path)
    found = start(f"file://{tmp_path}/store", number=2).acquire()
    assert found is not None
    assert found.checkpoint == older


def test_where_no_checkpoint_is_complete_training_does_not_begin_anew(
    start: Callable[..., Attempt], tmp_path: Path
) -> None:
    first = start(f"file://{tmp_path}/store")
    first.acquire()
    only = first.commit(3)
    first.commits.close()
    republish(only, lose_optimizer, tmp_path)
    with pytest.raises(CheckpointCorrupt, match=r"optimizer.pt \(the optimizer state\) missing"):
        start(f"file://{tmp_path}/store", number=2).acquire()


def test_what_is_not_complete_is_not_committed(start: Callable[..., Attempt], tmp_path: Path) -> None:
    attempt = start(f"file://{tmp_path}/store")
    attempt.acquire()
    directory = write_training_files(tmp_path / "3", 3, LAYOUT)
    (directory / "rng_state.pth").unlink()
    with pytest.raises(CheckpointCorrupt, match=r"rng_state.pth \(the random state of rank 0\) missing"):
        attempt.commits.submit(directory, 3, CheckpointKind.TRAINING)
    assert attempt.list_steps() == []


def test_a_told_checkpoint_comes_before_those_of_other_runs_and_after_what_its_own_run_committed_since(
    start: Callable[..., Attempt], tmp_path: Path
) -> None:
    others = start(f"file://{tmp_path}/store", run_id="other")
    others.acquire()
    told = others.commit(3)
    others.commit(5)
    others.commits.close()
    own = start(f"file://{tmp_path}/store", number=2, run_id="own", resume_from=told)
    found = own.acquire()
    assert found is not None
    assert found.checkpoint == told
    # What was trained behind it is history now.
    assert own.list_steps() == [3]
    since = own.commit(4)
    own.commits.close()
    found = start(f"file://{tmp_path}/store", number=3, run_id="own", resume_from=told).acquire()
    assert found is not None
    assert found.checkpoint == since


def test_a_told_checkpoint_of_another_store_begins_a_history_of_its_own(
    start: Callable[..., Attempt], tmp_path: Path
) -> None:
    others = start(f"file://{tmp_path}/other-store")
    others.acquire()
    told = others.commit(3)
    own = start(f"file://{tmp_path}/store", number=2, resume_from=told)
    found = own.acquire()
    assert found is not None
    assert (found.checkpoint, own.list_steps()) == (told, [])
