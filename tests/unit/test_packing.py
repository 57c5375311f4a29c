"""Packs are full and even, hold every sample once, and go on exactly from any step."""

import itertools
import json
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from size_streams import COST, STANDARD, ListStream, draw_mixture, load_stream

from internvl_core.data.balanced_packer import MAX_DELAY_WINDOWS, MIN_WINDOW
from internvl_core.data.pack_plan import PackerName, choose_block_steps, count_full_packs, iter_packs, try_plan
from internvl_core.data.packing import Pack, PackSampler
from internvl_core.data.sizes import PackLimits, SampleCost, SizeBlock, SizeTotals
from internvl_core.errors import ArgumentError, DataError

SMALL = PackLimits(100, 10)
# A video of 30 frames fills a pack: no packing makes such packs equal.
SHORT = PackLimits(8192, 32)

sample_lists = st.lists(st.tuples(st.integers(1, 100), st.integers(0, 10)), min_size=1, max_size=120)
packers = st.sampled_from(["balanced", "legacy"])
# Where tokens, or tiles, cost next to nothing, only the hard caps keep them in bounds.
costs = st.sampled_from([COST, SampleCost(1e-3, 0, 1), SampleCost(1, 0, 1e-3)])
Build = Callable[[], PackSampler]


def build_sampler(
    stream: ListStream,
    limits: PackLimits = STANDARD,
    *,
    packs_per_step: int = 1,
    packer: PackerName = "balanced",
    seed: int = 0,
    cost: SampleCost = COST,
    num_epochs: int | None = None,
) -> PackSampler:
    return PackSampler(
        stream,
        limits,
        cost,
        totals=stream.totals,
        seed=seed,
        packs_per_step=packs_per_step,
        packer=packer,
        num_epochs=num_epochs,
    )


def take_epochs(sampler: PackSampler, count: int) -> list[Pack]:
    packs = itertools.chain.from_iterable(sampler.take_step() for _ in itertools.count())
    return list(itertools.takewhile(lambda pack: pack.epoch < count, packs))


def list_epoch(stream: ListStream, limits: PackLimits = STANDARD, packer: PackerName = "balanced") -> list[Pack]:
    trial = try_plan(stream, limits, COST, stream.totals, packer=packer)
    return list(iter_packs(trial.plan, stream, limits))


def measure_balance(steps: list[list[Pack]]) -> float:
    costs = np.array([[pack.cost for pack in step] for step in steps])
    return float(costs.mean(axis=1).sum() / costs.max(axis=1).sum())


def cut_steps(packs: list[Pack], packs_per_step: int) -> list[list[Pack]]:
    ends = range(packs_per_step, len(packs) + 1, packs_per_step)
    return [packs[end - packs_per_step : end] for end in ends]


@given(sample_lists, packers, costs)
@example([(30, 9), (10, 2), *[(100, 0)] * 20], "balanced", SampleCost(1, 0, 1e-3))
def test_an_epoch_has_every_sample_once_and_no_pack_has_too_much(
    samples: list[tuple[int, int]], packer: PackerName, cost: SampleCost
) -> None:
    stream = ListStream(samples, block_size=7)
    packs = take_epochs(build_sampler(stream, SMALL, packer=packer, cost=cost), 2)
    for epoch in range(2):
        ids = [number for pack in packs if pack.epoch == epoch for number in pack.ids]
        assert sorted(ids) == [epoch * len(samples) + number for number in range(len(samples))]
    for pack in packs:
        rows = np.array(pack.ids) - pack.epoch * len(samples)
        assert pack.tokens == stream.tokens[rows].sum() <= SMALL.max_tokens
        assert pack.tiles == stream.tiles[rows].sum() <= SMALL.max_tiles
        expected = cost.count(stream.tokens[rows], stream.tiles[rows]).sum()
        assert pack.cost == pytest.approx(expected, rel=1e-4, abs=1e-3 * len(rows))


@given(sample_lists, packers, st.integers(1, 5), st.integers(0, 12), st.integers(1, 9))
def test_a_resumed_sampler_takes_the_same_steps(
    samples: list[tuple[int, int]], packer: PackerName, packs_per_step: int, num_before: int, num_after: int
) -> None:
    stream = ListStream(samples, block_size=7)
    sampler = build_sampler(stream, SMALL, packs_per_step=packs_per_step, packer=packer)
    for _ in range(num_before):
        sampler.take_step()
    state = json.loads(json.dumps(sampler.state()))
    resumed = build_sampler(stream, SMALL, packs_per_step=packs_per_step, packer=packer)
    resumed.load_state(state)
    assert resumed.state() == state
    for _ in range(num_after):
        assert resumed.take_step() == sampler.take_step()
    assert resumed.state() == sampler.state()


def test_the_state_before_the_first_step_is_one_to_resume_from() -> None:
    stream = draw_mixture(500)
    fresh, sampler = build_sampler(stream), build_sampler(stream)
    fresh.load_state(sampler.state())
    assert fresh.take_step() == sampler.take_step() == build_sampler(stream).take_step()


@pytest.mark.parametrize("limits", [STANDARD, SHORT], ids=["even", "grouped"])
def test_a_resumed_sampler_goes_on_through_blocks_and_epochs(limits: PackLimits) -> None:
    stream = draw_mixture(2500, videos=0.2, limits=SHORT)
    sampler = build_sampler(stream, limits, packs_per_step=8)
    steps, states = [], []
    for _ in range(100):
        steps.append(sampler.take_step())
        states.append(json.dumps(sampler.state()))
    assert steps[-1][-1].epoch > 0
    assert (sampler.block_steps > 1) == (limits != STANDARD)
    for number in (0, 14, 15, 16, 40, 63, 98):
        resumed = build_sampler(stream, limits, packs_per_step=8)
        resumed.load_state(json.loads(states[number]))
        assert resumed.take_step() == steps[number + 1]


@pytest.mark.parametrize("limits", [STANDARD, SHORT], ids=["even", "grouped"])
def test_a_state_keeps_its_costs_whatever_the_trainer_counts_by_now(limits: PackLimits) -> None:
    stream = draw_mixture(2500, videos=0.2, limits=SHORT)
    sampler = build_sampler(stream, limits, packs_per_step=8)
    for _ in range(5):
        sampler.take_step()
    # As if activation checkpointing had been switched off: another weight of tokens against tiles.
    resumed = build_sampler(stream, limits, packs_per_step=8, cost=SampleCost(1.0, 1e-6, 20.0))
    resumed.load_state(json.loads(json.dumps(sampler.state())))
    for _ in range(30):
        assert resumed.take_step() == sampler.take_step()


def test_a_stream_without_an_end_is_grouped_as_one_that_has_one() -> None:
    stream = draw_mixture(4000, videos=0.3, limits=SHORT)
    total = stream.totals
    average = SizeTotals(1.0, total.tokens / 4000, total.tokens_squared / 4000, total.tiles / 4000, is_endless=True)
    for packs_per_step in (8, 64):
        trials = [try_plan(stream, SHORT, COST, totals) for totals in (total, average)]
        assert choose_block_steps(trials[1], packs_per_step) >= choose_block_steps(trials[0], packs_per_step) > 1


def test_samples_are_counted_over_all_steps() -> None:
    stream = draw_mixture(2500, videos=0.2, limits=SHORT)
    sampler = build_sampler(stream, SHORT, packs_per_step=8)
    count = 0
    for _ in range(40):
        count += sum(len(pack.ids) for pack in sampler.take_step())
        assert sampler.num_samples == sampler.state()["num_samples"] == count


def test_the_state_is_small_however_many_packs_a_step_has() -> None:
    stream = draw_mixture(9000, videos=0.3, limits=SHORT)
    sampler = build_sampler(stream, SHORT, packs_per_step=512)
    for _ in range(7):
        sampler.take_step()
        assert len(json.dumps(sampler.state())) < 4000
    assert sampler.block_steps > 1


class EndlessStream:
    """A billion samples that are computed where they are asked for."""

    totals = SizeTotals(1e9, 1e9 * 1500, 1e9 * 3e6, 1e9 * 3)

    def __init__(self) -> None:
        self.num_read = 0

    def iter_sizes(self, epoch: int, start: int = 0) -> Iterator[SizeBlock]:
        while True:
            ids = np.arange(start, start + 512)
            self.num_read += 512
            tiles = ids * 2654435761 % 7
            yield SizeBlock(ids, 40 + ids * 40503 % 1300 + 256 * tiles, tiles)
            start += 512


def test_resuming_takes_no_longer_after_more_steps() -> None:
    def build(stream: EndlessStream) -> PackSampler:
        return PackSampler(stream, STANDARD, COST, totals=stream.totals, seed=0, packs_per_step=64)

    state = build(EndlessStream()).state()
    num_read = {}
    for position in (0, 10**4, 64 * 7 * 100_000):
        stream = EndlessStream()
        sampler = build(stream)
        sampler.load_state(state | {"position": position, "held_back": [[1, 3, 200][: position // 200]]})
        assert sampler.take_step()
        num_read[position] = stream.num_read
    assert max(num_read.values()) <= min(num_read.values()) + 512


def test_no_sample_waits_for_more_than_four_windows_of_later_ones() -> None:
    # Videos of which no two go together pile up in the window: nothing else would bound their delay.
    draw = np.random.default_rng(0)
    tiles = np.where(draw.random(6000) < 0.4, 26, 0)
    stream = ListStream([(40 + 256 * count, count) for count in tiles.tolist()])
    newest, longest = 0, 0
    for pack in list_epoch(stream):
        newest = max(newest, *pack.ids)
        longest = max(longest, newest - min(pack.ids))
    assert MIN_WINDOW < longest <= MAX_DELAY_WINDOWS * MIN_WINDOW


def test_the_mixture_keeps_its_proportions() -> None:
    stream = draw_mixture(6000)
    packs = list_epoch(stream)
    order = np.array([number for pack in packs for number in pack.ids])
    is_video = stream.tiles > 13
    for first in range(0, 6000, 1000):
        drawn, packed = is_video[first : first + 1000].mean(), is_video[order[first : first + 1000]].mean()
        assert packed == pytest.approx(drawn, abs=0.025)


def test_the_packs_are_the_same_for_any_number_of_ranks() -> None:
    stream = draw_mixture(3000)
    expected = [step for sampler in [build_sampler(stream)] for step in (sampler.take_step()[0] for _ in range(240))]
    for packs_per_step in (2, 8, 48):
        sampler = build_sampler(stream, packs_per_step=packs_per_step)
        packs = [pack for _ in range(240 // packs_per_step) for pack in sampler.take_step()]
        assert sampler.block_steps == 1
        assert packs == expected


def test_grouping_puts_the_packs_of_a_block_into_other_steps_only() -> None:
    stream = draw_mixture(4000, videos=0.3, limits=SHORT)
    limits = SHORT
    sampler = build_sampler(stream, limits, packs_per_step=8)
    one_by_one = build_sampler(stream, limits)
    for _ in range(3):
        block = [sampler.take_step()]
        block += [sampler.take_step() for _ in range(sampler.block_steps - 1)]
        packs = [one_by_one.take_step()[0] for _ in range(8 * sampler.block_steps)]
        assert sorted(pack for step in block for pack in (p.ids for p in step)) == sorted(pack.ids for pack in packs)
        assert measure_balance(block) > 0.98 > measure_balance(cut_steps(packs, 8))


def test_the_order_of_grouped_steps_is_by_the_seed() -> None:
    stream = draw_mixture(4000, videos=0.3, limits=SHORT)
    orders = []
    for seed in (0, 0, 1):
        sampler = build_sampler(stream, SHORT, packs_per_step=8, seed=seed)
        orders.append([sampler.take_step() for _ in range(16)])
    assert orders[0] == orders[1] != orders[2]
    costs = [step[0].cost for step in orders[0]]
    assert costs != sorted(costs)


def test_an_incomplete_step_is_filled_from_the_next_epoch() -> None:
    stream = draw_mixture(300)
    sampler = build_sampler(stream, packs_per_step=32)
    steps = [sampler.take_step() for _ in range(4)]
    assert all(len(step) == 32 for step in steps)
    assert any(len({pack.epoch for pack in step}) == 2 for step in steps)


@pytest.mark.parametrize("name", ["mix", "sft"])
def test_packs_of_the_published_length_sets_are_full_and_even(name: str) -> None:
    stream = load_stream(name)
    packs = list_epoch(stream)
    assert count_full_packs(stream.totals, STANDARD) / len(packs) >= 0.965
    for num_ranks in (8, 64, 512):
        assert measure_balance(cut_steps(packs, num_ranks)) >= 0.995


@pytest.mark.parametrize(
    ("stream", "limits"),
    [
        (draw_mixture(8000), STANDARD),
        (draw_mixture(8000, videos=0.6), STANDARD),
        (draw_mixture(8000, videos=0.0), STANDARD),
        (draw_mixture(12000), PackLimits(32768, 96)),
        (ListStream([(300 + number * 7919 % 200, 1) for number in range(30000)]), STANDARD),
        (ListStream([(20 + number * 7919 % 50, 0) for number in range(100000)]), STANDARD),
    ],
    ids=["mixture", "videos", "images and text", "32k", "captions", "short texts"],
)
def test_packs_of_other_sets_are_full_and_even(stream: ListStream, limits: PackLimits) -> None:
    packs = list_epoch(stream, limits)
    assert count_full_packs(stream.totals, limits) / len(packs) >= 0.96
    for num_ranks in (8, 64):
        assert measure_balance(cut_steps(packs, num_ranks)) >= 0.99


def test_samples_that_fill_a_pack_to_the_last_tile_do_so() -> None:
    stream = ListStream([(1000, 3)] * 1600)
    packs = list_epoch(stream)
    assert len(packs) == count_full_packs(stream.totals, STANDARD) == 100


def test_steps_are_grouped_only_where_packs_cannot_be_even() -> None:
    even = draw_mixture(8000)
    assert choose_block_steps(try_plan(even, STANDARD, COST, even.totals), 64) == 1
    uneven = draw_mixture(8000, videos=0.2, limits=SHORT)
    trial = try_plan(uneven, SHORT, COST, uneven.totals)
    assert choose_block_steps(trial, 8) >= 16
    # Never more than an epoch has.
    assert choose_block_steps(trial, 512) <= trial.packs_per_epoch / 512


@given(sample_lists, packers, st.integers(1, 5), st.integers(1, 3))
def test_the_epochs_end_with_every_sample_in_a_step(
    samples: list[tuple[int, int]], packer: PackerName, packs_per_step: int, num_epochs: int
) -> None:
    stream = ListStream(samples)
    sampler = build_sampler(stream, SMALL, packs_per_step=packs_per_step, packer=packer, num_epochs=num_epochs)
    steps = list(iter(sampler.take_step, []))
    assert all(len(step) == packs_per_step for step in steps[:-1])
    ids = [number for step in steps for pack in step for number in pack.ids]
    assert sorted(ids) == list(range(num_epochs * len(samples)))
    assert sampler.take_step() == []


def test_grouped_epochs_end_with_what_is_left_in_a_step_of_its_own() -> None:
    stream = draw_mixture(2500, videos=0.3, limits=SHORT)
    sampler = build_sampler(stream, SHORT, packs_per_step=8, num_epochs=1)
    steps = list(iter(sampler.take_step, []))
    assert sampler.block_steps > 1
    assert [len(step) for step in steps[:-1]] == [8] * (len(steps) - 1)
    assert sorted(number for step in steps for pack in step for number in pack.ids) == list(range(len(stream)))


@pytest.mark.parametrize("packer", ["balanced", "legacy"])
@pytest.mark.parametrize("num_rows", [380, 500, 250])
def test_with_other_data_a_state_means_about_where_it_was(packer: PackerName, num_rows: int) -> None:
    before, after = draw_mixture(400), draw_mixture(num_rows)
    sampler = build_sampler(before, packer=packer)
    while (state := sampler.state())["position"] < 300:
        sampler.take_step()
    oldest = state["position"] - max(back for group in state["held_back"] for back in group)
    resumed = build_sampler(after, packer=packer, num_epochs=1)
    resumed.load_state(state, is_of_other_data=True)
    ids = sorted(number for step in iter(resumed.take_step, []) for pack in step for number in pack.ids)
    assert ids == list(range(oldest, num_rows))


@pytest.mark.parametrize("size", [(101, 0), (5, 11)])
@pytest.mark.parametrize("packer", ["balanced", "legacy"])
def test_a_sample_that_fits_into_no_pack_is_named(size: tuple[int, int], packer: PackerName) -> None:
    sampler = build_sampler(ListStream([(10, 1), size]), SMALL, packer=packer)
    with pytest.raises(DataError, match=rf"sample 1 has {size[0]} tokens and {size[1]} tiles, but a pack holds 100"):
        sampler.take_step()


def test_a_stream_without_samples_is_an_error() -> None:
    with pytest.raises(DataError, match="no samples"):
        build_sampler(ListStream([])).take_step()


@pytest.mark.parametrize(
    ("limits", "packs_per_step", "message"),
    [
        (PackLimits(0, 1), 1, "max_packed_tokens: 0 must be at least 1"),
        (PackLimits(1, 0), 1, "num_images_expected: 0 must be at least 1"),
        (PackLimits(1, 1), 0, "packs_per_step: 0 must be at least 1"),
    ],
)
def test_a_pack_or_step_without_room_is_refused(limits: PackLimits, packs_per_step: int, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        build_sampler(ListStream([(1, 1)]), limits, packs_per_step=packs_per_step)


def test_a_state_of_other_packs_is_refused() -> None:
    stream = draw_mixture(4000, videos=0.3, limits=SHORT)
    limits = SHORT
    state = build_sampler(stream, limits, packs_per_step=8).state()
    others: list[tuple[str, Build]] = [
        ("max_packed_tokens: 8193", lambda: build_sampler(stream, PackLimits(8193, 32), packs_per_step=8)),
        ("num_images_expected: 33", lambda: build_sampler(stream, PackLimits(8192, 33), packs_per_step=8)),
        ("packer: legacy", lambda: build_sampler(stream, limits, packs_per_step=8, packer="legacy")),
        ("packs_per_step: 16", lambda: build_sampler(stream, limits, packs_per_step=16)),
    ]
    for message, build in others:
        with pytest.raises(ArgumentError, match=message):
            build().load_state(state)
    with pytest.raises(ArgumentError, match="version 7"):
        build_sampler(stream, limits, packs_per_step=8).load_state(state | {"version": 7})


def test_a_state_beyond_the_end_of_the_data_is_refused() -> None:
    stream = draw_mixture(100)
    state = build_sampler(stream).state() | {"position": 101, "held_back": [[4]]}
    with pytest.raises(DataError, match=r"Epoch 0 has 100 samples, but 101 were taken"):
        build_sampler(stream).load_state(state)
