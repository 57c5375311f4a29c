"""What is decided from the data before the first pack: the cap on cost, and whether steps are grouped by it.

Where samples are small beside a pack, all packs can cost the same. Where they are not (videos that
fill a pack, a text whose attention costs more than a full pack of short ones), packs of like cost
are put into the same step instead. Both are decided once, by making some packs to try, and kept
in the state: the same packs follow after every resume.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from internvl_core.data.balanced_packer import COST_UNITS, BalancedPacker, choose_window
from internvl_core.data.legacy_packer import LegacyPacker
from internvl_core.data.packs import Pack, Packer, SizeFeed
from internvl_core.data.sizes import PackLimits, SampleCost, SampleStream, SizeTotals
from internvl_core.errors import DataError

PackerName = Literal["balanced", "legacy"]

# The cap as a share of what a pack would cost if all were full: the room that is left makes them equal.
_EVEN_CAP, _FULL_CAP = 0.97, 0.99
# A little more than full, for samples that fill a pack to the last token.
_FULLEST_CAP, _MIN_GAIN = 1.001, 1.01
# Emptier packs than this cannot be made equal, so they may as well be full.
_MIN_EVEN_FILL = 0.993
_TRIAL_PACKS, _TRIAL_SAMPLES = 2048, 32768
_GOOD_BALANCE = 0.992
_BLOCK_STEPS = (16, 32, 64)


@dataclass(frozen=True)
class PackPlan:
    """All that the packs depend on besides the stream and the limits."""

    packer: PackerName
    cost: SampleCost
    cost_cap: float
    """FLOPs of a pack."""
    samples_per_cap: float
    """Samples of mean cost that make up a pack."""
    window: int
    """Samples that the balanced packer looks at."""
    max_buffer_size: int
    """Packs that the legacy packer keeps open."""

    def build_packer(self, limits: PackLimits) -> Packer:
        if self.packer == "legacy":
            return LegacyPacker(limits, max_buffer_size=self.max_buffer_size)
        return BalancedPacker(limits, samples_per_cap=self.samples_per_cap, window=self.window)

    def build_feed(self, stream: SampleStream, limits: PackLimits, *, epoch: int = 0, start: int = 0) -> SizeFeed:
        """Build what the packer takes the samples of an epoch from, costs counted in shares of the cap."""
        unit = self.cost_cap / COST_UNITS
        return SizeFeed(stream, limits, self.cost, cost_unit=unit, epoch=epoch, start=start)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        return cls(**{**content, "cost": SampleCost(**content["cost"])})


@dataclass(frozen=True)
class Trial:
    """A plan and what some packs came to that were made by it."""

    plan: PackPlan
    costs: NDArray[np.float64]
    """FLOPs of each pack."""
    packs_per_epoch: float
    """Infinite of a stream without an end."""


def count_full_packs(totals: SizeTotals, limits: PackLimits) -> float:
    """Count the packs that are needed at least: a lower bound."""
    return max(totals.tokens / limits.max_tokens, totals.tiles / limits.max_tiles)


def iter_packs(plan: PackPlan, stream: SampleStream, limits: PackLimits, *, epoch: int = 0) -> Iterator[Pack]:
    """Yield the packs of an epoch."""
    packer = plan.build_packer(limits)
    feed = plan.build_feed(stream, limits, epoch=epoch)
    while (pack := packer.next_pack(feed)) is not None:
        yield pack


def try_plan(
    stream: SampleStream,
    limits: PackLimits,
    cost: SampleCost,
    totals: SizeTotals,
    *,
    packer: PackerName = "balanced",
    max_buffer_size: int = 20,
) -> Trial:
    """Choose the cap on cost by packing the beginning of the first epoch.

    Raises:
        DataError: there are no samples.
    """
    num_full = count_full_packs(totals, limits)
    if not num_full:
        raise DataError("There are no samples to pack.")
    total = (
        cost.per_token * totals.tokens + cost.per_token_squared * totals.tokens_squared + cost.per_tile * totals.tiles
    )
    window = choose_window(totals.num_samples / num_full)

    def run(cap: float) -> Trial:
        samples_per_cap = cap * totals.num_samples / num_full
        plan = PackPlan(packer, cost, cap * total / num_full, samples_per_cap, window, max_buffer_size)
        costs = _try(plan, stream, limits)
        packs_per_epoch = math.inf if totals.is_endless else total / float(costs.mean())
        return Trial(plan, costs, packs_per_epoch)

    trial = run(_EVEN_CAP)
    if packer == "balanced" and trial.costs.mean() < _MIN_EVEN_FILL * trial.plan.cost_cap:
        trial, fullest = run(_FULL_CAP), run(_FULLEST_CAP)
        if fullest.costs.mean() > _MIN_GAIN * trial.costs.mean():
            return fullest
    return trial


def choose_block_steps(trial: Trial, packs_per_step: int) -> int:
    """Choose how many steps are grouped by cost: 1 where packs are equal enough as they come.

    A block is never longer than an epoch.
    """
    if trial.plan.packer == "legacy" or packs_per_step == 1:
        return 1
    if _predict_balance(trial.costs, packs_per_step) >= _GOOD_BALANCE:
        return 1
    max_steps = trial.packs_per_epoch / packs_per_step
    for num_steps in _BLOCK_STEPS:
        if num_steps >= max_steps or _predict_grouped_balance(trial.costs, num_steps) >= _GOOD_BALANCE:
            break
    return max(1, int(min(num_steps, max_steps)))


def group_steps(packs: Sequence[Pack], packs_per_step: int, key: str) -> list[list[Pack]]:
    """Cut packs into steps of like cost, in an order of steps by a key; if some are left, the cheapest come last."""
    by_cost = [packs[number] for number in np.argsort([pack.cost for pack in packs], kind="stable").tolist()]
    num_left = len(packs) % packs_per_step
    steps = [by_cost[start : start + packs_per_step] for start in range(num_left, len(packs), packs_per_step)]
    places = sorted(range(len(steps)), key=lambda place: hashlib.sha256(f"{key}/{place}".encode()).digest())
    return [*(steps[place] for place in places), *([by_cost[:num_left]] if num_left else [])]


def _try(plan: PackPlan, stream: SampleStream, limits: PackLimits) -> NDArray[np.float64]:
    """Count the cost of some packs, but for the first ones, which have more choice, and the last of an epoch."""
    packer = plan.build_packer(limits)
    feed = plan.build_feed(stream, limits)
    costs: list[float] = []
    ends: list[int] = []
    while len(costs) < _TRIAL_PACKS and feed.position < _TRIAL_SAMPLES and (pack := packer.next_pack(feed)) is not None:
        costs.append(pack.cost)
        ends.append(feed.position)
    if not costs:
        raise DataError("There are no samples to pack.")
    num_steady = int(np.searchsorted(ends, ends[-1]))
    return np.array(costs[num_steady // 2 : num_steady] or costs)


def _predict_balance(costs: NDArray[np.float64], num_packs: int) -> float:
    """Expect the mean cost over the highest of `num_packs` that are drawn from these."""
    below = (np.arange(len(costs) + 1) / len(costs)) ** num_packs
    return float(costs.mean() / (np.sort(costs) * np.diff(below)).sum())


def _predict_grouped_balance(costs: NDArray[np.float64], num_steps: int) -> float:
    """Expect the same of packs that are sorted and cut into steps."""
    ends = np.arange(1, num_steps + 1) * len(costs) // num_steps
    return float(costs.mean() / np.sort(costs)[np.maximum(ends, 1) - 1].mean())
