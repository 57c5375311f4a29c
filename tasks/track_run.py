"""Record a pipeline run in MLflow without ever holding it up.

    caller ---> spool on disk ---> thread ---> MLflow
                metrics.jsonl ------^

The caller's part of every call ends when the request is in the spool. A thread of its own imports
MLflow, if nobody has yet, delivers what is in the spool and follows the stages' metrics files.
MLflow that is down, slow, refuses or hangs costs a warning; the data waits in the spool, where the
next `RunTracker` with the same key, or `replay`, goes on.
"""

import logging
import shlex
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from internvl_core.errors import ArgumentError
from tasks.address import hide_password
from tasks.mlflow_delivery import MlflowDelivery, build_run_url
from tasks.tracking_spool import EVENTS_FILE, Progress, TrackingSpool

RunStatus = Literal["FINISHED", "FAILED", "KILLED"]

POLL_INTERVAL_S = 1.0
LONGEST_BACKOFF_S = 30.0
FAILING_DEADLINE_S = 10.0
"""How long `close` waits for an MLflow that did not answer before: long enough for a restart, short for a run's end."""
KILLED_DEADLINE_S = 3.0
"""How long after a cancel: Prefect's worker kills the flow 30 s after it, and most of these are for the save."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrackedData:
    """A data set that a stage was trained or scored on."""

    name: str
    digest: str
    source: str
    """Its path or URI."""
    context: Literal["training", "evaluation"]


class RunTracker:
    """The MLflow run of one pipeline run, with a child run for each stage.

    The spool stays after delivery; give the same directory and key again to continue the same run.
    The stages' metrics files must stay where they are until they are delivered.
    """

    def __init__(
        self,
        tracking_uri: str,
        *,
        experiment: str,
        run_name: str,
        key: str,
        tags: Mapping[str, str],
        params: Mapping[str, Any],
        spool_dir: Path,
    ) -> None:
        """Ask for the run and start the thread.

        Args:
            tracking_uri: `sqlite:///path`, created if missing, or the `http(s)://` address of a server.
            key: Names the run for ever: the run of that key in the experiment is continued if there is one.
            params: Written once; a run that is continued gets only those it does not have.
        """
        self._tracking_uri = tracking_uri
        self._spool = TrackingSpool(spool_dir)
        self._delivery = MlflowDelivery(tracking_uri, self._spool)
        self._progress: Progress | None = None
        self._stage_keys: dict[str, str] = {}
        self._is_failing = False
        self._is_closed = False
        self._is_delivered = False
        self._has_lost_event = False
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._abandoned = threading.Event()
        self._thread = threading.Thread(target=self._run_thread, name="mlflow-tracker", daemon=True)
        self._ask("open", experiment=experiment, run_name=run_name, key=key, tags=dict(tags), params=dict(params))
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close(status="FINISHED")
        elif issubclass(kind, Exception):
            self.close(status="FAILED", deadline_s=FAILING_DEADLINE_S)
        else:
            self.close(status="KILLED", deadline_s=KILLED_DEADLINE_S)

    @property
    def run_id(self) -> str | None:
        """The id of the pipeline's run; None until MLflow gave it."""
        return self._progress.run_id if self._progress else None

    @property
    def stage_run_ids(self) -> dict[str, str]:
        """The ids of the stages' runs by stage name, as far as MLflow gave them."""
        return {stage.name: stage.run_id for stage in self._progress.stages.values()} if self._progress else {}

    @property
    def run_url(self) -> str | None:
        """The page of the pipeline's run; None until it is known, and where there is no server."""
        progress = self._progress
        if progress is None or progress.run_id is None or progress.experiment_id is None:
            return None
        return build_run_url(self._tracking_uri, progress.experiment_id, progress.run_id)

    @property
    def address(self) -> str:
        """Where a person finds the run: its page, or the tracking URI where there is none; never with a password."""
        return self.run_url or hide_password(self._tracking_uri)

    def start_stage(
        self,
        name: str,
        *,
        key: str,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
        metrics_path: Path,
        data: Sequence[TrackedData] = (),
    ) -> None:
        """Ask for the stage's run, found by its key or created, and follow its metrics file from now on.

        A new attempt of a stage starts it again with the same key and its own metrics file.
        """
        self._stage_keys[name] = key
        self._ask(
            "start_stage",
            name=name,
            key=key,
            params=dict(params),
            tags=dict(tags),
            metrics_path=str(metrics_path.absolute()),
            data=[asdict(each) for each in data],
        )

    def finish_stage(
        self, name: str, *, metrics: Mapping[str, float], status: RunStatus, tags: Mapping[str, str] | None = None
    ) -> None:
        """Deliver the rest of the stage's metrics file, record final metrics at its last step, and end its run."""
        key = self._stage_keys.get(name)
        if key is None:
            logger.warning("MLflow will miss the end of stage %s: it was never started here.", name)
            return
        self._ask("finish_stage", key=key, metrics=dict(metrics), status=status, tags=dict(tags or {}))

    def add_file(self, file: Path) -> None:
        """Put a file, as it is now, among the run's artifacts."""
        try:
            self._ask("artifact", name=self._spool.keep(file))
        except OSError as error:
            self._has_lost_event = True
            logger.warning("MLflow will miss %s: %s", file, error)

    def close(self, *, status: RunStatus, deadline_s: float = 30) -> bool:
        """End the run, and stages that are still open, and wait until all is delivered.

        An MLflow that did not answer the last time is waited for no longer than `FAILING_DEADLINE_S`.

        Returns:
            True if all was delivered. Else a warning has named the spool and what is left in it.
        """
        if self._is_closed:
            return self._is_delivered and not self._has_lost_event
        self._is_closed = True
        self._ask("close", status=status)
        self._closing.set()
        self._wake.set()
        self._thread.join(min(deadline_s, FAILING_DEADLINE_S) if self._is_failing else deadline_s)
        self._abandoned.set()
        if not self._is_delivered:
            _warn_of_backlog(self._spool, self._tracking_uri)
        return self._is_delivered and not self._has_lost_event

    def _ask(self, kind: str, **content: Any) -> None:
        try:
            self._spool.append(kind, **content)
        except OSError as error:
            self._has_lost_event = True
            logger.warning("%s: cannot write (%s). MLflow will miss: %s.", self._spool.directory, error, kind)
        self._wake.set()

    def _run_thread(self) -> None:
        num_failures = 0
        while not self._abandoned.is_set():
            self._wake.clear()
            was_closing = self._closing.is_set()
            error = self._try_to_deliver()
            if error is None and was_closing:
                self._is_delivered = True
                return
            num_failures = num_failures + 1 if error else 0
            self._tell_of_change(error)
            delay_s = POLL_INTERVAL_S if error is None else min(LONGEST_BACKOFF_S, 2.0 ** (num_failures - 1))
            self._pause(delay_s, is_failing=error is not None)

    def _pause(self, delay_s: float, *, is_failing: bool) -> None:
        """Wait for the next delivery: an event ends the wait early, but only closing ends a backoff early."""
        if not is_failing:
            self._wake.wait(delay_s)
        elif self._closing.is_set():
            self._abandoned.wait(min(delay_s, POLL_INTERVAL_S))
        else:
            self._closing.wait(delay_s)

    def _try_to_deliver(self) -> Exception | None:
        try:
            self._progress = self._delivery.deliver()
        except Exception as error:  # noqa: BLE001  the thread's outermost frame: whatever MLflow throws, training goes on
            return error
        return None

    def _tell_of_change(self, error: Exception | None) -> None:
        if error is not None and not self._is_failing:
            logger.warning(
                "MLflow at %s does not take the run's data (%s). It waits in %s and is sent again; training goes on.",
                hide_password(self._tracking_uri),
                _describe(error),
                self._spool.directory,
            )
        elif error is None and self._is_failing:
            logger.info("MLflow at %s takes the run's data again.", hide_password(self._tracking_uri))
        self._is_failing = error is not None


def replay(spool_dir: Path, tracking_uri: str) -> bool:
    """Deliver what is left in a spool, to the same MLflow or to another, which then gets all of it.

    Returns:
        True if all was delivered. Else a warning has said what is left and why.

    Raises:
        ArgumentError: there is no spool in the directory.
    """
    spool = TrackingSpool(spool_dir)
    if not spool.exists():
        raise ArgumentError(f"{spool_dir}: holds no spool of a tracked run (no {EVENTS_FILE} in it). Correct the path.")
    try:
        MlflowDelivery(tracking_uri, spool).deliver()
    except Exception as error:  # noqa: BLE001  MLflow, requests and SQLAlchemy share no base class
        _warn_of_backlog(spool, tracking_uri, reason=_describe(error))
        return False
    return True


def _warn_of_backlog(spool: TrackingSpool, tracking_uri: str, reason: str = "no answer in time") -> None:
    try:
        backlog = spool.count_backlog()
        left = f"{backlog.events} events and {backlog.rows} rows of metrics"
    except OSError as error:
        left = f"Events and rows that cannot be counted ({error})"
    server = hide_password(tracking_uri)
    logger.warning(
        "%s did not get into MLflow at %s (%s). They are kept: internvl replay %s %s",
        left,
        server,
        reason,
        shlex.quote(str(spool.directory)),
        shlex.quote(server),
    )


def _describe(error: Exception) -> str:
    return hide_password(f"{type(error).__name__}: {error}".splitlines()[0])[:300]
