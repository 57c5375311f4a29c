import pytest
from data_sets import build_encoding, record, write_meta

from internvl_core.data.index import open_index
from internvl_core.data.meta import load_meta
from internvl_core.data.mixture import Mixture
from internvl_core.train.sampler import EpochSampler


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Mixture:
    """A hundred and one records of different lengths, in two data sets."""
    folder = tmp_path_factory.mktemp("lengths")
    records = [record(answer="word " * (1 + (7 * number) % 101)) for number in range(101)]
    path = write_meta(folder, {"a": records[:60], "b": records[60:]})
    indexes = [open_index(meta, build_encoding(), folder / "cache") for meta in load_meta(path)]
    return Mixture(indexes, seed=1, max_tokens=None)


def draw(mixture: Mixture, *, is_grouped: bool, epoch: int = 0) -> list[int]:
    sampler = EpochSampler(mixture, is_grouped=is_grouped, batch_size=4)
    sampler.set_epoch(epoch)
    return list(sampler)


@pytest.mark.parametrize("is_grouped", [False, True])
def test_each_sample_comes_once_an_epoch(mixture: Mixture, is_grouped: bool) -> None:
    assert len(EpochSampler(mixture, is_grouped=is_grouped, batch_size=4)) == 101
    assert sorted(draw(mixture, is_grouped=is_grouped)) == list(range(101))


@pytest.mark.parametrize("is_grouped", [False, True])
def test_the_order_depends_on_seed_and_epoch_and_nothing_else(mixture: Mixture, is_grouped: bool) -> None:
    assert draw(mixture, is_grouped=is_grouped, epoch=2) == draw(mixture, is_grouped=is_grouped, epoch=2)
    assert draw(mixture, is_grouped=is_grouped, epoch=0) != draw(mixture, is_grouped=is_grouped, epoch=1)


def test_samples_of_like_length_share_a_batch(mixture: Mixture) -> None:
    def spread(order: list[int]) -> int:
        lengths = mixture.count_tokens(order)
        batches = [lengths[start : start + 4] for start in range(0, 100, 4)]
        return sum(max(batch) - min(batch) for batch in batches)

    assert spread(draw(mixture, is_grouped=True)) < spread(draw(mixture, is_grouped=False)) / 3
