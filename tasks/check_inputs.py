"""Refuse what is wrong before anything is trained: files, data, store, gates."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from internvl_core.checkpoint.folder import digest_file, is_weights_file, resolve_folder
from internvl_core.checkpoint.store import check_store, is_checkpoint_uri, resolve_checkpoint
from internvl_core.data.meta import load_meta
from internvl_core.errors import ArgumentError, DataError, InternVLError
from internvl_core.inspection.hub import is_hub_id
from tasks.stage import PREVIOUS, Stage
from tasks.stage_plan import COMPONENTS, METAS, PROJECTOR, RESUME, check_resume_point


@task(name="check inputs", cache_policy=NO_CACHE)
def check_inputs(stages: list[Stage], *, store_uri: str, start_from: str | None) -> None:
    """Look at every file and service the stages will need, with all problems in one message.

    Uses: the local disk, the store (a probe object is written and removed), the stores of checkpoints to start from.
    """
    problems: list[InternVLError] = []
    for place, check, value in _iter_checks(stages, store_uri, start_from):
        try:
            check(value)
        except InternVLError as error:
            problems.append(type(error)("\n".join(f"{place}{line}" for line in str(error).splitlines())))
    if problems:
        kinds = {type(problem) for problem in problems}
        kind = kinds.pop() if len(kinds) == 1 else ArgumentError
        raise kind("\n".join(str(problem) for problem in problems))


def _iter_checks(
    stages: list[Stage], store_uri: str, start_from: str | None
) -> Iterator[tuple[str, Callable[[str], object], str]]:
    """List what to check: where it stands, how, and the value."""
    yield "", check_store, store_uri
    if start_from is not None:
        yield "start_from: ", resolve_checkpoint, start_from
    for stage in stages:
        for name in METAS:
            if stage.arguments.get(name):
                yield f"{stage.name}: {name}: ", load_meta, stage.arguments[name]
        for name in COMPONENTS:
            if stage.arguments.get(name):
                check = _check_projector if name == PROJECTOR else _check_model
                yield f"{stage.name}: {name}: ", check, stage.arguments[name]
        if stage.arguments.get(RESUME):
            yield f"{stage.name}: {RESUME}: ", partial(check_resume_point, stage), stage.arguments[RESUME]
        if stage.start_from not in (None, PREVIOUS):
            yield f"{stage.name}: start_from: ", resolve_checkpoint, stage.start_from
        if stage.gate is not None:
            yield (
                f"{stage.name}: gate: ",
                partial(_check_gate, stage.arguments.get("eval_meta_path")),
                stage.gate.metric,
            )


def _check_gate(eval_meta_path: str | None, metric: str) -> None:
    if not eval_meta_path:
        raise ArgumentError(f"on {metric}, but the stage has no eval_meta_path, so nothing is scored. Give it one.")
    try:
        scores = ["accuracy", *(f"accuracy/{meta.name}" for meta in load_meta(eval_meta_path))]
    except DataError:
        return  # Told already, as the meta file's own problem.
    if metric not in scores:
        raise ArgumentError(f"on {metric}, but the held-out sets give only {', '.join(scores)}. Correct one of them.")


def _check_model(path: str) -> None:
    if is_checkpoint_uri(path):
        resolve_folder(path)
    elif Path(path).is_file():
        raise ArgumentError(f"{path} is a file. Give the folder of the model; only {PROJECTOR} may be a file.")
    elif not Path(path).is_dir() and not is_hub_id(path):
        raise ArgumentError(f"{path} is no folder, nor the id of a model on the hub (owner/name). Correct the path.")


def _check_projector(path: str) -> None:
    if is_checkpoint_uri(path) and is_weights_file(path):
        digest_file(path)
    elif not Path(path).is_file():
        _check_model(path)
