"""One SSH connection for all stores on a host, made when it is first needed and again when it is lost.

Users, ports and keys are those of ~/.ssh; a host whose key is not in known_hosts is refused.
"""

import asyncio
import functools
import os
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

import asyncssh
from asyncssh import SFTPClient
from fsspec.asyn import get_loop, sync

Answer = TypeVar("Answer")
Question = Callable[[SFTPClient], Coroutine[Any, Any, Answer]]

MISSING = (asyncssh.SFTPNoSuchFile, asyncssh.SFTPNoSuchPath)

_CONNECT_OPTIONS: dict[str, Any] = {
    "connect_timeout": 10,
    "login_timeout": 30,
    # A server that is gone without a word is noticed after a minute.
    "keepalive_interval": 15,
    "keepalive_count_max": 4,
}
_TRANSFERS = 4
_LOST = (asyncssh.SFTPConnectionLost, asyncssh.SFTPNoConnection, asyncssh.ConnectionLost, ConnectionError)


class SftpSession:
    """Asks a server from any thread."""

    def __init__(self, host: str, port: int | None) -> None:
        self._host = host
        # Without a port the one of ~/.ssh/config holds.
        self._options = _CONNECT_OPTIONS | ({} if port is None else {"port": port})
        self._connected: tuple[asyncssh.SSHClientConnection, SFTPClient] | None = None
        self._lock = asyncio.Lock()

    def run(self, ask: Question[Answer], *, limit_s: float, is_repeatable: bool = True) -> Answer:
        """Ask, once more over a new connection if the old one is lost and that can do no harm.

        Raises:
            FileNotFoundError, PermissionError: the server says so.
            TimeoutError: there was no answer in time.
            asyncssh.Error, OSError: whatever else went wrong.
        """
        answer: Answer = sync(get_loop(), self._ask, ask, is_repeatable, timeout=limit_s)
        return answer

    def run_all(self, questions: Sequence[Question[Answer]]) -> list[Answer]:
        """Ask several things side by side, each with deadlines of its own; the first error ends all."""

        async def ask_all() -> list[Answer]:
            slots = asyncio.Semaphore(_TRANSFERS)

            async def ask_one(ask: Question[Answer]) -> Answer:
                async with slots:
                    return await self._ask(ask, True)

            try:
                async with asyncio.TaskGroup() as group:
                    tasks = [group.create_task(ask_one(ask)) for ask in questions]
            except BaseExceptionGroup as errors:
                raise errors.exceptions[0] from None
            return [task.result() for task in tasks]

        answers: list[Answer] = sync(get_loop(), ask_all)
        return answers

    async def _ask(self, ask: Question[Answer], is_repeatable: bool) -> Answer:
        for is_last in (False, True) if is_repeatable else (True,):
            sftp = await self._get_client()
            try:
                return await ask(sftp)
            except MISSING as error:
                raise FileNotFoundError(str(error)) from error
            except asyncssh.SFTPPermissionDenied as error:
                raise PermissionError(str(error)) from error
            except _LOST:
                self._connected = None
                if is_last:
                    raise
        raise RuntimeError("never reached: the last attempt returns or raises")

    async def _get_client(self) -> SFTPClient:
        async with self._lock:
            if self._connected is None or self._connected[0].is_closed():
                connection = await asyncssh.connect(self._host, **self._options)
                self._connected = connection, await connection.start_sftp_client()
            return self._connected[1]


def open_session(host: str, port: int | None) -> SftpSession:
    """Get this process's session with a host; nothing is sent yet."""
    # A forked child has neither its parent's event loop nor its socket.
    return _open_session(host, port, os.getpid())


@functools.cache
def _open_session(host: str, port: int | None, _process: int) -> SftpSession:
    return SftpSession(host, port)
