"""What a person sees of Prefect's logs: one line an event, and one line an error.

An error of our tree carries its whole explanation in its message, so its stack is left out, in
the console and in the UI alike. Any other exception keeps its stack.
"""

import logging

import httpx
from prefect.client.orchestration import get_client
from prefect.logging.configuration import setup_logging
from prefect.settings import get_current_settings

from flows.prefect_api import AUTH_VARIABLE
from internvl_core.errors import ArgumentError, InternVLError
from tasks.address import hide_password

_FLOW_LOGGER = "prefect.flow_runs"
_RUN_LOGGERS = (_FLOW_LOGGER, "prefect.task_runs")
_BAD_ENDS = ("Finished in state Failed", "Finished in state Crashed")
_BOOKKEEPING = (
    "Finished in state",
    "Beginning flow run",
    "Created flow run",
    "View at",
    "Starting temporary server",
    "Stopping temporary server",
)


def quiet_prefect() -> None:
    """Filter what this process shows of its runs' logs."""
    # Prefect would do it at the first run, and make handlers that this function could not see.
    setup_logging()
    shorten_errors()
    for handler in logging.getLogger().handlers:
        handler.addFilter(_is_for_people)


def shorten_errors() -> None:
    """Log our own errors as one line in this process, wherever it logs to; safe to repeat."""
    for name in _RUN_LOGGERS:
        logging.getLogger(name).addFilter(_drop_known_stack)


def check_server() -> None:
    """Ask the Prefect server that the settings name, if they name one, whether it is there and lets us in.

    Raises:
        ArgumentError: it does not answer, or wants a password.
    """
    url = get_current_settings().api.url
    if url is None:
        return
    error: Exception | None
    try:
        # Prefect's own client, not PrefectApi: a run will use it, with certificates and keys from its settings.
        with get_client(sync_client=True) as client:
            error = client.api_healthcheck()
            if error is None:
                # Health is told to everybody.
                client.raise_for_api_version_mismatch()
    except (RuntimeError, httpx.InvalidURL, httpx.HTTPStatusError) as raised:
        error = raised
    if error is None:
        return
    if isinstance(error, httpx.HTTPStatusError) and error.response.status_code == httpx.codes.UNAUTHORIZED:
        problem = f"wants a password. Set {AUTH_VARIABLE} to user:password"
    else:
        reason = hide_password(str(error).partition("\n")[0]).rstrip(".")
        problem = f"does not answer as a Prefect server ({reason}). Start it, correct the address, which ends in /api"
    raise ArgumentError(
        hide_password(f"PREFECT_API_URL: {url} ") + f"{problem}, or unset PREFECT_API_URL to run on the embedded one."
    )


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
    message = record.getMessage()
    if message.startswith("Crash detected!"):
        # The task says it too, and it is the flow that ends.
        return record.name == _FLOW_LOGGER
    if record.levelno > logging.INFO:
        return not message.startswith(_BAD_ENDS)
    return not message.startswith(_BOOKKEEPING)
