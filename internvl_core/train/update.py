"""What this rank has forwarded of the update that is under way: for whoever has to say which samples it was."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass
class Forward:
    """One forward of this rank."""

    sample_ids: Sequence[str]
    tokens: int
    tiles: int
    places: int
    """For tokens, padding included."""
    is_loss_finite: Tensor | None = None
    """On the device; None until there is a loss."""


class Update:
    """The forwards of this rank since the update before was done."""

    def __init__(self) -> None:
        self.step = 0
        """Its number, from 1."""
        self.forwards: list[Forward] = []

    def record(self, forward: Forward, *, step: int) -> None:
        """Enter a forward that begins."""
        if step != self.step:
            self.step = step
            self.forwards.clear()
        self.forwards.append(forward)
