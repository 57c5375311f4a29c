"""`internvl ckpt list|show|verify|fetch|gc|pin|unpin|take-over`: look at checkpoints, bring them here, remove them."""

import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from internvl_core.contract import CheckpointRef
from internvl_core.errors import ArgumentError, CheckpointCorrupt, CheckpointNotFound

if TYPE_CHECKING:
    from internvl_core.checkpoint.store import Commit, StageStore

checkpoint_app = typer.Typer(help="List, verify, fetch, pin and remove the checkpoints of a store.")

Uri = Annotated[
    str, typer.Argument(metavar="URI", help="Of a store, of a stage's directory in it, or of a checkpoint; or a path.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]

_MEGA = 1e6


@checkpoint_app.command("list")
def list_checkpoints(uri: Uri, as_json: AsJson = False) -> None:
    """List all that was committed: live or superseded, pinned, handed over, damaged as far as the records tell."""
    from flows.checkpoint_tables import describe_stage, iter_stage_lines
    from internvl_core.checkpoint.inventory import find_stage_uris, read_stage

    stages = [read_stage(found) for found in find_stage_uris(_absolute(uri))]
    if as_json:
        _print_json([describe_stage(stage) for stage in stages])
    else:
        typer.echo("\n".join(line for stage in stages for line in iter_stage_lines(stage)).rstrip())


@checkpoint_app.command()
def show(uri: Uri, as_json: AsJson = False) -> None:
    """Show where a checkpoint comes from: parent, arguments, versions, files, and who holds its stage's lease."""
    from flows.checkpoint_tables import describe_checkpoint, iter_checkpoint_lines
    from internvl_core.checkpoint.commits import open_checkpoint
    from internvl_core.checkpoint.inventory import find_holder
    from internvl_core.checkpoint.store import read_manifest, resolve_checkpoint

    checkpoint = resolve_checkpoint(_absolute(uri))
    manifest, holder = read_manifest(checkpoint), find_holder(open_checkpoint(checkpoint.uri)[0])
    if as_json:
        _print_json(describe_checkpoint(checkpoint, manifest, holder))
    else:
        typer.echo("\n".join(iter_checkpoint_lines(checkpoint, manifest, holder)))


@checkpoint_app.command()
def verify(
    uri: Uri, is_all: Annotated[bool, typer.Option("--all", help="Every commit of the stage, not one.")] = False
) -> None:
    """Read every byte of a checkpoint and compare it with its manifest; exit code 80 if something is wrong."""
    from internvl_core.checkpoint.inventory import open_stage, read_stage
    from internvl_core.checkpoint.store import resolve_checkpoint

    store = open_stage(_absolute(uri))
    if not is_all:
        _verify(store, resolve_checkpoint(_absolute(uri)))
        return
    entries = read_stage(store.uri).entries
    if not entries:
        raise CheckpointNotFound(f"{store.uri}: nothing is committed there, so there is nothing to verify.")
    num_damaged = 0
    for entry in entries:
        try:
            if entry.uri is None or entry.digest is None:
                raise CheckpointCorrupt(entry.problem)
            _verify(store, CheckpointRef(entry.uri, entry.digest))
        except (CheckpointCorrupt, CheckpointNotFound) as error:
            num_damaged += 1
            typer.echo(f"damaged  {entry.name}: {error}")
    if num_damaged:
        raise CheckpointCorrupt(f"{store.uri}: {num_damaged} of {len(entries)} checkpoints are damaged.")


@checkpoint_app.command()
def fetch(
    uri: Uri, target: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to make; must be new or empty.")]
) -> None:
    """Copy a checkpoint here, verified; the folder appears whole or not at all."""
    from internvl_core.checkpoint.fetch import copy_checkpoint
    from internvl_core.checkpoint.store import read_manifest, resolve_checkpoint

    checkpoint = resolve_checkpoint(_absolute(uri))
    size_bytes = sum(entry.size_bytes for entry in read_manifest(checkpoint).files)
    start = time.monotonic()
    copy_checkpoint(checkpoint, target.absolute())
    typer.echo(f"{checkpoint.uri}\n-> {target}  ({_tell_speed(size_bytes, start)})")


@checkpoint_app.command()
def gc(
    uri: Uri,
    keep: Annotated[int, typer.Option("--keep", help="Checkpoints to keep that verify, at least 2.")],
    is_rehearsal: Annotated[bool, typer.Option("--dry-run", help="Only tell what would be removed.")] = False,
) -> None:
    """Remove checkpoints that newer, verified ones supersede, and what crashes left; refused while a run lives."""
    from flows.checkpoint_tables import iter_garbage_lines
    from internvl_core.checkpoint.garbage import MIN_KEPT
    from internvl_core.checkpoint.inventory import open_stage
    from internvl_core.checkpoint.store import Owner

    if keep < MIN_KEPT:
        raise ArgumentError(f"--keep {keep}: too few, for the newest may rot. Keep at least {MIN_KEPT}.")
    store = open_stage(_absolute(uri))
    if is_rehearsal:
        report = store.collect_garbage(store.next_fence(), keep=keep, is_rehearsal=True)
    else:
        lease = store.acquire(
            Owner.of_this_process("of internvl ckpt gc"), choose_base=lambda found: _choose_base(store, found)
        )
        try:
            report = store.collect_garbage(lease.fence, keep=keep)
        finally:
            lease.release()
    typer.echo("\n".join(iter_garbage_lines(store.uri, report, is_rehearsal=is_rehearsal)))


@checkpoint_app.command()
def pin(uri: Uri, name: Annotated[str, typer.Argument(help="Of the pin.")]) -> None:
    """Keep a checkpoint until it is unpinned, whatever supersedes it."""
    from internvl_core.checkpoint.inventory import open_stage
    from internvl_core.checkpoint.store import resolve_checkpoint

    checkpoint = resolve_checkpoint(_absolute(uri))
    open_stage(checkpoint.uri).pin(name, checkpoint)
    typer.echo(f"{checkpoint.uri} is pinned as {name}.")


@checkpoint_app.command()
def unpin(uri: Uri, name: Annotated[str, typer.Argument(help="Of the pin.")]) -> None:
    """Remove a pin; the checkpoint goes when newer ones supersede it."""
    from internvl_core.checkpoint.inventory import open_stage

    store = open_stage(_absolute(uri))
    store.unpin(name)
    typer.echo(f"{store.uri}: {name} is no pin any more.")


@checkpoint_app.command("take-over")
def take_over(uri: Uri) -> None:
    """Fence a run that cannot be reached: whatever it commits from now on is not seen. The next run goes on at once."""
    from internvl_core.checkpoint.backend import open_backend
    from internvl_core.checkpoint.inventory import find_holder, open_stage
    from internvl_core.checkpoint.lease import tell_time
    from internvl_core.checkpoint.store import Owner

    store = open_stage(_absolute(uri))
    holder = find_holder(open_backend(store.uri))
    if holder is None:
        raise CheckpointNotFound(f"{store.uri}: nobody ever took a lease there, so there is nobody to fence.")
    if holder.is_released:
        typer.echo(f"Lease {holder.fence} was given back by {holder.owner}; there is nobody to fence.")
        return
    lease = store.acquire(
        Owner.of_this_process("of internvl ckpt take-over"),
        choose_base=lambda found: _choose_base(store, found),
        takes_over=True,
    )
    lease.release()
    since = "" if holder.taken_at is None else f" since {tell_time(holder.taken_at)}"
    at_step = "" if holder.step is None else f" It was at step {holder.step} ({holder.phase})."
    goes_on = f"with {lease.base.name}" if lease.base else "from the start; nothing was committed"
    typer.echo(
        f"Fenced: {holder.owner}, which held lease {holder.fence}{since}.{at_step}\n"
        f"The next run of this stage goes on {goes_on}."
    )


def _verify(store: "StageStore", checkpoint: CheckpointRef) -> None:
    from internvl_core.checkpoint.store import read_manifest

    size_bytes = sum(entry.size_bytes for entry in read_manifest(checkpoint).files)
    start = time.monotonic()
    store.verify(checkpoint)
    typer.echo(f"whole    {checkpoint.uri}  ({_tell_speed(size_bytes, start)})")


def _tell_speed(size_bytes: int, start: float) -> str:
    seconds = max(time.monotonic() - start, 1e-3)
    return f"{size_bytes / _MEGA:,.1f} MB in {seconds:.1f} s, {size_bytes / _MEGA / seconds:,.0f} MB/s"


def _choose_base(store: "StageStore", found: "Iterable[Commit]") -> "Commit | None":
    """Choose what the stage goes on with after this command: nothing a person did not ask for may become history."""
    for commit in found:
        try:
            store.verify(commit.checkpoint)
        except (CheckpointCorrupt, CheckpointNotFound) as error:
            typer.echo(f"Passed over {commit.name}: {error}", err=True)
        else:
            return commit
    if store.list_committed():
        raise CheckpointCorrupt(
            f"{store.uri}: none of its checkpoints verifies, so nothing was changed. See internvl ckpt verify."
        )
    return None


def _absolute(uri: str) -> str:
    """Let people give a relative path, and refuse what cannot be a store before it is asked anything."""
    if uri.startswith("memory:"):
        raise ArgumentError(f"{uri}: is the memory of another process. Give a folder or a store's URI.")
    from internvl_core.checkpoint.uri import normalize_store_uri

    return normalize_store_uri(uri if "://" in uri or "::" in uri else str(Path(uri).absolute()))


def _print_json(content: object) -> None:
    import json

    typer.echo(json.dumps(content, indent=2, ensure_ascii=False))
