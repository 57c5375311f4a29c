"""What `internvl plan` asks for and what it is answered; JSON between the command and a process of the trainer.

Standard library only: the command reads it without torch. All memory is in bytes on one GPU.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

PARTS = ("vision_tower", "multi_modal_projector", "language_model")

RESERVED = 0.08
"""Share of a GPU left to what is not counted: CUDA's context, NCCL, the allocator's fragments. A guess."""


def fits(num_bytes: int, gpu_bytes: int) -> bool:
    """Tell whether memory fits a GPU, with a reserve for what is not counted."""
    return num_bytes <= gpu_bytes * (1 - RESERVED)


@dataclass(frozen=True)
class StageJob:
    """A stage to plan."""

    name: str
    entry: str
    values: dict[str, Any]
    """The stage's resolved arguments."""
    num_ranks: int
    start_from: str | None
    """URI of a checkpoint; None takes what the arguments name, else the model of the stage before."""


@dataclass(frozen=True)
class PlanJob:
    """The stages of a recipe, in order."""

    stages: list[StageJob]
    start_from: str | None
    """URI that the first stage starts from."""
    only: str | None = None
    """Name of the one stage to report; those before it say what its model is."""
    gpu_bytes: int | None = None
    """Memory of a GPU to compare with."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        return cls(**{**content, "stages": [StageJob(**stage) for stage in content["stages"]]})


@dataclass(frozen=True)
class PartReport:
    """Parameters of a part of the model, adapters inside it included."""

    total: int
    trainable: int


@dataclass(frozen=True)
class BatchReport:
    """The largest batch of one rank, and how many of them an update has on all ranks together."""

    is_packed: bool
    num_sequences: int
    tokens: int
    """Of all sequences together."""
    tiles: int
    batches_per_step: int


@dataclass(frozen=True)
class MemoryReport:
    """What one rank holds at the largest batch."""

    weights: int
    gradients: int
    optimizer: int
    buckets: int
    """What gradients are reduced in, and under ZeRO-3 the weights that are gathered to compute with."""
    activations: int
    """The most at a time, the LM head aside."""
    kept: int
    """Of the activations, when the LM head begins."""
    logits: int
    """The LM head and its loss, every position supervised."""
    update: int
    """Copies of the gradients while the optimizer steps; buckets and activations are gone by then."""
    host: int
    """Offloaded to the host."""
    total: int
    """Of the moment that needs most."""

    def fits(self, gpu_bytes: int) -> bool:
        return fits(self.total, gpu_bytes)


@dataclass(frozen=True)
class FlopsReport:
    """Of an update, on all ranks together."""

    useful: float
    """Without recomputation."""
    computed: float


@dataclass(frozen=True)
class Lever:
    """Other arguments, and what the stage would need with them."""

    setting: str
    total: int

    def fits(self, gpu_bytes: int) -> bool:
        return fits(self.total, gpu_bytes)


@dataclass(frozen=True)
class StageReport:
    """What a stage needs."""

    name: str
    entry: str
    source: str
    """Where the model comes from."""
    num_ranks: int
    sharding: str
    """DDP, or the stage of ZeRO."""
    dtype: str
    is_checkpointed: bool
    parts: dict[str, PartReport]
    num_adapters: int
    """Parameters of adapters; part of their parts."""
    batch: BatchReport
    memory: MemoryReport
    flops: FlopsReport
    levers: list[Lever] = field(default_factory=list)
    """What would help, if it does not fit; the least drastic first."""

    @property
    def whole(self) -> PartReport:
        parts = self.parts.values()
        return PartReport(sum(part.total for part in parts), sum(part.trainable for part in parts))

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        return cls(
            **{
                **content,
                "parts": {name: PartReport(**part) for name, part in content["parts"].items()},
                "batch": BatchReport(**content["batch"]),
                "memory": MemoryReport(**content["memory"]),
                "flops": FlopsReport(**content["flops"]),
                "levers": [Lever(**lever) for lever in content["levers"]],
            }
        )


@dataclass(frozen=True)
class PlanReport:
    """What the stages of a recipe need."""

    stages: list[StageReport]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        return cls([StageReport.from_json(stage) for stage in content["stages"]])
