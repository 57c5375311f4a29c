"""`internvl convert`: a model from one checkpoint format to the other, adapters merged."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from internvl_core.errors import ArgumentError

DEFAULT_CACHE_DIR = Path("~/.cache/internvl")

_GB_BYTES = 1e9


def convert(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="Folder, URI, committed checkpoint or hub id of a model or adapter.")
    ],
    target: Annotated[str, typer.Argument(metavar="DST", help="Folder or URI to write; must be empty.")],
    to: Annotated[str, typer.Option("--to", help="native (transformers) or chat (OpenGVLab).")],
    merge: Annotated[bool, typer.Option("--merge", help="Fold the adapters of SRC into its weights.")] = False,
    dtype: Annotated[str | None, typer.Option(help="float32, float16 or bfloat16; default: as in SRC.")] = None,
    cache_dir: Annotated[Path, typer.Option(help="Where remote models are downloaded to.")] = DEFAULT_CACHE_DIR,
) -> None:
    """Convert a model between transformers' native format and OpenGVLab's chat format."""
    from internvl_core.checkpoint.target import check_target
    from tasks.data_tool import run_data_tool

    if target.startswith("memory:"):
        raise ArgumentError(f"DST: {target}: ends with the process that writes it. Give a folder or a store's URI.")
    job = {
        # Before a process is started for it; the tool asks again.
        "target": check_target(target),
        "source": str(Path(source).absolute()) if Path(source).is_dir() else source,
        "to": to,
        "merge": merge,
        "dtype": dtype,
        "cache_dir": str(cache_dir),
    }
    report = run_data_tool("convert", job, log=lambda line: typer.echo(line, err=True))
    typer.echo("\n".join(_iter_lines(report)))


def _iter_lines(report: dict[str, Any]) -> Iterator[str]:
    yield f"Source      {report['source']} ({report['source_format']})"
    yield f"Target      {report['target'].removeprefix('file://')} ({report['target_format']})"
    size = f"{report['num_bytes'] / _GB_BYTES:,.3g} GB, {report['dtype']}"
    yield f"Written     {report['num_tensors']:,} tensors, {report['num_parameters']:,} parameters, {size}"
    yield f"Time        {report['seconds']:,.1f} s"
    if report["merged"] is not None:
        yield f"Merged      {report['merged']}"
    if report["difference"] is not None:
        found = report["difference"]
        yield (
            f"Logits      differ by at most {found['merged']:.2g} from the adapted model's in float32, by "
            f"{found['written']:.2g} as written; the largest is {found['largest_logit']:.3g}"
        )
    for remark in report["remarks"]:
        yield f"Note        {remark}"
