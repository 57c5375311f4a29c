"""Nights of a finetune: real training of a tiny model, a real registry, one store."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prefect.client.schemas.objects import State
from prefect.settings import PREFECT_LOGGING_LEVEL, temporary_settings
from prefect.testing.utilities import prefect_test_harness
from webhook import serve_hook

from flows.finetune_nightly import finetune_nightly
from internvl_core.contract import CheckpointRef
from internvl_core.errors import InternVLError, StoreUnavailable
from tasks.hold_stage import hold_stage
from tasks.model_registry import ModelRegistry
from tasks.notify import VARIABLE

pytestmark = pytest.mark.integration

MODEL = "digits"
QUICK = {
    "launcher.nproc_per_node": 1,
    "stages.finetune.arguments.per_device_train_batch_size": 4,
    "stages.finetune.arguments.logging_steps": 1,
}


@pytest.fixture(scope="module", autouse=True)
def prefect() -> Iterator[None]:
    with prefect_test_harness(server_startup_timeout=120), temporary_settings({PREFECT_LOGGING_LEVEL: "WARNING"}):
        yield


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("nightly")


@pytest.fixture(scope="module")
def registry(workspace: Path) -> ModelRegistry:
    return ModelRegistry(f"sqlite:///{workspace}/mlflow.db", MODEL)


def run_night(
    workspace: Path, *, steps: int = 2, better_by: float = 0.0, more: dict[str, Any] | None = None, **given: Any
) -> State[Any]:
    overrides = {
        **QUICK,
        **(more or {}),
        "workspace": str(workspace),
        "stages.finetune.arguments.max_steps": steps,
        "stages.finetune.gate.better_by": better_by,
    }
    state: State[Any] = finetune_nightly("smoke-nightly", model=MODEL, overrides=overrides, return_state=True, **given)
    return state


def add_records(workspace: Path) -> str:
    """Let new data arrive: some records once more. Returns the path of a meta file."""
    (entry,) = json.loads((workspace / "data" / "finetune.json").read_text()).values()
    lines = (workspace / "data" / entry["annotation"]).read_text().splitlines()
    (workspace / "more.jsonl").write_text("\n".join([*lines, *lines[:10]]) + "\n")
    changed = {"root": str((workspace / "data" / entry["root"]).resolve()), "annotation": "more.jsonl"}
    (workspace / "more.json").write_text(json.dumps({"word": {**entry, **changed, "length": len(lines) + 10}}))
    return str(workspace / "more.json")


def list_stages(workspace: Path) -> list[str]:
    """List the directories of the model's stages that have a checkpoint."""
    store = workspace / "store" / MODEL
    return sorted(path.name for path in store.iterdir() if any((path / "commits").glob("*.json")))


def count_scored(workspace: Path) -> int:
    return len(list((workspace / "evaluations").glob("*/*/result.json")))


def read_files(workspace: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted((workspace / "attempts").glob(f"*/1/{name}"))]


def test_nights_promote_skip_compare_and_remove(
    workspace: Path, registry: ModelRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The first champion is whatever passes the gate.
    with serve_hook() as hook:
        monkeypatch.setenv(VARIABLE, hook.url)
        first = run_night(workspace, steps=40)
        monkeypatch.delenv(VARIABLE)
    assert (first.type.value, first.name) == ("COMPLETED", "Promoted"), first
    (champion,) = registry.list_versions()
    assert registry.find_champion() == champion
    # Loaded afresh it answers as it did in the processes that trained it.
    (result,) = read_files(workspace, "result.json")
    assert float(champion.tags["internvl.score.accuracy"]) == pytest.approx(result["metrics"]["accuracy"], abs=1e-6)
    assert champion.tags["prefect.flow_run_id"]
    (told,) = hook.received
    assert (told["result"], told["version"], told["champion"]) == ("promoted", 1, None)

    # The same data again: nothing is trained.
    again = run_night(workspace, steps=40)
    assert again.name == "Skipped"
    assert "Nothing new: data and arguments are those of version 1" in str(again.message)
    assert registry.list_versions() == [champion]

    # New data, but no margin is as large as this one.
    more = {"stages.finetune.arguments.meta_path": add_records(workspace)}
    kept = run_night(workspace, better_by=1.0, more=more)
    assert kept.name == "NotPromoted"
    candidate, _ = registry.list_versions()
    assert registry.find_champion() == champion
    assert "not promoted: accuracy" in candidate.tags["internvl.verdict"]
    starts = [content["start_from"] for content in read_files(workspace, "stage.json")]
    assert {"uri": champion.checkpoint.uri, "digest": champion.checkpoint.digest} in starts
    num_scored = count_scored(workspace)

    # Afresh, it is a candidate of its own; what the champion is worth is known.
    assert run_night(workspace, better_by=1.0, more=more, is_fresh=True).name == "NotPromoted"
    assert count_scored(workspace) == num_scored + 1
    assert [version.number for version in registry.list_versions()] == [3, 2, 1]

    # Other arguments are news too. Below the gate it fails, and is a version all the same; the one before goes.
    hopeless = {"stages.finetune.gate.at_least": 1.0}
    failed = run_night(workspace, steps=3, more=hopeless, keep_last=1)
    assert failed.is_failed()
    assert "version 4 of digits is below the gate: accuracy" in str(failed.message)
    assert [version.number for version in registry.list_versions()] == [4, 1]
    assert candidate.checkpoint.uri.split("/")[-3] not in list_stages(workspace)
    assert len(list_stages(workspace)) == 2

    # And it is not tried every night.
    assert run_night(workspace, steps=3, more=hopeless).name == "Skipped"


@pytest.mark.fault(62, "a night begins while another is at work", how="the other holds the model", then="Skipped")
def test_a_night_that_meets_another_is_skipped(workspace: Path) -> None:
    with hold_stage(workspace / "nightly" / MODEL, "another", patience_s=0):
        state = run_night(workspace)
    assert state.name == "Skipped"
    assert "Another run of it is at work" in str(state.message)


def test_a_champion_whose_checkpoint_is_gone_is_said_before_anything_is_trained(tmp_path: Path) -> None:
    registry = ModelRegistry(f"sqlite:///{tmp_path}/mlflow.db", MODEL)
    lost = CheckpointRef(f"file://{tmp_path}/store/finetune-{0:016x}/data/000000000001.000001.00000000", "0" * 64)
    registry.promote(registry.add_version((lost,), experiment="smoke-nightly", run_id=None, tags={}))
    state = run_night(tmp_path)
    assert state.is_failed()
    assert "version 1 of digits, its champion: " in str(state.message)
    assert str(state.message).endswith("Set the alias to another version.")
    assert not (tmp_path / "attempts").exists()


def test_a_recipe_without_a_gate_is_refused_and_the_hook_hears_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = {**QUICK, "workspace": str(tmp_path), "stages.finetune.gate": None}
    with serve_hook() as hook:
        monkeypatch.setenv(VARIABLE, hook.url)
        state = finetune_nightly("smoke-nightly", model=MODEL, overrides=overrides, return_state=True)
    assert state.is_failed()
    (told,) = hook.received
    assert told["result"] == "failed"
    assert "stages.finetune: gate: missing." in told["text"]


def test_the_hook_hears_of_the_first_of_many_problems_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = {"stages.finetune.arguments.learning_rate": "much", "stages.finetune.arguments.max_stepz": 1}
    with serve_hook() as hook:
        monkeypatch.setenv(VARIABLE, hook.url)
        state = run_night(tmp_path, more=wrong)
    first, *others = str(state.message).splitlines()
    assert others
    (told,) = hook.received
    assert "\n" not in told["text"]
    assert told["text"].rpartition("failed: ")[2] in first


def test_a_workspace_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    state = run_night(tmp_path / "file" / "runs")
    assert re.search(r"workspace: \S+/runs cannot be made: Not a directory\. Name another one\.", str(state.message))


@pytest.mark.parametrize("address", ["sqlite:////proc/none/mlflow.db", "ftp://127.0.0.1/mlflow"])
def test_a_registry_that_cannot_be_opened_is_said(address: str) -> None:
    with pytest.raises(InternVLError, match=r"^MLflow at \S+, registered model digits: "):
        ModelRegistry(address, MODEL).find_champion()


def test_a_registry_that_is_no_database_is_said(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("nothing of the kind")
    with pytest.raises(StoreUnavailable, match=r"file is not a database\. Start it, or correct tracking_uri\."):
        ModelRegistry(f"sqlite:///{tmp_path}/mlflow.db", MODEL).find_champion()


def test_a_registry_that_does_not_answer_is_said_before_anything_is_trained(tmp_path: Path) -> None:
    state = run_night(tmp_path, tracking_uri="http://127.0.0.1:9")
    assert state.is_failed()
    assert "MLflow at http://127.0.0.1:9, registered model digits: no answer" in str(state.message)
    assert not (tmp_path / "attempts").exists()
