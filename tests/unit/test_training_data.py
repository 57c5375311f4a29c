import resource
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from data_sets import build_encoding, record, write_meta

from internvl_core.arguments import parse_arguments
from internvl_core.data.dataset import SupervisedDataset
from internvl_core.errors import DataError
from internvl_core.train.training_data import build_training_data


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
