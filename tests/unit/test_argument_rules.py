import json
import logging
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from internvl_core.argument_renames import RENAMED
from internvl_core.argument_rules import (
    PATHS,
    RESULT_NEUTRAL,
    check_arguments,
    fingerprint_arguments,
    load_properties,
    resolve_arguments,
)
from internvl_core.data.conversation import CONV_STYLES
from internvl_core.errors import ArgumentError
from internvl_core.not_built import NOT_BUILT

GOOD: dict[str, Any] = {"model_name_or_path": "m", "meta_path": "meta.json", "conv_style": "internvl2_5"}
FROZEN = {"freeze_llm": True, "freeze_backbone": True, "freeze_mlp": True}

# Every field of TrainingArguments in transformers 4.37.2, which the original runs on.
FIELDS_BEFORE = """
adafactor adam_beta1 adam_beta2 adam_epsilon auto_find_batch_size bf16 bf16_full_eval data_seed dataloader_drop_last
dataloader_num_workers dataloader_persistent_workers dataloader_pin_memory ddp_backend ddp_broadcast_buffers
ddp_bucket_cap_mb ddp_find_unused_parameters ddp_timeout debug deepspeed disable_tqdm dispatch_batches do_eval
do_predict do_train eval_accumulation_steps eval_delay eval_steps evaluation_strategy fp16 fp16_backend fp16_full_eval
fp16_opt_level fsdp fsdp_config fsdp_min_num_params fsdp_transformer_layer_cls_to_wrap full_determinism
gradient_accumulation_steps gradient_checkpointing gradient_checkpointing_kwargs greater_is_better group_by_length
half_precision_backend hub_always_push hub_model_id hub_private_repo hub_strategy hub_token ignore_data_skip
include_inputs_for_metrics include_num_input_tokens_seen include_tokens_per_second jit_mode_eval label_names
label_smoothing_factor learning_rate length_column_name load_best_model_at_end local_rank log_level log_level_replica
log_on_each_node logging_dir logging_first_step logging_nan_inf_filter logging_steps logging_strategy
lr_scheduler_kwargs lr_scheduler_type max_grad_norm max_steps metric_for_best_model mp_parameters neftune_noise_alpha
no_cuda num_train_epochs optim optim_args output_dir overwrite_output_dir past_index per_device_eval_batch_size
per_device_train_batch_size per_gpu_eval_batch_size per_gpu_train_batch_size prediction_loss_only push_to_hub
push_to_hub_model_id push_to_hub_organization push_to_hub_token ray_scope remove_unused_columns report_to
resume_from_checkpoint run_name save_on_each_node save_only_model save_safetensors save_steps save_strategy
save_total_limit seed skip_memory_metrics split_batches tf32 torch_compile torch_compile_backend torch_compile_mode
torchdynamo tpu_metrics_debug tpu_num_cores use_cpu use_ipex use_legacy_prediction_loop use_mps_device warmup_ratio
warmup_steps weight_decay
""".split()  # noqa: SIM905


def refuse(values: dict[str, Any], *, entry: str = "finetune") -> str:
    with pytest.raises(ArgumentError) as caught:
        check_arguments(resolve_arguments(values), entry=entry)
    return str(caught.value)


def refuse_to_resolve(values: dict[str, Any]) -> str:
    with pytest.raises(ArgumentError) as caught:
        resolve_arguments(values)
    return str(caught.value)


# resolving


def test_nothing_given_resolves_to_every_default() -> None:
    assert resolve_arguments({}) == {name: fragment["default"] for name, fragment in load_properties().items()}


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("learning_rate", "1e-3", 0.001),
        ("learning_rate", 1, 1.0),
        ("freeze_llm", "True", True),
        ("freeze_llm", "no", False),
        ("max_steps", "100", 100),
        ("max_steps", 100.0, 100),
        ("save_strategy", False, "no"),  # YAML 1.1: save_strategy: no
        ("report_to", "tensorboard", "tensorboard"),
        ("label_names", "labels", ["labels"]),
        ("label_names", '["labels"]', ["labels"]),
        ("lr_scheduler_kwargs", '{"num_cycles": 2}', {"num_cycles": 2}),
        ("tf32", "false", False),
        ("save_total_limit", None, None),
        ("include_num_input_tokens_seen", "true", True),
        ("run_name", "1e-3", "1e-3"),
        ("optim_target_modules", "[qk]_proj", "[qk]_proj"),
    ],
)
def test_values_are_read_as_the_fields_type(name: str, text: Any, value: Any) -> None:
    read = resolve_arguments({name: text})[name]
    assert (read, type(read)) == (value, type(value))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"learnin_rate": 1}, "learnin_rate: no such argument. Nearest: learning_rate."),
        ({7: 1}, "7: no such argument"),
        ({"freeze_llm": "maybe"}, "freeze_llm: 'maybe' should be True or False"),
        ({"freeze_llm": 1}, "freeze_llm: 1 should be True or False"),
        ({"max_steps": "many"}, "max_steps: 'many' should be a whole number"),
        ({"max_steps": 1.5}, "max_steps: 1.5 should be a whole number"),
        ({"max_steps": True}, "max_steps: True should be a whole number"),
        ({"max_steps": 0}, "max_steps: 0 is out of range; it should be anything but 0."),
        ({"max_steps": -5}, "max_steps: -5 is out of range; it should be at least -1."),
        ({"max_steps": None}, "max_steps: None should be a whole number"),
        ({"learning_rate": "nan"}, "learning_rate: 'nan' should be a finite number"),
        ({"learning_rate": float("inf")}, "learning_rate: inf should be a finite number"),
        ({"learning_rate": 10**400}, "should be a finite number"),
        ({"learning_rate": "-1e-5"}, "learning_rate: -1e-05 is out of range; it should be more than 0."),
        ({"weight_decay": 2}, "weight_decay: 2.0 is out of range; it should be at most 1."),
        ({"use_llm_lora": -1}, "use_llm_lora: -1 is out of range; it should be at least 0."),
        ({"drop_path_rate": 1}, "drop_path_rate: 1.0 is out of range; it should be less than 1."),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size: 0 is out of range"),
        ({"ps_version": "v3"}, "ps_version: 'v3' is not one of v1, v2."),
        ({"lr_scheduler_type": "cosinus"}, "lr_scheduler_type: 'cosinus' is not one of linear, cosine"),
        ({"output_dir": 5}, "output_dir: 5 should be text"),
        ({"output_dir": ["a"]}, "output_dir: ['a'] should be text"),
        ({"liger_kernel_config": "{"}, "liger_kernel_config: '{' is not JSON"),
    ],
)
def test_a_wrong_value_is_refused_with_what_it_is_and_what_it_should_be(given: dict[Any, Any], said: str) -> None:
    assert said in refuse_to_resolve(given)


def test_all_problems_are_in_one_message_a_line_each() -> None:
    message = refuse_to_resolve({"lerning_rate": 1, "max_steps": "x", "ps_version": "v9", "fp16_opt_level": "O2"})
    names = [line.split(":")[0] for line in message.splitlines()]
    assert names == ["fp16_opt_level", "lerning_rate", "max_steps", "ps_version"]


@given(st.dictionaries(st.sampled_from(sorted(load_properties())), st.one_of(st.text(), st.integers(), st.floats())))
def test_resolving_gives_all_values_or_an_argument_error_and_is_idempotent(given: dict[str, Any]) -> None:
    try:
        values = resolve_arguments(given)
    except ArgumentError:
        return
    assert resolve_arguments(values) == values
    assert json.loads(json.dumps(values)) == values


def test_an_attempt_has_its_output_beside_its_files() -> None:
    assert resolve_arguments({"attempt_dir": "a"})["output_dir"] == str(Path("a") / "output")
    assert resolve_arguments({"attempt_dir": "a", "output_dir": "b"})["output_dir"] == "b"


# old spellings


def test_every_argument_that_left_transformers_has_a_row() -> None:
    assert set(FIELDS_BEFORE) <= RENAMED.keys() | load_properties().keys()
    assert not RENAMED.keys() & load_properties().keys()


@pytest.mark.parametrize(
    ("old", "value", "new", "current"),
    [
        ("evaluation_strategy", "no", "eval_strategy", "no"),
        ("evaluation_strategy", False, "eval_strategy", "no"),
        ("evaluation_strategy", "epoch", "eval_strategy", "epoch"),
        ("group_by_length", "True", "train_sampling_strategy", "group_by_length"),
        ("group_by_length", False, "train_sampling_strategy", "random"),
        ("warmup_ratio", "0.03", "warmup_steps", 0.03),
        ("no_cuda", "True", "use_cpu", True),
        ("adafactor", True, "optim", "adafactor"),
        ("per_gpu_train_batch_size", "4", "per_device_train_batch_size", 4),
        ("gradient_checkpointing", "True", "activation_checkpointing", True),
    ],
)
def test_an_old_spelling_is_mapped_and_said_once(
    old: str, value: Any, new: str, current: Any, caplog: pytest.LogCaptureFixture
) -> None:
    assert resolve_arguments({old: value})[new] == current
    assert [record.levelno for record in caplog.records if old in record.getMessage()] == [logging.WARNING]


@pytest.mark.parametrize(
    ("old", "value"),
    [
        ("logging_dir", "runs"),
        ("save_safetensors", True),
        ("fp16_opt_level", "O1"),
        ("half_precision_backend", "cuda_amp"),
        ("adafactor", False),
        ("use_ipex", "False"),
    ],
)
def test_an_old_spelling_that_loses_nothing_is_dropped_and_said(
    old: str, value: Any, caplog: pytest.LogCaptureFixture
) -> None:
    assert resolve_arguments({old: value}) == resolve_arguments({})
    assert len([record for record in caplog.records if record.getMessage().startswith(f"{old}: ")]) == 1


@pytest.mark.parametrize(
    ("old", "value"),
    [
        ("save_safetensors", False),
        ("fp16_opt_level", "O2"),
        ("fp16_backend", "apex"),
        ("use_ipex", True),
        ("past_index", 2),
        ("split_batches", True),
        ("warmup_ratio", 1.0),
        ("warmup_ratio", -0.1),
        ("group_by_length", "often"),
        ("fsdp_min_num_params", 1000),
        ("tpu_num_cores", 8),
    ],
)
def test_an_old_spelling_that_would_change_the_result_is_refused(old: str, value: Any) -> None:
    message = refuse_to_resolve({old: value})
    assert message.startswith(f"{old}: ")
    assert len(message.splitlines()) == 1


def test_two_spellings_may_agree_but_not_contradict() -> None:
    assert resolve_arguments({"use_cpu": "True", "no_cuda": True})["use_cpu"] is True
    assert resolve_arguments({"warmup_ratio": 0.03, "warmup_steps": 0})["warmup_steps"] == 0.03
    assert resolve_arguments({"warmup_ratio": 0.0, "warmup_steps": 100})["warmup_steps"] == 100
    assert "Keep warmup_steps only" in refuse_to_resolve({"warmup_ratio": 0.03, "warmup_steps": 100})


def test_a_token_is_never_shown(caplog: pytest.LogCaptureFixture) -> None:
    message = refuse({**GOOD, "push_to_hub_token": "hf_secret"})
    assert "hub_token: (hidden): " in message
    assert "hf_secret" not in message + caplog.text


# checking


def test_a_good_stage_passes_in_both_entries() -> None:
    for entry in ("pretrain", "finetune"):
        check_arguments(resolve_arguments(GOOD), entry=entry)


@pytest.mark.parametrize(
    "changes",
    [
        {"model_name_or_path": None, "vision_path": "v", "llm_path": "l"},
        {**FROZEN, "use_llm_lora": 16},
        {**FROZEN, "unfreeze_vit_layers": -4},
        {**FROZEN, "unfreeze_lm_head": True},
        {"freeze_backbone": True, "use_fast_tokenizer": True, "group_by_length": True},
        {"report_to": "tensorboard"},
        {"report_to": ["tensorboard"]},
        {"report_to": "none"},
        {"deepspeed": "zero1", "bf16": True},
        {"deepspeed": "zero1", "optim": "sgd", "decay_all": False},
        {"deepspeed": "zero1", "optim": "sgd", "vision_lr": 1e-5},
        {"vision_lr": 1e-5, "mlp_lr": 1e-4, "deepspeed": "zero3"},
        {"drop_path_rate": 0.1},
        {**FROZEN, "drop_path_rate": 0.1, "use_backbone_lora": 4, "vision_lr": 1e-5},
        {**FROZEN, "drop_path_rate": 0.1, "unfreeze_vit_layers": -1},
        {**FROZEN, "use_llm_lora": 8, "freeze_mlp": False, "mlp_lr": 1e-5},
        {"ps_version": "v1", "mlp_path": "mlp.pt", "use_liger": True},
        {"eval_meta_path": "held_out.json", "eval_max_new_tokens": 8},
        # The parent checkpoint stands in stage.json.
        {"model_name_or_path": None, "attempt_dir": "attempt"},
    ],
)
def test_what_is_built_passes(changes: dict[str, Any]) -> None:
    check_arguments(resolve_arguments({**GOOD, **changes}), entry="finetune")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"vision_path": "v"}, "model_name_or_path: given together with vision_path. The original takes"),
        ({"model_name_or_path": None}, "model_name_or_path: missing"),
        ({"model_name_or_path": None, "vision_path": "v"}, "llm_path: missing beside vision_path"),
        ({"model_name_or_path": None, "llm_path": "l"}, "vision_path: missing beside llm_path"),
        (FROZEN, "nothing would learn"),
        (
            {"drop_path_rate": 0.1, "freeze_backbone": True},
            "drop_path_rate: 0.1, but the vision tower is frozen (freeze_backbone)",
        ),
        ({"vision_lr": 1e-5, "freeze_backbone": True}, "vision_lr: 1e-05, but nothing of the vision tower learns"),
        ({"mlp_lr": 1e-5, "freeze_mlp": True}, "mlp_lr: 1e-05, but the projector does not learn"),
        ({"mlp_lr": 0}, "mlp_lr: 0.0 is out of range"),
        ({"vision_lr": 1e-5, "optim": "adafactor"}, "optim: adafactor takes no vision_lr. Use adamw_torch"),
        ({"vision_lr": 1e-5, "deepspeed": "zero3_offload"}, "vision_lr: the deepspeed configuration offloads"),
        ({"meta_path": None}, "meta_path: missing"),
        ({"min_dynamic_patch": 7, "max_dynamic_patch": 6}, "min_dynamic_patch: 7 is more than max_dynamic_patch, 6"),
        ({"down_sample_ratio": 0.3}, "down_sample_ratio: 0.3 is not 1/n"),
        ({"force_image_size": 447}, "force_image_size: 447 px cannot be divided by 2"),
        ({"report_to": "wandb"}, "report_to: wandb: Weights & Biases is not supported"),
        ({"report_to": ["tensorboard", "mlflow"]}, "report_to: mlflow: the pipeline records every run"),
        ({"report_to": "all"}, "report_to: all: name the one you mean"),
        ({"report_to": "comet_ml"}, "report_to: comet_ml: it is not supported"),
        ({"bf16": True, "fp16": True}, "bf16, fp16: both True"),
        ({"dataloader_prefetch_factor": 2}, "dataloader_prefetch_factor: 2, but dataloader_num_workers is 0"),
        ({"dataloader_persistent_workers": True}, "dataloader_persistent_workers: True, but"),
        ({"save_steps": 2.5}, "save_steps: 2.5 is no number of steps"),
        ({"min_num_frame": 9, "max_num_frame": 8}, "min_num_frame: 9 is more than max_num_frame, 8"),
        ({"video_sampling": "fps"}, "video_sampling: 'fps' is none of uniform, middle, fpsX"),
        ({"video_sampling": "fps0.0"}, "video_sampling: 'fps0.0' is none of uniform, middle, fpsX"),
        ({"deepspeed": "zero7"}, "deepspeed: 'zero7' is neither a built-in name nor a readable file"),
        ({"deepspeed": "zero1", "optim": "sgd"}, "optim: sgd, but the deepspeed configuration brings its own AdamW"),
    ],
)
def test_a_wrong_combination_is_refused_in_one_line(changes: dict[str, Any], said: str) -> None:
    message = refuse({**GOOD, **changes})
    assert said in message
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("use_liger_kernel", True),
        ("allow_overflow", True),
        ("accelerator_config", {"even_batches": False}),
        ("dataloader_in_order", False),
        ("average_tokens_across_devices", False),
        ("load_best_model_at_end", True),
        ("push_to_hub", True),
        ("auto_find_batch_size", True),
        ("torch_compile", True),
        ("fsdp", "full_shard"),
        ("eval_strategy", "steps"),
        ("save_strategy", "best"),
        ("save_only_model", True),
        ("enable_jit_checkpoint", True),
        ("label_smoothing_factor", 0.1),
        ("train_sampling_strategy", "sequential"),
        ("lr_scheduler_type", "reduce_lr_on_plateau"),
        ("parallelism_config", {}),
    ],
)
def test_what_is_not_built_is_refused_in_one_line_that_says_what_to_do(name: str, value: Any) -> None:
    message = refuse({**GOOD, name: value})
    assert message.startswith(f"{name}: {value!r}: ")
    assert len(message.splitlines()) == 1


def test_every_chat_format_there_is_a_template_for_may_be_asked_for() -> None:
    assert load_properties()["conv_style"]["enum"] == sorted(CONV_STYLES)


def test_the_table_of_what_is_not_built_names_each_argument_once_and_allows_the_defaults() -> None:
    names = [name for row in NOT_BUILT for name in row.names]
    assert len(names) == len(set(names))
    assert set(names) <= load_properties().keys()
    check_arguments(resolve_arguments(GOOD), entry="finetune")


@pytest.mark.parametrize(
    ("entry", "said"), [("mpo", "entry: mpo is not built yet"), ("train", "'train' is not one of")]
)
def test_an_entry_that_does_not_exist_yet_is_refused(entry: str, said: str) -> None:
    assert said in refuse(GOOD, entry=entry)


def test_a_check_reports_everything_at_once() -> None:
    message = refuse({"allow_overflow": True, "max_buffer_size": 7, "report_to": "wandb"}, entry="mpo")
    assert {line.split(":")[0] for line in message.splitlines()} == {
        *("entry", "model_name_or_path", "meta_path", "report_to", "allow_overflow", "max_buffer_size")
    }


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"use_llm_lora": 8}, ["use_llm_lora: 8 beside freeze_llm False"]),
        ({"use_llm_lora": 8, "use_backbone_lora": 4, "freeze_llm": True}, ["use_backbone_lora: 4 beside freeze_backb"]),
        (
            {**FROZEN, "use_backbone_lora": 4, "unfreeze_vit_layers": -1},
            ["use_backbone_lora: 4 beside unfreeze_vit_layers -1"],
        ),
        ({**FROZEN, "use_llm_lora": 8, "unfreeze_lm_head": True, "freeze_mlp": False}, []),
    ],
)
def test_a_part_that_learns_in_full_and_by_adapters_is_said(
    changes: dict[str, Any], said: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    check_arguments(resolve_arguments({**GOOD, **changes}), entry="finetune")
    assert len(caplog.records) == len(said)
    assert all(line in caplog.text for line in said)


def test_an_optimizer_of_the_users_own_has_one_rate(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"optimizer": {"type": "AdamW"}}))
    message = refuse({**GOOD, "deepspeed": str(path), "vision_lr": 1e-5, "mlp_lr": 1e-5})
    assert message.startswith("vision_lr, mlp_lr: the deepspeed configuration brings its own optimizer")
    assert len(message.splitlines()) == 1
    path.write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    check_arguments(resolve_arguments({**GOOD, "deepspeed": str(path), "vision_lr": 1e-5}), entry="finetune")


# fingerprints


def fingerprint(changes: dict[str, Any], *, world_size: int = 1) -> dict[str, Any]:
    return fingerprint_arguments(resolve_arguments({**GOOD, **changes}), world_size=world_size)


def test_the_fingerprint_counts_the_global_batch_and_not_who_shares_it() -> None:
    alone = fingerprint({"per_device_train_batch_size": 8, "gradient_accumulation_steps": 4}, world_size=1)
    shared = fingerprint({"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}, world_size=8)
    assert alone == shared
    assert alone["global_batch_size"] == 32
    assert fingerprint({"per_device_train_batch_size": 8}, world_size=2) != fingerprint({}, world_size=1)


@pytest.mark.parametrize("name", sorted(RESULT_NEUTRAL | PATHS))
def test_neutral_arguments_and_paths_are_left_out(name: str) -> None:
    assert name in load_properties()
    assert name not in fingerprint({})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("learning_rate", 1e-3), ("seed", 1), ("max_steps", 7), ("weight_decay", 0.1), ("bf16", True)),
        *(("vision_lr", 1e-5), ("mlp_lr", 1e-5), ("unfreeze_lm_head", True), ("unfreeze_vit_layers", -1)),
        *(("freeze_llm", True), ("use_llm_lora", 4), ("max_dynamic_patch", 6), ("max_seq_length", 4096)),
        *(("train_sampling_strategy", "group_by_length"), ("decay_all", False), ("eval_max_new_tokens", 8)),
        *(("drop_path_rate", 0.1), ("lr_scheduler_type", "cosine"), ("warmup_steps", 5), ("optim", "sgd")),
        *(("use_packed_ds", True), ("num_images_expected", 48), ("max_packed_tokens", 4096), ("packer", "legacy")),
        *(("strict_mode", False), ("replacement", True), ("loss_reduction", "square")),
    ],
)
def test_what_changes_the_result_changes_the_fingerprint(name: str, value: Any) -> None:
    assert fingerprint({name: value}) != fingerprint({})


def test_the_fingerprint_is_the_same_for_every_way_to_write_a_value() -> None:
    written = fingerprint({"warmup_steps": 100, "learning_rate": "1e-3"})
    assert json.dumps(written) == json.dumps(fingerprint({"warmup_steps": "100.0", "learning_rate": 0.001}))
    assert json.dumps(fingerprint({"warmup_steps": 0})) == json.dumps(fingerprint({}))


def test_of_deepspeed_only_being_on_counts_unless_the_configuration_is_the_users_own(tmp_path: Path) -> None:
    assert fingerprint({"deepspeed": "zero1"}) == fingerprint({"deepspeed": "configs/zero_stage3_config_70b.json"})
    assert fingerprint({"deepspeed": "zero1"}) != fingerprint({})
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    first.write_text(json.dumps({"optimizer": {"type": "AdamW"}}))
    second.write_text(json.dumps({"optimizer": {"type": "Lamb"}}))
    assert fingerprint({"deepspeed": str(first)}) != fingerprint({"deepspeed": str(second)})
    second.write_text(first.read_text())
    assert fingerprint({"deepspeed": str(first)}) == fingerprint({"deepspeed": str(second)})


@pytest.mark.parametrize(
    ("given", "value"),
    [
        (True, "latest"),
        ("True", "latest"),
        ("latest", "latest"),
        (False, None),
        ("False", None),
        (None, None),
        ("s3://runs/stage-ab/data/1", "s3://runs/stage-ab/data/1"),
    ],
)
def test_resuming_from_the_newest_is_said_as_the_original_says_it(given: Any, value: str | None) -> None:
    assert resolve_arguments({**GOOD, "resume_from_checkpoint": given})["resume_from_checkpoint"] == value
