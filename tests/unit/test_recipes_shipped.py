"""The shipped recipes hold the values of OpenGVLab's scripts (reference 6.1 to 6.3), typed in here a second time."""

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flows import cli
from flows.overrides import parse_overrides
from flows.recipe import SHIPPED, Recipe, list_recipes, load_recipe
from flows.stages import run_recipe
from internvl_core.argument_rules import fingerprint_arguments
from internvl_core.errors import ArgumentError
from tasks.stage import Stage
from tasks.stage_plan import check_launchers, check_stage_arguments, resolve_stage

Row = dict[str, str]

PRETRAIN = """
size stage lr   warmup max_steps GA batch drop wd   deepspeed       liger
1b   1    2e-4  100    100000    1  512   0.0  0.01 zero1           no
2b   1    2e-4  100    100000    1  512   0.0  0.01 zero1           no
4b   1    2e-4  100    100000    1  512   0.0  0.01 zero1           no
8b   1    2e-4  100    100000    1  512   0.0  0.05 zero1           no
26b  1    2e-4  100    100000    1  512   0.0  0.05 zero3           no
38b  1    2e-4  100    100000    1  512   0.0  0.05 zero3_34b       no
78b  1    2e-4  100    100000    1  512   0.0  0.05 zero3_70b       no
8b   1.5  1e-5  100    100000    2  1024  0.1  0.05 zero1           no
26b  1.5  1e-5  100    100000    2  1024  0.4  0.05 zero3           no
1b   2    4e-5  0.03   22000     1  512   0.1  0.01 zero1           no
2b   2    4e-5  0.03   22000     1  512   0.1  0.01 zero1           no
4b   2    4e-5  0.03   11000     1  512   0.1  0.01 zero1           no
8b   2    4e-5  0.03   5500      1  512   0.1  0.05 zero1           no
26b  2    2e-5  0.03   5500      1  512   0.4  0.05 zero3           no
38b  2    2e-5  0.03   5500      1  512   0.4  0.05 zero3_100b      yes
78b  2    2e-5  0.03   5500      1  512   0.4  0.05 zero3_100b_1e8  yes
"""

COMPONENTS = """
size vision                                llm
1b   OpenGVLab/InternViT-300M-448px-V2_5   Qwen/Qwen2.5-0.5B-Instruct
2b   OpenGVLab/InternViT-300M-448px-V2_5   internlm/internlm2_5-1_8b-chat
4b   OpenGVLab/InternViT-300M-448px-V2_5   Qwen/Qwen2.5-3B-Instruct
8b   OpenGVLab/InternViT-300M-448px        internlm/internlm2_5-7b-chat
26b  OpenGVLab/InternViT-6B-448px-V1-5     internlm/internlm2_5-20b-chat
38b  OpenGVLab/InternViT-6B-448px-V2_5     Qwen/Qwen2.5-32B-Instruct
78b  OpenGVLab/InternViT-6B-448px-V2_5     Qwen/Qwen2.5-72B-Instruct
"""

# script_drop: what the script sets on its frozen vision tower, where ours has 0.0.
FINETUNE = """
recipe                  GPUs batch per_device GA lr   wd   script_drop lora deepspeed
full-internvl2_5-1b      8   128   4          4  4e-5 0.01 0.1         0    zero1
full-internvl2_5-2b      8   128   4          4  4e-5 0.01 0.1         0    zero1
full-internvl2_5-4b      8   128   4          4  4e-5 0.01 0.1         0    zero1
full-internvl2_5-8b      8   128   4          4  4e-5 0.05 0.1         0    zero1
full-internvl2_5-26b     8   128   2          8  2e-5 0.05 0.4         0    zero3
full-internvl2_5-38b     16  128   2          4  2e-5 0.05 0.4         0    zero3_34b
full-internvl2_5-78b     32  128   1          4  2e-5 0.05 0.4         0    zero3_100b
lora-internvl2_5-1b      2   16    4          2  4e-5 0.01 0.0         16   zero1
lora-internvl2_5-2b      2   16    4          2  4e-5 0.01 0.0         16   zero1
lora-internvl2_5-2b-coco 8   512   4          16 4e-5 0.01 0.0         128  zero1
lora-internvl2_5-4b      2   16    4          2  4e-5 0.01 0.0         16   zero1
lora-internvl2_5-8b      2   16    4          2  4e-5 0.05 0.0         16   zero1
lora-internvl2_5-26b     2   16    2          4  2e-5 0.05 0.0         16   zero3
lora-internvl2_5-38b     2   16    2          4  2e-5 0.05 0.0         16   zero3_34b
lora-internvl2_5-78b     8   16    1          2  2e-5 0.05 0.0         16   zero3_100b
full-internvl3-1b        8   128   4          4  1e-5 0.05 0.0         0    zero1
full-internvl3-2b        8   128   4          4  2e-5 0.05 0.0         0    zero1
full-internvl3-8b        8   128   4          4  2e-5 0.05 0.0         0    zero1
full-internvl3-9b        8   128   4          4  2e-5 0.05 0.0         0    zero1
full-internvl3-14b       8   128   4          4  2e-5 0.05 0.1         0    zero1
full-internvl3-38b       16  128   2          4  2e-5 0.05 0.2         0    zero3_34b
full-internvl3-78b       32  128   2          2  2e-5 0.05 0.4         0    zero3_100b
"""

COMMON = {
    "conv_style": "internvl2_5",
    "force_image_size": 448,
    "down_sample_ratio": 0.5,
    "vision_select_layer": -1,
    "ps_version": "v2",
    "dynamic_image_size": True,
    "use_thumbnail": True,
    "min_num_frame": 8,
    "max_num_frame": 32,
    "lr_scheduler_type": "cosine",
    "bf16": True,
    "grad_checkpoint": True,
    "decay_all": True,
    "logging_steps": 1,
    "save_strategy": "steps",
    "eval_strategy": "no",
    "eval_meta_path": None,
    "max_grad_norm": 1.0,
    "seed": 42,
    "unfreeze_vit_layers": 0,
    "unfreeze_lm_head": False,
    "use_backbone_lora": 0,
}
PACKED = {
    "per_device_train_batch_size": 1,
    "max_dynamic_patch": 12,
    "max_seq_length": 16384,
    "use_packed_ds": True,
    "packer": "balanced",  # ours; the scripts have what is legacy here
    "max_packed_tokens": 16384,
    "num_images_expected": 48,
    "max_buffer_size": 20,
    "log_freq": 1000,
    "strict_mode": False,
    "replacement": False,
    "allow_overflow": False,
    "loss_reduction": "square",
    "loss_reduction_all_gather": True,
    "train_sampling_strategy": "random",
    "dataloader_num_workers": 8,
    "save_steps": 100,
    "save_total_limit": 3,
    "use_llm_lora": 0,
}
PADDED = {
    "num_train_epochs": 1,
    "max_steps": -1,
    "warmup_steps": 0.03,
    "use_packed_ds": False,
    "train_sampling_strategy": "group_by_length",
    "dataloader_num_workers": 4,
    "save_steps": 200,
    "save_total_limit": 1,
    "freeze_backbone": True,
    "use_liger": False,
}
# llm, mlp, backbone
FROZEN = {"1": (True, False, True), "1.5": (True, False, False), "2": (False, False, False)}
CAPS = {"internvl2_5": (6, 8192), "internvl3": (12, 16384)}


def read_table(text: str) -> list[Row]:
    head, *lines = (line.split() for line in text.strip().splitlines())
    return [dict(zip(head, line, strict=True)) for line in lines]


def get_id(row: Row) -> str:
    return row.get("recipe") or f"{row['size']}-stage{row['stage']}"


def find_stage(recipe: Recipe, name: str) -> Stage:
    (stage,) = (stage for stage in recipe.stages if stage.name == name)
    return stage


def resolve(stage: Stage) -> dict[str, Any]:
    return resolve_stage(stage, has_parent=not stage.brings_own_weights)


def name_deepspeed(short: str) -> str:
    """Name what the table calls zero3_34b as the original's file is called; zero1 and zero3 have names of their own."""
    stage, _, size = short.partition("_")
    return f"zero_stage{stage[-1]}_config_{size}.json" if size else short


def compare(values: dict[str, Any], expected: dict[str, Any]) -> None:
    assert {name: values[name] for name in expected} == expected


def get_global_batch(stage: Stage, values: dict[str, Any]) -> int:
    batch = fingerprint_arguments(values, world_size=stage.launcher.world_size)["global_batch_size"]
    assert isinstance(batch, int)
    return batch


@pytest.mark.parametrize("row", read_table(PRETRAIN), ids=get_id)
def test_a_pretraining_stage_has_the_values_of_its_script(row: Row) -> None:
    stage = find_stage(load_recipe(f"internvl2_5-{row['size']}"), f"stage{row['stage']}")
    values = resolve(stage)
    llm, mlp, backbone = FROZEN[row["stage"]]
    assert stage.entry == "pretrain"
    assert (stage.launcher.nnodes, stage.launcher.nproc_per_node) == (64, 8)
    assert get_global_batch(stage, values) == int(row["batch"])
    compare(values, COMMON | PACKED)
    compare(
        values,
        {
            "freeze_llm": llm,
            "freeze_mlp": mlp,
            "freeze_backbone": backbone,
            "learning_rate": float(row["lr"]),
            "warmup_steps": float(row["warmup"]),
            "max_steps": int(row["max_steps"]),
            "gradient_accumulation_steps": int(row["GA"]),
            "drop_path_rate": float(row["drop"]),
            "weight_decay": float(row["wd"]),
            "deepspeed": name_deepspeed(row["deepspeed"]),
            "use_liger": row["liger"] == "yes",
        },
    )


@pytest.mark.parametrize("row", read_table(COMPONENTS), ids=lambda row: row["size"])
def test_a_pretraining_recipe_goes_from_its_components_through_its_stages(row: Row) -> None:
    recipe = load_recipe(f"internvl2_5-{row['size']}")
    first, *later = recipe.stages
    stages = ["stage1", "stage1.5", "stage2"] if row["size"] in ("8b", "26b") else ["stage1", "stage2"]
    assert recipe.flow == "pretrain"
    assert [stage.name for stage in recipe.stages] == stages
    assert (first.arguments["vision_path"], first.arguments["llm_path"]) == (row["vision"], row["llm"])
    assert [(stage.brings_own_weights, stage.start_from) for stage in later] == [(False, None)] * len(later)
    metas = [Path(stage.arguments["meta_path"]).relative_to(recipe.directory) for stage in recipe.stages]
    assert [str(path) for path in metas] == ["data/pretrain.json"] * (len(stages) - 1) + ["data/sft.json"]


@pytest.mark.parametrize("row", read_table(FINETUNE), ids=get_id)
def test_a_finetune_has_the_values_of_its_script(row: Row) -> None:
    recipe = load_recipe(f"finetune-{row['recipe']}")
    (stage,) = recipe.stages
    values = resolve(stage)
    family, size = row["recipe"].split("-")[1:3]
    tiles, length = CAPS[family]
    is_full = row["lora"] == "0"
    assert (recipe.flow, stage.entry) == ("finetune", "finetune")
    assert stage.launcher.world_size == int(row["GPUs"])
    assert get_global_batch(stage, values) == int(row["batch"])
    compare(values, COMMON | PADDED)
    compare(
        values,
        {
            "model_name_or_path": f"OpenGVLab/{family.replace('internvl', 'InternVL')}-{size.upper()}",
            "freeze_llm": not is_full,
            "freeze_mlp": not is_full,
            "use_llm_lora": int(row["lora"]),
            "drop_path_rate": 0.0,
            "max_dynamic_patch": tiles,
            "max_seq_length": length,
            "per_device_train_batch_size": int(row["per_device"]),
            "gradient_accumulation_steps": int(row["GA"]),
            "learning_rate": float(row["lr"]),
            "weight_decay": float(row["wd"]),
            "deepspeed": name_deepspeed(row["deepspeed"]),
        },
    )


@pytest.mark.parametrize("row", read_table(FINETUNE), ids=get_id)
def test_a_drop_path_rate_that_differs_from_the_script_says_so_at_its_line(row: Row) -> None:
    text = (SHIPPED / f"finetune-{row['recipe']}.yaml").read_text(encoding="utf-8")
    (line,) = re.findall(r"^ +drop_path_rate: 0\.0(.*)$", text, re.MULTILINE)
    rate = re.search(r"# the original: (\S+),", line)
    assert (rate.group(1) if rate else "0.0") == row["script_drop"]


def test_every_shipped_recipe_is_in_a_table() -> None:
    finetunes = [f"finetune-{row['recipe']}" for row in read_table(FINETUNE)]
    pretrains = [f"internvl2_5-{row['size']}" for row in read_table(COMPONENTS)]
    assert list_recipes() == sorted([*finetunes, *pretrains, "smoke", "smoke-nightly"])
    in_rows = {(row["size"], f"stage{row['stage']}") for row in read_table(PRETRAIN)}
    assert in_rows == {
        (name.removeprefix("internvl2_5-"), stage.name) for name in pretrains for stage in load_recipe(name).stages
    }


@pytest.mark.parametrize("name", list_recipes())
def test_a_shipped_recipe_passes_the_check_without_a_word_of_warning(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = load_recipe(name)
    check_stage_arguments(recipe.stages, starts_from_checkpoint=False)
    # smoke spells one argument as the original's scripts do, to show that it may.
    assert name == "smoke" or caplog.messages == []


def test_no_two_recipes_write_into_one_directory() -> None:
    workspaces = [load_recipe(name).workspace for name in list_recipes()]
    assert len(set(workspaces)) == len(workspaces)


# --- launchers: any shape can be checked, one machine can be started


def iter_recipes_of_several_machines() -> Iterator[str]:
    for name in list_recipes():
        if any(stage.launcher.nnodes > 1 for stage in load_recipe(name).stages):
            yield name


def refuse_launchers(recipe: Recipe) -> list[str]:
    with pytest.raises(ArgumentError) as caught:
        check_launchers(recipe.stages)
    return str(caught.value).splitlines()


def test_several_machines_are_refused_for_each_stage_with_the_way_to_one() -> None:
    assert refuse_launchers(load_recipe("internvl2_5-8b"))[1] == (
        "stages.stage1.5: launcher.nnodes is 64, but this version starts torchrun on one machine only. The same global "
        "batch on one: --set stages.stage1.5.launcher.nnodes=1 "
        "--set stages.stage1.5.arguments.gradient_accumulation_steps=128"
    )


def test_a_stage_of_one_machine_is_not_refused_beside_one_of_several() -> None:
    recipe = load_recipe("internvl2_5-8b", {"stages.stage1.launcher.nnodes": 1})
    assert [line.split(": ")[0] for line in refuse_launchers(recipe)] == ["stages.stage1.5", "stages.stage2"]


@pytest.mark.parametrize("name", list(iter_recipes_of_several_machines()))
def test_the_overrides_of_the_refusal_make_the_same_stages_on_one_machine(name: str) -> None:
    recipe = load_recipe(name)
    words = shlex.split(" ".join(refuse_launchers(recipe)))
    overrides = [words[position + 1] for position, word in enumerate(words) if word == "--set"]
    moved = load_recipe(name, parse_overrides(overrides))
    check_launchers(moved.stages)
    for stage, other in zip(recipe.stages, moved.stages, strict=True):
        assert other.launcher.nproc_per_node == stage.launcher.nproc_per_node
        kept, found = (fingerprint_arguments(resolve(it), world_size=it.launcher.world_size) for it in (stage, other))
        assert found == kept


def test_a_flow_refuses_several_machines_before_it_makes_anything(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"^stages\.stage1: launcher\.nnodes is 64, "):
        run_recipe("internvl2_5-1b", {"workspace": str(tmp_path / "runs")})
    assert not list(tmp_path.iterdir())


# --- the command


def run_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[int, list[str], list[str]]:
    monkeypatch.setattr(sys, "argv", ["internvl", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    captured = capsys.readouterr()
    assert caught.value.code is None or isinstance(caught.value.code, int)
    return caught.value.code or 0, captured.out.splitlines(), captured.err.splitlines()


def test_the_list_of_recipes_has_all_of_them_by_size_in_100_columns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, lines, _ = run_command(monkeypatch, capsys, "recipes")
    names = [line.split()[0] for line in lines if not line.startswith(" ")]
    assert code == 0
    assert sorted(names) == list_recipes()
    assert [name for name in names if name.startswith("internvl2_5-")] == [
        f"internvl2_5-{size}" for size in ("1b", "2b", "4b", "8b", "26b", "38b", "78b")
    ]
    assert max(map(len, lines)) <= 100


def test_the_list_of_recipes_keeps_every_word_of_a_description(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, lines, _ = run_command(monkeypatch, capsys, "recipes")
    expected = {word for name in list_recipes() for word in [name, *load_recipe(name).description.split()]}
    assert {word for line in lines for word in line.split()} == expected


def test_a_check_ends_with_the_stages_that_this_version_cannot_start(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, lines, _ = run_command(monkeypatch, capsys, "check", "internvl2_5-8b")
    assert code == 0
    assert lines[0] == "internvl2_5-8b: 3 stages, all arguments are right."
    assert lines[1].startswith("stage1, stage1.5, stage2: more machines than the one")
    _, lines, _ = run_command(monkeypatch, capsys, "check", "finetune-lora-internvl2_5-8b")
    assert lines == ["finetune-lora-internvl2_5-8b: 1 stage, all arguments are right."]


def test_a_run_on_several_machines_is_refused_before_prefect_is_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise AssertionError("the run went on")

    monkeypatch.setattr(cli, "leave_terminal", fail)
    code, output, errors = run_command(monkeypatch, capsys, "run", "finetune-full-internvl2_5-38b")
    assert (code, output) == (64, [])
    assert errors[0].startswith("ArgumentError: stages.finetune: launcher.nnodes is 2, ")
