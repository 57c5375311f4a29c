"""The ranks of a run as their supervisor sees them: who is connected, how far each is, who is lost.

A rank that goes without having said that it leaves is lost: it was killed, or crashed.
Standard library only.
"""

import logging
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import suppress

from internvl_core.supervision.progress import STOP, Kind, Message

logger = logging.getLogger(__name__)

_MAX_LINE_BYTES = 4096


class _Connection:
    """One process that connected."""

    def __init__(self, connection: socket.socket, pid: int) -> None:
        connection.setblocking(False)
        self.socket = connection
        self.pid = pid
        self.rank: int | None = None
        self.is_open = True
        self.has_left = False
        self._unfinished = b""

    def read(self) -> Iterator[Message]:
        """Yield what it said since the last call."""
        while self.is_open:
            try:
                received = self.socket.recv(1 << 16)
            except BlockingIOError:
                return
            except OSError:
                received = b""
            if not received:
                self.is_open = False
                self.socket.close()
                return
            *lines, self._unfinished = (self._unfinished + received).split(b"\n")
            self._unfinished = self._unfinished[:_MAX_LINE_BYTES]
            for line in lines:
                try:
                    message = Message.from_line(line)
                except ValueError:
                    logger.warning("process %d says what no rank does: %.100r", self.pid, line)
                    continue
                self.rank = message.rank
                self.has_left |= message.kind in (Kind.LEAVE, Kind.IMPATIENCE)
                yield message


class Ranks:
    """The ranks that connected, and the socket where they do.

    It is in the abstract namespace: no file to clean up, and the name vanishes with its process.
    """

    def __init__(self) -> None:
        self._server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._server.bind(f"\0internvl-{os.urandom(8).hex()}")
        self._server.listen(256)
        self._server.setblocking(False)
        self._connections: list[_Connection] = []
        self._is_stopping = False
        self.lost: int | None = None
        """The first rank that went without a word."""

    @property
    def name(self) -> str:
        """Of the socket, without the NUL."""
        name: bytes = self._server.getsockname()
        return name[1:].decode()

    @property
    def descriptors(self) -> list[int]:
        """What to wait for."""
        return [self._server.fileno(), *(each.socket.fileno() for each in self._connections if each.is_open)]

    @property
    def pids(self) -> dict[int, int]:
        """Process of each rank that is still connected."""
        return {each.rank: each.pid for each in self._connections if each.is_open and each.rank is not None}

    @property
    def has_any(self) -> bool:
        return bool(self._connections)

    @property
    def has_leaver(self) -> bool:
        """Whether a rank has ended itself."""
        return any(each.has_left for each in self._connections)

    def read(self) -> list[Message]:
        """Accept whoever connected and return what all said since the last call."""
        self._accept()
        messages = [message for each in self._connections for message in each.read()]
        if self.lost is None:
            gone = (each.rank for each in self._connections if not (each.is_open or each.has_left))
            self.lost = next((rank for rank in gone if rank is not None), None)
        return messages

    def stop(self) -> int:
        """Tell all ranks to save and leave, also those that connect later; return how many are told now."""
        self._is_stopping = True
        for each in self._connections:
            _send_stop(each.socket)
        return len(self._connections)

    def close(self) -> None:
        for each in self._connections:
            each.socket.close()
        self._server.close()

    def _accept(self) -> None:
        with suppress(BlockingIOError):
            while True:
                connection, _ = self._server.accept()
                pid, uid = _read_peer(connection)
                if uid != os.getuid():
                    connection.close()
                    continue
                if self._is_stopping:
                    _send_stop(connection)
                self._connections.append(_Connection(connection, pid))


def _read_peer(connection: socket.socket) -> tuple[int, int]:
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid, uid, _ = struct.unpack("3i", credentials)
    return pid, uid


def _send_stop(connection: socket.socket) -> None:
    with suppress(OSError):  # That rank is dead already.
        connection.sendall(STOP)
