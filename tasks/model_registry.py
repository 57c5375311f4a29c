"""A registered model in MLflow: a version for every candidate, an alias for the champion.

The weights stay in the store. A version names its checkpoint by tags, and has a logged model as its
source: MLflow's server refuses a folder of its own machine as one. Versions that somebody else
registered are not seen.
"""

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Self

from internvl_core.contract import CheckpointRef
from internvl_core.errors import ArgumentError, StoreUnavailable
from tasks.address import hide_password
from tasks.mlflow_client import connect, ensure_experiment

CHAMPION = "champion"

_URI_TAG = "internvl.checkpoint"
_DIGEST_TAG = "internvl.checkpoint_digest"
_STAGES_TAG = "internvl.stages"
_JUDGED_TAG = "internvl.last_judged"
_KIND = "internvl"
_SOURCE = "models:/"
_UNKNOWN = {"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"}
"""What MLflow answers about an alias that is not set, and about a model that is not registered."""
_REFUSALS = {
    *("BAD_REQUEST", "INVALID_PARAMETER_VALUE", "INVALID_STATE", "RESOURCE_ALREADY_EXISTS", "RESOURCE_DOES_NOT_EXIST"),
    *("PERMISSION_DENIED", "UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED", "ENDPOINT_NOT_FOUND", "NOT_FOUND"),
}
"""Answers that are the same however often one asks."""
_TRACKING_VARIABLE = "MLFLOW_TRACKING_URI"


@dataclass(frozen=True)
class ModelVersion:
    """A candidate that was registered."""

    number: int
    checkpoint: CheckpointRef
    stages: tuple[CheckpointRef, ...]
    """Final weights of all stages that it was trained in, its own the last."""
    tags: Mapping[str, str]

    @classmethod
    def from_mlflow(cls, version: Any) -> Self | None:
        """Read MLflow's; None of one that is not ours."""
        tags = dict(version.tags)
        try:
            stages = tuple(CheckpointRef(**each) for each in json.loads(tags[_STAGES_TAG]))
            return cls(int(version.version), CheckpointRef(tags[_URI_TAG], tags[_DIGEST_TAG]), stages, tags)
        except (KeyError, ValueError, TypeError):
            return None


@dataclass(frozen=True)
class Judged:
    """The last candidate that was compared with a champion."""

    inputs: str
    """Digest of what it was trained with."""
    version: int
    time_s: float
    """Since the epoch."""


class ModelRegistry:
    """The versions of one registered model.

    Every method asks MLflow: StoreUnavailable says that it does not answer, ArgumentError that it refuses.
    """

    def __init__(self, tracking_uri: str, name: str) -> None:
        """Ask nothing yet.

        Args:
            tracking_uri: of MLflow, which has the registry too.
            name: of the registered model; made with its first version.
        """
        self._tracking_uri = tracking_uri
        self._name = name
        self._client: Any = None

    @property
    def name(self) -> str:
        return self._name

    def find_champion(self) -> ModelVersion | None:
        """Find the version that has the alias; None: there is none yet."""
        with self._asking() as client:
            from mlflow.exceptions import MlflowException

            try:
                found = client.get_model_version_by_alias(self._name, CHAMPION)
            except MlflowException as error:
                if error.error_code in _UNKNOWN:
                    return None
                raise
        champion = ModelVersion.from_mlflow(found)
        if champion is None:
            raise ArgumentError(
                f"registered model {self._name}: version {found.version}, the {CHAMPION}, names no checkpoint of ours. "
                "Set the alias to another version, or remove it."
            )
        return champion

    def list_versions(self) -> list[ModelVersion]:
        """List those that are ours, the newest first."""
        with self._asking() as client:
            found = client.search_model_versions(f"name='{self._name}'", max_results=1000)
        ours = (version for each in found if (version := ModelVersion.from_mlflow(each)) is not None)
        return sorted(ours, key=lambda version: version.number, reverse=True)

    def list_aliased(self) -> set[int]:
        """List the versions that somebody gave an alias."""
        with self._asking() as client:
            return {int(number) for number in client.get_registered_model(self._name).aliases.values()}

    def find_last_judged(self) -> Judged | None:
        """Find what `note_judged` was told last."""
        with self._asking() as client:
            from mlflow.exceptions import MlflowException

            try:
                tags = client.get_registered_model(self._name).tags
            except MlflowException as error:
                if error.error_code in _UNKNOWN:
                    return None
                raise
        try:
            return Judged(**json.loads(tags[_JUDGED_TAG]))
        except (KeyError, ValueError, TypeError):
            return None

    def add_version(
        self, stages: tuple[CheckpointRef, ...], *, experiment: str, run_id: str | None, tags: Mapping[str, str]
    ) -> ModelVersion:
        """Register the last of these checkpoints; one that is registered already keeps its number and gets the tags.

        Args:
            stages: final weights of all stages that it was trained in.
            experiment: of MLflow, where the logged model is shown.
            run_id: of the MLflow run that trained it; None: not known.
            tags: more of it.
        """
        checkpoint = stages[-1]
        own = {
            _URI_TAG: checkpoint.uri,
            _DIGEST_TAG: checkpoint.digest,
            _STAGES_TAG: json.dumps([asdict(stage) for stage in stages]),
        }
        known = next((each for each in self.list_versions() if each.checkpoint == checkpoint), None)
        with self._asking() as client:
            if known is None:
                return self._create(client, checkpoint, {**tags, **own}, experiment=experiment, run_id=run_id)
            for key, value in tags.items():
                client.set_model_version_tag(self._name, str(known.number), key, value)
        return known

    def promote(self, version: ModelVersion) -> None:
        """Make a version the champion."""
        with self._asking() as client:
            client.set_registered_model_alias(self._name, CHAMPION, str(version.number))

    def note_judged(self, version: ModelVersion, inputs: str) -> None:
        """Note that all is done with what was trained on these inputs."""
        judged = Judged(inputs, version.number, time.time())
        with self._asking() as client:
            client.set_registered_model_tag(self._name, _JUDGED_TAG, json.dumps(asdict(judged)))

    def remove(self, version: ModelVersion) -> None:
        """Remove a version; its checkpoint stays where it is."""
        with self._asking() as client:
            source = client.get_model_version(self._name, str(version.number)).source
            client.delete_model_version(self._name, str(version.number))
            client.delete_logged_model(source.removeprefix(_SOURCE))

    def _create(
        self, client: Any, checkpoint: CheckpointRef, tags: dict[str, str], *, experiment: str, run_id: str | None
    ) -> ModelVersion:
        from mlflow.exceptions import MlflowException

        try:
            client.create_registered_model(self._name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        experiment_id = ensure_experiment(client, self._tracking_uri, experiment)
        # MLflow allows no dots.
        name = checkpoint.uri.rpartition("/")[2].replace(".", "-")
        model = client.create_logged_model(
            experiment_id, name=name, source_run_id=run_id, tags={_URI_TAG: checkpoint.uri}, model_type=_KIND
        )
        client.finalize_logged_model(model.model_id, "READY")
        source = f"{_SOURCE}{model.model_id}"
        with _as_default(self._tracking_uri):
            created = client.create_model_version(
                self._name, source=source, run_id=run_id, model_id=model.model_id, tags=tags, await_creation_for=0
            )
        version = ModelVersion.from_mlflow(created)
        assert version is not None
        return version

    @contextmanager
    def _asking(self) -> Iterator[Any]:
        from mlflow.exceptions import MlflowException
        from requests.exceptions import RequestException
        from sqlalchemy.exc import SQLAlchemyError

        try:
            if self._client is None:
                self._client = connect(self._tracking_uri)
            yield self._client
        except (MlflowException, RequestException, SQLAlchemyError, OSError) as error:
            where = f"MLflow at {hide_password(self._tracking_uri)}, registered model {self._name}"
            told = hide_password(str(error).partition("\n")[0])[:300].rstrip(".")
            if isinstance(error, MlflowException) and error.error_code in _REFUSALS:
                raise ArgumentError(f"{where}: {told}. Mend it there.") from error
            raise StoreUnavailable(f"{where}: no answer: {told}. Start it, or correct tracking_uri.") from error


@contextmanager
def _as_default(tracking_uri: str) -> Iterator[None]:
    """Have MLflow look logged models up there, whatever its client was given; and only so long."""
    import mlflow

    before = os.environ.get(_TRACKING_VARIABLE)
    mlflow.set_tracking_uri(tracking_uri)
    try:
        yield
    finally:
        # It sets the variable too, from which recipes take theirs.
        mlflow.set_tracking_uri(before or "")
        os.environ.pop(_TRACKING_VARIABLE, None)
        if before is not None:
            os.environ[_TRACKING_VARIABLE] = before
