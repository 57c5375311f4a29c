from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_sets import build_encoding, record, write_meta
from hypothesis import given
from hypothesis import strategies as st

from internvl_core.data.index import open_index
from internvl_core.data.meta import load_meta
from internvl_core.data.mixture import Mixture, Rows
from internvl_core.errors import DataError


def mix(path: Path, *, seed: int = 0, max_tokens: int | None = None, **options: Any) -> Mixture:
    cache_dir = path.parent / "cache"
    indexes = [open_index(meta, build_encoding(), cache_dir) for meta in load_meta(path)]
    return Mixture(indexes, seed=seed, max_tokens=max_tokens, **options)


def list_draws(mixture: Mixture, epoch: int = 0) -> list[tuple[int, int, int]]:
    draws = [mixture.locate(number) for number in mixture.iter_order(epoch)]
    return [(draw.dataset, draw.row, draw.repeat) for draw in draws]


@given(st.lists(st.booleans(), min_size=1, max_size=4000), st.data())
def test_rows_find_the_kth_usable_one(usable: list[bool], data: st.DataObject) -> None:
    rows = Rows(np.array(usable))
    expected = [row for row, is_usable in enumerate(usable) if is_usable]
    assert len(rows) == len(expected)
    if expected:
        numbers = data.draw(st.lists(st.integers(0, len(expected) - 1), min_size=1, max_size=5))
        assert rows.find(np.array(numbers)).tolist() == [expected[number] for number in numbers]


def test_every_record_is_drawn_as_often_as_repeat_time_says(tmp_path: Path) -> None:
    # F40: one meaning, the fraction included.
    mixture = mix(write_meta(tmp_path, {"pets": [record()] * 40}, repeat_time=2.25))
    assert len(mixture) == 90
    times = Counter(row for _, row, _ in list_draws(mixture))
    assert Counter(times.values()) == {2: 30, 3: 10}
    # One pass after the other: nothing comes a second time before everything came once.
    assert {row for _, row, _ in list_draws(mixture)[:40]} == set(range(40))


def test_a_share_is_drawn_by_the_seed_and_not_from_the_head(tmp_path: Path) -> None:
    # The original kept the first lines, which are often sorted by source.
    path = write_meta(tmp_path, {"pets": [record()] * 200}, repeat_time=0.1)
    drawn = [{row for _, row, _ in list_draws(mix(path, seed=seed))} for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(drawn[0]) == 20
    assert max(drawn[0]) > 100
    assert {row for _, row, _ in list_draws(mix(path), epoch=5)} == drawn[0]


def test_an_epoch_has_every_draw_once_in_an_order_of_its_own(tmp_path: Path) -> None:
    # F13: the original drew the same order in every epoch, whatever the seed.
    mixture = mix(write_meta(tmp_path, {"a": [record()] * 30, "b": [record()] * 10}))
    orders = [list(mixture.iter_order(epoch)) for epoch in (0, 1)]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(40))
    assert orders[0] != orders[1]
    assert list(mixture.iter_order(0, start=17)) == orders[0][17:]


def test_bad_and_over_long_records_are_never_drawn(tmp_path: Path) -> None:
    records = [record(), "broken", record(answer="long " * 100), record()]
    mixture = mix(write_meta(tmp_path, {"pets": records}), max_tokens=150)
    assert {row for _, row, _ in list_draws(mixture)} == {0, 3}
    assert mixture.sources[0].num_too_long == 1
    assert max(mixture.count_tokens(range(len(mixture)))) <= 150


def test_a_data_set_of_which_nothing_is_left_is_refused(tmp_path: Path) -> None:
    path = write_meta(tmp_path, {"pets": ["broken", record(answer="long " * 100)]})
    with pytest.raises(DataError, match="none of 2 records can be trained on; 1 are longer than max_seq_length, 150"):
        mix(path, max_tokens=150)


def test_weights_and_the_root_of_the_size_change_when_and_not_what(tmp_path: Path) -> None:
    path = write_meta(tmp_path, {"large": [record()] * 400, "small": [record()] * 100})
    plain, by_root = mix(path), mix(path, by_root_of_size=True)

    def share_of_small(mixture: Mixture) -> float:
        return sum(dataset == 1 for dataset, _, _ in list_draws(mixture)[:100]) / 100

    assert share_of_small(plain) == pytest.approx(1 / 5, abs=0.03)
    # Roots of 400 and 100 are 2 to 1.
    assert share_of_small(by_root) == pytest.approx(1 / 3, abs=0.03)
    assert Counter(list_draws(plain)) == Counter(list_draws(by_root))
