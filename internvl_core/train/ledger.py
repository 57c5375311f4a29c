"""What became of the samples a stage has drawn, by data set, over all ranks."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from internvl_core.checkpoint.training_files import LEDGER_FILE
from internvl_core.contract import write_json_atomically
from internvl_core.data.quarantine import BadSample, QuarantineFile, check_bad_fraction


class SampleLedger:
    """Counts of drawn and bad samples; goes on where a checkpoint stopped."""

    def __init__(self, names: Sequence[str], directory: Path, *, rank: int, max_bad_fraction: float) -> None:
        """Open the books of a stage.

        Args:
            names: data sets, the same list on every rank.
            directory: of the attempt; each rank writes its bad samples below it.
        """
        self._names = list(names)
        self._directory = directory / "quarantine"
        self._file = QuarantineFile(self._directory / f"{rank}.jsonl")
        self._max_bad_fraction = max_bad_fraction
        self._new_seen: Counter[str] = Counter()
        self._new_bad: Counter[str] = Counter()
        self._seen = [0] * len(names)
        self._bad = [0] * len(names)
        self._delivered_before = [0] * len(names)

    def record(self, sample_ids: Sequence[str], bad_samples: Sequence[BadSample], *, step: int) -> None:
        """Enter this rank's samples of one batch."""
        self._file.append(bad_samples, step=step)
        bad = [sample.dataset for sample in bad_samples]
        self._new_bad.update(bad)
        self._new_seen.update(bad)
        self._new_seen.update(sample_id.rpartition(":")[0] for sample_id in sample_ids)

    def take(self) -> list[int]:
        """Take what was entered since the last time: drawn, then bad, by data set."""
        taken = [counter[name] for counter in (self._new_seen, self._new_bad) for name in self._names]
        self._new_seen.clear()
        self._new_bad.clear()
        return taken

    def add(self, counts: Sequence[int]) -> None:
        """Add what all ranks took together.

        Raises:
            DataError: a data set has too many bad samples.
        """
        half = len(self._names)
        self._seen = [total + new for total, new in zip(self._seen, counts[:half], strict=True)]
        self._bad = [total + new for total, new in zip(self._bad, counts[half:], strict=True)]
        if any(counts[half:]):
            check_bad_fraction(
                self._bad, self._seen, self._names, max_fraction=self._max_bad_fraction, where=self._directory
            )

    @property
    def counters(self) -> Mapping[str, int]:
        """`samples`, `bad_samples`, and by data set `samples/<name>` and, where there are any, `bad_samples/<name>`."""
        return {
            "samples": sum(self._seen),
            "bad_samples": sum(self._bad),
            **{f"samples/{name}": count for name, count in zip(self._names, self._seen, strict=True)},
            **{f"bad_samples/{name}": count for name, count in zip(self._names, self._bad, strict=True) if count},
        }

    def read_mixture(self) -> dict[str, float]:
        """Give each data set's share of the samples trained on since the last time, as `mixture/<name>`."""
        delivered = self._count_delivered()
        new = [count - before for count, before in zip(delivered, self._delivered_before, strict=True)]
        self._delivered_before = delivered
        return {f"mixture/{name}": count / sum(new) for name, count in zip(self._names, new, strict=True) if sum(new)}

    def save(self, checkpoint_dir: Path) -> None:
        content = {"names": self._names, "seen": self._seen, "bad": self._bad}
        write_json_atomically(checkpoint_dir / LEDGER_FILE, content)

    def load(self, checkpoint_dir: Path) -> None:
        """Go on with the counts of a checkpoint."""
        content = json.loads((checkpoint_dir / LEDGER_FILE).read_text())
        seen = dict(zip(content["names"], content["seen"], strict=True))
        bad = dict(zip(content["names"], content["bad"], strict=True))
        self._seen = [seen.get(name, 0) for name in self._names]
        self._bad = [bad.get(name, 0) for name in self._names]
        self._delivered_before = self._count_delivered()

    def _count_delivered(self) -> list[int]:
        return [seen - bad for seen, bad in zip(self._seen, self._bad, strict=True)]
