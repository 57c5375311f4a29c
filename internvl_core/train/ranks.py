"""What the ranks wait for together."""

from collections.abc import Callable

import torch
import torch.distributed as dist


def wait_together(is_reached: Callable[[], bool] | None, device: torch.device, *, tell: Callable[[], None]) -> None:
    """Keep all ranks here until rank 0 says that something is reached.

    They ask again and again in short collectives, so that a long wait is not taken for a hang.

    Args:
        is_reached: blocks for some seconds at the most; None on the ranks that cannot know.
        device: of collectives.
        tell: tells the supervisor that this rank waits and does not hang.
    """
    while True:
        tell()
        told = torch.tensor([int(is_reached()) if is_reached is not None else 0], device=device)
        if dist.is_initialized():
            dist.broadcast(told, src=0)
        if told.item():
            return
