"""The `internvl` command. Imports late: `internvl --help` must not wait for Prefect."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from internvl_core.errors import InternVLError

if TYPE_CHECKING:
    from flows.recipe import Recipe
    from flows.stages import RecipeResult

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

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
    fresh: Annotated[bool, typer.Option(help="Train every stage again, even those that are finished.")] = False,
    start_from: Annotated[
        str | None, typer.Option(help="URI of the checkpoint to start from.")
    ] = None,
) -> None:
    """Run a recipe from here to its end, on Prefect's embedded server or the one in PREFECT_API_URL."""
    for name, value in QUIET_PREFECT.items():
        os.environ.setdefault(name, value)
    from flows.recipe import load_recipe, parse_overrides

    overrides = parse_overrides(override or [])
    if start_from is not None:
        overrides["start_from"] = start_from
    # Refuse a wrong recipe before a server is started for it.
    loaded = load_recipe(recipe, overrides)

    from flows.console import quiet_prefect
    from flows.finetune import finetune
    from flows.pretrain import pretrain

    quiet_prefect()
    flow = pretrain if loaded.flow == "pretrain" else finetune
    _print_result(flow(recipe, overrides=overrides, is_fresh=fresh))


@app.command()
def recipes() -> None:
    """List the recipes that ship with the pipeline."""
    from flows.recipe import list_recipes, load_recipe

    for name in list_recipes():
        typer.echo(f"{name:<24} {load_recipe(name).description}")


@app.command()
def check(
    recipe: Annotated[str, typer.Argument(help="Name of a shipped recipe, or path of a YAML file.")],
    override: Annotated[list[str] | None, typer.Option("--set", help="a.b=value.")] = None,
) -> None:
    """Check a recipe and the arguments of all its stages; needs no GPU and starts nothing."""
    from flows.recipe import load_recipe, parse_overrides
    from tasks.check_inputs import check_stage_arguments

    loaded = load_recipe(recipe, parse_overrides(override or []))
    check_stage_arguments(loaded.stages, starts_from_checkpoint=loaded.start_from is not None)
    typer.echo(f"{loaded.name}: {len(loaded.stages)} stages, all arguments are right.")


def main() -> None:
    """Run the command; an error of ours is one message and its exit code, never a stack."""
    try:
        app(standalone_mode=False)
    except InternVLError as error:
        typer.echo(f"{type(error).__name__}: {error}", err=True)
        sys.exit(error.exit_code)
    except typer.Abort:
        sys.exit(130)
    except KeyboardInterrupt:
        typer.echo("Stopped.", err=True)
        sys.exit(130)


def _print_result(result: "RecipeResult") -> None:
    from rich.console import Console

    from tasks.write_report import render_table

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
    """Name the commands that open the UIs on what just ran."""
    bin_dir = Path(sys.executable).parent
    commands = {}
    if "PREFECT_API_URL" in os.environ:
        commands["Prefect UI"] = os.environ["PREFECT_API_URL"].removesuffix("/api")
    else:
        home = f"PREFECT_HOME={os.environ['PREFECT_HOME']} " if "PREFECT_HOME" in os.environ else ""
        commands["Prefect UI"] = f"{home}{bin_dir}/prefect server start    then http://127.0.0.1:4200/v2/runs"
    commands["MLflow UI"] = (
        recipe.tracking
        if recipe.tracking.startswith("http")
        else f"{bin_dir}/mlflow ui --workers 1 --backend-store-uri {recipe.tracking}    then http://127.0.0.1:5000"
    )
    return commands


if __name__ == "__main__":
    main()
