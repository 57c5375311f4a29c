"""A bare torchrun: it goes on from what it finds in output_dir, from a folder, and from a store."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from stage_runs import DEADLINE_S, Inputs, check_equal_weights, make_inputs, run

from internvl_core.checkpoint.local_checkpoints import LocalCheckpoints, read_local
from internvl_core.checkpoint.manifest import CheckpointKind, check_files

pytestmark = pytest.mark.integration

STEPS = 6
WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Hand:
    """A run by hand that has ended."""

    output_dir: Path
    exit_code: int
    log: str

    @property
    def curve(self) -> list[tuple[int, float, float]]:
        lines = (self.output_dir / "metrics.jsonl").read_text().splitlines()
        return [(line["step"], line["loss"], line["learning_rate"]) for line in map(json.loads, lines)]

    @property
    def checkpoints(self) -> list[str]:
        return sorted(path.name for path in self.output_dir.glob("checkpoint-*"))


def train(output_dir: Path, arguments: dict[str, Any], *, num_ranks: int = 1) -> Hand:
    given = {**arguments, "output_dir": str(output_dir)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
    command += ["-m", "internvl_core.finetune", *(f"--{name}={value}" for name, value in given.items())]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    return Hand(output_dir, done.returncode, done.stderr)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def arguments(inputs: Inputs) -> dict[str, Any]:
    values = {
        **inputs.arguments,
        "per_device_train_batch_size": 8,
        "max_steps": STEPS,
        "drop_path_rate": 0.3,
        "save_strategy": "steps",
        "save_steps": 2,
        "save_total_limit": 1,
        "cache_dir": str(inputs.folder / "cache"),
    }
    del values["eval_meta_path"]
    return values


@pytest.fixture(scope="module")
def undisturbed(arguments: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Hand:
    ended = train(tmp_path_factory.mktemp("by hand") / "output", arguments)
    assert ended.exit_code == 0, ended.log[-4000:]
    return ended


def copy_output(hand: Hand, tmp_path: Path) -> Path:
    return Path(shutil.copytree(hand.output_dir, tmp_path / "output"))


def test_its_checkpoints_are_whole_and_two_are_kept(undisturbed: Hand) -> None:
    assert undisturbed.checkpoints == ["checkpoint-4", "checkpoint-6"]
    assert list((undisturbed.output_dir / "saving").iterdir()) == []
    for name in undisturbed.checkpoints:
        checkpoint = read_local(undisturbed.output_dir / name)
        check_files(checkpoint.path, checkpoint.manifest.files)
    assert (undisturbed.output_dir / WEIGHTS).is_file()


@pytest.mark.fault(
    68,
    "a bit of the newest checkpoint of a run by hand flips at rest",
    how="one bit of optimizer.pt",
    then="found before it is loaded; the one before it is used, to the same weights",
)
def test_it_goes_on_from_the_newest_checkpoint_that_verifies(
    undisturbed: Hand, arguments: dict[str, Any], tmp_path: Path
) -> None:
    output_dir = copy_output(undisturbed, tmp_path)
    (output_dir / WEIGHTS).unlink()
    damaged = output_dir / "checkpoint-6" / "optimizer.pt"
    body = bytearray(damaged.read_bytes())
    body[len(body) // 2] ^= 1
    damaged.write_bytes(body)
    # What a crash in the middle of a save leaves.
    shutil.copytree(output_dir / "checkpoint-4", output_dir / "saving" / "checkpoint-6")
    (output_dir / "saving" / "checkpoint-6" / "MANIFEST").unlink()
    resumed = train(output_dir, {**arguments, "resume_from_checkpoint": True})
    assert resumed.exit_code == 0, resumed.log[-4000:]
    assert f"Passed over a checkpoint: {damaged}: sha256" in resumed.log
    assert f"Resuming from step 4: {output_dir}/checkpoint-4" in resumed.log
    check_equal_weights(output_dir / WEIGHTS, undisturbed.output_dir / WEIGHTS)
    assert resumed.curve == undisturbed.curve
    newest = next(LocalCheckpoints(output_dir).iter_verified())
    assert (newest.path.name, newest.manifest.fence) == ("checkpoint-6", 2)


def test_a_run_that_has_ended_ends_again_with_the_same_weights(
    undisturbed: Hand, arguments: dict[str, Any], tmp_path: Path
) -> None:
    again = train(copy_output(undisturbed, tmp_path), arguments)
    assert again.exit_code == 0, again.log[-4000:]
    assert "Resuming from step 6" in again.log
    check_equal_weights(again.output_dir / WEIGHTS, undisturbed.output_dir / WEIGHTS)
    assert again.curve == undisturbed.curve


def test_with_other_arguments_it_refuses_to_go_on_and_shows_the_difference(
    undisturbed: Hand, arguments: dict[str, Any], tmp_path: Path
) -> None:
    output_dir = copy_output(undisturbed, tmp_path)
    refused = train(output_dir, {**arguments, "learning_rate": 0.1, "save_steps": 3})
    assert refused.exit_code != 0
    assert "ArgumentError: " in refused.log
    assert "learning_rate: 0.003 in the checkpoint, 0.1 now" in refused.log
    assert "another output_dir" in refused.log
    assert "save_steps: " not in refused.log
    assert refused.checkpoints == undisturbed.checkpoints


@pytest.mark.slow
def test_overwriting_begins_anew_and_what_it_writes_comes_first_from_then_on(
    undisturbed: Hand, arguments: dict[str, Any], tmp_path: Path
) -> None:
    output_dir = copy_output(undisturbed, tmp_path)
    anew = train(output_dir, {**arguments, "overwrite_output_dir": True, "learning_rate": 0.1, "max_steps": 4})
    assert anew.exit_code == 0, anew.log[-4000:]
    assert "Resuming" not in anew.log
    assert [step for step, *_ in anew.curve] == [1, 2, 3, 4]
    newest = next(LocalCheckpoints(output_dir).iter_verified())
    assert (newest.manifest.step, newest.manifest.fence) == (4, 2)


@pytest.mark.slow
def test_an_explicit_folder_is_gone_on_from_and_no_other(
    undisturbed: Hand, arguments: dict[str, Any], tmp_path: Path
) -> None:
    told = {**arguments, "resume_from_checkpoint": str(undisturbed.output_dir / "checkpoint-4")}
    resumed = train(tmp_path / "elsewhere", told)
    assert resumed.exit_code == 0, resumed.log[-4000:]
    check_equal_weights(resumed.output_dir / WEIGHTS, undisturbed.output_dir / WEIGHTS)
    assert resumed.curve == undisturbed.curve
    (tmp_path / "checkpoint-9").mkdir()
    refused = train(tmp_path / "nothing", {**arguments, "resume_from_checkpoint": str(tmp_path / "checkpoint-9")})
    assert refused.exit_code != 0
    assert f"CheckpointCorrupt: {tmp_path}/checkpoint-9 has no MANIFEST" in refused.log


@pytest.mark.slow
def test_it_goes_on_from_a_store_that_a_stage_of_a_pipeline_wrote(
    undisturbed: Hand,
    arguments: dict[str, Any],
    s3_bucket_uri: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # As the runs by hand have it: sums over another number of threads round otherwise.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    # The final weights count among those that stay.
    arguments = {**arguments, "save_total_limit": 3}
    stage = run(tmp_path / "1", arguments, num_ranks=1, store_uri=s3_bucket_uri)
    (middle,) = (commit for commit in stage.commits if (commit.step, commit.kind) == (4, CheckpointKind.TRAINING))
    told = {**arguments, "resume_from_checkpoint": middle.checkpoint.uri, "cache_dir": str(tmp_path / "empty")}
    resumed = train(tmp_path / "output", told)
    assert resumed.exit_code == 0, resumed.log[-4000:]
    assert "Resuming from step 4" in resumed.log
    check_equal_weights(resumed.output_dir / WEIGHTS, undisturbed.output_dir / WEIGHTS)
