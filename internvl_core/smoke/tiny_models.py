"""The models and the tokenizer of the smoke components; torch and transformers are imported here."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    InternVLVisionConfig,
    InternVLVisionModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
)

if TYPE_CHECKING:
    from internvl_core.smoke.components import ComponentsSettings

_END_OF_TEXT, _TURN_START, _TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
_EMBEDDING_MULTIPLE = 64
_MAX_POSITIONS = 2048


def write_models(folder: Path, texts: Iterator[str], settings: "ComponentsSettings") -> None:
    """Write `vision` and `llm` into a folder, by the settings' seed."""
    tokenizer = train_tokenizer(texts, settings.vocab_size)
    tokenizer.save_pretrained(folder / "llm")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        build_vision_model(settings).save_pretrained(folder / "vision")
        build_language_model(settings, tokenizer).save_pretrained(folder / "llm")


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """Train a byte-level BPE with Qwen2's way of splitting text: digits singly, words with their space."""
    pipeline = Qwen2Tokenizer().backend_tokenizer
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.NFC()
    trained.pre_tokenizer = pipeline.pre_tokenizer
    trained.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len((_END_OF_TEXT, _TURN_START, _TURN_END)),
        min_frequency=2,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    trained.train_from_iterator(texts, trainer)
    model = json.loads(trained.to_str())["model"]
    return Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=[tuple(merge) for merge in model["merges"]],
        unk_token=_END_OF_TEXT,
        pad_token=_END_OF_TEXT,
        eos_token=_TURN_END,
        additional_special_tokens=[_TURN_START, _TURN_END],
        model_max_length=_MAX_POSITIONS,
    )


def build_vision_model(settings: "ComponentsSettings") -> InternVLVisionModel:
    """Build the ViT with random weights, ready to learn in minutes rather than weeks."""
    model = InternVLVisionModel(
        InternVLVisionConfig(
            hidden_size=settings.hidden_size,
            num_hidden_layers=settings.num_vision_layers,
            num_attention_heads=settings.num_attention_heads,
            attention_bias=True,
            intermediate_size=2 * settings.hidden_size,
            image_size=settings.image_size,
            patch_size=settings.patch_size,
            initializer_range=settings.initializer_range,
            norm_type="layer_norm",
            # 0.1 is for deep towers trained long; it keeps one of two layers nearly shut.
            layer_scale_init_value=1.0,
        )
    )
    with torch.no_grad():
        # transformers starts both at zero: patches that cannot be told apart by place.
        model.embeddings.cls_token.normal_(std=settings.initializer_range)
        model.embeddings.position_embeddings.normal_(std=settings.initializer_range)
    return model


def build_language_model(settings: "ComponentsSettings", tokenizer: PreTrainedTokenizerBase) -> Qwen2ForCausalLM:
    """Build the language model with random weights, its embeddings padded to a multiple of 64."""
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=-(-len(tokenizer) // _EMBEDDING_MULTIPLE) * _EMBEDDING_MULTIPLE,
            hidden_size=settings.hidden_size,
            intermediate_size=2 * settings.hidden_size,
            num_hidden_layers=settings.num_llm_layers,
            num_attention_heads=settings.num_attention_heads,
            num_key_value_heads=settings.num_attention_heads // 2,
            initializer_range=settings.initializer_range,
            max_position_embeddings=_MAX_POSITIONS,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
