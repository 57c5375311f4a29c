"""A model made ready to answer, and its scores on the stage's held-out questions."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers.integrations import is_deepspeed_zero3_enabled

from internvl_core.arguments import Arguments
from internvl_core.data.encoding import Encoding
from internvl_core.data.pixels import PixelRules
from internvl_core.data.questions import QuestionEncoder
from internvl_core.data.text_encoder import TextEncoder
from internvl_core.evaluate.examples import write_examples
from internvl_core.evaluate.generate import evaluate_held_out
from internvl_core.model.attention import use_padded_attention
from internvl_core.model.internvl import InternVLForTraining
from internvl_core.model.load import LoadedModel
from internvl_core.train.training_data import list_data_values


def choose_dtype(arguments: Arguments) -> torch.dtype:
    """Choose that of the parameters: DeepSpeed keeps fp32 masters of bf16 weights, elsewhere autocast needs fp32."""
    training = arguments.training
    return torch.bfloat16 if training.bf16 and training.deepspeed else torch.float32


def build_encoding(arguments: Arguments, loaded: LoadedModel) -> Encoding:
    """Build what turns records into tokens, by the stage's arguments and the model's tokenizer."""
    encoder = TextEncoder.from_tokenizer(loaded.tokenizer)
    return Encoding.from_arguments(list_data_values(arguments), encoder=encoder, tokens_per_tile=loaded.tokens_per_tile)


def place_untrained(model: InternVLForTraining, arguments: Arguments) -> InternVLForTraining:
    """Make a model that is not going to be trained ready to answer."""
    if not is_deepspeed_zero3_enabled():
        model.to(arguments.training.device)
        return model
    import deepspeed  # seconds of imports that only ZeRO-3 needs

    # Only an engine's hooks bring each layer's parameters together when they are needed.
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": choose_dtype(arguments) == torch.bfloat16},
        "zero_optimization": {"stage": 3},
    }
    engine, *_ = deepspeed.initialize(model=model, config=config)
    placed: InternVLForTraining = engine.module
    return placed


def score_held_out(
    model: Any, loaded: LoadedModel, arguments: Arguments, directory: Path, *, on_batch: Callable[[], None]
) -> dict[str, float]:
    """Score a model that is in its place, on every rank, and keep some of the answers.

    Args:
        model: that answers; trained just now it is wrapped.
        loaded: the tokenizer, and the size of a tile.
        arguments: of the stage.
        directory: of the attempt; rank 0 writes examples into it.
        on_batch: see `evaluate_held_out`.

    Returns:
        `accuracy` and `accuracy/<dataset>`, 0 to 1; empty without `eval_meta_path`.
    """
    use_padded_attention(model)
    encoder = QuestionEncoder(build_encoding(arguments, loaded), PixelRules.from_arguments(list_data_values(arguments)))
    evaluation = evaluate_held_out(model, loaded.tokenizer, encoder, arguments, on_batch=on_batch)
    if arguments.training.process_index == 0:
        write_examples(directory, evaluation.examples)
    return evaluation.scores
