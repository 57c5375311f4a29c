"""The uploader as rank 0 sees it: a child process that is asked for one save at a time and answers with events."""

import json
import queue
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from internvl_core.checkpoint.uploader import DONE, FAILED
from internvl_core.errors import Fenced, InternVLError, StoreUnavailable, find_error_class

_CLOSE_PATIENCE_S = 2.0
"""With the release of the lease behind it within what the supervisor gives ranks after a failure."""


class UploaderProcess:
    """`checkpoint/uploader.py`; whoever owns it starts it again when it dies."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        on_fenced: Callable[[InternVLError], None],
        on_end: Callable[[], None],
    ) -> None:
        """Start it.

        Args:
            command: what runs it.
            on_fenced: told, in another thread, when the lease is lost, save or no save.
            on_end: told, in another thread, when it is gone: nobody beats the lease any more.
        """
        self._command = list(command)
        self._on_fenced = on_fenced
        self._on_end = on_end
        # Held to start and to close: one that starts behind a close would beat a lease that is given back.
        self._lock = threading.Lock()
        self._is_closed = False
        self._start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_gone(self) -> bool:
        return self._process.poll() is not None

    def restart(self) -> None:
        """Start it again if it is gone, unless it was closed."""
        with self._lock:
            if not self._is_closed and self.is_gone:
                self._close_stdin()
                self._start()

    def send(self, record_path: Path, *, limit_s: float) -> Iterator[dict[str, Any]]:
        """Ask for a save; yield its events, the last of them `done`.

        Args:
            record_path: of the unsent save.
            limit_s: the process is ended when the save takes longer; it hangs, or the store does.

        Raises:
            StoreUnavailable: the store failed, or the process died, or was closed, or hung.
            InternVLError: the store failed in a way that no further try helps.
        """
        # It may be dead, or closed: the end of its events says so.
        with suppress(OSError, ValueError):
            self._write(f"{record_path}\n")
        deadline = time.monotonic() + limit_s
        while (event := self._take_event(deadline)) is not None:
            if event["event"] == FAILED:
                raise find_error_class(event["error"])(event["message"])
            yield event
            if event["event"] == DONE:
                return
        self._end()
        if time.monotonic() > deadline:
            raise StoreUnavailable(f"The save was not in the store within {limit_s:.0f} s.")
        raise StoreUnavailable(f"The uploader ended with exit code {self._process.returncode} in the middle of a save.")

    def close(self) -> None:
        """End it; a transfer under way is given a few seconds. Nothing is ever committed by halves."""
        with self._lock:
            self._is_closed = True
            self._close_stdin()
            self._end()

    def _start(self) -> None:
        self._process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._events: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        arguments = (self._process, self._events)
        threading.Thread(target=self._read, args=arguments, name="upload-events", daemon=True).start()

    def _end(self) -> None:
        """Wait for its end, by force after a while; what hangs in a dead network mount is left to the supervisor."""
        try:
            self._process.wait(_CLOSE_PATIENCE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_CLOSE_PATIENCE_S)

    def _take_event(self, deadline: float) -> dict[str, Any] | None:
        """Take the next event; None when there will be none, which is seen to once the deadline is over."""
        try:
            return self._events.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            self._process.kill()
            return None

    def _close_stdin(self) -> None:
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.close()

    def _write(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line)
        self._process.stdin.flush()

    def _read(self, process: "subprocess.Popen[str]", events: "queue.SimpleQueue[dict[str, Any] | None]") -> None:
        assert process.stdout is not None
        with process.stdout:
            for line in process.stdout:
                event = json.loads(line)
                if event.get("error") == Fenced.__name__:
                    self._on_fenced(Fenced(event["message"]))
                events.put(event)
        process.wait()
        events.put(None)
        self._on_end()
