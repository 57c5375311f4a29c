"""Whole models of the chat format, as everything else in the trainer gets them: through `load_model`."""

from pathlib import Path
from typing import Any

import pytest
import torch
from chat_reference import IMAGE_TOKEN, build_chat_checkpoint, compute_image_features, compute_logits
from safetensors.torch import load_file

from internvl_core.arguments import DataTrainingArguments, ModelArguments
from internvl_core.model.load import build_model, load_model
from internvl_core.model.sources import read_config

GOLDEN = Path(__file__).parents[1] / "data" / "golden"


@pytest.mark.parametrize("name", ["qwen2", "internlm2"])
@torch.no_grad()
def test_a_golden_checkpoint_computes_what_the_original_code_did(name: str) -> None:
    golden = load_file(GOLDEN / name / "golden.safetensors")
    model = load_model(str(GOLDEN / name))
    features = model.get_image_features(pixel_values=golden["pixel_values"]).pooler_output
    torch.testing.assert_close(features, golden["image_features"], atol=1e-4, rtol=0)
    output = model(input_ids=golden["input_ids"], pixel_values=golden["pixel_values"], labels=golden["labels"])
    torch.testing.assert_close(output.logits, golden["logits"], atol=1e-4, rtol=0)
    torch.testing.assert_close(output.loss, golden["loss"].squeeze(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("llm", ["qwen2", "internlm2", "llama"])
@pytest.mark.parametrize("vit", ["300m", "6b"])
@pytest.mark.parametrize("ps_version", ["v1", "v2"])
@torch.no_grad()
def test_every_kind_of_checkpoint_computes_what_the_reference_says(
    llm: str, vit: str, ps_version: str, tmp_path: Path
) -> None:
    build_chat_checkpoint(tmp_path, llm=llm, vit=vit, ps_version=ps_version)
    config, state = read_config(tmp_path, argument="path"), load_file(tmp_path / "model.safetensors")
    model = load_model(tmp_path.as_uri())
    side = config["vision_config"]["image_size"]
    tiles = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    expected = compute_image_features(state, config, tiles)
    torch.testing.assert_close(model.get_image_features(pixel_values=tiles).pooler_output, expected, atol=1e-4, rtol=0)
    input_ids = torch.tensor([5, *[IMAGE_TOKEN] * expected.shape[0] * expected.shape[1], 7, 8, 9])
    logits = model(input_ids=input_ids[None], pixel_values=tiles).logits[0]
    torch.testing.assert_close(logits, compute_logits(state, config, input_ids, tiles), atol=1e-3, rtol=1e-3)


def test_a_checkpoint_of_the_first_pixel_shuffle_is_built_for_training(tmp_path: Path) -> None:
    build_chat_checkpoint(tmp_path, ps_version="v1")
    data: dict[str, Any] = {"force_image_size": read_config(tmp_path, argument="path")["vision_config"]["image_size"]}
    loaded = build_model(
        ModelArguments(model_name_or_path=str(tmp_path), ps_version="v1"),
        DataTrainingArguments(**data, conv_style="internvl2_5", max_dynamic_patch=7),
        cache_dir=tmp_path,
        dtype=torch.bfloat16,
    )
    assert loaded.model.config.ps_version == "v1"
    assert loaded.model.config.chat_settings["max_dynamic_patch"] == 7
    assert loaded.model.dtype == torch.bfloat16
    assert loaded.model.model.language_model.rotary_emb.inv_freq.dtype == torch.float32


def test_another_chat_format_or_layer_than_the_model_was_trained_with_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    build_chat_checkpoint(tmp_path, select_layer=-2)
    size = read_config(tmp_path, argument="path")["vision_config"]["image_size"]
    for given, told in (({}, True), ({"conv_style": "internvl2_5", "vision_select_layer": -2}, False)):
        caplog.clear()
        build_model(
            ModelArguments(model_name_or_path=str(tmp_path), vision_select_layer=given.get("vision_select_layer", -1)),
            DataTrainingArguments(force_image_size=size, conv_style=given.get("conv_style", "internlm2-chat")),
            cache_dir=tmp_path,
            dtype=torch.float32,
        )
        assert ("conv_style: internlm2-chat, but " in caplog.text) is told
        assert ("vision_select_layer: -1, but " in caplog.text) is told
