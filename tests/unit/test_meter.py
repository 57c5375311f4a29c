import time
from collections.abc import Iterator

import pytest

from internvl_core.data.packing import Pack
from internvl_core.data.sizes import PackLimits
from internvl_core.train.meter import StepMeter
from internvl_core.train.sampler import Share
from internvl_core.train.steps import Step


def pack(cost: float, num_samples: int = 1) -> Pack:
    return Pack(ids=tuple(range(num_samples)), tokens=10, tiles=1, cost=cost, epoch=0)


def step(*packs: Pack) -> Step:
    return Step([each.ids for each in packs], 0.0, {}, packs)


def test_fill_is_what_was_delivered_of_what_the_packs_could_hold() -> None:
    meter = StepMeter(Share(0, 2, 1, 1), PackLimits(100, 10))
    assert meter.add([120, 5, 400, 0], step(pack(1, 3), pack(1, 5))) == 120
    values = meter.read(1.0)
    assert (values["token_fill"], values["tile_fill"], values["samples_per_pack"]) == (0.6, 0.25, 4)


def test_balance_is_the_mean_over_the_dearest_of_the_packs_that_run_side_by_side() -> None:
    meter = StepMeter(Share(0, 2, 2, 1), PackLimits(100, 10))
    # Two forwards: ranks have 1 and 3, then 4 and 4.
    meter.add([1, 0, 1, 0], step(pack(1), pack(3), pack(4), pack(4)))
    assert meter.read(1.0)["balance"] == (2 + 4) / (3 + 4)


def test_a_rank_without_a_pack_at_the_end_counts_as_idle() -> None:
    meter = StepMeter(Share(0, 2, 1, 1), PackLimits(100, 10))
    meter.add([1, 0, 1, 0], step(pack(3)))
    assert meter.read(1.0)["balance"] == 0.5


def test_padded_batches_tell_how_much_of_them_is_no_padding() -> None:
    meter = StepMeter(Share(0, 1, 1, 2), None)
    meter.add([30, 2, 40, 0], Step([[1], [2]], 0.0, {}))
    values = meter.read(1.0)
    assert values["token_fill"] == 0.75
    assert not values.keys() & {"tile_fill", "balance", "samples_per_pack"}


def test_values_are_since_the_last_time_they_were_read() -> None:
    meter = StepMeter(Share(0, 1, 1, 1), PackLimits(10, 10))
    meter.add([5, 0, 5, 0], step(pack(1)))
    meter.read(1.0)
    assert "token_fill" not in meter.read(1.0)
    meter.add([10, 0, 10, 0], step(pack(1)))
    assert meter.read(1.0)["token_fill"] == 1


def test_what_a_rank_enters_is_taken_once() -> None:
    meter = StepMeter(Share(0, 1, 1, 1), None)
    meter.record_batch(tokens=7, tiles=2, places=9)
    meter.record_batch(tokens=1, tiles=0, places=1)
    assert meter.take() == [8, 2, 10, 0]
    assert meter.take() == [0, 0, 0, 0]


def test_the_wait_for_a_batch_is_measured_and_the_work_on_it_is_not() -> None:
    def load() -> Iterator[int]:
        for number in range(2):
            time.sleep(0.02)
            yield number

    meter = StepMeter(Share(0, 1, 1, 1), None)
    for _ in meter.time_waits(load()):
        time.sleep(0.5)
    assert 40_000 <= meter.take()[3] < 1_000_000


@pytest.mark.parametrize("world_size", [1, 4])
def test_the_wait_is_told_as_a_share_of_the_time_of_all_ranks(world_size: int) -> None:
    meter = StepMeter(Share(0, world_size, 1, 1), None)
    # Each rank waited for 25 ms of 50.
    meter.add([0, 0, 0, world_size * 25_000], Step([], 0.0, {}))
    assert meter.read(0.05)["data_wait_pct"] == pytest.approx(50)


def test_every_batch_that_is_waited_for_is_told() -> None:
    told: list[int] = []
    meter = StepMeter(Share(0, 1, 1, 1), None, tell=lambda: told.append(len(told)))
    assert list(meter.time_waits(iter("abc"))) == ["a", "b", "c"]
    assert told == [0, 1, 2]
