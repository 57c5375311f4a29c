"""The mixture of a stage: every draw of an epoch by its number, and the order the draws come in.

A draw is one use of one record; `repeat_time` uses records more often, or fewer of them. The
numbers of an epoch's draws run over the data sets one after the other. Nothing here grows with
the number of records but one bit for each.
"""

import bisect
import hashlib
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from internvl_core.data.index import DatasetIndex
from internvl_core.data.order import Draws, Interleave, Permutation
from internvl_core.errors import DataError

_BLOCK_ROWS = 1024


@dataclass(frozen=True)
class Draw:
    """What a number stands for."""

    dataset: int
    row: int
    """Of the data set's index."""
    repeat: int
    """How often the record was drawn before in this epoch's order of passes."""


class Rows:
    """The rows of an index that are trained on: a bit for each row, and counts to find the k-th."""

    def __init__(self, usable: NDArray[np.bool_]) -> None:
        self._num_rows = len(usable)
        padded = np.zeros(-(-len(usable) // _BLOCK_ROWS) * _BLOCK_ROWS, bool)
        padded[: len(usable)] = usable
        self._bits = np.packbits(padded.reshape(-1, _BLOCK_ROWS), axis=1)
        self._counts = np.concatenate([[0], np.cumsum(padded.reshape(-1, _BLOCK_ROWS).sum(axis=1))])

    def __len__(self) -> int:
        return int(self._counts[-1])

    def find(self, numbers: Draws) -> Draws:
        """Find the rows of the `numbers`-th of them."""
        if len(self) == self._num_rows:
            return numbers
        blocks = np.searchsorted(self._counts, numbers, side="right") - 1
        before = np.cumsum(np.unpackbits(self._bits[blocks], axis=1), axis=1, dtype=np.int32)
        places = (before <= (numbers - self._counts[blocks])[:, None]).sum(axis=1)
        rows: Draws = blocks * _BLOCK_ROWS + places
        return rows


class Source:
    """The draws of one data set."""

    def __init__(self, index: DatasetIndex, *, max_tokens: int | None, seed: int) -> None:
        self.index = index
        usable = index.status == 0
        if max_tokens is not None:
            usable &= index.tokens <= max_tokens
        self.rows = Rows(usable)
        self.num_too_long = index.num_samples - len(self.rows)
        if not len(self.rows):
            raise DataError(
                f"{index.meta.annotation}: none of {index.num_records} records can be trained on"
                + (
                    f"; {self.num_too_long} are longer than max_seq_length, {max_tokens}. "
                    if self.num_too_long
                    else ". "
                )
                + f"See them with internvl data check, and remove dataset {index.meta.name!r} or mend it."
            )
        self._passes, self._extra = index.meta.count_samples(len(self.rows))
        self._subset = Permutation(len(self.rows), f"{seed}/subset/{index.meta.name}")

    def __len__(self) -> int:
        return self._passes * len(self.rows) + self._extra

    def find_rows(self, draws: Draws) -> tuple[Draws, Draws]:
        """Find the rows and the repeats of draws."""
        repeats, numbers = np.divmod(draws, len(self.rows))
        is_extra = repeats == self._passes
        numbers[is_extra] = self._subset.take(numbers[is_extra])
        return self.rows.find(numbers), repeats

    def permute(self, positions: Draws, key: str) -> Draws:
        """Give the draws at these positions of an epoch: one pass after the other, each in an order of its own."""
        draws = np.empty_like(positions)
        passes = positions // len(self.rows)
        for repeat in np.unique(passes).tolist():
            first = repeat * len(self.rows)
            size = len(self.rows) if repeat < self._passes else self._extra
            chosen = passes == repeat
            draws[chosen] = first + Permutation(size, f"{key}/{repeat}").take(positions[chosen] - first)
        return draws


class Mixture:
    """All data sets of a stage."""

    def __init__(
        self, indexes: Sequence[DatasetIndex], *, seed: int, max_tokens: int | None, by_root_of_size: bool = False
    ) -> None:
        """Mix data sets.

        Args:
            max_tokens: longer samples are left out; None for none.
            by_root_of_size: draw from a data set in proportion to the root of its size, not to its size.
        """
        self.seed = seed
        self.sources = [Source(index, max_tokens=max_tokens, seed=seed) for index in indexes]
        self._starts = [0, *itertools.accumulate(len(source) for source in self.sources)]
        self._rates = [
            source.index.meta.weight * (math.sqrt(len(source)) if by_root_of_size else len(source))
            for source in self.sources
        ]

    def __len__(self) -> int:
        return self._starts[-1]

    def locate(self, number: int) -> Draw:
        """Find what a draw is."""
        if not 0 <= number < len(self):
            raise IndexError(number)
        dataset = bisect.bisect_right(self._starts, number) - 1
        rows, repeats = self.sources[dataset].find_rows(np.array([number - self._starts[dataset]]))
        return Draw(dataset, int(rows[0]), int(repeats[0]))

    def count_tokens(self, numbers: Sequence[int]) -> list[int]:
        """Count the tokens of draws, from the index alone."""
        wanted = np.asarray(numbers, np.int64)
        datasets = np.searchsorted(self._starts, wanted, side="right") - 1
        tokens = np.empty(len(wanted), np.int64)
        for dataset in np.unique(datasets).tolist():
            chosen = datasets == dataset
            source = self.sources[dataset]
            rows, _ = source.find_rows(wanted[chosen] - self._starts[dataset])
            tokens[chosen] = source.index.tokens[rows]
        counts: list[int] = tokens.tolist()
        return counts

    @property
    def digest(self) -> str:
        """Sha256 (hex) over what decides the draws: which rows are used, and how long they are."""
        digest = hashlib.sha256()
        for source in self.sources:
            digest.update(f"{source.index.meta.name}/{len(source)}/{source.index.num_lines}".encode())
            digest.update(np.ascontiguousarray(source.index.status).data)
            digest.update(np.ascontiguousarray(source.index.tokens).data)
        return digest.hexdigest()

    def iter_order(self, epoch: int, start: int = 0) -> Iterator[int]:
        """Yield the numbers of an epoch's draws in the order of training, from the `start`-th on."""
        key = f"{self.seed}/{epoch}"
        interleave = Interleave([len(source) for source in self.sources], self._rates, key)
        for datasets, positions in interleave.iter_blocks(start):
            numbers = np.empty_like(positions)
            for dataset in np.unique(datasets).tolist():
                chosen = datasets == dataset
                source = self.sources[dataset]
                draws = source.permute(positions[chosen], f"{key}/{source.index.meta.name}")
                numbers[chosen] = self._starts[dataset] + draws
            yield from numbers.tolist()
