"""The files of an attempt: whole or not there."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from internvl_core.contract import CheckpointRef, StageFailure, StageResult, write_json_atomically
from internvl_core.errors import DataError


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "progress.json"
    write_json_atomically(path, {"offset": 1})
    before = path.read_bytes()
    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="No space left"):
        write_json_atomically(path, {"offset": 2})
    assert (list(tmp_path.iterdir()), path.read_bytes()) == ([path], before)


def test_the_first_step_counts_once() -> None:
    seconds = {"setup": 1.0, "train": 5.0, "first_step": 2.0, "evaluate": 0.5}
    assert StageResult(1, CheckpointRef("file:///a", "d"), {}, {}, seconds).total_s == 6.5


def test_a_class_that_only_one_module_knows_is_told_as_the_class_of_the_tree_that_it_is() -> None:
    class AnnotationMoved(DataError):
        """Known here only."""

    assert StageFailure.from_exception(AnnotationMoved("gone"), rank=0).error == "DataError"
    assert StageFailure.from_exception(ValueError("gone"), rank=0).error == "InternVLError"
