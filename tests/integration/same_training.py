"""Whether two attempts of a stage trained the same, bit for bit."""

import json
from typing import Any

from rank_faults import Fault
from stage_runs import Attempt

from internvl_core.checkpoint.manifest import CheckpointKind
from internvl_core.checkpoint.store import read_manifest

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
        digests, expected_digests = (read_digests(attempt, kind, suffixes) for attempt in (found, expected))
        assert digests.keys() == expected_digests.keys()
        differing |= {path for path in digests if digests[path] != expected_digests[path]}
    return differing


def read_digests(attempt: Attempt, kind: CheckpointKind, suffixes: tuple[str, ...]) -> dict[str, Any]:
    """Read the digests of files of an attempt's last checkpoint of a kind."""
    newest = max((commit for commit in attempt.commits if commit.kind is kind), key=lambda commit: commit.step)
    assert newest.step == attempt.result.step
    return {
        entry.path: entry.sha256 for entry in read_manifest(newest.checkpoint).files if entry.path.endswith(suffixes)
    }


def read_trained(attempt: Attempt) -> dict[int, list[str]]:
    """Read which samples all ranks of a faulty attempt trained on, by step, sorted."""
    trained: dict[int, list[str]] = {}
    for path in attempt.directory.glob("trained-*.jsonl"):
        for line in path.read_text().splitlines():
            done, ids = json.loads(line)
            trained.setdefault(done + 1, []).extend(ids)
    return {step: sorted(ids) for step, ids in trained.items()}
