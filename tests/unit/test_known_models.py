"""Configurations found by name: against the published sizes, and each by every way it can be given."""

import json
import shutil
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from transformers import InternVLConfig, InternVLVisionConfig, Qwen2Config

from internvl_core.checkpoint.manifest import CheckpointKind
from internvl_core.checkpoint.store import StageStore
from internvl_core.contract import CheckpointRef
from internvl_core.errors import ArgumentError, CheckpointNotFound
from internvl_core.model.chat_config import build_chat_config
from internvl_core.model.configs import SIZES_2_5, SIZES_3
from internvl_core.model.flops import NAMED_SHAPES, ModelShape
from internvl_core.model.internvl import InternVLForTraining
from internvl_core.model.known_models import find_config, find_known, join_parts

NAMES = [
    f"OpenGVLab/InternVL{kind}-{size.upper()}" for kind, sizes in (("2_5", SIZES_2_5), ("3", SIZES_3)) for size in sizes
]

# Of the models' cards on the hub, which show what their safetensors hold.
PUBLISHED_BILLIONS = {
    "OpenGVLab/InternVL2_5-1B": 0.938,
    "OpenGVLab/InternVL2_5-2B": 2.21,
    "OpenGVLab/InternVL2_5-4B": 3.71,
    "OpenGVLab/InternVL2_5-8B": 8.08,
    "OpenGVLab/InternVL2_5-26B": 25.5,
    "OpenGVLab/InternVL2_5-38B": 38.4,
    "OpenGVLab/InternVL2_5-78B": 78.4,
    "OpenGVLab/InternVL3-1B": 0.938,
    "OpenGVLab/InternVL3-2B": 2.09,
    "OpenGVLab/InternVL3-8B": 7.94,
    "OpenGVLab/InternVL3-9B": 9.14,
    "OpenGVLab/InternVL3-14B": 15.1,
    "OpenGVLab/InternVL3-38B": 38.4,
    "OpenGVLab/InternVL3-78B": 78.4,
}


def count_parameters(config: InternVLConfig) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in InternVLForTraining(config).parameters())


def publish(store: Path, folder: Path) -> CheckpointRef:
    stage = StageStore(f"file://{store}", "stage", "0" * 64)
    return stage.publish(folder, step=1, fence=1, kind=CheckpointKind.FINAL, parent=None, info={})


def write_config(folder: Path, content: dict[str, Any]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_config_has_as_many_parameters_as_its_model(name: str) -> None:
    assert float(f"{count_parameters(find_config(name)) / 1e9:.3g}") == PUBLISHED_BILLIONS[name]


def test_each_size_of_both_families_ships() -> None:
    assert set(NAMES) == set(PUBLISHED_BILLIONS)


@pytest.mark.parametrize("suffix", ["", "-hf", "-Instruct", "-Pretrained", "-MPO", "-MPO-hf"])
def test_the_variants_of_a_model_have_its_config(suffix: str) -> None:
    assert find_config(f"OpenGVLab/InternVL3-8B{suffix}").to_dict() == find_config("OpenGVLab/InternVL3-8B").to_dict()


@pytest.mark.parametrize("name", ["OpenGVLab/InternVL3-4B", "OpenGVLab/InternVL2_5-14B", "OpenGVLab/InternVL4-8B"])
def test_no_config_ships_for_what_was_never_released(name: str) -> None:
    assert find_known(name) is None


@pytest.mark.parametrize("size", SIZES_2_5)
def test_the_named_shapes_are_those_of_the_shipped_configs(size: str) -> None:
    # Read without transformers there, and with it here.
    config = find_config(f"OpenGVLab/InternVL2_5-{size.upper()}")
    assert NAMED_SHAPES[size] == ModelShape.from_config(config)


@pytest.mark.parametrize(
    ("vision", "llm", "vocabulary"),
    [
        # Padded further than the nine tokens need, and never cut.
        ("OpenGVLab/InternViT-300M-448px-V2_5", "Qwen/Qwen2.5-0.5B-Instruct", 151936),
        ("OpenGVLab/InternViT-6B-448px-V2_5", "Qwen/Qwen2.5-72B-Instruct", 152064),
        # 92544 + 9, padded to a multiple of 64.
        ("OpenGVLab/InternViT-300M-448px", "internlm/internlm2_5-7b-chat", 92608),
        ("OpenGVLab/InternViT-6B-448px-V1-5", "internlm/internlm2_5-20b-chat", 92608),
        # Parts of whole models, whose tokenizers have the nine tokens.
        ("OpenGVLab/InternVL2_5-8B", "OpenGVLab/InternVL2_5-1B", 151680),
    ],
)
def test_parts_join_to_the_model_that_their_loading_would_make(vision: str, llm: str, vocabulary: int) -> None:
    config = join_parts(vision, llm, down_sample_ratio=0.5)
    assert config.text_config.vocab_size == vocabulary
    assert not config.tie_word_embeddings
    assert not config.text_config.tie_word_embeddings
    assert config.vision_config.hidden_size == (3200 if "6B" in vision else 1024)


def test_a_part_in_the_place_of_the_other_is_refused() -> None:
    tower, llm = "OpenGVLab/InternViT-300M-448px", "Qwen/Qwen2.5-0.5B"
    with pytest.raises(ArgumentError, match=r"vision_path: Qwen/Qwen2\.5-0\.5B is a qwen2 model"):
        join_parts(llm, llm, down_sample_ratio=0.5)
    with pytest.raises(ArgumentError, match="llm_path: OpenGVLab/InternViT-300M-448px is a internvl_vision model"):
        join_parts(tower, tower, down_sample_ratio=0.5)


@pytest.mark.parametrize("name", ["OpenGVLab/InternVL2_5-2B", "OpenGVLab/InternVL2_5-26B", "OpenGVLab/InternVL3-8B"])
def test_a_folder_in_the_chat_format_has_the_same_parameters(name: str, tmp_path: Path) -> None:
    folder = write_config(tmp_path / "chat", build_chat_config(find_config(name)))
    assert count_parameters(find_config(str(folder))) == count_parameters(find_config(name))


def test_a_local_folder_wins_nothing_from_a_known_name_in_its_path(tmp_path: Path) -> None:
    config = Qwen2Config(hidden_size=48, num_hidden_layers=1, tie_word_embeddings=True)
    (tmp_path / "Qwen").mkdir()
    folder = write_config(tmp_path / "Qwen" / "Qwen2.5-0.5B", config.to_dict())
    found = find_config(str(folder))
    assert (found.hidden_size, found.tie_word_embeddings) == (48, False)


def test_the_config_of_a_committed_checkpoint_is_read_from_its_store(tmp_path: Path) -> None:
    content = find_config("OpenGVLab/InternVL2_5-4B").to_dict()
    folder = write_config(tmp_path / "model", content)
    for name in (publish(tmp_path / "store", folder).uri, str(folder)):
        assert ModelShape.from_config(find_config(name)) == NAMED_SHAPES["4b"]


def test_a_folder_that_nobody_committed_is_read_too_but_no_uncommitted_save(tmp_path: Path) -> None:
    tower = InternVLVisionConfig(hidden_size=48).to_dict()
    folder = write_config(tmp_path / "tower", tower)
    remote = fsspec.filesystem("memory")
    remote.pipe_file("/known/tower/config.json", (folder / "config.json").read_bytes())
    remote.pipe_file("/known/weights/model.safetensors", b"")
    for uri in (f"file://{folder}", "memory://known/tower"):
        assert find_config(uri).hidden_size == 48
    with pytest.raises(ArgumentError, match=r"known/weights has no config\.json"):
        find_config("memory://known/weights")
    with pytest.raises(ArgumentError, match="no such folder"):
        find_config(f"file://{tmp_path}/nowhere")
    save = publish(tmp_path / "store", folder)
    shutil.rmtree(Path(save.uri.removeprefix("file://")).parents[1] / "commits")
    with pytest.raises(CheckpointNotFound):
        find_config(save.uri)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "has no config.json"),
        ("[1]", "holds a list; it should be an object"),
        ("{", "is not JSON"),
        ('{"model_type": "abacus"}', "is of an unknown kind, 'abacus'"),
    ],
)
def test_what_is_no_config_is_told(content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ArgumentError, match=message):
        find_config(str(tmp_path))


def test_a_folder_that_is_missing_is_told() -> None:
    with pytest.raises(ArgumentError, match="/nowhere/model does not exist"):
        find_config("/nowhere/model")
