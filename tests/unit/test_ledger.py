import json
from pathlib import Path

import pytest

from internvl_core.data.quarantine import BadSample
from internvl_core.errors import DataError, Reason
from internvl_core.train.ledger import SampleLedger


def bad(dataset: str, line: int) -> BadSample:
    return BadSample(dataset, line, Reason.MEDIA, f"{dataset}.jsonl:{line}: broken")


def open_ledger(folder: Path, *, max_bad_fraction: float = 0.01) -> SampleLedger:
    return SampleLedger(["a:b", "c"], folder, rank=1, max_bad_fraction=max_bad_fraction)


def test_drawn_and_bad_samples_are_counted_by_data_set(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path)
    ledger.record(["a:b:1", "c:7"], [bad("c", 9)], step=3)
    ledger.record(["c:8"], [], step=4)
    taken = ledger.take()
    assert taken == [1, 3, 0, 1]
    assert ledger.take() == [0, 0, 0, 0]
    # Of two ranks.
    ledger.add([2 * count for count in taken])
    assert ledger.counters == {"samples": 8, "bad_samples": 2, "samples/a:b": 2, "samples/c": 6, "bad_samples/c": 2}


def test_a_bad_sample_is_written_down_with_its_reason(tmp_path: Path) -> None:
    open_ledger(tmp_path).record([], [bad("c", 9)], step=3)
    (line,) = (tmp_path / "quarantine" / "1.jsonl").read_text().splitlines()
    assert json.loads(line) == {
        "step": 3,
        "sample_id": "c:9",
        "dataset": "c",
        "line": 9,
        "reason": "media",
        "message": "c.jsonl:9: broken",
    }


def test_a_stage_bears_bad_samples_up_to_the_limit_and_not_beyond(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path)
    # Few draws count as a thousand, so that one bad sample among the first is no 1 %.
    ledger.add([10, 10, 0, 10])
    with pytest.raises(DataError, match=r"Too many bad samples: c: 11 of 11; max_bad_fraction is 0\.01"):
        ledger.add([0, 1, 0, 1])


def test_the_limit_follows_the_number_of_draws(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path)
    ledger.add([0, 5000, 0, 50])
    with pytest.raises(DataError, match="c: 51 of 5000"):
        ledger.add([0, 0, 0, 1])


def test_a_limit_of_zero_stops_at_the_first(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="c: 1 of 20"):
        open_ledger(tmp_path, max_bad_fraction=0).add([0, 20, 0, 1])


def test_a_resumed_stage_goes_on_counting(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path)
    ledger.add([4, 5, 1, 2])
    ledger.save(tmp_path)
    resumed = open_ledger(tmp_path)
    resumed.load(tmp_path)
    resumed.add([1, 0, 0, 0])
    assert resumed.counters == {**ledger.counters, "samples": 10, "samples/a:b": 5}


def test_the_mixture_is_that_of_the_good_samples_since_the_last_time(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path)
    assert ledger.read_mixture() == {}
    ledger.add([6, 6, 0, 4])
    assert ledger.read_mixture() == {"mixture/a:b": 0.75, "mixture/c": 0.25}
    ledger.add([0, 5, 0, 0])
    assert ledger.read_mixture() == {"mixture/a:b": 0, "mixture/c": 1}


def test_a_resumed_stage_does_not_count_what_was_delivered_before(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path)
    ledger.add([8, 0, 0, 0])
    ledger.save(tmp_path)
    resumed = open_ledger(tmp_path)
    resumed.load(tmp_path)
    resumed.add([1, 1, 0, 0])
    assert resumed.read_mixture() == {"mixture/a:b": 0.5, "mixture/c": 0.5}
