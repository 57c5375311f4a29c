"""How much each token of a conversation counts in the loss.

A conversation of n tokens that are learnt gives each of them the same weight: 1, 1/n or n^-1/2, so
that in all it counts n, 1 or n^1/2 (reference 2.8). The weighted mean over any number of
conversations is then the sum of weight x cross entropy over the sum of weights, however they are
packed. Shapes: `T` tokens of one conversation.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from internvl_core.data.conversation import IGNORE_INDEX
from internvl_core.errors import ArgumentError

LossReduction = Literal["token", "sample", "square"]

_EXPONENTS: dict[str, float] = {"token": 0.0, "sample": -1.0, "square": -0.5}


def weigh_labels(labels: Tensor, reduction: LossReduction) -> Tensor:
    """Weigh the labels of one conversation, each where its label is: position t holds what t-1 predicts.

    The first position is predicted by nothing, so its label neither counts nor is counted.

    Args:
        labels: [T], int64.

    Returns:
        [T], float32; 0 where nothing is learnt.

    Raises:
        ArgumentError: there is no such reduction.
    """
    if reduction not in _EXPONENTS:
        raise ArgumentError(f"loss_reduction: {reduction} is none of {', '.join(get_args(LossReduction))}.")
    is_learnt = labels != IGNORE_INDEX
    is_learnt[:1] = False
    # At least 1, or a conversation without labels would be 0 x infinity.
    count = max(1, int(is_learnt.sum()))
    return is_learnt.to(torch.float32) * float(count ** _EXPONENTS[reduction])
