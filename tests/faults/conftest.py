"""A stage in a store of files, and in one on S3."""

from collections.abc import Callable
from pathlib import Path

import pytest
from stage_store import (
    FINGERPRINT,
    write_files,
)
from store_writer import STAGE, make_contents

from internvl_core.checkpoint.manifest import CheckpointKind
from internvl_core.checkpoint.store import StageStore
from internvl_core.contract import CheckpointRef

Publish = Callable[..., CheckpointRef]


@pytest.fixture(params=["file", "s3"])
def store_uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"file://{tmp_path}/store" if request.param == "file" else str(request.getfixturevalue("s3_bucket_uri"))


@pytest.fixture
def store(store_uri: str) -> StageStore:
    return StageStore(store_uri, STAGE, FINGERPRINT)


@pytest.fixture
def publish(store: StageStore, tmp_path: Path) -> Publish:
    def publish(step: int, fence: int, kind: CheckpointKind = CheckpointKind.TRAINING) -> CheckpointRef:
        directory = write_files(tmp_path / f"{step}-{fence}-{kind}", make_contents(step))
        return store.publish(directory, step=step, fence=fence, kind=kind, parent=None, info={})

    return publish
