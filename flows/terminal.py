"""Ctrl-C for the flow alone.

A terminal sends it to all of its foreground group, Prefect's embedded server among them, and a flow
whose server is gone neither stops nor ends: for 217 s it repeated its requests, then it failed. So the
flow runs in a session of its own, and the process that the terminal knows passes on what it is told.
"""

import os
import signal
import sys

from internvl_core.supervision.process_tree import die_with

_PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


def leave_terminal() -> None:
    """Go on in a child with a session of its own; this process waits for it and ends as it does.

    The child dies with this process. Call it from the main thread, before there are others.
    """
    owner = os.getpid()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        os.setsid()
        die_with(owner)
        return
    for number in _PASSED_ON:
        signal.signal(number, lambda number, _: os.kill(child, number))
    _, status = os.waitpid(child, 0)
    exit_code = os.waitstatus_to_exitcode(status)
    # A shell's way to tell a signal. Not sys.exit: what this process would still do is the child's to do.
    os._exit(exit_code if exit_code >= 0 else 128 - exit_code)
