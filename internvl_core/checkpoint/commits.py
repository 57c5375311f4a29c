"""The commit records of a stage: which checkpoints exist.

    <store>/<stage>-<fingerprint16>/
        data/<step>.<fence>.<nonce>/...         the files of one save, MANIFEST last
        commits/<step>.<fence>.<kind>.json      created exclusively: the checkpoint exists from here on
        handover/<step>.<fence>.json            created exclusively: the stage is finished

A name alone proves nothing: a record counts when it parses, and a checkpoint when its MANIFEST
has the digest of its record. Records name their data relative to the stage's directory, so that
a store can be moved.
"""

import hashlib
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass

from internvl_core.checkpoint.backend import Backend, open_backend
from internvl_core.checkpoint.manifest import MANIFEST_FILE, CheckpointKind, Manifest
from internvl_core.checkpoint.record import pack_record, unpack_record
from internvl_core.checkpoint.uri import normalize_uri
from internvl_core.contract import CheckpointRef
from internvl_core.errors import CheckpointCorrupt, CheckpointNotFound

logger = logging.getLogger(__name__)

DATA_FOLDER = "data"
COMMITS_FOLDER = "commits"

_COMMIT_NAME = re.compile(r"(?P<step>\d{12})\.(?P<fence>\d{6})\.(?P<kind>[a-z]+)\.json")
_DATA_URI = re.compile(rf"(?P<stage_uri>.+)/{DATA_FOLDER}/(?P<save>(?P<step>\d{{12}})\.(?P<fence>\d{{6}})\.[0-9a-f]+)")


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
    def order(self) -> tuple[int, int, bool]:
        """Key that is greater for the newer; of one save the final weights come after the training state."""
        return self.step, self.fence, self.kind is CheckpointKind.FINAL


@dataclass(frozen=True)
class Commit:
    """A commit record that parses; its MANIFEST and data are not looked at."""

    step: int
    fence: int
    kind: CheckpointKind
    checkpoint: CheckpointRef


def list_commit_names(backend: Backend) -> list[CommitName]:
    """List the names of all commit records of a stage, newest first."""
    matches = [_COMMIT_NAME.fullmatch(name) for name in backend.list_names(COMMITS_FOLDER)]
    names = [
        CommitName(int(match["step"]), int(match["fence"]), CheckpointKind(match["kind"]))
        for match in matches
        if match and match["kind"] in set(CheckpointKind)
    ]
    return sorted(names, key=lambda name: name.order, reverse=True)


def pack_commit(name: CommitName, save: str, digest: str) -> bytes:
    """Serialise a commit record."""
    return pack_record({"kind": name.kind, "data": f"{DATA_FOLDER}/{save}", "manifest": digest})


def read_commit(backend: Backend, name: CommitName) -> Commit:
    """Read one commit record.

    Raises:
        CheckpointNotFound: there is none of this name.
        CheckpointCorrupt: it is damaged, or not the record that its name says.
    """
    where = f"{backend.uri}/{name.path}"
    try:
        content = unpack_record(backend.read(name.path), where=where)
    except FileNotFoundError as error:
        raise CheckpointNotFound(f"{where} does not exist.") from error
    try:
        data, digest = str(content["data"]), str(content["manifest"])
        is_own = content["kind"] == name.kind and data.startswith(f"{DATA_FOLDER}/{name.step:012d}.{name.fence:06d}.")
    except KeyError as error:
        raise CheckpointCorrupt(f"{where}: not a commit record: {error} is missing.") from error
    if not is_own:
        raise CheckpointCorrupt(f"{where}: commits {data} as {content['kind']}, which is not what its name says.")
    return Commit(name.step, name.fence, name.kind, CheckpointRef(f"{backend.uri}/{data}", digest))


def iter_verified(backend: Backend, kind: CheckpointKind | None = None) -> Iterator[Commit]:
    """Yield the commits whose record and MANIFEST verify, newest first; log the others with the reason.

    The data is not read: `fetch` verifies it.

    Args:
        backend: opened at the stage's directory.
        kind: only these; None means all.
    """
    for name in list_commit_names(backend):
        if kind not in {None, name.kind}:
            continue
        try:
            commit = read_commit(backend, name)
            _read_manifest_file(backend, commit.checkpoint)
        except (CheckpointCorrupt, CheckpointNotFound) as error:
            logger.warning("Passed over step %d (%s): %s", name.step, name.kind, error)
        else:
            yield commit


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


def read_manifest(checkpoint: CheckpointRef) -> Manifest:
    """Read the manifest of a committed checkpoint.

    Raises:
        CheckpointNotFound: no commit record names it; lists what is committed.
        CheckpointCorrupt: its record or its MANIFEST is damaged, or they are not of the digest that is asked for.
    """
    backend, save = open_checkpoint(checkpoint.uri)
    committed = _find_commit(backend, save).checkpoint
    if committed.digest != checkpoint.digest:
        raise CheckpointCorrupt(
            f"{checkpoint.uri}: committed with digest {committed.digest}, but {checkpoint.digest} was asked for."
        )
    return _read_manifest_file(backend, committed)


def resolve_checkpoint(uri: str) -> CheckpointRef:
    """Find the committed checkpoint that a person means by a URI.

    Args:
        uri: of a checkpoint's folder, or of a stage's directory: then its newest final checkpoint, or the newest
            of any kind if none is final.

    Raises:
        CheckpointNotFound: nothing is committed there; lists what is.
        CheckpointCorrupt: there are commit records, but none that verifies.
    """
    uri = normalize_uri(uri)
    if _DATA_URI.fullmatch(uri):
        backend, save = open_checkpoint(uri)
        checkpoint = _find_commit(backend, save).checkpoint
        _read_manifest_file(backend, checkpoint)
        return checkpoint
    backend = open_backend(uri)
    for kind in (CheckpointKind.FINAL, None):
        for commit in iter_verified(backend, kind):
            return commit.checkpoint
    if steps := _tell_steps(backend):
        raise CheckpointCorrupt(f"{uri}: none of its checkpoints verifies. Committed: {steps}.")
    raise _not_committed(uri, backend)


def _find_commit(backend: Backend, save: str) -> Commit:
    """Find the commit record that names a folder of `data/`."""
    step, fence, _ = save.split(".")
    uri = f"{backend.uri}/{DATA_FOLDER}/{save}"
    for kind in CheckpointKind:
        try:
            commit = read_commit(backend, CommitName(int(step), int(fence), kind))
        except CheckpointNotFound:
            continue
        if commit.checkpoint.uri == uri:
            return commit
    raise _not_committed(uri, backend)


def _read_manifest_file(backend: Backend, checkpoint: CheckpointRef) -> Manifest:
    where = f"{checkpoint.uri}/{MANIFEST_FILE}"
    try:
        record = backend.read(where.removeprefix(f"{backend.uri}/"))
    except FileNotFoundError as error:
        raise CheckpointCorrupt(f"{where} is missing, though the checkpoint was committed.") from error
    found = hashlib.sha256(record).hexdigest()
    if found != checkpoint.digest:
        raise CheckpointCorrupt(f"{where}: sha256 is {found}, the commit record says {checkpoint.digest}.")
    return Manifest.from_bytes(record, where=where)


def _not_committed(uri: str, backend: Backend) -> CheckpointNotFound:
    steps = _tell_steps(backend) or "nothing"
    return CheckpointNotFound(f"{uri} has no commit record, so it was never committed. Committed: {steps}.")


def _tell_steps(backend: Backend) -> str:
    return ", ".join(str(step) for step in sorted({name.step for name in list_commit_names(backend)}))
