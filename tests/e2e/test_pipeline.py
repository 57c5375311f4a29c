"""The four stages, as a user runs them: `internvl run`, real torchrun with two ranks, real Prefect, real MLflow."""

import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

import fsspec
import pytest
from mlflow.tracking import MlflowClient
from processes import list_processes, wait_until
from safetensors.torch import load_file

from internvl_core.checkpoint.store import StageStore
from internvl_core.contract import StageResult

pytestmark = pytest.mark.e2e

STEPS = {"stage1": 4, "stage1.5": 4, "stage2": 6, "finetune": 4}
ON_S3 = ("stage1", "stage1.5")
SMALLER = [
    *(f"stages.{stage}.arguments.max_steps={steps}" for stage, steps in STEPS.items()),
    *(f"stages.{stage}.arguments.warmup_steps=0" for stage in STEPS),
    *(f"stages.{stage}.arguments.logging_steps=1" for stage in STEPS),
    "stages.stage2.gate.at_least=0.0",
    "stages.finetune.gate.at_least=0.0",
]


@dataclass(frozen=True)
class Run:
    """A finished `internvl run`."""

    returncode: int
    output: str
    workspace: Path


def build_command(workspace: Path, *options: str) -> list[str]:
    settings = [f"workspace={workspace}", *SMALLER]
    command = [sys.executable, "-m", "flows.cli", "run", "smoke"]
    return [*command, *(item for setting in settings for item in ("--set", setting)), *options]


def run_smoke(workspace: Path, *options: str, **environment: str) -> Run:
    completed = subprocess.run(
        build_command(workspace, *options),
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=420,
        check=False,
    )
    return Run(completed.returncode, completed.stdout, workspace)


def find_checkpoint(workspace: Path, stage: str) -> Path:
    """Find the final weights of a stage, by its handover and not by a name."""
    (directory,) = (workspace / "store").glob(f"{stage}-*")
    found = StageStore(f"file://{workspace}/store", stage, directory.name.removeprefix(f"{stage}-")).find_handover()
    assert found is not None
    return Path(found[0].uri.removeprefix("file://"))


def read_last_state() -> str:
    """Read the state of the last flow run from the database of the embedded server."""
    with closing(sqlite3.connect(Path(os.environ["PREFECT_HOME"]) / "prefect.db")) as database:
        (state,) = database.execute("SELECT state_type FROM flow_run ORDER BY created DESC LIMIT 1").fetchone()
    return str(state)


@pytest.fixture(scope="module", autouse=True)
def prefect_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Give the runs a Prefect database of their own, and no server from outside."""
    patch = pytest.MonkeyPatch()
    home = tmp_path_factory.mktemp("prefect")
    patch.setenv("PREFECT_HOME", str(home))
    patch.delenv("PREFECT_API_URL", raising=False)
    yield
    patch.undo()
    # The embedded server of a run that was killed outlives it.
    for pid in list_processes(home):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = run_smoke(tmp_path_factory.mktemp("smoke"))
    assert run.returncode == 0, run.output
    return run


def test_the_four_stages_run_and_are_shown_in_a_table(finished: Run) -> None:
    for stage, steps in STEPS.items():
        assert re.search(rf"{stage} +trained +{steps} ", finished.output), finished.output
    assert (finished.workspace / "report.html").read_text().count("<svg") >= 2
    assert "prefect server start" in finished.output
    assert "mlflow ui" in finished.output


def test_each_stage_changes_exactly_the_parts_that_its_flags_leave_free(finished: Run) -> None:
    def changed(before: dict[str, object], after: dict[str, object]) -> set[str]:
        assert before.keys() == after.keys()
        return {name for name in after if not before[name].equal(after[name])}  # type: ignore[attr-defined]

    def part(weights: dict[str, object], *prefixes: str) -> set[str]:
        return {name for name in weights if name.startswith(prefixes)}

    vision, projector = "vision_tower.", "multi_modal_projector."
    stage1, stage15, stage2 = (
        load_file(find_checkpoint(finished.workspace, stage) / "model.safetensors")
        for stage in ("stage1", "stage1.5", "stage2")
    )
    component = load_file(finished.workspace / "components/vision/model.safetensors")
    assert not changed(component, {name.removeprefix(vision): stage1[name] for name in part(stage1, vision)})
    llm = load_file(finished.workspace / "components/llm/model.safetensors")
    layers = {name: tensor for name, tensor in llm.items() if ".layers." in name}
    assert layers
    for name, tensor in layers.items():
        assert stage1[f"language_model.{name}"].equal(tensor)

    assert changed(stage1, stage15) == part(stage1, vision, projector)
    assert changed(stage15, stage2) == stage2.keys()


def test_the_stages_train_and_are_scored_on_text_images_pairs_and_videos(finished: Run) -> None:
    for stage in ("stage1", "stage1.5", "stage2"):
        (attempt_dir,) = (finished.workspace / "attempts").glob(f"{stage}-*/1")
        result = StageResult.get(attempt_dir)
        for name in ("digit", "seven", "even", "text", "pair", "clip"):
            assert result.counters[f"samples/{name}"] > 0
        assert result.counters["bad_samples"] == 0
        assert result.metrics.keys() >= {"accuracy/pair", "accuracy/clip"}
        # The flow indexed the data of all stages before the first.
        assert "Indexed" not in (attempt_dir / "trainer.log").read_text()


def test_a_lora_finetune_commits_adapters_of_the_language_model_and_their_base(finished: Run) -> None:
    finetuned = find_checkpoint(finished.workspace, "finetune")
    adapter = load_file(finetuned / "adapter_model.safetensors")
    assert adapter
    assert all(".language_model." in name and ".lora_" in name for name in adapter)
    config = json.loads((finetuned / "adapter_config.json").read_text())
    assert config["lora_alpha"] == 2 * config["r"] == 32
    base = json.loads((finetuned / "base_checkpoint.json").read_text())
    assert base["uri"] == f"file://{find_checkpoint(finished.workspace, 'stage2')}"


# MLflow's own mappers, with SQLAlchemy 2.1.
@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated")
def test_mlflow_has_a_parent_run_and_a_child_with_curve_and_scores_for_each_stage(finished: Run) -> None:
    client = MlflowClient(f"sqlite:///{finished.workspace}/mlflow.db")
    experiment = client.get_experiment_by_name("smoke")
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    children = {name: run for name, run in runs.items() if "mlflow.parentRunId" in run.data.tags}
    assert children.keys() == STEPS.keys()
    (parent,) = (run for run in runs.values() if "mlflow.parentRunId" not in run.data.tags)
    for stage, run in children.items():
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert run.info.status == "FINISHED"
        curve = client.get_metric_history(run.info.run_id, "loss")
        assert [point.step for point in curve] == list(range(1, STEPS[stage] + 1))
        assert 0 <= run.data.metrics["accuracy"] <= 1
        assert run.data.params["max_steps"] == str(STEPS[stage])


def test_a_second_run_skips_every_stage_and_shows_the_same_results(finished: Run) -> None:
    again = run_smoke(finished.workspace)
    assert again.returncode == 0, again.output
    for stage in STEPS:
        assert f"{stage}: skipped, nothing it depends on has changed" in again.output
    assert not any((finished.workspace / "attempts").glob("*/2")), "an attempt was started"


@pytest.mark.fault(
    68,
    "a byte of a parent checkpoint flips at rest",
    how="one byte of the weights",
    then="exit 80 with the name of the file, before the next stage loads any of it",
)
def test_a_flipped_byte_in_a_checkpoint_stops_the_next_stage(finished: Run, tmp_path: Path) -> None:
    workspace = tmp_path / "copy"
    shutil.copytree(finished.workspace, workspace)
    weights = find_checkpoint(workspace, "stage2") / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.unlink()
    weights.write_bytes(content)
    run = run_smoke(workspace, "--set", "stages.finetune.arguments.learning_rate=0.002")
    assert run.returncode == 80, run.output
    assert "CheckpointCorrupt" in run.output
    assert "model.safetensors" in run.output
    assert "Traceback" not in run.output


def start_smoke(workspace: Path, *options: str) -> subprocess.Popen[bytes]:
    with (workspace / "output.log").open("ab") as log:
        return subprocess.Popen(
            build_command(workspace, *options), stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )


@pytest.mark.fault(
    58,
    "the flow is killed while a stage trains",
    how="SIGKILL of the flow",
    then="ranks save, commit and leave; the next run resumes",
)
def test_killing_the_flow_leaves_no_trainer_and_the_next_run_resumes(finished: Run, tmp_path: Path) -> None:
    long = ("--set", "stages.stage1.arguments.max_steps=2000", "--set", "stages.stage1.arguments.seed=7")
    shutil.copytree(finished.workspace / "data", tmp_path / "data")
    shutil.copytree(finished.workspace / "components", tmp_path / "components")

    def has_begun() -> bool:
        return any((tmp_path / "attempts").glob("stage1-*/1/metrics.jsonl"))

    def has_resumed() -> bool:
        logs = (tmp_path / "attempts").glob("stage1-*/2/trainer.log")
        return any("Resuming from step" in log.read_text() for log in logs)

    def no_trainer_lives() -> bool:
        return not list_processes(f"--attempt_dir={tmp_path}")

    process = start_smoke(tmp_path, *long)
    wait_until(has_begun, deadline_s=120, message="training did not begin")
    process.kill()
    process.wait()
    wait_until(no_trainer_lives, deadline_s=60, message="trainers outlived their flow")
    assert len(list((tmp_path / "store").glob("stage1-*/commits/*.json"))) == 1, "the stop did not commit"

    process = start_smoke(tmp_path, *long)
    wait_until(has_resumed, deadline_s=120, message="the second attempt did not resume")
    # As a terminal does: to the whole group, not to the one process.
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=60) == 130
    wait_until(no_trainer_lives, deadline_s=30, message="trainers outlived Ctrl-C")
    assert read_last_state() == "CANCELLED"
    assert "Traceback" not in (tmp_path / "output.log").read_text()


@pytest.mark.integration
def test_stages_follow_each_other_on_s3(finished: Run, tmp_path: Path, s3_bucket_uri: str) -> None:
    shutil.copytree(finished.workspace / "data", tmp_path / "data")
    shutil.copytree(finished.workspace / "components", tmp_path / "components")
    chosen = [word for stage in ON_S3 for word in ("--stage", stage)]
    run = run_smoke(tmp_path, *chosen, "--set", f"store_uri={s3_bucket_uri}/smoke")
    assert run.returncode == 0, run.output
    filesystem = fsspec.filesystem("s3", use_listings_cache=False)
    sent = set()
    for stage in ON_S3:
        (directory,) = filesystem.glob(f"{s3_bucket_uri}/smoke/{stage}-*")
        fingerprint = directory.rpartition("-")[2]
        found = StageStore(f"{s3_bucket_uri}/smoke", stage, fingerprint).find_handover()
        assert found is not None, run.output
        sent.add(found[0].digest[:16])
    cached = {path.name for path in (tmp_path / "cache").iterdir() if path.name not in ("digests", "index")}
    assert cached == sent, "the weights that were sent stay for the next stage, and nothing is fetched"
