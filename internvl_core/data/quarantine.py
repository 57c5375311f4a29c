"""Samples that failed at run time: dropped, written down, counted; never replaced by others (F8).

What the index knows to be bad is not drawn at all and does not count here.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from internvl_core.errors import DataError, Reason

# So that two bad samples among the first hundred do not count as two in a hundred.
MIN_SEEN = 1000


@dataclass(frozen=True)
class BadSample:
    """One sample that could not be made, and why."""

    dataset: str
    line: int
    reason: Reason
    message: str
    """With the place of the record."""

    @property
    def sample_id(self) -> str:
        return f"{self.dataset}:{self.line}"


class QuarantineFile:
    """One JSON object for each bad sample, in the order they were met; one file a rank."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, samples: Sequence[BadSample], *, step: int) -> None:
        if not samples:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            for sample in samples:
                file.write(json.dumps({"step": step, "sample_id": sample.sample_id, **asdict(sample)}) + "\n")


def check_bad_fraction(
    bad: Sequence[int], seen: Sequence[int], names: Sequence[str], *, max_fraction: float, where: Path
) -> None:
    """Check each data set's bad samples against those drawn from it; up to 1,000 draws count as 1,000.

    Args:
        bad, seen: by data set, over all ranks since the stage began.
        where: folder of the quarantine files, for the message.

    Raises:
        DataError: names every data set over the limit.
    """
    over = [
        f"{name}: {num_bad} of {num_seen}"
        for name, num_bad, num_seen in zip(names, bad, seen, strict=True)
        if num_bad > max_fraction * max(num_seen, MIN_SEEN)
    ]
    if over:
        raise DataError(
            f"Too many bad samples: {'; '.join(over)}; max_bad_fraction is {max_fraction:g} (of at least {MIN_SEEN} "
            f"draws). Each is listed with its reason in {where}. Mend or remove them, or raise max_bad_fraction."
        )
