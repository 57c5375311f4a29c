import json
from pathlib import Path

import pytest
import torch
from tiny_internvl import build_tiles, build_tiny_model
from transformers import (
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoTokenizer,
    InternVLForConditionalGeneration,
)

from internvl_core.data.text_encoder import load_text_encoder
from internvl_core.model.internvl import InternVLForTraining
from internvl_core.model.load import load_model
from internvl_core.model.save import save_model

TOKENIZER_FOLDER = Path(__file__).parents[1] / "data" / "tokenizer"
TOKENIZER = AutoTokenizer.from_pretrained(TOKENIZER_FOLDER)
IMAGE_TOKEN = TOKENIZER.convert_tokens_to_ids("<IMG_CONTEXT>")


def build(ps_version: str) -> InternVLForTraining:
    config = build_tiny_model(vocab_size=640, image_token=IMAGE_TOKEN).config
    config.ps_version = ps_version
    # A grid of 2 x 2 tokens, so that rows and columns differ.
    config.vision_config.image_size, config.image_seq_length = (32, 32), 4
    torch.manual_seed(0)
    return InternVLForTraining(config).eval()


@pytest.mark.parametrize(("ps_version", "model_type"), [("v1", "internvl_chat"), ("v2", "internvl")])
def test_a_saved_model_loads_with_its_pixel_shuffle(ps_version: str, model_type: str, tmp_path: Path) -> None:
    model = build(ps_version)
    save_model(model, TOKENIZER, tmp_path / "model")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["model_type"] == model_type
    # An index that was built for the components is the next stage's too.
    assert load_text_encoder(str(tmp_path / "model")).digest == load_text_encoder(str(TOKENIZER_FOLDER)).digest
    again = load_model(str(tmp_path / "model"))
    tiles = build_tiles(3)
    expected, found = (each.get_image_features(pixel_values=tiles).pooler_output for each in (model, again))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert again.state_dict().keys() == model.state_dict().keys()
    if ps_version == "v1":
        native = InternVLForConditionalGeneration(model.config).eval()
        native.load_state_dict(model.state_dict())
        assert not torch.equal(native.get_image_features(pixel_values=tiles).pooler_output, expected)
        with pytest.raises((OSError, ValueError, KeyError)):
            AutoModelForImageTextToText.from_pretrained(tmp_path / "model")


def test_a_saved_model_brings_all_that_generating_needs(tmp_path: Path) -> None:
    model = build("v2")
    state = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    save_model(model, TOKENIZER, tmp_path, state_dict=state)
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert torch.equal(plain.lm_head.weight, model.lm_head.weight + 1)
    assert plain.generation_config.eos_token_id == [TOKENIZER.convert_tokens_to_ids("<|im_end|>"), 2]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n")
    assert AutoImageProcessor.from_pretrained(tmp_path).size["height"] == 32


def test_a_saved_model_is_normalised_as_it_was_trained(tmp_path: Path) -> None:
    model = build("v2")
    model.config.chat_settings = {"normalize_type": "siglip"}
    save_model(model, TOKENIZER, tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    assert (list(processor.image_mean), list(processor.image_std)) == ([0.5] * 3, [0.5] * 3)
