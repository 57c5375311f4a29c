"""An HTTP proxy on this machine that does to chosen requests what networks and overloaded stores do."""

import http.client
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

_ALWAYS = 10**9
_HOP_BY_HOP = {"connection", "transfer-encoding", "keep-alive", "expect"}


@dataclass
class Fault:
    """What happens to some of the requests."""

    method: str
    """Of the requests it strikes."""
    path: str = ""
    """Part of their path."""
    num_times: int = _ALWAYS
    status: int | None = None
    """Answer this, and pass nothing on."""
    code: str = ""
    """S3's name for the status."""
    cut_request_at: float | None = None
    """Reset the connection after this share of the request's body has been passed on."""
    cut_answer_at: float | None = None
    """Pass all on, and reset the connection after this share of the answer's body; 0: before the answer begins."""
    change_request: Callable[[bytes], bytes] | None = None
    change_answer: Callable[[bytes], bytes] | None = None
    num_struck: int = field(default=0, init=False)


class HttpProxy:
    """Passes requests on to a server, all but those that a fault strikes."""

    def __init__(self, target_url: str) -> None:
        host, _, port = target_url.removeprefix("http://").partition(":")
        self.target = (host, int(port))
        self.faults: list[Fault] = []
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.daemon_threads = True
        self._server.proxy = self  # type: ignore[attr-defined]
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def strike(self, fault: Fault) -> Fault:
        self.faults.append(fault)
        return fault

    def find_fault(self, method: str, path: str) -> Fault | None:
        with self._lock:
            for fault in self.faults:
                if fault.method == method and fault.path in path and fault.num_struck < fault.num_times:
                    fault.num_struck += 1
                    return fault
        return None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def handle_any(self) -> None:
        proxy: HttpProxy = self.server.proxy  # type: ignore[attr-defined]
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = proxy.find_fault(self.command, self.path)
        if fault and fault.status is not None:
            self._refuse(fault)
            return
        if fault and fault.cut_request_at is not None:
            self._cut_request(proxy, body[: int(len(body) * fault.cut_request_at)])
            return
        if fault and fault.change_request:
            body = fault.change_request(body)
        status, headers, answer = self._ask(proxy, body)
        if fault and fault.change_answer:
            answer = fault.change_answer(answer)
            headers["Content-Length"] = str(len(answer))
        if fault and fault.cut_answer_at == 0:
            self._reset()
            return
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if fault and fault.cut_answer_at is not None:
            self.wfile.write(answer[: int(len(answer) * fault.cut_answer_at)])
            self._reset()
        elif self.command != "HEAD":
            self.wfile.write(answer)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_any  # noqa: N815 (http.server's names)

    def log_message(self, *_: Any) -> None:
        pass

    def _ask(self, proxy: HttpProxy, body: bytes) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection(*proxy.target, timeout=60)
        try:
            connection.request(self.command, self.path, body, self._list_headers(len(body)))
            answer = connection.getresponse()
            found = {name: value for name, value in answer.getheaders() if name.lower() not in _HOP_BY_HOP}
            return answer.status, found, answer.read()
        finally:
            connection.close()

    def _list_headers(self, num_bytes: int) -> dict[str, str]:
        headers = {name: value for name, value in self.headers.items() if name.lower() not in _HOP_BY_HOP}
        return headers | {"Content-Length": str(num_bytes)}

    def _refuse(self, fault: Fault) -> None:
        text = f"<?xml version='1.0'?><Error><Code>{fault.code}</Code><Message>as asked for</Message></Error>".encode()
        self.send_response(fault.status or 500)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text)

    def _cut_request(self, proxy: HttpProxy, part: bytes) -> None:
        """Let the server see a client that goes away in the middle, and the client a server that does."""
        with socket.create_connection(proxy.target, timeout=60) as server:
            lines = [f"{self.command} {self.path} HTTP/1.1"]
            lines += [f"{name}: {value}" for name, value in self.headers.items() if name.lower() != "expect"]
            server.sendall("\r\n".join([*lines, "", ""]).encode() + part)
        self._reset()

    def _reset(self) -> None:
        self.close_connection = True
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def finish(self) -> None:
        # After a reset there is nothing to flush into.
        if not self.connection._closed:  # type: ignore[attr-defined]
            super().finish()
