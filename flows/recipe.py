"""Recipes: an ordered list of stages, read from YAML, with overrides, and refused early when wrong."""

import os
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails

from flows.overrides import STAGES, apply_override, tell_nearest
from flows.strict_yaml import parse_yaml
from internvl_core.errors import ArgumentError
from tasks.stage import PREVIOUS, Gate, Launcher, Stage
from tasks.stage_plan import COMPONENTS

SHIPPED = resources.files("flows") / "recipes"
TRACKING_PATTERN = r"^(https?://[^/@?#\s]+(/[^@?#\s]*)?$|sqlite:///)"
"""What may be the address of MLflow: nothing that could hold a secret."""
_SHOWN_CHARACTERS = 60


class Recipe(BaseModel):
    """What one run trains, from which inputs, and where its checkpoints, metrics and files go."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_.-]*$", description="Name of the recipe; the MLflow experiment.")
    description: str = Field("", description="What it is for, in a sentence.")
    flow: Literal["pretrain", "finetune"] = Field("pretrain", description="Flow that runs it.")
    workspace: str = Field(
        min_length=1,
        description="Local directory for attempts, caches and the report, made if need be; a relative one starts at "
        "the current directory. `{workspace}` in any argument stands for it.",
    )
    store_uri: str | None = Field(None, description="fsspec URI for checkpoints; default: `store` in the workspace.")
    tracking_uri: str | None = Field(
        None, description="MLflow; default: MLFLOW_TRACKING_URI, or else an SQLite file in the workspace."
    )
    smoke_inputs: bool = Field(False, description="Make the digits data set and the tiny components in the workspace.")
    start_from: str | None = Field(None, description="Checkpoint URI that the first stage starts from.")
    launcher: Launcher = Field(default=Launcher(), description="Processes of every stage that says no other.")
    arguments: dict[str, Any] = Field(default_factory=dict, description="Arguments common to all stages.")
    retry_delays_s: list[Annotated[float, Field(ge=0)]] = Field(
        default=[10, 60, 300],
        max_length=10,
        description="Seconds before each further try of a stage that failed in a way a retry can help; none: no retry. "
        "That many may fail in a row, three at the most; a try that commits a newer checkpoint begins the count anew.",
    )
    stages: list[Stage] = Field(min_length=1, description="Stages, in order.")

    @model_validator(mode="before")
    @classmethod
    def _share_defaults(cls, content: Any) -> Any:
        """Fill each stage with the recipe's launcher and arguments, and put the workspace's path in."""
        if not isinstance(content, dict):
            return content
        shared = dict(content)
        workspace = content.get("workspace")
        if isinstance(workspace, str) and workspace:
            shared["workspace"] = str(Path(workspace).expanduser().absolute())
            shared = _fill_workspace(shared, shared["workspace"])
        if isinstance(shared.get(STAGES), list):
            shared[STAGES] = [_share(shared, stage) for stage in shared[STAGES]]
        return shared

    @model_validator(mode="after")
    def _check_start(self) -> Self:
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names):
            raise ValueError(f"stages: names must differ, but are {', '.join(names)}.")
        first = self.stages[0]
        has_own_start = first.brings_own_weights or first.start_from not in (None, PREVIOUS)
        if self.start_from is None and not has_own_start:
            raise ValueError(
                f"stages.{first.name}: has nothing to start from. Give it vision_path and llm_path, or "
                "model_name_or_path, or give the recipe start_from."
            )
        if self.start_from is not None and has_own_start:
            raise ValueError(
                f"start_from: would be ignored, for stages.{first.name} names its own start. Leave one out."
            )
        for stage in self.stages:
            if stage.brings_own_weights and stage.start_from is not None:
                raise ValueError(f"stages.{stage.name}: names both start_from and a model of its own. Give one.")
        return self

    @field_validator("tracking_uri")
    @classmethod
    def _check_no_password(cls, uri: str | None) -> str | None:
        if uri is not None and not re.match(TRACKING_PATTERN, uri):
            raise ValueError(
                "should be http(s)://host:port/path or sqlite:////path, without a user, a password or a query, which "
                "logs and pages would show. Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD where the run "
                "starts."
            )
        return uri

    @property
    def directory(self) -> Path:
        return Path(self.workspace)

    @property
    def store(self) -> str:
        return self.store_uri or f"file://{self.workspace}/store"

    @property
    def tracking(self) -> str:
        given = self.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
        return given or f"sqlite:///{self.workspace}/mlflow.db"


def list_recipes() -> list[str]:
    """Name the recipes that ship with the pipeline."""
    return sorted(entry.name.removesuffix(".yaml") for entry in SHIPPED.iterdir() if entry.name.endswith(".yaml"))


def load_recipe(
    source: str, overrides: Mapping[str, Any] | None = None, *, only_stages: Sequence[str] | None = None
) -> Recipe:
    """Read a recipe by shipped name or path of a YAML file, and apply overrides.

    Args:
        source: `smoke`, or `path/to/recipe.yaml`.
        overrides: dotted path to value; a stage is addressed by its name: `stages.stage2.arguments.max_steps`.
            `start_from` takes the place of whatever the recipe's first stage starts from.
        only_stages: names of the stages to train, one after another in the recipe; None or none: all. Those behind
            them are dropped, those before them too where the overrides have a checkpoint to start from.

    Raises:
        ArgumentError: no such recipe, or all that is wrong with it, one problem a line.
    """
    where = f"recipe {source}"
    content = parse_yaml(_read_text(source), where=where)
    if not isinstance(content, dict):
        raise ArgumentError(f"{where}: should be a mapping with name, workspace and stages.")
    for path, value in (overrides or {}).items():
        apply_override(content, path, value)
    has_start = (overrides or {}).get("start_from") is not None
    if only_stages:
        content[STAGES] = _select_stages(content, only_stages, has_start=has_start, where=where)
    if has_start:
        _drop_own_start(content)
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        problems = error.errors()
    places = {problem["loc"] for problem in problems}
    # What is wrong in the recipe's defaults is wrong in each stage that has them: said once.
    own = [problem for problem in problems if problem["loc"][0:1] != (STAGES,) or problem["loc"][2:] not in places]
    raise ArgumentError("\n".join(f"{where}: {_describe(problem, content)}" for problem in own))


def _select_stages(content: dict[str, Any], only: Sequence[str], *, has_start: bool, where: str) -> Any:
    """Cut the stages down to those that a run of `only` needs, which is those before them too unless it has a start."""
    stages = content.get(STAGES)
    if not isinstance(stages, list) or not all(isinstance(stage, dict) for stage in stages):
        return stages  # The check of the recipe says what is wrong.
    names = [str(stage.get("name")) for stage in stages]
    for name in only:
        if name not in names:
            raise ArgumentError(
                f"{where}: no stage named {name}{tell_nearest(name, names)}. Stages: {', '.join(names)}."
            )
    chosen = [number for number, name in enumerate(names) if name in only]
    first, last = chosen[0], chosen[-1]
    if len(chosen) <= last - first:
        left_out = ", ".join(name for name in names[first:last] if name not in only)
        raise ArgumentError(f"{where}: stages {', '.join(only)} leave out {left_out} between them. Add it.")
    return stages[first if has_start else 0 : last + 1]


def _drop_own_start(content: dict[str, Any]) -> None:
    """Take out what the first stage starts from; what is no stage is left to the check."""
    stages = content.get(STAGES)
    first = stages[0] if isinstance(stages, list) and stages else None
    if isinstance(first, dict) and isinstance(first.get("arguments") or {}, dict):
        first["start_from"] = None
        first["arguments"] = {**(first.get("arguments") or {}), **dict.fromkeys(COMPONENTS)}


def _read_text(source: str) -> str:
    if source in list_recipes():
        return (SHIPPED / f"{source}.yaml").read_text(encoding="utf-8")
    try:
        return Path(source).read_text(encoding="utf-8")
    except (FileNotFoundError, IsADirectoryError):
        shipped = list_recipes()
        raise ArgumentError(
            f"recipe {source}: neither a file nor a shipped recipe{tell_nearest(source, shipped)}. "
            f"Shipped: {', '.join(shipped)}."
        ) from None
    except (OSError, ValueError) as error:
        raise ArgumentError(f"recipe {source}: cannot be read as UTF-8 text: {error}.") from None


def _share(recipe: Mapping[str, Any], stage: Any) -> Any:
    """Put the recipe's launcher and arguments below the stage's own; what is no mapping is left to the check."""
    if not isinstance(stage, dict):
        return stage
    merged = dict(stage)
    for name in ("launcher", "arguments"):
        shared, own = recipe.get(name), stage.get(name)
        if isinstance(shared or {}, dict) and isinstance(own or {}, dict):
            merged[name] = {**(shared or {}), **(own or {})}
    return merged


def _fill_workspace(value: Any, workspace: str) -> Any:
    if isinstance(value, str):
        return value.replace("{workspace}", workspace)
    if isinstance(value, dict):
        return {key: _fill_workspace(item, workspace) for key, item in value.items()}
    if isinstance(value, list):
        return [_fill_workspace(item, workspace) for item in value]
    return value


def _describe(problem: ErrorDetails, content: dict[str, Any]) -> str:
    """Write a problem as one line, led by its place as one would write it in `--set`."""
    location = problem["loc"]
    if problem["type"] == "value_error":
        place = f"{_tell_place(location, content)}: " if location else ""
        return f"{place}{problem['ctx']['error']}"
    place = _tell_place(location, content)
    known = _find_model(location).model_fields
    if problem["type"] == "extra_forbidden":
        return f"{place}: no such key{tell_nearest(str(location[-1]), known)}. Known: {', '.join(known)}."
    if problem["type"] == "missing":
        return f"{place}: missing. It is: {known[str(location[-1])].description}"
    value = repr(problem["input"])
    shown = value if len(value) <= _SHOWN_CHARACTERS else f"{value[:_SHOWN_CHARACTERS]}..."
    return f"{place}: {shown}: {problem['msg']}."


def _tell_place(location: tuple[int | str, ...], content: dict[str, Any]) -> str:
    parts = [str(part) for part in location]
    if len(parts) > 1 and parts[0] == STAGES:
        number = int(parts[1])
        stage = content[STAGES][number]
        # A stage without a name cannot be addressed: tell its number, from 1.
        parts[1] = str(stage["name"]) if isinstance(stage, dict) and "name" in stage else f"#{number + 1}"
    return ".".join(parts)


def _find_model(location: tuple[int | str, ...]) -> type[BaseModel]:
    nested: dict[int | str, type[BaseModel]] = {"launcher": Launcher, "gate": Gate}
    if len(location) > 1 and location[-2] in nested:
        return nested[location[-2]]
    return Stage if location[0:1] == (STAGES,) and len(location) > 1 else Recipe
