"""A rank's link to its supervisor: hears that the run shall stop or that its owner died, tells how far it is.

The supervisor sends one line over its socket to ask for a stop. End of file means that the
supervisor is gone: then nobody would ever stop this rank, so it kills its own process group,
data loader workers included. A signal to any one rank asks for a stop as well; the supervisor is
told, and tells the others. Standard library only. Ranks agree on the step at which they stop
elsewhere: `is_set` may turn true on one rank a moment before another.

All of it is heard on a thread, so also while the main thread is stuck in a collective.
"""

import faulthandler
import os
import select
import signal
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path

from internvl_core.contract import STACKS_DIR_VARIABLE, SUPERVISOR_SOCKET_VARIABLE, get_stacks_path
from internvl_core.errors import Preempted
from internvl_core.supervision.progress import STACKS_SIGNAL, Kind, Message, Phase
from internvl_core.supervision.stop_signals import STOP_SIGNALS, StopSignals


class SupervisorLink:
    """Whether this rank was asked to save and leave, and whom to tell about its progress."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._connection: socket.socket | None = None
        self._signals = StopSignals()
        self._wakeup, self._wakeup_sender = socket.socketpair()
        self._wakeup_sender.setblocking(False)
        self._rank = int(os.environ.get("RANK", "0"))

    @classmethod
    def connect(cls) -> "SupervisorLink":
        """Connect to the supervisor that the environment names; without one only signals are heard, and none is told.

        A supervisor that is named but does not answer is dead, and this process ends here.
        """
        link = cls()
        name = os.environ.get(SUPERVISOR_SOCKET_VARIABLE)
        if name is not None:
            link._open_stacks()
            link._connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                link._connection.connect("\0" + name)
            except OSError:
                _die_ownerless()
            link.tell(Phase.SETUP)
            os.register_at_fork(after_in_child=link._connection.close)
        threading.Thread(target=link._listen, name="supervisor-link", daemon=True).start()
        return link

    def hear_signals(self) -> None:
        """Take SIGTERM, SIGINT and SIGHUP as requests to stop; for the main thread, as early as can be."""
        for number in STOP_SIGNALS:
            # Python's own handler would wait for the main thread to come back from a collective.
            signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(self._wakeup_sender.fileno(), warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=_forget_signals)

    @property
    def is_set(self) -> bool:
        """Whether this rank shall save and leave."""
        return self._event.is_set()

    def tell(self, phase: Phase, step: int | None = None) -> None:
        """Tell the supervisor that this rank is alive and how far it is; neither blocks nor fails."""
        self._send(Message(Kind.PROGRESS, self._rank, phase, step))

    def leave(self) -> None:
        """Tell that this process is about to end on purpose, its failure being written if there is one."""
        self._send(Message(Kind.LEAVE, self._rank))

    def _send(self, message: Message) -> None:
        if self._connection is not None:
            # A full buffer: the supervisor is held up, and the next line says more than this one.
            with suppress(OSError):
                self._connection.send(message.to_line(), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)

    def _open_stacks(self) -> None:
        """Have the stacks of all threads written on a signal, even while the GIL is held, and on a crash."""
        faulthandler.enable(all_threads=True)
        directory = os.environ.get(STACKS_DIR_VARIABLE)
        if directory is not None:
            # Kept open: a full disk or a chdir later changes nothing.
            self._stacks = get_stacks_path(Path(directory), self._rank).open("a")
            faulthandler.register(STACKS_SIGNAL, file=self._stacks, all_threads=True)

    def _listen(self) -> None:
        sources = [self._wakeup] if self._connection is None else [self._wakeup, self._connection]
        while True:
            readable, _, _ = select.select(sources, [], [])
            if self._connection in readable:
                self._hear_supervisor(self._connection)
            if self._wakeup in readable:
                for number in self._wakeup.recv(64):
                    if number in STOP_SIGNALS:
                        self._hear_signal(number)

    def _hear_supervisor(self, connection: socket.socket | None) -> None:
        try:
            message = connection.recv(64) if connection is not None else b""
        except OSError:
            message = b""  # A reset says the same as an end of file.
        if not message:
            _die_ownerless()
        self._event.set()

    def _hear_signal(self, number: int) -> None:
        self._signals.note(number, time.monotonic())
        if self._signals.is_impatient:
            self._send(Message(Kind.IMPATIENCE, self._rank, text=str(self._signals)))
            os.write(2, f"{self._signals}: this rank leaves without a checkpoint.\n".encode())
            os._exit(Preempted.exit_code)
        self._send(Message(Kind.SIGNAL, self._rank, text=signal.Signals(number).name))
        self._event.set()


def _forget_signals() -> None:
    # A worker's signal is not its rank's; Ctrl-C reaches whole groups, and the rank decides.
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _die_ownerless() -> None:
    # Not through logging: the main thread may hold its lock and be stuck in a collective.
    os.write(2, b"The supervisor of this run is gone; this rank leaves.\n")
    # torchrun makes every rank the leader of a group. In somebody else's group only we are ours to kill.
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpid(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)
