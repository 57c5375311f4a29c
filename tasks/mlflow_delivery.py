"""Carry a tracking spool into MLflow.

Delivery is at least once and idempotent: MLflow keeps one point for equal (metric, step, time,
value), runs are looked for by the tag `internvl.key` before they are created, and params are only
added. So it may be cut anywhere and begun again. Connecting takes seconds, for a new database is
migrated by it: of a run only the tracker's thread should do that.
"""

import json
import logging
import posixpath
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tasks.address import hide_password
from tasks.mlflow_client import connect, ensure_experiment
from tasks.tracking_spool import Progress, StageDelivery, TrackingSpool, read_rows

ARGUMENTS_FILE = "arguments.json"
KEY_TAG = "internvl.key"
PARENT_TAG = "mlflow.parentRunId"
NOT_METRICS = {"step", "time", "max_steps", "eta_s"}
ROWS_PER_BATCH = 100
# MLflow's limits for one log_batch call and for the parts of it.
METRICS_PER_BATCH = 1000
PARAMS_PER_BATCH = 100
PARAM_CHARACTERS = 6000
TAG_CHARACTERS = 5000
NAME_CHARACTERS = 250

logger = logging.getLogger(__name__)


class MlflowDelivery:
    """Deliver one spool to one MLflow, as often as asked. Any exception of MLflow's may come out of `deliver`."""

    def __init__(self, tracking_uri: str, spool: TrackingSpool) -> None:
        self._tracking_uri = tracking_uri
        self._spool = spool
        self._client: Any = None
        self._progress = Progress()
        self._is_verified = False

    def deliver(self) -> Progress:
        """Deliver all that is in the spool and the metrics files now, and return how far that is."""
        self._spool.sync()
        with self._spool.lock():
            self._progress = self._spool.load_progress()
            if self._client is None:
                self._client = connect(self._tracking_uri)
            try:
                self._verify()
                for event, offset in self._spool.iter_events(self._progress.event_offset):
                    self._apply(event)
                    self._progress.event_offset = offset
                    self._spool.save_progress(self._progress)
                for stage in self._progress.stages.values():
                    self._pump(stage)
            except BaseException:
                # Whatever it was, the runs may be gone: look before the next delivery.
                self._is_verified = False
                raise
        return self._progress

    def _verify(self) -> None:
        """Start from zero if the runs of the progress are not in this MLflow: another one, or somebody deleted them."""
        progress = self._progress
        if self._is_verified or progress.run_id is None or progress.experiment_id is None:
            return
        parent = self._find_run(progress.experiment_id, progress.key, parent_id=None)
        query = f"tags.`{PARENT_TAG}` = '{progress.run_id}'"
        children = self._client.search_runs([progress.experiment_id], query, max_results=1000)
        known = {run.info.run_id for run in [parent, *children] if run is not None}
        if not {progress.run_id, *(stage.run_id for stage in progress.stages.values())} <= known:
            self._progress = Progress()
        self._is_verified = True

    def _apply(self, event: Mapping[str, Any]) -> None:
        if self._progress.run_id is None and event["kind"] != "open":
            return  # The disk was too full for the line that opens the run.
        match event["kind"]:
            case "open":
                self._open(event)
            case "start_stage":
                self._start_stage(event)
            case "finish_stage":
                self._finish_stage(event)
            case "artifact":
                assert self._progress.run_id is not None
                self._add_artifact(self._progress.run_id, self._spool.find_kept(event["name"]))
            case "close":
                self._close(event)

    def _open(self, event: Mapping[str, Any]) -> None:
        progress = self._progress
        progress.key = event["key"]
        progress.experiment_id = ensure_experiment(self._client, self._tracking_uri, event["experiment"])
        progress.run_id = self._ensure_run(event, name=event["run_name"], parent_id=None)
        self._is_verified = True

    def _start_stage(self, event: Mapping[str, Any]) -> None:
        stage = self._progress.stages.get(event["key"])
        if stage is not None:
            self._pump(stage)  # The attempt before may have left rows that nobody delivered.
        run_id = self._ensure_run(event, name=event["name"], parent_id=self._progress.run_id)
        if stage is None:
            stage = self._progress.stages[event["key"]] = StageDelivery(event["name"], run_id, None)
        stage.metrics_path = event["metrics_path"]
        self._add_data(run_id, event.get("data", []))
        # Params are cut at 6000 characters, and are strings.
        self._add_artifact(run_id, self._write_arguments(event))

    def _finish_stage(self, event: Mapping[str, Any]) -> None:
        from mlflow.entities import Metric

        stage = self._progress.stages.get(event["key"])
        if stage is None:
            return  # The disk was too full for the line that starts it.
        self._pump(stage)
        step = max(stage.last_steps.values(), default=0)
        metrics = {_clean_name(name): float(value) for name, value in event["metrics"].items()}
        changed = {name: value for name, value in metrics.items() if stage.final_metrics.get(name) != value}
        points = [Metric(name, value, _milliseconds(event), step) for name, value in changed.items()]
        self._log(stage.run_id, metrics=points, tags=event["tags"])
        stage.final_metrics.update(changed)
        self._end_stage(stage, event)

    def _close(self, event: Mapping[str, Any]) -> None:
        for stage in self._progress.stages.values():
            if stage.metrics_path is not None:
                self._pump(stage)
                self._end_stage(stage, event)
        self._client.set_terminated(self._progress.run_id, event["status"], _milliseconds(event))

    def _end_stage(self, stage: StageDelivery, event: Mapping[str, Any]) -> None:
        self._client.set_terminated(stage.run_id, event["status"], _milliseconds(event))
        stage.metrics_path = None

    def _pump(self, stage: StageDelivery) -> None:
        """Deliver the complete rows of the stage's metrics file, and remember each batch."""
        if stage.metrics_path is None:
            return
        while True:
            offset = stage.offsets.get(stage.metrics_path, 0)
            rows, end = read_rows(Path(stage.metrics_path), offset, max_rows=ROWS_PER_BATCH)
            if end == offset:
                return
            self._log(stage.run_id, metrics=_build_points(rows, stage.last_steps))
            stage.offsets[stage.metrics_path] = end
            self._spool.save_progress(self._progress)

    def _ensure_run(self, event: Mapping[str, Any], *, name: str, parent_id: str | None) -> str:
        """Find the run of this key, or create it; add the params it does not have yet."""
        experiment_id = self._progress.experiment_id
        assert experiment_id is not None, "an open event precedes every other"
        tags = {KEY_TAG: _clean_key(event["key"])} | ({PARENT_TAG: parent_id} if parent_id else {})
        run = self._find_run(experiment_id, event["key"], parent_id=parent_id)
        if run is None:
            run = self._client.create_run(experiment_id, start_time=_milliseconds(event), run_name=name, tags=tags)
        else:
            self._client.update_run(run.info.run_id, status="RUNNING")
        params = {_clean_name(key): str(value)[:PARAM_CHARACTERS] for key, value in event["params"].items()}
        missing = {key: value for key, value in params.items() if key not in run.data.params}
        self._log(run.info.run_id, params=missing, tags=event["tags"])
        return str(run.info.run_id)

    def _add_data(self, run_id: str, data: Iterable[Mapping[str, str]]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        inputs = [
            DatasetInput(
                # Its digest is short: MLflow has 36 characters for one.
                Dataset(each["name"][:500], each["digest"][:36], "local", json.dumps({"uri": each["source"]})),
                [InputTag("mlflow.data.context", each["context"])],
            )
            for each in data
        ]
        if inputs:
            self._client.log_inputs(run_id, datasets=inputs)

    def _write_arguments(self, event: Mapping[str, Any]) -> Path:
        path = self._spool.find_kept(event["key"]) / ARGUMENTS_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(event["params"], indent=2, sort_keys=True) + "\n")
        return path

    def _add_artifact(self, run_id: str, file: Path) -> None:
        """Send a file, the metrics first; artifacts may lie on another server, whose refusal costs the file alone.

        There are few: one a stage and the report. Metrics that come while one is sent wait for it.
        """
        for stage in self._progress.stages.values():
            self._pump(stage)
        try:
            self._client.log_artifact(run_id, str(file))
        except Exception as error:  # noqa: BLE001  of MLflow, of an SDK of a store, of the file system
            refusal = hide_password(f"{type(error).__name__}: {error}")
        else:
            return
        # Raises if it is MLflow that does not answer: then the file is sent again with all that follows.
        self._client.get_run(run_id)
        logger.warning("MLflow has not got %s: %s", file, refusal)

    def _find_run(self, experiment_id: str, key: str, *, parent_id: str | None) -> Any:
        query = f"tags.`{KEY_TAG}` = '{_clean_key(key)}'"
        if parent_id is not None:
            query += f" and tags.`{PARENT_TAG}` = '{parent_id}'"
        oldest_first = ["attributes.start_time ASC"]
        found = self._client.search_runs([experiment_id], query, max_results=1, order_by=oldest_first)
        return found[0] if found else None

    def _log(
        self,
        run_id: str,
        *,
        metrics: Iterable[Any] = (),
        params: Mapping[str, str] | None = None,
        tags: Mapping[str, Any] | None = None,
    ) -> None:
        from mlflow.entities import Param, RunTag

        for points in _cut(list(metrics), METRICS_PER_BATCH):
            self._client.log_batch(run_id, metrics=points)
        for some in _cut([Param(key, value) for key, value in (params or {}).items()], PARAMS_PER_BATCH):
            self._client.log_batch(run_id, params=some)
        for some in _cut(
            [RunTag(_clean_name(key), str(value)[:TAG_CHARACTERS]) for key, value in (tags or {}).items()],
            PARAMS_PER_BATCH,
        ):
            self._client.log_batch(run_id, tags=some)


def build_run_url(tracking_uri: str, experiment_id: str, run_id: str) -> str | None:
    """Build the page of a run on a tracking server, without credentials; None where there is no server."""
    parts = urlsplit(tracking_uri)
    if parts.scheme not in ("http", "https"):
        return None
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}{parts.path.rstrip('/')}/#/experiments/{experiment_id}/runs/{run_id}"


def _build_points(rows: Iterable[Mapping[str, Any]], last_steps: dict[str, int]) -> list[Any]:
    """Build the points of the rows, leaving out steps that a metric has already, and note the new last steps."""
    from mlflow.entities import Metric

    points = []
    for row in rows:
        step = int(row["step"])
        for key, value in row.items():
            name = _clean_name(key)
            if key in NOT_METRICS or isinstance(value, bool) or not isinstance(value, (int, float)):
                continue
            if step > last_steps.get(name, -1):
                points.append(Metric(name, float(value), _milliseconds(row), step))
                last_steps[name] = step
    return points


def _clean_name(name: str) -> str:
    """Make a valid MLflow name: no odd characters, and a plain relative path."""
    path = posixpath.normpath(re.sub(r"[^\w\-. :/]", "_", name))
    return path.lstrip("/.")[:NAME_CHARACTERS].rstrip("/") or "_"


def _clean_key(key: str) -> str:
    """Make a key that can stand between the quotes of a search."""
    return re.sub(r"['\"`\\]", "_", key)


def _milliseconds(stamped: Mapping[str, Any]) -> int:
    return int(stamped["time"] * 1000)


def _cut(items: list[Any], size: int) -> Iterator[list[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))
