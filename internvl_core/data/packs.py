"""Packs, and the feed from which packers take samples; numpy only, as all of the planning.

Shapes: `N` samples.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from internvl_core.data.sizes import PackLimits, SampleCost, SampleStream, SizeBlock
from internvl_core.errors import DataError, Reason


@dataclass(frozen=True)
class Pack:
    """Samples that become one sequence."""

    ids: tuple[int, ...]
    tokens: int
    tiles: int
    cost: float
    """FLOPs, forward and backward."""
    epoch: int


class FeedBlock(NamedTuple):
    """Samples as packers take them."""

    places: NDArray[np.int64]
    """Ids, and positions in the order of the epoch [2, N]."""
    sizes: NDArray[np.int32]
    """Tokens, tiles and costs [3, N]; a cost in units of the feed."""


TOKENS, TILES, COST = 0, 1, 2
"""The rows of sizes."""

MAX_COST_UNITS = 1 << 29
"""Costs beyond are counted as this: the sum of two still fits into 32 bits."""


class SizeFeed:
    """The samples of an epoch, taken a few at a time.

    Invariant: `position` is the number of samples taken, so a feed that starts there goes on exactly.
    """

    def __init__(
        self,
        stream: SampleStream,
        limits: PackLimits,
        cost: SampleCost,
        *,
        cost_unit: float,
        epoch: int = 0,
        start: int = 0,
    ) -> None:
        """Start at the `start`-th sample of an epoch.

        Args:
            cost_unit: FLOPs. Costs are counted in whole units, so that sums are the same in any order.
        """
        self.epoch = epoch
        self.position = start
        self.cost_unit = cost_unit
        self._limits = limits
        self._cost = cost
        self._blocks = stream.iter_sizes(epoch, start)
        self._block = _EMPTY
        self._num_taken = 0

    def take(self, count: int) -> FeedBlock | None:
        """Take the next samples: at least one and at most `count`; None at the end of the epoch.

        Raises:
            DataError: a sample fits into no pack.
        """
        places, sizes = self._block
        first = self._num_taken
        while first >= places.shape[1]:
            block = next(self._blocks, None)
            if block is None:
                return None
            places, sizes = self._block = self._convert(block)
            first = 0
        last = min(first + count, places.shape[1])
        self._num_taken = last
        self.position += last - first
        return FeedBlock(places[:, first:last], sizes[:, first:last])

    def _convert(self, block: SizeBlock) -> FeedBlock:
        too_large = (block.tokens > self._limits.max_tokens) | (block.tiles > self._limits.max_tiles)
        if too_large.any():
            number = int(too_large.argmax())
            raise DataError(
                f"sample {block.ids[number]} has {block.tokens[number]} tokens and {block.tiles[number]} tiles, but a "
                f"pack holds {self._limits.max_tokens} and {self._limits.max_tiles}. Leave it out, or raise "
                "max_packed_tokens or num_images_expected.",
                reason=Reason.TOO_LONG,
            )
        positions = np.arange(self.position, self.position + len(block.ids))
        units = np.minimum(np.rint(self._cost.count(block.tokens, block.tiles) / self.cost_unit), MAX_COST_UNITS)
        return FeedBlock(
            np.stack([block.ids, positions]), np.stack([block.tokens, block.tiles, units]).astype(np.int32)
        )


_EMPTY = FeedBlock(np.zeros((2, 0), np.int64), np.zeros((3, 0), np.int32))

HeldPositions = list[list[int]]
"""Positions, in the order of the epoch, of samples that were taken and are in no finished pack, in groups."""


class Packer(Protocol):
    """Makes packs of the samples of one epoch after the other."""

    def next_pack(self, feed: SizeFeed) -> Pack | None:
        """Make the next pack; None when all samples of the feed are packed."""
        ...

    def held(self) -> HeldPositions:
        """Give the samples that are held back; what the groups mean is the packer's own."""
        ...

    def hold(self, groups: list[FeedBlock]) -> None:
        """Go on from `held()`, with the samples that stood there."""
        ...


def read_held(feed: SizeFeed, held: HeldPositions, end: int) -> list[FeedBlock]:
    """Read held samples anew from a feed that starts at or before the first; leaves it at `end`.

    Raises:
        DataError: the epoch ends before.
    """
    wanted = np.array([position for group in held for position in group], np.int64)
    places = np.zeros((2, len(wanted)), np.int64)
    sizes = np.zeros((3, len(wanted)), np.int32)
    while feed.position < end:
        first = feed.position
        block = feed.take(end - first)
        if block is None:
            raise DataError(f"Epoch {feed.epoch} has {first} samples, but {end} were taken. Did the data change?")
        found = ((first <= wanted) & (wanted < feed.position)).nonzero()[0]
        places[:, found] = block.places[:, wanted[found] - first]
        sizes[:, found] = block.sizes[:, wanted[found] - first]
    ends = np.cumsum([len(group) for group in held])
    return [
        FeedBlock(places[:, last - len(group) : last], sizes[:, last - len(group) : last])
        for group, last in zip(held, ends.tolist(), strict=True)
    ]
