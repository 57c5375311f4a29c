"""The commit protocol checked by brute force: the real code, on a store in memory, struck at every operation.

Every suite runs whole under the marker `slow`; otherwise a sample of it, by the seed that the run's first lines tell.
"""

import logging
from collections.abc import Callable, Iterator

import pytest
from protocol_checks import (
    A_STEPS,
    Store,
    check_crashes,
    check_damages,
    check_damages_before_collection,
    check_interleavings,
    check_outages,
    list_crashes,
    list_damages,
    list_double_crashes,
    list_outages,
    make_finished_store,
    make_forked_store,
    sample_double_crashes,
    sample_outages,
)
from protocol_model import CRASHES

NUM_INTERLEAVINGS = 20_000
# So many that this file takes less than a minute on two cores.
SAMPLE_CRASHES, SAMPLE_OUTAGES, SAMPLE_INTERLEAVINGS = 600, 200, 400


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Thousands of crashes log millions of lines."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def check_all(violations: list[str], *, num_cases: int, seed: int | None = None) -> None:
    print(f"{num_cases} cases")
    assert not violations, "\n".join([f"{len(violations)} of {num_cases} cases (--fault-seed={seed})", *violations[:5]])


def test_a_sample_of_crashes_of_two_writers_loses_nothing(sample_seed: int) -> None:
    cases = sample_double_crashes(SAMPLE_CRASHES, sample_seed)
    check_all(check_crashes(cases), num_cases=len(cases), seed=sample_seed)


@pytest.mark.fault(
    32,
    "two writers die one after the other, each at any write",
    how="the real code on a store in memory, 36,045 pairs of crashes",
    then="nothing acknowledged is lost, nothing half-written is read, nothing leaks",
)
@pytest.mark.slow
@pytest.mark.parametrize("how", ["not at all", *CRASHES])
def test_crashes_of_two_writers_at_every_write_lose_nothing(how: str) -> None:
    faults = [fault for fault in list_crashes(A_STEPS, {}, "A") if (fault.how if fault else "not at all") == how]
    cases = [pair for fault in faults for pair in list_double_crashes(fault)]
    check_all(check_crashes(cases), num_cases=len(cases))


def test_a_sample_of_lost_answers_is_survived(sample_seed: int) -> None:
    cases = sample_outages(SAMPLE_OUTAGES, sample_seed)
    check_all(check_outages(cases), num_cases=len(cases), seed=sample_seed)


@pytest.mark.slow
def test_a_lost_answer_to_every_operation_is_survived() -> None:
    cases = list_outages()
    check_all(check_outages(cases), num_cases=len(cases))


@pytest.mark.parametrize("make", [make_finished_store, make_forked_store])
def test_rot_or_loss_of_any_object_leaves_something_right_to_read(make: Callable[[], Store]) -> None:
    store = make()
    cases = list_damages(store.objects)
    check_all(check_damages(store, cases), num_cases=len(cases))


def test_a_sample_of_interleavings_of_two_living_writers_has_one_lineage(sample_seed: int) -> None:
    seeds = range(sample_seed, sample_seed + SAMPLE_INTERLEAVINGS)
    check_all(check_interleavings(seeds), num_cases=len(seeds), seed=sample_seed)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_interleavings_of_two_living_writers_have_one_lineage(part: int) -> None:
    seeds = range(part, NUM_INTERLEAVINGS, 4)
    check_all(check_interleavings(seeds), num_cases=len(seeds))


@pytest.mark.parametrize("make", [make_finished_store, make_forked_store])
def test_collecting_garbage_after_rot_or_loss_leaves_something_whole(make: Callable[[], Store]) -> None:
    store = make()
    cases = [(name, how, keep) for name, how in list_damages(store.objects) for keep in (1, 2)]
    check_all(check_damages_before_collection(store, cases, reads=True), num_cases=len(cases))


@pytest.mark.parametrize("make", [make_finished_store, make_forked_store])
def test_two_that_were_verified_before_survive_the_rot_of_one(make: Callable[[], Store]) -> None:
    store = make()
    cases = [(name, how, 2) for name, how in list_damages(store.objects)]
    check_all(check_damages_before_collection(store, cases, reads=False), num_cases=len(cases))
