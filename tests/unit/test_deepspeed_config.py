import json
import re
from pathlib import Path
from typing import Any

import pytest

from internvl_core.deepspeed_config import BUILT_IN, resolve_deepspeed
from internvl_core.errors import ArgumentError

# The original's files (reference 5.4): stage, bucket, persistence threshold, max live and reuse, overlap, offload.
ORIGINAL = [
    ("zero_stage1_config.json", 1, 1e9, None, None, True, False),
    ("zero_stage2_config.json", 2, 1e8, None, None, True, False),
    ("zero_stage3_config.json", 3, 1e9, 1e7, 1e9, True, False),
    ("zero_stage3_config_34b.json", 3, 1e9, 1e5, 1e9, True, False),
    ("zero_stage3_config_70b.json", 3, 1e9, 1e5, 1e9, True, False),
    ("zero_stage3_config_100b.json", 3, 1e9, 1e4, 1e9, True, False),
    ("zero_stage3_config_100b_1e8.json", 3, 1e8, 1e4, 1e9, True, False),
    ("zero_stage3_config_100b_1e7_offload.json", 3, 1e7, 1e4, 1e8, False, True),
]


@pytest.mark.parametrize(("name", "stage", "bucket", "threshold", "live", "overlap", "offload"), ORIGINAL)
def test_the_originals_files_are_built_in_with_their_numbers(
    name: str,
    stage: int,
    bucket: float,
    threshold: float | None,
    live: float | None,
    overlap: bool,
    offload: bool,
) -> None:
    zero = resolve_deepspeed(name)["zero_optimization"]
    assert (zero["stage"], zero["overlap_comm"], zero["contiguous_gradients"]) == (stage, overlap, True)
    assert zero["reduce_bucket_size"] == bucket
    assert zero.get("stage3_param_persistence_threshold") == threshold
    assert zero.get("stage3_max_live_parameters") == zero.get("stage3_max_reuse_distance") == live
    assert ("offload_optimizer" in zero, "offload_param" in zero) == (offload, offload)
    if stage == 3:
        assert zero["sub_group_size"] == zero["stage3_prefetch_bucket_size"] == bucket
        assert zero["stage3_gather_16bit_weights_on_model_save"] is True
    else:
        assert zero["allgather_bucket_size"] == bucket
        assert zero["allgather_partitions"] is zero["reduce_scatter"] is True


def test_every_name_of_the_original_is_known() -> None:
    assert {row[0] for row in ORIGINAL} | {"zero1", "zero2", "zero3", "zero3_offload"} == set(BUILT_IN)


@pytest.mark.parametrize(
    ("short", "file"),
    [
        ("zero1", "zero_stage1_config.json"),
        ("zero2", "zero_stage2_config.json"),
        ("zero3", "zero_stage3_config.json"),
        ("zero3_offload", "zero_stage3_config_100b_1e7_offload.json"),
    ],
)
def test_short_names_mean_the_originals_files(short: str, file: str) -> None:
    assert resolve_deepspeed(short) == resolve_deepspeed(file) == resolve_deepspeed(f"shell/configs/{file}")


@pytest.mark.parametrize("name", BUILT_IN)
def test_what_the_trainer_knows_is_left_to_it_and_no_timers_are_on(name: str) -> None:
    config = resolve_deepspeed(name)
    assert "wall_clock_breakdown" not in config
    for key in (
        "gradient_accumulation_steps",
        "gradient_clipping",
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
    ):
        assert config[key] == "auto"
    assert config["bf16"]["enabled"] == config["fp16"]["enabled"] == "auto"


def test_the_config_brings_its_own_adamw_only_when_everything_is_decayed() -> None:
    optimizer: dict[str, Any] = resolve_deepspeed("zero1", decay_all=True)["optimizer"]
    assert optimizer["type"] == "AdamW"
    assert {optimizer["params"][key] for key in ("lr", "betas", "eps", "weight_decay")} == {"auto"}
    assert "optimizer" not in resolve_deepspeed("zero1", decay_all=False)


def test_only_offloading_uses_an_optimizer_that_has_to_be_compiled() -> None:
    needs_compiler = {
        name for name in BUILT_IN if not resolve_deepspeed(name)["optimizer"]["params"].get("torch_adam", False)
    }
    assert needs_compiler == {"zero3_offload", "zero_stage3_config_100b_1e7_offload.json"}


def test_two_configs_share_nothing_that_can_be_changed() -> None:
    resolve_deepspeed("zero1")["zero_optimization"]["stage"] = 9
    assert resolve_deepspeed("zero1")["zero_optimization"]["stage"] == 1


def test_a_file_that_exists_wins_over_its_built_in_namesake(tmp_path: Path) -> None:
    path = tmp_path / "zero_stage1_config.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    assert resolve_deepspeed(str(path)) == {"zero_optimization": {"stage": 2}}


def test_a_configuration_itself_is_taken_as_it_is() -> None:
    assert resolve_deepspeed({"zero_optimization": {"stage": 2}}) == {"zero_optimization": {"stage": 2}}


@pytest.mark.parametrize("name", ["zero4", "zero_stage9_config.json", "", "a" * 5000])
def test_an_unknown_name_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(ArgumentError, match=re.escape(", ".join(BUILT_IN))):
        resolve_deepspeed(name)


@pytest.mark.parametrize(("content", "said"), [("{", "is not JSON"), ("[]", "holds a list")])
def test_a_file_that_is_no_configuration_is_refused(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "mine.json"
    path.write_text(content)
    with pytest.raises(ArgumentError, match=said):
        resolve_deepspeed(str(path))


def test_a_file_with_an_optimizer_cannot_spare_biases_from_decay(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"optimizer": {"type": "AdamW"}}))
    assert resolve_deepspeed(str(path), decay_all=True)["optimizer"] == {"type": "AdamW"}
    with pytest.raises(ArgumentError, match="decay_all"):
        resolve_deepspeed(str(path), decay_all=False)
