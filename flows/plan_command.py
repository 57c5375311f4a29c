"""`internvl plan`: what the stages of a recipe need, before a GPU is taken."""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from internvl_core.errors import ArgumentError

if TYPE_CHECKING:
    from rich.table import Table

    from flows.recipe import Recipe
    from internvl_core.inspection.plan_report import PlanJob, PlanReport, StageReport


_GIB = 1 << 30


def plan(
    recipe: Annotated[str, typer.Argument(help="Name of a shipped recipe, or path of a YAML file.")],
    override: Annotated[
        list[str] | None, typer.Option("--set", help="a.b=value, such as stages.stage2.arguments.deepspeed=zero3.")
    ] = None,
    stage: Annotated[str | None, typer.Option(help="Only this stage of the recipe.")] = None,
    gpu_gb: Annotated[
        float | None, typer.Option(help="Memory of a GPU in GiB: tells what fits, or else what would help.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Tell parameters, memory per GPU and FLOPs per step of every stage; needs no GPU and no weights."""
    import json

    from flows.overrides import parse_overrides, tell_nearest
    from flows.recipe import load_recipe
    from internvl_core.inspection.plan_report import PlanReport
    from tasks.data_tool import run_data_tool
    from tasks.stage_plan import check_stage_arguments

    if gpu_gb is not None and not gpu_gb > 0:
        raise ArgumentError(f"--gpu-gb: {gpu_gb} must be more than 0.")
    loaded = load_recipe(recipe, parse_overrides(override or []))
    check_stage_arguments(loaded.stages, starts_from_checkpoint=loaded.start_from is not None)
    names = [known.name for known in loaded.stages]
    if stage is not None and stage not in names:
        raise ArgumentError(f"--stage: no stage {stage}{tell_nearest(stage, names)}. Stages: {', '.join(names)}.")
    gpu_bytes = None if gpu_gb is None else int(gpu_gb * _GIB)
    job = _build_job(loaded, gpu_bytes, only=stage)
    report = PlanReport.from_json(run_data_tool("plan", job.to_json(), log=_tell))
    if as_json:
        typer.echo(json.dumps(report.to_json(), indent=2))
        return
    print_report(report, gpu_bytes)


def print_report(report: "PlanReport", gpu_bytes: int | None) -> None:
    """Print a plan for people: tables, and what fits a GPU, if one is given."""
    _print_tables(report)
    typer.echo("\n".join(_iter_remarks(report, gpu_bytes)))


def _build_job(recipe: "Recipe", gpu_bytes: int | None, *, only: str | None) -> "PlanJob":
    from flows.data_commands import build_inputs
    from internvl_core.inspection.plan_report import PlanJob, StageJob
    from tasks.stage import PREVIOUS
    from tasks.stage_plan import resolve_stage

    build_inputs(recipe)
    jobs = [
        StageJob(
            name=stage.name,
            entry=stage.entry,
            values=resolve_stage(stage, has_parent=not stage.brings_own_weights),
            num_ranks=stage.launcher.world_size,
            start_from=stage.start_from if stage.start_from != PREVIOUS else None,
        )
        for stage in recipe.stages
    ]
    return PlanJob(jobs, recipe.start_from, only, gpu_bytes)


def _tell(line: str) -> None:
    typer.echo(line, err=True)


def _print_tables(report: "PlanReport") -> None:
    from rich.console import Console

    console = Console(highlight=False)
    for title, columns, rows in (
        (
            "Parameters in millions",
            ("stage", "vision tower", "projector", "language model", "all", "adapters"),
            (row for stage in report.stages for row in _iter_parameters(stage)),
        ),
        (
            "State of a GPU",
            ("stage", "GPUs", "sharding", "weights", "gradients", "optimizer", "buckets"),
            (_list_state(stage) for stage in report.stages),
        ),
        (
            "Largest batch of a GPU",
            ("stage", "tokens", "tiles", "recomputed", "activations", "kept", "logits", "total"),
            (_list_batch(stage) for stage in report.stages),
        ),
        (
            "Update of full batches on all GPUs, PFLOPs",
            ("stage", "batches", "useful", "with recomputation"),
            (_list_work(stage) for stage in report.stages),
        ),
    ):
        console.print(_build_table(title, columns, rows), "")


def _build_table(title: str, columns: Iterable[str], rows: Iterable[tuple[str, ...]]) -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def _iter_parameters(stage: "StageReport") -> Iterator[tuple[str, ...]]:
    parts = (*stage.parts.values(), stage.whole)
    yield stage.name, *(_write_millions(part.total) for part in parts), _write_millions(stage.num_adapters)
    yield "  trainable", *(_write_millions(part.trainable) for part in parts), ""


def _list_state(stage: "StageReport") -> tuple[str, ...]:
    memory = stage.memory
    sizes = (memory.weights, memory.gradients, memory.optimizer, memory.buckets)
    return stage.name, str(stage.num_ranks), stage.sharding, *map(_write_bytes, sizes)


def _list_batch(stage: "StageReport") -> tuple[str, ...]:
    memory, batch = stage.memory, stage.batch
    sizes = (memory.activations, memory.kept, memory.logits, memory.total)
    is_recomputed = "yes" if stage.is_checkpointed else "no"
    return stage.name, f"{batch.tokens:,}", f"{batch.tiles:,}", is_recomputed, *map(_write_bytes, sizes)


def _list_work(stage: "StageReport") -> tuple[str, ...]:
    work = (f"{flops / 1e15:,.4g}" for flops in (stage.flops.useful, stage.flops.computed))
    return stage.name, f"{stage.batch.batches_per_step:,}", *work


def _iter_remarks(report: "PlanReport", gpu_bytes: int | None) -> Iterator[str]:
    from internvl_core.inspection.plan_report import RESERVED

    yield (
        "G, M, k: GiB, MiB, KiB. total: the state and the larger of activations and kept + logits. Those are of a "
        "batch in which every position is supervised."
    )
    for stage in report.stages:
        if stage.memory.host:
            yield f"{stage.name}: {_write_bytes(stage.memory.host)} more on the host for each GPU."
    if gpu_bytes is None:
        return
    gpu = f"{_write_bytes(gpu_bytes)}, of which {RESERVED:.0%} are left to what is not counted"
    for stage in report.stages:
        total = f"{stage.name}: {_write_bytes(stage.memory.total)}"
        if stage.memory.fits(gpu_bytes):
            yield f"{total}: fits a GPU of {gpu}."
            continue
        yield f"{total}: does not fit a GPU of {gpu}. Instead:"
        for lever in stage.levers:
            answer = "fits" if lever.fits(gpu_bytes) else "does not fit"
            yield f"  {lever.setting}: {_write_bytes(lever.total)}, {answer}"


def _write_bytes(num_bytes: int) -> str:
    for unit, size in (("G", _GIB), ("M", 1 << 20)):
        if num_bytes >= size:
            return f"{num_bytes / size:,.1f} {unit}"
    return f"{num_bytes / 1024:,.1f} k" if num_bytes else "-"


def _write_millions(count: int) -> str:
    if not count:
        return "-"
    return f"{count / 1e6:,.1f}" if count >= 1e6 else f"{count / 1e6:.3f}"
