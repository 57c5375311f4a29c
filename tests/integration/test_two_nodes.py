"""Two nodes train one model: here two supervisors on one machine, with an attempt's directory each and a shared output.

What is missing before a flow can do it is in docs/decisions/0010-supervision.md.
"""

import json
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from stage_runs import DEADLINE_S, FINGERPRINT, Attempt, Inputs, describe_inputs, make_inputs, run, wait

from internvl_core.checkpoint.manifest import CheckpointKind
from internvl_core.contract import STATE_FILE, StageFile
from tasks.launch import RunningStage, launch_stage

pytestmark = [
    pytest.mark.integration,
    # PEFT 0.21 asks transformers 5.23 by an old name.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    inputs: Inputs = make_inputs(tmp_path_factory.mktemp("inputs"))
    return {**inputs.arguments, "max_steps": 3, "save_strategy": "steps", "save_steps": 2}


@contextmanager
def launch_nodes(directory: Path, arguments: dict[str, Any]) -> Iterator[tuple[RunningStage, RunningStage]]:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    stage = StageFile(
        run_id="run",
        stage="stage",
        attempt=1,
        fingerprint=FINGERPRINT,
        entry="finetune",
        arguments={"output_dir": str(directory / "output"), "cache_dir": str(directory / "cache"), **arguments},
        launcher={"kind": "local", "nnodes": 2, "nproc_per_node": 1, "rdzv_endpoint": f"127.0.0.1:{port}"},
        store_uri=f"file://{directory / 'store'}",
        start_from=None,
        resume=True,
        save_budget_s=60,
        inputs=describe_inputs(arguments, entry="finetune", num_ranks=2),
    )
    # The node of rank 0 comes last: the other waits for it.
    with (
        launch_stage(stage, directory / "node-1", node_rank=1) as second,
        launch_stage(stage, directory / "node-0", node_rank=0) as first,
    ):
        yield first, second


def find_checkpoints(attempt: Attempt) -> list[tuple[int, CheckpointKind]]:
    return [(commit.step, commit.kind) for commit in attempt.commits]


def test_two_nodes_train_what_two_ranks_of_one_node_train(arguments: dict[str, Any], tmp_path: Path) -> None:
    with launch_nodes(tmp_path / "two", arguments) as (first, second):
        two = wait(first)
        other = wait(second)
    one = run(tmp_path / "one" / "1", arguments, store=tmp_path / "one" / "store")

    assert two.result.step == 3
    assert [line["loss"] for line in two.curve] == [line["loss"] for line in one.curve]
    assert two.result.counters == one.result.counters
    assert find_checkpoints(two) == find_checkpoints(one)
    assert "[rank 1]" in other.log
    assert not (other.directory / "metrics.jsonl").exists()
    assert other.exit_code == 0
    assert json.loads((other.directory / STATE_FILE).read_text())["reason"] == "the command ended with 0"


def test_a_stop_told_to_one_node_reaches_both_and_is_committed(arguments: dict[str, Any], tmp_path: Path) -> None:
    with launch_nodes(tmp_path, {**arguments, "max_steps": 10_000, "save_strategy": "no"}) as (first, second):
        end = time.monotonic() + DEADLINE_S
        while not first.read_metrics():
            assert first.poll() is None, first.read_log()
            assert time.monotonic() < end
            time.sleep(0.05)
        second.ask_to_stop()
        attempts = [wait(second), wait(first)]

    assert [attempt.exit_code for attempt in attempts] == [75, 75]
    [(step, kind)] = find_checkpoints(attempts[1])
    assert kind is CheckpointKind.TRAINING
    assert attempts[1].failure.message.startswith(f"Stopped on request at step {step}; a checkpoint is committed")
