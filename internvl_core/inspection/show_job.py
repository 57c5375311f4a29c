"""Which sample is shown, and where to: JSON between a task and a process of the trainer. Standard library only."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from internvl_core.inspection.lint_report import MetaJob


@dataclass(frozen=True)
class ShowJob:
    """One record of one data set."""

    meta: MetaJob
    dataset: str | None
    """None where the meta file has only one."""
    line: int
    """From 1."""
    out_path: str | None
    """None names the file after the sample, in the current directory."""
    cache_dir: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        return cls(**{**content, "meta": MetaJob.from_json(content["meta"])})


@dataclass(frozen=True)
class ShowReport:
    """What was written."""

    out_path: str
    problem: str | None
    """Why the record is not trained on; None if it is."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
