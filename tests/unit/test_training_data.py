import resource
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from data_sets import build_encoding, record, write_meta
from tiny_internvl import build_tiny_model

from internvl_core.arguments import ModelArguments, parse_arguments
from internvl_core.data.dataset import SupervisedDataset
from internvl_core.errors import DataError
from internvl_core.model.flops import ModelShape, build_sample_cost
from internvl_core.model.trainable import set_trainable
from internvl_core.train.training_data import _build_cost, build_training_data


def build(folder: Path, *, num_records: int = 2) -> SupervisedDataset:
    path = write_meta(folder, {"pets": [record()] * num_records})
    arguments = parse_arguments({"meta_path": str(path), "output_dir": str(folder / "out"), "use_cpu": True})
    arguments.training.prepare_for_launch()
    return build_training_data(arguments, build_encoding(), folder / "cache", is_packed=False)


def test_each_process_may_open_as_many_files_as_the_machine_allows(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, hard), hard))
        build(tmp_path)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_ranks_that_see_other_data_stop_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    others = ["same"]

    def gather(digests: list[Any], digest: str) -> None:
        digests[:] = [digest, *(digest if other == "same" else other for other in others)]

    mine = build(tmp_path)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 1 + len(others))
    monkeypatch.setattr(dist, "all_gather_object", gather)
    assert build(tmp_path).mixture.digest == mine.mixture.digest
    others[:] = ["same", "other"]
    with pytest.raises(DataError, match="ranks 2 see other data than rank 0"):
        build(tmp_path)


def test_the_digest_of_the_data_follows_what_is_drawn(tmp_path: Path) -> None:
    before = build(tmp_path).mixture.digest
    assert build(tmp_path).mixture.digest == before
    assert build(tmp_path, num_records=3).mixture.digest != before


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT 0.21
@pytest.mark.parametrize(
    ("arguments", "times_frozen"),
    [
        ({"freeze_llm": True, "freeze_backbone": True}, (2, 1)),
        ({"freeze_llm": True, "freeze_backbone": True, "freeze_mlp": True, "use_llm_lora": 2}, (2, 1)),
        ({}, (3, 3)),
    ],
)
def test_a_sample_costs_what_its_stage_computes(arguments: dict[str, Any], times_frozen: tuple[int, int]) -> None:
    """In forwards of the language model and of the vision tower, without the recomputation."""
    model = build_tiny_model()
    set_trainable(model, ModelArguments(**arguments))
    cost = _build_cost(model)
    shape = ModelShape.from_config(model.config)
    forward = build_sample_cost(
        shape, learns_vision=False, learns_projector=False, learns_llm=False, is_checkpointed=True
    )
    for found, frozen, times in zip(
        (cost.per_token, cost.per_tile), (forward.per_token, forward.per_tile), times_frozen, strict=True
    ):
        recomputed = times > 1
        # The projector, a fifth of so small a tower, is not computed anew.
        assert found / frozen == pytest.approx(times + recomputed, rel=0.2)
