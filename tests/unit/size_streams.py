"""Streams of sample sizes for tests of packing."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from internvl_core.data.sizes import PackLimits, SampleCost, SizeBlock, SizeTotals

DATA_DIR = Path(__file__).parent.parent / "data"

STANDARD = PackLimits(16384, 48)

# Of InternVL 2.5 8b, in units of a token's product with the weights.
COST = SampleCost(per_token=1.0, per_token_squared=1.9e-5, per_tile=53.0)


class ListStream:
    """Samples of given sizes, in the same order in every epoch; counts how many were read."""

    def __init__(self, samples: Sequence[tuple[int, int]], *, block_size: int = 1000) -> None:
        self.tokens = np.array([tokens for tokens, _ in samples], np.int64)
        self.tiles = np.array([tiles for _, tiles in samples], np.int64)
        self.num_read = 0
        self._block_size = block_size

    def __len__(self) -> int:
        return len(self.tokens)

    def iter_sizes(self, epoch: int, start: int = 0) -> Iterator[SizeBlock]:
        for first in range(start, len(self), self._block_size):
            rows = np.arange(first, min(first + self._block_size, len(self)))
            self.num_read += len(rows)
            yield SizeBlock(epoch * len(self) + rows, self.tokens[rows], self.tiles[rows])

    @property
    def totals(self) -> SizeTotals:
        return count_totals(self.tokens, self.tiles)


def count_totals(tokens: NDArray[np.int64], tiles: NDArray[np.int64]) -> SizeTotals:
    squares = tokens.astype(np.float64) ** 2
    return SizeTotals(len(tokens), float(tokens.sum()), float(squares.sum()), float(tiles.sum()))


def load_stream(name: str) -> ListStream:
    """Load rows of the published length sets, 12,000 of each."""
    with np.load(DATA_DIR / f"lengths_{name}.npz") as arrays:
        return ListStream(list(zip(arrays["tokens"].tolist(), arrays["tiles"].tolist(), strict=True)))


def draw_mixture(
    count: int, *, seed: int = 0, videos: float = 0.1, most_frames: int = 32, limits: PackLimits = STANDARD
) -> ListStream:
    """Draw a mixture of text, photographs, documents and videos, but for what is over the limits."""
    draw = np.random.default_rng(seed)
    rest = (1 - videos) / 3
    kind = draw.choice(4, count, p=[rest, rest, rest, videos])
    tiles = np.choose(
        kind,
        [
            np.zeros(count, np.int64),
            draw.integers(2, 8, count),
            draw.integers(5, 14, count),
            draw.integers(8, most_frames + 1, count),
        ],
    )
    text = np.clip(300 * np.exp(draw.normal(0, 0.9, count)), 16, 4000).astype(np.int64)
    tokens = text + 256 * tiles
    fits = (tokens <= limits.max_tokens) & (tiles <= limits.max_tiles)
    return ListStream(list(zip(tokens[fits].tolist(), tiles[fits].tolist(), strict=True)))
