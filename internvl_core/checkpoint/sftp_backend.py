"""A store behind SSH, on a server with OpenSSH's extensions (OpenSSH, ProFTPD, asyncssh).

Exclusive creation is a hard link, as on local files: what it makes visible is written and synced already. Of the other
ways, sshfs's `open("xb")` may leave a torn record under the name, and its `pipe_file` overwrites.
"""

import asyncio
import hashlib
import posixpath
import secrets
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import cast
from urllib.parse import urlsplit

import asyncssh
from asyncssh import SFTPClient, SFTPClientFile

from internvl_core.checkpoint.faults import translated
from internvl_core.checkpoint.manifest import FileEntry
from internvl_core.checkpoint.sftp_session import MISSING, open_session

_SMALL_LIMIT_S = 60.0
# Of a block on its way, or of a folder's listing or removal.
_LONG_LIMIT_S = 300.0
# Two blocks of each file in memory: one on the wire, one being hashed.
_BLOCK_BYTES = 8 << 20


class SftpBackend:
    """`sftp://host[:port]/path`."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        parts = urlsplit(uri)
        self._root = parts.path or "/"
        self._session = open_session(parts.hostname or "", parts.port)

    def create(self, name: str, body: bytes) -> None:
        with translated(f"Creating {self.uri}/{name}", answers=(FileExistsError,)):
            # After a lost connection only `create_once` can tell whether the name was made.
            ask = partial(_create, path=self._path(name), body=body)
            self._session.run(ask, limit_s=_SMALL_LIMIT_S, is_repeatable=False)

    def put(self, name: str, body: bytes) -> None:
        with translated(f"Writing {self.uri}/{name}"):
            self._session.run(partial(_put, path=self._path(name), body=body), limit_s=_SMALL_LIMIT_S)

    def read(self, name: str) -> bytes:
        with translated(f"Reading {self.uri}/{name}", answers=(FileNotFoundError,)):
            return self._session.run(partial(_read, path=self._path(name)), limit_s=_SMALL_LIMIT_S)

    def list_names(self, folder: str) -> list[str]:
        with translated(f"Listing {self.uri}/{folder}"):
            entries = self._session.run(partial(_list_entries, path=self._path(folder)), limit_s=_SMALL_LIMIT_S)
        return [str(entry.filename) for entry in entries]

    def get_sizes_bytes(self, folder: str) -> dict[str, int]:
        with translated(f"Listing {self.uri}/{folder}"):
            return self._session.run(partial(_list_sizes_bytes, root=self._path(folder)), limit_s=_LONG_LIMIT_S)

    def upload(self, directory: Path, paths: Sequence[str], folder: str) -> list[FileEntry]:
        with translated(f"Uploading {paths[0] if len(paths) == 1 else directory} to {self.uri}/{folder}"):
            parents = sorted({posixpath.dirname(self._path(f"{folder}/{path}")) for path in paths})
            self._session.run(partial(_make_folders, paths=parents), limit_s=_LONG_LIMIT_S)
            return self._session.run_all(
                [
                    partial(_send_file, source=directory / path, target=self._path(f"{folder}/{path}"), name=path)
                    for path in paths
                ]
            )

    def download(self, folder: str, paths: Sequence[str], directory: Path) -> list[FileEntry]:
        with translated(f"Downloading {self.uri}/{folder} to {directory}", answers=(FileNotFoundError,)):
            for path in paths:
                (directory / path).parent.mkdir(parents=True, exist_ok=True)
            return self._session.run_all(
                [
                    partial(_read_file, source=self._path_in(folder, path), name=path, target=directory / path)
                    for path in paths
                ]
            )

    def describe(self, folder: str, paths: Sequence[str]) -> list[FileEntry]:
        with translated(f"Reading {self.uri}/{folder}", answers=(FileNotFoundError,)):
            return self._session.run_all(
                [partial(_read_file, source=self._path_in(folder, path), name=path, target=None) for path in paths]
            )

    def remove(self, name: str) -> None:
        with translated(f"Removing {self.uri}/{name}"), suppress(FileNotFoundError):
            self._session.run(partial(_remove, path=self._path(name)), limit_s=_SMALL_LIMIT_S)

    def remove_all(self, folder: str) -> None:
        with translated(f"Removing {self.uri}/{folder}"), suppress(FileNotFoundError):
            self._session.run(partial(_remove_tree, path=self._path(folder)), limit_s=_LONG_LIMIT_S)

    def _path(self, name: str) -> str:
        return posixpath.join(self._root, name)

    def _path_in(self, folder: str, path: str) -> str:
        return self._path(f"{folder}/{path}" if folder else path)


async def _create(sftp: SFTPClient, *, path: str, body: bytes) -> None:
    temporary = await _write_aside(sftp, path, body)
    try:
        await sftp.link(temporary, path)
    except asyncssh.SFTPOpUnsupported as error:
        raise NotImplementedError(
            "the server has no hard links (hardlink@openssh.com), so nothing can be created exactly once"
        ) from error
    except (asyncssh.SFTPFailure, asyncssh.SFTPFileAlreadyExists) as error:
        # OpenSSH says "Failure" and no more: that the name is there now, whole, is the answer.
        if await sftp.lexists(path):
            raise FileExistsError(path) from error
        raise
    finally:
        with suppress(asyncssh.SFTPError):
            await sftp.remove(temporary)


async def _put(sftp: SFTPClient, *, path: str, body: bytes) -> None:
    temporary = await _write_aside(sftp, path, body)
    await sftp.posix_rename(temporary, path)


async def _write_aside(sftp: SFTPClient, path: str, body: bytes) -> str:
    """Write a small file under a name of its own beside `path`, durably."""
    folder, _, name = path.rpartition("/")
    temporary = f"{folder}/.{name}.{secrets.token_hex(4)}"
    await sftp.makedirs(folder, exist_ok=True)
    async with sftp.open(temporary, "xb") as file:
        await file.write(body)
        await _sync(file)
    return temporary


async def _sync(file: SFTPClientFile) -> None:
    # A server without fsync@openssh.com keeps its own promises.
    with suppress(asyncssh.SFTPOpUnsupported):
        await file.fsync()


async def _read(sftp: SFTPClient, *, path: str) -> bytes:
    async with sftp.open(path, "rb") as file:
        return await _read_block(file)


async def _list_entries(sftp: SFTPClient, *, path: str) -> list[asyncssh.SFTPName]:
    try:
        return [entry async for entry in sftp.scandir(path) if entry.filename not in {".", ".."}]
    except MISSING:
        return []


async def _list_sizes_bytes(sftp: SFTPClient, *, root: str) -> dict[str, int]:
    sizes_bytes: dict[str, int] = {}
    folders = [""]
    while folders:
        folder = folders.pop()
        for entry in await _list_entries(sftp, path=posixpath.join(root, folder)):
            path = posixpath.join(folder, str(entry.filename))
            if entry.attrs.type == asyncssh.FILEXFER_TYPE_DIRECTORY:
                folders.append(path)
            elif entry.attrs.type == asyncssh.FILEXFER_TYPE_REGULAR:
                sizes_bytes[path] = entry.attrs.size or 0
    return sizes_bytes


async def _make_folders(sftp: SFTPClient, *, paths: Sequence[str]) -> None:
    for path in paths:
        await sftp.makedirs(path, exist_ok=True)


async def _send_file(sftp: SFTPClient, *, source: Path, target: str, name: str) -> FileEntry:
    digest, size_bytes = hashlib.sha256(), 0
    with source.open("rb") as local:
        async with sftp.open(target, "wb") as file:
            while block := await asyncio.to_thread(local.read, _BLOCK_BYTES):
                async with asyncio.timeout(_LONG_LIMIT_S):
                    await asyncio.gather(file.write(block, size_bytes), asyncio.to_thread(digest.update, block))
                size_bytes += len(block)
            async with asyncio.timeout(_LONG_LIMIT_S):
                await _sync(file)
    return FileEntry(name, size_bytes, digest.hexdigest())


async def _read_file(sftp: SFTPClient, *, source: str, name: str, target: Path | None) -> FileEntry:
    """Read a file through, into a local one if that is asked for; the next block is on its way while one is hashed."""
    digest, size_bytes = hashlib.sha256(), 0
    with ExitStack() as stack:
        local = None if target is None else stack.enter_context(target.open("wb"))

        def take(block: bytes) -> None:
            digest.update(block)
            if local is not None:
                local.write(block)

        async with sftp.open(source, "rb") as file:
            block = await _read_block(file, _BLOCK_BYTES, 0)
            while block:
                size_bytes += len(block)
                async with asyncio.timeout(_LONG_LIMIT_S):
                    following = _read_block(file, _BLOCK_BYTES, size_bytes)
                    block, _ = await asyncio.gather(following, asyncio.to_thread(take, block))
    return FileEntry(name, size_bytes, digest.hexdigest())


async def _read_block(file: SFTPClientFile, size_bytes: int = -1, offset: int = 0) -> bytes:
    # A file that was opened without an encoding gives bytes.
    return cast(bytes, await file.read(size_bytes, offset))


async def _remove(sftp: SFTPClient, *, path: str) -> None:
    await sftp.remove(path)


async def _remove_tree(sftp: SFTPClient, *, path: str) -> None:
    if await sftp.exists(path):
        await sftp.rmtree(path)
