import json
import shutil
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from chat_reference import build_chat_checkpoint
from fsspec.implementations.memory import MemoryFileSystem
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer, GenerationConfig

from internvl_core.arguments import ModelArguments
from internvl_core.checkpoint.base_model import BaseModel, write_base
from internvl_core.checkpoint.folder import fetch_folder
from internvl_core.checkpoint.manifest import CheckpointKind
from internvl_core.checkpoint.store import StageStore
from internvl_core.contract import CheckpointRef
from internvl_core.data.conversation import encode_prompt
from internvl_core.errors import ArgumentError, StoreUnavailable
from internvl_core.model import convert as convert_module
from internvl_core.model.adapters import LEARNT_FILE, save_adapter
from internvl_core.model.convert import convert
from internvl_core.model.load import load_checkpoint, load_model
from internvl_core.model.merge_check import check_merge
from internvl_core.model.sources import open_whole
from internvl_core.model.trainable import set_trainable
from internvl_core.model.weights import from_state_dict

# PEFT 0.21 asks transformers 5.23 by an old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
FROZEN = ModelArguments(freeze_llm=True, freeze_backbone=True, freeze_mlp=True, grad_checkpoint=False)
NUM_TOKENS = 24


class FailingFileSystem(MemoryFileSystem):
    """A store in memory that takes two files of weights and no more."""

    protocol = "failing"
    store: dict[str, Any] = {}  # noqa: RUF012 (as in the base class)
    pseudo_dirs = [""]  # noqa: RUF012

    def put_file(self, lpath: str, rpath: str, *args: Any, **kwargs: Any) -> None:
        if "model-00003" in rpath:
            raise ConnectionError("the line is dead")
        super().put_file(lpath, rpath, *args, **kwargs)


@pytest.fixture
def failing_uri() -> str:
    fsspec.register_implementation("failing", FailingFileSystem, clobber=True)
    return f"failing://{uuid.uuid4().hex}/model"


def run(source: Path | str, target: Path | str, cache_dir: Path, **options: Any) -> dict[str, Any]:
    return convert(str(source), str(target), cache_dir=cache_dir, **{"to": "native", **options})


def read_json(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(file.read_text())
    return content


def generate(model: Any, tokenizer: Any) -> str:
    """Answer a question about two tiles, greedily."""
    ids = torch.tensor(
        [
            encode_prompt(
                [{"from": "human", "value": "<image>\nWhat do you see?"}],
                tokenizer,
                conv_style="internvl2_5",
                image_token_counts=[2 * model.config.image_seq_length],
            )
        ]
    )
    side = model.config.vision_config.image_size[0]
    tiles = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=tiles,
            max_new_tokens=NUM_TOKENS,
            do_sample=False,
        )
    text: str = tokenizer.decode(output[0, ids.shape[1] :])
    return text


@torch.inference_mode()
def compute_logits(model: Any, golden: dict[str, Tensor]) -> Tensor:
    logits: Tensor = model(input_ids=golden["input_ids"], pixel_values=golden["pixel_values"]).logits
    return logits


@pytest.mark.parametrize("family", ["qwen2", "internlm2"])
def test_plain_transformers_loads_a_native_folder_and_computes_what_the_original_did(
    tmp_path: Path, family: str
) -> None:
    report = run(GOLDEN / family, tmp_path / "native", tmp_path)
    golden = load_file(GOLDEN / family / "golden.safetensors")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "native")
    assert type(model).__module__.startswith("transformers.")
    torch.testing.assert_close(compute_logits(model, golden), golden["logits"], atol=1e-4, rtol=0)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "native")
    ours = load_checkpoint(str(GOLDEN / family), cache_dir=tmp_path)
    text = generate(model, tokenizer)
    assert text == generate(ours.model, ours.tokenizer)
    assert len(text) > NUM_TOKENS / 2
    assert AutoConfig.from_pretrained(tmp_path / "native").dtype == torch.float32
    assert GenerationConfig.from_pretrained(tmp_path / "native").eos_token_id == [
        tokenizer.convert_tokens_to_ids("<|im_end|>")
    ]
    assert report["num_parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert report["num_bytes"] == sum(path.stat().st_size for path in (tmp_path / "native").iterdir())


@pytest.mark.parametrize("family", ["qwen2", "internlm2"])
def test_there_and_back_again_not_a_bit_is_lost(tmp_path: Path, family: str) -> None:
    run(GOLDEN / family, tmp_path / "native", tmp_path)
    run(tmp_path / "native", tmp_path / "chat", tmp_path, to="chat")
    run(tmp_path / "chat", tmp_path / "again", tmp_path)
    for path in (tmp_path / "native").iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name
    chat, original = (load_file(folder / "model.safetensors") for folder in (tmp_path / "chat", GOLDEN / family))
    assert chat.keys() == original.keys()
    assert all(torch.equal(chat[name], tensor) for name, tensor in original.items())


def test_large_models_are_written_in_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert_module, "SHARD_BYTES", 1 << 18)
    run(GOLDEN / "qwen2", tmp_path / "native", tmp_path)
    assert len(list((tmp_path / "native").glob("model-*.safetensors"))) > 2
    golden = load_file(GOLDEN / "qwen2" / "golden.safetensors")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "native")
    torch.testing.assert_close(compute_logits(model, golden), golden["logits"], atol=1e-4, rtol=0)


def test_a_remote_source_becomes_a_remote_target(tmp_path: Path) -> None:
    root = f"memory://{uuid.uuid4().hex}"
    run(GOLDEN / "internlm2", f"{root}/native", tmp_path / "cache")
    run(f"{root}/native", f"{root}/chat", tmp_path / "cache", to="chat")
    chat = load_file(fetch_folder(f"{root}/chat", tmp_path / "cache") / "model.safetensors")
    original = load_file(GOLDEN / "internlm2" / "model.safetensors")
    assert all(torch.equal(chat[name], tensor) for name, tensor in original.items())


def test_an_interrupted_conversion_leaves_no_config(
    tmp_path: Path, failing_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert_module, "SHARD_BYTES", 1 << 17)
    with pytest.raises(StoreUnavailable, match="the line is dead"):
        run(GOLDEN / "qwen2", failing_uri, tmp_path)
    names = {path.rpartition("/")[2] for path in fsspec.filesystem("failing").find(failing_uri)}
    assert any(name.startswith("model-00002") for name in names)
    assert "config.json" not in names
    assert not list(tmp_path.iterdir())


def test_weights_are_cast_and_the_config_says_so(tmp_path: Path) -> None:
    report = run(GOLDEN / "qwen2", tmp_path / "native", tmp_path, dtype="bfloat16")
    tensors = load_file(tmp_path / "native" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "native")
    assert model.dtype == torch.bfloat16
    assert report["dtype"] == "bfloat16"
    run(tmp_path / "native", tmp_path / "chat", tmp_path, to="chat")
    assert read_json(tmp_path / "chat" / "config.json")["torch_dtype"] == "bfloat16"


def test_a_first_pixel_shuffle_stays_in_the_chat_format(tmp_path: Path) -> None:
    build_chat_checkpoint(tmp_path / "v1", ps_version="v1")
    with pytest.raises(ArgumentError, match=r"ps_version v1.*It stays as it is"):
        run(tmp_path / "v1", tmp_path / "native", tmp_path)
    run(tmp_path / "v1", tmp_path / "chat", tmp_path, to="chat", dtype="float16")
    assert read_json(tmp_path / "chat" / "config.json")["ps_version"] == "v1"


def test_a_towers_norms_of_the_6b_kind_are_converted(tmp_path: Path) -> None:
    build_chat_checkpoint(tmp_path / "chat", vit="6b", llm="llama")
    run(tmp_path / "chat", tmp_path / "native", tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "native")
    ours = load_checkpoint(str(tmp_path / "chat"), cache_dir=tmp_path)
    assert generate(model, ours.tokenizer) == generate(ours.model, ours.tokenizer)


def test_python_files_of_a_chat_folder_come_along_and_are_not_run(tmp_path: Path) -> None:
    build_chat_checkpoint(tmp_path / "source")
    (tmp_path / "source" / "modeling_internvl_chat.py").write_text("raise RuntimeError('remote code was run')")
    config = read_json(tmp_path / "source" / "config.json")
    auto_map = {"AutoConfig": "configuration_internvl_chat.InternVLChatConfig"}
    (tmp_path / "source" / "config.json").write_text(json.dumps({**config, "auto_map": auto_map}))
    run(tmp_path / "source", tmp_path / "chat", tmp_path, to="chat", dtype="float16")
    assert read_json(tmp_path / "chat" / "config.json")["auto_map"] == auto_map
    assert (tmp_path / "chat" / "modeling_internvl_chat.py").is_file()
    assert (tmp_path / "chat" / "vocab.json").read_bytes() == (tmp_path / "source" / "vocab.json").read_bytes()


def test_without_python_files_a_chat_folder_names_the_hubs(tmp_path: Path) -> None:
    run(GOLDEN / "qwen2", tmp_path / "chat", tmp_path, to="chat", dtype="float16")
    assert not list((tmp_path / "chat").glob("*.py"))
    auto_map = read_json(tmp_path / "chat" / "config.json")["auto_map"]
    assert all(place.startswith("OpenGVLab/") and "--" in place for place in auto_map.values())


def test_a_native_model_that_says_nothing_is_taken_for_one_of_the_2_5_family(tmp_path: Path) -> None:
    run(GOLDEN / "qwen2", tmp_path / "native", tmp_path)
    config = read_json(tmp_path / "native" / "config.json")
    del config["chat_settings"], config["ps_version"]
    (tmp_path / "native" / "config.json").write_text(json.dumps(config))
    report = run(tmp_path / "native", tmp_path / "chat", tmp_path, to="chat")
    assert report["remarks"] == ["The chat template is that of internvl2_5: the source names no conversation style."]
    assert read_json(tmp_path / "chat" / "config.json")["template"] == "internvl2_5"


def build_adapter(
    folder: Path, *, dtype: torch.dtype = torch.float32, strength: float = 0.2, flags: dict[str, Any] | None = None
) -> tuple[Path, Path]:
    """Commit a base in a store and train-like adapters over it; return the base's folder and the adapter's."""
    build_chat_checkpoint(folder / "source", dtype=dtype)
    store = StageStore(str(folder / "store"), "stage", "0" * 16)
    base: CheckpointRef = store.publish(
        folder / "source", step=1, fence=1, kind=CheckpointKind.FINAL, parent=None, info={}
    )
    model = load_model(str(folder / "source"), cache_dir=folder)
    flags = {"use_llm_lora": 2, "use_backbone_lora": 4, "freeze_mlp": False} if flags is None else flags
    adapted: Any = set_trainable(model, replace(FROZEN, **flags))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += strength * torch.randn(parameter.shape, generator=generator)
    save_adapter(adapted, folder / "adapter")
    write_base(folder / "adapter", BaseModel("checkpoint", base.uri, base.digest))
    return folder / "source", folder / "adapter"


def adapt(base: Path, adapter: Path, cache_dir: Path) -> Any:
    return PeftModel.from_pretrained(load_model(str(base), cache_dir=cache_dir), str(adapter)).eval()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_a_merged_adapter_says_what_the_adapted_model_said(
    tmp_path: Path, dtype: torch.dtype, tolerance: float
) -> None:
    base, adapter = build_adapter(tmp_path, dtype=dtype)
    report = run(adapter, tmp_path / "native", tmp_path, merge=True)
    golden = load_file(GOLDEN / "qwen2" / "golden.safetensors")
    expected = compute_logits(adapt(base, adapter, tmp_path), golden)
    plain = compute_logits(load_model(str(base), cache_dir=tmp_path), golden)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "native")
    assert model.dtype == dtype
    found = compute_logits(model.float(), golden)
    assert (found - expected).abs().max() < tolerance * expected.abs().max()
    assert (plain - expected).abs().max() > 0.3 * expected.abs().max()
    difference = report["difference"]
    assert difference["merged"] < 1e-4 * difference["largest_logit"]
    assert (difference["written"] > difference["merged"]) == (dtype == torch.bfloat16)
    assert report["merged"].startswith("the adapter into file://")


def test_an_adapter_is_merged_into_the_chat_format_too(tmp_path: Path) -> None:
    base, adapter = build_adapter(tmp_path)
    run(adapter, tmp_path / "chat", tmp_path, to="chat", merge=True)
    golden = load_file(GOLDEN / "qwen2" / "golden.safetensors")
    expected = compute_logits(adapt(base, adapter, tmp_path), golden)
    found = compute_logits(load_model(str(tmp_path / "chat"), cache_dir=tmp_path), golden)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("is_rounded", [False, True])
def test_a_wrong_merge_is_refused(tmp_path: Path, is_rounded: bool) -> None:
    base_folder, adapter = build_adapter(tmp_path, strength=0.05)
    base = open_whole(base_folder, tmp_path)
    right = dict(load_model(str(adapter), cache_dir=tmp_path).state_dict())
    name = "model.language_model.layers.1.mlp.down_proj.weight"
    wrong = from_state_dict({**right, name: base.weights[name].read()})
    merged, written = (from_state_dict(right), wrong) if is_rounded else (wrong, wrong)
    with pytest.raises(ArgumentError, match=r"written as float32" if is_rounded else r"merged, the model's logits"):
        check_merge(base, adapter, merged=merged, written=written, dtype=torch.float32, source="it")


def test_a_merge_that_fails_its_check_writes_nothing(tmp_path: Path) -> None:
    _, adapter = build_adapter(tmp_path)
    tensors = load_file(adapter / "adapter_model.safetensors")
    first = next(name for name in tensors if ".lora_A." in name)
    tensors[first] = tensors[first] * float("nan")
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(ArgumentError, match="Nothing was written"):
        run(adapter, tmp_path / "native", tmp_path, merge=True)
    assert not (tmp_path / "native").exists()


def test_a_state_to_resume_from_is_no_model(tmp_path: Path) -> None:
    _, adapter = build_adapter(tmp_path, flags={"use_llm_lora": 2, "freeze_llm": False})
    assert (adapter / LEARNT_FILE).is_file()
    with pytest.raises(ArgumentError, match="state to resume from"):
        run(adapter, tmp_path / "native", tmp_path, merge=True)


def build_original_lora(folder: Path, *, rank: int = 2) -> dict[str, Tensor]:
    """Write a chat folder as the original saves it with `use_llm_lora`; return its weights merged by hand (F27)."""
    build_chat_checkpoint(folder, llm="internlm2")
    state = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(5)
    unmerged, merged = {}, dict(state)
    for name, tensor in state.items():
        if not name.startswith("language_model."):
            unmerged[name] = tensor
            continue
        inner = name.removeprefix("language_model.").removesuffix(".weight")
        if not inner.endswith((".wqkv", ".wo", ".w1", ".w2", ".w3")):
            unmerged[f"language_model.base_model.model.{inner}.weight"] = tensor
            continue
        down, up = (torch.randn(shape, generator=generator) for shape in ((rank, tensor.shape[1]), (len(tensor), rank)))
        merged[name] = tensor + 2 * up @ down
        unmerged |= {
            f"language_model.base_model.model.{inner}.base_layer.weight": tensor,
            f"language_model.base_model.model.{inner}.lora_A.default.weight": down,
            f"language_model.base_model.model.{inner}.lora_B.default.weight": up,
        }
    save_file({name: tensor.contiguous() for name, tensor in unmerged.items()}, folder / "model.safetensors")
    config = read_json(folder / "config.json")
    (folder / "config.json").write_text(json.dumps({**config, "use_llm_lora": rank}))
    return merged


def test_adapters_that_the_original_saved_unmerged_are_merged(tmp_path: Path) -> None:
    expected = build_original_lora(tmp_path / "lora")
    report = run(tmp_path / "lora", tmp_path / "chat", tmp_path, to="chat", merge=True)
    found = load_file(tmp_path / "chat" / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=1e-5)
    assert read_json(tmp_path / "chat" / "config.json")["use_llm_lora"] == 0
    assert report["merged"].startswith("10 adapters")


def test_what_does_not_go_together_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    _, adapter = build_adapter(tmp_path)
    build_original_lora(tmp_path / "lora")
    build_chat_checkpoint(tmp_path / "chat")
    shutil.copytree(tmp_path / "chat", tmp_path / "other")
    (tmp_path / "other" / "config.json").write_text('{"model_type": "qwen2"}')
    cases: list[tuple[Path | str, dict[str, Any], str]] = [
        (adapter, {}, "holds an adapter. Say --merge"),
        (tmp_path / "lora", {}, "adapters apart. Say --merge"),
        (tmp_path / "chat", {"merge": True}, "has no adapters"),
        (tmp_path / "chat", {"to": "chat"}, "in the chat format already"),
        (tmp_path / "chat", {"to": "pickle"}, "--to: 'pickle'"),
        (tmp_path / "chat", {"dtype": "int8"}, "--dtype: 'int8'"),
        (tmp_path / "other", {}, "holds a qwen2 model"),
        (tmp_path / "store", {}, "no config.json"),
        (tmp_path / "nothing", {}, "does not exist"),
        ("magic://bucket/a", {}, "Unknown protocol"),
        ("memory://nothing/here", {}, "no such folder"),
    ]
    for source, options, message in cases:
        with pytest.raises(ArgumentError, match=message):
            run(source, tmp_path / "target", tmp_path, **options)
    assert not (tmp_path / "target").exists()
    with pytest.raises(ArgumentError, match="is not empty"):
        run(tmp_path / "chat", adapter, tmp_path)
