import json
import logging
import pickle
import re
from pathlib import Path
from typing import Any, Literal, Optional, get_type_hints  # the literal tables below are evaluated

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from internvl_core.argument_rules import SCHEMA_PATH, check_arguments, load_properties, resolve_arguments
from internvl_core.arguments import GROUPS, Arguments, format_schema, parse_arguments
from internvl_core.errors import ArgumentError

SEEDS_MODEL_ARGUMENTS = """
model_name_or_path: Optional[str] = None
vision_path: Optional[str] = None
llm_path: Optional[str] = None
mlp_path: Optional[str] = None
freeze_llm: bool = False
freeze_backbone: bool = False
freeze_mlp: bool = False
unfreeze_vit_layers: int = 0
vision_select_layer: int = -1
use_backbone_lora: int = 0
use_llm_lora: int = 0
unfreeze_lm_head: bool = False
grad_checkpoint: bool = True
drop_path_rate: float = 0.0
ps_version: Literal['v1', 'v2'] = 'v2'
use_fast_tokenizer: bool = False
use_liger: bool = False
"""

SEEDS_DATA_ARGUMENTS = """
max_seq_length: int = 8192
force_image_size: int = 448
down_sample_ratio: float = 0.5
pad2square: bool = False
conv_style: str = 'internlm2-chat'
meta_path: str = None
use_data_resampling: bool = False
dynamic_image_size: bool = False
use_thumbnail: bool = False
min_dynamic_patch: int = 1
max_dynamic_patch: int = 12
min_num_frame: int = 8
max_num_frame: int = 32
normalize_type: Literal['imagenet', 'clip', 'siglip'] = 'imagenet'
use_packed_ds: bool = False
num_images_expected: int = 40
max_packed_tokens: int = 8192
max_buffer_size: int = 20
log_freq: int = 1000
strict_mode: bool = True
replacement: bool = False
allow_overflow: bool = False
loss_reduction: str = 'token'
loss_reduction_all_gather: bool = False
"""


@pytest.mark.parametrize(("group", "table"), [("model", SEEDS_MODEL_ARGUMENTS), ("data", SEEDS_DATA_ARGUMENTS)])
def test_the_seeds_dataclasses_have_exactly_their_fields(group: str, table: str) -> None:
    names = {"Optional": Optional, "Literal": Literal}
    expected = []
    for line in table.strip().splitlines():
        name, annotation, default = re.split(": | = ", line)
        expected.append((name, eval(annotation, names), eval(default)))
    hints = get_type_hints(GROUPS[group])
    found = GROUPS[group]()
    assert [(name, hints[name], getattr(found, name)) for name in hints] == expected
    assert vars(found).keys() == hints.keys()


def test_the_committed_schema_is_the_generated_one() -> None:
    assert SCHEMA_PATH.read_text(encoding="utf-8") == format_schema()


def test_every_argument_of_every_group_is_described_in_the_schema() -> None:
    for name, fragment in load_properties().items():
        assert fragment["description"], name
    assert {fragment["x-group"] for fragment in load_properties().values()} == set(GROUPS)


# the seeds' command lines

FULL_FINETUNE = """
--model_name_or_path OpenGVLab/InternVL2_5-8B --conv_style internvl2_5 --meta_path shell/data/custom_finetune.json
--freeze_llm False --freeze_backbone False --freeze_mlp False --dynamic_image_size True --use_thumbnail True
--max_dynamic_patch 12 --max_seq_length 8192 --learning_rate 4e-5 --weight_decay 0.05 --warmup_ratio 0.03 --bf16 True
--deepspeed zero_stage1_config.json --output_dir ./output/finetune
"""
LORA_FINETUNE = """
--model_name_or_path OpenGVLab/InternVL2_5-8B --use_llm_lora 16 --freeze_llm True --freeze_backbone True
--freeze_mlp True --learning_rate 4e-5 --deepspeed zero_stage1_config.json --output_dir ./output/lora
"""
STAGE1 = """
--vision_path ./pretrained/InternViT-300M --llm_path ./pretrained/internlm2_5-7b-chat --freeze_backbone True
--freeze_llm True --freeze_mlp False --drop_path_rate 0.0 --learning_rate 2e-4 --max_steps 100000
"""
STAGE1_5 = """
--model_name_or_path ./output/stage1 --freeze_backbone False --freeze_llm True --freeze_mlp False --drop_path_rate 0.1
--learning_rate 1e-5 --max_steps 100000
"""
STAGE2 = """
--model_name_or_path ./output/stage1_5 --freeze_backbone False --freeze_llm False --freeze_mlp False
--drop_path_rate 0.1 --learning_rate 4e-5 --max_steps 5500
"""


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            FULL_FINETUNE,
            {
                "model_name_or_path": "OpenGVLab/InternVL2_5-8B",
                "conv_style": "internvl2_5",
                "meta_path": "shell/data/custom_finetune.json",
                "freeze_llm": False,
                "dynamic_image_size": True,
                "use_thumbnail": True,
                "max_dynamic_patch": 12,
                "max_seq_length": 8192,
                "learning_rate": 4e-5,
                "weight_decay": 0.05,
                "warmup_steps": 0.03,
                "bf16": True,
                "deepspeed": "zero_stage1_config.json",
                "output_dir": "./output/finetune",
            },
        ),
        (
            LORA_FINETUNE,
            {
                "use_llm_lora": 16,
                "freeze_llm": True,
                "freeze_backbone": True,
                "freeze_mlp": True,
                "learning_rate": 4e-5,
            },
        ),
        (
            STAGE1,
            {
                "vision_path": "./pretrained/InternViT-300M",
                "llm_path": "./pretrained/internlm2_5-7b-chat",
                "model_name_or_path": None,
                "freeze_backbone": True,
                "freeze_llm": True,
                "freeze_mlp": False,
                "drop_path_rate": 0.0,
                "learning_rate": 2e-4,
                "max_steps": 100000,
            },
        ),
        (STAGE1_5, {"freeze_backbone": False, "freeze_llm": True, "drop_path_rate": 0.1, "learning_rate": 1e-5}),
        (STAGE2, {"freeze_llm": False, "drop_path_rate": 0.1, "learning_rate": 4e-5, "max_steps": 5500}),
    ],
)
def test_the_seeds_command_lines_parse_on_any_machine(line: str, expected: dict[str, Any]) -> None:
    values = parse_arguments(line.split()).to_values()
    assert {name: values[name] for name in expected} == expected


def test_the_seeds_full_finetune_passes_the_check() -> None:
    check_arguments(parse_arguments(FULL_FINETUNE.split()).to_values(), entry="finetune")


# the original's scripts (reference 6.1, 6.2); sizes, then per stage: lr, drop path, weight decay, DeepSpeed

ALL_STAGES = """
--conv_style internvl2_5 --use_fast_tokenizer False --meta_path ./shell/data/mixture.json --force_image_size 448
--down_sample_ratio 0.5 --min_num_frame 8 --max_num_frame 32 --vision_select_layer -1 --ps_version v2
--dynamic_image_size True --use_thumbnail True --bf16 True --per_device_train_batch_size 1 --lr_scheduler_type cosine
--logging_steps 1 --save_strategy steps --save_steps 100 --save_total_limit 3 --evaluation_strategy no
--max_seq_length 16384 --do_train True --grad_checkpoint True --group_by_length False --dataloader_num_workers 8
--report_to tensorboard --overwrite_output_dir True --remove_unused_columns False --use_packed_ds True
--num_images_expected 48 --max_packed_tokens 16384 --max_buffer_size 20 --log_freq 1000 --strict_mode False
--replacement False --allow_overflow False --loss_reduction square --loss_reduction_all_gather True
--output_dir work_dirs/run
"""
WEIGHT_DECAY = {"1b": 0.01, "2b": 0.01, "4b": 0.01, "8b": 0.05, "26b": 0.05, "38b": 0.05, "78b": 0.05}
STAGE1_ZERO = {**dict.fromkeys(["1b", "2b", "4b", "8b"], "stage1"), "26b": "stage3", "38b": "stage3", "78b": "stage3"}
STAGE1_SUFFIX = {"38b": "_34b", "78b": "_70b"}
STAGE2_SUFFIX = {"38b": "_100b", "78b": "_100b_1e8"}
STAGE2_STEPS = {"1b": 22000, "2b": 22000, "4b": 11000}


def build_stage(stage: str, size: str) -> tuple[str, dict[str, Any]]:
    """Build a script's flags for a stage and a size, and what they should parse to."""
    is_large = size in ("26b", "38b", "78b")
    suffix = (STAGE2_SUFFIX if stage == "2" else STAGE1_SUFFIX).get(size, "")
    expected: dict[str, Any] = {
        "weight_decay": WEIGHT_DECAY[size],
        "deepspeed": f"zero_{STAGE1_ZERO[size]}_config{suffix}.json",
        "freeze_llm": stage != "2",
        "freeze_backbone": stage == "1",
        "freeze_mlp": False,
        "learning_rate": {"1": 2e-4, "1.5": 1e-5, "2": 2e-5 if is_large else 4e-5}[stage],
        "drop_path_rate": 0.0 if stage == "1" else 0.4 if is_large else 0.1,
        "max_steps": STAGE2_STEPS.get(size, 5500) if stage == "2" else 100000,
        "gradient_accumulation_steps": 2 if stage == "1.5" else 1,
        "use_liger": stage == "2" and size in ("38b", "78b"),
    }
    flags = " ".join(f"--{name} {value}" for name, value in expected.items())
    expected["warmup_steps"] = 0.03 if stage == "2" else 100.0
    flags += " --warmup_ratio 0.03" if stage == "2" else " --warmup_steps 100"
    if stage == "1":
        expected |= {"vision_path": "pretrained/InternViT", "llm_path": "pretrained/llm", "model_name_or_path": None}
        flags += " --vision_path pretrained/InternViT --llm_path pretrained/llm"
    else:
        expected |= {"model_name_or_path": "work_dirs/before", "vision_path": None}
        flags += " --model_name_or_path work_dirs/before"
    return ALL_STAGES + flags, expected


SIZES = {"1": list(WEIGHT_DECAY), "1.5": ["8b", "26b"], "2": list(WEIGHT_DECAY)}


@pytest.mark.parametrize(("stage", "size"), [(stage, size) for stage, sizes in SIZES.items() for size in sizes])
def test_the_originals_stage_scripts_parse(stage: str, size: str) -> None:
    line, expected = build_stage(stage, size)
    expected |= {
        "conv_style": "internvl2_5",
        "bf16": True,
        "lr_scheduler_type": "cosine",
        "eval_strategy": "no",
        "train_sampling_strategy": "random",
        "report_to": "tensorboard",
        "remove_unused_columns": False,
        "max_dynamic_patch": 12,
        "max_seq_length": 16384,
        "use_packed_ds": True,
        "num_images_expected": 48,
        "strict_mode": False,
        "loss_reduction": "square",
        "save_total_limit": 3,
        "vision_select_layer": -1,
    }
    values = parse_arguments(line.split()).to_values()
    assert {name: values[name] for name in expected} == expected


@pytest.mark.parametrize(("stage", "size"), [(stage, size) for stage, sizes in SIZES.items() for size in sizes])
def test_the_originals_stage_scripts_pass_the_check(stage: str, size: str) -> None:
    line, _ = build_stage(stage, size)
    check_arguments(parse_arguments(line.split()).to_values(), entry="pretrain")


ALL_FINETUNES = """
--conv_style internvl2_5 --meta_path ./shell/data/internvl_1_2_finetune_custom.json --overwrite_output_dir True
--force_image_size 448 --max_dynamic_patch 6 --down_sample_ratio 0.5 --vision_select_layer -1 --bf16 True
--dataloader_num_workers 4 --num_train_epochs 1 --evaluation_strategy no --save_strategy steps --save_steps 200
--save_total_limit 1 --warmup_ratio 0.03 --lr_scheduler_type cosine --logging_steps 1 --max_seq_length 8192
--do_train True --grad_checkpoint True --group_by_length True --dynamic_image_size True --use_thumbnail True
--ps_version v2 --report_to tensorboard --freeze_mlp {freeze_mlp} --freeze_llm {freeze_llm} --freeze_backbone True
--model_name_or_path OpenGVLab/InternVL2_5-{size} --output_dir work_dirs/run
"""
# per-device batch, accumulation, lr, weight decay, drop path, LoRA rank, DeepSpeed
FINETUNES = {
    "1B": (4, 4, 4e-5, 0.01, 0.1, 0, "zero_stage1_config.json"),
    "8B": (4, 4, 4e-5, 0.05, 0.1, 0, "zero_stage1_config.json"),
    "26B": (2, 8, 2e-5, 0.05, 0.4, 0, "zero_stage3_config.json"),
    "38B": (2, 4, 2e-5, 0.05, 0.4, 0, "zero_stage3_config_34b.json"),
    "78B": (1, 4, 2e-5, 0.05, 0.4, 0, "zero_stage3_config_100b.json"),
    "1B-lora": (4, 2, 4e-5, 0.01, 0.0, 16, "zero_stage1_config.json"),
    "2B-lora-coco": (4, 16, 4e-5, 0.01, 0.0, 128, "zero_stage1_config.json"),
    "26B-lora": (2, 4, 2e-5, 0.05, 0.0, 16, "zero_stage3_config.json"),
    "38B-lora": (2, 4, 2e-5, 0.05, 0.0, 16, "zero_stage3_config_34b.json"),
    "78B-lora": (1, 2, 2e-5, 0.05, 0.0, 16, "zero_stage3_config_100b.json"),
}


@pytest.mark.parametrize("size", FINETUNES)
def test_the_originals_finetune_scripts_parse_and_pass_the_check_but_for_their_drop_path(size: str) -> None:
    names = (
        *("per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate", "weight_decay"),
        *("drop_path_rate", "use_llm_lora", "deepspeed"),
    )
    expected: dict[str, Any] = dict(zip(names, FINETUNES[size], strict=True))
    is_lora = bool(expected["use_llm_lora"])
    line = ALL_FINETUNES.format(size=size, freeze_llm=is_lora, freeze_mlp=is_lora)
    line += " ".join(f"--{name} {value}" for name, value in expected.items())
    values = parse_arguments(line.split()).to_values()
    expected |= {"train_sampling_strategy": "group_by_length", "warmup_steps": 0.03, "max_dynamic_patch": 6}
    assert {name: values[name] for name in expected} == expected
    if values["drop_path_rate"]:
        # F11: on a frozen tower it is noise.
        with pytest.raises(ArgumentError, match=r"^drop_path_rate: .* the vision tower is frozen") as caught:
            check_arguments(values, entry="finetune")
        assert len(str(caught.value).splitlines()) == 1
    check_arguments({**values, "drop_path_rate": 0.0}, entry="finetune")


# the forms of a command line


@pytest.mark.parametrize(
    ("items", "name", "value"),
    [
        (["--freeze_llm", "True"], "freeze_llm", True),
        (["--freeze_llm=True"], "freeze_llm", True),
        (["--freeze-llm", "true"], "freeze_llm", True),
        (["--freeze_llm"], "freeze_llm", True),
        (["--no_grad_checkpoint"], "grad_checkpoint", False),
        (["--no-grad-checkpoint"], "grad_checkpoint", False),
        (["--seed", "1", "--seed", "2"], "seed", 2),
        (["--label_names", "a", "b"], "label_names", ["a", "b"]),
        (["--group-by-length"], "train_sampling_strategy", "group_by_length"),
        (["--unfreeze_vit_layers", "-4"], "unfreeze_vit_layers", -4),
        (["--output_dir="], "output_dir", ""),
        (["--output_dir=--"], "output_dir", "--"),
        (["--output_dir=a=b --seed=3"], "output_dir", "a=b --seed=3"),
        (["--activation_checkpointing"], "activation_checkpointing", True),
    ],
)
def test_every_form_that_the_hugging_face_parser_takes_is_taken(items: list[str], name: str, value: Any) -> None:
    assert parse_arguments(items).to_values()[name] == value


ARGV_TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))


@settings(max_examples=30, deadline=None)
@given(ARGV_TEXT, ARGV_TEXT)
def test_any_text_survives_the_command_line(output_dir: str, run_name: str) -> None:
    training = parse_arguments([f"--output_dir={output_dir}", f"--run_name={run_name}"]).training
    assert (training.output_dir, training.run_name) == (output_dir, run_name)


@settings(max_examples=30, deadline=None)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "learning_rate": st.floats(1e-9, 1.0),
            "max_steps": st.integers(1, 10**9),
            "freeze_llm": st.booleans(),
            "ps_version": st.sampled_from(["v1", "v2"]),
            "conv_style": st.sampled_from(["internvl2_5", "Hermes-2"]),
            "system_prompt": ARGV_TEXT,
            "warmup_ratio": st.floats(0, 0.5),
            "attempt_dir": ARGV_TEXT,
            "lr_scheduler_kwargs": st.dictionaries(st.text("abc"), st.integers()),
        },
    )
)
def test_command_line_mapping_and_torch_free_rules_agree(given: dict[str, Any]) -> None:
    items = [f"--{name}={json.dumps(value) if isinstance(value, dict) else value}" for name, value in given.items()]
    resolved = resolve_arguments(given)
    assert parse_arguments(given).to_values() == resolved
    assert parse_arguments(items).to_values() == resolved


def test_a_json_file_stands_for_the_whole_command_line(tmp_path: Path) -> None:
    path = tmp_path / "stage.json"
    path.write_text(json.dumps({"learning_rate": "1e-3", "evaluation_strategy": "no"}))
    assert parse_arguments([str(path)]) == parse_arguments({"learning_rate": 0.001})


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "cannot be read"), ("{", "not JSON"), ("[1]", "holds a list"), ('{"a": 1}', "a: no such")],
)
def test_a_wrong_json_file_is_refused(tmp_path: Path, content: str | None, said: str) -> None:
    path = tmp_path / "stage.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ArgumentError, match=said):
        parse_arguments([str(path)])


def test_all_problems_of_a_command_line_come_at_once_and_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    items = "stray --learnin_rate 1 --max_steps many --ps_version v9 --seed 1 2 --output_dir --warmup_ratio 2 --help"
    with pytest.raises(ArgumentError) as caught:
        parse_arguments(items.split())
    problems = {line.split(":")[0]: line for line in str(caught.value).splitlines()}
    assert problems.keys() == {
        *("'stray'", "learnin_rate", "max_steps", "ps_version", "seed", "output_dir", "warmup_ratio", "help")
    }
    assert problems["learnin_rate"] == "learnin_rate: no such argument. Nearest: learning_rate."
    assert problems["seed"] == "seed: ['1', '2'] should be a whole number."
    assert problems["output_dir"] == "output_dir: no value. Write --output_dir=VALUE."
    assert capfd.readouterr() == ("", "")


def test_an_abbreviation_is_no_argument() -> None:
    with pytest.raises(ArgumentError, match="learning_r: no such argument"):
        parse_arguments(["--learning_r", "1e-3"])


def test_a_value_for_a_negated_flag_is_refused() -> None:
    with pytest.raises(ArgumentError, match="no_grad_checkpoint"):
        parse_arguments(["--no_grad_checkpoint=True"])


def test_old_spellings_are_said_on_the_command_line_too(caplog: pytest.LogCaptureFixture) -> None:
    parse_arguments(["--evaluation_strategy", "no", "--logging_dir", "runs"])
    said = [record.getMessage().split(":")[0] for record in caplog.records if record.levelno == logging.WARNING]
    assert sorted(said) == ["evaluation_strategy", "logging_dir"]


# launch


def parse(tmp_path: Path, **values: Any) -> Arguments:
    return parse_arguments({"output_dir": str(tmp_path), **values})


def test_parsing_takes_no_device_and_launch_does(tmp_path: Path) -> None:
    training = parse(tmp_path, bf16=True).training
    assert not hasattr(training, "distributed_state")
    training.prepare_for_launch()
    assert training.bf16
    assert (training.device.type == "cpu") is not torch.accelerator.is_available()
    assert training.world_size == 1


def test_prepared_arguments_can_be_pickled_compared_and_prepared_again(tmp_path: Path) -> None:
    training, other = parse(tmp_path).training, parse(tmp_path).training
    training.prepare_for_launch()
    assert training != other
    other.prepare_for_launch()
    assert training == other == pickle.loads(pickle.dumps(training))
    training.prepare_for_launch()
    assert training == other


def test_the_environment_decides_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    training = parse(tmp_path).training
    training.prepare_for_launch()
    assert training.mixed_precision == "no"
    assert training.deepspeed_plugin is None
    assert "ACCELERATE_MIXED_PRECISION" in caplog.text


@pytest.mark.skipif(torch.accelerator.is_available(), reason="asks what a machine without an accelerator refuses")
def test_what_this_machine_cannot_do_is_refused_at_launch(tmp_path: Path) -> None:
    training = parse(tmp_path, fp16=True, tf32=True, use_liger=True).training
    with pytest.raises(ArgumentError) as caught:
        training.prepare_for_launch()
    assert [line.split(":")[0] for line in str(caught.value).splitlines()] == ["fp16", "tf32", "use_liger"]


def test_what_hugging_face_refuses_is_an_argument_error(tmp_path: Path) -> None:
    training = parse(tmp_path, torch_empty_cache_steps=0).training
    with pytest.raises(ArgumentError, match="torch_empty_cache_steps"):
        training.prepare_for_launch()


def test_a_launch_without_an_output_directory_is_refused() -> None:
    with pytest.raises(ArgumentError, match="output_dir: missing"):
        parse_arguments({}).training.prepare_for_launch()
