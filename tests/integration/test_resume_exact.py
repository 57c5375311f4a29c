"""Killed at random, inside a step and inside a save, a stage ends as one that nothing happened to, bit for bit."""

import os
import random
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from rank_faults import Fault
from same_training import NOTHING, find_differences, read_trained
from stage_runs import Attempt, Inputs, make_inputs, run

from internvl_core.checkpoint.manifest import CheckpointKind

pytestmark = [
    pytest.mark.integration,
    # PEFT 0.21 asks transformers 5.23 by an old name.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

STEPS = 8
SAVE_STEPS = 2

DATA: dict[str, dict[str, Any]] = {
    "packed": {
        "max_packed_tokens": 192,
        "num_images_expected": 16,
        "strict_mode": False,
        "per_device_train_batch_size": 1,
        "loss_reduction": "square",
    },
    "padded": {"group_by_length": True, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
}
PARTS: dict[str, dict[str, Any]] = {
    "everything": {"drop_path_rate": 0.3, "mlp_lr": 0.001},
    "frozen-tower": {"freeze_backbone": True},
    "lora": {"freeze_llm": True, "freeze_backbone": True, "use_llm_lora": 4},
}
ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {},
    "zero1": {"deepspeed": "zero1"},
    "zero2": {"deepspeed": "zero2", "bf16": True},
    "zero3": {"deepspeed": "zero3"},
}


@dataclass(frozen=True)
class Case:
    """One way to train."""

    data: str
    parts: str
    engine: str
    num_workers: int

    def __str__(self) -> str:
        return f"{self.data}-{self.parts}-{self.engine}-{self.num_workers}-workers"

    @property
    def entry(self) -> str:
        return "pretrain" if self.data == "packed" else "finetune"


# Each pair of values of two columns once at least.
CASES = [
    Case(data, parts, engine, num_workers)
    for data, parts, engine, num_workers in (
        ("packed", "everything", "ddp", 2),
        ("padded", "frozen-tower", "ddp", 0),
        ("packed", "lora", "ddp", 0),
        ("padded", "everything", "zero1", 0),
        ("packed", "frozen-tower", "zero1", 2),
        ("padded", "lora", "zero1", 2),
        ("packed", "everything", "zero2", 0),
        ("padded", "frozen-tower", "zero2", 2),
        ("padded", "lora", "zero2", 0),
        ("padded", "everything", "zero3", 2),
        ("packed", "frozen-tower", "zero3", 0),
        ("packed", "lora", "zero3", 2),
    )
]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def build_arguments(case: Case, inputs: Inputs) -> dict[str, Any]:
    values = {
        **inputs.arguments,
        "meta_path": str(inputs.folder / "data" / ("pretrain.json" if case.data == "packed" else "finetune.json")),
        "max_steps": STEPS,
        "save_strategy": "steps",
        "save_steps": SAVE_STEPS,
        "dataloader_num_workers": case.num_workers,
        **DATA[case.data],
        **PARTS[case.parts],
        **ENGINES[case.engine],
    }
    del values["eval_meta_path"]
    return values


def choose_kill(rng: random.Random, done: int) -> Fault:
    """Choose where a rank dies: behind a step, before it writes its weights, or before its save is committed."""
    rank = rng.randrange(2)
    saves_ahead = rng.randint(1, 2)
    match rng.choice(["step", "weights", "commit"]):
        case "step":
            # Not the last step, which is that of the last save as well.
            return Fault("SIGKILL", "on_step_end", step=rng.randint(done + 1, STEPS - 1), rank=rank)
        case "weights":
            place = "internvl_core.train.trainer:InternVLTrainer._save_rng_state"
        case _:
            place, rank = "internvl_core.train.sampler:StepSampler.save", 0
    return Fault("SIGKILL", place, call=min(saves_ahead, (STEPS - done) // SAVE_STEPS), rank=rank)


def find_newest(attempt: Attempt) -> int:
    return max((commit.step for commit in attempt.commits if commit.kind is CheckpointKind.TRAINING), default=0)


def check_exact(case: Case, inputs: Inputs, tmp_path: Path, *, num_kills: int) -> None:
    seed = int(os.environ.get("KILL_SEED", time.time_ns() % 1_000_000))
    print(f"KILL_SEED={seed} {case}")
    rng = random.Random(seed)
    arguments = build_arguments(case, inputs)
    undisturbed = run(tmp_path / "undisturbed" / "1", arguments, entry=case.entry, faults=[NOTHING])
    trained: dict[int, list[str]] = {}
    done = 0
    for number in range(num_kills):
        kill = choose_kill(rng, done)
        print(f"killed behind step {done}: {kill}")
        killed = run(tmp_path / "killed" / str(number), arguments, entry=case.entry, faults=[kill])
        assert killed.failure.error == "WorkerLost", killed.log[-4000:]
        begun, done = done, find_newest(killed)
        # Of what it did, only what is committed counts.
        trained |= {step: ids for step, ids in read_trained(killed).items() if begun < step <= done}
        if done >= STEPS - SAVE_STEPS:
            break
    ended = run(tmp_path / "killed" / "last", arguments, entry=case.entry, faults=[NOTHING])
    assert find_differences(ended, undisturbed) == set()
    trained |= read_trained(ended)
    expected = read_trained(undisturbed)
    assert trained == expected
    assert set(expected) == set(range(1, STEPS + 1))
    if case.data == "padded":
        # An epoch is five updates of eight samples, and each is drawn once.
        counts = Counter(sample_id for step in range(1, 6) for sample_id in trained[step])
        assert (len(counts), set(counts.values())) == (40, {1})


@pytest.mark.fault(
    38,
    "a rank dies at a drawn step, or in the middle of a save",
    how="SIGKILL behind a step, before its weights or before the commit; packed or padded, LoRA, DDP or ZeRO",
    then="every sample trained on once; losses, weights and optimizer state of an undisturbed run",
)
@pytest.mark.slow
def test_a_stage_that_is_killed_trains_on_every_sample_once_and_ends_the_same(inputs: Inputs, tmp_path: Path) -> None:
    """One of the cases below, another each time."""
    seed = int(os.environ.get("CASE_SEED", time.time_ns() % 1_000_000))
    print(f"CASE_SEED={seed}")
    check_exact(random.Random(seed).choice(CASES), inputs, tmp_path, num_kills=1)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_however_a_stage_trains_kills_change_nothing(case: Case, inputs: Inputs, tmp_path: Path) -> None:
    check_exact(case, inputs, tmp_path, num_kills=3)
