from hypothesis import given
from hypothesis import strategies as st

from internvl_core.train.sampler import EpochSampler

LENGTHS = [(7 * number) % 101 for number in range(101)]


def draw(lengths: list[int] | None, *, seed: int = 0, epoch: int = 0) -> list[int]:
    sampler = EpochSampler(len(LENGTHS), seed=seed, lengths=lengths, batch_size=4)
    sampler.set_epoch(epoch)
    return list(sampler)


@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=60),
    is_grouped=st.booleans(),
    batch_size=st.integers(1, 9),
    seed=st.integers(0, 3),
    epoch=st.integers(0, 3),
)
def test_each_sample_comes_once_an_epoch(
    lengths: list[int], is_grouped: bool, batch_size: int, seed: int, epoch: int
) -> None:
    sampler = EpochSampler(len(lengths), seed=seed, lengths=lengths if is_grouped else None, batch_size=batch_size)
    sampler.set_epoch(epoch)
    assert len(sampler) == len(lengths)
    assert sorted(sampler) == list(range(len(lengths)))


def test_the_order_depends_on_seed_and_epoch_and_nothing_else() -> None:
    for lengths in (None, LENGTHS):
        assert draw(lengths, seed=1, epoch=2) == draw(lengths, seed=1, epoch=2)
        assert draw(lengths, seed=1) != draw(lengths, seed=2)
        assert draw(lengths, epoch=0) != draw(lengths, epoch=1)


def test_samples_of_like_length_share_a_batch() -> None:
    def spread(order: list[int]) -> int:
        batches = [[LENGTHS[index] for index in order[start : start + 4]] for start in range(0, 100, 4)]
        return sum(max(batch) - min(batch) for batch in batches)

    assert spread(draw(LENGTHS)) < spread(draw(None)) / 3
