"""The commit records of a stage: which checkpoints were committed.

    <store>/<stage>-<fingerprint16>/
        data/<step>.<fence>.<nonce>/...         the files of one save, MANIFEST last
        commits/<step>.<fence>.<kind>.json      created exclusively: the checkpoint exists from here on

A name alone proves nothing: a record counts when it parses, and a checkpoint when its MANIFEST
has the digest of its record. Which of the committed ones belong to the stage's present history
is told in `lineage`. Records name their data relative to the stage's directory, so that a store
can be moved.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from internvl_core.checkpoint.backend import Backend, find_object, open_backend
from internvl_core.checkpoint.manifest import MANIFEST_FILE, CheckpointKind, Manifest
from internvl_core.checkpoint.record import pack_record, unpack_record
from internvl_core.checkpoint.uri import normalize_uri
from internvl_core.contract import CheckpointRef
from internvl_core.errors import CheckpointCorrupt, CheckpointNotFound

DATA_FOLDER = "data"
COMMITS_FOLDER = "commits"

_COMMIT_NAME = re.compile(r"(?P<step>\d{12})\.(?P<fence>\d{6})\.(?P<kind>[a-z]+)\.json")
_SAVE_NAME = re.compile(r"(?P<step>\d{12})\.(?P<fence>\d{6})\.[0-9a-f]+")
_DATA_URI = re.compile(rf"(?P<stage_uri>.+)/{DATA_FOLDER}/(?P<save>{_SAVE_NAME.pattern})")


@dataclass(frozen=True)
class CommitName:
    """What the name of a commit record says.

    The kind is part of it because a stage's last step is saved both ways: to resume from, and as its final weights.
    """

    step: int
    fence: int
    kind: CheckpointKind

    @property
    def path(self) -> str:
        return f"{COMMITS_FOLDER}/{self.step:012d}.{self.fence:06d}.{self.kind}.json"

    @property
    def age(self) -> tuple[int, bool]:
        """Key that is greater for what a training reaches later; at one step the final weights come last."""
        return self.step, self.kind is CheckpointKind.FINAL

    @property
    def order(self) -> tuple[int, int, bool]:
        """Key that is greater for the newer."""
        return self.step, self.fence, self.kind is CheckpointKind.FINAL

    def to_json(self) -> dict[str, Any]:
        return {"step": self.step, "fence": self.fence, "kind": self.kind}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        return cls(int(content["step"]), int(content["fence"]), CheckpointKind(content["kind"]))

    def __str__(self) -> str:
        return f"step {self.step} ({self.kind}, fence {self.fence})"


@dataclass(frozen=True)
class Origin:
    """What was there when a lease was taken; its commits repeat it, lest a lease that rots frees what it fenced."""

    base: CommitName | None
    """The newest commit of the history that the holder goes on with; None: it starts from nothing."""
    finished: tuple[int, int] | None
    """Step and fence of the newest handover of that history; None: it was not finished."""

    def to_json(self) -> dict[str, Any]:
        return {"base": self.base.to_json() if self.base else None, "finished": self.finished}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Read what `to_json` gave; KeyError, TypeError, ValueError where it is none."""
        base, finished = content["base"], content["finished"]
        return cls(
            CommitName.from_json(base) if base else None, (int(finished[0]), int(finished[1])) if finished else None
        )


@dataclass(frozen=True)
class Commit:
    """A commit record that parses; its MANIFEST and data are not looked at."""

    step: int
    fence: int
    kind: CheckpointKind
    checkpoint: CheckpointRef
    origin: Origin | None = None
    """Of its lease; None if it was committed without one."""

    @property
    def name(self) -> CommitName:
        return CommitName(self.step, self.fence, self.kind)


def list_commit_names(backend: Backend) -> list[CommitName]:
    """List the names of all commit records of a stage, newest first."""
    matches = [_COMMIT_NAME.fullmatch(name) for name in backend.list_names(COMMITS_FOLDER)]
    names = [
        CommitName(int(match["step"]), int(match["fence"]), CheckpointKind(match["kind"]))
        for match in matches
        if match and match["kind"] in set(CheckpointKind)
    ]
    return sorted(names, key=lambda name: name.order, reverse=True)


def pack_commit(name: CommitName, save: str, digest: str, origin: Origin | None) -> bytes:
    """Serialise a commit record."""
    content = {"kind": name.kind, "data": f"{DATA_FOLDER}/{save}", "manifest": digest}
    return pack_record(content | {"origin": origin.to_json()} if origin else content)


def read_commit(backend: Backend, name: CommitName) -> Commit:
    """Read one commit record.

    Raises:
        CheckpointNotFound: there is none of this name.
        CheckpointCorrupt: it is damaged, or not the record that its name says.
    """
    where = f"{backend.uri}/{name.path}"
    record = find_object(backend, name.path)
    if record is None:
        raise CheckpointNotFound(f"{where} does not exist.")
    content = unpack_record(record, where=where)
    try:
        data, digest = str(content["data"]), str(content["manifest"])
        is_own = content["kind"] == name.kind and data.startswith(f"{DATA_FOLDER}/{name.step:012d}.{name.fence:06d}.")
        origin = Origin.from_json(content["origin"]) if "origin" in content else None
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointCorrupt(f"{where}: not a commit record: {type(error).__name__}: {error}.") from error
    if not is_own:
        raise CheckpointCorrupt(f"{where}: commits {data} as {content['kind']}, which is not what its name says.")
    return Commit(name.step, name.fence, name.kind, CheckpointRef(f"{backend.uri}/{data}", digest), origin)


def find_commit(backend: Backend, save: str) -> Commit | None:
    """Find the commit record that names a folder of `data/`.

    Raises:
        CheckpointCorrupt: none does, but one that might is damaged.
    """
    step, fence, _ = save.split(".")
    damage = None
    for kind in CheckpointKind:
        try:
            commit = read_commit(backend, CommitName(int(step), int(fence), kind))
        except CheckpointNotFound:
            continue
        except CheckpointCorrupt as error:
            damage = error
            continue
        if commit.checkpoint.uri == f"{backend.uri}/{DATA_FOLDER}/{save}":
            return commit
    if damage:
        raise damage
    return None


def read_manifest_file(backend: Backend, checkpoint: CheckpointRef) -> Manifest:
    """Read the MANIFEST of a checkpoint whose commit record was read.

    Raises:
        CheckpointCorrupt: it is missing or not the one of the record.
    """
    where = f"{checkpoint.uri}/{MANIFEST_FILE}"
    record = find_object(backend, where.removeprefix(f"{backend.uri}/"))
    if record is None:
        raise CheckpointCorrupt(f"{where} is missing, though the checkpoint was committed.")
    found = hashlib.sha256(record).hexdigest()
    if found != checkpoint.digest:
        raise CheckpointCorrupt(f"{where}: sha256 is {found}, the commit record says {checkpoint.digest}.")
    return Manifest.from_bytes(record, where=where)


def read_manifest_in(backend: Backend, checkpoint: CheckpointRef) -> Manifest:
    """Read the manifest of a committed checkpoint of the stage that a backend is open at; raises as `read_manifest`."""
    committed = get_commit(backend, get_save(backend, checkpoint)).checkpoint
    if committed.digest != checkpoint.digest:
        raise CheckpointCorrupt(
            f"{checkpoint.uri}: committed with digest {committed.digest}, but {checkpoint.digest} was asked for."
        )
    return read_manifest_file(backend, committed)


def read_manifest(checkpoint: CheckpointRef) -> Manifest:
    """Read the manifest of a committed checkpoint, be it live or not: who knows its digest means it.

    Raises:
        CheckpointNotFound: no commit record names it; lists what is committed.
        CheckpointCorrupt: its record or its MANIFEST is damaged, or they are not of the digest that is asked for.
    """
    return read_manifest_in(open_checkpoint(checkpoint.uri)[0], checkpoint)


def get_commit(backend: Backend, save: str) -> Commit:
    """Get the commit record that names a folder of `data/`.

    Raises:
        CheckpointNotFound: there is none; lists what is committed.
    """
    commit = find_commit(backend, save)
    if commit is None:
        raise not_committed(f"{backend.uri}/{DATA_FOLDER}/{save}", backend)
    return commit


def get_save(backend: Backend, checkpoint: CheckpointRef) -> str:
    """Get the name of a checkpoint's folder in `data/`.

    Raises:
        CheckpointNotFound: it is not a checkpoint of the stage that the backend is opened at.
    """
    folder, _, save = checkpoint.uri.rpartition("/")
    if folder != f"{backend.uri}/{DATA_FOLDER}" or not _SAVE_NAME.fullmatch(save):
        raise CheckpointNotFound(f"{checkpoint.uri} is not a checkpoint of {backend.uri}.")
    return save


def get_save_fence(save: str) -> int | None:
    """Get the fence in the name of a folder of `data/`; None if it is not a name that saves have."""
    match = _SAVE_NAME.fullmatch(save)
    return int(match["fence"]) if match else None


def is_save_uri(uri: str) -> bool:
    """Tell whether a URI is of the form that saves have, committed or not."""
    return _DATA_URI.fullmatch(normalize_uri(uri)) is not None


def open_checkpoint(uri: str) -> tuple[Backend, str]:
    """Open the stage that a checkpoint's URI belongs to.

    Returns:
        The backend at the stage's directory, and the name of the checkpoint's folder in `data/`.

    Raises:
        CheckpointNotFound: the URI is not of the form that commits name.
    """
    match = _DATA_URI.fullmatch(normalize_uri(uri))
    if match is None:
        raise CheckpointNotFound(f"{uri} has no commit record, so it was never committed.")
    return open_backend(match["stage_uri"]), match["save"]


def not_committed(uri: str, backend: Backend) -> CheckpointNotFound:
    """Say that nothing is committed at a URI, and what is."""
    steps = tell_steps(backend) or "nothing"
    return CheckpointNotFound(f"{uri} has no commit record, so it was never committed. Committed: {steps}.")


def tell_steps(backend: Backend) -> str:
    """Tell the steps that are committed: "2000, 3000"."""
    return ", ".join(str(step) for step in sorted({name.step for name in list_commit_names(backend)}))
