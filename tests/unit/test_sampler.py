import itertools
from pathlib import Path

import pytest
from data_sets import build_mixture

from internvl_core.data.mixture import Mixture
from internvl_core.errors import CheckpointCorrupt
from internvl_core.train.sampler import Share, StepSampler
from internvl_core.train.steps import PaddedPlan

NUM_STEPS = 4


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Mixture:
    return build_mixture(tmp_path_factory.mktemp("lengths"), {"a": 60, "b": 41}, seed=1)


def build_sampler(mixture: Mixture, share: Share, *, digest: str = "digest") -> StepSampler:
    plan = PaddedPlan(mixture, batch_size=share.items_per_step, is_grouped=False, drops_last=False)
    return StepSampler(plan, share, num_steps=NUM_STEPS, mixture=digest)


def share_out(mixture: Mixture, world_size: int, accumulation_steps: int, items_per_batch: int) -> list[set[int]]:
    """List the draws of each step, over all ranks."""
    steps: list[set[int]] = [set() for _ in range(NUM_STEPS)]
    for rank in range(world_size):
        batches = list(build_sampler(mixture, Share(rank, world_size, accumulation_steps, items_per_batch)))
        assert len(batches) == NUM_STEPS * accumulation_steps
        for number, batch in enumerate(batches):
            assert len(batch) == items_per_batch
            step = steps[number // accumulation_steps]
            assert step.isdisjoint(batch)
            step.update(batch)
    return steps


@pytest.mark.parametrize(("world_size", "accumulation_steps", "items_per_batch"), [(2, 1, 4), (4, 2, 1), (1, 2, 4)])
def test_the_same_global_batch_has_the_same_samples_however_it_is_shared_out(
    mixture: Mixture, world_size: int, accumulation_steps: int, items_per_batch: int
) -> None:
    assert share_out(mixture, world_size, accumulation_steps, items_per_batch) == share_out(mixture, 1, 8, 1)


def test_neighbours_of_a_step_run_side_by_side() -> None:
    # So packs of like cost, which a plan may put beside each other, meet in one forward.
    assert [Share(rank, 2, 3, 1).find_items(1).start for rank in (0, 1)] == [2, 3]


def test_a_rank_for_which_nothing_is_left_gets_an_empty_batch(mixture: Mixture) -> None:
    plan = PaddedPlan(mixture, batch_size=100, is_grouped=False, drops_last=False)
    sizes = [
        [len(batch) for batch in StepSampler(plan, Share(rank, 2, 1, 50), num_steps=2, mixture="digest")]
        for rank in (0, 1)
    ]
    assert sizes == [[50, 1], [50, 0]]


def test_the_position_is_that_of_the_step_and_not_of_what_was_read_ahead(mixture: Mixture, tmp_path: Path) -> None:
    share = Share(0, 1, 2, 3)
    whole = list(build_sampler(mixture, share))
    sampler = build_sampler(mixture, share)
    # The loader is three steps ahead of the first step's end.
    list(itertools.islice(sampler, 7))
    sampler.save(tmp_path, 1)
    resumed = build_sampler(mixture, share)
    resumed.load(tmp_path)
    assert list(resumed) == whole[2:]
    assert len(resumed) == len(whole)


def test_steps_that_were_left_behind_are_forgotten(mixture: Mixture) -> None:
    sampler = build_sampler(mixture, Share(0, 1, 1, 2))
    batches = list(sampler)
    assert [draw for item in sampler.get_step(3).items for draw in item] == batches[2]
    with pytest.raises(KeyError):
        sampler.get_step(2)


def test_a_position_in_other_data_is_said_to_be_one(
    mixture: Mixture, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    share = Share(0, 1, 1, 2)
    sampler = build_sampler(mixture, share)
    list(sampler)
    sampler.save(tmp_path, 2)
    build_sampler(mixture, share).load(tmp_path)
    assert not caplog.records
    build_sampler(mixture, share, digest="other").load(tmp_path)
    assert "The data are not those of the checkpoint" in caplog.text


def test_a_checkpoint_without_a_position_is_not_resumed_from(mixture: Mixture, tmp_path: Path) -> None:
    sampler = build_sampler(mixture, Share(0, 1, 1, 2))
    with pytest.raises(
        CheckpointCorrupt, match=r"data_position.json is of version None, this trainer reads 1\. .*fresh"
    ):
        sampler.load(tmp_path)
