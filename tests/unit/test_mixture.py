import itertools
import math
import pickle
import tempfile
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_sets import build_encoding, record, write_meta
from hypothesis import given, settings
from hypothesis import strategies as st

from internvl_core.data.annotation import AnnotationFile, FileVersion
from internvl_core.data.index import DatasetIndex, open_index
from internvl_core.data.index_files import write_columns
from internvl_core.data.meta import DatasetMeta, load_meta
from internvl_core.data.mixture import Mixture, Rows
from internvl_core.data.sizes import SizeBlock
from internvl_core.errors import DataError


def mix(path: Path, *, seed: int = 0, max_tokens: int | None = None, **options: Any) -> Mixture:
    cache_dir = path.parent / "cache"
    indexes = [open_index(meta, build_encoding(), cache_dir) for meta in load_meta(path)]
    return Mixture(indexes, seed=seed, max_tokens=max_tokens, **options)


def write_index(folder: Path, name: str, num_lines: int, *, bad: float = 0.0, **entry: Any) -> DatasetIndex:
    """Write an index with sizes of its own, of an annotation that is never read."""
    draw = np.random.default_rng([num_lines, *name.encode()])
    columns = {
        "offsets": np.zeros(num_lines + 1, np.int64),
        "tokens": draw.integers(1, 10_000, num_lines, np.int32),
        "tiles": draw.integers(0, 60, num_lines, np.uint16),
        "supervised": np.ones(num_lines, np.int32),
        "status": (draw.random(num_lines) < bad).astype(np.uint8),
    }
    columns["status"][num_lines // 2] = 0
    (folder / name).mkdir()
    write_columns(folder / name, columns, {"record": int(columns["status"].sum())}, {}, {})
    path = folder / "a.jsonl"
    path.touch()
    annotation = AnnotationFile(path, shown_as="a.jsonl", digest="", version=FileVersion.of(path.stat()))
    return DatasetIndex(folder / name, DatasetMeta(name, str(folder), str(path), **entry), annotation)


def take(mixture: Mixture, count: int, *, epoch: int = 0, start: int = 0) -> list[int]:
    return list(itertools.islice(mixture.iter_ids(epoch, start), count))


def take_sizes(mixture: Mixture, count: int, *, epoch: int = 0, start: int = 0) -> SizeBlock:
    blocks: list[SizeBlock] = []
    for block in mixture.iter_sizes(epoch, start):
        blocks.append(block)
        if sum(len(found.ids) for found in blocks) >= count:
            break
    return SizeBlock(*(np.concatenate(column)[:count] for column in zip(*blocks, strict=True)))


def list_draws(mixture: Mixture, epoch: int = 0) -> list[tuple[int, int, int]]:
    draws = [mixture.locate(id) for id in mixture.iter_ids(epoch)]
    assert {draw.epoch for draw in draws} == {epoch}
    return [(draw.dataset, draw.row, draw.repeat) for draw in draws]


@st.composite
def entries(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Data sets of a few records, some of them bad, any part of which is drawn at any rate."""
    return draw(
        st.lists(
            st.fixed_dictionaries(
                {
                    "num_lines": st.integers(1, 300),
                    "bad": st.sampled_from([0.0, 0.4]),
                    "repeat_time": st.sampled_from([0.05, 0.5, 1.0, 2.25, 7.0]),
                    "weight": st.sampled_from([0.01, 1.0, 30.0]),
                }
            ),
            min_size=1,
            max_size=4,
        )
    )


def write_mixture(folder: str, chosen: list[dict[str, Any]], **options: Any) -> Mixture:
    indexes = [write_index(Path(folder), f"set{number}", **entry) for number, entry in enumerate(chosen)]
    return Mixture(indexes, seed=0, max_tokens=None, **options)


# --- rows and records


@given(st.lists(st.booleans(), min_size=1, max_size=4000), st.data())
def test_rows_find_the_kth_usable_one(usable: list[bool], data: st.DataObject) -> None:
    rows = Rows(np.array(usable))
    expected = [row for row, is_usable in enumerate(usable) if is_usable]
    assert len(rows) == len(expected)
    assert [found for _, part in rows.iter_parts() for found in part.tolist()] == usable
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


def test_bad_and_over_long_records_are_never_drawn(tmp_path: Path) -> None:
    records = [record(), "broken", record(answer="long " * 100), record()]
    mixture = mix(write_meta(tmp_path, {"pets": records}), max_tokens=150)
    assert {row for _, row, _ in list_draws(mixture)} == {0, 3}
    assert mixture.sources[0].num_too_long == 1
    assert max(mixture.count_tokens(range(len(mixture)))) <= 150


def test_samples_of_more_tiles_than_a_pack_holds_are_never_drawn(tmp_path: Path) -> None:
    # F17: the original dropped them after they were decoded.
    long = {"answer": "long " * 100}
    records = [record(), record("1.png"), record("0.png"), record(["1.png", "2.png"]), record("1.png", **long)]
    path = write_meta(tmp_path, {"pets": records})
    assert {row for _, row, _ in list_draws(mix(path, max_tiles=6))} == {0, 2}
    # Seven tiles fit into seven.
    assert {row for _, row, _ in list_draws(mix(path, max_tiles=7))} == {0, 1, 2, 3, 4}
    source = mix(path, max_tiles=6, max_tokens=150).sources[0]
    # The fifth is too long as well, and is counted once.
    assert (source.num_too_long, source.num_too_many_tiles) == (1, 2)


def test_a_data_set_of_which_nothing_is_left_is_refused_with_all_reasons(tmp_path: Path) -> None:
    path = write_meta(tmp_path, {"pets": ["broken", record(answer="long " * 100), record("1.png"), record("2.png")]})
    with pytest.raises(
        DataError,
        match="none of 4 records can be trained on; 1 are longer than max_seq_length, 150, and 2 have more tiles than "
        "num_images_expected, 2",
    ):
        mix(path, max_tokens=150, max_tiles=2)
    path = write_meta(tmp_path, {"pets": ["broken"]})
    with pytest.raises(DataError, match=r"none of 1 records can be trained on\. See them"):
        mix(path, max_tokens=150, max_tiles=2)


# --- order and ids


def test_an_epoch_has_every_draw_once_in_an_order_of_its_own(tmp_path: Path) -> None:
    # F13: the original drew the same order in every epoch, whatever the seed.
    mixture = mix(write_meta(tmp_path, {"a": [record()] * 30, "b": [record()] * 10}))
    orders = [list(mixture.iter_ids(epoch)) for epoch in (0, 1)]
    assert sorted(orders[0]) == list(range(40))
    assert sorted(orders[1]) == list(range(40, 80))
    assert [id + 40 for id in orders[0]] != orders[1]
    assert list(mixture.iter_ids(0, start=17)) == orders[0][17:]


@given(entries(), st.integers(0, 3), st.integers(0, 3000))
@settings(max_examples=50, deadline=None)
def test_an_epoch_is_all_of_its_ids_and_goes_on_from_any_of_them(
    chosen: list[dict[str, Any]], epoch: int, start: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        mixture = write_mixture(folder, chosen)
        ids = list(mixture.iter_ids(epoch))
        assert sorted(ids) == list(range(epoch * len(mixture), (epoch + 1) * len(mixture)))
        assert list(mixture.iter_ids(epoch, start)) == ids[start:]
        assert {mixture.locate(id).epoch for id in ids[:20]} == {epoch}


@given(entries(), st.integers(0, 3000))
@settings(max_examples=50, deadline=None)
def test_an_endless_data_set_is_used_up_before_it_starts_again(chosen: list[dict[str, Any]], start: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        mixture = write_mixture(folder, chosen, is_endless=True)
        ids = take(mixture, 6000)
        assert len(set(ids)) == 6000
        assert take(mixture, 100, start=start) == ids[start : start + 100]
        epochs, datasets = np.array(ids) // len(mixture), mixture.find_dataset(ids)
        for dataset, source in enumerate(mixture.sources):
            # All ids differ, so each pass that is over had all draws of the data set.
            of_source = epochs[datasets == dataset]
            assert of_source.tolist() == [number // len(source) for number in range(len(of_source))]


def test_an_endless_data_set_starts_again_in_another_order_of_the_same_draws(tmp_path: Path) -> None:
    mixture = Mixture([write_index(tmp_path, "a", 200, repeat_time=0.5)], seed=0, max_tokens=None, is_endless=True)
    passes = [[mixture.locate(id).row for id in take(mixture, 100, start=start)] for start in (0, 100, 200)]
    assert set(passes[0]) == set(passes[1]) == set(passes[2])
    assert len(set(passes[0])) == 100
    assert passes[0] != passes[1] != passes[2]


def test_a_draw_is_the_same_in_an_epoch_and_in_an_endless_mixture(tmp_path: Path) -> None:
    index = write_index(tmp_path, "a", 300, bad=0.1, repeat_time=2.5)
    finite, endless = (Mixture([index], seed=0, max_tokens=None, is_endless=is_endless) for is_endless in (False, True))
    ids = [*finite.iter_ids(0), *finite.iter_ids(1)]
    assert take(endless, len(ids)) == ids
    assert [finite.locate(id) for id in ids] == [endless.locate(id) for id in ids]


def test_endless_weights_hold_for_ever(tmp_path: Path) -> None:
    # The original drew alike from all that was left once a data set was used up.
    indexes = [write_index(tmp_path, "a", 90_000), write_index(tmp_path, "b", 5000, weight=2.0)]
    mixture = Mixture(indexes, seed=0, max_tokens=None, is_endless=True)
    for start in (0, 100_000, 10**7, 10**12 + 1):
        datasets = mixture.find_dataset(take(mixture, 1000, start=start))
        assert int((datasets == 1).sum()) == pytest.approx(100, abs=3)


def test_an_endless_mixture_has_one_epoch(tmp_path: Path) -> None:
    mixture = Mixture([write_index(tmp_path, "a", 5)], seed=0, max_tokens=None, is_endless=True)
    with pytest.raises(IndexError, match="epoch 1 of an endless mixture"):
        next(mixture.iter_ids(1))


def test_an_id_below_zero_is_none(tmp_path: Path) -> None:
    mixture = Mixture([write_index(tmp_path, "a", 5)], seed=0, max_tokens=None)
    with pytest.raises(IndexError):
        mixture.locate(-1)


def test_weights_and_the_root_of_the_size_change_when_and_not_what(tmp_path: Path) -> None:
    path = write_meta(tmp_path, {"large": [record()] * 400, "small": [record()] * 100})
    plain, by_root = mix(path), mix(path, by_root_of_size=True)

    def share_of_small(mixture: Mixture) -> float:
        return sum(dataset == 1 for dataset, _, _ in list_draws(mixture)[:100]) / 100

    assert share_of_small(plain) == pytest.approx(1 / 5, abs=0.03)
    # Roots of 400 and 100 are 2 to 1.
    assert share_of_small(by_root) == pytest.approx(1 / 3, abs=0.03)
    assert Counter(list_draws(plain)) == Counter(list_draws(by_root))


def test_a_mixture_draws_the_same_in_another_process(tmp_path: Path) -> None:
    mixture = write_mixture(str(tmp_path), [{"num_lines": 200, "bad": 0.3, "repeat_time": 1.5}] * 2)
    copy: Mixture = pickle.loads(pickle.dumps(mixture))
    assert [copy.locate(id) for id in range(900)] == [mixture.locate(id) for id in range(900)]


# --- sizes


@pytest.mark.parametrize("is_endless", [False, True])
def test_sizes_are_those_of_the_records_that_the_ids_mean(tmp_path: Path, is_endless: bool) -> None:
    chosen = [{"num_lines": 500, "bad": 0.2, "repeat_time": 1.3}, {"num_lines": 50, "bad": 0.0, "repeat_time": 2.0}]
    mixture = write_mixture(str(tmp_path), chosen, is_endless=is_endless)
    found = take_sizes(mixture, 550, start=30)
    assert found.ids.tolist() == take(mixture, 550, start=30)[: len(found.ids)]
    draws = [mixture.locate(id) for id in found.ids.tolist()]
    indexes = [mixture.sources[draw.dataset].index for draw in draws]
    assert found.tokens.tolist() == [index.tokens[draw.row] for index, draw in zip(indexes, draws, strict=True)]
    assert found.tiles.tolist() == [index.tiles[draw.row] for index, draw in zip(indexes, draws, strict=True)]
    assert found.tokens.tolist() == mixture.count_tokens(found.ids)
    assert mixture.find_dataset(found.ids).tolist() == [draw.dataset for draw in draws]


def test_of_no_ids_there_is_nothing_to_say(tmp_path: Path) -> None:
    mixture = write_mixture(str(tmp_path), [{"num_lines": 5}])
    assert mixture.count_tokens([]) == mixture.find_dataset([]).tolist() == []


def test_totals_are_the_sums_over_an_epoch(tmp_path: Path) -> None:
    chosen = [{"num_lines": 400_000, "bad": 0.3, "repeat_time": 1.0}, {"num_lines": 50, "repeat_time": 3.0}]
    mixture = write_mixture(str(tmp_path), chosen, max_tiles=40)
    found = take_sizes(mixture, len(mixture), epoch=1)
    assert mixture.totals.num_samples == len(mixture) == len(found.ids)
    assert mixture.totals.tokens == found.tokens.sum()
    assert mixture.totals.tokens_squared == (found.tokens**2).sum()
    assert mixture.totals.tiles == found.tiles.sum()


def test_a_drawn_share_counts_in_totals_by_its_size(tmp_path: Path) -> None:
    mixture = write_mixture(str(tmp_path), [{"num_lines": 40_000, "repeat_time": 2.5}])
    found = take_sizes(mixture, len(mixture))
    assert mixture.totals.num_samples == 100_000
    assert mixture.totals.tokens == pytest.approx(found.tokens.sum(), rel=0.01)
    assert mixture.totals.tokens_squared == pytest.approx((found.tokens**2).sum(), rel=0.01)
    assert mixture.totals.tiles == pytest.approx(found.tiles.sum(), rel=0.01)


@pytest.mark.parametrize("by_root_of_size", [False, True])
def test_totals_of_an_endless_mixture_are_of_its_average_draw(tmp_path: Path, by_root_of_size: bool) -> None:
    chosen = [{"num_lines": 300}, {"num_lines": 20, "weight": 5.0}, {"num_lines": 9, "repeat_time": 2.0}]
    mixture = write_mixture(str(tmp_path), chosen, is_endless=True, by_root_of_size=by_root_of_size)
    found = take_sizes(mixture, 60_000)
    assert mixture.totals.num_samples == 1
    assert mixture.totals.tokens == pytest.approx(found.tokens.mean(), rel=2e-3)
    assert mixture.totals.tokens_squared == pytest.approx((found.tokens**2).mean(), rel=2e-3)
    assert mixture.totals.tiles == pytest.approx(found.tiles.mean(), rel=2e-3)


def test_a_digest_covers_rows_sizes_and_limits(tmp_path: Path) -> None:
    path = write_meta(tmp_path, {"pets": [record("0.png", width=16, height=16)] * 3})
    digests = [mix(path, **limits).digest for limits in ({}, {"max_tokens": 512}, {"max_tiles": 512}, {})]
    assert digests[0] == digests[3]
    assert len(set(digests)) == 3
    mixture = mix(path)
    column = np.load(mixture.sources[0].index.directory / "tiles.npy", mmap_mode="r+")
    column[1] += 1
    column.flush()
    assert mix(path).digest != digests[0]


def test_ten_million_rows_are_never_copied_and_hold_two_bits_each(tmp_path: Path) -> None:
    num_lines = 10_000_000
    index = write_index(tmp_path, "a", num_lines, bad=0.05)
    _ = index.status, index.tokens, index.tiles
    tracemalloc.start()
    try:
        mixture = Mixture([index], seed=0, max_tokens=8192, max_tiles=48)
        assert mixture.totals.tokens > 0
        next(mixture.iter_sizes(0, len(mixture) // 2))
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < num_lines / 4 + 1e6
    # A copy of the tokens alone would be 4 bytes a row.
    assert peak < 3 * num_lines
    assert math.isclose(mixture.totals.num_samples, len(mixture))
