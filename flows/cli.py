"""The `internvl` command. Imports late: `internvl --help` must not wait for Prefect."""

import atexit
import gc
import os
import re
import shlex
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.checkpoint_commands import checkpoint_app
from flows.data_commands import data_app
from flows.model_commands import convert
from flows.plan_command import plan
from flows.repetition import said_once
from flows.server_commands import deploy, up
from flows.terminal import leave_terminal
from internvl_core.errors import ArgumentError, InternVLError, Preempted

if TYPE_CHECKING:
    from flows.recipe import Recipe
    from flows.stages import RecipeResult

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.add_typer(data_app, name="data")
app.add_typer(checkpoint_app, name="ckpt")

STOPPED = 130
LINE_COLUMNS = 100

QUIET_PREFECT = {
    "PREFECT_LOGGING_LEVEL": "INFO",
    "PREFECT_LOGGING_FORMATTERS_STANDARD_FLOW_RUN_FMT": "%(asctime)s  %(message)s",
    "PREFECT_LOGGING_FORMATTERS_STANDARD_TASK_RUN_FMT": "%(asctime)s  %(message)s",
    # The embedded server's own noise; a server of one's own keeps its settings.
    "PREFECT_SERVER_LOGGING_LEVEL": "CRITICAL",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    "DO_NOT_TRACK": "1",
}


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(help="Name of a shipped recipe, or path of a YAML file.")],
    override: Annotated[
        list[str] | None, typer.Option("--set", help="a.b=value, such as stages.stage2.arguments.max_steps=100.")
    ] = None,
    stages: Annotated[
        list[str] | None, typer.Option("--stage", help="Train this stage only; repeat it. Those before are finished.")
    ] = None,
    fresh: Annotated[bool, typer.Option(help="Train these stages again, even those that are finished.")] = False,
    start_from: Annotated[
        str | None, typer.Option(help="URI of the committed checkpoint that the first stage starts from.")
    ] = None,
) -> None:
    """Run a recipe from here to its end, on Prefect's embedded server or the one in PREFECT_API_URL."""
    from flows.overrides import parse_overrides
    from flows.recipe import load_recipe
    from tasks.data_tool import start_data_tool
    from tasks.stage_plan import check_launchers, check_stage_arguments

    overrides = parse_overrides(override or [])
    if start_from is not None:
        overrides["start_from"] = start_from
    # Refuse a wrong recipe before a server is started for it.
    loaded = load_recipe(recipe, overrides, only_stages=stages)
    check_stage_arguments(loaded.stages, starts_from_checkpoint=loaded.start_from is not None)
    check_launchers(loaded.stages)

    # Before Prefect is imported, which starts threads.
    leave_terminal()
    # And before it reads its settings.
    for name, value in QUIET_PREFECT.items():
        os.environ.setdefault(name, value)
    if home := os.environ.get("PREFECT_HOME"):
        # Prefect makes the last folder of the path only, and then has no place for its database.
        Path(home).expanduser().mkdir(parents=True, exist_ok=True)
    # It imports torch while this process imports Prefect.
    start_data_tool("lint")
    from flows.console import check_server, quiet_prefect
    from flows.finetune import finetune
    from flows.pretrain import pretrain
    from flows.stages import INTERRUPTED, RecipeResult

    quiet_prefect()
    check_server()
    flow = pretrain if loaded.flow == "pretrain" else finetune
    state = flow(recipe, stages=stages, overrides=overrides, is_fresh=fresh, return_state=True)
    if state.name == INTERRUPTED:
        raise KeyboardInterrupt
    if state.is_cancelled():
        raise Preempted("The run was cancelled; it goes on where it is run again.")
    result = state.result()
    assert isinstance(result, RecipeResult)
    _print_result(result)


@app.command()
def recipes() -> None:
    """List the recipes that ship with the pipeline."""
    from flows.recipe import list_recipes, load_recipe

    names = sorted(list_recipes(), key=_split_numbers)
    width = max(map(len, names)) + 2
    for name in names:
        text = f"{name:<{width}}{load_recipe(name).description}"
        typer.echo(textwrap.fill(text, LINE_COLUMNS, subsequent_indent=" " * width, break_on_hyphens=False))


@app.command()
def check(
    recipe: Annotated[str, typer.Argument(help="Name of a shipped recipe, or path of a YAML file.")],
    override: Annotated[list[str] | None, typer.Option("--set", help="a.b=value.")] = None,
) -> None:
    """Check a recipe and the arguments of all its stages; needs no GPU and starts nothing."""
    from flows.overrides import parse_overrides
    from flows.recipe import load_recipe
    from tasks.stage_plan import check_stage_arguments, find_unstartable

    loaded = load_recipe(recipe, parse_overrides(override or []))
    check_stage_arguments(loaded.stages, starts_from_checkpoint=loaded.start_from is not None)
    count = f"{len(loaded.stages)} stage{'s' if len(loaded.stages) > 1 else ''}"
    typer.echo(f"{loaded.name}: {count}, all arguments are right.")
    if unstartable := find_unstartable(loaded.stages):
        names = ", ".join(stage.name for stage in unstartable)
        typer.echo(f"{names}: more machines than the one that this version can start. `internvl run` tells how to fit.")


app.command()(plan)
app.command()(convert)
app.command()(up)
app.command()(deploy)


@app.command()
def replay(
    spool: Annotated[Path, typer.Argument(help="Directory that a warning of a run named: <workspace>/tracking/<id>.")],
    tracking_uri: Annotated[str, typer.Argument(help="MLflow: the recipe's tracking_uri, or another one.")],
) -> None:
    """Record in MLflow what a run could not deliver, because MLflow was down when it ended."""
    from tasks.track_run import replay as deliver

    if not deliver(spool, tracking_uri):
        raise typer.Exit(1)
    typer.echo(f"{spool}: all of it is in MLflow.")


def main() -> None:
    """Run the command; an error of ours is one message and its exit code, never a stack."""
    # Nobody needs the cycles of a process that ends; looking for them takes 0.7 s once MLflow is imported.
    atexit.register(gc.freeze)
    try:
        with said_once("internvl_core.argument_renames", "internvl_core.argument_rules"):
            # Typer catches Ctrl-C and returns its exit code.
            exit_code = app(standalone_mode=False)
    except InternVLError as error:
        typer.echo(f"{type(error).__name__}: {error}", err=True)
        sys.exit(error.exit_code)
    except typer.TyperException as error:
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else "internvl"
        typer.echo(f"{command}: {error.format_message().rstrip('.')}. See {command} --help.", err=True)
        sys.exit(ArgumentError.exit_code)
    if exit_code == STOPPED:
        typer.echo("Stopped.", err=True)
    sys.exit(exit_code)


def _split_numbers(name: str) -> list[tuple[int, str]]:
    """Make a sort key that puts 4b before 26b."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _print_result(result: "RecipeResult") -> None:
    from rich.console import Console

    from tasks.stage_table import render_table

    console = Console()
    console.print()
    console.print(render_table(result.trained))
    typer.echo("Checkpoints")
    for trained in result.trained:
        typer.echo(f"  {trained.name:<9} {trained.checkpoint.uri}")
    typer.echo(f"\nReport      {result.report_path}")
    for name, command in _ui_commands(result.recipe).items():
        typer.echo(f"{name:<11} {command}")


def _ui_commands(recipe: "Recipe") -> dict[str, str]:
    """Name the commands that open the UIs on what just ran, ready to be pasted into a shell."""
    from prefect.settings import get_current_settings

    from tasks.address import hide_password

    settings = get_current_settings()
    bin_dir = Path(sys.executable).parent
    if settings.api.url:
        prefect_ui = hide_password(settings.api.url).rstrip("/").removesuffix("/api")
    else:
        # The embedded server's database is in Prefect's home: the server must look there too.
        server = shlex.join(["env", f"PREFECT_HOME={settings.home}", f"{bin_dir}/prefect", "server", "start"])
        prefect_ui = f"{server}    then http://127.0.0.1:4200/v2/runs"
    if recipe.tracking.startswith(("http://", "https://")):
        return {"Prefect UI": prefect_ui, "MLflow UI": hide_password(recipe.tracking)}
    database = hide_password(recipe.tracking)
    mlflow = shlex.join([f"{bin_dir}/mlflow", "ui", "--workers", "1", "--backend-store-uri", database])
    return {"Prefect UI": prefect_ui, "MLflow UI": f"{mlflow}    then http://127.0.0.1:5000"}


if __name__ == "__main__":
    main()
