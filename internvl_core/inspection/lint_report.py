"""What the data tools are asked and what they answer; JSON between a task and a process of the trainer.

Standard library only: tasks and flows read it without torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from internvl_core.packing_rules import is_packed

ALL_MEDIA = -1
"""Decode every medium, not a pick of them."""

NUM_LINES_SHOWN = 5
"""Lines named for each kind of problem, however many there are."""


@dataclass(frozen=True)
class TokenizerSource:
    """Where a stage's tokenizer and the shape of its vision tower are found: folders, hub ids or checkpoint URIs."""

    tokenizer: str
    vision: str | None = None
    """Whose config names the patch size; None where nobody knows, which counts as the usual 14 px."""


@dataclass(frozen=True)
class MetaJob:
    """One meta file, and the stage that reads it."""

    title: str
    meta_path: str
    values: dict[str, Any]
    """The stage's resolved arguments."""
    source: TokenizerSource | None
    """None looks at form and tiles only: tokens are not counted."""
    is_held_out: bool = False
    entry: str = "finetune"
    """Of the stage; without a recipe there is none, and `use_packed_ds` alone says whether samples are packed."""

    @property
    def max_tiles(self) -> int | None:
        """What a pack of the stage holds; None where samples are not packed, as held-out ones never are."""
        if self.is_held_out or not is_packed(self.values, entry=self.entry):
            return None
        return int(self.values["num_images_expected"])

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        source = content["source"]
        return cls(**{**content, "source": TokenizerSource(**source) if source else None})


@dataclass(frozen=True)
class LintJob:
    """Meta files to index and to look through."""

    cache_dir: str
    metas: list[MetaJob]
    num_media: int = 0
    """Samples with media that are decoded in each data set, or `ALL_MEDIA`."""
    counts_ids: bool = False
    """Look for ids of records that occur twice."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        return cls(**{**content, "metas": [MetaJob.from_json(meta) for meta in content["metas"]]})


@dataclass(frozen=True)
class Finding:
    """One kind of problem in a data set."""

    reason: str
    """A `Reason`."""
    count: int
    lines: list[int]
    """The first of them, from 1."""
    example: str = ""
    """What is wrong in the first of those lines."""


@dataclass(frozen=True)
class MediaReport:
    """What decoding came to."""

    num_with_media: int
    """Sound records that show something."""
    num_decoded: int
    """How many of them were decoded, or tried."""
    findings: list[Finding]

    @property
    def num_failed(self) -> int:
        return sum(finding.count for finding in self.findings)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        return cls(**{**content, "findings": [Finding(**finding) for finding in content["findings"]]})


@dataclass(frozen=True)
class DatasetReport:
    """What is known of a data set."""

    name: str
    annotation: str
    error: str | None = None
    """Why the data set cannot be read at all; then nothing below is known."""
    num_records: int = 0
    num_samples: int = 0
    """Records that are sound, those that are too large included."""
    num_tokens: int | None = None
    """Of all samples, image tokens included; None without a tokenizer, here and in the next."""
    max_tokens: int | None = None
    num_too_long: int | None = None
    """Samples with more tokens than max_seq_length, which are left out of training; None also for held-out sets."""
    too_long_lines: list[int] = field(default_factory=list)
    num_too_many_tiles: int | None = None
    """Samples, not too long, with more tiles than a pack holds, which are left out too; None where none is packed."""
    too_many_tiles_lines: list[int] = field(default_factory=list)
    num_tiles: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    """Samples by kind: text, image, multi_image, video."""
    findings: list[Finding] = field(default_factory=list)
    """Of the records."""
    media: MediaReport | None = None
    """None where nothing was decoded."""
    num_repeated_ids: int | None = None
    """Records with the id of an earlier one; None where it was not looked for."""
    index_dir: str = ""
    is_built: bool = False
    """The index was built just now; False if it was there."""
    seconds: float = 0.0
    """To open or to build the index."""
    size_bytes: int = 0
    """Of the annotation."""

    @property
    def num_bad(self) -> int:
        return self.num_records - self.num_samples

    @property
    def num_usable(self) -> int:
        """Samples that a stage trains on."""
        return self.num_samples - self.num_too_large

    @property
    def num_too_large(self) -> int:
        """Sound samples that are left out by policy."""
        return (self.num_too_long or 0) + (self.num_too_many_tiles or 0)

    @property
    def all_findings(self) -> list[Finding]:
        """Problems of records and of media."""
        return [*self.findings, *(self.media.findings if self.media else [])]

    @property
    def has_errors(self) -> bool:
        """A person should mend something. Samples that are too large are no error unless nothing else is left."""
        return self.error is not None or bool(self.all_findings) or self.num_usable == 0

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        return cls(
            **{
                **content,
                "findings": [Finding(**finding) for finding in content["findings"]],
                "media": MediaReport.from_json(content["media"]) if content["media"] else None,
            }
        )


@dataclass(frozen=True)
class MetaReport:
    """What is known of the data sets of a meta file."""

    title: str
    meta_path: str
    is_held_out: bool
    max_seq_length: int
    max_bad_fraction: float
    datasets: Sequence[DatasetReport]
    max_tiles: int | None = None
    """What a pack holds; None where samples are not packed."""

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        return cls(**{**content, "datasets": [DatasetReport.from_json(report) for report in content["datasets"]]})


@dataclass(frozen=True)
class LintReport:
    """The answer to a `LintJob`, its meta files in the same order."""

    metas: Sequence[MetaReport]

    @property
    def has_errors(self) -> bool:
        return any(dataset.has_errors for meta in self.metas for dataset in meta.datasets)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        return cls([MetaReport.from_json(meta) for meta in content["metas"]])
