"""A stage of a recipe as the tasks see it. Field descriptions become the hints of the form in the UI."""

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from internvl_core.checkpoint.store import resolve_checkpoint
from internvl_core.contract import CheckpointRef

PREVIOUS = "previous"


class Gate(BaseModel):
    """The least held-out score with which the pipeline goes on."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    metric: str = Field(description="Name of a metric in the stage's result, such as accuracy or accuracy/digit.")
    at_least: float = Field(ge=0, le=1, description="Smallest score that passes, 0 to 1.")
    better_by: float = Field(
        0, ge=0, le=1, description="A nightly finetune is promoted if it beats the champion by more than this."
    )


class Launcher(BaseModel):
    """How many processes torchrun starts, and where.

    A run starts ranks on its own machine only: more can be checked and planned, and `launch_stage` starts
    any one of them, but nobody starts the others yet. `check_launchers` of stage_plan.py refuses them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["local", "slurm", "kubernetes"] = Field(
        default="local", title="Kind", description="Where torchrun runs; the others are not built yet."
    )
    nnodes: int = Field(default=1, ge=1, title="Machines", description="Number of machines.")
    nproc_per_node: int = Field(
        default=1, ge=1, title="Ranks a machine", description="Ranks on each machine: one a GPU."
    )
    rdzv_endpoint: str | None = Field(
        default=None,
        title="Rendezvous",
        pattern=r"^(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):[0-9]{1,5}$",
        description="host:port of the first machine, where the others find it; for more than one.",
    )

    @model_validator(mode="after")
    def _check_built(self) -> Self:
        if self.kind != "local":
            raise ValueError(f"kind {self.kind} is not built yet. Use local.")
        return self

    @property
    def world_size(self) -> int:
        return self.nnodes * self.nproc_per_node


class Stage(BaseModel):
    """One training phase: the trainer's arguments, its processes, and the gate behind it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_.]*$", description="Names the stage's directory in the store.")
    entry: Literal["pretrain", "finetune", "mpo"] = Field(description="Entry point of the trainer.")
    arguments: dict[str, Any] = Field(description="Arguments of the trainer, by the names of its command line.")
    launcher: Launcher = Field(default=Launcher(), description="Processes of this stage.")
    start_from: str | None = Field(
        None,
        description="URI of the checkpoint whose weights the stage starts from; 'previous' for the stage before. "
        "Left out: the stage before, unless the arguments name a model or components.",
    )
    gate: Gate | None = Field(None, description="Fail the pipeline here when the held-out score is below.")
    save_budget_s: float = Field(600, gt=0, description="Seconds a stop may take to save and commit.")

    @property
    def brings_own_weights(self) -> bool:
        """The arguments name a model or components, so no checkpoint of another stage is the start."""
        return any(self.arguments.get(name) for name in ("model_name_or_path", "vision_path", "llm_path"))

    def find_start(self, previous: CheckpointRef | None) -> CheckpointRef | None:
        """Find the checkpoint that the stage starts from; None: it brings its own weights.

        Args:
            previous: of the stage before, or the one that the recipe starts from.

        Raises:
            CheckpointNotFound, CheckpointCorrupt: the one that it names is not there, or is damaged.
        """
        if self.brings_own_weights:
            return None
        return previous if self.start_from in (None, PREVIOUS) else resolve_checkpoint(self.start_from)
