"""Spellings of transformers 4.37 that the original's command lines use and 5.23 has no field for.

Each is mapped to today's name, or dropped where nothing depends on it any more, or refused
where its value would have changed the result. Standard library only.
"""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from internvl_core.argument_values import UnreadableValueError, read_value

logger = logging.getLogger(__name__)

_BOOLEAN: Mapping[str, Any] = {"type": "boolean"}
_AMP_BACKEND: Mapping[str, Any] = {"type": "string", "enum": ["auto", "cuda_amp", "cpu_amp", "apex"]}


@dataclass(frozen=True)
class Rename:
    """An old spelling that lives on under another name."""

    name: str
    """Today's name."""
    schema: Mapping[str, Any] | None = None
    """How to read the old value; None where the new name reads it."""
    values: Mapping[Any, Any] = field(default_factory=dict)
    """Old value to new; None sets nothing. Empty: the value stays as it is."""


@dataclass(frozen=True)
class Dropped:
    """An old spelling without a successor."""

    reason: str
    schema: Mapping[str, Any] | None = None
    """How to read the value; None accepts any."""
    harmless: tuple[Any, ...] = ()
    """The values that lose nothing; any other is refused. Without a schema every value is harmless."""


RENAMED: Mapping[str, Rename | Dropped] = {
    "evaluation_strategy": Rename("eval_strategy"),
    # A warmup_steps below 1 is a ratio today. 1.0 would be read as one step, so it is refused.
    "warmup_ratio": Rename("warmup_steps", {"type": "number", "minimum": 0, "exclusiveMaximum": 1}),
    "group_by_length": Rename("train_sampling_strategy", _BOOLEAN, {True: "group_by_length", False: "random"}),
    "adafactor": Rename("optim", _BOOLEAN, {True: "adafactor", False: None}),
    "no_cuda": Rename("use_cpu"),
    "per_gpu_train_batch_size": Rename("per_device_train_batch_size"),
    "per_gpu_eval_batch_size": Rename("per_device_eval_batch_size"),
    # Still fields of 5.23, but they warn and leave in 6.
    "gradient_checkpointing": Rename("activation_checkpointing"),
    "gradient_checkpointing_kwargs": Rename("activation_checkpointing_kwargs"),
    "push_to_hub_model_id": Rename("hub_model_id"),
    "push_to_hub_token": Rename("hub_token"),
    "torchdynamo": Rename("torch_compile_backend"),
    "logging_dir": Dropped("TensorBoard's files are written to <output_dir>/runs."),
    "include_tokens_per_second": Dropped("Tokens per second are always in metrics.jsonl."),
    "use_mps_device": Dropped("The device is found at launch; use_cpu forces the CPU."),
    "ray_scope": Dropped("It belongs to hyperparameter search, which nothing here runs."),
    "use_legacy_prediction_loop": Dropped("Held-out sets are scored by generating answers after the stage."),
    "save_safetensors": Dropped("Weights are always saved as safetensors. Leave it out.", _BOOLEAN, (True,)),
    "half_precision_backend": Dropped(
        "Apex is no longer supported. Use bf16 or fp16.", _AMP_BACKEND, ("auto", "cuda_amp", "cpu_amp")
    ),
    "fp16_backend": Dropped(
        "Apex is no longer supported. Use bf16 or fp16.", _AMP_BACKEND, ("auto", "cuda_amp", "cpu_amp")
    ),
    "fp16_opt_level": Dropped("Apex is no longer supported. Use bf16 or fp16.", {"type": "string"}, ("O1",)),
    "use_ipex": Dropped("transformers 5 has no IPEX path. Leave it out.", _BOOLEAN, (False,)),
    "jit_mode_eval": Dropped("transformers 5 cannot trace a model with the JIT. Leave it out.", _BOOLEAN, (False,)),
    "tpu_num_cores": Dropped("TPUs are not supported. Leave it out.", {"type": ["integer", "null"]}, (None,)),
    "tpu_metrics_debug": Dropped("TPUs are not supported. Leave it out.", _BOOLEAN, (False,)),
    "past_index": Dropped("Models no longer feed a past state back in. Leave it out.", {"type": "integer"}, (-1,)),
    "mp_parameters": Dropped(
        "SageMaker's model parallelism is not supported. Leave it out.", {"type": "string"}, ("",)
    ),
    "split_batches": Dropped(
        "It changes the global batch. Give per_device_train_batch_size instead.",
        {"type": ["boolean", "null"]},
        (None, False),
    ),
    "dispatch_batches": Dropped(
        "Each rank reads its own samples. Leave it out.", {"type": ["boolean", "null"]}, (None, False)
    ),
    "include_inputs_for_metrics": Dropped(
        "Held-out sets are scored by generating answers after the stage. Leave it out.", _BOOLEAN, (False,)
    ),
    "push_to_hub_organization": Dropped(
        "Write the organization into hub_model_id.", {"type": ["string", "null"]}, (None,)
    ),
    "fsdp_min_num_params": Dropped("FSDP is not built; use deepspeed zero3.", {"type": "integer"}, (0,)),
    "fsdp_transformer_layer_cls_to_wrap": Dropped(
        "FSDP is not built; use deepspeed zero3.", {"type": ["string", "null"]}, (None,)
    ),
}


def rename_arguments(
    given: Mapping[str, Any], properties: Mapping[str, Mapping[str, Any]]
) -> tuple[dict[str, Any], list[str]]:
    """Replace old spellings, say each once in the log, and list those that cannot be replaced."""
    current = {name: value for name, value in given.items() if name not in RENAMED}
    problems: list[str] = []
    for old, rename in RENAMED.items():
        if old not in given:
            continue
        try:
            value = given[old] if rename.schema is None else read_value(given[old], rename.schema)
        except UnreadableValueError as error:
            problems.append(f"{old}: {error}")
            continue
        if isinstance(rename, Dropped):
            problems.extend(_drop(old, value, rename))
        else:
            problems.extend(_move(old, value, rename, current, properties[rename.name]))
    return current, problems


def _drop(old: str, value: Any, dropped: Dropped) -> Iterator[str]:
    if dropped.schema is not None and value not in dropped.harmless:
        yield f"{old}: {value!r} cannot be honoured. {dropped.reason}"
    else:
        logger.warning("%s: transformers 5 has no such argument, dropped. %s", old, dropped.reason)


def _move(old: str, value: Any, rename: Rename, current: dict[str, Any], fragment: Mapping[str, Any]) -> Iterator[str]:
    if rename.values:
        value = rename.values[value]
    if value is None:
        logger.warning("%s: transformers 5 has no such argument, dropped. Its value asked for nothing.", old)
        return
    default = fragment["default"]
    try:
        value = read_value(value, fragment)
        present = read_value(current.get(rename.name, default), fragment)
    except UnreadableValueError as error:
        yield f"{old}, {rename.name}: {error}"
        return
    # As in transformers 4, a name at its default gives way to the other (warmup_steps 0 to warmup_ratio).
    if default not in (value, present) and value != present:
        yield f"{old}: given together with {rename.name}, and both mean the same. Keep {rename.name} only."
        return
    if present == default:
        current[rename.name] = value
    logger.warning("%s: transformers 5 calls it %s, and it is read as that.", old, rename.name)
