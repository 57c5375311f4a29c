"""What `internvl ckpt` prints of stages, checkpoints and collections, for people and as JSON."""

import json
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

from internvl_core.checkpoint.garbage import GarbageReport
from internvl_core.checkpoint.inventory import Entry, Holder, Stage
from internvl_core.checkpoint.manifest import Manifest
from internvl_core.contract import CheckpointRef

_HEAD = ("STEP", "KIND", "FENCE", "COMMITTED", "FILES", "SIZE", "STATE", "KEPT BY", "SAVE")
_RIGHT = {"STEP", "FENCE", "FILES", "SIZE"}
_UNITS = ("B", "kB", "MB", "GB", "TB")
_MAX_VALUE = 100  # characters of an argument's value


def iter_stage_lines(stage: Stage) -> Iterator[str]:
    """Tell what a stage's directory holds."""
    yield stage.uri
    yield f"  {_tell_holder(stage.holder)}"
    rows = [_HEAD, *(_tell_entry(entry) for entry in stage.entries)]
    if not stage.entries:
        yield "  nothing is committed"
    else:
        widths = [max(len(row[column]) for row in rows) for column in range(len(_HEAD))]
        for row in rows:
            cells = [
                cell.rjust(width) if head in _RIGHT else cell.ljust(width)
                for cell, width, head in zip(row, widths, _HEAD, strict=True)
            ]
            yield f"  {'  '.join(cells)}".rstrip()
    for entry in stage.entries:
        if entry.problem:
            yield f"  {entry.name}: {entry.problem}"
    yield ""


def describe_stage(stage: Stage) -> dict[str, Any]:
    """Describe a stage's directory as plain JSON."""
    return {
        "uri": stage.uri,
        "lease": asdict(stage.holder) if stage.holder else None,
        "checkpoints": [
            {**entry.name.to_json(), **{key: value for key, value in asdict(entry).items() if key != "name"}}
            for entry in stage.entries
        ],
    }


def iter_checkpoint_lines(checkpoint: CheckpointRef, manifest: Manifest, holder: Holder | None) -> Iterator[str]:
    """Tell what a checkpoint is and where it comes from."""
    size_bytes = sum(entry.size_bytes for entry in manifest.files)
    info = dict(manifest.info)
    yield f"{'Checkpoint':12}{checkpoint.uri}"
    yield f"{'Digest':12}{checkpoint.digest}"
    yield f"{'Stage':12}{manifest.stage}, fingerprint {manifest.fingerprint[:16]}"
    yield f"{'Step':12}{manifest.step} ({manifest.kind}, fence {manifest.fence})"
    if "time" in info:
        yield f"{'Committed':12}{_tell_time(info.pop('time'))}"
    yield f"{'Parent':12}{f'{manifest.parent.uri} ({manifest.parent.digest[:16]})' if manifest.parent else 'none'}"
    yield f"{'Lease':12}{_tell_holder(holder)}"
    yield from _iter_info_lines(info)
    yield f"{len(manifest.files)} files, {tell_size(size_bytes)}"
    for entry in manifest.files:
        yield f"  {tell_size(entry.size_bytes):>10}  {entry.sha256[:16]}  {entry.path}"


def describe_checkpoint(checkpoint: CheckpointRef, manifest: Manifest, holder: Holder | None) -> dict[str, Any]:
    """Describe a checkpoint as plain JSON."""
    return {
        "uri": checkpoint.uri,
        "digest": checkpoint.digest,
        **asdict(manifest),
        "lease": asdict(holder) if holder else None,
    }


def iter_garbage_lines(uri: str, report: GarbageReport, *, is_rehearsal: bool) -> Iterator[str]:
    """Tell what a collection removed and kept, and why."""
    verb = "would be removed" if is_rehearsal else "removed"
    yield uri
    if report.refusal:
        yield f"  No checkpoint may go: {report.refusal}."
    for name in report.removed:
        yield f"  {verb}: {name}"
    for save in report.swept:
        yield f"  {verb}: data/{save}"
    if not report.removed and not report.swept:
        yield f"  nothing {verb}"
    for name, reason in report.kept.items():
        yield f"  kept: {name}, {reason}"


def tell_size(size_bytes: int) -> str:
    """Tell a size in decimal units: 1.5 GB."""
    size = float(size_bytes)
    for unit in _UNITS[:-1]:
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.3g} {_UNITS[-1]}"


def _tell_entry(entry: Entry) -> tuple[str, ...]:
    kept_by = [f"pin {pin}" for pin in entry.pins] + ["handover"] * entry.is_handed_over
    state = "damaged" if entry.problem else "live" if entry.is_live else "superseded"
    return (
        str(entry.name.step),
        str(entry.name.kind),
        str(entry.name.fence),
        "" if entry.time is None else _tell_time(entry.time),
        "" if entry.num_files is None else str(entry.num_files),
        "" if entry.size_bytes is None else tell_size(entry.size_bytes),
        state,
        ", ".join(kept_by),
        (entry.uri or "").rpartition("/")[2],
    )


def _tell_holder(holder: Holder | None) -> str:
    if holder is None:
        return "nobody has taken a lease yet"
    if holder.is_released:
        return f"lease {holder.fence} was given back by {holder.owner}"
    since = "" if holder.taken_at is None else f" since {_tell_time(holder.taken_at)}"
    step = "" if holder.step is None else f" at step {holder.step}"
    doing = "" if holder.phase is None else f", last seen{step} ({holder.phase})"
    return f"lease {holder.fence} is held by {holder.owner}{since}{doing}"


def _tell_time(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(seconds)) + "Z"


def _iter_info_lines(info: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    """Tell nested values a line each, sorted, long ones cut."""
    for key, value in _sort(info.items()):
        if isinstance(value, Mapping) and value:
            yield f"{indent}{key}"
            yield from _iter_info_lines(value, f"{indent}  ")
        else:
            text = json.dumps(value, ensure_ascii=False)
            yield f"{indent}{key}: {text if len(text) <= _MAX_VALUE else text[:_MAX_VALUE] + ' ...'}"


def _sort(items: Iterable[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """Plain values first, so that they are not taken for part of a block before them."""
    return sorted(items, key=lambda item: (isinstance(item[1], Mapping), item[0]))
