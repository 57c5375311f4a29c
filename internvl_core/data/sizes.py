"""How large samples are: tokens, tiles, and what they cost; all that packing knows of them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray


class SizeBlock(NamedTuple):
    """Some samples, one after the other, in the order of training: ids and sizes of equal length."""

    ids: NDArray[np.int64]
    tokens: NDArray[np.int64]
    """Image tokens included."""
    tiles: NDArray[np.int64]
    """0 for text."""


class SampleStream(Protocol):
    """The samples of a training in the order in which they are drawn."""

    def iter_sizes(self, epoch: int, start: int = 0) -> Iterator[SizeBlock]:
        """Yield the samples of an epoch from the `start`-th on; reaches any of them at once."""
        ...


@dataclass(frozen=True)
class SizeTotals:
    """Sums over the samples of an epoch; of a stream without an end, over its average sample."""

    num_samples: float
    tokens: float
    tokens_squared: float
    tiles: float
    is_endless: bool = False


MAX_PACK_TOKENS, MAX_PACK_TILES = 2**24, 2**16
"""No pack may hold more: sums of sizes are counted in 32 bits."""


@dataclass(frozen=True)
class PackLimits:
    """What fits into a pack."""

    max_tokens: int
    max_tiles: int


@dataclass(frozen=True)
class SampleCost:
    """What a sample costs in training: FLOPs, forward and backward, as a polynomial of its size."""

    per_token: float
    per_token_squared: float
    """Attention within the sample."""
    per_tile: float

    def count(self, tokens: NDArray[np.int64], tiles: NDArray[np.int64]) -> NDArray[np.float64]:
        """Count the cost of each sample."""
        sizes = tokens.astype(np.float64)
        return sizes * (self.per_token + self.per_token_squared * sizes) + self.per_tile * tiles
