import math
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from internvl_core.data.loss_weights import LossReduction, weigh_labels
from internvl_core.errors import ArgumentError

REDUCTIONS = get_args(LossReduction)
# A conversation: which of its tokens are learnt. Templates begin with a token that is not.
conversations = st.lists(st.lists(st.booleans(), max_size=12).map(lambda rest: [False, *rest]), min_size=1, max_size=8)


def make_labels(is_learnt: list[bool]) -> torch.Tensor:
    return torch.tensor([5 if learnt else -100 for learnt in is_learnt])


def weigh_pack_naively(labels: list[int], segments: list[int], reduction: str) -> list[float]:
    """The original's weights of a pack (reference 2.8): by segment, then shifted with the labels."""
    weights = []
    for label, segment in zip(labels, segments, strict=True):
        count = sum(1 for other, at in zip(labels, segments, strict=True) if at == segment and other != -100)
        weight = {"token": 1.0, "sample": 1.0 / max(count, 1), "square": 1.0 / math.sqrt(max(count, 1))}[reduction]
        weights.append(weight if label != -100 else 0.0)
    return weights[1:]


@pytest.mark.parametrize("reduction", REDUCTIONS)
@given(pack=conversations)
def test_weights_of_a_pack_are_those_of_the_original(reduction: LossReduction, pack: list[list[bool]]) -> None:
    labels = torch.cat([make_labels(conversation) for conversation in pack])
    segments = [number for number, conversation in enumerate(pack) for _ in conversation]
    weights = torch.cat([weigh_labels(make_labels(conversation), reduction) for conversation in pack])
    expected = weigh_pack_naively(labels.tolist(), segments, reduction)
    assert weights[1:].tolist() == pytest.approx(expected, rel=1e-6)
    assert weights[0] == 0


@pytest.mark.parametrize("reduction", REDUCTIONS)
@given(pack=conversations, seed=st.integers(0, 100))
def test_the_weighted_mean_is_that_of_the_conversations_however_they_are_packed(
    reduction: LossReduction, pack: list[list[bool]], seed: int
) -> None:
    generator = np.random.default_rng(seed)
    weights = [weigh_labels(make_labels(conversation), reduction).numpy() for conversation in pack]
    losses = [generator.exponential(size=len(conversation)) for conversation in pack]
    means = [
        (float(loss[learnt].mean()), int(sum(learnt)))
        for loss, learnt in zip(losses, map(np.array, pack), strict=True)
        if learnt.any()
    ]
    if not means:
        assert not any(weight.any() for weight in weights)
        return
    counts = {"token": lambda n: n, "sample": lambda n: 1, "square": math.sqrt}[reduction]
    expected = sum(mean * counts(n) for mean, n in means) / sum(counts(n) for _, n in means)
    # Packs in another order, cut somewhere.
    order = generator.permutation(len(pack))
    cut = int(generator.integers(0, len(pack) + 1))
    packs = [numbers for numbers in (order[:cut], order[cut:]) if len(numbers)]
    sums = [sum(float(weights[number] @ losses[number]) for number in numbers) for numbers in packs]
    totals = [sum(float(weights[number].sum()) for number in numbers) for numbers in packs]
    assert sum(sums) / sum(totals) == pytest.approx(expected, rel=1e-5)


def test_a_label_that_nothing_predicts_neither_counts_nor_is_counted() -> None:
    assert weigh_labels(torch.tensor([5, 5, -100, 5]), "sample").tolist() == [0, 0.5, 0, 0.5]


def test_labels_are_left_as_they_are() -> None:
    labels = torch.tensor([5, 5, -100])
    weigh_labels(labels, "token")
    assert labels.tolist() == [5, 5, -100]


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_weights_are_exact_enough_to_be_summed(reduction: LossReduction) -> None:
    weights = weigh_labels(torch.tensor([-100, *[5] * 300]), reduction)
    assert weights.dtype == torch.float32
    assert weights.sum().item() == pytest.approx({"token": 300, "sample": 1, "square": 300**0.5}[reduction], rel=1e-6)


def test_an_unknown_reduction_is_refused_with_those_there_are() -> None:
    with pytest.raises(ArgumentError, match="loss_reduction: mean is none of token, sample, square"):
        weigh_labels(torch.tensor([1, 2]), "mean")
