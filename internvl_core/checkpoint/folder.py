"""A model's folder on this machine, wherever it lies: here, committed in a store, or plainly in a bucket.

A plain remote folder has no manifest to verify it by, so its digest is of what the store's listing says of every
file: name, size and the store's own tag or time. A file that is written anew makes another digest and another copy.
"""

import shutil
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from internvl_core.checkpoint.backend import open_backend
from internvl_core.checkpoint.commits import (
    COMMITS_FOLDER,
    DATA_FOLDER,
    is_save_uri,
    list_commit_names,
    read_manifest,
)
from internvl_core.checkpoint.faults import translated
from internvl_core.checkpoint.fetch import fetch
from internvl_core.checkpoint.lineage import resolve_checkpoint
from internvl_core.checkpoint.manifest import HASH_WORKERS, hash_file
from internvl_core.checkpoint.remote_backend import open_filesystem
from internvl_core.checkpoint.uri import FILE_PREFIX, normalize_uri
from internvl_core.contract import CheckpointRef, digest_json
from internvl_core.errors import ArgumentError, StoreUnavailable

# What S3 and its kin, Google's, Azure's and the other filesystems of fsspec call the version of a file.
_VERSION_KEYS = ("ETag", "etag", "md5Hash", "content_md5", "LastModified", "last_modified", "mtime", "created")
# Weights of other frameworks, and the pickles that a repository keeps beside its safetensors: never read here.
_FOREIGN = (".h5", ".msgpack", ".onnx", ".gguf", ".ot")
_PICKLED = "pytorch_model"
_SAFE = ".safetensors"
_WEIGHTS = (_SAFE, ".pth", ".pt", ".bin")


@dataclass(frozen=True)
class RemoteFolder:
    """A plain folder in a store, which nobody committed."""

    uri: str
    files: Mapping[str, Mapping[str, Any]]
    """What the store says of the files directly in it that a model may need, by name: `size` in bytes, version."""

    @property
    def digest(self) -> str:
        """Changes with the name, the size and the version of any file; the content is not read."""
        return digest_json([self.uri, self.files])

    def read(self, name: str) -> bytes:
        """Read one of the files whole.

        Raises:
            StoreUnavailable: it is no longer what was listed.
        """
        try:
            content = open_backend(self.uri).read(name)
        except FileNotFoundError as error:
            raise StoreUnavailable(f"{self.uri}/{name}: vanished while the folder was read.") from error
        _check_size(f"{self.uri}/{name}", len(content), self.files[name]["size"])
        return content


def resolve_folder(uri: str) -> CheckpointRef | RemoteFolder | Path:
    """Find out what a model's URI means; nothing but listings and records is read.

    Args:
        uri: of a model's folder, local or remote, of a committed checkpoint, or of a stage's directory, which stands
            for its newest final checkpoint.

    Raises:
        ArgumentError: there is no such folder, or no file in it.
        CheckpointNotFound: the URI is that of a save which was never committed.
        CheckpointCorrupt, StoreUnavailable: the store's records are wrong, or do not come.
    """
    uri = normalize_uri(uri)
    is_local = uri.startswith(FILE_PREFIX)
    folder = Path(uri.removeprefix(FILE_PREFIX))
    if is_local and not folder.is_dir() and not is_save_uri(uri):
        raise ArgumentError(f"{folder}: no such folder. Give the folder of a model.")
    committed = find_committed(uri)
    if committed is not None:
        return committed
    if is_local:
        return folder
    listing = _list_files(uri)
    if not listing:
        raise ArgumentError(f"{uri}: there is no such folder, or no file in it. Give the folder of a model.")
    return RemoteFolder(uri, listing)


def fetch_folder(uri: str, cache_dir: Path) -> Path:
    """Find a model's folder on this machine, or bring it here.

    Args:
        uri: a local path, or as for `resolve_folder`.
        cache_dir: where downloads are kept.

    Returns:
        The directory, for reading only. A committed checkpoint is verified against its manifest; a local folder is
        handed out as it is.

    Raises:
        ArgumentError, CheckpointNotFound, CheckpointCorrupt, StoreUnavailable: as for `resolve_folder`; the store's
            bytes are wrong, or do not come.
    """
    found = resolve_folder(str(Path(uri).absolute()) if Path(uri).is_dir() else uri)
    if isinstance(found, Path):
        return found
    if isinstance(found, CheckpointRef):
        return fetch(found, cache_dir)
    target = cache_dir / "folders" / found.digest[:32]
    if not target.is_dir():
        _download(found, target)
    return target


def digest_model(uri: str) -> str:
    """Digest what `fetch_folder` would bring, without fetching it.

    A committed checkpoint by its manifest, a local folder by its content, another remote one by its listing.

    Raises:
        ArgumentError, CheckpointNotFound, CheckpointCorrupt, StoreUnavailable: as for `resolve_folder`.
    """
    found = resolve_folder(uri)
    return digest_folder(found) if isinstance(found, Path) else found.digest


def is_weights_file(path: str) -> bool:
    """Tell the path or URI of a file of weights from that of a folder."""
    return path.endswith(_WEIGHTS)


def digest_file(uri: str) -> str:
    """Digest a file: a local one by its content, another as its folder is digested.

    Raises:
        ArgumentError: there is no such file.
        CheckpointNotFound, CheckpointCorrupt, StoreUnavailable: as for `resolve_folder`.
    """
    parent, _, name = normalize_uri(uri).rpartition("/")
    found = resolve_folder(parent)
    if isinstance(found, CheckpointRef):
        digest = next((entry.sha256 for entry in read_manifest(found).files if entry.path == name), None)
    elif isinstance(found, Path):
        digest = hash_file(found / name) if (found / name).is_file() else None
    else:
        digest = digest_json([uri, found.files[name]]) if name in found.files else None
    if digest is None:
        raise ArgumentError(f"{uri}: there is no such file.")
    return digest


def check_no_stage(folder: Path) -> None:
    """Refuse a stage's directory that was given as a plain path: its URI stands for its newest checkpoint.

    Raises:
        ArgumentError: tells the URI.
    """
    if (folder / COMMITS_FOLDER).is_dir():
        raise ArgumentError(f"{folder} is a stage's directory in a store. Give it as {folder.absolute().as_uri()}.")


def digest_folder(folder: Path) -> str:
    """Digest a local folder by the names and the content of all files below it."""
    # Links are followed, unlike in a checkpoint: a folder of the hub's cache has nothing else.
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    with ThreadPoolExecutor(HASH_WORKERS) as pool:
        digests = pool.map(hash_file, files)
    return digest_json(
        [[file.relative_to(folder).as_posix(), digest] for file, digest in zip(files, digests, strict=True)]
    )


def find_committed(uri: str) -> CheckpointRef | None:
    """Find the checkpoint that a URI means; None for a plain folder.

    Raises:
        CheckpointNotFound: it is a save which was never committed, or a stage's directory with none but such.
        CheckpointCorrupt, StoreUnavailable: the store's records are wrong, or do not come.
    """
    if not is_save_uri(uri):
        backend = open_backend(uri)
        has_saves = any(is_save_uri(f"{backend.uri}/{DATA_FOLDER}/{name}") for name in backend.list_names(DATA_FOLDER))
        if not has_saves and not list_commit_names(backend):
            return None
    return resolve_checkpoint(uri)


def _list_files(uri: str) -> dict[str, dict[str, Any]]:
    """List the files directly in a remote folder that a model may need, with what tells their versions apart."""
    filesystem = open_filesystem(uri)
    root = str(filesystem._strip_protocol(uri))
    with translated(f"Listing {uri}", answers=(FileNotFoundError,)):
        try:
            found: Mapping[str, Mapping[str, Any]] = filesystem.find(root, maxdepth=1, detail=True)
        except FileNotFoundError:
            return {}
    names = {str(path).removeprefix(root).lstrip("/"): info for path, info in found.items()}
    has_safetensors = any(name.endswith(_SAFE) for name in names)
    return {
        name: {"size": int(info["size"]), **{key: str(info[key]) for key in _VERSION_KEYS if key in info}}
        for name, info in names.items()
        if name and not name.endswith(_FOREIGN) and not (has_safetensors and name.startswith(_PICKLED))
    }


def _download(source: RemoteFolder, target: Path) -> None:
    with translated(f"Preparing {target.parent}"):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".fetching-", dir=target.parent))
    try:
        try:
            open_backend(source.uri).download("", sorted(source.files), temporary)
        except FileNotFoundError as error:
            raise StoreUnavailable(f"{source.uri}: a file vanished while it was downloaded: {error}.") from error
        for name, entry in source.files.items():
            _check_size(f"{source.uri}/{name}", (temporary / name).stat().st_size, entry["size"])
        _move_into_place(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _check_size(where: str, found_bytes: int, listed_bytes: int) -> None:
    if found_bytes != listed_bytes:
        raise StoreUnavailable(f"{where}: {found_bytes} bytes arrived, the store says {listed_bytes}.")


def _move_into_place(temporary: Path, target: Path) -> None:
    with translated(f"Moving the download to {target}"):
        # mkdtemp's 0700 would keep a team from sharing its cache.
        temporary.chmod(0o755)
        try:
            temporary.rename(target)
        except OSError:
            # Another process of this machine was faster: its copy has the same listing.
            if not target.is_dir():
                raise
