"""What this version does not do yet, as one table: an issue that builds a row deletes it.

Every value that the trainer would have to ignore is refused with a row of this table.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class NotBuilt:
    """Arguments whose other values nothing implements."""

    names: tuple[str, ...]
    reason: str
    """What will do it, or what does it instead, and what to do now."""
    allowed: tuple[Any, ...] | None = None
    """The values that work; None: only the default."""


_EVALUATION = "belongs to evaluation during training. Held-out sets are scored after the stage: give eval_meta_path"
_HUB = "publishing to the Hub is a task of its own, not built yet. Leave it out; checkpoints go to the store"

NOT_BUILT: tuple[NotBuilt, ...] = (
    NotBuilt(
        ("use_liger_kernel", "liger_kernel_config"),
        "Hugging Face's switch replaces classes of the whole process. Leave it out and set use_liger",
    ),
    NotBuilt(
        ("allow_overflow",),
        "a pack that grew over its limit would be split in the middle of its images, which crashes the original; it "
        "will not be built. Leave it out",
    ),
    NotBuilt(("accelerator_config",), "the trainer shares out the data by itself. Leave it out"),
    NotBuilt(("dataloader_in_order",), "batches out of order make a run that nobody can repeat. Leave it out"),
    NotBuilt(("average_tokens_across_devices",), "the loss is always the mean over all ranks. Leave it out"),
    NotBuilt(("eval_strategy",), _EVALUATION),
    NotBuilt(
        (
            "do_eval",
            "do_predict",
            "eval_steps",
            "eval_delay",
            "eval_on_start",
            "eval_accumulation_steps",
            "eval_do_concat_batches",
            "eval_use_gather_object",
            "prediction_loss_only",
            "include_for_metrics",
            "batch_eval_metrics",
            "bf16_full_eval",
            "fp16_full_eval",
            "load_best_model_at_end",
            "metric_for_best_model",
            "greater_is_better",
        ),
        _EVALUATION,
    ),
    NotBuilt(
        ("save_strategy",), "the best step is not known before the stage is scored. Use steps", ("no", "steps", "epoch")
    ),
    NotBuilt(("save_only_model",), "a checkpoint without optimizer state cannot be resumed. Leave it out"),
    NotBuilt(("enable_jit_checkpoint",), "the trainer saves on SIGTERM by itself. Leave it out"),
    NotBuilt(
        (
            "push_to_hub",
            "hub_model_id",
            "hub_token",
            "hub_strategy",
            "hub_private_repo",
            "hub_always_push",
            "hub_revision",
        ),
        _HUB,
    ),
    NotBuilt(
        ("project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
        "Trackio is not supported. Leave it out; MLflow records every run",
    ),
    NotBuilt(
        ("auto_find_batch_size",), "the batch size belongs to the result and is never changed silently. Leave it out"
    ),
    NotBuilt(
        ("torch_compile", "torch_compile_backend", "torch_compile_mode"), "compiling is not built yet. Leave it out"
    ),
    NotBuilt(("fsdp", "fsdp_config"), "FSDP is not built; use deepspeed: zero3"),
    NotBuilt(("parallelism_config",), "tensor and context parallelism are not built. Leave it out"),
    NotBuilt(
        ("train_sampling_strategy",),
        "this order is not built. Use random or group_by_length",
        ("random", "group_by_length"),
    ),
    NotBuilt(("run_name",), "a run is named after its recipe. Leave it out"),
    NotBuilt(("ignore_data_skip",), "a resumed stage goes on in the order of its data. Leave it out"),
    NotBuilt(("length_column_name",), "lengths come from the data set itself. Leave it out"),
    NotBuilt(("label_names",), "a batch's labels are always called labels. Leave it out", (None, ["labels"])),
    NotBuilt(
        ("include_num_input_tokens_seen",),
        "tokens are always counted without padding. Leave it out",
        ("no", "non_padding", True, False),
    ),
    NotBuilt(
        ("lr_scheduler_type",),
        "this schedule follows a score measured during training, which is not built. Use cosine",
        (
            "linear",
            "cosine",
            "cosine_with_restarts",
            "polynomial",
            "constant",
            "constant_with_warmup",
            "inverse_sqrt",
            "cosine_with_min_lr",
            "cosine_warmup_with_min_lr",
            "warmup_stable_decay",
        ),
    ),
    # Trainer's smoother replaces the model's own loss, and with it the term that keeps every rank in the vision tower.
    NotBuilt(("label_smoothing_factor",), "label smoothing is not built yet. Leave it out"),
)
