"""Tokenizer and tile length of a model that is not loaded."""

import json
import shutil
import uuid
from pathlib import Path
from typing import Any

import fsspec
import pytest

from internvl_core.checkpoint.base_model import BaseModel, write_base
from internvl_core.checkpoint.manifest import CheckpointKind
from internvl_core.checkpoint.store import StageStore
from internvl_core.contract import CheckpointRef
from internvl_core.data.text_encoder import load_text_encoder
from internvl_core.errors import ArgumentError, CheckpointNotFound
from internvl_core.inspection.lint_report import TokenizerSource
from internvl_core.inspection.tokenizer_source import count_tokens_per_tile, load_encoder

TOKENIZER = Path(__file__).parents[1] / "data" / "tokenizer"


def write_model(folder: Path, config: Any) -> str:
    shutil.copytree(TOKENIZER, folder)
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    (folder / "model.safetensors").write_bytes(b"weights")
    return str(folder)


def commit(folder: Path, model: str, *, name: str = "stage1") -> CheckpointRef:
    store = StageStore(f"file://{folder}/store", name, "0" * 64)
    return store.publish(Path(model), step=1, fence=1, kind=CheckpointKind.FINAL, parent=None, info={})


def count(source: TokenizerSource | None, cache_dir: Path, *, size: int = 448, ratio: float = 0.5) -> int:
    return count_tokens_per_tile(source, {"force_image_size": size, "down_sample_ratio": ratio}, cache_dir)


@pytest.mark.parametrize(
    ("config", "tokens"),
    [
        ({"vision_config": {"patch_size": 14}}, 256),
        ({"vision_config": {"patch_size": [16, 16]}}, 196),
        ({"patch_size": 28}, 64),
        ({"patch_size": [14, 14]}, 256),
        ({"hidden_size": 64}, 256),
    ],
    ids=str,
)
def test_the_config_names_the_patch_size(tmp_path: Path, config: dict[str, Any], tokens: int) -> None:
    assert count(TokenizerSource(write_model(tmp_path / "model", config)), tmp_path) == tokens


def test_the_vision_tower_speaks_for_itself(tmp_path: Path) -> None:
    llm = write_model(tmp_path / "llm", {"hidden_size": 64})
    vision = write_model(tmp_path / "vision", {"patch_size": 8})
    assert count(TokenizerSource(llm, vision), tmp_path, size=32) == 4
    assert count(TokenizerSource(llm, vision), tmp_path, size=32, ratio=1.0) == 16


def test_nobody_to_ask_means_the_usual_patch(tmp_path: Path) -> None:
    assert count(None, tmp_path) == 256
    assert count(TokenizerSource(str(TOKENIZER)), tmp_path) == 256


def test_a_tile_that_is_not_whole_patches_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"^force_image_size: 450 px is not a whole .*Nearest: 448"):
        count(None, tmp_path, size=450)


@pytest.mark.parametrize("config", ["{", "[]", {"patch_size": "14"}, {"patch_size": 0}, {"patch_size": True}], ids=str)
def test_a_config_that_is_none_is_refused(tmp_path: Path, config: Any) -> None:
    with pytest.raises(ArgumentError, match=r"config\.json"):
        count(TokenizerSource(write_model(tmp_path / "model", config)), tmp_path)


def test_of_a_checkpoint_no_weight_is_fetched(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", {"vision_config": {"patch_size": 16}})
    source = TokenizerSource(commit(tmp_path, model).uri)
    shutil.rmtree(model)
    encoder = load_encoder(source, tmp_path / "cache")
    assert encoder.digest == load_text_encoder(str(TOKENIZER)).digest
    assert count(source, tmp_path / "cache") == 196
    copied = {path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()}
    assert "tokenizer.json" in copied
    assert "model.safetensors" not in copied


def test_of_a_plain_remote_folder_no_weight_is_fetched_and_no_file_twice(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", {"vision_config": {"patch_size": 16}})
    uri = f"memory://{uuid.uuid4().hex}/model"
    filesystem, root = fsspec.core.url_to_fs(uri)
    filesystem.put(f"{model}/", f"{root}/", recursive=True)
    for _ in range(2):
        assert load_encoder(TokenizerSource(uri), tmp_path / "cache").digest == load_text_encoder(str(TOKENIZER)).digest
        assert count(TokenizerSource(uri), tmp_path / "cache") == 196
    copied = [path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert sorted(copied) == sorted(path.name for path in Path(model).iterdir() if path.name != "model.safetensors")
    filesystem.pipe_file(f"{root}/config.json", b'{"vision_config": {"patch_size": 28}}')
    assert count(TokenizerSource(uri), tmp_path / "cache") == 64


@pytest.mark.parametrize("kind", ["checkpoint", "folder"])
@pytest.mark.parametrize("place", ["folder", "store", "bucket"])
def test_an_adapter_has_the_tokenizer_and_the_tower_of_its_base(tmp_path: Path, kind: str, place: str) -> None:
    model = write_model(tmp_path / "model", {"vision_config": {"patch_size": 16}})
    committed = commit(tmp_path, model)
    base = BaseModel("checkpoint", committed.uri, committed.digest)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    write_base(adapter, base if kind == "checkpoint" else BaseModel("folder", model, "0" * 64))
    uri = str(adapter)
    if place == "store":
        uri = commit(tmp_path, str(adapter), name="finetune").uri
    elif place == "bucket":
        uri = f"memory://{uuid.uuid4().hex}/adapter"
        filesystem, root = fsspec.core.url_to_fs(uri)
        filesystem.put(f"{adapter}/", f"{root}/", recursive=True)
    assert count(TokenizerSource(uri), tmp_path / "cache") == 196
    assert load_encoder(TokenizerSource(uri), tmp_path / "cache").digest == load_text_encoder(str(TOKENIZER)).digest


def test_a_checkpoint_that_was_never_committed_is_refused(tmp_path: Path) -> None:
    save = commit(tmp_path, write_model(tmp_path / "model", {"hidden_size": 64}))
    stage = Path(save.uri.removeprefix("file://")).parents[1]
    shutil.rmtree(stage / "commits")
    for uri in (save.uri, f"file://{stage}"):
        with pytest.raises(CheckpointNotFound):
            load_encoder(TokenizerSource(uri), tmp_path / "cache")


def test_a_uri_with_nothing_behind_it_is_refused(tmp_path: Path) -> None:
    for uri in (f"file://{tmp_path}/model", "memory://nothing/here"):
        with pytest.raises(ArgumentError, match="no such folder"):
            load_encoder(TokenizerSource(uri), tmp_path / "cache")
