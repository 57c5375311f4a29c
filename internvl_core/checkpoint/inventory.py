"""What a store holds, as people look at it: nothing here decides anything, and what is damaged is listed as such."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from internvl_core.checkpoint.backend import Backend, find_object, open_backend
from internvl_core.checkpoint.commits import (
    COMMITS_FOLDER,
    DATA_FOLDER,
    Commit,
    CommitName,
    is_save_uri,
    list_commit_names,
    open_checkpoint,
    read_commit,
    read_manifest_file,
)
from internvl_core.checkpoint.handover import list_handed_over
from internvl_core.checkpoint.lease import LEASE_FOLDER, beat_path, find_lease, list_fences, read_beat
from internvl_core.checkpoint.lineage import read_lineage
from internvl_core.checkpoint.manifest import Manifest
from internvl_core.checkpoint.pins import list_pins
from internvl_core.checkpoint.store import StageStore
from internvl_core.checkpoint.uri import normalize_uri
from internvl_core.errors import CheckpointCorrupt, CheckpointNotFound

_STAGE_NAME = re.compile(r"(?P<stage>[A-Za-z0-9][A-Za-z0-9._-]*)-(?P<fingerprint>[0-9a-f]{16})")
_STAGE_FOLDERS = {DATA_FOLDER, COMMITS_FOLDER, LEASE_FOLDER}


@dataclass(frozen=True)
class Entry:
    """A commit of a stage."""

    name: CommitName
    is_live: bool
    """It belongs to the present history of the stage; the others are what a fenced or a fresh run left behind."""
    uri: str | None = None
    digest: str | None = None
    time: float | None = None
    """Seconds since 1970, by the clock of who committed."""
    num_files: int | None = None
    size_bytes: int | None = None
    pins: tuple[str, ...] = ()
    is_handed_over: bool = False
    problem: str | None = None
    """Why it cannot be used, as far as its records tell; its files were not read."""


@dataclass(frozen=True)
class Holder:
    """Who took the newest lease of a stage."""

    fence: int
    owner: str
    taken_at: float | None
    """Seconds since 1970, by the holder's clock."""
    step: int | None
    phase: str | None
    """What it did at its last sign of life; None: it never gave one."""
    is_released: bool


@dataclass(frozen=True)
class Stage:
    """A stage's directory."""

    uri: str
    entries: list[Entry]
    """Newest first."""
    holder: Holder | None


def find_stage_uris(uri: str) -> list[str]:
    """Find the directories of stages that a person means.

    Args:
        uri: of a store, of a stage's directory, or of a checkpoint.

    Raises:
        CheckpointNotFound: there is none.
    """
    uri = normalize_uri(uri)
    if is_save_uri(uri):
        return [open_checkpoint(uri)[0].uri]
    names = open_backend(uri).list_names("")
    if _STAGE_NAME.fullmatch(uri.rpartition("/")[2]) and _STAGE_FOLDERS & set(names):
        return [uri]
    found = [f"{uri}/{name}" for name in sorted(names) if _STAGE_NAME.fullmatch(name)]
    if not found:
        raise CheckpointNotFound(
            f"{uri} holds no checkpoints. Give the URI of a store, of a stage's directory in it (<store>/<stage>-<16 "
            "digits>) or of a checkpoint (<stage's directory>/data/<save>)."
        )
    return found


def open_stage(uri: str) -> StageStore:
    """Open the one stage that a URI means, to change something in it.

    Raises:
        CheckpointNotFound: it means none, or several.
    """
    found = find_stage_uris(uri)
    if len(found) > 1 or not _STAGE_NAME.fullmatch(found[0].rpartition("/")[2]):
        names = ", ".join(stage.rpartition("/")[2] for stage in found)
        raise CheckpointNotFound(f"{uri} is a store with the stages {names}. Give the directory of one of them.")
    store_uri, _, name = found[0].rpartition("/")
    stage, _, fingerprint = name.rpartition("-")
    return StageStore(store_uri, stage, fingerprint)


def read_stage(uri: str) -> Stage:
    """Read all records of a stage's directory; those that are damaged become entries with a problem."""
    backend = open_backend(uri)
    names = list_commit_names(backend)
    lineage = read_lineage(backend, names)
    pins = list_pins(backend)
    try:
        handed_over = set(list_handed_over(backend))
    except CheckpointCorrupt:
        handed_over = set()
    entries = []
    for name in names:
        is_live = lineage.is_live(name)
        try:
            commit = read_commit(backend, name)
            manifest = read_manifest_file(backend, commit.checkpoint)
        except (CheckpointCorrupt, CheckpointNotFound) as error:
            entries.append(Entry(name, is_live, problem=str(error)))
        else:
            pinned_as = [pin for pin, checkpoint in pins.items() if checkpoint.uri == commit.checkpoint.uri]
            entries.append(_describe(commit, manifest, is_live, pinned_as, commit.checkpoint.uri in handed_over))
    return Stage(backend.uri, entries, find_holder(backend))


def find_holder(backend: Backend) -> Holder | None:
    """Find who took the newest lease; None if nobody ever did."""
    fence = max(list_fences(backend), default=0)
    if not fence:
        return None
    beat = read_beat(find_object(backend, beat_path(fence)))
    step, phase, is_released = (beat.step, beat.phase, beat.is_released) if beat else (None, None, False)
    try:
        record = find_lease(backend, fence)
    except CheckpointCorrupt:
        record = None
    if record is None:
        return Holder(fence, "somebody whose record is damaged", None, step, phase, is_released)
    return Holder(fence, str(record.owner), record.taken_at, step, phase, is_released)


def _describe(commit: Commit, manifest: Manifest, is_live: bool, pins: Iterable[str], is_handed_over: bool) -> Entry:
    time: Any = manifest.info.get("time")
    return Entry(
        commit.name,
        is_live,
        commit.checkpoint.uri,
        commit.checkpoint.digest,
        float(time) if isinstance(time, (int, float)) else None,
        len(manifest.files),
        sum(entry.size_bytes for entry in manifest.files),
        tuple(sorted(pins)),
        is_handed_over,
    )
