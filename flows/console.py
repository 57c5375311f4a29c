"""What a person sees of Prefect's logs: one line an event, and one line an error.

An error of our tree carries its whole explanation in its message, so its stack is left out, in
the console and in the UI alike. Any other exception keeps its stack.
"""

import logging

from prefect.logging.configuration import setup_logging

from internvl_core.errors import InternVLError

_RUN_LOGGERS = ("prefect.flow_runs", "prefect.task_runs")
_BOOKKEEPING = (
    "Finished in state",
    "Beginning flow run",
    "Created flow run",
    "View at",
    "Starting temporary server",
    "Stopping temporary server",
)


def quiet_prefect() -> None:
    """Filter the run loggers of this process."""
    # Prefect would do it at the first run, and make handlers that this function could not see.
    setup_logging()
    for name in _RUN_LOGGERS:
        logging.getLogger(name).addFilter(_drop_known_stack)
    for handler in logging.getLogger().handlers:
        handler.addFilter(_is_for_people)


def _drop_known_stack(record: logging.LogRecord) -> bool:
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, InternVLError):
        record.msg, record.args = "%s: %s", (type(error).__name__, error)
        record.exc_info = None
        # The command prints the error itself, at the end, where it is seen.
        record.is_told_elsewhere = True
    return True


def _is_for_people(record: logging.LogRecord) -> bool:
    if getattr(record, "is_told_elsewhere", False):
        return False
    if record.levelno > logging.INFO and record.getMessage().startswith("Finished in state Failed"):
        return False
    return record.levelno > logging.INFO or not record.getMessage().startswith(_BOOKKEEPING)
