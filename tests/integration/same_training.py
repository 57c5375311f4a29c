"""Whether two attempts of a stage trained the same, bit for bit."""

import json
from pathlib import Path
from typing import Any

import torch
from rank_faults import Fault
from stage_runs import Attempt

from internvl_core.checkpoint.manifest import CheckpointKind
from internvl_core.checkpoint.store import fetch

CURVES = ("loss", "loss_ema", "learning_rate", "grad_norm")
NOTHING = Fault("skip", "on_step_end", step=1_000_000)
"""Never happens; ranks that wait for a fault write down what they train on."""
_WEIGHTS = (".safetensors",)
_STATE = (".pt", ".pth", "data_position.json", "samples.json")


def find_differences(found: Attempt, expected: Attempt) -> set[str]:
    """Compare the curves, the counters, the final weights, and the state of the last step; empty if all is equal.

    Both must have saved their last step.
    """
    differing = {
        name
        for name in CURVES
        if [(line["step"], line.get(name)) for line in found.curve]
        != [(line["step"], line.get(name)) for line in expected.curve]
    }
    if found.result.counters != expected.result.counters:
        differing.add("counters")
    for kind, suffixes in ((CheckpointKind.FINAL, _WEIGHTS), (CheckpointKind.TRAINING, _STATE)):
        files, expected_files = (fetch_files(attempt, kind, suffixes) for attempt in (found, expected))
        assert files.keys() == expected_files.keys()
        differing |= {path for path in files if not _is_equal_file(files[path], expected_files[path])}
    return differing


def fetch_files(attempt: Attempt, kind: CheckpointKind, suffixes: tuple[str, ...]) -> dict[str, Path]:
    """Find files of an attempt's last checkpoint of a kind, by their path in it."""
    newest = max((commit for commit in attempt.commits if commit.kind is kind), key=lambda commit: commit.step)
    assert newest.step == attempt.result.step
    folder = fetch(newest.checkpoint, attempt.directory)
    return {
        path.relative_to(folder).as_posix(): path
        for path in folder.rglob("*")
        if path.is_file() and path.name.endswith(suffixes)
    }


def _is_equal_file(found: Path, expected: Path) -> bool:
    if found.read_bytes() == expected.read_bytes():
        return True
    # DeepSpeed pickles the same state in other bytes once it was loaded: what is shared between objects differs.
    return found.suffix == ".pt" and _is_equal(*(torch.load(path, weights_only=False) for path in (found, expected)))


def _is_equal(found: Any, expected: Any) -> bool:
    """Compare what was pickled, tensors to the bit."""
    if type(found) is not type(expected):
        return False
    if isinstance(found, torch.Tensor):
        return found.dtype == expected.dtype and torch.equal(found, expected)
    if isinstance(found, dict):
        return found.keys() == expected.keys() and all(_is_equal(found[key], expected[key]) for key in found)
    if isinstance(found, list | tuple):
        return len(found) == len(expected) and all(map(_is_equal, found, expected))
    if hasattr(found, "__dict__") and not isinstance(found, type):
        return _is_equal(vars(found), vars(expected))
    return bool(found == expected)


def read_trained(attempt: Attempt) -> dict[int, list[str]]:
    """Read which samples all ranks of a faulty attempt trained on, by step, sorted."""
    trained: dict[int, list[str]] = {}
    for path in attempt.directory.glob("trained-*.jsonl"):
        for line in path.read_text().splitlines():
            done, ids = json.loads(line)
            trained.setdefault(done + 1, []).extend(ids)
    return {step: sorted(ids) for step, ids in trained.items()}
