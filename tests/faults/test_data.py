"""Faults of the data, seen from a real training; each bad input by itself is in tests/unit/test_bad_inputs.py."""

import json
import os
import re
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rank_faults import Fault
from stage_runs import Attempt, Inputs, make_inputs, run

from internvl_core.data.meta import load_meta

TRUNCATED, PIPE, BOMB, TOO_LONG = 5, 9, 13, 17
"""Lines of the annotation."""
LOAD = "internvl_core.data.dataset:SupervisedDataset._load"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def build_bomb(side_px: int) -> bytes:
    """Build a PNG of a few kB that would take gigabytes, pixel by pixel."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", side_px, side_px, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(10_000_000), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.fixture(scope="module")
def bad_meta(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the data set, four of whose 40 records are bad; three look sound until they are read."""
    folder = tmp_path_factory.mktemp("bad")
    (meta,) = load_meta(inputs.folder / "data" / "finetune.json")
    records = [json.loads(line) for line in Path(meta.annotation).read_text().splitlines()]
    for record in records:
        os.link(Path(meta.root) / record["image"], folder / record["image"])
        record |= {"width": 32, "height": 32}
    Image.effect_noise((32, 32), 80).convert("RGB").save(folder / "whole.jpg")
    (folder / "half.jpg").write_bytes((folder / "whole.jpg").read_bytes()[:-300])
    os.mkfifo(folder / "pipe.png")
    (folder / "bomb.png").write_bytes(build_bomb(40_000))
    for line, name in ((TRUNCATED, "half.jpg"), (PIPE, "pipe.png"), (BOMB, "bomb.png")):
        records[line - 1]["image"] = name
    records[TOO_LONG - 1]["conversations"][-1]["value"] = "a long story " * 500
    (folder / "bad.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "meta.json").write_text(
        json.dumps({"word": {"root": str(folder), "annotation": str(folder / "bad.jsonl")}})
    )
    return folder / "meta.json"


@pytest.fixture(scope="module")
def trained(inputs: Inputs, bad_meta: Path, tmp_path_factory: pytest.TempPathFactory) -> Attempt:
    """One epoch."""
    arguments = {**inputs.arguments, "meta_path": str(bad_meta), "num_train_epochs": 1, "dataloader_num_workers": 1}
    del arguments["max_steps"]
    return run(tmp_path_factory.mktemp("trained") / "1", arguments)


def find_quarantined(attempt: Attempt) -> dict[int, dict[str, Any]]:
    lines = [line for path in (attempt.directory / "quarantine").iterdir() for line in path.read_text().splitlines()]
    found = {int(sample["line"]): sample for sample in map(json.loads, lines)}
    # Each once, over all ranks and workers.
    assert len(found) == len(lines)
    return found


@pytest.mark.integration
@pytest.mark.fault(1, "a truncated JPEG", how="its last 300 bytes are gone", then="left out once, with path and reason")
@pytest.mark.fault(7, "a decompression bomb", how="a PNG of 4.8 GB of pixels", then="left out by its header")
def test_a_medium_that_cannot_be_read_is_left_out_once_and_everything_else_is_learnt(trained: Attempt) -> None:
    counters = trained.result.counters
    quarantined = find_quarantined(trained)
    assert set(quarantined) == {TRUNCATED, PIPE, BOMB}
    assert (quarantined[TRUNCATED]["reason"], quarantined[BOMB]["reason"]) == ("media", "media_size")
    assert "half.jpg" in quarantined[TRUNCATED]["message"]
    assert "bomb.png" in quarantined[BOMB]["message"]
    # Drawn: all but the one that is too long.
    assert (counters["samples"], counters["bad_samples"]) == (39, 3)


@pytest.mark.integration
@pytest.mark.fault(4, "a read that would never end", how="a pipe instead of an image", then="refused unread, left out")
def test_a_pipe_is_refused_and_not_read(trained: Attempt) -> None:
    assert trained.exit_code == 0
    sample = find_quarantined(trained)[PIPE]
    assert re.search(r"pipe\.png: not a regular file", sample["message"])


@pytest.mark.integration
@pytest.mark.fault(8, "a sample longer than a sequence", how="a long answer", then="left out by policy and counted")
def test_a_sample_that_is_too_long_is_left_out_and_counted(trained: Attempt) -> None:
    assert trained.exit_code == 0
    assert "word: 1 of 40 records are left out: 1 too_long." in trained.log
    assert TOO_LONG not in find_quarantined(trained)


@pytest.mark.integration
@pytest.mark.fault(4, "a read stands still", how="a reader that hangs", then="Stalled, exit 77, with its stack")
def test_a_read_that_stands_still_is_a_stall_with_the_stack_of_the_reader(inputs: Inputs, tmp_path: Path) -> None:
    fault = Fault("hang", LOAD, call=14, rank=1)
    attempt = run(tmp_path / "1", {**inputs.arguments, "max_steps": 20, "stall_limit_s": 5}, faults=[fault])
    assert fault.has_happened(attempt.directory, 1)
    assert (attempt.exit_code, attempt.failure.error) == (77, "Stalled")
    assert "_load" in attempt.failure.traceback or "carry_out" in attempt.failure.traceback


@pytest.mark.integration
@pytest.mark.fault(6, "a worker runs out of memory", how="bad_alloc in a worker", then="exit 71, with the sample")
def test_memory_that_runs_out_in_a_worker_is_told_with_the_sample(inputs: Inputs, tmp_path: Path) -> None:
    fault = Fault("raise", LOAD, call=14, rank=1, message="std::bad_alloc")
    arguments = {**inputs.arguments, "max_steps": 20, "dataloader_num_workers": 1}
    attempt = run(tmp_path / "1", arguments, faults=[fault])
    failure = attempt.failure
    assert (attempt.exit_code, failure.error, failure.rank) == (71, "OutOfMemory", 1)
    (sample_id,) = failure.sample_ids
    assert f"no memory left for the sample {sample_id}. Lower dataloader_num_workers" in failure.message
    assert "\n" not in failure.message
