"""The flows against a real Prefect server: states, names, logs, artifacts, retries."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from processes import find_ranks, wait_until

pytestmark = pytest.mark.integration

# The `internvl` command, telling at its end whether torch came in.
COMMAND = """
import sys
from flows.cli import main
try:
    main()
finally:
    print("torch imported:", "torch" in sys.modules)
"""


@dataclass(frozen=True)
class Server:
    """A Prefect server of these tests' own."""

    url: str
    environment: dict[str, str]

    def post(self, path: str, **content: Any) -> Any:
        answer = httpx.post(f"{self.url}/{path}", json=content, timeout=30)
        answer.raise_for_status()
        return answer.json()

    def find_flow_run(self, name: str) -> dict[str, Any]:
        (run,) = self.post("flow_runs/filter", flow_runs={"name": {"any_": [name]}})
        return run

    def list_task_runs(self, flow_run_id: str) -> dict[str, dict[str, Any]]:
        runs = self.post("task_runs/filter", flow_runs={"id": {"any_": [flow_run_id]}})
        return {run["name"]: run for run in runs}

    def read_logs(self, flow_run_id: str) -> list[str]:
        logs = self.post("logs/filter", logs={"flow_run_id": {"any_": [flow_run_id]}}, sort="TIMESTAMP_ASC")
        return [log["message"] for log in logs]


@dataclass(frozen=True)
class Run:
    """A finished `internvl run`."""

    returncode: int
    output: str
    errors: str


def end(process: subprocess.Popen[Any]) -> None:
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    home = tmp_path_factory.mktemp("prefect")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")},
        "PREFECT_HOME": str(home),
        "PREFECT_SERVER_UI_API_URL": "/api",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        # One rank, on cores that it shares with the server.
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    url = f"http://127.0.0.1:{port}/api"

    def is_up() -> bool:
        assert process.poll() is None, (home / "server.log").read_text()
        try:
            return httpx.get(f"{url}/health", timeout=5).is_success
        except httpx.TransportError:
            return False

    with (home / "server.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            wait_until(is_up, "the server did not start", deadline_s=120)
            yield Server(url, {**environment, "PREFECT_API_URL": url})
        finally:
            end(process)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("inputs")
    for module, *arguments in (
        ("digits", str(directory / "data"), "--train", "40", "--held-out", "20"),
        ("components", str(directory / "components"), "--texts", str(directory / "data/annotations")),
    ):
        subprocess.run([sys.executable, "-m", f"internvl_core.smoke.{module}", *arguments], check=True, timeout=120)
    return directory


def write_recipe(directory: Path, inputs: Path, **changes: Any) -> Path:
    """Write a recipe of one small stage that trains for two steps, named after its directory."""
    recipe = {
        "name": directory.name.lower(),
        "workspace": str(directory / "workspace"),
        "arguments": {
            "conv_style": "internvl2_5",
            "force_image_size": 32,
            "meta_path": str(inputs / "data/pretrain.json"),
            "per_device_train_batch_size": 1,
            "max_packed_tokens": 256,
            "strict_mode": False,
            "grad_checkpoint": False,
            "max_seq_length": 128,
            "logging_steps": 1,
            "save_strategy": "no",
            "max_steps": 2,
            "freeze_backbone": True,
            "freeze_llm": True,
        },
        "stages": [
            {
                "name": "stage1",
                "entry": "pretrain",
                "arguments": {
                    "vision_path": str(inputs / "components/vision"),
                    "llm_path": str(inputs / "components/llm"),
                },
            }
        ],
        **changes,
    }
    path = directory / f"{recipe['name']}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def build_command(recipe: Path, *options: str) -> list[str]:
    return [sys.executable, "-c", COMMAND, "run", str(recipe), *options]


def run_internvl(server: Server, recipe: Path, *options: str, **environment: str) -> Run:
    completed = subprocess.run(
        build_command(recipe, *options),
        env={**server.environment, **environment},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert "torch imported: False" in completed.stdout, completed.stdout + completed.stderr
    return Run(completed.returncode, completed.stdout, completed.stderr)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, inputs: Path) -> Path:
    return write_recipe(tmp_path_factory.mktemp("one"), inputs)


@pytest.fixture(scope="module")
def finished(server: Server, recipe: Path) -> Run:
    run = run_internvl(server, recipe)
    assert run.returncode == 0, run.output + run.errors
    return run


def get_committed(recipe: Path) -> str:
    (directory,) = (recipe.parent / "workspace/store").glob("stage1-*")
    return f"file://{directory}"


def test_a_run_is_completed_on_the_server_with_a_task_named_after_each_stage(
    server: Server, recipe: Path, finished: Run
) -> None:
    run = server.find_flow_run(recipe.stem)
    assert run["state_type"] == "COMPLETED"
    tasks = server.list_task_runs(run["id"])
    # A task that is not named after a stage has a number behind its name.
    states = {re.sub(r"-\w+$", "", name): task["state_type"] for name, task in tasks.items()}
    assert states == dict.fromkeys(["check inputs", "index data", "stage1"], "COMPLETED")


def test_the_trainer_finds_the_indexes_that_the_flow_made(recipe: Path, finished: Run) -> None:
    (log,) = (recipe.parent / "workspace/attempts").glob("stage1-*/1/trainer.log")
    built = re.findall(r"Indexed \S+: \d+ lines", finished.output + finished.errors)
    assert len(built) == len(list((recipe.parent / "workspace/cache/index").iterdir()))
    assert "Indexed" not in log.read_text()


def test_the_server_has_the_progress_in_its_logs(server: Server, recipe: Path, finished: Run) -> None:
    run_id = server.find_flow_run(recipe.stem)["id"]
    progress = r"stage1 +step +2/2 +loss \d"
    wait_until(lambda: any(re.match(progress, line) for line in server.read_logs(run_id)), "no line of progress")


def test_the_stages_and_their_progress_are_artifacts(server: Server, recipe: Path, finished: Run) -> None:
    run_id = server.find_flow_run(recipe.stem)["id"]
    found = server.post("artifacts/filter", artifacts={"flow_run_id": {"any_": [run_id]}})
    artifacts = {artifact["key"]: artifact for artifact in found}
    assert artifacts.keys() == {f"data-{recipe.stem}", f"stages-{recipe.stem}", "progress-stage1"}
    assert re.search(r"^\| `digit` \| image \| 40 \| 0 \|", artifacts[f"data-{recipe.stem}"]["data"], re.MULTILINE)
    assert float(artifacts["progress-stage1"]["data"]) == 100
    table = artifacts[f"stages-{recipe.stem}"]["data"]
    assert re.search(r"^\| stage1 \| trained \| 2 \|.*\|$", table, re.MULTILINE), table


def test_the_same_again_is_skipped_and_fresh_is_not(
    server: Server, recipe: Path, finished: Run, tmp_path: Path
) -> None:
    copy = shutil.copy(recipe, tmp_path / "again.yaml")
    again = run_internvl(server, copy)
    assert "stage1: skipped, nothing it depends on has changed" in again.output + again.errors
    attempts = recipe.parent / "workspace/attempts"
    assert [path.name for path in attempts.glob("stage1-*/[0-9]*")] == ["1"]
    fresh = run_internvl(server, copy, "--fresh")
    assert fresh.returncode == 0, fresh.output + fresh.errors
    assert len(list(attempts.glob("stage1-*/[0-9]/"))) == 2
    # What is skipped now is the fresh one, and so is its curve.
    skipped = run_internvl(server, copy)
    assert skipped.returncode == 0, skipped.output + skipped.errors
    assert len({path.read_bytes() for path in attempts.glob("stage1-*/metrics-*.jsonl")}) == 2


@pytest.mark.fault(
    2,
    "records are bad before training begins",
    how="broken records in a data set",
    then="one line that says where, exit 65, no rank was started",
)
def test_bad_data_ends_the_run_before_anything_is_trained_with_one_line_that_says_where(
    server: Server, inputs: Path, tmp_path: Path
) -> None:
    meta = json.loads((inputs / "data/pretrain.json").read_text())
    (tmp_path / "bad.jsonl").write_text('{"image": "a.png", "conversations": 3}\n' * 8)
    entry = {**meta[next(iter(meta))], "root": str(tmp_path), "annotation": str(tmp_path / "bad.jsonl"), "length": 8}
    (tmp_path / "meta.json").write_text(json.dumps({"bad": entry}))
    path = write_recipe(tmp_path, inputs)
    run = run_internvl(server, path, "--set", f"arguments.meta_path={tmp_path}/meta.json")
    assert run.returncode == 65, run.output + run.errors
    assert "Traceback" not in run.output + run.errors
    message = run.errors.splitlines()[-1]
    assert re.match(rf"DataError: stage1: dataset 'bad': .*{tmp_path}/bad\.jsonl:1: conversations must be", message)
    assert not (tmp_path / "workspace/attempts").exists()

    flow_run = server.find_flow_run(path.stem)
    assert flow_run["state_type"] == "FAILED"
    assert "\n" not in flow_run["state"]["message"]
    assert "bad.jsonl:" in flow_run["state"]["message"]
    assert "stage1" not in server.list_task_runs(flow_run["id"])
    logs = wait_until(
        lambda: [line for line in server.read_logs(flow_run["id"]) if line.startswith("DataError")], "no error in logs"
    )
    assert logs
    assert not any("Traceback" in line for line in server.read_logs(flow_run["id"]))


@pytest.mark.fault(
    50,
    "the store is down at the start",
    how="nobody listens at its address",
    then="exit 69 before anything is trained",
)
def test_a_store_that_does_not_answer_ends_the_run_before_anything_is_trained(
    server: Server, inputs: Path, tmp_path: Path
) -> None:
    path = write_recipe(tmp_path, inputs, store_uri="s3://bucket/runs")
    credentials = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1"}
    started = time.monotonic()
    run = run_internvl(server, path, AWS_ENDPOINT_URL="http://127.0.0.1:9", **credentials)
    assert time.monotonic() - started < 60
    assert run.returncode == 69, run.output + run.errors
    assert run.errors.splitlines()[-1].startswith("StoreUnavailable: s3://bucket/runs cannot be used")
    assert not (tmp_path / "workspace/attempts").exists()


@pytest.mark.fault(
    11,
    "a rank is killed under a flow",
    how="SIGKILL",
    then="WorkerLost, a second attempt, Completed",
)
def test_a_stage_whose_rank_is_killed_is_tried_again_and_completes(
    server: Server, inputs: Path, tmp_path: Path
) -> None:
    path = write_recipe(tmp_path, inputs, retry_delays_s=[0.1])
    log = tmp_path / "run.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            build_command(path), env=server.environment, stdout=file, stderr=file, start_new_session=True
        )
    try:
        (rank,) = wait_until(lambda: find_ranks(tmp_path), "no rank was started")
        os.kill(rank, signal.SIGKILL)
        assert process.wait(120) == 0, log.read_text()
    finally:
        end(process)
    (attempts,) = tmp_path.glob("workspace/attempts/stage1-*")
    assert json.loads((attempts / "1/failure.json").read_text())["error"] == "WorkerLost"
    assert (attempts / "2/result.json").is_file()
    flow_run = server.find_flow_run(path.stem)
    assert flow_run["state_type"] == "COMPLETED"
    task = server.list_task_runs(flow_run["id"])["stage1"]
    assert (task["run_count"], task["state_type"]) == (2, "COMPLETED")


def test_a_finetune_starts_from_a_committed_checkpoint_and_from_no_other(
    server: Server, recipe: Path, finished: Run, inputs: Path, tmp_path: Path
) -> None:
    stage = {"name": "tune", "entry": "finetune", "arguments": {"meta_path": str(inputs / "data/finetune.json")}}
    path = write_recipe(tmp_path, inputs, flow="finetune", stages=[stage])
    wrong = run_internvl(server, path, "--start-from", f"{get_committed(recipe)}/data/000000000009.000001.0badcafe")
    assert wrong.returncode == 80, wrong.output + wrong.errors
    (line,) = (line for line in wrong.errors.splitlines() if line.startswith("CheckpointNotFound"))
    assert "was never committed. Committed: 2." in line

    run = run_internvl(server, path, "--start-from", get_committed(recipe))
    assert run.returncode == 0, run.output + run.errors
    (stage_file,) = tmp_path.glob("workspace/attempts/tune-*/1/stage.json")
    start = json.loads(stage_file.read_text())["start_from"]
    assert start["uri"].startswith(f"{get_committed(recipe)}/data/")
