"""A model's folder on this machine, wherever it lies: here, committed in a store, or plainly in a bucket.

A plain remote folder has no manifest to verify it by, so its copy is kept under what the store's listing says of
every file: name, size and the store's own tag or time. A file that is written anew makes another copy.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from internvl_core.checkpoint.backend import open_backend
from internvl_core.checkpoint.commits import list_commit_names, open_checkpoint, resolve_checkpoint
from internvl_core.checkpoint.faults import translated
from internvl_core.checkpoint.fetch import fetch
from internvl_core.checkpoint.manifest import HASH_WORKERS, hash_file
from internvl_core.checkpoint.remote_backend import RemoteBackend, open_filesystem
from internvl_core.checkpoint.uri import FILE_PREFIX, normalize_uri
from internvl_core.contract import CheckpointRef, digest_json
from internvl_core.errors import ArgumentError, CheckpointNotFound, StoreUnavailable

# What S3 and its kin, Google's, Azure's and the other filesystems of fsspec call the version of a file.
_VERSION_KEYS = ("ETag", "etag", "md5Hash", "content_md5", "LastModified", "last_modified", "mtime", "created")
# Weights of other frameworks, and the pickles that a repository keeps beside its safetensors: never read here.
_FOREIGN = (".h5", ".msgpack", ".onnx", ".gguf", ".ot")
_PICKLED = "pytorch_model"
_SAFE = ".safetensors"


def fetch_folder(uri: str, cache_dir: Path) -> Path:
    """Find a model's folder on this machine, or bring it here.

    Args:
        uri: a local path or any fsspec URI: of a model's folder, of a committed checkpoint, or of a stage's directory,
            which stands for its newest final checkpoint.
        cache_dir: where downloads are kept.

    Returns:
        The directory, for reading only. A committed checkpoint is verified against its manifest; a local folder is
        handed out as it is.

    Raises:
        ArgumentError: there is no such folder, or no file in it.
        CheckpointNotFound: the URI is that of a save which was never committed.
        CheckpointCorrupt, StoreUnavailable: the store's bytes are wrong, or do not come.
    """
    uri = normalize_uri(str(Path(uri).absolute()) if Path(uri).is_dir() else uri)
    if uri.startswith(FILE_PREFIX) and not Path(uri.removeprefix(FILE_PREFIX)).is_dir():
        raise ArgumentError(f"{uri.removeprefix(FILE_PREFIX)}: no such folder. Give the folder of a model.")
    committed = _find_committed(uri)
    if committed is not None:
        return fetch(committed, cache_dir)
    if uri.startswith(FILE_PREFIX):
        return Path(uri.removeprefix(FILE_PREFIX))
    listing = _list_files(uri)
    if not listing:
        raise ArgumentError(f"{uri}: there is no such folder, or no file in it. Give the folder of a model.")
    key = hashlib.sha256(json.dumps([uri, listing], sort_keys=True).encode()).hexdigest()[:32]
    target = cache_dir / "folders" / key
    if not target.is_dir():
        _download(uri, {name: int(entry["size"]) for name, entry in listing.items()}, target)
    return target


def digest_folder(folder: Path) -> str:
    """Digest a local folder by the names and the content of all files below it."""
    # Links are followed, unlike in a checkpoint: a folder of the hub's cache has nothing else.
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    with ThreadPoolExecutor(HASH_WORKERS) as pool:
        digests = pool.map(hash_file, files)
    return digest_json(
        [[file.relative_to(folder).as_posix(), digest] for file, digest in zip(files, digests, strict=True)]
    )


def _find_committed(uri: str) -> CheckpointRef | None:
    """Find the checkpoint that a URI means; None for a plain folder."""
    try:
        open_checkpoint(uri)
    except CheckpointNotFound:
        if not list_commit_names(open_backend(uri)):
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
        name: {"size": info["size"], **{key: str(info[key]) for key in _VERSION_KEYS if key in info}}
        for name, info in names.items()
        if name and not name.endswith(_FOREIGN) and not (has_safetensors and name.startswith(_PICKLED))
    }


def _download(uri: str, sizes_bytes: Mapping[str, int], target: Path) -> None:
    with translated(f"Preparing {target.parent}"):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".fetching-", dir=target.parent))
    parent, _, folder = uri.rpartition("/")
    try:
        try:
            # Opened one level up, where the backend can name the folder that it copies.
            RemoteBackend(parent).download(folder, sorted(sizes_bytes), temporary)
        except FileNotFoundError as error:
            raise StoreUnavailable(f"{uri}: a file vanished while it was downloaded: {error}.") from error
        for name, size_bytes in sizes_bytes.items():
            found = (temporary / name).stat().st_size
            if found != size_bytes:
                raise StoreUnavailable(f"{uri}/{name}: {found} bytes arrived, the store says {size_bytes}.")
        _move_into_place(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


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
