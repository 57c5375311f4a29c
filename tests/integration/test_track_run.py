"""The tracker against real MLflow on SQLite, and against servers that refuse or hang."""

import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from processes import wait_until

from internvl_core.errors import ArgumentError
from tasks.track_run import RunTracker, TrackedData, replay

pytestmark = pytest.mark.integration

NUM_STEPS = 25
EXPERIMENT = "digits"
KEY = "recipe-0123abcd"


@pytest.fixture(scope="module")
def migrated_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("migrated")
    tracker = open_tracker(f"sqlite:///{directory}/mlflow.db", directory, experiment="none of the tests'")
    assert tracker.close(status="FINISHED", deadline_s=120)
    return directory / "mlflow.db"


@pytest.fixture
def database(migrated_database: Path, tmp_path: Path) -> str:
    """A database whose tables are there: to make them takes seconds, and only one test is about that."""
    (tmp_path / "tracking").mkdir()
    shutil.copy(migrated_database, tmp_path / "tracking" / "mlflow.db")
    return f"sqlite:///{tmp_path}/tracking/mlflow.db"


@pytest.fixture
def metrics_path(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


@pytest.fixture
def refusing_server() -> str:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    return f"http://127.0.0.1:{port}"


@pytest.fixture
def hanging_server() -> Iterator[str]:
    """A server that accepts every connection and never answers."""
    held: list[socket.socket] = []
    server = socket.create_server(("127.0.0.1", 0))

    def accept() -> None:
        while True:
            try:
                held.append(server.accept()[0])
            except OSError:
                return

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.getsockname()[1]}"
    server.shutdown(socket.SHUT_RDWR)
    server.close()
    thread.join(10)
    for connection in held:
        connection.close()


def open_tracker(tracking_uri: str, tmp_path: Path, **changes: Any) -> RunTracker:
    arguments: dict[str, Any] = {
        "experiment": EXPERIMENT,
        "run_name": "smoke",
        "key": KEY,
        "tags": {"prefect.flow_run_id": "f-1"},
        "params": {"recipe": "smoke"},
        "spool_dir": tmp_path / "spool",
    }
    return RunTracker(tracking_uri, **(arguments | changes))


def start_stage(tracker: RunTracker, metrics_path: Path, name: str = "stage1") -> None:
    params = {"learning_rate": 1e-3, "meta_path": "m" * 9000}
    tracker.start_stage(name, key=f"{name}-77", params=params, tags={"gate": "none"}, metrics_path=metrics_path)


def loss_at(step: int) -> float:
    return 3.0 / step


def write_steps(path: Path, first: int, last: int, *, times_from: float = 1_766_666_666.0) -> None:
    with path.open("a") as file:
        for step in range(first, last + 1):
            row = {"step": step, "max_steps": NUM_STEPS, "time": times_from + step, "loss": loss_at(step), "eta_s": 1.0}
            file.write(json.dumps(row | {"tokens_per_s": 4000.0 + step}) + "\n")


class Recorded:
    """What MLflow has, read by its own client."""

    def __init__(self, tracking_uri: str) -> None:
        from mlflow import MlflowClient

        self._client = MlflowClient(tracking_uri=tracking_uri)
        experiment = self._client.get_experiment_by_name(EXPERIMENT)
        runs = self._client.search_runs([experiment.experiment_id]) if experiment else []
        self.parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
        self.children = {run.info.run_name: run for run in runs if "mlflow.parentRunId" in run.data.tags}
        assert len(runs) == len(self.parents) + len(self.children), "two children of the same name"

    def series(self, stage: str, metric: str = "loss") -> list[tuple[int, float]]:
        history = self._client.get_metric_history(self.children[stage].info.run_id, metric)
        return [(point.step, point.value) for point in history]


def read_artifact(tracking_uri: str, run_id: str, name: str, tmp_path: Path) -> str:
    from mlflow import MlflowClient

    return Path(MlflowClient(tracking_uri=tracking_uri).download_artifacts(run_id, name, str(tmp_path))).read_text()


def losses(first: int, last: int) -> list[tuple[int, float]]:
    return [(step, loss_at(step)) for step in range(first, last + 1)]


def test_a_pipeline_run_is_recorded_with_its_stages_series_params_and_states(
    metrics_path: Path, tmp_path: Path
) -> None:
    database = f"sqlite:///{tmp_path}/missing/folder/mlflow.db"
    with open_tracker(database, tmp_path) as tracker:
        start_stage(tracker, metrics_path)
        write_steps(metrics_path, 1, NUM_STEPS)
        tracker.finish_stage("stage1", metrics={"accuracy": 0.9, "accuracy/what digit?": 0.95}, status="FINISHED")
        start_stage(tracker, tmp_path / "never-written.jsonl", name="stage2")
        tracker.finish_stage("stage2", metrics={}, status="FAILED", tags={"cause": "OutOfMemory"})
        assert tracker.close(status="FAILED")

    recorded = Recorded(database)
    [parent] = recorded.parents
    child = recorded.children["stage1"]
    assert (parent.info.run_id, child.info.run_id) == (tracker.run_id, tracker.stage_run_ids["stage1"])
    assert parent.info.run_name == "smoke"
    assert (parent.info.status, child.info.status) == ("FAILED", "FINISHED")
    assert parent.data.params == {"recipe": "smoke"}
    assert parent.data.tags["prefect.flow_run_id"] == "f-1"
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert child.data.params == {"learning_rate": "0.001", "meta_path": "m" * 6000}
    assert recorded.series("stage1") == losses(1, NUM_STEPS)
    assert recorded.series("stage1", "accuracy/what digit_") == [(NUM_STEPS, 0.95)]
    assert set(child.data.metrics) == {"loss", "tokens_per_s", "accuracy", "accuracy/what digit_"}
    assert recorded.children["stage2"].info.status == "FAILED"
    assert recorded.children["stage2"].data.tags["cause"] == "OutOfMemory"
    assert tracker.run_url is None


def test_runs_are_shown_as_running_and_points_arrive_while_a_stage_trains(
    database: str, metrics_path: Path, tmp_path: Path
) -> None:
    with open_tracker(database, tmp_path) as tracker:
        start_stage(tracker, metrics_path)
        wait_until(lambda: "stage1" in tracker.stage_run_ids)
        write_steps(metrics_path, 1, 3)
        wait_until(lambda: Recorded(database).series("stage1") == losses(1, 3))
        recorded = Recorded(database)
        assert [recorded.parents[0].info.status, recorded.children["stage1"].info.status] == ["RUNNING", "RUNNING"]
    assert Recorded(database).children["stage1"].info.status == "FINISHED"


def test_running_again_continues_the_same_runs_and_doubles_nothing(
    database: str, metrics_path: Path, tmp_path: Path
) -> None:
    for attempt in (1, 2):
        with open_tracker(database, tmp_path, params={"recipe": attempt, f"new{attempt}": 1}) as tracker:
            start_stage(tracker, metrics_path)
            if attempt == 1:
                write_steps(metrics_path, 1, NUM_STEPS)
            tracker.finish_stage("stage1", metrics={"accuracy": 0.9}, status="FINISHED")
    recorded = Recorded(database)
    [parent] = recorded.parents
    assert parent.data.params == {"recipe": "1", "new1": "1", "new2": "1"}
    assert parent.info.status == "FINISHED"
    assert recorded.series("stage1") == losses(1, NUM_STEPS)
    assert recorded.series("stage1", "accuracy") == [(NUM_STEPS, 0.9)]


def test_an_attempt_that_resumes_from_an_older_step_does_not_rewind_the_series(database: str, tmp_path: Path) -> None:
    with open_tracker(database, tmp_path) as tracker:
        start_stage(tracker, tmp_path / "1.jsonl")
        write_steps(tmp_path / "1.jsonl", 1, 12)
        start_stage(tracker, tmp_path / "2.jsonl")
        write_steps(tmp_path / "2.jsonl", 9, NUM_STEPS, times_from=1_766_667_000.0)
        tracker.finish_stage("stage1", metrics={}, status="FINISHED")
    assert Recorded(database).series("stage1") == losses(1, NUM_STEPS)


def test_lines_that_are_no_rows_are_passed_over_and_a_half_written_one_is_not_sent(
    database: str, metrics_path: Path, tmp_path: Path
) -> None:
    write_steps(metrics_path, 1, 2)
    with metrics_path.open("a") as file:
        file.write('{"step": 3, "loss"\n[]\n{"loss": 7.0}\n')
    write_steps(metrics_path, 3, 4)
    with metrics_path.open("a") as file:
        file.write('{"step": 5, "time": 1.0, "loss": 1.0}')
    with open_tracker(database, tmp_path) as tracker:
        start_stage(tracker, metrics_path)
    assert Recorded(database).series("stage1") == losses(1, 4)


def test_a_run_that_somebody_deleted_is_recorded_anew_in_full(
    database: str, metrics_path: Path, tmp_path: Path
) -> None:
    with open_tracker(database, tmp_path) as tracker:
        start_stage(tracker, metrics_path)
        write_steps(metrics_path, 1, 4)
    from mlflow import MlflowClient

    MlflowClient(tracking_uri=database).delete_run(tracker.stage_run_ids["stage1"])
    with open_tracker(database, tmp_path) as tracker:
        start_stage(tracker, metrics_path)
        write_steps(metrics_path, 5, 8)
    assert len(Recorded(database).parents) == 1
    assert Recorded(database).series("stage1") == losses(1, 8)


def test_a_crash_between_delivering_and_noting_it_doubles_nothing(
    database: str, metrics_path: Path, tmp_path: Path
) -> None:
    with open_tracker(database, tmp_path) as tracker:
        start_stage(tracker, metrics_path)
        write_steps(metrics_path, 1, NUM_STEPS)
        tracker.finish_stage("stage1", metrics={"accuracy": 0.9}, status="FINISHED")
    (tmp_path / "spool" / "progress.json").unlink()
    assert replay(tmp_path / "spool", database)
    recorded = Recorded(database)
    assert len(recorded.parents) == 1
    assert recorded.series("stage1") == losses(1, NUM_STEPS)
    assert recorded.series("stage1", "accuracy") == [(NUM_STEPS, 0.9)]


@contextmanager
def running_server(database: str, port: int) -> Iterator[str]:
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", database, "--port", str(port)]
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    directory = Path(database.removeprefix("sqlite:///")).parent
    with (directory / "server.log").open("a") as log:
        process = subprocess.Popen(
            [*command, "--workers", "1"], cwd=directory, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        wait_until(lambda: is_listening(port), deadline_s=90)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)


def is_listening(port: int) -> bool:
    with socket.socket() as connection:
        return connection.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.fault(
    54,
    "MLflow is restarted",
    how="its server is killed and started again",
    then="the same run goes on, no point is missing, none is there twice",
)
def test_a_server_that_is_killed_and_restarted_gets_the_same_run_without_gap_or_double(
    database: str, refusing_server: str, metrics_path: Path, tmp_path: Path
) -> None:
    port = int(refusing_server.rpartition(":")[2])
    with running_server(database, port) as url:
        tracker = open_tracker(url, tmp_path)
        start_stage(tracker, metrics_path)
        write_steps(metrics_path, 1, 10)
        wait_until(lambda: "stage1" in tracker.stage_run_ids and Recorded(database).series("stage1") == losses(1, 10))
    write_steps(metrics_path, 11, 20)
    with running_server(database, port) as url:
        write_steps(metrics_path, 21, NUM_STEPS)
        tracker.finish_stage("stage1", metrics={"accuracy": 0.9}, status="FINISHED")
        assert tracker.close(status="FINISHED")
        assert (tracker.run_url or "").startswith(f"{url}/#/experiments/")
        assert Recorded(url).series("stage1") == losses(1, NUM_STEPS)
    assert [run.info.run_id for run in Recorded(database).parents] == [tracker.run_id]


def test_a_file_that_mlflow_was_not_there_for_arrives_later(
    database: str, refusing_server: str, metrics_path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    port = int(refusing_server.rpartition(":")[2])
    (tmp_path / "report.html").write_text("<p>one</p>")
    with running_server(database, port) as url:
        tracker = open_tracker(url, tmp_path)
        start_stage(tracker, metrics_path)
        wait_until(lambda: "stage1" in tracker.stage_run_ids)
    tracker.add_file(tmp_path / "report.html")
    wait_until(lambda: "does not take the run's data" in caplog.text)
    with running_server(database, port) as url:
        assert tracker.close(status="FINISHED")
        assert tracker.run_id is not None
        (tmp_path / "read").mkdir()
        assert read_artifact(url, tracker.run_id, "report.html", tmp_path / "read") == "<p>one</p>"
    assert "MLflow has not got" not in caplog.text


@pytest.mark.fault(
    52,
    "MLflow refuses, or never answers, all run long",
    how="a closed port; a server that accepts and is silent",
    then="no call takes 0.1 s, the run ends well, internvl replay delivers the series later",
)
@pytest.mark.parametrize("server", ["refusing_server", "hanging_server"])
def test_an_mlflow_that_is_not_there_neither_delays_nor_fails_the_run_and_a_replay_records_all(
    server: str,
    database: str,
    metrics_path: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    caplog: pytest.LogCaptureFixture,
) -> None:
    tracker = open_tracker(request.getfixturevalue(server), tmp_path)
    calls: list[Callable[[], object]] = [
        lambda: start_stage(tracker, metrics_path),
        lambda: write_steps(metrics_path, 1, NUM_STEPS),
        lambda: tracker.finish_stage("stage1", metrics={"accuracy": 0.9}, status="FINISHED"),
        lambda: tracker.run_url,
    ]
    assert max(seconds_of(call) for call in calls) < 0.1
    with caplog.at_level(logging.WARNING):
        assert seconds_of(lambda: tracker.close(status="FINISHED", deadline_s=2)) < 3
    assert not tracker.close(status="FINISHED")
    assert f"{NUM_STEPS} rows of metrics did not get into MLflow" in caplog.text
    assert str(tmp_path / "spool") in caplog.text

    assert replay(tmp_path / "spool", database)
    assert Recorded(database).series("stage1") == losses(1, NUM_STEPS)
    assert [run.info.status for run in Recorded(database).parents] == ["FINISHED"]


def test_a_replay_that_fails_says_why_and_a_later_one_records_all(
    database: str,
    migrated_database: Path,
    refusing_server: str,
    metrics_path: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with open_tracker(database, tmp_path) as tracker:
        start_stage(tracker, metrics_path)
        write_steps(metrics_path, 1, 5)
    shutil.copy(migrated_database, tmp_path / "elsewhere.db")
    elsewhere = f"sqlite:///{tmp_path}/elsewhere.db"
    assert not replay(tmp_path / "spool", refusing_server.replace("//", "//me:secret@"))
    assert "MlflowException" in caplog.text
    assert "secret" not in caplog.text
    assert replay(tmp_path / "spool", elsewhere)
    assert Recorded(elsewhere).series("stage1") == losses(1, 5)


def test_the_address_that_people_are_shown_has_no_password(refusing_server: str, tmp_path: Path) -> None:
    tracker = open_tracker(refusing_server.replace("//", "//me:secret@"), tmp_path)
    assert tracker.address == refusing_server
    tracker.close(status="FINISHED", deadline_s=0.1)


def test_a_replay_of_a_directory_without_a_spool_is_refused(tmp_path: Path, database: str) -> None:
    with pytest.raises(ArgumentError, match="holds no spool"):
        replay(tmp_path, database)


@pytest.mark.fault(
    51,
    "the disk of the spool is full",
    how="a folder that takes no files",
    then="a warning, and the run goes on",
)
def test_a_spool_that_cannot_be_written_costs_a_warning_and_not_the_run(
    database: str, metrics_path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "spool").write_text("a file where the directory should be")
    tracker = open_tracker(database, tmp_path)
    start_stage(tracker, metrics_path)
    assert not tracker.close(status="FINISHED", deadline_s=1)
    assert "MLflow will miss: start_stage" in caplog.text


KILLED_RUN = """
import json, sys, time
from pathlib import Path
from tests.integration.test_track_run import open_tracker, start_stage, write_steps

database, directory = sys.argv[1], Path(sys.argv[2])
tracker = open_tracker(database, directory)
start_stage(tracker, directory / "metrics.jsonl")
for step in range(1, 100000):
    write_steps(directory / "metrics.jsonl", step, step)
    time.sleep(0.002)
"""


@pytest.mark.fault(
    54,
    "the flow dies while it delivers metrics",
    how="SIGKILL",
    then="the next run goes on from the spool, nothing lost, nothing twice",
)
def test_a_killed_process_loses_and_doubles_no_point(database: str, metrics_path: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-c", KILLED_RUN, database, str(tmp_path)]
    process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
    progress = tmp_path / "spool" / "progress.json"
    wait_until(lambda: progress.exists() and '"loss"' in progress.read_text(), deadline_s=60)
    process.send_signal(signal.SIGKILL)
    assert process.wait(10) == -signal.SIGKILL
    written = metrics_path.read_text().count("\n")

    with open_tracker(database, tmp_path) as tracker:
        start_stage(tracker, metrics_path)
        with metrics_path.open("a") as file:
            file.write("\n")
        write_steps(metrics_path, written + 1, written + 10)
        tracker.finish_stage("stage1", metrics={}, status="FINISHED")
    recorded = Recorded(database)
    assert len(recorded.parents) == 1
    assert [step for step, _ in recorded.series("stage1")] == list(range(1, written + 11))
    assert recorded.series("stage1") == losses(1, written + 10)


def seconds_of(call: Callable[[], object]) -> float:
    start = time.monotonic()
    call()
    return time.monotonic() - start


def test_a_stage_has_its_data_and_all_of_its_arguments_and_the_run_has_its_report(
    database: str, metrics_path: Path, tmp_path: Path
) -> None:
    (tmp_path / "report.html").write_text("<p>one</p>")
    data = [
        TrackedData("pretrain", "0123456789abcdef" * 4, "/data/pretrain.json", "training"),
        TrackedData("held_out", "fedcba9876543210" * 4, "s3://bucket/held_out.json", "evaluation"),
    ]
    for _ in range(2):  # An attempt after another: nothing is doubled.
        with open_tracker(database, tmp_path) as tracker:
            params = {"meta_path": "m" * 9000, "max_steps": 4}
            tracker.start_stage("stage1", key="stage1-77", params=params, tags={}, metrics_path=metrics_path, data=data)
            tracker.finish_stage("stage1", metrics={}, status="FINISHED", tags={"internvl.checkpoint": "file:///a"})
            tracker.add_file(tmp_path / "report.html")
            # What MLflow gets is the report as it was.
            (tmp_path / "report.html").write_text("<p>two</p>")
    recorded = Recorded(database)
    (parent,), stage = recorded.parents, recorded.children["stage1"]
    found = {item.dataset.name: (item.dataset.digest, item.tags[0].value) for item in stage.inputs.dataset_inputs}
    assert found == {
        "pretrain": ("0123456789abcdef0123456789abcdef0123", "training"),
        "held_out": ("fedcba9876543210fedcba9876543210fedc", "evaluation"),
    }
    assert len(stage.data.params["meta_path"]) == 6000
    arguments = json.loads(read_artifact(database, stage.info.run_id, "arguments.json", tmp_path))
    assert arguments == {"meta_path": "m" * 9000, "max_steps": 4}
    assert stage.data.tags["internvl.checkpoint"] == "file:///a"
    assert read_artifact(database, parent.info.run_id, "report.html", tmp_path) == "<p>two</p>"


def test_a_store_of_artifacts_that_fails_holds_up_no_metrics(
    database: str, metrics_path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from mlflow import MlflowClient

    # Nobody serves a bucket there.
    MlflowClient(tracking_uri=database).create_experiment(EXPERIMENT, artifact_location="nowhere://bucket/artifacts")
    write_steps(metrics_path, 1, 3)
    with caplog.at_level(logging.WARNING), open_tracker(database, tmp_path) as tracker:
        start_stage(tracker, metrics_path)
        tracker.finish_stage("stage1", metrics={}, status="FINISHED")
    assert Recorded(database).series("stage1") == losses(1, 3)
    assert any("MLflow has not got" in message for message in caplog.messages)


def test_mlflow_is_imported_early_and_creates_nothing(tmp_path: Path) -> None:
    lines = [
        "import sys, threading",
        "from tasks.mlflow_client import start_mlflow_import",
        "start_mlflow_import()",
        "[thread] = set(threading.enumerate()) - {threading.main_thread()}",
        "thread.join()",
        "print('mlflow' in sys.modules)",
    ]
    told = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert (told.stdout, told.stderr) == ("True\n", "")
    assert not list(tmp_path.iterdir())
