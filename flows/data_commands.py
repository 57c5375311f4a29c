"""`internvl data index|check|show|pack-report`: look at data before training does."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.pack_command import pack_report
from internvl_core.errors import ArgumentError, DataError

if TYPE_CHECKING:
    from flows.recipe import Recipe
    from internvl_core.inspection.lint_report import DatasetReport, LintReport, MetaJob

data_app = typer.Typer(help="Index, check and show the data of a meta file or of a recipe.", no_args_is_help=False)
data_app.command()(pack_report)

Meta = Annotated[Path | None, typer.Argument(metavar="META", help="Meta file that lists the data sets (JSON).")]
Tokenizer = Annotated[str | None, typer.Option(help="Folder of a model or tokenizer, hub id, or URI of a checkpoint.")]
RecipeName = Annotated[
    str | None, typer.Option("--recipe", help="In place of META: a shipped recipe, or path of a YAML file.")
]
StageName = Annotated[str | None, typer.Option("--stage", help="Only this stage of the recipe.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", help="With META, an argument of a stage: name=value. With --recipe, as in internvl run."),
]
CacheDir = Annotated[Path | None, typer.Option(help="Where indexes are kept; a recipe's are in its workspace.")]


@data_app.command()
def index(
    meta: Meta = None,
    tokenizer: Tokenizer = None,
    recipe: RecipeName = None,
    stage: StageName = None,
    setting: Settings = None,
    cache_dir: CacheDir = None,
) -> None:
    """Build the indexes that training looks for; what is there already and right is kept."""
    from tasks.data_table import list_distinct

    request = _read_request(meta, tokenizer, recipe, stage, setting, cache_dir)
    if any(job.source is None for job in request.jobs):
        raise ArgumentError("--tokenizer: missing. An index counts tokens: name the folder of the model's tokenizer.")
    problems = []
    for found in list_distinct(_lint(request, num_media=0)):
        if found.title:
            typer.echo(found.title)
        for dataset in found.datasets:
            if dataset.error is not None:
                problems.append(f"{found.title}: {dataset.error}" if found.title else dataset.error)
            else:
                typer.echo(_describe_index(dataset))
    if problems:
        raise DataError("\n".join(problems))


@data_app.command()
def check(
    meta: Meta = None,
    tokenizer: Tokenizer = None,
    recipe: RecipeName = None,
    stage: StageName = None,
    setting: Settings = None,
    cache_dir: CacheDir = None,
    full: Annotated[bool, typer.Option("--full", help="Decode every image and video.")] = False,
    samples: Annotated[int, typer.Option(help="Records of each data set whose media are decoded.")] = 64,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Lint every record and decode some media; exit code 65 if something is wrong."""
    from internvl_core.inspection.lint_report import ALL_MEDIA

    if samples < 0:
        raise ArgumentError(f"--samples: {samples} must be at least 0.")
    request = _read_request(meta, tokenizer, recipe, stage, setting, cache_dir)
    report = _lint(request, num_media=ALL_MEDIA if full else samples, counts_ids=True)
    if as_json:
        import json

        typer.echo(json.dumps(report.to_json(), indent=2, ensure_ascii=False))
    else:
        _print_tables(report, has_tokens=all(job.source is not None for job in request.jobs))
    if report.has_errors:
        raise typer.Exit(DataError.exit_code)


@data_app.command()
def show(
    meta: Meta = None,
    line: Annotated[int, typer.Option(help="Line of the annotation, from 1.")] = 1,
    dataset: Annotated[str | None, typer.Option(help="Data set, if the meta file has several.")] = None,
    tokenizer: Tokenizer = None,
    recipe: RecipeName = None,
    stage: StageName = None,
    out: Annotated[Path | None, typer.Option(help="HTML file to write; default: DATASET-LINE.html.")] = None,
    setting: Settings = None,
    cache_dir: CacheDir = None,
) -> None:
    """Write a page with one sample: its pictures and tiles, its tokens, and which of them are learnt."""
    from internvl_core.inspection.show_job import ShowJob
    from tasks.data_tool import run_data_tool

    if line < 1:
        raise ArgumentError(f"--line: {line} must be at least 1.")
    request = _read_request(meta, tokenizer, recipe, stage, setting, cache_dir)
    jobs = [job for job in request.jobs if not job.is_held_out]
    if len(jobs) > 1:
        raise ArgumentError(f"--stage: missing. The recipe has {', '.join(job.title for job in jobs)}: name one.")
    job = ShowJob(jobs[0], dataset, line, str(out.absolute()) if out else None, request.cache_dir)
    report = run_data_tool("show", job.to_json(), log=_tell)
    typer.echo(report["out_path"])
    if report["problem"]:
        typer.echo(f"Not trained on: {report['problem']}")


@dataclass(frozen=True)
class _Request:
    jobs: "list[MetaJob]"
    cache_dir: str


def _read_request(
    meta: Path | None,
    tokenizer: str | None,
    recipe: str | None,
    stage: str | None,
    setting: list[str] | None,
    cache_dir: Path | None,
) -> _Request:
    from flows.overrides import parse_overrides

    overrides = parse_overrides(setting or [])
    if (meta is None) == (recipe is None):
        raise ArgumentError("Give either META, the path of a meta file, or --recipe.")
    if recipe is not None:
        if tokenizer is not None:
            raise ArgumentError("--tokenizer: with --recipe it is the recipe's own. Leave it out.")
        return _read_recipe(recipe, stage, overrides, cache_dir)
    assert meta is not None
    if stage is not None:
        raise ArgumentError("--stage: goes with --recipe. Leave it out.")
    return _read_meta(meta, tokenizer, overrides, cache_dir)


def _read_meta(meta: Path, tokenizer: str | None, overrides: dict[str, Any], cache_dir: Path | None) -> _Request:
    from internvl_core.argument_rules import resolve_arguments
    from internvl_core.data.meta import load_meta
    from internvl_core.inspection.lint_report import MetaJob, TokenizerSource

    values = resolve_arguments({**overrides, "meta_path": str(meta)})
    # Refuse what is no meta file before a process is started for it.
    load_meta(meta)
    source = TokenizerSource(_find_tokenizer(tokenizer)) if tokenizer is not None else None
    folder = str(cache_dir or values["cache_dir"])
    return _Request([MetaJob("", str(meta), values, source)], folder)


def _find_tokenizer(text: str) -> str:
    from internvl_core.checkpoint.uri import is_checkpoint_uri
    from internvl_core.inspection.hub import is_hub_id

    if Path(text).is_dir():
        return str(Path(text).absolute())
    if is_checkpoint_uri(text) or ("/" in text and is_hub_id(text)):
        return text
    raise ArgumentError(
        f"--tokenizer: {text}: no such folder, nor could it be the id of a model on the hub (owner/name, where "
        "owner is no folder here). Correct the path."
    )


def _read_recipe(name: str, stage: str | None, overrides: dict[str, Any], cache_dir: Path | None) -> _Request:
    from flows.overrides import tell_nearest
    from flows.recipe import load_recipe
    from tasks.data_jobs import list_meta_jobs
    from tasks.stage_plan import check_stage_arguments, get_cache_dir

    recipe = load_recipe(name, overrides)
    check_stage_arguments(recipe.stages, starts_from_checkpoint=recipe.start_from is not None)
    names = [known.name for known in recipe.stages]
    if stage is not None and stage not in names:
        raise ArgumentError(f"--stage: no stage {stage}{tell_nearest(stage, names)}. Stages: {', '.join(names)}.")
    build_inputs(recipe)
    jobs = list_meta_jobs(recipe.stages, start_from=recipe.start_from)
    chosen = [job for job in jobs if stage in (None, job.title)]
    return _Request(chosen, str(cache_dir or get_cache_dir(recipe.directory)))


def build_inputs(recipe: "Recipe") -> None:
    """Make the data set and the components of a recipe that trains on made ones, if they are not there yet."""
    if recipe.smoke_inputs and not (recipe.directory / "components").is_dir():
        from tasks.build_smoke_inputs import build_smoke_inputs

        recipe.directory.mkdir(parents=True, exist_ok=True)
        build_smoke_inputs.fn(recipe.directory)


def _lint(request: _Request, *, num_media: int, counts_ids: bool = False) -> "LintReport":
    from internvl_core.inspection.lint_report import LintJob, LintReport
    from tasks.data_tool import run_data_tool

    job = LintJob(request.cache_dir, request.jobs, num_media, counts_ids)
    return LintReport.from_json(run_data_tool("lint", job.to_json(), log=_tell))


def _tell(line: str) -> None:
    typer.echo(line, err=True)


def _describe_index(dataset: "DatasetReport") -> str:
    seconds = max(dataset.seconds, 1e-3)
    records_per_s, mb_per_s = dataset.num_records / seconds, dataset.size_bytes / seconds / 1e6
    speed = f"built in {seconds:.1f} s ({records_per_s:,.0f} records/s, {mb_per_s:.1f} MB/s)"
    return (
        f"{dataset.name}: {dataset.num_records:,} records, {dataset.num_bad:,} bad, {dataset.num_tokens:,} tokens, "
        f"{speed if dataset.is_built else 'found'}\n  {dataset.index_dir}"
    )


def _print_tables(report: "LintReport", *, has_tokens: bool) -> None:
    from rich.console import Console

    from tasks.data_table import iter_problem_lines, list_distinct, render_data_table

    console = Console()
    for found in list_distinct(report):
        console.print(render_data_table(found))
        lines = list(iter_problem_lines(found))
        for problem in lines:
            console.print(f"  {problem}", markup=False, highlight=False, soft_wrap=True)
        console.print()
    typer.echo("\n".join(_iter_remarks(report, has_tokens=has_tokens)))


def _iter_remarks(report: "LintReport", *, has_tokens: bool) -> Iterator[str]:
    if not has_tokens:
        yield "Tokens were not counted: no --tokenizer was given."
    names = {dataset.name for found in report.metas for dataset in found.datasets if dataset.has_errors}
    if names:
        yield f"Wrong: {', '.join(sorted(names))}. Look at a line with internvl data show."
    else:
        yield "Nothing is wrong."
