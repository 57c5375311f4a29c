import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from tiny_internvl import build_tiles
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from internvl_core.arguments import DataTrainingArguments, ModelArguments
from internvl_core.checkpoint.manifest import CheckpointKind
from internvl_core.checkpoint.store import StageStore
from internvl_core.errors import ArgumentError
from internvl_core.model.load import (
    LoadedModel,
    assemble_components,
    build_model,
    load_checkpoint,
    write_base,
)
from internvl_core.model.trainable import list_trainable, set_trainable
from internvl_core.smoke.components import ComponentsSettings, generate_components

pytestmark = pytest.mark.filterwarnings(
    # PEFT 0.21 asks transformers 5.23 by an old name.
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
)

SPECIAL_TOKENS = ["<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>"]
TILE_SIZE = 32
DATA = DataTrainingArguments(force_image_size=TILE_SIZE)


@pytest.fixture(scope="module")
def components(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("components")
    turns = [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "A cat."}]
    (folder / "pets.jsonl").write_text(json.dumps({"conversations": turns}) + "\n")
    settings = ComponentsSettings(hidden_size=16, num_attention_heads=2)
    generate_components(folder / "out", folder, settings)
    return folder / "out"


@pytest.fixture(scope="module")
def tied_llm(components: Path) -> Path:
    """The same language model, its head tied to its embeddings, with more rows than its tokenizer needs."""
    folder = components.parent / "tied"
    llm = AutoModelForCausalLM.from_pretrained(components / "llm", tie_word_embeddings=True)
    llm.resize_token_embeddings(1000)
    llm.tie_weights()
    llm.save_pretrained(folder)
    AutoTokenizer.from_pretrained(components / "llm").save_pretrained(folder)
    assert llm.lm_head.weight is llm.model.embed_tokens.weight
    return folder


@pytest.fixture(scope="module")
def checkpoint(components: Path) -> Path:
    """A whole model, saved."""
    loaded = assemble(components)
    folder = components.parent / "whole"
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    return folder


def assemble(components: Path, *, llm: Path | None = None) -> LoadedModel:
    torch.manual_seed(0)
    return assemble_components(str(components / "vision"), str(llm or components / "llm"), force_image_size=TILE_SIZE)


@torch.no_grad()
def compute_logits(model: nn.Module) -> Tensor:
    context = model.config.image_token_id
    input_ids = torch.tensor([[5, *[context] * 8, 7, 8, 9]])
    return model.eval()(input_ids=input_ids, pixel_values=build_tiles(2)).logits


def build(folder: Path, **arguments: object) -> LoadedModel:
    return build_model(
        ModelArguments(model_name_or_path=str(folder)),
        DataTrainingArguments(**{"force_image_size": TILE_SIZE, **arguments}),
        cache_dir=folder.parent / "cache",
        dtype=torch.float32,
    )


def check_one_line(refusal: pytest.ExceptionInfo[ArgumentError]) -> None:
    assert "\n" not in str(refusal.value)


def test_components_get_the_nine_tokens_in_order(components: Path) -> None:
    old = len(AutoTokenizer.from_pretrained(components / "llm"))
    loaded = assemble(components)
    assert loaded.tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS) == list(range(old, old + 9))
    assert loaded.model.config.image_token_id == old + 2
    assert loaded.tokenizer.tokenize("a<IMG_CONTEXT><box>") == ["a", "<IMG_CONTEXT>", "<box>"]


def test_tokens_per_tile_follow_from_the_tower_and_the_ratio(components: Path) -> None:
    assert assemble(components).tokens_per_tile == 4
    quarter = assemble_components(
        str(components / "vision"), str(components / "llm"), force_image_size=TILE_SIZE, down_sample_ratio=0.25
    )
    assert quarter.tokens_per_tile == 1
    assert quarter.model.get_image_features(pixel_values=build_tiles(3)).pooler_output.shape == (3, 1, 16)


def test_new_rows_are_the_mean_of_the_old_ones_on_both_sides(components: Path) -> None:
    # F30: the original leaves new input rows random.
    llm = AutoModelForCausalLM.from_pretrained(components / "llm")
    old = len(AutoTokenizer.from_pretrained(components / "llm"))
    model = assemble(components).model
    for before, after in (
        (llm.get_input_embeddings(), model.get_input_embeddings()),
        (llm.get_output_embeddings(), model.get_output_embeddings()),
    ):
        torch.testing.assert_close(after.weight[:old], before.weight[:old], rtol=0, atol=0)
        torch.testing.assert_close(after.weight[old:], before.weight[:old].mean(dim=0).expand_as(after.weight[old:]))


def test_the_vocabulary_is_a_multiple_of_64(components: Path) -> None:
    loaded = assemble(components)
    size = loaded.model.get_input_embeddings().num_embeddings
    assert size % 64 == 0
    assert len(loaded.tokenizer) <= size < len(loaded.tokenizer) + 64
    assert size == loaded.model.lm_head.out_features == loaded.model.config.text_config.vocab_size


def test_the_vocabulary_is_never_shrunk(components: Path, tied_llm: Path) -> None:
    model = assemble(components, llm=tied_llm).model
    assert model.get_input_embeddings().num_embeddings == model.lm_head.out_features == 1000


def test_a_tied_language_model_is_untied_for_good(components: Path, tied_llm: Path, tmp_path: Path) -> None:
    # F29: stage 1 began tied and later stages were not.
    loaded = assemble(components, llm=tied_llm)
    model = loaded.model
    assert not model.config.tie_word_embeddings
    assert not model.config.text_config.tie_word_embeddings
    assert model.lm_head.weight is not model.get_input_embeddings().weight
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    model.save_pretrained(tmp_path)
    loaded.tokenizer.save_pretrained(tmp_path)
    for again in (load_checkpoint(str(tmp_path), cache_dir=tmp_path).model, load_plain(tmp_path)):
        torch.testing.assert_close(again.lm_head.weight, model.lm_head.weight, rtol=0, atol=0)
        assert not torch.equal(again.lm_head.weight, again.get_input_embeddings().weight)


def load_plain(folder: Path) -> nn.Module:
    return AutoModelForImageTextToText.from_pretrained(folder)


def load_path_a(folder: Path) -> nn.Module:
    return load_checkpoint(str(folder), cache_dir=folder).model


@pytest.mark.parametrize("load", [load_path_a, load_plain])
def test_a_saved_model_computes_the_same(components: Path, checkpoint: Path, load: Callable[[Path], nn.Module]) -> None:
    expected = compute_logits(assemble(components).model)
    torch.testing.assert_close(compute_logits(load(checkpoint)), expected, rtol=0, atol=0)


def test_a_saved_folder_is_plain_transformers_in_the_published_layout(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    assert config["architectures"] == ["InternVLForConditionalGeneration"]
    assert json.loads((checkpoint / "generation_config.json").read_text())["eos_token_id"] is not None
    assert load_plain(checkpoint).__class__.__module__.startswith("transformers.")


def test_a_saved_folder_says_nothing_about_this_machine(components: Path, checkpoint: Path, tmp_path: Path) -> None:
    again = load_checkpoint(str(checkpoint), cache_dir=tmp_path)
    again.model.save_pretrained(tmp_path)
    again.tokenizer.save_pretrained(tmp_path)
    for folder in (checkpoint, tmp_path):
        for path in folder.glob("*.json"):
            assert str(components.parent) not in path.read_text(), path
            assert (tmp_path / path.name).read_text() == (checkpoint / path.name).read_text()


def test_the_selected_layer_and_drop_path_come_from_the_arguments(checkpoint: Path) -> None:
    loaded = build_model(
        ModelArguments(model_name_or_path=str(checkpoint), vision_select_layer=-2, drop_path_rate=0.5),
        DATA,
        cache_dir=checkpoint,
        dtype=torch.bfloat16,
    )
    assert loaded.model.config.vision_feature_layer == -2
    assert loaded.model.dtype == torch.bfloat16
    layers = loaded.model.model.vision_tower.encoder.layer
    assert [len(layer.mlp._forward_hooks) for layer in layers] == [0, 1]
    assert not torch.equal(compute_logits(loaded.model.float()), compute_logits(build(checkpoint).model))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"force_image_size": 448}, "force_image_size: 448, but the model has tiles of 32 px"),
        ({"down_sample_ratio": 1.0}, r"down_sample_ratio: 1.0, but the model has 0.5"),
    ],
)
def test_a_checkpoint_that_differs_from_the_arguments_is_refused(
    checkpoint: Path, arguments: dict[str, object], message: str
) -> None:
    with pytest.raises(ArgumentError, match=message) as refusal:
        build(checkpoint, **arguments)
    check_one_line(refusal)
    assert str(checkpoint) in str(refusal.value)


def test_a_tower_of_another_tile_size_is_refused(components: Path) -> None:
    with pytest.raises(ArgumentError, match=r"force_image_size: 448, but the vision tower in .* has tiles of 32 px"):
        assemble_components(str(components / "vision"), str(components / "llm"))


def test_a_folder_of_another_model_is_refused(components: Path) -> None:
    with pytest.raises(ArgumentError, match="holds a qwen2 model, not transformers' native InternVL") as refusal:
        build(components / "llm")
    check_one_line(refusal)
    with pytest.raises(ArgumentError, match=r"vision_path: .* holds a qwen2 model, not an internvl_vision") as refusal:
        assemble_components(str(components / "llm"), str(components / "llm"))
    check_one_line(refusal)
    with pytest.raises(ArgumentError, match=r"llm_path: .*vision cannot be loaded") as refusal:
        assemble_components(str(components / "vision"), str(components / "vision"), force_image_size=TILE_SIZE)
    check_one_line(refusal)


def test_a_folder_without_a_model_is_refused(components: Path, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"model_name_or_path: .* cannot be loaded") as refusal:
        build(tmp_path)
    check_one_line(refusal)
    with pytest.raises(ArgumentError, match=r"vision_path: .*missing does not exist") as refusal:
        assemble_components(str(tmp_path / "missing"), str(components / "llm"))
    check_one_line(refusal)


def train_adapter(loaded: LoadedModel, seed: int) -> PeftModel:
    """Wrap a model in an adapter that has learnt something."""
    frozen = ModelArguments(freeze_llm=True, freeze_backbone=True, freeze_mlp=True, use_llm_lora=2, use_backbone_lora=4)
    adapted = set_trainable(loaded.model, frozen)
    assert isinstance(adapted, PeftModel)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1, generator=generator)
    return adapted


def publish(store: StageStore, folder: Path, step: int) -> object:
    return store.publish(folder, step=step, fence=1, kind=CheckpointKind.FINAL, parent=None, info={})


def test_an_adapter_is_loaded_merged_into_its_base_and_may_be_a_base_itself(checkpoint: Path, tmp_path: Path) -> None:
    store = StageStore(f"file://{tmp_path}/store", "stage2", "0" * 64)
    shutil.copytree(checkpoint, tmp_path / "base")
    base, plain = publish(store, tmp_path / "base", 1), compute_logits(build(checkpoint).model)
    for step in (2, 3):
        folder = tmp_path / f"adapter-{step}"
        adapted = train_adapter(build(tmp_path / "base" if step == 2 else tmp_path / "adapter-2"), seed=step)
        expected = compute_logits(adapted)
        adapted.save_pretrained(str(folder))
        write_base(folder, base)
        merged = build(folder)
        torch.testing.assert_close(compute_logits(merged.model), expected)
        assert not torch.allclose(expected, plain)
        assert not [name for name in list_trainable(merged.model) if "lora" in name]
        assert len(merged.tokenizer) == len(build(checkpoint).tokenizer)
        base = publish(store, folder, step)


def test_a_saved_adapter_says_nothing_about_this_machine(checkpoint: Path, tmp_path: Path) -> None:
    train_adapter(build(checkpoint), seed=0).save_pretrained(str(tmp_path))
    for path in (tmp_path / "adapter_config.json", tmp_path / "README.md"):
        assert str(checkpoint.parent) not in path.read_text()


def test_an_adapter_without_its_base_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    train_adapter(build(checkpoint), seed=0).save_pretrained(str(tmp_path))
    with pytest.raises(ArgumentError, match=re.escape("holds an adapter without base_checkpoint.json")) as refusal:
        build(tmp_path)
    check_one_line(refusal)
