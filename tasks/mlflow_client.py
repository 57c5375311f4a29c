"""MLflow's client: imported late, quiet, with short patience."""

import logging
import os
import threading
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

# MLflow's own defaults block one call for 247 s when the server refuses, 1208 s when it hangs.
_SETTINGS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


def start_mlflow_import() -> None:
    """Begin to import MLflow in a thread, which spares whoever connects later some of the wait.

    It creates nothing, and the interpreter's end waits for it, so a run that is refused meanwhile ends cleanly.
    """

    def work() -> None:
        with suppress(Exception):  # Whoever connects meets the same error, and tells of it.
            _import_mlflow()

    threading.Thread(target=work, name="mlflow-import").start()


def connect(tracking_uri: str) -> Any:
    """Import MLflow, which takes seconds, and build its client. A missing database is created."""
    client = _import_mlflow()
    database = find_database(tracking_uri)
    if database is not None:
        database.parent.mkdir(parents=True, exist_ok=True)
    return client(tracking_uri=tracking_uri)


def _import_mlflow() -> Any:
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    # mlflow 3.17 with SQLAlchemy 2.1: a deprecation warning about `noload` at import.
    warnings.filterwarnings("ignore", module=r"mlflow\.")
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # It would say each refused connection, of which the tracker speaks once.
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
    return MlflowClient


def find_database(tracking_uri: str) -> Path | None:
    """Find the file of an SQLite tracking URI; None for a server."""
    prefix = "sqlite:///"
    if not tracking_uri.startswith(prefix):
        return None
    return Path(tracking_uri.removeprefix(prefix).partition("?")[0]).absolute()


def ensure_experiment(client: Any, tracking_uri: str, name: str) -> str:
    """Find the experiment of a name, or create it; returns its id."""
    found = client.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    database = find_database(tracking_uri)
    # Without a place beside the database, artifacts would go to the working directory.
    artifacts = (database.parent / "artifacts").as_uri() if database else None
    return str(client.create_experiment(name, artifact_location=artifacts))
