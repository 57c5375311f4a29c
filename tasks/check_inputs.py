"""Refuse what is wrong before anything is trained: files, data, store, gates."""

from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from internvl_core.checkpoint.store import check_store, is_checkpoint_uri
from internvl_core.data.meta import load_meta
from internvl_core.errors import ArgumentError, InternVLError
from tasks.stage import Stage
from tasks.stage_plan import COMPONENTS, METAS, resolve_stage


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


@task(name="check inputs", cache_policy=NO_CACHE)
def check_inputs(stages: list[Stage], store_uri: str) -> None:
    """Look at every file and service the stages will need.

    Uses: the local disk, the store (a probe object is written and removed).
    """
    problems: list[InternVLError] = []
    paths = {(stage.name, name): stage.arguments.get(name) for stage in stages for name in (*METAS, *COMPONENTS)}
    for (stage, name), path in paths.items():
        if path:
            try:
                _check_path(name, path)
            except InternVLError as error:
                problems.append(type(error)(f"{stage}: {error}"))
    try:
        check_store(store_uri)
    except InternVLError as error:
        problems.append(error)
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise ArgumentError("\n".join(str(problem) for problem in problems))


def _check_path(name: str, path: str) -> None:
    if name in METAS:
        for dataset in load_meta(Path(path)):
            if not Path(dataset.annotation).is_file():
                raise ArgumentError(f"{path}: {dataset.name}: annotation {dataset.annotation} does not exist.")
    elif Path(path).is_absolute() and not is_checkpoint_uri(path) and not Path(path).is_dir():
        raise ArgumentError(f"{name}: {path} does not exist. Give a model folder.")
