"""What changes under a stage between two steps or two attempts: files, workers, ranks."""

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rank_faults import Fault, let_go
from same_training import NOTHING, find_differences, read_trained
from stage_runs import DEADLINE_S, Attempt, Inputs, find_training_commit, forget_commits, launch, make_inputs, run, wait

from internvl_core.checkpoint.store import fetch
from internvl_core.checkpoint.training_files import POSITION_FILE
from internvl_core.data.meta import load_meta

STEPS_PER_EPOCH = 5
"""40 questions of the finetune set, 8 an update."""
STEPS = 6


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def build_arguments(inputs: Inputs, **values: Any) -> dict[str, Any]:
    arguments = {
        **inputs.arguments,
        "max_steps": STEPS,
        "dataloader_num_workers": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        **values,
    }
    del arguments["eval_meta_path"]
    return arguments


@pytest.fixture(scope="module")
def undisturbed(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Attempt:
    return run(tmp_path_factory.mktemp("undisturbed") / "1", build_arguments(inputs))


@pytest.mark.integration
@pytest.mark.fault(
    10,
    "another number of loader workers on resume",
    how="dataloader_num_workers 2, then 1",
    then="the same batches, losses and weights, bit for bit",
)
def test_another_number_of_workers_changes_nothing(undisturbed: Attempt, inputs: Inputs, tmp_path: Path) -> None:
    forget_commits(undisturbed, tmp_path / "store", after_step=2)
    resumed = run(tmp_path / "1", build_arguments(inputs, dataloader_num_workers=1))
    assert "Resuming from step 2" in resumed.log
    assert find_differences(resumed, undisturbed) == set()


def read_position(attempt: Attempt, step: int) -> Any:
    folder = fetch(find_training_commit(attempt, step).checkpoint, attempt.directory)
    return json.loads((folder / POSITION_FILE).read_text())


@pytest.mark.integration
@pytest.mark.fault(
    66,
    "the number of ranks changes from 2 to 1 to 2 under ZeRO",
    how="a rank is killed, and the stage resumed on as many as there are",
    then="the optimizer state is converted; the same samples, losses to float tolerance",
)
@pytest.mark.parametrize(
    "deepspeed",
    ["zero2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("zero1", "zero3"))],
)
def test_zero_goes_on_on_another_number_of_ranks(
    undisturbed: Attempt, inputs: Inputs, deepspeed: str, tmp_path: Path
) -> None:
    together = build_arguments(inputs, deepspeed=deepspeed)
    alone = {**together, "gradient_accumulation_steps": 2}
    for number, (arguments, num_ranks, step) in enumerate([(together, 2, 3), (alone, 1, 5)]):
        kill = Fault("SIGKILL", "on_step_end", step=step, rank=0)
        killed = run(tmp_path / str(number), arguments, num_ranks=num_ranks, faults=[kill])
        assert killed.failure.error == "WorkerLost", killed.log[-4000:]
    ended = run(tmp_path / "last", together)
    assert "Resuming from step 4" in ended.log
    assert "Bringing the optimizer state" in ended.log
    # Under DDP on two ranks all the time.
    assert [line["step"] for line in ended.curve] == [line["step"] for line in undisturbed.curve]
    for name in ("loss", "grad_norm"):
        expected = [line[name] for line in undisturbed.curve]
        assert [line[name] for line in ended.curve] == pytest.approx(expected, rel=1e-4)
    assert ended.result.counters == undisturbed.result.counters
    assert read_position(ended, STEPS) == read_position(undisturbed, STEPS)


def change_at(directory: Path, arguments: dict[str, Any], step: int, change: Callable[[], None]) -> Attempt:
    """Train, and change something of the world when a step is done."""
    pause = Fault("pause", "on_step_end", step=step)
    with launch(directory, arguments, faults=[pause]) as running:
        deadline = time.monotonic() + DEADLINE_S
        while not all(pause.has_happened(directory, rank) for rank in range(2)):
            assert running.poll() is None, (directory / "trainer.log").read_text()[-4000:]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        change()
        let_go(directory)
        return wait(running)


@pytest.fixture
def own_inputs(inputs: Inputs, tmp_path: Path) -> Inputs:
    """Inputs of which something may be removed."""
    folder = tmp_path / "inputs"
    shutil.copytree(inputs.folder, folder)
    return replace(inputs, folder=folder)


@pytest.mark.integration
@pytest.mark.fault(
    3,
    "a picture vanishes between two epochs",
    how="removed when the first epoch is done",
    then="in the quarantine, once; all other samples in the same steps",
)
def test_a_picture_that_vanishes_is_quarantined_and_the_order_of_all_others_stays(
    own_inputs: Inputs, tmp_path: Path
) -> None:
    # Workers would have read ahead.
    arguments = build_arguments(own_inputs, max_steps=STEPS_PER_EPOCH + 3, dataloader_num_workers=0)
    expected = read_trained(run(tmp_path / "whole" / "1", arguments, faults=[NOTHING]))
    step = STEPS_PER_EPOCH + 2
    lost = expected[step][0]
    (meta,) = load_meta(own_inputs.folder / "data" / "finetune.json")
    record = json.loads(Path(meta.annotation).read_text().splitlines()[int(lost.rpartition(":")[2]) - 1])

    def remove() -> None:
        (Path(meta.root) / record["image"]).unlink()

    attempt = change_at(tmp_path / "1", arguments, STEPS_PER_EPOCH, remove)
    trained = read_trained(attempt)
    # Several questions may be about one picture.
    lines = [
        json.loads(line)
        for path in sorted((attempt.directory / "quarantine").iterdir())
        for line in path.read_text().splitlines()
    ]
    assert lost in {line["sample_id"] for line in lines}
    assert {line["reason"] for line in lines} == {"missing"}
    bad = sorted(line["sample_id"] for line in lines)
    assert len(bad) == attempt.result.counters["bad_samples"]
    assert {step: ids for step, ids in trained.items() if step <= STEPS_PER_EPOCH} == {
        step: ids for step, ids in expected.items() if step <= STEPS_PER_EPOCH
    }
    for later in range(STEPS_PER_EPOCH + 1, STEPS_PER_EPOCH + 4):
        assert trained[later] == [sample_id for sample_id in expected[later] if sample_id not in bad]


@pytest.mark.integration
@pytest.mark.fault(
    9,
    "an annotation is rewritten while it is trained on",
    how="a line is replaced behind a step",
    then="the next read of it ends the stage with its name (65)",
)
def test_an_annotation_that_is_rewritten_ends_the_stage(own_inputs: Inputs, tmp_path: Path) -> None:
    (meta,) = load_meta(own_inputs.folder / "data" / "finetune.json")
    annotation = Path(meta.annotation)

    def rewrite() -> None:
        lines = annotation.read_text().splitlines(keepends=True)
        annotation.write_text("".join([*lines[1:], lines[0]]))

    arguments = build_arguments(own_inputs, dataloader_num_workers=0)
    attempt = change_at(tmp_path / "1", arguments, 1, rewrite)
    assert (attempt.failure.error, attempt.exit_code) == ("DataError", 65)
    assert str(annotation) in attempt.failure.message
    assert "\n" not in attempt.failure.message
