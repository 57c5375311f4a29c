"""What a stage comes to before it starts: resolved arguments, and the fingerprint that names its directory.

The fingerprint covers what changes the result and nothing else (design 11), so that the same
inputs find the same directory in the store, whoever runs them, where, and on how many ranks.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from internvl_core import __version__
from internvl_core.argument_rules import check_arguments, fingerprint_arguments, resolve_arguments
from internvl_core.argument_values import LATEST, read_resume
from internvl_core.checkpoint.folder import digest_file, digest_folder, digest_model, is_weights_file
from internvl_core.checkpoint.manifest import hash_file
from internvl_core.checkpoint.resume_point import check_inputs_equal, find_resume_point
from internvl_core.checkpoint.store import is_checkpoint_uri
from internvl_core.contract import EVALUATION, CheckpointRef, digest_json
from internvl_core.data.meta import digest_meta
from internvl_core.errors import ArgumentError
from tasks.stage import Stage

COMPONENTS = ("model_name_or_path", "vision_path", "llm_path", "mlp_path")
PROJECTOR = "mlp_path"
"""The one component that may be a file."""
METAS: dict[str, Literal["training", "evaluation"]] = {"meta_path": "training", "eval_meta_path": "evaluation"}
"""The arguments that name data, and what for."""
GRADIENT_ACCUMULATION = "gradient_accumulation_steps"
RESUME = "resume_from_checkpoint"
"""Read by the plan; ranks find in stage.json what it means."""
EVALUATION_BUDGET_S = 10.0
"""Of a stop: an evaluation has nothing to save."""
SET_BY_PIPELINE = ("attempt_dir", "cache_dir", "output_dir")
"""Directories that an attempt gets from its workspace."""


@dataclass(frozen=True)
class StagePlan:
    """A stage with its arguments resolved against the start it was given."""

    stage: Stage
    values: dict[str, Any]
    """Every argument, defaults included."""
    start_from: CheckpointRef | None
    inputs: dict[str, Any]
    """All that the result depends on."""
    resume_from: CheckpointRef | None = None
    """What its arguments say to go on from; None: its own newest, if there is one."""

    @property
    def fingerprint(self) -> str:
        return digest_json(self.inputs)


def check_stage_arguments(stages: list[Stage], *, starts_from_checkpoint: bool) -> None:
    """Check the arguments of all stages, with all problems in one message; takes no file and no time."""
    problems = []
    for number, stage in enumerate(stages):
        has_parent = not stage.brings_own_weights and (starts_from_checkpoint or number > 0 or bool(stage.start_from))
        try:
            resolve_stage(stage, has_parent=has_parent)
        except ArgumentError as error:
            problems.append(str(error))
    if problems:
        raise ArgumentError("\n".join(problems))


def resolve_stage(stage: Stage, *, has_parent: bool) -> dict[str, Any]:
    """Resolve and check a stage's arguments; needs neither files nor hardware.

    Raises:
        ArgumentError: all that is wrong with them, a line each, led by `arguments of <stage>`.
    """
    given = dict(stage.arguments)
    if has_parent:
        given["model_name_or_path"] = stage.start_from or "the previous stage"
    try:
        _check_directories(given)
        values = resolve_arguments(given)
        check_arguments(values, entry=stage.entry)
    except ArgumentError as error:
        lines = [f"arguments of {stage.name}: {line}" for line in str(error).splitlines()]
        raise ArgumentError("\n".join(lines)) from None
    if has_parent:
        values["model_name_or_path"] = None
    return values


def check_launchers(stages: list[Stage]) -> None:
    """Refuse stages that this version cannot start; where a run starts, not where a recipe is read.

    Raises:
        ArgumentError: a line for each, with the overrides that keep its global batch on one machine.
    """
    lines = []
    for stage in find_unstartable(stages):
        nnodes = stage.launcher.nnodes
        values = resolve_arguments({GRADIENT_ACCUMULATION: stage.arguments.get(GRADIENT_ACCUMULATION, 1)})
        lines.append(
            f"stages.{stage.name}: launcher.nnodes is {nnodes}, but this version starts torchrun on one machine only. "
            f"The same global batch on one: --set stages.{stage.name}.launcher.nnodes=1 "
            f"--set stages.{stage.name}.arguments.{GRADIENT_ACCUMULATION}={values[GRADIENT_ACCUMULATION] * nnodes}"
        )
    if lines:
        raise ArgumentError("\n".join(lines))


def find_unstartable(stages: list[Stage]) -> list[Stage]:
    """Find the stages for whose launcher this version has no way to start torchrun."""
    return [stage for stage in stages if stage.launcher.nnodes != 1]


def get_cache_dir(workspace: Path) -> Path:
    """Name the folder that all stages of a workspace share: indexes, fetched checkpoints and annotations."""
    return workspace / "cache"


def plan_stage(stage: Stage, start_from: CheckpointRef | None, *, cache_dir: Path) -> StagePlan:
    """Resolve a stage's arguments and digest everything that its result depends on.

    Raises:
        ArgumentError: the arguments are wrong, or the checkpoint to resume from is of another training.
    """
    values = resolve_stage(stage, has_parent=start_from is not None)
    inputs = _digest_inputs(stage.entry, stage, values, start_from, metas=METAS, cache_dir=cache_dir)
    return StagePlan(stage, values, start_from, inputs, _find_resume_point(stage.name, values[RESUME], inputs))


def plan_evaluation(stage: Stage, checkpoint: CheckpointRef, *, cache_dir: Path) -> StagePlan:
    """Plan to score a checkpoint as a stage scores its own, whatever the stage itself would start from."""
    arguments = {name: value for name, value in stage.arguments.items() if name not in (*COMPONENTS, RESUME)}
    own = {"arguments": arguments, "start_from": None, "save_budget_s": EVALUATION_BUDGET_S}
    stage = stage.model_copy(update=own)
    values = resolve_stage(stage, has_parent=True)
    inputs = _digest_inputs(EVALUATION, stage, values, checkpoint, metas=["eval_meta_path"], cache_dir=cache_dir)
    return StagePlan(stage, values, checkpoint, inputs)


def _digest_inputs(
    entry: str,
    stage: Stage,
    values: Mapping[str, Any],
    start_from: CheckpointRef | None,
    *,
    metas: Iterable[str],
    cache_dir: Path,
) -> dict[str, Any]:
    return {
        "entry": entry,
        "trainer": __version__.split(".")[0],
        "arguments": fingerprint_arguments(values, world_size=stage.launcher.world_size),
        "data": {name: digest_meta(values[name], cache_dir) for name in metas if values[name]},
        "components": {name: _digest_component(name, values[name]) for name in COMPONENTS if values[name]},
        "start_from": start_from.digest if start_from else None,
    }


def check_resume_point(stage: Stage, where: Any) -> None:
    """Check what a stage is told to resume from, as far as that is possible before its parent is known.

    Raises:
        ArgumentError: its arguments are others, or it has final weights only.
        CheckpointNotFound, CheckpointCorrupt: it is not there, or is damaged.
    """
    arguments = fingerprint_arguments(resolve_arguments(stage.arguments), world_size=stage.launcher.world_size)
    _find_resume_point(stage.name, read_resume(where), {"entry": stage.entry, "arguments": arguments})


def _find_resume_point(name: str, where: str | None, inputs: Mapping[str, Any]) -> CheckpointRef | None:
    if where in (None, LATEST):
        # What happens anyway.
        return None
    checkpoint, manifest = find_resume_point(where)
    advice = (
        f"With the arguments as they are now, stage {name} is another one: leave resume_from_checkpoint out and it "
        "starts afresh in a directory of its own, or give it what the checkpoint was trained with."
    )
    check_inputs_equal(checkpoint, manifest, inputs, advice=advice)
    return checkpoint


def _check_directories(given: Mapping[str, Any]) -> None:
    problems = [
        f"{name}: {given[name]} would be ignored: the pipeline puts it into the recipe's workspace. Leave it out."
        for name in SET_BY_PIPELINE
        if given.get(name) is not None
    ]
    if problems:
        raise ArgumentError("\n".join(problems))


def _digest_component(name: str, path: str) -> str:
    """Digest a file, a folder or a checkpoint; a hub id is its own name."""
    is_file = name == PROJECTOR and is_weights_file(path)
    if is_checkpoint_uri(path):
        return digest_file(path) if is_file else digest_model(path)
    if Path(path).is_file():
        return hash_file(Path(path))
    return digest_folder(Path(path)) if Path(path).is_dir() else path
