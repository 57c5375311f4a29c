"""Share out the steps of a plan: which draws this rank reads in each of its forwards.

Invariant: the state that a checkpoint keeps is that of the step it was taken at, however far the
loader's workers have read ahead.
"""

import itertools
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import Sampler

from internvl_core.checkpoint.training_files import POSITION_FILE
from internvl_core.contract import write_json_atomically
from internvl_core.errors import CheckpointCorrupt
from internvl_core.train.steps import Step, StepPlan

logger = logging.getLogger(__name__)

_VERSION = 1


@dataclass(frozen=True)
class Share:
    """How a step's items fall to ranks and forwards."""

    rank: int
    world_size: int
    accumulation_steps: int
    items_per_batch: int
    """Packs or samples of one forward on one rank."""

    @property
    def items_per_step(self) -> int:
        return self.world_size * self.accumulation_steps * self.items_per_batch

    def find_items(self, forward: int) -> slice:
        """Find this rank's items of a step's `forward`-th forward."""
        first = (forward * self.world_size + self.rank) * self.items_per_batch
        return slice(first, first + self.items_per_batch)


def read_num_steps(checkpoint_dir: Path) -> int:
    """Read how many steps the stage has, which its epochs decided when it began.

    Raises:
        CheckpointCorrupt: the checkpoint does not say where in the data it stands.
    """
    return int(_read(checkpoint_dir)["num_steps"])


class StepSampler(Sampler[list[int]]):
    """This rank's batches, to the last step; a rank for which none are left in a step gets empty ones."""

    def __init__(
        self, plan: StepPlan, share: Share, *, num_steps: int, mixture: str, start: Mapping[str, Any] | None = None
    ) -> None:
        """Share out a plan.

        Args:
            mixture: digest of what is drawn; a position in other data means nothing.
            start: state to begin with, the same on every rank.
        """
        self.share = share
        self.num_steps = num_steps
        self._plan = plan
        self._mixture = mixture
        self._first = 0
        self._state = start
        self._is_of_other_data = False
        self._planned: dict[int, Step] = {}

    def __len__(self) -> int:
        return self.num_steps * self.share.accumulation_steps

    def __iter__(self) -> Iterator[list[int]]:
        steps = self._plan.iter_steps(self._first, self._state, is_of_other_data=self._is_of_other_data)
        for number, step in enumerate(itertools.islice(steps, self.num_steps - self._first), self._first + 1):
            self._planned[number] = step
            for forward in range(self.share.accumulation_steps):
                yield list(itertools.chain.from_iterable(step.items[self.share.find_items(forward)]))

    def get_step(self, number: int) -> Step:
        """Get a step that was reached; the ones before it are forgotten."""
        for earlier in [other for other in self._planned if other < number]:
            del self._planned[earlier]
        return self._planned[number]

    def save(self, checkpoint_dir: Path, step: int) -> None:
        """Write where in the data a step stands that was reached and is not left behind."""
        content = {"version": _VERSION, "step": step, "num_steps": self.num_steps, "mixture": self._mixture}
        write_json_atomically(checkpoint_dir / POSITION_FILE, {**content, "plan": self.get_step(step).state})

    def load(self, checkpoint_dir: Path) -> None:
        """Go on where a checkpoint stands.

        Raises:
            CheckpointCorrupt: it does not say where.
        """
        content = _read(checkpoint_dir)
        self._first = content["step"]
        self._state = content["plan"]
        self._is_of_other_data = content["mixture"] != self._mixture
        if self._is_of_other_data:
            logger.warning(
                "The data are not those of the checkpoint: media were mended or lost since. Training goes on with the "
                "weights and the step of the checkpoint, but in another order than without the interruption; the "
                "number of steps stays."
            )


def _read(checkpoint_dir: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads((checkpoint_dir / POSITION_FILE).read_text())
    except FileNotFoundError:
        content = {"version": None}
    if content["version"] != _VERSION:
        raise CheckpointCorrupt(
            f"{checkpoint_dir}: its {POSITION_FILE} is of version {content['version']}, this trainer reads {_VERSION}. "
            "Resume with the trainer that wrote the checkpoint, or train the stage afresh (--fresh)."
        )
    return content
