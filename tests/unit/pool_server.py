"""A real HTTP server that knows of one work pool and its runs only."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class FakeServer:
    """What Prefect's server answers of one pool."""

    url: str = ""
    states: dict[str, str] = field(default_factory=dict)
    is_paused: bool = False
    wants_password: bool = False
    asked: list[str] = field(default_factory=list)
    """Runs that were told to stop."""
    ends_when_asked: bool = True
    begins_next: dict[str, str] = field(default_factory=dict)
    """What appears once the runs were listed."""

    def answer(self, method: str, path: str, content: dict[str, Any]) -> Any:
        if (method, path) == ("PATCH", "/api/work_pools/gpus"):
            self.is_paused = content["is_paused"]
            return None
        if path == "/api/flow_runs/filter":
            assert content["work_pools"] == {"name": {"any_": ["gpus"]}}
            wanted = content["flow_runs"]["state"]["type"]["any_"]
            found = [
                {"id": run, "name": f"name of {run}", "state_type": state}
                for run, state in self.states.items()
                if state in wanted
            ]
            self.states |= self.begins_next
            self.begins_next = {}
            return found
        run = path.removeprefix("/api/flow_runs/").removesuffix("/set_state")
        self.asked.append(run)
        state = content["state"]["type"]
        self.states[run] = "CANCELLED" if state == "CANCELLING" and self.ends_when_asked else state
        return {"status": "ACCEPT"}


@contextmanager
def serve_pool() -> Iterator[FakeServer]:
    """Serve the pool `gpus` on a free port of the loopback address."""
    fake = FakeServer()

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if fake.wants_password:
                self.send_error(401)
                return
            if not self.path.startswith(("/api/work_pools/gpus", "/api/flow_runs/")):
                self.send_error(404)
                return
            answer = fake.answer(self.command, self.path, content)
            body = b"" if answer is None else json.dumps(answer).encode()
            self.send_response(200 if body else 204)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_PATCH = answer  # noqa: N815  http.server's names

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        fake.url = f"http://127.0.0.1:{listening.server_address[1]}/api"
        yield fake
        listening.shutdown()
        thread.join()
