import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chat_tokenizers import load_golden_with_chat_tokens, train_sentence_piece
from PIL import Image
from tiny_internvl import build_tiny_model
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    GenerationConfig,
    InternVLConfig,
    PreTrainedTokenizerBase,
)

from internvl_core.data.conversation import encode_conversation, encode_prompt
from internvl_core.data.templates import CONV_STYLES, IMAGE_CONTEXT, IMAGE_END, IMAGE_START
from internvl_core.data.tiles import cut_tiles, normalise
from internvl_core.data.tiling import Tiling
from internvl_core.model.export import build_chat_template, compute_tile_px, write_companions

ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
IMAGE, TEXT = {"type": "image"}, "text"

Part = dict[str, str]
Turn = tuple[str, str | list[Part]]


def say(text: str) -> Part:
    return {"type": "text", "text": text}


# What training reads, and the same as a user of transformers writes it.
CONVERSATIONS: dict[str, list[tuple[str, str, str | list[Part]]]] = {
    "one turn": [("human", "How many?", "How many?"), ("gpt", "Two.", "Two.")],
    "own system message": [
        ("system", "You count.", "You count."),
        ("human", "How many?", "How many?"),
        ("gpt", "Two.", "Two."),
    ],
    "empty system message": [("system", "", ""), ("human", "How many?", "How many?"), ("gpt", "Two.", "Two.")],
    "several turns": [
        ("human", "How many?", "How many?"),
        ("gpt", "Two.", "Two."),
        ("human", "  And cats?\n", "  And cats?\n"),
        ("gpt", " None. ", " None. "),
    ],
    "an image": [("human", "<image>\nWhat?", [IMAGE, say("What?")]), ("gpt", "A dog.", [say("A dog.")])],
    "images in turns": [
        ("human", "<image>\n<image>\nSame?", [IMAGE, IMAGE, say("Same?")]),
        ("gpt", "No.", "No."),
        ("human", "Like this: <image>", [say("Like this: "), IMAGE]),
        ("gpt", "Yes.", "Yes."),
    ],
    "braces and quotes": [("human", "{{ \"a\" }} {% b %} '\\n'", "{{ \"a\" }} {% b %} '\\n'"), ("gpt", "}}", "}}")],
}


@pytest.fixture(scope="module", params=[load_golden_with_chat_tokens, train_sentence_piece])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    return request.param()  # type: ignore[no-any-return]


def render(tokenizer: PreTrainedTokenizerBase, turns: list[Any], style: str, *, is_prompt: bool) -> list[int]:
    """Render as InternVLProcessor does: from the template, each image expanded, the text tokenized as a whole."""
    has_bos = tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    template = build_chat_template(style, image=IMAGE_CONTEXT, opens_with_bos=has_bos)
    messages = [{"role": ROLES[role], "content": content} for role, _, content in turns]
    text = tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=is_prompt
    )
    text = text.replace(IMAGE_CONTEXT, f"{IMAGE_START}{IMAGE_CONTEXT * 3}{IMAGE_END}")
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


@pytest.mark.parametrize("style", CONV_STYLES)
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_the_chat_template_says_what_training_said(tokenizer: PreTrainedTokenizerBase, style: str, name: str) -> None:
    # F26: a model trained with a default system message was asked without it.
    turns = CONVERSATIONS[name]
    records = [{"from": role, "value": value} for role, value, _ in turns]
    counts = [3] * sum(value.count("<image>") for _, value, _ in turns)
    whole = encode_conversation(
        records, tokenizer, conv_style=style, image_token_counts=counts, max_seq_length=10_000
    ).input_ids
    assert render(tokenizer, turns, style, is_prompt=False) == whole
    asked = encode_prompt(records[:-1], tokenizer, conv_style=style, image_token_counts=counts)
    assert render(tokenizer, turns[:-1], style, is_prompt=True) == asked


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "tool", "content": "x"}],
        [{"role": "user", "content": "x"}, {"role": "system", "content": "y"}],
        [{"role": "user", "content": [{"type": "audio"}]}],
    ],
)
def test_what_training_never_said_is_refused(messages: list[dict[str, Any]]) -> None:
    template = build_chat_template("internvl2_5", image=IMAGE_CONTEXT, opens_with_bos=False)
    with pytest.raises(Exception, match=r"Roles are|Parts are"):
        load_golden_with_chat_tokens().apply_chat_template(messages, chat_template=template, tokenize=False)


def write(folder: Path, format: Any = "native", generation: GenerationConfig | None = None, **settings: Any) -> Path:
    config: InternVLConfig = build_tiny_model().config
    if settings:
        config.chat_settings = settings
    write_companions(
        folder,
        config=config,
        tokenizer=load_golden_with_chat_tokens(),
        generation_config=generation,
        format=format,
    )
    return folder


def read(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(file.read_text())
    return content


def test_answers_end_where_the_trained_ones_do(tmp_path: Path) -> None:
    tokenizer = load_golden_with_chat_tokens()
    generation = GenerationConfig(eos_token_id=7, temperature=0.5, do_sample=True)
    write(tmp_path, generation=generation, template="phi3-chat")
    loaded = GenerationConfig.from_pretrained(tmp_path)
    assert loaded.eos_token_id == [tokenizer.convert_tokens_to_ids("<|end|>"), 7]
    assert (loaded.temperature, loaded.do_sample) == (0.5, True)
    assert loaded.pad_token_id == tokenizer.pad_token_id


def test_without_a_generation_config_answers_are_greedy(tmp_path: Path) -> None:
    loaded = GenerationConfig.from_pretrained(write(tmp_path))
    assert loaded.eos_token_id == [load_golden_with_chat_tokens().convert_tokens_to_ids("<|im_end|>")]
    assert not loaded.do_sample


@pytest.mark.parametrize("size", [(100, 40), (40, 100), (33, 33), (300, 20), (64, 31)])
def test_the_native_image_processor_cuts_the_tiles_of_training(tmp_path: Path, size: tuple[int, int]) -> None:
    settings = {"dynamic_image_size": True, "min_dynamic_patch": 1, "max_dynamic_patch": 6, "use_thumbnail": True}
    processor = AutoImageProcessor.from_pretrained(write(tmp_path, **settings))
    side = compute_tile_px(build_tiny_model().config)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))
    tiling = Tiling(tile_size=side, min_tiles=1, max_tiles=6, use_thumbnail=True, is_dynamic=True)
    expected = normalise(cut_tiles(image, tiling), "imagenet", torch.float32)
    found = torch.as_tensor(np.asarray(processor(image, return_tensors="np")["pixel_values"]))
    assert found.shape == expected.shape
    # Resizing in another library: one step of 255, over the smallest standard deviation.
    assert (found - expected).abs().max() < 1.01 / 255 / 0.224


def test_a_model_of_single_tiles_gets_single_tiles(tmp_path: Path) -> None:
    # InternVLProcessor sets crop_to_patches itself.
    processor = AutoImageProcessor.from_pretrained(write(tmp_path, dynamic_image_size=False, max_dynamic_patch=6))
    image = Image.new("RGB", (100, 40))
    assert len(processor(image, crop_to_patches=True, return_tensors="np")["pixel_values"]) == 1


def test_the_processor_of_the_native_format_loads_and_writes_what_training_wrote(tmp_path: Path) -> None:
    pytest.importorskip("torchvision", reason="AutoProcessor needs torchvision", exc_type=(ImportError, RuntimeError))
    from transformers import AutoProcessor

    config = build_tiny_model().config
    config.save_pretrained(write(tmp_path))
    processor = AutoProcessor.from_pretrained(tmp_path)
    image = Image.new("RGB", (100, 40))
    content = [{"type": "image", "image": image}, say("What?")]
    found = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True
    )
    count = len(found["pixel_values"]) * config.image_seq_length
    expected = encode_prompt(
        [{"from": "human", "value": "<image>\nWhat?"}],
        load_golden_with_chat_tokens(),
        conv_style="internvl2_5",
        image_token_counts=[count],
    )
    assert list(found["input_ids"][0]) == expected


def test_the_processor_config_says_what_the_processor_asks_for(tmp_path: Path) -> None:
    # Read by AutoProcessor, which needs torchvision; the test above is left out without it.
    write(tmp_path, max_dynamic_patch=7)
    config = build_tiny_model().config
    assert read(tmp_path / "processor_config.json") == {
        "image_seq_length": config.image_seq_length,
        "processor_class": "InternVLProcessor",
    }
    image, video = read(tmp_path / "preprocessor_config.json"), read(tmp_path / "video_preprocessor_config.json")
    assert image["size"] == video["size"] == {"height": 32, "width": 32}
    assert (image["max_patches"], video["video_processor_type"]) == (7, "InternVLVideoProcessor")


def test_a_chat_folder_has_the_tag_of_an_image_and_a_processor_for_one_tile(tmp_path: Path) -> None:
    write(tmp_path, "chat")
    message = {"role": "user", "content": [IMAGE, say("What?")]}
    text = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template([message], tokenize=False)
    assert text.endswith("<|im_start|>user\n<image>\nWhat?<|im_end|>\n")
    pixels = AutoImageProcessor.from_pretrained(tmp_path)(Image.new("RGB", (50, 90)), return_tensors="np")
    assert pixels["pixel_values"].shape == (1, 3, 32, 32)
    assert not (tmp_path / "processor_config.json").exists()
