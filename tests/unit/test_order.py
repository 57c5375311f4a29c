"""The order of an epoch is computed; these say that it is still an order."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from internvl_core.data.order import ENDLESS, Interleave, build_keys, derive_keys, permute


def list_order(interleave: Interleave, start: int = 0) -> list[tuple[int, int]]:
    return [
        pair
        for sources, draws in interleave.iter_blocks(start)
        for pair in zip(sources.tolist(), draws.tolist(), strict=True)
    ]


def take_order(interleave: Interleave, count: int, start: int = 0) -> list[tuple[int, int]]:
    order: list[tuple[int, int]] = []
    for sources, draws in interleave.iter_blocks(start):
        order += zip(sources.tolist(), draws.tolist(), strict=True)
        if len(order) >= count:
            break
    return order[:count]


def permute_all(size: int, key: str) -> list[int]:
    elements: list[int] = permute(np.arange(size), np.array(size), build_keys([key])).tolist()
    return elements


@given(st.integers(1, 5000), st.text(max_size=8))
def test_a_permutation_gives_every_element_once(size: int, key: str) -> None:
    assert sorted(permute_all(size, key)) == list(range(size))


@given(st.lists(st.integers(1, 300), min_size=1, max_size=20))
def test_many_permutations_at_once_are_those_of_each_alone(sizes: list[int]) -> None:
    keys = build_keys([str(number) for number in range(len(sizes))])
    positions = np.concatenate([np.arange(size) for size in sizes])
    together = permute(positions, np.repeat(sizes, sizes), np.repeat(keys, sizes)).tolist()
    assert together == [element for number, size in enumerate(sizes) for element in permute_all(size, str(number))]


def test_permutations_of_different_keys_have_nothing_in_common() -> None:
    first, second = (np.array(permute_all(10_000, key)) for key in ("1/0/pets/0", "1/1/pets/0"))
    # Two independent permutations agree in one place on the average.
    assert int((first == second).sum()) < 10
    assert abs(float(np.corrcoef(first, np.arange(10_000))[0, 1])) < 0.05


@pytest.mark.parametrize(("size", "num_orders"), [(2, 2), (3, 6), (4, 24), (5, 120)])
def test_every_order_of_a_few_elements_is_about_as_frequent_as_any_other(size: int, num_orders: int) -> None:
    num_keys = 500 * num_orders
    numbers = np.repeat(np.arange(num_keys), size)
    keys = derive_keys(build_keys(["key"]), numbers)
    orders = permute(np.tile(np.arange(size), num_keys), np.array(size), keys).reshape(-1, size)
    counts = Counter(map(tuple, orders.tolist()))
    assert len(counts) == num_orders
    assert min(counts.values()) > 330
    assert max(counts.values()) < 750


def test_places_of_a_permutation_of_ten_million_are_taken_alone() -> None:
    taken = permute(np.arange(9_999_000, 10_000_000), np.array(10_000_000), build_keys(["key"]))
    assert len(set(taken.tolist())) == 1000
    assert taken.max() < 10_000_000
    assert taken.max() - taken.min() > 9_000_000


@given(st.lists(st.integers(1, 300), min_size=1, max_size=6), st.data())
@settings(max_examples=60)
def test_an_interleave_gives_every_draw_once_and_each_source_in_its_order(
    sizes: list[int], data: st.DataObject
) -> None:
    rates = data.draw(st.lists(st.floats(0.01, 1000), min_size=len(sizes), max_size=len(sizes)))
    order = list_order(Interleave(sizes, rates, "key"))
    assert Counter(order) == {(source, draw): 1 for source, size in enumerate(sizes) for draw in range(size)}
    for source, size in enumerate(sizes):
        assert [draw for which, draw in order if which == source] == list(range(size))


@given(st.integers(0, 48_100))
@settings(max_examples=20, deadline=None)
def test_an_interleave_goes_on_from_any_draw(start: int) -> None:
    interleave = Interleave([36_000, 11_990, 10], [36_000, 11_990, 10], "key")
    assert list_order(interleave, start) == list_order(interleave)[start:]


@given(st.integers(0, 10**12), st.integers(0, 40_000), st.lists(st.floats(0.001, 1000), min_size=1, max_size=5))
@settings(max_examples=20, deadline=None)
def test_an_endless_interleave_goes_on_from_any_draw(start: int, later: int, rates: list[float]) -> None:
    interleave = Interleave([ENDLESS] * len(rates), rates, "key")
    order = take_order(interleave, later + 100, start)
    assert take_order(interleave, 100, start + later) == order[later:]
    for source in range(len(rates)):
        draws = [draw for which, draw in order if which == source]
        assert draws == list(range(draws[0], draws[0] + len(draws)) if draws else [])


def test_an_endless_interleave_begins_with_the_first_draw_of_each_source() -> None:
    order = take_order(Interleave([ENDLESS] * 3, [500, 3, 0.1], "key"), 50_000)
    counts = Counter(source for source, _ in order)
    assert len(counts) == 3
    assert set(order) == {(source, draw) for source, count in counts.items() for draw in range(count)}


def test_an_endless_interleave_holds_nothing_that_grows() -> None:
    interleave = Interleave([ENDLESS] * 3, [500, 3, 0.01], "key")
    take_order(interleave, 1, 10**12)
    assert sum(value.nbytes for value in vars(interleave).values() if isinstance(value, np.ndarray)) < 1000


def test_every_stretch_of_the_epoch_has_each_source_by_its_rate() -> None:
    order = [source for source, _ in list_order(Interleave([60_000, 30_000, 10_000], [6, 3, 1], "key"))]
    for start in range(0, 100_000, 500):
        counts = Counter(order[start : start + 500])
        assert counts[0] == pytest.approx(300, abs=4)
        assert counts[1] == pytest.approx(150, abs=4)
        assert counts[2] == pytest.approx(50, abs=4)


def test_a_source_of_twice_the_weight_is_used_up_in_half_the_time() -> None:
    order = [source for source, _ in list_order(Interleave([5000, 5000], [2, 1], "key"))]
    last = max(place for place, source in enumerate(order) if source == 0)
    assert last == pytest.approx(7500, abs=10)


def test_a_source_of_tiny_weight_takes_no_time_between_its_draws() -> None:
    # Each of 244 million blocks was looked at, 70 us apiece.
    order = list_order(Interleave([1000, 1000], [1000, 1e-6], "key"))
    assert Counter(source for source, _ in order) == {0: 1000, 1: 1000}
    assert [draw for source, draw in order if source == 1] == list(range(1000))
    assert list_order(Interleave([1000, 1000], [1000, 1e-6], "key"), 1500) == order[1500:]


def test_orders_of_different_keys_differ() -> None:
    one, other = (list_order(Interleave([500, 500], [1, 1], key)) for key in ("0/0", "0/1"))
    assert one != other
    assert sum(a == b for a, b in itertools.zip_longest(one, other)) < 900


def test_a_source_that_is_left_over_is_drawn_as_fast_as_the_others() -> None:
    # In blocks of equal time it would have one draw in thousands of blocks.
    interleave = Interleave([50_000] * 200, [1.0] * 199 + [0.001], "key")
    blocks = [len(sources) for sources, _ in interleave.iter_blocks()]
    assert sum(blocks) == 200 * 50_000
    assert min(blocks[:-1]) > 15_000
    assert max(blocks) < 18_000
