import itertools
import json
import math
from collections import Counter
from functools import partial
from typing import Any

import pytest
from data_sets import build_mixture
from size_streams import COST, STANDARD, draw_mixture

from internvl_core.data.mixture import Mixture
from internvl_core.data.packing import PackSampler
from internvl_core.train.steps import PackedPlan, PaddedPlan, Step

BATCH = 4


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Mixture:
    """A hundred and one records of different lengths, in two data sets."""
    return build_mixture(tmp_path_factory.mktemp("lengths"), {"a": 60, "b": 41}, seed=1)


def take(mixture: Mixture, num_steps: int, *, first: int = 0, is_grouped: bool = False, **options: Any) -> list[Step]:
    plan = PaddedPlan(mixture, **{"batch_size": BATCH, "is_grouped": is_grouped, "drops_last": False, **options})
    return list(itertools.islice(plan.iter_steps(first), num_steps))


def list_ids(steps: list[Step]) -> list[list[int]]:
    return [list(itertools.chain.from_iterable(step.items)) for step in steps]


@pytest.mark.parametrize("is_grouped", [False, True])
def test_each_sample_comes_once_an_epoch_and_epochs_differ(mixture: Mixture, is_grouped: bool) -> None:
    steps = list_ids(take(mixture, 2 * 26, is_grouped=is_grouped))
    first, second = (list(itertools.chain.from_iterable(half)) for half in (steps[:26], steps[26:]))
    assert sorted(first) == list(range(101))
    assert sorted(second) == list(range(101, 202))
    assert [draw - 101 for draw in second] != first


@pytest.mark.parametrize("is_grouped", [False, True])
def test_a_plan_that_starts_anywhere_goes_on_as_one_that_walked_there(mixture: Mixture, is_grouped: bool) -> None:
    steps = list_ids(take(mixture, 60, is_grouped=is_grouped))
    for first in (1, 6, 25, 26, 27, 51):
        assert list_ids(take(mixture, 60 - first, first=first, is_grouped=is_grouped)) == steps[first:], first


def test_an_epoch_begins_with_a_new_step(mixture: Mixture) -> None:
    steps = take(mixture, 27)
    assert [len(step.items) for step in steps] == [4] * 25 + [1, 4]
    assert steps[12].epoch == 0.5
    assert [steps[25].epoch, steps[26].epoch] == [1, 1 + 1 / 26]


def test_the_rest_of_an_epoch_may_be_dropped(mixture: Mixture) -> None:
    steps = take(mixture, 50, drops_last=True)
    assert {len(step.items) for step in steps} == {4}
    assert max(Counter(itertools.chain.from_iterable(list_ids(steps))).values()) == 1
    assert steps[24].epoch == 1


@pytest.mark.parametrize(("num_epochs", "drops_last", "num_steps"), [(1, False, 26), (1, True, 25), (2.5, False, 65)])
def test_the_steps_of_epochs_are_counted(mixture: Mixture, num_epochs: float, drops_last: bool, num_steps: int) -> None:
    plan = PaddedPlan(mixture, batch_size=BATCH, is_grouped=False, drops_last=drops_last)
    assert plan.count_steps(num_epochs, plan.begin()) == num_steps


def test_samples_of_like_length_share_a_step(mixture: Mixture) -> None:
    def spread(is_grouped: bool) -> int:
        lengths = [mixture.count_tokens(ids) for ids in list_ids(take(mixture, 25, is_grouped=is_grouped))]
        return sum(max(batch) - min(batch) for batch in lengths)

    assert spread(True) < spread(False) / 3


# packs


def build_packed(*, packs_per_step: int = 8, num_epochs: int | None = None, drops_last: bool = False) -> PackedPlan:
    stream = draw_mixture(600)
    build_sampler = partial(
        PackSampler,
        stream,
        STANDARD,
        COST,
        totals=stream.totals,
        seed=0,
        packs_per_step=packs_per_step,
        num_epochs=num_epochs,
    )
    return PackedPlan(build_sampler, draws_per_epoch=600, drops_last=drops_last)


def test_packed_steps_go_on_from_the_state_of_any() -> None:
    plan = build_packed()
    steps = list(itertools.islice(plan.iter_steps(), 20))
    assert list(itertools.islice(plan.iter_steps(0, plan.begin()), 20)) == steps
    for number in (1, 7, 19):
        state = json.loads(json.dumps(steps[number - 1].state))
        assert next(plan.iter_steps(number, state)) == steps[number], number
    assert [len(step.items) for step in steps] == [8] * 20


def test_the_packed_steps_of_epochs_are_counted() -> None:
    num_packs = {
        epochs: sum(len(step.items) for step in build_packed(num_epochs=epochs).iter_steps()) for epochs in (1, 2)
    }
    for epochs, packs in num_packs.items():
        assert count_steps(build_packed(num_epochs=epochs), epochs) == math.ceil(packs / 8)
        assert count_steps(build_packed(num_epochs=epochs, drops_last=True), epochs) == packs // 8
    assert packs % 8
    assert count_steps(build_packed(num_epochs=2), 1.5) == math.ceil(0.75 * math.ceil(packs / 8))


def count_steps(plan: PackedPlan, num_epochs: float) -> int:
    return plan.count_steps(num_epochs, plan.begin())


def test_an_epoch_is_over_when_its_last_sample_was_in_a_step() -> None:
    seen = 0
    for step in itertools.islice(build_packed().iter_steps(), 30):
        seen += sum(len(item) for item in step.items)
        assert step.epoch == seen / 600
    assert step.epoch > 2


def test_steps_end_with_the_data() -> None:
    steps = list(build_packed(num_epochs=1).iter_steps())
    assert sorted(draw for step in steps for item in step.items for draw in item) == list(range(600))
