"""Packed stages: the loss of an update, kills, resumes on other ranks, and what is told of it all."""

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import find_ranks
from stage_runs import FINGERPRINT, Attempt, Inputs, check_equal_weights, launch, make_inputs, run, wait
from torch import Tensor, nn
from transformers import AutoTokenizer, InternVLForConditionalGeneration

from internvl_core.arguments import DataTrainingArguments, ModelArguments, parse_arguments
from internvl_core.checkpoint.manifest import CheckpointKind
from internvl_core.checkpoint.store import StageStore, fetch
from internvl_core.checkpoint.training_files import LEDGER_FILE, POSITION_FILE
from internvl_core.data.dataset import Sample, SupervisedDataset
from internvl_core.data.encoding import Encoding
from internvl_core.data.meta import load_meta
from internvl_core.data.text_encoder import TextEncoder
from internvl_core.data.tiles import normalise
from internvl_core.model.internvl import InternVLForTraining
from internvl_core.model.load import build_model
from internvl_core.train.training_data import build_step_sampler, build_training_data, list_data_values
from tasks.launch import RunningStage

pytestmark = [
    pytest.mark.integration,
    # PEFT 0.21 asks transformers 5.23 by an old name.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

KILL_DEADLINE_S = 120


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def base(inputs: Inputs) -> Path:
    """A whole model to start from, so that every run and every reference has the same weights."""
    torch.manual_seed(0)
    components = inputs.folder / "components"
    loaded = build_model(
        ModelArguments(vision_path=str(components / "vision"), llm_path=str(components / "llm")),
        DataTrainingArguments(force_image_size=32),
        cache_dir=components,
        dtype=torch.float32,
    )
    # Drawn at random the head makes gradients of norm 15, of which a float32 does not hold six decimals.
    loaded.model.lm_head.weight.data.mul_(0.1)
    folder = inputs.folder / "base"
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def packed(inputs: Inputs, base: Path) -> dict[str, Any]:
    """Texts, pictures, pairs and clips in packs of some five samples."""
    common = {name: value for name, value in inputs.arguments.items() if name not in ("vision_path", "llm_path")}
    del common["eval_meta_path"]
    return {
        **common,
        "model_name_or_path": str(base),
        "meta_path": str(inputs.folder / "data" / "pretrain.json"),
        "max_packed_tokens": 192,
        "num_images_expected": 16,
        "strict_mode": False,
        "per_device_train_batch_size": 1,
    }


def train(directory: Path, arguments: dict[str, Any], **options: Any) -> Attempt:
    return run(directory, arguments, **{"entry": "pretrain", **options})


def count_draws(meta_path: str) -> int:
    """Count the samples of an epoch."""
    draws = 0
    for meta in load_meta(meta_path):
        num_records = len(Path(meta.annotation).read_text().splitlines())
        passes, extra = meta.count_samples(num_records)
        draws += passes * num_records + extra
    return draws


# the loss


def draw_first_step(arguments: dict[str, Any], *, num_packs: int) -> list[Sample]:
    """Draw the samples of the first update, as one rank that accumulates would."""
    given = parse_arguments(
        {**arguments, "gradient_accumulation_steps": num_packs, "output_dir": "unused", "use_cpu": True}
    )
    model = InternVLForTraining.from_pretrained(given.model.model_name_or_path)
    tokenizer = AutoTokenizer.from_pretrained(given.model.model_name_or_path)
    encoding = Encoding.from_arguments(
        list_data_values(given),
        encoder=TextEncoder.from_tokenizer(tokenizer),
        tokens_per_tile=model.config.image_seq_length,
    )
    given.training.prepare_for_launch()
    dataset: SupervisedDataset = build_training_data(given, encoding, Path(given.extension.cache_dir), is_packed=True)
    sampler = build_step_sampler(given, dataset.mixture, model, is_packed=True, resume_from=None)
    samples = [dataset[draw] for _, batch in zip(range(num_packs), sampler, strict=False) for draw in batch]
    return [sample for sample in samples if isinstance(sample, dict)]


def sum_losses(model: nn.Module, samples: list[Sample], exponent: float) -> Iterator[tuple[Tensor, float]]:
    """Yield each conversation's weighted loss and weight, run through the native class by itself."""
    for sample in samples:
        tiles = sample["tiles"]
        output = model(
            input_ids=sample["input_ids"][None],
            pixel_values=normalise(tiles, "imagenet", torch.float64) if len(tiles) else None,
        )
        losses = nn.functional.cross_entropy(output.logits[0, :-1], sample["labels"][1:], reduction="none")
        num_learnt = int((sample["labels"][1:] != -100).sum())
        # n tokens of weight n^-e each.
        yield losses.sum() * num_learnt**-exponent, num_learnt ** (1 - exponent)


@pytest.fixture(scope="module")
def one_step(packed: dict[str, Any], inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """An update of plain gradient descent: what it changes in the weights is the gradient."""
    descent = {"optim": "sgd", "learning_rate": 1, "weight_decay": 0, "lr_scheduler_type": "constant"}
    return {
        **packed,
        **descent,
        "decay_all": False,
        "max_grad_norm": 0,
        "max_steps": 1,
        "cache_dir": str(inputs.folder / "cache"),
    }


@pytest.mark.parametrize(
    ("reduction", "exponent", "is_deepspeed"),
    [pytest.param("square", 0.5, False, marks=pytest.mark.slow), ("sample", 1.0, True)],
)
def test_an_update_is_the_gradient_of_the_weighted_mean_over_all_ranks_and_accumulation_steps(
    one_step: dict[str, Any], reduction: str, exponent: float, is_deepspeed: bool, tmp_path: Path
) -> None:
    arguments = {**one_step, "loss_reduction": reduction, "loss_reduction_all_gather": True}
    samples = draw_first_step(arguments, num_packs=4)
    assert len(samples) > 8
    assert min(len(sample["tiles"]) for sample in samples) == 0

    base = Path(one_step["model_name_or_path"])
    model = InternVLForConditionalGeneration.from_pretrained(base, attn_implementation="eager", dtype=torch.float64)
    losses, weights = zip(*sum_losses(model, samples, exponent), strict=True)
    loss = torch.stack(losses).sum() / sum(weights)
    loss.backward()
    gradient = {name: parameter.grad for name, parameter in model.named_parameters()}

    if is_deepspeed:
        arguments["deepspeed"] = str(tmp_path / "zero2.json")
        zero2 = {"zero_optimization": {"stage": 2}, "zero_allow_untested_optimizer": True}
        # Without the last, accelerate clips at 1.
        names = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
        (tmp_path / "zero2.json").write_text(json.dumps({**zero2, **dict.fromkeys(names, "auto")}))
    shared = train(tmp_path / "1", {**arguments, "gradient_accumulation_steps": 2})
    assert shared.result.counters["samples"] == len(samples)
    assert shared.curve[0]["loss"] == pytest.approx(loss.item(), abs=1e-6)

    before = InternVLForConditionalGeneration.from_pretrained(base).state_dict()
    after = InternVLForConditionalGeneration.from_pretrained(shared.final_dir).state_dict()
    assert {name for name, tensor in gradient.items() if tensor is not None and tensor.any()} == {
        name for name, tensor in before.items() if not torch.equal(tensor, after[name])
    }
    for name, tensor in gradient.items():
        if tensor is not None:
            found = (before[name] - after[name]).double()
            torch.testing.assert_close(found, tensor, rtol=0, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


# kills and resumes


@pytest.fixture(scope="module")
def everything(packed: dict[str, Any]) -> dict[str, Any]:
    """Packs, LoRA with its dropout, augmentation, workers, and a save at every other step."""
    frozen = {"freeze_llm": True, "freeze_backbone": True, "freeze_mlp": True}
    return {
        **packed,
        **frozen,
        # Small enough that packs differ in cost and steps are grouped by it.
        "max_packed_tokens": 96,
        "max_seq_length": 96,
        "num_images_expected": 8,
        "use_llm_lora": 4,
        "dataloader_num_workers": 2,
        "loss_reduction": "square",
        "max_steps": 16,
        "save_strategy": "steps",
        "save_steps": 2,
    }


@pytest.fixture(scope="module")
def undisturbed(everything: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Attempt:
    ended = train(tmp_path_factory.mktemp("undisturbed") / "1", everything)
    assert "steps are grouped by it" in ended.log
    return ended


def read_curve(directory: Path) -> list[dict[str, Any]]:
    path = directory / "metrics.jsonl"
    # The last line may be half written.
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def wait_for_step(running: RunningStage, step: int) -> None:
    directory = running.attempt_dir
    deadline = time.monotonic() + KILL_DEADLINE_S
    while not any(line["step"] >= step for line in read_curve(directory)):
        assert running.poll() is None, (directory / "trainer.log").read_text()[-4000:]
        assert time.monotonic() < deadline
        time.sleep(0.005)


def kill_at(directory: Path, arguments: dict[str, Any], step: int, victim: int) -> None:
    """Start a stage and kill one of its processes with SIGKILL as soon as it has done a step."""
    with launch(directory, arguments, entry="pretrain") as running:
        wait_for_step(running, step)
        ranks = sorted(find_ranks(directory))
        os.kill(ranks[victim % len(ranks)], signal.SIGKILL)
        killed = wait(running)
    assert killed.failure.error == "WorkerLost", killed.log[-4000:]


@pytest.mark.fault(
    11,
    "ranks or loader workers are killed at drawn steps",
    how="SIGKILL",
    then="resumed to the losses and weights of an undisturbed run, bit for bit",
)
@pytest.mark.parametrize(
    "num_kills", [pytest.param(2, id="twice"), pytest.param(10, id="ten-times", marks=pytest.mark.slow)]
)
def test_a_stage_that_is_killed_ends_with_the_losses_and_the_weights_of_an_undisturbed_one(
    undisturbed: Attempt, everything: dict[str, Any], num_kills: int, tmp_path: Path
) -> None:
    seed = int(os.environ.get("KILL_SEED", time.time_ns() % 1_000_000))
    print(f"KILL_SEED={seed}")
    rng = random.Random(seed)
    committed = 0
    for number in range(num_kills):
        # Not near the end, or it may be over before the kill.
        step = min(13, rng.randint(committed + 1, committed + 4))
        if number == num_kills - 1:
            # Behind a commit, so that there is something to resume from.
            step = max(step, 4)
        kill_at(tmp_path / str(number), everything, step, rng.randrange(100))
        committed = find_newest_commit(tmp_path / "store")
    ended = train(tmp_path / "last", everything)
    assert "Resuming from step" in ended.log
    expected = {line["step"]: line["loss"] for line in undisturbed.curve}
    assert {line["step"]: line["loss"] for line in ended.curve} == expected
    assert len(expected) == 16
    assert {line["step"]: line["grad_norm"] for line in ended.curve} == {
        line["step"]: line["grad_norm"] for line in undisturbed.curve
    }
    weights = "adapter_model.safetensors"
    check_equal_weights(ended.final_dir / weights, undisturbed.final_dir / weights)
    assert ended.result.counters == undisturbed.result.counters


def find_newest_commit(store: Path) -> int:
    """Find the newest committed step."""
    return max((int(path.name.split(".")[0]) for path in store.glob("*/commits/*")), default=0)


def read_positions(*attempts: Attempt) -> dict[int, Any]:
    """Read where in the data each training checkpoint stands, and what was drawn up to it, by step."""
    positions = {}
    for attempt in attempts:
        for commit in attempt.commits:
            if commit.kind is CheckpointKind.TRAINING:
                folder = fetch(commit.checkpoint, attempt.directory)
                positions[commit.step] = [
                    json.loads((folder / name).read_text()) for name in (POSITION_FILE, LEDGER_FILE)
                ]
    return positions


@pytest.mark.fault(
    66,
    "the number of ranks changes from 2 to 1 and back",
    how="resumed so",
    then="the same packs in the same order",
)
@pytest.mark.slow
def test_the_packs_of_each_step_are_the_same_on_two_ranks_on_one_and_on_two_again(
    everything: dict[str, Any], tmp_path: Path
) -> None:
    elastic = {**everything, "max_steps": 12, "save_steps": 1}
    expected = train(tmp_path / "expected" / "1", elastic)
    kill_at(tmp_path / "1", elastic, 4, 0)
    alone = {**elastic, "gradient_accumulation_steps": 2}
    with launch(tmp_path / "2", alone, entry="pretrain", num_ranks=1) as running:
        wait_for_step(running, 8)
        running.ask_to_stop()
        one_rank = wait(running)
    assert one_rank.failure.error == "Preempted"
    ended = train(tmp_path / "3", elastic)
    assert "Resuming from step 8" in ended.log or "Resuming from step 9" in ended.log
    positions, expected_positions = read_positions(ended), read_positions(expected)
    assert positions == expected_positions
    assert set(positions) == set(range(1, 13))
    # Other samples would be far off; dropout draws otherwise on other ranks.
    losses = [line["loss"] for line in ended.curve]
    assert losses == pytest.approx([line["loss"] for line in expected.curve], rel=0.1)


LATE_STEP, LATE_SAMPLE = 100_000, 3_000_000


def pretend_late(checkpoint: Path) -> None:
    """Make a training checkpoint of a late step, and deep in the data, out of one of an early step."""
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    (checkpoint / "trainer_state.json").write_text(json.dumps({**state, "global_step": LATE_STEP}))
    position = json.loads((checkpoint / POSITION_FILE).read_text())
    plan = {**position["plan"], "position": LATE_SAMPLE, "num_samples": LATE_SAMPLE}
    (checkpoint / POSITION_FILE).write_text(json.dumps({**position, "step": LATE_STEP, "plan": plan}))


def test_a_resume_after_a_hundred_thousand_steps_takes_as_long_as_a_start(
    everything: dict[str, Any], undisturbed: Attempt, tmp_path: Path
) -> None:
    (early,) = [commit for commit in undisturbed.commits if commit.step == 4]
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(fetch(early.checkpoint, tmp_path), checkpoint)
    (checkpoint / "MANIFEST").unlink()
    pretend_late(checkpoint)
    store = StageStore(f"file://{tmp_path}/store", "stage", FINGERPRINT)
    info = {"run_id": "run", "counters": {}, "world_size": 2}
    store.publish(checkpoint, step=LATE_STEP, fence=1, kind=CheckpointKind.TRAINING, parent=None, info=info)

    # One epoch without an end, so that a position can be so deep in it.
    arguments = {**everything, "replacement": True, "max_steps": LATE_STEP + 2}
    resumed = train(tmp_path / "1", arguments)
    assert f"Resuming from step {LATE_STEP}" in resumed.log
    assert resumed.result.step == LATE_STEP + 2
    (last,) = [commit for commit in resumed.commits if (commit.step, commit.kind.value) == (LATE_STEP + 2, "training")]
    reached = json.loads((fetch(last.checkpoint, tmp_path) / POSITION_FILE).read_text())
    assert LATE_SAMPLE < reached["plan"]["num_samples"] < LATE_SAMPLE + 200
    needed_s, expected_s = (
        attempt.result.seconds["setup"] + attempt.result.seconds["first_step"] for attempt in (resumed, undisturbed)
    )
    print(f"process to first step: {needed_s:.1f} s, from the beginning {expected_s:.1f} s")
    # A walk there would take hours.
    assert needed_s < expected_s + 15


# what is told, and other ways to pack


def test_each_step_tells_how_full_and_how_even_its_packs_are(undisturbed: Attempt, everything: dict[str, Any]) -> None:
    curve, counters = undisturbed.curve, undisturbed.result.counters
    assert len(curve) == 16
    for line in curve:
        assert 0.5 < line["token_fill"] <= 1
        assert 0 < line["tile_fill"] <= 1
        assert 0.5 < line["balance"] <= 1
        assert 0 <= line["data_wait_pct"] < 100
        assert sum(line[f"mixture/{name}"] for name in ("digit", "seven", "even", "text", "pair", "clip")) == (
            pytest.approx(1)
        )
    # Two packs a step.
    assert sum(2 * line["samples_per_pack"] for line in curve) == pytest.approx(counters["samples"])
    filled = sum(2 * everything["max_packed_tokens"] * line["token_fill"] for line in curve)
    assert filled == pytest.approx(counters["tokens"])
    assert sum(2 * line["samples_per_pack"] * line["mixture/pair"] for line in curve) == pytest.approx(
        counters["samples/pair"]
    )


def test_a_finetune_may_pack_as_the_original_did_padded_to_the_full_for_an_epoch(
    packed: dict[str, Any], tmp_path: Path
) -> None:
    original = {"packer": "legacy", "max_buffer_size": 5, "strict_mode": True, "per_device_train_batch_size": 2}
    arguments = {**packed, **original, "use_packed_ds": True, "num_train_epochs": 1, "log_freq": 50}
    del arguments["max_steps"]
    ended = train(tmp_path / "1", arguments, entry="finetune")
    assert ended.result.counters["samples"] == count_draws(packed["meta_path"])
    assert ended.result.counters["bad_samples"] == 0
    assert all(0 < line["loss"] < 20 for line in ended.curve)
    told = [int(line.split("Packed ")[1].split()[0]) for line in ended.log.splitlines() if "samples into" in line]
    # A line each fifty samples, at the end of the step that has the fiftieth.
    assert [count // 50 for count in told] == list(range(1, count_draws(packed["meta_path"]) // 50 + 1))
