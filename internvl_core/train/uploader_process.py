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

_CLOSE_PATIENCE_S = 5.0


class UploaderProcess:
    """`checkpoint/uploader.py`, started again when it dies."""

    def __init__(self, command: Sequence[str], *, on_fenced: Callable[[InternVLError], None]) -> None:
        """Start it.

        Args:
            command: what runs it.
            on_fenced: told, in another thread, when the lease is lost, save or no save.
        """
        self._command = list(command)
        self._on_fenced = on_fenced
        self._is_closed = False
        self._start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, record_path: Path, *, limit_s: float) -> Iterator[dict[str, Any]]:
        """Ask for a save; yield its events, the last of them `done`.

        Args:
            record_path: of the unsent save.
            limit_s: the process is ended when the save takes longer; it hangs, or the store does.

        Raises:
            StoreUnavailable: the store failed, or the process died, or was closed, or hung.
            InternVLError: the store failed in a way that no further try helps.
        """
        with suppress(OSError):  # It is dead: the end of its events says so.
            self._write(f"{record_path}\n")
        deadline = time.monotonic() + limit_s
        while (event := self._take_event(deadline)) is not None:
            if event["event"] == FAILED:
                raise find_error_class(event["error"])(event["message"])
            yield event
            if event["event"] == DONE:
                return
        exit_code = self._process.wait()
        if not self._is_closed:
            self._close_stdin()
            self._start()
        if time.monotonic() > deadline:
            raise StoreUnavailable(f"The save was not in the store within {limit_s:.0f} s.")
        raise StoreUnavailable(f"The uploader ended with exit code {exit_code} in the middle of a save.")

    def close(self) -> None:
        """End it; a transfer under way is given a few seconds. Nothing is ever committed by halves."""
        self._is_closed = True
        self._close_stdin()
        try:
            self._process.wait(_CLOSE_PATIENCE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join()

    def _start(self) -> None:
        self._process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._events: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._reader = threading.Thread(
            target=self._read, args=(self._process, self._events), name="upload-events", daemon=True
        )
        self._reader.start()

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
        events.put(None)
