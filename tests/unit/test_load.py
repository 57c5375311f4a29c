import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_internvl import build_tiles
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from internvl_core.arguments import DataTrainingArguments, ModelArguments
from internvl_core.checkpoint.base_model import BaseModel, write_base
from internvl_core.checkpoint.manifest import CheckpointKind
from internvl_core.checkpoint.store import StageStore
from internvl_core.errors import ArgumentError, CheckpointCorrupt
from internvl_core.model.adapters import save_adapter
from internvl_core.model.load import LoadedModel, build_model, load_checkpoint, load_model
from internvl_core.model.sources import describe_base
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


def assemble(components: Path, **changes: object) -> LoadedModel:
    """Build by Path B; changes to the arguments of either group."""
    torch.manual_seed(0)
    given = {"vision_path": str(components / "vision"), "llm_path": str(components / "llm"), **changes}
    model = {name: value for name, value in given.items() if name in ModelArguments.__dataclass_fields__}
    data = {name: value for name, value in given.items() if name not in model}
    return build_model(
        ModelArguments(**model),
        DataTrainingArguments(**{"force_image_size": TILE_SIZE, **data}),
        cache_dir=components,
        dtype=torch.float32,
    )


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
    quarter = assemble(components, down_sample_ratio=0.25)
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
    model = assemble(components, llm_path=str(tied_llm)).model
    assert model.get_input_embeddings().num_embeddings == model.lm_head.out_features == 1000


def test_a_tied_language_model_is_untied_for_good(components: Path, tied_llm: Path, tmp_path: Path) -> None:
    # F29: stage 1 began tied and later stages were not.
    loaded = assemble(components, llm_path=str(tied_llm))
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


def test_a_checkpoint_of_another_ratio_is_refused(checkpoint: Path) -> None:
    with pytest.raises(ArgumentError, match=r"down_sample_ratio: 1.0, but the model has 0.5") as refusal:
        build(checkpoint, down_sample_ratio=1.0)
    check_one_line(refusal)
    assert str(checkpoint) in str(refusal.value)


def test_tiles_of_another_size_resize_the_position_embedding_on_both_paths(components: Path, checkpoint: Path) -> None:
    small = assemble(components).model.model.vision_tower.embeddings.position_embeddings
    for loaded in (assemble(components, force_image_size=64), build(checkpoint, force_image_size=64)):
        tower = loaded.model.model.vision_tower
        assert tower.config.image_size == (64, 64)
        assert loaded.tokens_per_tile == 16
        resized = tower.embeddings.position_embeddings
        assert resized.shape == (1, 65, 16)
        torch.testing.assert_close(resized[:, :1], small[:, :1], rtol=0, atol=0)
        # What the native tower would compute in every forward for tiles of this size.
        expected = tower.embeddings.interpolate_pos_encoding(torch.empty(1, 65, 16), 64, 64)
        torch.testing.assert_close(resized, expected)
        grid = small[:, 1:].unflatten(1, (4, 4))
        assert resized.std() < 2 * grid.std()
        features = loaded.model.get_image_features(pixel_values=torch.randn(2, 3, 64, 64)).pooler_output
        assert features.shape == (2, 16, 16)


def test_a_resized_position_embedding_is_that_of_the_forward_that_interpolates(components: Path) -> None:
    tower = assemble(components).model.model.vision_tower
    pixels = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    resized = assemble(components, force_image_size=64).model.model.vision_tower
    torch.testing.assert_close(resized(pixels).last_hidden_state, tower(pixels).last_hidden_state)


def test_tiles_that_are_no_whole_number_of_tokens_are_refused(components: Path) -> None:
    with pytest.raises(ArgumentError, match=r"force_image_size: 40 px is no whole number .* Nearest: 32") as refusal:
        assemble(components, force_image_size=40)
    check_one_line(refusal)


def test_a_folder_of_another_model_is_refused(components: Path) -> None:
    with pytest.raises(ArgumentError, match="holds a qwen2 model, not an InternVL") as refusal:
        build(components / "llm")
    check_one_line(refusal)
    with pytest.raises(ArgumentError, match=r"vision_path: .* holds a qwen2 model, not an InternViT") as refusal:
        assemble(components, vision_path=str(components / "llm"))
    check_one_line(refusal)
    with pytest.raises(
        ArgumentError, match=r"llm_path: .*vision holds a internvl_vision model, not a language"
    ) as refusal:
        assemble(components, llm_path=str(components / "vision"))
    check_one_line(refusal)


def test_the_directory_of_a_stage_is_told_from_a_model(checkpoint: Path, tmp_path: Path) -> None:
    store = StageStore(f"file://{tmp_path}/store", "stage2", "0" * 64)
    shutil.copytree(checkpoint, tmp_path / "base")
    publish(store, tmp_path / "base", 1)
    folder = Path(store.uri.removeprefix("file://"))
    with pytest.raises(ArgumentError, match=f"is a stage's directory in a store. Give it as {store.uri}") as refusal:
        build(folder)
    check_one_line(refusal)
    assert load_model(store.uri, cache_dir=tmp_path).config.text_config.vocab_size > 0


@pytest.mark.parametrize("layer", [0, 3, -3])
def test_a_layer_that_the_tower_does_not_have_is_refused(checkpoint: Path, layer: int) -> None:
    given = ModelArguments(model_name_or_path=str(checkpoint), vision_select_layer=layer)
    with pytest.raises(ArgumentError, match=f"vision_select_layer: {layer}, but the vision tower has 2 layers"):
        build_model(given, DATA, cache_dir=checkpoint, dtype=torch.float32)


def test_a_folder_without_a_model_is_refused(components: Path, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"model_name_or_path: .* has no config.json") as refusal:
        build(tmp_path)
    check_one_line(refusal)
    with pytest.raises(ArgumentError, match=r"vision_path: .*missing does not exist") as refusal:
        assemble(components, vision_path=str(tmp_path / "missing"))
    check_one_line(refusal)


def test_weights_that_are_not_those_of_the_config_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    weights = load_file(file)
    save_file({name: tensor for name, tensor in weights.items() if "layer.0" not in name}, file)
    with pytest.raises(ArgumentError, match=r"encoder.layer.0.attention.\w+.bias, .* and \d+ more: missing") as refusal:
        build(tmp_path / "model")
    check_one_line(refusal)
    save_file({**weights, "vision_tower.extra": torch.zeros(1)}, file)
    with pytest.raises(ArgumentError, match=r"model.vision_tower.extra: no part of the model"):
        build(tmp_path / "model")
    save_file({**weights, "language_model.lm_head.weight": torch.zeros(1, 16)}, file)
    with pytest.raises(ArgumentError, match=r"lm_head.weight is \[1, 16\], but the configuration makes it \["):
        build(tmp_path / "model")


def test_a_part_may_be_taken_out_of_a_whole_model(components: Path, checkpoint: Path) -> None:
    whole = build(checkpoint)
    for changes in ({"vision_path": str(checkpoint)}, {"llm_path": str(checkpoint)}):
        loaded = assemble(components, **changes)
        part = "vision_tower" if "vision_path" in changes else "language_model"
        expected = getattr(whole.model.model, part).state_dict()
        found = getattr(loaded.model.model, part).state_dict()
        assert found.keys() == expected.keys()
        # Rows behind the last token are padding.
        num_tokens = len(whole.tokenizer)
        assert all(torch.equal(found[name][:num_tokens], tensor[:num_tokens]) for name, tensor in expected.items())
        assert len(loaded.tokenizer) == len(whole.tokenizer)
        assert loaded.model.config.image_token_id == whole.model.config.image_token_id


def test_a_projector_comes_from_a_whole_model_or_a_file_of_its_own(
    components: Path, checkpoint: Path, tmp_path: Path
) -> None:
    projector = build(checkpoint).model.model.multi_modal_projector.state_dict()
    torch.manual_seed(1)
    fresh = build_model(
        ModelArguments(vision_path=str(components / "vision"), llm_path=str(components / "llm")),
        DATA,
        cache_dir=tmp_path,
        dtype=torch.float32,
    )
    assert not torch.equal(fresh.model.model.multi_modal_projector.linear_1.weight, projector["linear_1.weight"])
    numbers = {"layer_norm": "0", "linear_1": "1", "linear_2": "3"}
    original = {f"{numbers[name.split('.')[0]]}.{name.split('.')[1]}": tensor for name, tensor in projector.items()}
    torch.save(original, tmp_path / "mlp_projector.pth")
    save_file(
        {f"multi_modal_projector.{name}": tensor for name, tensor in projector.items()}, tmp_path / "p.safetensors"
    )
    remote = fsspec.filesystem("memory")
    remote.put(str(tmp_path / "p.safetensors"), "/projectors/p.safetensors")
    places = (
        checkpoint,
        tmp_path / "mlp_projector.pth",
        tmp_path / "p.safetensors",
        "memory://projectors/p.safetensors",
    )
    for path in places:
        found = assemble(components, mlp_path=str(path)).model.model.multi_modal_projector.state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in projector.items())


def test_a_projector_that_does_not_fit_is_refused(components: Path, tmp_path: Path) -> None:
    names = [f"{part}.{kind}" for part in (0, 1, 3) for kind in ("weight", "bias")]
    for case, tensors, message in (
        ("small", {name: torch.zeros(3) for name in names}, r"small.pth: .* is \[3\], but between these two parts"),
        ("half", {name: torch.zeros(3) for name in names[:-1]}, r"linear_2.bias is missing \(1 such"),
        ("empty", {}, r"is missing \(6 such"),
        ("other", {name: torch.zeros(3) for name in [*names, "5.weight"]}, r"5.weight is no part of one"),
        ("text", dict.fromkeys(names, "text"), r"text.pth cannot be read"),
    ):
        torch.save(tensors, tmp_path / f"{case}.pth")
        with pytest.raises(ArgumentError, match=message) as refusal:
            assemble(components, mlp_path=str(tmp_path / f"{case}.pth"))
        check_one_line(refusal)
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(ArgumentError, match=r"mlp_path: .*text.pth cannot be read") as refusal:
        assemble(components, mlp_path=str(tmp_path / "text.pth"))
    check_one_line(refusal)


def test_the_first_pixel_shuffle_swaps_rows_and_columns_of_the_second(components: Path) -> None:
    # Reference 2.3.
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    first, second = (
        assemble(components, force_image_size=64, ps_version=version).model.get_image_features(pixel_values=pixels)
        for version in ("v1", "v2")
    )
    grid = second.pooler_output.unflatten(1, (4, 4))
    torch.testing.assert_close(first.pooler_output.unflatten(1, (4, 4)), grid.transpose(1, 2))
    assert not torch.equal(first.pooler_output, second.pooler_output)


def test_another_pixel_shuffle_than_the_models_is_refused(checkpoint: Path) -> None:
    with pytest.raises(ArgumentError, match=r"ps_version: v1, but the model was trained with v2") as refusal:
        build_model(
            ModelArguments(model_name_or_path=str(checkpoint), ps_version="v1"),
            DATA,
            cache_dir=checkpoint,
            dtype=torch.float32,
        )
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


def publish(store: StageStore, folder: Path, step: int) -> BaseModel:
    committed = store.publish(folder, step=step, fence=1, kind=CheckpointKind.FINAL, parent=None, info={})
    return BaseModel("checkpoint", committed.uri, committed.digest)


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


def test_an_adapter_is_opened_in_the_model_that_it_was_trained_in(checkpoint: Path, tmp_path: Path) -> None:
    # Tiles, layer and chat format are the stage's own; an adapter holds no word of them.
    given = ModelArguments(model_name_or_path=str(checkpoint), vision_select_layer=-2)
    data = DataTrainingArguments(force_image_size=64, conv_style="internvl2_5", max_dynamic_patch=3)
    trained = build_model(given, data, cache_dir=tmp_path, dtype=torch.float32)
    adapted = train_adapter(trained, seed=0).eval()
    pixels = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    expected = adapted.get_base_model().get_image_features(pixel_values=pixels).pooler_output
    save_adapter(adapted, tmp_path / "adapter")
    trained.model.config.save_pretrained(tmp_path / "adapter")
    write_base(tmp_path / "adapter", describe_base(str(checkpoint), tmp_path))
    again = load_checkpoint(str(tmp_path / "adapter"), cache_dir=tmp_path)
    found = again.model.get_image_features(pixel_values=pixels).pooler_output
    torch.testing.assert_close(found, expected)
    assert again.tokens_per_tile == trained.tokens_per_tile == 16
    assert again.model.config.chat_settings == trained.model.config.chat_settings


def test_an_adapter_over_a_folder_knows_it_by_its_content(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "base")
    adapted = train_adapter(build(tmp_path / "base"), seed=0)
    save_adapter(adapted, tmp_path / "adapter")
    write_base(tmp_path / "adapter", describe_base(str(tmp_path / "base"), tmp_path))
    torch.testing.assert_close(compute_logits(build(tmp_path / "adapter").model), compute_logits(adapted))
    (tmp_path / "base" / "notes.txt").write_text("changed")
    with pytest.raises(CheckpointCorrupt, match="is no longer what the adapter was trained over") as refusal:
        build(tmp_path / "adapter")
    assert "\n" not in str(refusal.value)


def test_a_state_to_resume_from_is_no_model(checkpoint: Path, tmp_path: Path) -> None:
    adapted = set_trainable(build(checkpoint).model, ModelArguments(freeze_llm=False, use_llm_lora=2))
    save_adapter(adapted, tmp_path / "adapter")
    with pytest.raises(ArgumentError, match="is a state to resume from"):
        build(tmp_path / "adapter")


def test_a_tokenizer_with_more_tokens_than_rows_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    name = "language_model.model.embed_tokens.weight"
    num_rows = build(checkpoint).model.config.image_token_id
    save_file({**weights, name: weights[name][:num_rows].clone()}, tmp_path / "model" / "model.safetensors")
    with pytest.raises(ArgumentError, match=rf"is token \d+, but the embeddings have {num_rows} rows") as refusal:
        build(tmp_path / "model")
    check_one_line(refusal)


def test_a_language_model_with_fewer_rows_than_tokens_gets_them(
    components: Path, checkpoint: Path, tmp_path: Path
) -> None:
    # As the published native models are: their tokenizer has a token for videos that no row stands for.
    shutil.copytree(checkpoint, tmp_path / "model")
    whole = build(checkpoint)
    num_rows = len(whole.tokenizer)
    weights = load_file(tmp_path / "model" / "model.safetensors")
    for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        weights[name] = weights[name][:num_rows].clone()
    save_file(weights, tmp_path / "model" / "model.safetensors")
    whole.tokenizer.add_tokens(["<video>"], special_tokens=True)
    whole.tokenizer.save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["text_config"]["vocab_size"] = num_rows
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    loaded = assemble(components, llm_path=str(tmp_path / "model"))
    assert loaded.model.get_input_embeddings().num_embeddings >= len(loaded.tokenizer)


def test_a_saved_adapter_says_nothing_about_this_machine(checkpoint: Path, tmp_path: Path) -> None:
    train_adapter(build(checkpoint), seed=0).save_pretrained(str(tmp_path))
    for path in (tmp_path / "adapter_config.json", tmp_path / "README.md"):
        assert str(checkpoint.parent) not in path.read_text()


def test_an_adapter_without_its_base_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    train_adapter(build(checkpoint), seed=0).save_pretrained(str(tmp_path))
    with pytest.raises(ArgumentError, match=re.escape("holds an adapter without base_checkpoint.json")) as refusal:
        build(tmp_path)
    check_one_line(refusal)
