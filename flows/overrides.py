"""Overrides: `--set stages.stage2.arguments.max_steps=100`, put into a recipe before it is checked."""

import difflib
from collections.abc import Iterable
from typing import Any

from flows.strict_yaml import parse_yaml
from internvl_core.errors import ArgumentError

STAGES = "stages"


def parse_overrides(items: list[str]) -> dict[str, Any]:
    """Turn `a.b=c` items into overrides; the value is read as YAML, nothing after the `=` means null."""
    overrides = {}
    for item in items:
        path, separator, text = item.partition("=")
        if not separator or not all(path.split(".")):
            raise ArgumentError(f"--set {item}: should be a.b=value, such as stages.stage2.arguments.max_steps=100.")
        overrides[path] = parse_yaml(text, where=f"--set {item}")
    return overrides


def apply_override(content: dict[str, Any], path: str, value: Any) -> None:
    """Set the value at a dotted path; a stage is addressed by its name, which may hold dots, as stage1.5 does.

    Raises:
        ArgumentError: no stage of that name, or a value where the path goes on.
    """
    target, rest = content, path
    stages = content.get(STAGES)
    if path.startswith(f"{STAGES}.") and isinstance(stages, list):
        target, rest = _find_stage(stages, path)
    *keys, last = rest.split(".")
    for key in keys:
        if target.get(key) is None:
            target[key] = {}
        if not isinstance(target[key], dict):
            raise ArgumentError(f"--set {path}: {key} is {target[key]!r}, which has no keys below it.")
        target = target[key]
    target[last] = value


def tell_nearest(key: str, known: Iterable[str]) -> str:
    """Write ` (did you mean ...?)`, or nothing where no known name is near."""
    found = difflib.get_close_matches(key, known, n=1)
    return f" (did you mean {found[0]}?)" if found else ""


def _find_stage(stages: list[Any], path: str) -> tuple[dict[str, Any], str]:
    """Find the stage whose name the path goes on with, the longest such name, and what follows it."""
    rest = path.removeprefix(f"{STAGES}.")
    by_name = {str(stage.get("name")): stage for stage in stages if isinstance(stage, dict)}
    if rest in by_name:
        raise ArgumentError(f"--set {path}: is a whole stage. Name a key of it: {path}.arguments.max_steps=100.")
    found = max((name for name in by_name if rest.startswith(f"{name}.")), key=len, default=None)
    if found is None:
        wanted = rest.partition(".")[0]
        raise ArgumentError(
            f"--set {path}: no stage named {wanted}{tell_nearest(wanted, by_name)}. Stages: {', '.join(by_name)}."
        )
    return by_name[found], rest.removeprefix(f"{found}.")
