"""Tokenizer and tile length of a model that is not loaded."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from internvl_core.checkpoint.manifest import CheckpointKind
from internvl_core.checkpoint.store import StageStore
from internvl_core.contract import CheckpointRef
from internvl_core.data.text_encoder import load_text_encoder
from internvl_core.errors import ArgumentError, CheckpointNotFound
from internvl_core.inspection.lint_report import TokenizerSource
from internvl_core.inspection.tokenizer_source import count_tokens_per_tile, load_encoder
from internvl_core.model.adapter_weights import write_base

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


@pytest.mark.parametrize("is_committed", [False, True])
def test_an_adapter_has_the_tokenizer_and_the_tower_of_its_base(tmp_path: Path, is_committed: bool) -> None:
    base = commit(tmp_path, write_model(tmp_path / "model", {"vision_config": {"patch_size": 16}}))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    write_base(adapter, base)
    source = TokenizerSource(commit(tmp_path, str(adapter), name="finetune").uri if is_committed else str(adapter))
    assert count(source, tmp_path / "cache") == 196
    assert load_encoder(source, tmp_path / "cache").digest == load_text_encoder(str(TOKENIZER)).digest


def test_a_checkpoint_that_was_never_committed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFound):
        load_encoder(TokenizerSource(f"file://{tmp_path}/store/stage1"), tmp_path / "cache")
