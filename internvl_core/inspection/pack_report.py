"""What packing makes of a list of sample sizes: how full packs are, how even, and what the planning takes.

Invariant: it plans with the code that training plans with.
"""

import time
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from internvl_core.data.pack_plan import (
    PackerName,
    choose_block_steps,
    count_full_packs,
    group_steps,
    iter_packs,
    try_plan,
)
from internvl_core.data.packs import Pack
from internvl_core.data.sizes import PackLimits, SampleCost, SizeBlock, SizeTotals
from internvl_core.errors import ArgumentError, DataError

_BLOCK_SAMPLES = 4096


@dataclass(frozen=True)
class Lengths:
    """Sizes of samples that fit into a pack."""

    tokens: NDArray[np.int64]
    tiles: NDArray[np.int64]
    num_left_out: int
    """Samples that fit into none."""


@dataclass(frozen=True)
class RankReport:
    """A job of as many packs a step as there are ranks."""

    steps: int
    """Complete ones of an epoch; training fills the last from the next epoch."""
    packs_left: int
    block_steps: int
    """Steps that are grouped by cost; 1 for none."""
    balance: float | None
    """Sum of the steps' mean pack cost over that of their highest; None without a complete step."""
    max_delay: int


@dataclass(frozen=True)
class PackReport:
    """One epoch of packs."""

    samples: int
    num_left_out: int
    packs: int
    lower_bound: float
    token_fill: float
    tile_fill: float
    cost_variation: float
    """Standard deviation of the packs' cost over its mean."""
    cost_over_highest: float
    """Mean over the highest: the balance at as many ranks as there are packs."""
    max_delay: int
    """By how many samples one comes later than in the stream, at most; before steps are grouped."""
    trial_s: float
    """Processor time of the packs that were made to try, before the first one."""
    us_per_sample: float
    """Processor time of the packs."""
    by_ranks: dict[int, RankReport]

    def to_json(self) -> dict[str, Any]:
        by_ranks = self.by_ranks.items()
        return {
            "packs": self.packs,
            "efficiency": round(self.lower_bound / self.packs, 5),
            "token_fill": round(self.token_fill, 5),
            "tile_fill": round(self.tile_fill, 5),
            "balance": {str(ranks): _round(report.balance) for ranks, report in by_ranks},
            "max_delay": self.max_delay,
            "us_per_sample": round(self.us_per_sample, 2),
            "samples": self.samples,
            "left_out": self.num_left_out,
            "lower_bound": round(self.lower_bound, 2),
            "samples_per_pack": round(self.samples / self.packs, 2),
            "cost_variation": round(self.cost_variation, 5),
            "cost_over_highest": round(self.cost_over_highest, 5),
            "trial_s": round(self.trial_s, 3),
            "steps": {str(ranks): report.steps for ranks, report in by_ranks},
            "packs_left": {str(ranks): report.packs_left for ranks, report in by_ranks},
            "block_steps": {str(ranks): report.block_steps for ranks, report in by_ranks},
            "max_delay_grouped": {str(ranks): report.max_delay for ranks, report in by_ranks},
        }


def load_lengths(path: Path, limits: PackLimits) -> Lengths:
    """Load the arrays `tokens` and `tiles` of an .npz file, but for samples that fit into no pack.

    Raises:
        ArgumentError: the file cannot be opened.
        DataError: it does not hold what it should.
    """
    tokens, tiles = _load_arrays(path)
    if len(tokens) != len(tiles):
        raise DataError(f"{path}: {len(tokens)} tokens but {len(tiles)} tiles. A row of each is one sample.")
    if not len(tokens):
        raise DataError(f"{path}: tokens and tiles are empty. Give at least one sample.")
    fits = (tokens <= limits.max_tokens) & (tiles <= limits.max_tiles)
    if not fits.any():
        raise DataError(
            f"{path}: none of {len(tokens)} samples fits into {limits.max_tokens} tokens and {limits.max_tiles} tiles. "
            "Raise --max-tokens or --max-tiles."
        )
    if not tokens[fits].any():
        raise DataError(f"{path}: no sample has any tokens.")
    return Lengths(tokens[fits].astype(np.int64), tiles[fits].astype(np.int64), int((~fits).sum()))


def report_packs(
    lengths: Lengths,
    limits: PackLimits,
    cost: SampleCost,
    *,
    ranks: Sequence[int],
    packer: PackerName = "balanced",
    seed: int = 0,
) -> PackReport:
    """Pack an epoch of samples in the order of a seed, and judge it for jobs of several sizes."""
    stream = LengthStream(lengths, seed)
    totals = stream.totals
    started = time.process_time()
    trial = try_plan(stream, limits, cost, totals, packer=packer)
    tried = time.process_time()
    packs = list(iter_packs(trial.plan, stream, limits))
    finished = time.process_time()
    costs = np.array([pack.cost for pack in packs])
    by_ranks = {number: _judge_steps(packs, number, choose_block_steps(trial, number), seed) for number in ranks}
    return PackReport(
        samples=len(lengths.tokens),
        num_left_out=lengths.num_left_out,
        packs=len(packs),
        lower_bound=count_full_packs(totals, limits),
        token_fill=totals.tokens / len(packs) / limits.max_tokens,
        tile_fill=totals.tiles / len(packs) / limits.max_tiles,
        cost_variation=float(costs.std() / costs.mean()),
        cost_over_highest=float(costs.mean() / costs.max()),
        max_delay=_find_max_delay(packs),
        trial_s=tried - started,
        us_per_sample=(finished - tried) / len(lengths.tokens) * 1e6,
        by_ranks=by_ranks,
    )


class LengthStream:
    """Sizes as a stream: every epoch in an order of its own; the id of a sample is its place there."""

    def __init__(self, lengths: Lengths, seed: int) -> None:
        self._lengths = lengths
        self._seed = seed

    @property
    def totals(self) -> SizeTotals:
        tokens = self._lengths.tokens.astype(np.float64)
        return SizeTotals(
            num_samples=len(tokens),
            tokens=float(tokens.sum()),
            tokens_squared=float((tokens * tokens).sum()),
            tiles=float(self._lengths.tiles.sum()),
        )

    def iter_sizes(self, epoch: int, start: int = 0) -> Iterator[SizeBlock]:
        order = np.random.default_rng([self._seed, epoch]).permutation(len(self._lengths.tokens))
        first_id = epoch * len(order)
        for first in range(start, len(order), _BLOCK_SAMPLES):
            rows = order[first : first + _BLOCK_SAMPLES]
            ids = np.arange(first_id + first, first_id + first + len(rows))
            yield SizeBlock(ids, self._lengths.tokens[rows], self._lengths.tiles[rows])


def _judge_steps(packs: list[Pack], num_ranks: int, block_steps: int, seed: int) -> RankReport:
    num_steps = len(packs) // num_ranks
    steps: list[list[Pack]] = []
    # Blocks of about the length that training has, where its own would leave a short one at the end.
    num_blocks = num_steps if block_steps == 1 else max(1, round(num_steps / block_steps))
    for block in range(num_blocks):
        first, last = (number * num_steps // num_blocks for number in (block, block + 1))
        if last > first:
            block_packs = packs[first * num_ranks : last * num_ranks]
            steps += [block_packs] if block_steps == 1 else group_steps(block_packs, num_ranks, f"{seed}/{block}")
    means = [sum(pack.cost for pack in step) / num_ranks for step in steps]
    highest = [max(pack.cost for pack in step) for step in steps]
    return RankReport(
        steps=num_steps,
        packs_left=len(packs) - num_steps * num_ranks,
        block_steps=block_steps,
        balance=sum(means) / sum(highest) if steps else None,
        max_delay=_find_max_delay([pack for step in steps for pack in step]),
    )


def _find_max_delay(packs: list[Pack]) -> int:
    num_before, delay = 0, 0
    for pack in packs:
        delay = max(delay, num_before - min(pack.ids))
        num_before += len(pack.ids)
    return delay


def _load_arrays(path: Path) -> tuple[NDArray[np.integer[Any]], NDArray[np.integer[Any]]]:
    try:
        file = path.open("rb")
    except OSError as error:
        raise ArgumentError(f"{path}: cannot be opened: {error.strerror}. Give an .npz file.") from error
    with file:
        try:
            content = np.load(file, allow_pickle=False)
            if not isinstance(content, np.lib.npyio.NpzFile):
                raise DataError(f"{path}: a single array. Save an .npz file with the arrays tokens and tiles.")
            arrays = [content[name] if name in content.files else None for name in ("tokens", "tiles")]
            if any(isinstance(array, bytes) for array in arrays):
                raise DataError(f"{path}: tokens or tiles is no array. Save the file with numpy.savez.")
        # Whatever zip files and headers of arrays can be broken in.
        except (OSError, ValueError, EOFError, RuntimeError, MemoryError, zlib.error, zipfile.BadZipFile) as error:
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise DataError(f"{path}: no .npz file of plain arrays: {reason}") from error
    tokens, tiles = (_check(path, name, array) for name, array in zip(("tokens", "tiles"), arrays, strict=True))
    return tokens, tiles


def _check(path: Path, name: str, array: NDArray[Any] | None) -> NDArray[np.integer[Any]]:
    if array is None:
        raise DataError(f"{path}: no array {name}. It should hold the arrays tokens and tiles.")
    if array.ndim != 1:
        raise DataError(f"{path}: {name} has {array.ndim} dimensions; it should have one, a row a sample.")
    if array.dtype.kind not in "iu":
        raise DataError(f"{path}: {name} are {array.dtype}; they should be whole numbers.")
    if len(array) and array.min() < 0:
        row = int(array.argmin())
        raise DataError(f"{path}: {name} of row {row} are {array[row]}; they should be at least 0.")
    return array


def _round(value: float | None) -> float | None:
    return None if value is None else round(value, 5)
