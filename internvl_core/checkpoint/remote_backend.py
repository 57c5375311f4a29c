"""A store behind an fsspec filesystem, where there is no class of our own for it.

Exclusive creation is `pipe_file(mode="create")`: a conditional PUT on Google's and Azure's stores, one step under the
GIL in memory. Elsewhere it may be a check and then a write; the start-up probe refuses a store that is not even that.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import fsspec
from fsspec.asyn import AsyncFileSystem

from internvl_core.checkpoint.faults import translated
from internvl_core.checkpoint.manifest import FileEntry, describe_file
from internvl_core.checkpoint.uri import S3_PREFIXES, SFTP_PREFIX

# botocore's defaults wait 60 s for a connection and try 5 times: longer than a person waits for "wrong host".
S3_CONFIG: dict[str, Any] = {
    "connect_timeout": 5,
    "read_timeout": 60,
    # Throttling, 5xx and lost connections: twice more, a second or two apart.
    "retries": {"mode": "standard", "total_max_attempts": 3},
    "tcp_keepalive": True,
}
_TRANSFER_WORKERS = 4
_READ_BYTES = 8 << 20


def open_filesystem(uri: str) -> Any:
    """Open the fsspec filesystem of a normal URI, with waiting times that a person can bear."""
    # A cached listing would hide what another process wrote.
    options: dict[str, Any] = {"use_listings_cache": False}
    if uri.startswith(S3_PREFIXES):
        options["config_kwargs"] = S3_CONFIG
    elif uri.startswith(SFTP_PREFIX):
        # sshfs caches nothing and knows no such option; its own default is to believe any host.
        options = {"connect_timeout": 10, "known_hosts": ()}
    with translated(f"Opening {uri}"):
        filesystem, _ = fsspec.core.url_to_fs(uri, **options)
    return filesystem


class RemoteBackend:
    """`memory://`, `gs://`, `az://` and whatever else fsspec knows."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._fs = open_filesystem(uri)
        # Only the asynchronous filesystems promise to bear several threads.
        self._num_workers = _TRANSFER_WORKERS if isinstance(self._fs, AsyncFileSystem) else 1

    def create(self, name: str, body: bytes) -> None:
        with translated(f"Creating {self.uri}/{name}", answers=(FileExistsError,)):
            self._fs.pipe_file(self._path(name), body, mode="create")

    def put(self, name: str, body: bytes) -> None:
        with translated(f"Writing {self.uri}/{name}"):
            self._fs.pipe_file(self._path(name), body)

    def read(self, name: str) -> bytes:
        with translated(f"Reading {self.uri}/{name}", answers=(FileNotFoundError,)):
            return bytes(self._fs.cat_file(self._path(name)))

    def list_names(self, folder: str) -> list[str]:
        with translated(f"Listing {self.uri}/{folder}"):
            try:
                found = self._fs.ls(self._path(folder), detail=False)
            except FileNotFoundError:
                return []
        return [str(path).rstrip("/").rpartition("/")[2] for path in found]

    def get_sizes_bytes(self, folder: str) -> dict[str, int]:
        root = self._path(folder)
        with translated(f"Listing {self.uri}/{folder}"):
            found = self._fs.find(root, detail=True)
        return {str(path).removeprefix(root).lstrip("/"): int(info["size"]) for path, info in found.items()}

    def upload(self, directory: Path, paths: Sequence[str], folder: str) -> list[FileEntry]:
        def upload_file(path: str) -> FileEntry:
            entry = describe_file(directory, path)
            self._fs.put_file(str((directory / path).resolve()), self._path(f"{folder}/{path}"))
            return entry

        with translated(f"Uploading {paths[0] if len(paths) == 1 else directory} to {self.uri}/{folder}"):
            return self._run_for_each(upload_file, paths)

    def download(self, folder: str, paths: Sequence[str], directory: Path) -> list[FileEntry]:
        def download_file(path: str) -> FileEntry:
            self._fs.get_file(self._path_in(folder, path), str(directory / path))
            return describe_file(directory, path)

        with translated(f"Downloading {self.uri}/{folder} to {directory}", answers=(FileNotFoundError,)):
            for path in paths:
                (directory / path).parent.mkdir(parents=True, exist_ok=True)
            return self._run_for_each(download_file, paths)

    def describe(self, folder: str, paths: Sequence[str]) -> list[FileEntry]:
        def describe_object(path: str) -> FileEntry:
            digest, size_bytes = hashlib.sha256(), 0
            with self._fs.open(
                self._path_in(folder, path), "rb", block_size=_READ_BYTES, cache_type="readahead"
            ) as file:
                while block := file.read(_READ_BYTES):
                    digest.update(block)
                    size_bytes += len(block)
            return FileEntry(path, size_bytes, digest.hexdigest())

        with translated(f"Reading {self.uri}/{folder}", answers=(FileNotFoundError,)):
            return self._run_for_each(describe_object, paths)

    def remove(self, name: str) -> None:
        with translated(f"Removing {self.uri}/{name}"), suppress(FileNotFoundError):
            self._fs.rm_file(self._path(name))

    def remove_all(self, folder: str) -> None:
        with translated(f"Removing {self.uri}/{folder}"), suppress(FileNotFoundError):
            self._fs.rm(self._path(folder), recursive=True)

    def _path(self, name: str) -> str:
        return str(self._fs._strip_protocol(f"{self.uri}/{name}"))

    def _path_in(self, folder: str, path: str) -> str:
        return self._path(f"{folder}/{path}" if folder else path)

    def _run_for_each(self, transfer: Callable[[str], FileEntry], paths: Iterable[str]) -> list[FileEntry]:
        """Transfer in parallel; the first error stops the files not yet begun."""
        with ThreadPoolExecutor(self._num_workers) as pool:
            return list(pool.map(transfer, paths))
