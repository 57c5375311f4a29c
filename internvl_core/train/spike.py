"""Tell a loss that leaps: an event to look at, which changes nothing about the training."""

import itertools
import logging
from statistics import median

from transformers import TrainerState

logger = logging.getLogger(__name__)

MAX_RATIO = 10
"""Of a loss to the median of those logged before it."""

_WINDOW = 50
_MIN_LOSSES = 5


def find_spike(loss: float, state: TrainerState) -> dict[str, float]:
    """Compare a loss that was just logged with the ones before it; Trainer keeps them over a resume.

    Returns:
        `loss_spike`: how many times their median it is; nothing if that is within bounds.
    """
    logged = (entry["loss"] for entry in reversed(state.log_history) if "loss" in entry)
    # The newest is the loss itself.
    earlier = list(itertools.islice(logged, 1, 1 + _WINDOW))
    if len(earlier) < _MIN_LOSSES:
        return {}
    usual = median(earlier)
    if not loss > MAX_RATIO * usual > 0:
        return {}
    logger.warning(
        "step %d: the loss leapt to %.4g, %.1f times the median %.4g of the %d logged before. Nothing is done "
        "about it: if it does not come down again, resume from a commit before it with a lower learning_rate.",
        state.global_step,
        loss,
        loss / usual,
        usual,
        len(earlier),
    )
    return {"loss_spike": loss / usual}
