"""Adapters beside parts that learn in full, as their task starts them; ZeRO-1 with rates of the parts' own."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from stage_runs import Attempt, Inputs, check_equal_weights, forget_commits, load_weights, make_inputs, run

from internvl_core.arguments import DataTrainingArguments, ModelArguments
from internvl_core.checkpoint.manifest import CheckpointKind
from internvl_core.checkpoint.store import StageStore
from internvl_core.contract import CheckpointRef
from internvl_core.model.load import build_model, load_model
from internvl_core.model.save import save_model

pytestmark = [
    pytest.mark.integration,
    # PEFT 0.21 asks transformers 5.23 by an old name.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def base(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> CheckpointRef:
    folder = tmp_path_factory.mktemp("base")
    components = {name: inputs.arguments[name] for name in ("vision_path", "llm_path")}
    data = DataTrainingArguments(force_image_size=inputs.arguments["force_image_size"])
    torch.manual_seed(0)
    built = build_model(ModelArguments(**components), data, cache_dir=folder / "cache", dtype=torch.float32)
    save_model(built.model, built.tokenizer, folder / "model")
    store = StageStore(f"file://{folder}/store", "stage", "0" * 64)
    return store.publish(folder / "model", step=1, fence=1, kind=CheckpointKind.FINAL, parent=None, info={})


@pytest.fixture
def arguments(inputs: Inputs) -> dict[str, Any]:
    given = {name: value for name, value in inputs.arguments.items() if name not in ("vision_path", "llm_path")}
    del given["eval_meta_path"]
    return {**given, "mlp_lr": 0.001, "use_llm_lora": 4, "freeze_llm": True}


def get_ratios(attempt: Attempt, part: str) -> list[float]:
    """Get a part's learning rate in shares of the main one, step by step."""
    return [line[f"learning_rate/{part}"] / line["learning_rate"] for line in attempt.curve]


def test_a_projector_that_learns_beside_adapters_under_zero_is_in_their_files(
    arguments: dict[str, Any], base: CheckpointRef, tmp_path: Path
) -> None:
    attempt = run(
        tmp_path / "1", {**arguments, "freeze_backbone": True, "deepspeed": "zero1", "max_steps": 3}, start_from=base
    )
    assert get_ratios(attempt, "mlp") == pytest.approx([1 / 3] * 3)
    assert "learning_rate/vision" not in attempt.curve[0]
    assert not (attempt.final_dir / "model.safetensors").exists()
    before, merged = (load_model(folder, cache_dir=tmp_path) for folder in (base.uri, str(attempt.final_dir)))
    old, weights = before.state_dict(), merged.state_dict()
    changed = {name.split(".")[1] for name in weights if not torch.equal(weights[name], old[name])}
    assert changed == {"multi_modal_projector", "language_model"}
    plain = PeftModel.from_pretrained(before, str(attempt.final_dir)).merge_and_unload().state_dict()
    for name, tensor in plain.items():
        torch.testing.assert_close(weights[name], tensor)


@pytest.mark.slow
def test_parts_that_learn_in_full_and_by_adapters_resume_exactly_and_end_as_a_whole_model(
    arguments: dict[str, Any], base: CheckpointRef, tmp_path: Path
) -> None:
    saving = {**arguments, "freeze_llm": False, "vision_lr": 0.0001, "use_backbone_lora": 2}
    saving |= {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    attempt = run(tmp_path / "1", saving, start_from=base)
    assert "use_llm_lora: 4 beside freeze_llm False" in attempt.log
    assert get_ratios(attempt, "vision") == pytest.approx([1 / 30] * 4)
    assert not (attempt.final_dir / "adapter_config.json").exists()
    assert attempt.result.counters["trainable_parameters"] == attempt.result.counters["total_parameters"]

    forget_commits(attempt, tmp_path / "again", after_step=2)
    resumed = run(tmp_path / "2", saving, store=tmp_path / "again", start_from=base)
    assert "Resuming from step 2" in resumed.log
    check_equal_weights(resumed.final_dir / "model.safetensors", attempt.final_dir / "model.safetensors")
    assert [line["loss"] for line in resumed.curve] == [line["loss"] for line in attempt.curve]
    assert all(tensor.isfinite().all() for tensor in load_weights(resumed.final_dir).values())
