"""The original's greedy packing, for comparison: first fit into a few open packs, most tiles first.

Its rules are those of the original's `PackedDataset` (reference 4.4). A sample of text brings a
white dummy tile there, which counts against the tiles of a pack (F18); here it counts only where
the original decides by it, and no such tile is ever made.
"""

from dataclasses import dataclass, field

import numpy as np

from internvl_core.data.packs import FeedBlock, HeldPositions, Pack, SizeFeed
from internvl_core.data.sizes import PackLimits


@dataclass
class _OpenPack:
    tokens: int = 0
    tiles: int = 0
    counted_tiles: int = 0
    cost: int = 0
    samples: list[list[int]] = field(default_factory=list)

    def add(self, sample: list[int]) -> None:
        """Append a sample: id, position, tokens, tiles and cost in units."""
        _, _, tokens, tiles, cost = sample
        self.tokens += tokens
        self.tiles += tiles
        self.counted_tiles += max(1, tiles)
        self.cost += cost
        self.samples.append(sample)


class LegacyPacker:
    """Greedy packing of a stream with hard caps on tokens and tiles."""

    def __init__(self, limits: PackLimits, *, max_buffer_size: int = 20) -> None:
        """Describe the packs.

        Args:
            max_buffer_size: packs that may be open; one more, and that of the most tiles is closed.
        """
        self._limits = limits
        self._max_open = max_buffer_size
        # In descending order of tiles, of equal ones the older first.
        self._open: list[_OpenPack] = []

    def next_pack(self, feed: SizeFeed) -> Pack | None:
        """Make the next pack; None when all samples of the feed are packed."""
        while (block := feed.take(1)) is not None:
            closed = self._add(_list_samples(block)[0])
            if closed is not None:
                return _finish(closed, feed)
        # What is left at the end of an epoch follows in the order of the list.
        return _finish(self._open.pop(0), feed) if self._open else None

    def held(self) -> HeldPositions:
        """Give the positions of the samples of each open pack, in the order of the list."""
        return [[sample[1] for sample in pack.samples] for pack in self._open]

    def hold(self, groups: list[FeedBlock]) -> None:
        """Go on from `held()`."""
        self._open = []
        for group in groups:
            pack = _OpenPack()
            for sample in _list_samples(group):
                pack.add(sample)
            self._open.append(pack)

    def _add(self, sample: list[int]) -> _OpenPack | None:
        """Add a sample; return the pack that this closed: it never closes two."""
        pack = self._take_fitting(sample[2], max(1, sample[3]))
        pack.add(sample)
        if pack.tokens == self._limits.max_tokens or pack.counted_tiles == self._limits.max_tiles:
            return pack
        place = 0
        while place < len(self._open) and self._open[place].counted_tiles >= pack.counted_tiles:
            place += 1
        self._open.insert(place, pack)
        return self._open.pop(0) if len(self._open) > self._max_open else None

    def _take_fitting(self, tokens: int, tiles: int) -> _OpenPack:
        max_tokens, max_tiles = self._limits.max_tokens - tokens, self._limits.max_tiles - tiles
        for place, pack in enumerate(self._open):
            if pack.counted_tiles <= max_tiles and pack.tokens <= max_tokens:
                return self._open.pop(place)
        return _OpenPack()


def _list_samples(block: FeedBlock) -> list[list[int]]:
    samples: list[list[int]] = np.concatenate([block.places, block.sizes]).T.tolist()
    return samples


def _finish(pack: _OpenPack, feed: SizeFeed) -> Pack:
    ids = tuple(sample[0] for sample in pack.samples)
    return Pack(ids, pack.tokens, pack.tiles, pack.cost * feed.cost_unit, feed.epoch)
