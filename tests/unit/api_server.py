"""A real HTTP server that answers as it is told, for what asks Prefect's API."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class ApiServer:
    """What is answered, and what was asked."""

    url: str = ""
    answers: dict[str, tuple[int, Any]] = field(default_factory=dict)
    """Status and content by path; others are 404."""
    busy: int = 0
    """So many requests are turned away with 503 first."""
    asked: list[str] = field(default_factory=list)
    logins: list[str | None] = field(default_factory=list)
    contents: list[Any] = field(default_factory=list)

    def answer(self, method: str, path: str) -> tuple[int, Any]:
        self.asked.append(f"{method} {path}")
        if self.busy:
            self.busy -= 1
            return 503, {"exception_message": "Service Unavailable"}
        return self.answers.get(path, (404, {"detail": "Not Found"}))


@contextmanager
def serve_api() -> Iterator[ApiServer]:
    """Serve on a free port of the loopback address."""
    told = ApiServer()

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            told.logins.append(self.headers["Authorization"])
            body = self.rfile.read(int(self.headers["Content-Length"] or 0))
            told.contents.append(json.loads(body) if body else None)
            status, content = told.answer(self.command, self.path)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(content).encode())

        do_GET = do_POST = do_PATCH = answer  # noqa: N815  the names that http.server looks for

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    told.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield told
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
