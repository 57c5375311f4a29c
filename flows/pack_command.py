"""`internvl data pack-report`: what packing makes of samples of given sizes."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from internvl_core.errors import ArgumentError

if TYPE_CHECKING:
    from internvl_core.inspection.pack_report import PackReport


def pack_report(
    lengths: Annotated[
        Path, typer.Argument(metavar="LENGTHS", help=".npz file with the arrays tokens and tiles, a row a sample.")
    ],
    max_tokens: Annotated[int, typer.Option(help="Tokens that fit into a pack.")] = 16384,
    max_tiles: Annotated[int, typer.Option(help="Tiles that fit into a pack.")] = 48,
    ranks: Annotated[str, typer.Option(help="Numbers of ranks, of a pack a step each.")] = "8,64,512",
    model: Annotated[
        str,
        typer.Option(
            help="Size of InternVL 2.5 whose FLOPs are balanced, 1b to 78b; of a stage in which everything learns."
        ),
    ] = "8b",
    packer: Annotated[Literal["balanced", "legacy"], typer.Option(help="legacy: the original's.")] = "balanced",
    seed: Annotated[int, typer.Option(help="Of the order of the samples.")] = 0,
) -> None:
    """Pack samples of given sizes; print a JSON object, and a table on stderr."""
    import json

    from internvl_core.data.sizes import MAX_PACK_TILES, MAX_PACK_TOKENS, PackLimits
    from internvl_core.inspection.pack_report import load_lengths, report_packs
    from internvl_core.model.flops import NAMED_SHAPES, build_sample_cost

    for name, value, least, most in (
        ("--max-tokens", max_tokens, 1, MAX_PACK_TOKENS),
        ("--max-tiles", max_tiles, 1, MAX_PACK_TILES),
        ("--seed", seed, 0, 2**32 - 1),
    ):
        if not least <= value <= most:
            raise ArgumentError(f"{name}: {value} must be from {least} to {most}.")
    if model not in NAMED_SHAPES:
        raise ArgumentError(f"--model: {model} is none of {', '.join(NAMED_SHAPES)}.")
    numbers = _read_ranks(ranks)
    limits = PackLimits(max_tokens, max_tiles)
    cost = build_sample_cost(
        NAMED_SHAPES[model], learns_vision=True, learns_projector=True, learns_llm=True, is_checkpointed=True
    )
    report = report_packs(load_lengths(lengths, limits), limits, cost, ranks=numbers, packer=packer, seed=seed)
    settings = {"model": model, "packer": packer, "max_tokens": max_tokens, "max_tiles": max_tiles, "seed": seed}
    _print_tables(report, settings)
    typer.echo(json.dumps(report.to_json() | settings, indent=2))


def _read_ranks(text: str) -> list[int]:
    numbers = []
    for part in text.split(","):
        if not re.fullmatch(r"\s*0*[1-9][0-9]{0,6}\s*", part):
            raise ArgumentError(
                f"--ranks: {text}: {part.strip() or 'nothing'} is no number of ranks, such as 8,64,512."
            )
        numbers.append(int(part))
    return numbers


def _print_tables(report: "PackReport", settings: dict[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    def build_table(*titles: str) -> Table:
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
        for title in titles:
            table.add_column(title.replace(" ", "\n", 1), justify="right", vertical="bottom")
        return table

    console = Console(stderr=True, highlight=False)
    console.print(", ".join(f"{name.replace('_', ' ')} {value}" for name, value in settings.items()))
    whole = build_table(
        "samples", "left out", "packs", "efficiency", "token fill", "tile fill", "max delay", "us/sample"
    )
    whole.add_row(
        f"{report.samples:,}",
        f"{report.num_left_out:,}",
        f"{report.packs:,}",
        f"{report.lower_bound / report.packs:.2%}",
        f"{report.token_fill:.2%}",
        f"{report.tile_fill:.2%}",
        f"{report.max_delay:,}",
        f"{report.us_per_sample:.1f}",
    )
    console.print(whole, "")
    jobs = build_table("ranks", "balance", "steps", "packs left", "steps grouped", "max delay")
    for ranks, job in report.by_ranks.items():
        jobs.add_row(
            f"{ranks:,}",
            "-" if job.balance is None else f"{job.balance:.2%}",
            f"{job.steps:,}",
            f"{job.packs_left:,}",
            "-" if job.block_steps == 1 else f"by {job.block_steps}",
            f"{job.max_delay:,}",
        )
    console.print(jobs)
