"""What the stages of a recipe need, from configurations alone: parameters, memory per GPU, FLOPs per step.

The model is built on the meta device, what learns is set by the trainer's own `set_trainable`, and a step
runs there without content; so a plan cannot disagree with training about any of them.
"""

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import nn
from transformers import InternVLConfig

from internvl_core.arguments import ModelArguments
from internvl_core.checkpoint.store import is_checkpoint_uri
from internvl_core.errors import ArgumentError
from internvl_core.inspection.hub import check_model
from internvl_core.inspection.plan_report import (
    PARTS,
    BatchReport,
    FlopsReport,
    Lever,
    MemoryReport,
    PartReport,
    PlanJob,
    PlanReport,
    StageJob,
    StageReport,
)
from internvl_core.model.activations import Activations, Caps, rehearse
from internvl_core.model.flops import ModelShape, build_sample_cost, count_model_flops, find_learning_parts
from internvl_core.model.internvl import InternVLForTraining, add_drop_path
from internvl_core.model.known_models import find_config, find_known, join_parts
from internvl_core.model.load import check_settings
from internvl_core.model.memory import Parameter, Sharding, StateMemory, estimate_state
from internvl_core.model.resize import set_tile_size
from internvl_core.model.trainable import enable_checkpointing, set_trainable
from internvl_core.packing_rules import is_packed

logger = logging.getLogger(__name__)

# Around the tokens of an image: <img> and </img>.
_TOKENS_AROUND_TILES = 2


def run_plan(content: Mapping[str, Any]) -> dict[str, Any]:
    """Do a job as a process is given it, and report."""
    return plan(PlanJob.from_json(content)).to_json()


def plan(job: PlanJob) -> PlanReport:
    """Plan the stages of a recipe, each with the model of the one before if it has none of its own.

    Raises:
        ArgumentError: a model is not found, or its arguments do not fit it; led by the stage's name.
    """
    reports: list[StageReport] = []
    config: Any = find_config(job.start_from) if job.start_from else None
    source = job.start_from or ""
    for stage in job.stages:
        try:
            config, source = _find_model(stage, config, source)
            if job.only in (None, stage.name):
                reports.append(_plan_stage(stage, config, source, job.gpu_bytes))
        except ArgumentError as error:
            raise ArgumentError(f"{stage.name}: {error}") from error
    return PlanReport(reports)


@dataclass(frozen=True)
class _Stage:
    """A stage with everything that its memory is computed from."""

    job: StageJob
    config: InternVLConfig
    caps: Caps
    parameters: list[Parameter]
    activations: Activations

    def estimate(self, **changes: Any) -> tuple[StateMemory, int]:
        """Estimate the state and the total, with some arguments changed."""
        values = {**self.job.values, **changes}
        state = estimate_state(self.parameters, Sharding.from_arguments(values, num_ranks=self.job.num_ranks))
        activations = self.activations.peak + _count_autocast_bytes(self.parameters, values)
        return state, state.count_peak(activations)


def _find_model(stage: StageJob, previous: InternVLConfig | None, source: str) -> tuple[InternVLConfig, str]:
    values = stage.values
    path = stage.start_from or values["model_name_or_path"]
    is_joined = not path and bool(values["vision_path"] and values["llm_path"])
    config: Any = previous
    for name in (path, *((values["vision_path"], values["llm_path"]) if is_joined else ())):
        if name and not is_checkpoint_uri(name) and find_known(name) is None:
            # The hub's own library would ask an unreachable hub again and again.
            check_model(name)
    if path:
        config, source = find_config(path), path
    elif is_joined:
        config = join_parts(values["vision_path"], values["llm_path"], down_sample_ratio=values["down_sample_ratio"])
        source = f"{values['vision_path']} + {values['llm_path']}"
    if config is None:
        raise ArgumentError("has nothing to start from. Give model_name_or_path, or vision_path and llm_path.")
    if not isinstance(config, InternVLConfig):
        raise ArgumentError(f"{source} is a {config.model_type} model, not a whole InternVL.")
    if is_joined:
        config.ps_version = values["ps_version"]
    else:
        check_settings(
            config, down_sample_ratio=values["down_sample_ratio"], ps_version=values["ps_version"], source=source
        )
    set_tile_size(config, values["force_image_size"])
    config.vision_feature_layer = values["vision_select_layer"]
    return config, source


def _plan_stage(job: StageJob, config: InternVLConfig, source: str, gpu_bytes: int | None) -> StageReport:
    values = job.values
    logger.info("Planning %s: %s", job.name, source)
    caps = _find_caps(job, config)
    model, learner = _build_model(config, values)
    parameters = [Parameter(each.numel(), each.requires_grad) for each in learner.parameters()]
    stage = _Stage(job, config, caps, parameters, rehearse(model, caps))
    state, total = stage.estimate()
    memory = MemoryReport(
        weights=state.weights,
        gradients=state.gradients,
        optimizer=state.optimizer,
        buckets=state.buckets,
        activations=stage.activations.layers + _count_autocast_bytes(parameters, values),
        kept=stage.activations.kept,
        logits=stage.activations.logits,
        update=state.update,
        host=state.host,
        total=total,
    )
    return StageReport(
        name=job.name,
        entry=job.entry,
        source=source,
        num_ranks=job.num_ranks,
        sharding=_name_sharding(Sharding.from_arguments(values, num_ranks=job.num_ranks)),
        dtype=str(_find_dtype(values)).removeprefix("torch."),
        is_checkpointed=_is_checkpointed(values),
        parts=_count_parts(learner),
        num_adapters=sum(each.numel() for name, each in learner.named_parameters() if "lora_" in name),
        batch=_report_batch(job, caps),
        memory=memory,
        flops=_count_flops(job, config, learner, caps),
        levers=[] if gpu_bytes is None or memory.fits(gpu_bytes) else _find_levers(stage),
    )


def _find_caps(job: StageJob, config: InternVLConfig) -> Caps:
    values = job.values
    batch_size = int(values["per_device_train_batch_size"])
    if is_packed(values, entry=job.entry):
        tokens, tiles = values["max_packed_tokens"], values["num_images_expected"]
        return Caps(num_sequences=1, tokens=batch_size * tokens, tiles=batch_size * tiles, is_packed=True)
    length = int(values["max_seq_length"])
    tiles = max(1, (length - _TOKENS_AROUND_TILES) // config.image_seq_length)
    return Caps(num_sequences=batch_size, tokens=length, tiles=batch_size * tiles, is_packed=False)


def _build_model(config: InternVLConfig, values: Mapping[str, Any]) -> tuple[InternVLForTraining, nn.Module]:
    """Build a stage's model without content, and what learns in it: the same, or PEFT's around it."""
    with torch.device("meta"):
        model = InternVLForTraining(config).to(_find_dtype(values))
    if _is_checkpointed(values):
        enable_checkpointing(model)
    add_drop_path(model, values["drop_path_rate"])
    learner = set_trainable(
        model, ModelArguments(**{field.name: values[field.name] for field in fields(ModelArguments)})
    )
    return model, learner.train()


def _find_dtype(values: Mapping[str, Any]) -> torch.dtype:
    """Find what layers compute in."""
    return torch.bfloat16 if values["bf16"] else torch.float16 if values["fp16"] else torch.float32


def _is_checkpointed(values: Mapping[str, Any]) -> bool:
    return bool(values["grad_checkpoint"] or values["activation_checkpointing"])


def _count_autocast_bytes(parameters: list[Parameter], values: Mapping[str, Any]) -> int:
    """Count the copies in 16 bits that autocast makes of weights in float32, where there is no DeepSpeed.

    It keeps those of weights that learn until the forward pass ends; the others live as long as the layer's
    activations, with checkpointing a layer at a time.
    """
    if values["deepspeed"] is not None or _find_dtype(values) is torch.float32:
        return 0
    return 2 * sum(each.numel for each in parameters if each.learns or not _is_checkpointed(values))


def _name_sharding(sharding: Sharding) -> str:
    if sharding.stage is None:
        return "DDP" if sharding.num_ranks > 1 else "one process"
    offload = " offload" if sharding.offloads_optimizer or sharding.offloads_weights else ""
    return f"ZeRO-{sharding.stage}{offload}"


def _count_parts(learner: nn.Module) -> dict[str, PartReport]:
    counts = {part: PartReport(0, 0) for part in PARTS}
    for name, parameter in learner.named_parameters():
        # The head stands beside the language model's layers.
        part = next((part for part in PARTS if f".{part}." in name), "language_model")
        numel = parameter.numel()
        old = counts[part]
        counts[part] = PartReport(old.total + numel, old.trainable + numel * parameter.requires_grad)
    return counts


def _report_batch(job: StageJob, caps: Caps) -> BatchReport:
    return BatchReport(
        is_packed=caps.is_packed,
        num_sequences=job.values["per_device_train_batch_size"],
        tokens=caps.num_sequences * caps.tokens,
        tiles=caps.tiles,
        batches_per_step=job.values["gradient_accumulation_steps"] * job.num_ranks,
    )


def _count_flops(job: StageJob, config: InternVLConfig, learner: nn.Module, caps: Caps) -> FlopsReport:
    """Count a step whose batches are full: samples as long as they may be, every position supervised."""
    shape = ModelShape.from_config(config)
    learning = find_learning_parts((name, each.requires_grad) for name, each in learner.named_parameters())
    tokens = caps.num_sequences * caps.tokens
    batch_size = job.values["per_device_train_batch_size"]
    longest = min(job.values["max_seq_length"], tokens // batch_size)
    num_longest, rest = divmod(tokens // batch_size, longest)
    tokens_squared = batch_size * (num_longest * longest**2 + rest**2)
    useful = count_model_flops(
        shape,
        **learning,
        tokens=tokens,
        tokens_squared=tokens_squared,
        tiles=caps.tiles,
        supervised_tokens=tokens,
    )
    first, again = (build_sample_cost(shape, **learning, is_checkpointed=value) for value in (False, True))
    recomputed = (
        (again.per_token - first.per_token) * tokens
        + (again.per_token_squared - first.per_token_squared) * tokens_squared
        + (again.per_tile - first.per_tile) * caps.tiles
    )
    batches = job.values["gradient_accumulation_steps"] * job.num_ranks
    computed = useful + recomputed * _is_checkpointed(job.values)
    return FlopsReport(useful=useful * batches, computed=computed * batches)


def _find_levers(stage: _Stage) -> list[Lever]:
    """Estimate what other arguments would need, the least drastic first, each but the first on top of checkpointing."""
    values = stage.job.values
    levers: list[Lever] = []
    also = ""
    if not _is_checkpointed(values):
        also = "grad_checkpoint: True, "
        values = {**values, "grad_checkpoint": True}
        model, _ = _build_model(stage.config, values)
        stage = replace(stage, job=replace(stage.job, values=values), activations=rehearse(model, stage.caps))
        levers.append(Lever(also.rstrip(", "), stage.estimate()[1]))
    now = Sharding.from_arguments(values, num_ranks=stage.job.num_ranks)
    for number in (1, 2, 3):
        if number > (now.stage or 0):
            levers.append(Lever(f"{also}deepspeed: zero{number}", stage.estimate(deepspeed=f"zero{number}")[1]))
    halves = {name: value // 2 for name, value in asdict(stage.activations).items()}
    half = replace(stage, activations=Activations(**halves))
    levers.append(Lever(f"{also}{_name_half(stage)}", half.estimate()[1]))
    batch = values["per_device_train_batch_size"]
    if batch > 2:
        least = replace(
            stage,
            activations=Activations(**{name: value // batch for name, value in asdict(stage.activations).items()}),
        )
        text = f"per_device_train_batch_size: 1 with {batch} times the gradient_accumulation_steps"
        levers.append(Lever(f"{also}{text}", least.estimate()[1]))
    if not now.offloads_weights:
        offload = f"{also}deepspeed: zero3_offload"
        levers.append(Lever(offload, stage.estimate(deepspeed="zero3_offload")[1]))
        levers.append(Lever(f"{offload}, {_name_half(stage)}", half.estimate(deepspeed="zero3_offload")[1]))
    return levers


def _name_half(stage: _Stage) -> str:
    values = stage.job.values
    if values["per_device_train_batch_size"] > 1:
        return (
            f"per_device_train_batch_size: {values['per_device_train_batch_size'] // 2} with twice the "
            "gradient_accumulation_steps"
        )
    if not stage.caps.is_packed:
        return f"max_seq_length: {values['max_seq_length'] // 2}"
    return (
        f"max_packed_tokens: {values['max_packed_tokens'] // 2} and num_images_expected: "
        f"{max(1, values['num_images_expected'] // 2)} with twice the gradient_accumulation_steps"
    )
