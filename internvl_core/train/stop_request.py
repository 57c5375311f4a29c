"""Hear in a rank that the run shall stop, or that its owner died.

The supervisor sends one line over its socket to ask for a stop. End of file means that the
supervisor is gone: then nobody would ever stop this rank, so it kills its own process group,
data loader workers included. Standard library only. Ranks agree on the step at which they stop
elsewhere: `is_set` may turn true on one rank a moment before another.
"""

import os
import signal
import socket
import threading

from internvl_core.contract import SUPERVISOR_SOCKET_VARIABLE


class StopRequest:
    """Whether this rank was asked to save and leave."""

    def __init__(self) -> None:
        self._event = threading.Event()

    @classmethod
    def connect(cls) -> "StopRequest":
        """Connect to the supervisor that the environment names; without one the request is never set.

        A supervisor that is named but does not answer is dead, and this process ends here.
        """
        request = cls()
        name = os.environ.get(SUPERVISOR_SOCKET_VARIABLE)
        if name is None:
            return request
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.connect("\0" + name)
        except OSError:
            _leave()
        threading.Thread(target=request._listen, args=(connection,), name="stop-request", daemon=True).start()
        return request

    @property
    def is_set(self) -> bool:
        return self._event.is_set()

    def _listen(self, connection: socket.socket) -> None:
        while True:
            try:
                message = connection.recv(64)
            except OSError:
                message = b""  # A reset says the same as an end of file.
            if not message:
                _leave()
            self._event.set()


def _leave() -> None:
    # Not through logging: the main thread may hold its lock and be stuck in a collective.
    os.write(2, b"The supervisor of this run is gone; this rank leaves.\n")
    # torchrun makes every rank the leader of a group. In somebody else's group only we are ours to kill.
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpid(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)
