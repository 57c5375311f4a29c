"""A TCP proxy on this machine whose server can go away, come back, be slow, lose answers and misunderstand."""

import socket
import threading
import time
from contextlib import suppress
from typing import Self

_CHUNK_BYTES = 1 << 16


class TcpProxy:
    """Passes connections on to a server while it is up; refuses them while it is down."""

    def __init__(self, target_url: str) -> None:
        host, _, port = target_url.removeprefix("http://").partition(":")
        self._target = (host, int(port))
        self._connections: list[socket.socket] = []
        self._listener: socket.socket | None = None
        self.pause_s = 0.0
        """Before each chunk that a client sends."""
        self.loses_answer_to: bytes | None = None
        """The next request with this in it reaches the server, but its answer does not come back."""
        self.replaces: tuple[bytes, bytes] | None = None
        """In what a client sends; of the same length."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            self._address = free.getsockname()

    def __enter__(self) -> Self:
        self.come_up()
        return self

    def __exit__(self, *_: object) -> None:
        self.go_down()

    @property
    def url(self) -> str:
        return f"http://{self._address[0]}:{self._address[1]}"

    def come_up(self) -> None:
        self._listener = socket.create_server(self._address)
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def go_down(self) -> None:
        """Refuse new connections and cut those that are open."""
        if self._listener is not None:
            # Closing alone would not wake the thread that waits in accept.
            with suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
            self._listener = None
        for connection in self._connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()
        self._connections.clear()

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                client, _ = listener.accept()
                server = socket.create_connection(self._target)
                self._connections += [client, server]
                is_lost = threading.Event()
                for source, target, is_request in ((client, server, True), (server, client, False)):
                    arguments = (source, target, is_request, is_lost)
                    threading.Thread(target=self._pump, args=arguments, daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket, is_request: bool, is_lost: threading.Event) -> None:
        with suppress(OSError):
            while chunk := source.recv(_CHUNK_BYTES):
                if is_request:
                    time.sleep(self.pause_s)
                    chunk = self._spoil(chunk, is_lost)
                elif is_lost.is_set():
                    break
                target.sendall(chunk)
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _spoil(self, chunk: bytes, is_lost: threading.Event) -> bytes:
        if self.loses_answer_to is not None and self.loses_answer_to in chunk:
            self.loses_answer_to = None
            is_lost.set()
        return chunk if self.replaces is None else chunk.replace(*self.replaces)
