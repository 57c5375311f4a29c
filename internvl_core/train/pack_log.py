"""What the packer has made so far, a log line every so many samples."""

import logging
from collections.abc import Sequence

import numpy as np

from internvl_core.data.mixture import Mixture
from internvl_core.data.packing import Pack
from internvl_core.data.sizes import PackLimits

logger = logging.getLogger(__name__)


class PackLog:
    """Sums over the packs planned since this attempt began, somewhat ahead of the training."""

    def __init__(self, mixture: Mixture, limits: PackLimits, *, every: int) -> None:
        """Begin to count.

        Args:
            every: samples between two lines.
        """
        self._mixture = mixture
        self._limits = limits
        self._every = every
        self._num_packs = 0
        self._tokens = 0
        self._tiles = 0
        self._samples = np.zeros(len(mixture.sources), np.int64)

    def record(self, packs: Sequence[Pack], *, block_steps: int) -> None:
        """Count the packs of a step.

        Args:
            block_steps: how many steps are grouped by cost.
        """
        if not self._num_packs:
            self._tell_grouping(block_steps)
        lines_before = self._samples.sum() // self._every
        ids = np.concatenate([np.asarray(pack.ids, np.int64) for pack in packs]) if packs else np.empty(0, np.int64)
        self._samples += np.bincount(self._mixture.find_dataset(ids), minlength=len(self._samples))
        self._num_packs += len(packs)
        self._tokens += sum(pack.tokens for pack in packs)
        self._tiles += sum(pack.tiles for pack in packs)
        if self._samples.sum() // self._every > lines_before:
            self._write()

    @staticmethod
    def _tell_grouping(block_steps: int) -> None:
        if block_steps == 1:
            logger.info("Steps take packs as they come, not grouped by cost")
        else:
            logger.info("Packs cannot be made of equal cost: steps are grouped by it, %d at a time", block_steps)

    def _write(self) -> None:
        total = int(self._samples.sum())
        shares = [
            f"{source.index.meta.name} {count / total:.1%}"
            for source, count in zip(self._mixture.sources, self._samples.tolist(), strict=True)
        ]
        logger.info(
            "Packed %d samples into %d packs: %.1f %% of their tokens and %.1f %% of their tiles used; %s",
            total,
            self._num_packs,
            100 * self._tokens / (self._num_packs * self._limits.max_tokens),
            100 * self._tiles / (self._num_packs * self._limits.max_tiles),
            ", ".join(shares),
        )
