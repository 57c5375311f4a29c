"""What arguments may say, over plain values: resolve them, check them together, fingerprint them.

The trainer and the control plane share these rules, so nothing here may import torch or
transformers. The fields come from arguments.schema.json, which `python -m internvl_core.arguments`
generates from the dataclasses.
"""

import difflib
import json
import logging
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from internvl_core.argument_renames import RENAMED, rename_arguments
from internvl_core.argument_values import UnreadableValueError, read_resume, read_value
from internvl_core.deepspeed_config import find_built_in, resolve_deepspeed
from internvl_core.errors import ArgumentError
from internvl_core.not_built import NOT_BUILT
from internvl_core.packing_rules import iter_packing_problems, iter_without_effect
from internvl_core.trainable_rules import iter_doubly_trained, iter_trainable_problems, list_own_rates

logger = logging.getLogger(__name__)

SCHEMA_PATH = Path(__file__).with_name("arguments.schema.json")

PATHS = frozenset(
    {
        "meta_path",
        "eval_meta_path",
        "model_name_or_path",
        "vision_path",
        "llm_path",
        "mlp_path",
        "resume_from_checkpoint",
    }
)
"""Left out of the fingerprint: what lies there counts, and the caller adds its digests."""

RESULT_NEUTRAL = frozenset(
    {
        # where things go and what is told
        *("output_dir", "overwrite_output_dir", "attempt_dir", "cache_dir", "run_name", "report_to", "project"),
        *("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
        *("push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push"),
        "hub_revision",
        *("logging_strategy", "logging_steps", "logging_first_step", "logging_nan_inf_filter", "log_on_each_node"),
        *("log_level", "log_level_replica", "disable_tqdm", "include_num_input_tokens_seen"),
        *("skip_memory_metrics", "debug", "do_train", "log_freq"),
        # when it is saved
        *("save_strategy", "save_steps", "save_total_limit", "save_on_each_node", "save_only_model"),
        "enable_jit_checkpoint",
        # on what machine it runs, and how fast
        *("use_cpu", "local_rank", "ddp_backend", "ddp_timeout", "ddp_bucket_cap_mb", "ddp_find_unused_parameters"),
        *("ddp_static_graph", "torch_empty_cache_steps", "auto_find_batch_size"),
        *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers"),
        *("dataloader_prefetch_factor", "dataloader_multiprocessing_context"),
        *("grad_checkpoint", "activation_checkpointing", "activation_checkpointing_kwargs", "packed_attention"),
        # The batch of the greedy answers; the training batch is in global_batch_size.
        "per_device_eval_batch_size",
        # Which samples are bad does not depend on how many are borne.
        "max_bad_fraction",
        # Nor do these: what is trained is the same, or it is not trained to its end.
        *("max_unsent_checkpoints", "store_patience_s", "max_non_finite_steps", "setup_limit_s", "stall_limit_s"),
        # The loss is the mean over all ranks, whatever this says.
        "loss_reduction_all_gather",
        # Columns are ours: the trainer keeps what the model needs, whatever this says.
        "remove_unused_columns",
        # transformers 5 has one kind of tokenizer.
        "use_fast_tokenizer",
    }
)
"""Arguments that cannot change the result."""

_VIDEO_SAMPLING = re.compile(r"uniform|middle|fps(?!0+(\.0*)?$)\d+(\.\d+)?")

_TRACKERS = {
    "mlflow": "the pipeline records every run in MLflow by itself",
    "wandb": "Weights & Biases is not supported; the pipeline records every run in MLflow",
    "all": "name the one you mean",
}


@cache
def load_properties() -> Mapping[str, Mapping[str, Any]]:
    """Load every argument's schema fragment (type, default, choices, bounds, `x-group`), by name."""
    properties: Mapping[str, Mapping[str, Any]] = json.loads(SCHEMA_PATH.read_text(encoding="utf-8"))["properties"]
    return properties


def resolve_arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """Resolve what was given to a value for every argument: old spellings, texts and defaults.

    Raises:
        ArgumentError: every problem, a line each.
    """
    values, problems = read_arguments(given)
    _raise_all(problems)
    return values


def read_arguments(given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Resolve as `resolve_arguments` does, but return the problems instead of raising them."""
    properties = load_properties()
    current, problems = rename_arguments(given, properties)
    if "resume_from_checkpoint" in current:
        current["resume_from_checkpoint"] = read_resume(current["resume_from_checkpoint"])
    values: dict[str, Any] = {}
    for name in current.keys() - properties.keys():
        problems.append(_describe_unknown(name))
    for name, fragment in properties.items():
        value = current.get(name, fragment["default"])
        if name not in current and value is None:
            values[name] = None
            continue
        try:
            values[name] = read_value(value, fragment)
        except UnreadableValueError as error:
            problems.append(f"{name}: {error}")
    if values.get("output_dir") is None and values.get("attempt_dir") is not None:
        values["output_dir"] = str(Path(values["attempt_dir"]) / "output")
    return values, sorted(problems)


def check_arguments(values: Mapping[str, Any], *, entry: str) -> None:
    """Check arguments together, and refuse what this version would have to ignore.

    Args:
        values: resolved arguments; what is missing counts as its default.
        entry: the script that will read them, `pretrain`, `finetune` or `mpo`.

    Raises:
        ArgumentError: every problem, a line each.
    """
    resolved = resolve_arguments(values)
    problems = [
        *_iter_entry_problems(entry),
        *_iter_start_problems(resolved),
        *iter_trainable_problems(resolved),
        *_iter_data_problems(resolved),
        *iter_packing_problems(resolved, load_properties(), entry=entry),
        *_iter_training_problems(resolved),
        *_iter_deepspeed_problems(resolved),
        *_iter_not_built_problems(resolved),
    ]
    _raise_all(problems)
    ignored = list(iter_without_effect(resolved, load_properties(), entry=entry))
    if ignored:
        logger.warning(
            "%s: no effect on a stage that pads its batches. Set use_packed_ds if it should pack.", ", ".join(ignored)
        )
    if resolved["pad2square"] and resolved["dynamic_image_size"]:
        logger.warning(
            "pad2square: pads the frames of videos only: with dynamic_image_size images are cut into square tiles."
        )
    for line in iter_doubly_trained(resolved):
        logger.warning("%s", line)


def fingerprint_arguments(values: Mapping[str, Any], *, world_size: int) -> dict[str, Any]:
    """Reduce resolved arguments to those that the result depends on.

    Which ranks share the global batch is no part of it, nor is any path: the caller adds digests of
    what lies there. Of DeepSpeed's built-in configurations only whether there is one counts: the
    stage says where tensors live, but under DeepSpeed bf16 weights have fp32 masters and without
    it Trainer autocasts. A configuration of the user's own counts by its content, since it may carry
    an optimizer or a schedule.
    """
    batch = values["per_device_train_batch_size"] * values["gradient_accumulation_steps"] * world_size
    left_out = RESULT_NEUTRAL | PATHS | {"per_device_train_batch_size", "gradient_accumulation_steps", "deepspeed"}
    return {
        **{name: value for name, value in values.items() if name not in left_out},
        "global_batch_size": batch,
        "deepspeed": _fingerprint_deepspeed(values["deepspeed"]),
    }


def _fingerprint_deepspeed(value: str | dict[str, Any] | None) -> Any:
    if value is None:
        return None
    return "zero" if find_built_in(value) is not None else resolve_deepspeed(value)


def _raise_all(problems: list[str]) -> None:
    if problems:
        raise ArgumentError("\n".join(problems))


def _describe_unknown(name: object) -> str:
    nearest = difflib.get_close_matches(str(name), [*load_properties(), *RENAMED], n=1, cutoff=0)
    return f"{name}: no such argument. Nearest: {nearest[0]}."


def _iter_entry_problems(entry: str) -> Iterator[str]:
    if entry == "mpo":
        yield "entry: mpo is not built yet. Use pretrain or finetune."
    elif entry not in ("pretrain", "finetune"):
        yield f"entry: {entry!r} is not one of pretrain, finetune, mpo."


def _iter_start_problems(values: Mapping[str, Any]) -> Iterator[str]:
    parts = [name for name in ("vision_path", "llm_path") if values[name] is not None]
    if values["model_name_or_path"] is not None and parts:
        yield (
            f"model_name_or_path: given together with {' and '.join(parts)}. The original takes model_name_or_path and "
            "ignores the rest without a word. Give either model_name_or_path, or vision_path and llm_path."
        )
    elif len(parts) == 1:
        missing = "llm_path" if parts == ["vision_path"] else "vision_path"
        yield f"{missing}: missing beside {parts[0]}; a model is built from both. Give {missing}."
    elif values["model_name_or_path"] is None and not parts and values["attempt_dir"] is None:
        # Within an attempt the parent checkpoint may stand in stage.json instead.
        yield "model_name_or_path: missing. Give it, or vision_path and llm_path."


def _iter_data_problems(values: Mapping[str, Any]) -> Iterator[str]:
    if values["meta_path"] is None:
        yield "meta_path: missing. Give the JSON file that lists the data sets."
    if values["min_dynamic_patch"] > values["max_dynamic_patch"]:
        yield (
            f"min_dynamic_patch: {values['min_dynamic_patch']} is more than max_dynamic_patch, "
            f"{values['max_dynamic_patch']}. Lower it."
        )
    if values["min_num_frame"] > values["max_num_frame"]:
        yield (
            f"min_num_frame: {values['min_num_frame']} is more than max_num_frame, {values['max_num_frame']}. Lower it."
        )
    if not _VIDEO_SAMPLING.fullmatch(values["video_sampling"]):
        yield (
            f"video_sampling: {values['video_sampling']!r} is none of uniform, middle, fpsX (frames a second, as in "
            "fps1 or fps0.5). Use uniform."
        )
    side = 1 / values["down_sample_ratio"]
    if abs(side - round(side)) > 1e-6:
        yield (
            f"down_sample_ratio: {values['down_sample_ratio']} is not 1/n for a whole n, so patches do not fold into "
            "tokens. Use the model's own, 0.5 for every InternVL."
        )
    elif values["force_image_size"] % round(side):
        yield (
            f"force_image_size: {values['force_image_size']} px cannot be divided by {round(side)} (down_sample_ratio "
            f"{values['down_sample_ratio']}). Use a multiple of the patch size times {round(side)}, such as 448."
        )


def _iter_training_problems(values: Mapping[str, Any]) -> Iterator[str]:
    trackers = values["report_to"] if isinstance(values["report_to"], list) else [values["report_to"] or "none"]
    for tracker in trackers:
        if tracker not in ("none", "tensorboard"):
            reason = _TRACKERS.get(tracker, "it is not supported; the pipeline records every run in MLflow")
            yield f"report_to: {tracker}: {reason}. Use none, or tensorboard (pip install tensorboard)."
    if values["bf16"] and values["fp16"]:
        yield "bf16, fp16: both True. Keep bf16."
    if not values["dataloader_num_workers"]:
        for name in ("dataloader_prefetch_factor", "dataloader_persistent_workers"):
            if values[name]:
                yield f"{name}: {values[name]}, but dataloader_num_workers is 0. Give workers, or leave {name} out."
    for name in ("logging_steps", "save_steps"):
        if values[name] > 1 and values[name] % 1:
            yield f"{name}: {values[name]} is no number of steps. Give a whole number, or a share of all steps below 1."


def _iter_deepspeed_problems(values: Mapping[str, Any]) -> Iterator[str]:
    if values["deepspeed"] is None:
        return
    try:
        config = resolve_deepspeed(values["deepspeed"], decay_all=values["decay_all"])
    except ArgumentError as error:
        yield str(error)
        return
    own_rates = list_own_rates(values)
    settings = find_built_in(values["deepspeed"])
    # The built-in configurations leave the optimizer to the trainer where parts have rates of their own.
    brings_optimizer = "optimizer" in config and not (own_rates and settings is not None)
    if brings_optimizer and values["optim"] not in ("adamw_torch", "adamw_torch_fused"):
        yield (
            f"optim: {values['optim']}, but the deepspeed configuration brings its own "
            f"{config['optimizer'].get('type')} and would win. Leave optim out, or set decay_all to False."
        )
    if own_rates and (brings_optimizer or (settings is not None and settings.is_offloaded)):
        reason = "brings its own optimizer, which has one rate" if brings_optimizer else "offloads its optimizer"
        yield (
            f"{', '.join(own_rates)}: the deepspeed configuration {reason}. Use zero1, zero2 or zero3, or leave "
            f"{', '.join(own_rates)} out."
        )


def _iter_not_built_problems(values: Mapping[str, Any]) -> Iterator[str]:
    for row in NOT_BUILT:
        for name in row.names:
            allowed = row.allowed if row.allowed is not None else (load_properties()[name]["default"],)
            if values[name] not in allowed:
                shown = "(hidden)" if name.endswith("_token") else repr(values[name])
                yield f"{name}: {shown}: {row.reason}."
