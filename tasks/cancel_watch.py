"""Hear of a cancel from the Prefect server itself.

A cancel reaches a flow as a signal from its worker. A run whose worker was killed gets none: it would train on, while
the server calls it Cancelled after five minutes. Only a cancel counts: a run may be called Crashed for a heartbeat
that was lost, and that is no reason to end weeks of training. It is asked for while ranks run, first when they start:
such a run that is still checking its inputs is stopped at its first stage, not before.
"""

import logging
import threading
from types import TracebackType
from typing import Self
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import StateType
from prefect.settings import get_current_settings

POLL_S = 10.0
TIMEOUT_S = 10.0

_CANCELS = (StateType.CANCELLING, StateType.CANCELLED)

logger = logging.getLogger(__name__)


class RunCancelled(BaseException):
    """Somebody cancelled the flow run; like Prefect's own signal no Exception, for it is no failure."""


class CancelWatch:
    """Asks for the state of a flow run now and then, in a thread of its own; the server may be slow or gone."""

    def __init__(self, flow_run_id: str | None) -> None:
        """Ask nothing yet.

        Args:
            flow_run_id: None where there is no flow; then, and with the embedded server, nobody is asked.
        """
        self._id = UUID(flow_run_id) if flow_run_id and get_current_settings().api.url else None
        # Here: in another thread these settings need not be in force, and it would start a server of its own.
        # With settings of its own it is not the client of the flow.
        self._client = get_client({"timeout": TIMEOUT_S}, sync_client=True) if self._id is not None else None
        self._is_told = threading.Event()
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._ask, name="cancel-watch", daemon=True)

    def __enter__(self) -> Self:
        if self._client is not None:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._is_over.set()

    def check(self) -> None:
        """Raise RunCancelled if the run was cancelled."""
        if self._is_told.is_set():
            raise RunCancelled("The run was cancelled.")

    def _ask(self) -> None:
        assert self._id is not None
        assert self._client is not None
        is_cancelling = False
        with self._client as client:
            while not self._is_over.is_set():
                try:
                    state = client.read_flow_run(self._id).state
                except Exception as error:  # noqa: BLE001  whatever the client throws: training goes on without an answer
                    logger.debug("The state of the run is not known: %s: %s", type(error).__name__, error)
                else:
                    was_cancelling, is_cancelling = is_cancelling, state is not None and state.type in _CANCELS
                    # At the second look: the signal of a worker comes before that, and two would cut the save's wait.
                    if is_cancelling and was_cancelling:
                        self._is_told.set()
                        return
                self._is_over.wait(POLL_S)
