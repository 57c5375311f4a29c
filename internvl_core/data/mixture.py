"""The mixture of a stage: every draw of a training by its id, and the order the draws come in.

A draw is one use of one record; `repeat_time` uses records more often, or fewer of them. The draws
of an epoch are numbered over the data sets one after the other, and the id of a draw is
`epoch * len(mixture) + number`: it means the same draw for ever, and all that is known of a draw
follows from it. Nothing here grows with the number of records but a bit and a half for each.
Shapes: `N` draws.
"""

import hashlib
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from internvl_core.data.index import DatasetIndex
from internvl_core.data.order import ENDLESS, Draws, Interleave, build_keys, derive_keys, permute
from internvl_core.data.sizes import SizeBlock, SizeTotals
from internvl_core.errors import DataError

# Memory-mapped columns are looked at in parts, so that no copy of a whole one is made.
_PART_ROWS = 1 << 18
_BLOCK_ROWS = 128


@dataclass(frozen=True)
class Draw:
    """What an id stands for."""

    dataset: int
    row: int
    """Of the data set's index."""
    repeat: int
    """How often the record was drawn before in this epoch's order of passes."""
    epoch: int
    """In an endless mixture: how often the data set was used up before."""


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

    def iter_parts(self) -> Iterator[tuple[slice, NDArray[np.bool_]]]:
        """Yield stretches of the index, and which of their rows are trained on."""
        for start in range(0, self._num_rows, _PART_ROWS):
            part = slice(start, min(start + _PART_ROWS, self._num_rows))
            bits = self._bits[start // _BLOCK_ROWS : (start + _PART_ROWS) // _BLOCK_ROWS]
            yield part, np.unpackbits(bits, count=part.stop - start).view(bool)

    def find(self, numbers: Draws) -> Draws:
        """Find the rows of the `numbers`-th of them."""
        if len(self) == self._num_rows:
            return numbers
        blocks = np.searchsorted(self._counts, numbers, side="right") - 1
        before = np.cumsum(np.unpackbits(self._bits[blocks], axis=1), axis=1, dtype=np.uint8)
        places = (before <= (numbers - self._counts[blocks])[:, None]).sum(axis=1)
        rows: Draws = blocks * _BLOCK_ROWS + places
        return rows


class Source:
    """The records of one data set that are trained on."""

    def __init__(self, index: DatasetIndex, *, max_tokens: int | None, max_tiles: int | None) -> None:
        self.index = index
        self.num_too_long = 0
        """Samples of more tokens than `max_tokens`."""
        self.num_too_many_tiles = 0
        """Samples of more tiles than `max_tiles`; one that is too long as well counts there."""
        self.rows = Rows(self._find_usable(max_tokens, max_tiles))
        if not len(self.rows):
            raise DataError(
                f"{index.meta.annotation}: none of {index.num_records} records can be trained on"
                f"{self._tell_limits(max_tokens, max_tiles)}. See them with internvl data check, and remove dataset "
                f"{index.meta.name!r} or mend it."
            )
        self.num_passes, self.num_extra = index.meta.count_samples(len(self.rows))

    def __len__(self) -> int:
        """Count the draws of an epoch."""
        return self.num_passes * len(self.rows) + self.num_extra

    def sum_sizes(self) -> tuple[int, int, int]:
        """Sum tokens, squares of tokens, and tiles over the records, each taken once."""
        num_tokens = num_squared = num_tiles = 0
        for part, usable in self.rows.iter_parts():
            # Whole numbers, whose sum is the same on every machine: packs are planned by it.
            tokens = self.index.tokens[part][usable].astype(np.int64)
            num_tokens += int(tokens.sum())
            num_squared += int((tokens * tokens).sum())
            num_tiles += int(self.index.tiles[part][usable].sum(dtype=np.int64))
        return num_tokens, num_squared, num_tiles

    def _find_usable(self, max_tokens: int | None, max_tiles: int | None) -> NDArray[np.bool_]:
        found = np.empty(self.index.num_lines, bool)
        for start in range(0, len(found), _PART_ROWS):
            part = slice(start, start + _PART_ROWS)
            usable = self.index.status[part] == 0
            if max_tokens is not None:
                is_long = usable & (self.index.tokens[part] > max_tokens)
                self.num_too_long += int(is_long.sum())
                usable &= ~is_long
            if max_tiles is not None:
                is_large = usable & (self.index.tiles[part] > max_tiles)
                self.num_too_many_tiles += int(is_large.sum())
                usable &= ~is_large
            found[part] = usable
        return found

    def _tell_limits(self, max_tokens: int | None, max_tiles: int | None) -> str:
        told = []
        if self.num_too_long:
            told.append(f"{self.num_too_long} are longer than max_seq_length, {max_tokens}")
        if self.num_too_many_tiles:
            told.append(f"{self.num_too_many_tiles} have more tiles than num_images_expected, {max_tiles}")
        return f"; {', and '.join(told)}" if told else ""


class Mixture:
    """All data sets of a stage."""

    def __init__(
        self,
        indexes: Sequence[DatasetIndex],
        *,
        seed: int,
        max_tokens: int | None,
        max_tiles: int | None = None,
        by_root_of_size: bool = False,
        is_endless: bool = False,
    ) -> None:
        """Mix data sets.

        Args:
            max_tokens: longer samples are left out; None for none.
            max_tiles: samples of more tiles are left out; None for none.
            by_root_of_size: draw from a data set in proportion to the root of its size, not to its size.
            is_endless: there is one epoch without an end, in which a data set that is used up starts again in
                another order, and all are drawn in the same proportions for ever.
        """
        self.seed = seed
        self.is_endless = is_endless
        self._limits = (max_tokens, max_tiles)
        self.sources = [Source(index, max_tokens=max_tokens, max_tiles=max_tiles) for index in indexes]
        sizes = [len(source) for source in self.sources]
        self._rates = [
            source.index.meta.weight * (math.sqrt(size) if by_root_of_size else size)
            for source, size in zip(self.sources, sizes, strict=True)
        ]
        self._sizes = np.array(sizes, np.int64)
        self._starts = np.array([0, *itertools.accumulate(sizes)], np.int64)
        self._num_rows = np.array([len(source.rows) for source in self.sources], np.int64)
        self._num_passes = np.array([source.num_passes for source in self.sources], np.int64)
        self._num_extra = np.array([source.num_extra for source in self.sources], np.int64)
        names = [index.meta.name for index in indexes]
        self._order_keys = build_keys([f"{seed}/order/{name}" for name in names])
        self._subset_keys = build_keys([f"{seed}/subset/{name}" for name in names])

    def __len__(self) -> int:
        """Count the draws of an epoch; in an endless mixture, of one pass over every data set."""
        return int(self._starts[-1])

    def locate(self, id: int) -> Draw:
        """Find what a draw is."""
        if id < 0:
            raise IndexError(id)
        ids = np.array([id], np.int64)
        datasets, repeats, rows = self._find_rows(ids)
        return Draw(int(datasets[0]), int(rows[0]), int(repeats[0]), id // len(self))

    def find_dataset(self, ids: Sequence[int] | Draws) -> Draws:
        """Find the numbers of the data sets [N] that draws come from."""
        found: Draws = np.searchsorted(self._starts, np.asarray(ids, np.int64) % len(self), side="right") - 1
        return found

    def count_tokens(self, ids: Sequence[int] | Draws) -> list[int]:
        """Count the tokens of draws, from the index alone."""
        counts: list[int] = self._measure(np.asarray(ids, np.int64)).tokens.tolist()
        return counts

    @cached_property
    def totals(self) -> SizeTotals:
        """Sums over an epoch, where a drawn share counts as the average; of an endless mixture, its average draw."""
        draws = [rate / sum(self._rates) for rate in self._rates] if self.is_endless else self._sizes.tolist()
        sums = [0.0, 0.0, 0.0]
        for source, num_draws in zip(self.sources, draws, strict=True):
            times = num_draws / len(source.rows)
            sums = [total + times * own for total, own in zip(sums, source.sum_sizes(), strict=True)]
        num_samples = 1.0 if self.is_endless else float(len(self))
        return SizeTotals(num_samples, sums[0], sums[1], sums[2], is_endless=self.is_endless)

    @cached_property
    def digest(self) -> str:
        """Sha256 (hex) over what decides the draws: which rows are used, and how large they are."""
        digest = hashlib.sha256("/".join(map(str, self._limits)).encode())
        for source in self.sources:
            digest.update(f"{source.index.meta.name}/{len(source)}/{source.index.num_lines}".encode())
            for column in (source.index.status, source.index.tokens, source.index.tiles):
                digest.update(np.ascontiguousarray(column).data)
        return digest.hexdigest()

    def iter_ids(self, epoch: int, start: int = 0) -> Iterator[int]:
        """Yield the ids of an epoch's draws in the order of training, from the `start`-th on."""
        for ids in self._iter_blocks(epoch, start):
            yield from ids.tolist()

    def iter_sizes(self, epoch: int, start: int = 0) -> Iterator[SizeBlock]:
        """Yield an epoch's draws in the order of training, from the `start`-th on, with their sizes."""
        return map(self._measure, self._iter_blocks(epoch, start))

    def _iter_blocks(self, epoch: int, start: int) -> Iterator[Draws]:
        if self.is_endless and epoch:
            raise IndexError(f"epoch {epoch} of an endless mixture, whose epoch 0 has no end")
        sizes = [ENDLESS] * len(self.sources) if self.is_endless else self._sizes.tolist()
        for datasets, positions in Interleave(sizes, self._rates, f"{self.seed}/{epoch}").iter_blocks(start):
            epochs, places = np.divmod(positions, self._sizes[datasets])
            yield self._shuffle(datasets, epochs + epoch, places)

    def _shuffle(self, datasets: Draws, epochs: Draws, places: Draws) -> Draws:
        """Give the ids of the draws at these places of an epoch: one pass after the other, each in its own order."""
        num_rows = self._num_rows[datasets]
        repeats = places // num_rows
        is_extra = repeats == self._num_passes[datasets]
        keys = derive_keys(derive_keys(self._order_keys[datasets], epochs), repeats)
        drawn = permute(places - repeats * num_rows, np.where(is_extra, self._num_extra[datasets], num_rows), keys)
        ids: Draws = epochs * len(self) + self._starts[datasets] + repeats * num_rows + drawn
        return ids

    def _find_rows(self, ids: Draws) -> tuple[Draws, Draws, Draws]:
        """Find data sets, repeats and rows of draws."""
        datasets = self.find_dataset(ids)
        numbers = ids % len(self) - self._starts[datasets]
        repeats, numbers = np.divmod(numbers, self._num_rows[datasets])
        extra = np.flatnonzero(repeats == self._num_passes[datasets])
        if len(extra):
            chosen = datasets[extra]
            numbers[extra] = permute(numbers[extra], self._num_rows[chosen], self._subset_keys[chosen])
        for dataset, places in _group(datasets):
            numbers[places] = self.sources[dataset].rows.find(numbers[places])
        return datasets, repeats, numbers

    def _measure(self, ids: Draws) -> SizeBlock:
        datasets, _, rows = self._find_rows(ids)
        tokens, tiles = np.empty_like(ids), np.empty_like(ids)
        for dataset, places in _group(datasets):
            index = self.sources[dataset].index
            tokens[places] = index.tokens[rows[places]]
            tiles[places] = index.tiles[rows[places]]
        return SizeBlock(ids, tokens, tiles)


def _group(datasets: Draws) -> Iterator[tuple[int, NDArray[np.intp]]]:
    """Yield each data set with the places at which it stands."""
    if not len(datasets):
        return
    places = np.argsort(datasets, kind="stable")
    ordered = datasets[places]
    cuts = [0, *(np.flatnonzero(ordered[1:] != ordered[:-1]) + 1).tolist(), len(ordered)]
    for first, last in itertools.pairwise(cuts):
        yield int(ordered[first]), places[first:last]
