"""Plans of stages over tiny models: what a stage is given must be what training would make of it."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from tiny_internvl import TILE_SIZE, TOKENS_PER_TILE, build_tiny_model

from flows import cli
from internvl_core.argument_rules import resolve_arguments
from internvl_core.arguments import ModelArguments
from internvl_core.errors import ArgumentError
from internvl_core.inspection.plan import plan, run_plan
from internvl_core.inspection.plan_report import PlanJob, PlanReport, StageJob, StageReport
from internvl_core.model.flops import ModelShape, count_model_flops
from internvl_core.model.trainable import count_parameters, list_trainable, set_trainable

pytestmark = [
    # PEFT 0.21 asks transformers 5.23 by an old name.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

FROZEN = {"freeze_llm": True, "freeze_backbone": True, "freeze_mlp": True}
GIB = 1 << 30


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    build_tiny_model().config.save_pretrained(folder)
    return folder


def make_stage(name: str = "stage", *, entry: str = "pretrain", num_ranks: int = 2, **values: Any) -> StageJob:
    values = {
        "force_image_size": TILE_SIZE,
        "max_packed_tokens": 256,
        "max_seq_length": 128,
        "num_images_expected": 12,
        "per_device_train_batch_size": 1,
        "grad_checkpoint": False,
        **values,
    }
    return StageJob(name, entry, resolve_arguments(values), num_ranks, None)


def plan_stage(model_dir: Path, *, gpu_bytes: int | None = None, **values: Any) -> StageReport:
    stage = make_stage(model_name_or_path=str(model_dir), **values)
    (report,) = plan(PlanJob([stage], None, gpu_bytes=gpu_bytes)).stages
    return report


@pytest.mark.parametrize(
    "flags",
    [
        {},
        FROZEN | {"freeze_mlp": False},
        FROZEN | {"unfreeze_vit_layers": -1, "unfreeze_lm_head": True},
        FROZEN | {"use_llm_lora": 4, "use_backbone_lora": 2},
        {"freeze_llm": True, "use_llm_lora": 4},
    ],
)
def test_a_plan_counts_what_training_would_train(flags: dict[str, Any], model_dir: Path) -> None:
    model = build_tiny_model()
    values = make_stage(**flags).values
    learner = set_trainable(
        model, ModelArguments(**{field.name: values[field.name] for field in fields(ModelArguments)})
    )
    learning = set(list_trainable(learner))
    report = plan_stage(model_dir, **flags)
    sizes = {name: parameter.numel() for name, parameter in learner.named_parameters()}
    for part, counts in report.parts.items():
        # Everything that is neither tower nor projector is the language model's, its head included.
        others = [name for name in report.parts if name != "language_model"]
        names = [
            name
            for name in sizes
            if (f".{part}." in name if part in others else not any(f".{other}." in name for other in others))
        ]
        assert counts.total == sum(sizes[name] for name in names)
        assert counts.trainable == sum(sizes[name] for name in names if name in learning)
    assert report.whole.total == count_parameters(learner)
    assert report.num_adapters == sum(size for name, size in sizes.items() if "lora_" in name)


def test_a_stage_without_a_model_takes_that_of_the_stage_before(model_dir: Path) -> None:
    first = make_stage("stage1", model_name_or_path=str(model_dir), **FROZEN, use_llm_lora=4)
    second = make_stage("stage2")
    reports = plan(PlanJob([first, second], None)).stages
    assert [report.source for report in reports] == [str(model_dir)] * 2
    # The adapter is merged before the next stage begins.
    assert reports[1].whole.total == reports[0].whole.total - reports[0].num_adapters
    assert reports[1].whole.trainable == reports[1].whole.total


def test_one_stage_alone_is_planned_with_the_model_of_those_before(model_dir: Path) -> None:
    stages = [make_stage("stage1", model_name_or_path=str(model_dir), **FROZEN, use_llm_lora=4), make_stage("stage2")]
    whole, alone = plan(PlanJob(stages, None)), plan(PlanJob(stages, None, only="stage2"))
    assert alone.stages == whole.stages[1:]


def test_tiles_of_another_size_resize_the_position_embedding(model_dir: Path) -> None:
    usual, larger = plan_stage(model_dir), plan_stage(model_dir, force_image_size=2 * TILE_SIZE)
    # 16 patches of 8 px become 64, 16 wide.
    assert larger.parts["vision_tower"].total - usual.parts["vision_tower"].total == (64 - 16) * 16


def test_the_largest_batch_of_a_packed_stage_is_its_packs_at_their_caps(model_dir: Path) -> None:
    batch = plan_stage(model_dir, per_device_train_batch_size=3, gradient_accumulation_steps=4).batch
    assert (batch.tokens, batch.tiles, batch.batches_per_step) == (3 * 256, 3 * 12, 4 * 2)


def test_the_largest_batch_of_a_padded_stage_has_the_most_tiles_that_fit(model_dir: Path) -> None:
    batch = plan_stage(model_dir, entry="finetune", per_device_train_batch_size=3).batch
    assert batch.tokens == 3 * 128
    assert batch.tiles == 3 * ((128 - 2) // TOKENS_PER_TILE)


def test_flops_are_those_of_full_batches_on_all_ranks(model_dir: Path) -> None:
    values: dict[str, Any] = FROZEN | {"freeze_mlp": False, "max_seq_length": 100, "per_device_train_batch_size": 2}
    report = plan_stage(model_dir, gradient_accumulation_steps=3, num_ranks=5, **values)
    useful = count_model_flops(
        ModelShape.from_config(build_tiny_model().config),
        learns_vision=False,
        learns_projector=True,
        learns_llm=False,
        tokens=2 * 256,
        # Samples of at most 100 tokens fill a pack of 256.
        tokens_squared=2 * (2 * 100**2 + 56**2),
        tiles=2 * 12,
        supervised_tokens=2 * 256,
    )
    assert report.flops.useful == pytest.approx(15 * useful)
    assert report.flops.computed == report.flops.useful
    again = plan_stage(model_dir, gradient_accumulation_steps=3, num_ranks=5, grad_checkpoint=True, **values)
    assert again.flops.useful == report.flops.useful < again.flops.computed < 4 / 3 * report.flops.useful


def test_adapters_cost_a_gradient_through_the_language_model_but_not_of_its_weights(model_dir: Path) -> None:
    adapters = plan_stage(model_dir, **FROZEN, use_llm_lora=4).flops.useful
    projector = plan_stage(model_dir, **(FROZEN | {"freeze_mlp": False})).flops.useful
    assert adapters == projector


def test_recomputation_needs_less_memory(model_dir: Path) -> None:
    kept, recomputed = (plan_stage(model_dir, grad_checkpoint=flag).memory for flag in (False, True))
    assert recomputed.kept < kept.kept
    assert (recomputed.weights, recomputed.logits) == (kept.weights, pytest.approx(kept.logits, rel=0.01))


def test_the_total_is_that_of_the_moment_that_needs_most(model_dir: Path) -> None:
    memory = plan_stage(model_dir).memory
    state = memory.weights + memory.gradients + memory.optimizer + memory.buckets
    assert memory.total == state + max(memory.activations, memory.kept + memory.logits)


def test_without_deepspeed_bf16_costs_copies_of_the_weights_in_float32(model_dir: Path) -> None:
    plain, autocast = plan_stage(model_dir), plan_stage(model_dir, bf16=True)
    assert (autocast.memory.weights, autocast.dtype) == (plain.memory.weights, "bfloat16")
    copies = 2 * autocast.whole.total
    assert autocast.memory.activations - copies < 0.8 * plain.memory.activations


def test_what_does_not_fit_is_told_what_would_help(model_dir: Path) -> None:
    values: dict[str, Any] = {"deepspeed": "zero2", "bf16": True}
    roomy = plan_stage(model_dir, gpu_bytes=GIB, **values)
    assert roomy.memory.fits(GIB)
    assert roomy.levers == []
    tight = plan_stage(model_dir, gpu_bytes=GIB // 8, **values)
    assert not tight.memory.fits(GIB // 8)
    settings = [lever.setting for lever in tight.levers]
    assert settings[:2] == ["grad_checkpoint: True", "grad_checkpoint: True, deepspeed: zero3"]
    for lever in tight.levers:
        changes = dict(each.split(": ") for each in lever.setting.split(", ") if " with " not in each)
        if "zero" in lever.setting and " with " not in lever.setting:
            assert plan_stage(model_dir, **(values | changes)).memory.total == lever.total


def test_a_plan_survives_the_process_boundary(model_dir: Path) -> None:
    job = PlanJob([make_stage(model_name_or_path=str(model_dir))], None, gpu_bytes=GIB // 1024)
    report = run_plan(json.loads(json.dumps(job.to_json())))
    assert PlanReport.from_json(json.loads(json.dumps(report))) == plan(job)


def test_a_stage_with_nothing_to_start_from_is_told_by_name() -> None:
    with pytest.raises(ArgumentError, match="stage2: has nothing to start from"):
        plan(PlanJob([make_stage("stage2")], None))


def test_a_part_is_no_whole_model() -> None:
    stage = make_stage(model_name_or_path="Qwen/Qwen2.5-0.5B-Instruct")
    with pytest.raises(ArgumentError, match=r"stage: Qwen/Qwen2\.5-0\.5B-Instruct is a qwen2 model"):
        plan(PlanJob([stage], None))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("plan nope", "ArgumentError: recipe nope: neither a file nor a shipped recipe"),
        ("plan smoke --stage stag2", "ArgumentError: --stage: no stage stag2 (did you mean stage2?)."),
        ("plan smoke --gpu-gb 0", "ArgumentError: --gpu-gb: 0.0 must be more than 0."),
        (
            "plan smoke --set stages.stage2.arguments.max_step=3",
            "ArgumentError: arguments of stage2: max_step: no such argument.",
        ),
    ],
)
def test_a_wrong_command_is_refused_before_anything_is_started(
    arguments: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["internvl", *arguments.split()])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == ArgumentError.exit_code
    assert message in capsys.readouterr().err


def test_the_tables_show_every_stage_and_what_would_help(
    model_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows import plan_command

    monkeypatch.setenv("COLUMNS", "100")
    stages = [make_stage("stage1", model_name_or_path=str(model_dir), deepspeed="zero1"), make_stage("stage2")]
    report = plan(PlanJob(stages, None, gpu_bytes=GIB // 1024))
    plan_command.print_report(report, GIB // 1024)
    output = capsys.readouterr().out
    assert output.count("stage1") >= 5
    assert "ZeRO-1" in output
    assert "stage1: 7.5 G: does not fit a GPU of 1.0 M" in output
    assert "  grad_checkpoint: True, deepspeed: zero3" in output
