"""Recipes: an ordered list of stages, read from YAML, with overrides, and refused early when wrong."""

import difflib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from internvl_core.errors import ArgumentError
from tasks.stage import PREVIOUS, Launcher, Stage

SHIPPED = resources.files("flows") / "recipes"


class Recipe(BaseModel):
    """What one run trains, from which inputs, and where its checkpoints, metrics and files go."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_.-]*$", description="Name of the recipe; the MLflow experiment.")
    description: str = Field("", description="What it is for, in a sentence.")
    flow: Literal["pretrain", "finetune"] = Field("pretrain", description="Flow that runs it.")
    workspace: str = Field(
        description="Local directory for attempts, caches and the report. `{workspace}` in any argument stands for it."
    )
    store_uri: str | None = Field(None, description="fsspec URI for checkpoints; default: `store` in the workspace.")
    tracking_uri: str | None = Field(None, description="MLflow; default: an SQLite file in the workspace.")
    smoke_inputs: bool = Field(False, description="Make the digits data set and the tiny components in the workspace.")
    start_from: str | None = Field(None, description="Checkpoint URI that the first stage starts from.")
    launcher: Launcher = Field(default=Launcher(), description="Processes of every stage that says no other.")
    arguments: dict[str, Any] = Field(default_factory=dict, description="Arguments common to all stages.")
    stages: list[Stage] = Field(min_length=1, description="Stages, in order.")

    @model_validator(mode="before")
    @classmethod
    def _share_defaults(cls, content: Any) -> Any:
        """Fill each stage with the recipe's launcher and arguments, and put the workspace's path in."""
        if not isinstance(content, dict) or not isinstance(content.get("stages"), list):
            return content
        workspace = str(Path(content.get("workspace", ".")).absolute())
        stages = [
            {
                "launcher": content.get("launcher", {}),
                **stage,
                "arguments": {**content.get("arguments", {}), **stage.get("arguments", {})},
            }
            if isinstance(stage, dict)
            else stage
            for stage in content["stages"]
        ]
        return _fill_workspace({**content, "workspace": workspace, "stages": stages}, workspace)

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names):
            raise ValueError(f"stage names must differ, but are {names}")
        first = self.stages[0]
        if self.start_from is None and first.start_from in (None, PREVIOUS) and not first.brings_own_weights:
            raise ValueError(
                f"stage {first.name} has nothing to start from: give vision_path and llm_path, "
                "model_name_or_path, or start_from"
            )
        for stage in self.stages:
            if stage.brings_own_weights and stage.start_from is not None:
                raise ValueError(f"stage {stage.name} names both start_from and a model of its own: give one")
        return self

    @property
    def directory(self) -> Path:
        return Path(self.workspace)

    @property
    def store(self) -> str:
        return self.store_uri or f"file://{self.workspace}/store"

    @property
    def tracking(self) -> str:
        return self.tracking_uri or f"sqlite:///{self.workspace}/mlflow.db"


def list_recipes() -> list[str]:
    """Name the recipes that ship with the pipeline."""
    return sorted(entry.name.removesuffix(".yaml") for entry in SHIPPED.iterdir() if entry.name.endswith(".yaml"))


def load_recipe(source: str, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe by shipped name or path of a YAML file, and apply overrides.

    Args:
        source: `smoke`, or `path/to/recipe.yaml`.
        overrides: dotted path to value; a stage is addressed by its name: `stages.stage2.arguments.max_steps`.

    Raises:
        ArgumentError: no such recipe, or all that is wrong with it, one problem a line.
    """
    content, where = _read_yaml(source)
    for path, value in (overrides or {}).items():
        _set(content, path, value)
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        lines = [f"{where}: {_place(problem['loc'], content)}{problem['msg']}" for problem in error.errors()]
        raise ArgumentError("\n".join(lines)) from None


def parse_overrides(items: list[str]) -> dict[str, Any]:
    """Turn `a.b=c` items into overrides; the value is read as YAML."""
    overrides = {}
    for item in items:
        path, separator, text = item.partition("=")
        if not separator or not path:
            raise ArgumentError(f"--set {item}: should be a.b=value, such as stages.stage2.arguments.max_steps=100.")
        try:
            overrides[path] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ArgumentError(f"--set {item}: the value is not YAML ({error}).") from None
    return overrides


def _read_yaml(source: str) -> tuple[dict[str, Any], str]:
    path = Path(source)
    if source in list_recipes():
        text = (SHIPPED / f"{source}.yaml").read_text()
    elif path.is_file():
        text = path.read_text()
    else:
        raise ArgumentError(
            f"recipe {source}: neither a file nor one of the shipped ones: {', '.join(list_recipes())}."
        )
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ArgumentError(f"recipe {source}: not YAML: {error}") from None
    if not isinstance(content, dict):
        raise ArgumentError(f"recipe {source}: should be a mapping with name, workspace and stages.")
    return content, f"recipe {source}"


def _set(target: Any, path: str, value: Any, *, whole_path: str | None = None) -> None:
    whole_path = whole_path or path
    if isinstance(target, list):
        name = _find_stage_name(target, path, whole_path=whole_path)
        stage = next(item for item in target if item.get("name") == name)
        _set(stage, path.removeprefix(f"{name}."), value, whole_path=whole_path)
    elif not isinstance(target, dict):
        raise ArgumentError(f"--set {whole_path}: there is a value, not keys, before {path}.")
    elif "." not in path:
        target[path] = value
    else:
        key, _, rest = path.partition(".")
        _set(target.setdefault(key, {}), rest, value, whole_path=whole_path)


def _find_stage_name(stages: list[Any], path: str, *, whole_path: str) -> str:
    """Find the stage whose name the path begins with; a name may hold dots, as stage1.5 does."""
    names = [str(item.get("name")) for item in stages if isinstance(item, dict)]
    found = [name for name in names if path.startswith(f"{name}.")]
    if not found:
        wanted = path.partition(".")[0]
        raise ArgumentError(
            f"--set {whole_path}: no stage named {wanted}{_nearest(wanted, names)}. Stages: {', '.join(names)}."
        )
    return max(found, key=len)


def _nearest(key: str, known: list[str]) -> str:
    found = difflib.get_close_matches(key, known, n=1)
    return f" (did you mean {found[0]}?)" if found else ""


def _place(location: tuple[int | str, ...], content: dict[str, Any]) -> str:
    """Name the place of a problem as one would in `--set`."""
    parts = [str(part) for part in location]
    if len(parts) > 1 and parts[0] == "stages" and parts[1].isdigit():
        parts[1] = str(content["stages"][int(parts[1])].get("name", parts[1]))
    return ".".join(parts) + ": " if parts else ""


def _fill_workspace(value: Any, workspace: str) -> Any:
    if isinstance(value, str):
        return value.replace("{workspace}", workspace)
    if isinstance(value, dict):
        return {key: _fill_workspace(item, workspace) for key, item in value.items()}
    if isinstance(value, list):
        return [_fill_workspace(item, workspace) for item in value]
    return value
