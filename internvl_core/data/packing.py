"""The steps of a packed training: which samples every step holds, from its beginning for ever.

Every rank plans the same packs from ids and sizes alone, and takes its share. Invariant: the state
after a number of steps is all that the later ones depend on, and takes a few kB however many there
were.
"""

import itertools
from collections.abc import Mapping
from typing import Any

from internvl_core.data.pack_plan import (
    PackerName,
    PackPlan,
    choose_block_steps,
    group_steps,
    try_plan,
)
from internvl_core.data.packs import Pack, SizeFeed, read_held
from internvl_core.data.sizes import PackLimits, SampleCost, SampleStream, SizeTotals
from internvl_core.errors import ArgumentError, DataError

__all__ = ["Pack", "PackSampler"]

_VERSION = 1


class PackSampler:
    """Packs of a stream, step by step, over as many epochs as are asked for.

    Packs never mix epochs; a step may, so that none is incomplete.
    """

    def __init__(
        self,
        stream: SampleStream,
        limits: PackLimits,
        cost: SampleCost,
        *,
        totals: SizeTotals,
        seed: int,
        packs_per_step: int = 1,
        packer: PackerName = "balanced",
        max_buffer_size: int = 20,
        num_epochs: int | None = None,
    ) -> None:
        """Describe the steps; the first that is taken plans them, unless a state is loaded before.

        Args:
            totals: of an epoch of the stream.
            seed: of the order of steps within a block.
            packs_per_step: over all ranks and micro-batches.
            packer: "legacy" packs as the original did, and never groups.
            max_buffer_size: of the legacy packer.
            num_epochs: after which there are no more packs; None for ever.

        Raises:
            ArgumentError: there is no room in a pack or in a step.
        """
        for name, value in (
            ("max_packed_tokens", limits.max_tokens),
            ("num_images_expected", limits.max_tiles),
            ("packs_per_step", packs_per_step),
            ("max_buffer_size", max_buffer_size),
        ):
            if value < 1:
                raise ArgumentError(f"{name}: {value} must be at least 1.")
        self._stream = stream
        self._limits = limits
        self._cost = cost
        self._totals = totals
        self._seed = seed
        self._packs_per_step = packs_per_step
        self._packer: PackerName = packer
        self._max_buffer_size = max_buffer_size
        self._num_epochs = num_epochs
        self._run: _Run | None = None
        self._block_steps = 1
        self._num_blocks = 0
        self._num_taken = 0
        self._num_samples = 0
        self._steps: list[list[Pack]] = []
        self._block_start: dict[str, Any] = {}

    @property
    def block_steps(self) -> int:
        """How many steps are grouped by cost; 1 for none, and before the first step."""
        return self._block_steps

    def take_step(self) -> list[Pack]:
        """Take the packs of the next step; of a step that is grouped by cost, the cheapest first.

        Where the epochs end, a last step may have fewer packs, and those behind it have none.

        Raises:
            DataError: a sample fits into no pack, or there is none.
        """
        step = self._take_step()
        self._num_samples += sum(len(pack.ids) for pack in step)
        return step

    @property
    def num_samples(self) -> int:
        """Samples in the steps taken so far, over all epochs."""
        return self._num_samples

    def state(self) -> dict[str, Any]:
        """Describe in JSON what the next steps depend on.

        Where steps are grouped, that is the beginning of their block and the number taken of it.
        """
        run = self._get_run()
        return {
            "version": _VERSION,
            "max_tokens": self._limits.max_tokens,
            "max_tiles": self._limits.max_tiles,
            "packs_per_step": self._packs_per_step,
            "plan": run.plan.to_json(),
            "block_steps": self._block_steps,
            "num_blocks": self._num_blocks,
            "steps_taken": self._num_taken,
            "num_samples": self._num_samples,
            **(self._block_start if self._steps else run.state()),
        }

    def load_state(self, state: Mapping[str, Any], *, is_of_other_data: bool = False) -> None:
        """Go on exactly where `state()` was taken; takes as long after any number of steps.

        The state brings its own costs: what they are counted by may change with the trainer.

        Args:
            is_of_other_data: the stream has changed since, so a position is only about where it was. What was held
                back is drawn again, with the samples that stood between, and a block of steps is begun anew.

        Raises:
            ArgumentError: the state is of another packer or of other limits.
        """
        self._check_state(state)
        if is_of_other_data:
            behind = max((back for group in state["held_back"] for back in group), default=0)
            state = {**state, "position": state["position"] - behind, "held_back": None, "steps_taken": 0}
        run = self._build_run(PackPlan.from_json(state["plan"]))
        run.load_state(state)
        self._run = run
        self._block_steps = state["block_steps"]
        self._num_blocks = state["num_blocks"]
        self._num_taken = state["steps_taken"]
        self._num_samples = state["num_samples"]
        # A block that was begun is planned anew with its next step.
        self._steps = []

    def _take_step(self) -> list[Pack]:
        run = self._get_run()
        if self._block_steps == 1:
            return run.next_packs(self._packs_per_step)
        if not self._steps:
            self._plan_block(run)
        if not self._steps:
            return []
        step = self._steps[self._num_taken]
        self._num_taken += 1
        if self._num_taken == len(self._steps):
            self._num_blocks += 1
            self._num_taken = 0
            self._steps = []
        return step

    def _get_run(self) -> "_Run":
        if self._run is None:
            trial = try_plan(
                self._stream,
                self._limits,
                self._cost,
                self._totals,
                packer=self._packer,
                max_buffer_size=self._max_buffer_size,
            )
            self._run = self._build_run(trial.plan)
            self._block_steps = choose_block_steps(trial, self._packs_per_step)
        return self._run

    def _build_run(self, plan: PackPlan) -> "_Run":
        return _Run(plan, self._stream, self._limits, num_epochs=self._num_epochs)

    def _plan_block(self, run: "_Run") -> None:
        self._block_start = run.state()
        packs = run.next_packs(self._block_steps * self._packs_per_step)
        self._steps = group_steps(packs, self._packs_per_step, f"{self._seed}/steps/{self._num_blocks}")

    def _check_state(self, state: Mapping[str, Any]) -> None:
        if state["version"] != _VERSION:
            raise ArgumentError(
                f"The packing state has version {state['version']}, this trainer reads {_VERSION}. Resume with the "
                "trainer that wrote it."
            )
        ours = {
            "packer": self._packer,
            "max_packed_tokens": self._limits.max_tokens,
            "num_images_expected": self._limits.max_tiles,
            "packs_per_step": self._packs_per_step,
        }
        theirs = {
            "packer": state["plan"]["packer"],
            "max_packed_tokens": state["max_tokens"],
            "num_images_expected": state["max_tiles"],
            # Without groups, the next step may as well have another number of packs.
            "packs_per_step": state["packs_per_step"] if state["block_steps"] > 1 else self._packs_per_step,
        }
        for name, value in ours.items():
            if theirs[name] != value:
                raise ArgumentError(
                    f"{name}: {value}, but the checkpoint's packs were made with {theirs[name]}. Set it back."
                )


class _Run:
    """The packs of one epoch after the other."""

    def __init__(self, plan: PackPlan, stream: SampleStream, limits: PackLimits, *, num_epochs: int | None) -> None:
        self.plan = plan
        self._num_epochs = num_epochs
        self._stream = stream
        self._limits = limits
        self._packer = plan.build_packer(limits)
        self._feed = self._build_feed(0, 0)

    def next_packs(self, count: int) -> list[Pack]:
        """Give the next packs: `count`, or where the epochs end those that are left."""
        return list(itertools.islice(iter(self._next_pack, None), count))

    def _next_pack(self) -> Pack | None:
        for _ in range(2):
            pack = self._packer.next_pack(self._feed)
            if pack is not None:
                return pack
            if self._feed.epoch + 1 == self._num_epochs:
                return None
            self._feed = self._build_feed(self._feed.epoch + 1, 0)
        raise DataError(f"Epoch {self._feed.epoch - 1} has no samples.")

    def state(self) -> dict[str, Any]:
        position = self._feed.position
        held = [[position - place for place in group] for group in self._packer.held()]
        return {"epoch": self._feed.epoch, "position": position, "held_back": held}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from `state()`; where `held_back` is None, begin at its position.

        Raises:
            ArgumentError: it is no position in an epoch.
        """
        position: int = state["position"]
        if state["held_back"] is None:
            self._feed = self._build_feed(state["epoch"], position)
            return
        held = [[position - back for back in group] for group in state["held_back"]]
        oldest = min((place for group in held for place in group), default=position)
        if oldest < 0:
            raise ArgumentError(
                f"The packing state holds sample {oldest} of an epoch. Its file was edited: restore it."
            )
        self._feed = self._build_feed(state["epoch"], oldest)
        self._packer.hold(read_held(self._feed, held, position))

    def _build_feed(self, epoch: int, start: int) -> SizeFeed:
        return self.plan.build_feed(self._stream, self._limits, epoch=epoch, start=start)
