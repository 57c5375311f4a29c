"""The arguments of a training stage: the seeds' dataclasses, and their parsing.

Parsing needs no hardware, so every recipe can be checked on any machine: what looks at the
machine waits in `TrainingArguments.prepare_for_launch`. `python -m internvl_core.arguments`
writes arguments.schema.json, from which torch-free code reads the fields.
"""

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Optional

import torch
import transformers

from internvl_core.argument_rules import SCHEMA_PATH, load_properties, read_arguments
from internvl_core.arguments_schema import build_schema
from internvl_core.command_line import TextParser, read_command_line
from internvl_core.deepspeed_config import resolve_deepspeed
from internvl_core.errors import ArgumentError
from internvl_core.machine import iter_machine_problems

logger = logging.getLogger(__name__)

# accelerate reads these where the arguments leave room, and it sets the second one itself.
ENVIRONMENT_IGNORED = ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP")


def _help(text: str) -> dict[str, str]:
    return {"help": text}


# The annotations of the next two classes are the seeds' own, to the letter.
@dataclass
class ModelArguments:
    """Where the model comes from and which parts of it learn."""

    model_name_or_path: Optional[str] = field(  # noqa: UP045
        default=None,
        metadata=_help("Start from a whole model: a folder, a hub id, or the URI of a committed checkpoint."),
    )
    vision_path: Optional[str] = field(  # noqa: UP045
        default=None, metadata=_help("Start from components: the vision tower. Needs llm_path.")
    )
    llm_path: Optional[str] = field(  # noqa: UP045
        default=None,
        metadata=_help("Start from components: the language model and its tokenizer. Needs vision_path."),
    )
    mlp_path: Optional[str] = field(  # noqa: UP045
        default=None,
        metadata=_help("Weights of the projector alone, loaded over the model's: a folder, a hub id, a URI or a file."),
    )
    freeze_llm: bool = field(default=False, metadata=_help("Do not train the language model."))
    freeze_backbone: bool = field(default=False, metadata=_help("Do not train the vision tower."))
    freeze_mlp: bool = field(default=False, metadata=_help("Do not train the projector between the two."))
    unfreeze_vit_layers: int = field(
        default=0,
        metadata=_help("Train these layers of a frozen vision tower: -N the last N, +N all from layer N on, 0 none."),
    )
    vision_select_layer: int = field(
        default=-1, metadata=_help("Layer of the vision tower whose output the projector reads; -1 is the last.")
    )
    use_backbone_lora: int = field(
        default=0, metadata=_help("LoRA rank on the vision tower, alpha twice the rank; 0 for no LoRA.")
    )
    use_llm_lora: int = field(
        default=0, metadata=_help("LoRA rank on the language model, alpha twice the rank; 0 for no LoRA.")
    )
    unfreeze_lm_head: bool = field(
        default=False, metadata=_help("Train the output head although the language model is frozen.")
    )
    grad_checkpoint: bool = field(
        default=True, metadata=_help("Recompute activations in the backward pass: slower, needs less memory.")
    )
    drop_path_rate: float = field(
        default=0.0,
        metadata=_help("Stochastic depth of the vision tower: the rate at its last layer, rising linearly from 0."),
    )
    ps_version: Literal["v1", "v2"] = field(
        default="v2",
        metadata=_help(
            "Variant of the pixel shuffle that folds patches into image tokens, as the model was trained with; v1 is "
            "that of InternVL 1.x and cannot be converted to the native format."
        ),
    )
    use_fast_tokenizer: bool = field(
        default=False, metadata=_help("Without effect: transformers 5 has one kind of tokenizer for a model.")
    )
    use_liger: bool = field(
        default=False,
        metadata=_help(
            "Use Liger's fused kernels in the language model (norms and gated layers); needs a GPU and liger-kernel."
        ),
    )


@dataclass
class DataTrainingArguments:
    """How records become token sequences and tiles."""

    max_seq_length: int = field(
        default=8192, metadata=_help("Longest sequence in tokens, image tokens included; a longer sample is refused.")
    )
    force_image_size: int = field(default=448, metadata=_help("Side of a tile in pixels."))
    down_sample_ratio: float = field(
        default=0.5, metadata=_help("Factor by which the pixel shuffle shrinks each side of the patch grid.")
    )
    pad2square: bool = field(default=False, metadata=_help("Pad an image to a square before it is resized."))
    conv_style: str = field(default="internlm2-chat", metadata=_help("Chat format in which conversations are written."))
    meta_path: str = field(  # type: ignore[assignment]
        default=None,
        metadata=_help("JSON file that lists the data sets of the training mix."),
    )
    use_data_resampling: bool = field(default=False, metadata=_help("Weight data sets by the root of their size."))
    dynamic_image_size: bool = field(
        default=False, metadata=_help("Cut images into a grid of tiles near their own aspect ratio; else one tile.")
    )
    use_thumbnail: bool = field(
        default=False, metadata=_help("Add a tile of the whole image where it was cut into several.")
    )
    min_dynamic_patch: int = field(default=1, metadata=_help("Fewest tiles an image may be cut into."))
    max_dynamic_patch: int = field(
        default=12, metadata=_help("Most tiles an image may be cut into, without the thumbnail.")
    )
    min_num_frame: int = field(default=8, metadata=_help("Fewest frames taken from a video."))
    max_num_frame: int = field(default=32, metadata=_help("Most frames taken from a video."))
    normalize_type: Literal["imagenet", "clip", "siglip"] = field(
        default="imagenet", metadata=_help("Mean and deviation by which pixels are normalised.")
    )
    use_packed_ds: bool = field(
        default=False, metadata=_help("Pack several samples into one sequence; the pretrain entry always does.")
    )
    num_images_expected: int = field(default=40, metadata=_help("Most tiles in a pack."))
    max_packed_tokens: int = field(default=8192, metadata=_help("Most tokens in a pack."))
    max_buffer_size: int = field(
        default=20, metadata=_help("Packs that packer legacy holds open before it gives out the fullest.")
    )
    log_freq: int = field(default=1000, metadata=_help("Samples between two log lines of the packer."))
    strict_mode: bool = field(default=True, metadata=_help("Pad every pack to its full number of tiles and tokens."))
    replacement: bool = field(default=False, metadata=_help("Start an exhausted data set over."))
    allow_overflow: bool = field(default=False, metadata=_help("Let a pack grow over its limit, then split it."))
    loss_reduction: str = field(
        default="token",
        metadata=_help(
            "Weight of a conversation of n learnt tokens in the loss: token n, sample 1, square the root of n."
        ),
    )
    loss_reduction_all_gather: bool = field(
        default=False,
        metadata=_help("Without effect: the loss is always the mean over all ranks and accumulation steps."),
    )


class TrainingArguments(transformers.TrainingArguments):
    """Hugging Face's arguments, except that making them does not look at the machine."""

    if TYPE_CHECKING:
        deepspeed: Any

    # Copied from the other groups by `parse_arguments`; not fields.
    decay_all: bool = True
    vision_lr: float | None = None
    mlp_lr: float | None = None
    use_liger: bool = False

    def __post_init__(self) -> None:
        """Leave everything as given: Hugging Face's own would ask for devices here."""

    def prepare_for_launch(self) -> None:
        """Do what Hugging Face does at construction: check the hardware, take a device, configure DeepSpeed.

        Raises:
            ArgumentError: this machine cannot do what the arguments ask for.
        """
        if self.output_dir is None:
            raise ArgumentError("output_dir: missing. Give it, or attempt_dir.")
        if not torch.accelerator.is_available():
            # Hugging Face lets bf16 train on a CPU only if told that a CPU is meant.
            self.use_cpu = True
        problems = list(iter_machine_problems(self))
        if problems:
            raise ArgumentError("\n".join(problems))
        if self.deepspeed is not None:
            has_own_rates = self.vision_lr is not None or self.mlp_lr is not None
            self.deepspeed = resolve_deepspeed(self.deepspeed, decay_all=self.decay_all and not has_own_rates)
        for name in ENVIRONMENT_IGNORED:
            if os.environ.pop(name, None) is not None:
                logger.warning("%s in the environment is ignored: only arguments decide how a model is trained.", name)
        try:
            super().__post_init__()
        except ValueError as error:
            raise ArgumentError(str(error)) from error


@dataclass
class ExtensionArguments:
    """What the seeds do not have."""

    attempt_dir: str | None = field(
        default=None, metadata=_help("Directory of this attempt, with stage.json; set by the pipeline.")
    )
    cache_dir: str = field(
        default="~/.cache/internvl", metadata=_help("Directory into which remote checkpoints are fetched.")
    )
    overwrite_output_dir: bool = field(
        default=False,
        metadata=_help(
            "In a run by hand: begin anew although output_dir has checkpoints to resume from. A pipeline puts every "
            "attempt into a directory of its own."
        ),
    )
    eval_meta_path: str | None = field(
        default=None, metadata=_help("JSON file that lists the held-out sets; scored after training by greedy answers.")
    )
    system_prompt: str | None = field(
        default=None,
        metadata=_help(
            "System message of records that have none; without it the chat format's own, which the released models "
            "were trained with."
        ),
    )
    video_sampling: str = field(
        default="uniform",
        metadata=_help(
            "Which frames of a video are taken: uniform (one at random in each of equal intervals), middle (their "
            "middles), or fpsX (X frames a second)."
        ),
    )
    fast_resize: bool = field(
        default=False, metadata=_help("Resize images with torch: faster, within 2/255 of Pillow's result.")
    )
    jpeg_draft: bool = field(
        default=False, metadata=_help("Let the decoder shrink large JPEGs on the way: faster, changes pixels.")
    )
    augment_per_tile: bool = field(
        default=False,
        metadata=_help("Draw a JPEG quality for each tile of an image, as the original does, not one for all."),
    )
    packer: Literal["balanced", "legacy"] = field(
        default="balanced",
        metadata=_help("How packs are made: balanced (of equal cost), or legacy (the original's greedy order)."),
    )
    packed_attention: Literal["auto", "flash_attention_2", "varlen", "sdpa"] = field(
        default="auto",
        metadata=_help(
            "Kernel of the language model's attention within packs: flash_attention_2, varlen (torch's own), sdpa "
            "(one call a sample), or auto, the first of them that this machine can run."
        ),
    )
    max_bad_fraction: float = field(
        default=0.01,
        metadata=_help(
            "Share of a data set's records that may be bad: of all, looked at before training, and of those drawn "
            "(at least 1,000) that fail while it runs. 0 stops at the first."
        ),
    )
    max_unsent_checkpoints: int = field(
        default=2,
        metadata=_help(
            "Saved checkpoints that may wait for the store while training goes on; with one more to save, it waits."
        ),
    )
    store_patience_s: float = field(
        default=600,
        metadata=_help("Seconds that the store may fail without a break before the stage gives up on it."),
    )
    max_non_finite_steps: int = field(
        default=3,
        metadata=_help(
            "Steps in a row whose loss or gradient is not finite before the stage stops; none of them is applied. "
            "1 stops at the first."
        ),
    )
    setup_limit_s: float = field(
        default=1800,
        metadata=_help("Seconds from the start of the ranks to the end of their first step before the stage is ended."),
    )
    stall_limit_s: float = field(
        default=600,
        metadata=_help(
            "Seconds without progress, or five times the longest step so far if that is more, before the stage is "
            "ended with the stacks of all ranks."
        ),
    )
    eval_max_new_tokens: int = field(default=32, metadata=_help("Longest answer to a held-out question, in tokens."))
    decay_all: bool = field(
        default=True,
        metadata=_help(
            "Decay every tensor's weights, as the original does; False spares biases and norms, as Hugging Face does."
        ),
    )
    vision_lr: float | None = field(
        default=None,
        metadata=_help("Learning rate of the vision tower, adapters included; without it learning_rate."),
    )
    mlp_lr: float | None = field(
        default=None, metadata=_help("Learning rate of the projector; without it learning_rate.")
    )


GROUPS: Mapping[str, type] = {
    "model": ModelArguments,
    "data": DataTrainingArguments,
    "training": TrainingArguments,
    "extension": ExtensionArguments,
}


@dataclass(frozen=True)
class Arguments:
    """All arguments of a stage."""

    model: ModelArguments
    data: DataTrainingArguments
    training: TrainingArguments
    extension: ExtensionArguments

    def to_values(self) -> dict[str, Any]:
        """Flatten to the resolved plain values they were made of; call it before `prepare_for_launch`."""
        return {
            name: getattr(getattr(self, str(fragment["x-group"])), name) for name, fragment in load_properties().items()
        }


def parse_arguments(source: Sequence[str] | Mapping[str, Any]) -> Arguments:
    """Parse command-line items (one item ending in .json is a file of them all) or a mapping.

    Raises:
        ArgumentError: every problem, a line each.
    """
    given, problems = _read_source(source)
    values, further = read_arguments(given)
    if problems or further:
        raise ArgumentError("\n".join([*problems, *further]))
    model, data, training, extension = TextParser(list(GROUPS.values())).parse_dict(values)
    training.decay_all = extension.decay_all
    training.vision_lr, training.mlp_lr = extension.vision_lr, extension.mlp_lr
    training.use_liger = model.use_liger
    return Arguments(model, data, training, extension)


def _read_source(source: Sequence[str] | Mapping[str, Any]) -> tuple[Mapping[str, Any], list[str]]:
    if isinstance(source, Mapping):
        return source, []
    if len(source) == 1 and source[0].endswith(".json") and not source[0].startswith("--"):
        return _read_json(Path(source[0])), []
    return read_command_line(source, list(GROUPS.values()), load_properties())


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ArgumentError(f"{path}: cannot be read ({error.strerror}). Give a JSON file of arguments.") from None
    except ValueError as error:
        raise ArgumentError(f"{path}: not JSON ({error}). Fix the file.") from None
    if not isinstance(content, dict):
        raise ArgumentError(f"{path}: holds a {type(content).__name__}; it should be an object of arguments.")
    return content


def format_schema() -> str:
    """Format the schema of all arguments as the committed file has it."""
    return json.dumps(build_schema(GROUPS), indent=2) + "\n"


if __name__ == "__main__":
    SCHEMA_PATH.write_text(format_schema(), encoding="utf-8")
