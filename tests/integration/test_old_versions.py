"""Which versions of a model stay, with a real registry and real checkpoints."""

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from prefect.settings import PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW, temporary_settings
from prefect.testing.utilities import prefect_test_harness

from internvl_core.checkpoint.base_model import BASE_FILE
from internvl_core.checkpoint.manifest import CheckpointKind
from internvl_core.checkpoint.store import Owner, StageStore, read_manifest
from internvl_core.contract import CheckpointRef
from tasks.mlflow_client import connect
from tasks.model_registry import ModelRegistry, ModelVersion
from tasks.remove_old_versions import remove_old_versions

pytestmark = pytest.mark.integration

Add = Callable[..., ModelVersion]


@pytest.fixture(scope="module", autouse=True)
def prefect() -> Iterator[None]:
    quiet = temporary_settings({PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW: "ignore"})
    with prefect_test_harness(server_startup_timeout=120), quiet:
        yield


@pytest.fixture(scope="module")
def tracking_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


@pytest.fixture
def registry(tracking_uri: str, request: pytest.FixtureRequest) -> ModelRegistry:
    return ModelRegistry(tracking_uri, request.node.name)


@pytest.fixture
def store_uri(tmp_path: Path) -> str:
    return f"file://{tmp_path}/store"


@pytest.fixture
def add(registry: ModelRegistry, store_uri: str, tmp_path: Path) -> Add:
    """Publish a checkpoint, an adapter over another one if that is given, and register it.

    With `inputs` of an earlier one it is of the same stage, trained afresh.
    """

    def add(
        name: str, *, base: CheckpointRef | None = None, store: str = store_uri, inputs: str | None = None
    ) -> ModelVersion:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "weights").write_text(name)
        if base is not None:
            (folder / BASE_FILE).write_text(json.dumps({"uri": base.uri, "digest": base.digest}))
        stage = StageStore(store, "finetune", hashlib.sha256((inputs or name).encode()).hexdigest())
        lease = stage.acquire(Owner.of_this_process("run"), choose_base=lambda _: None)
        final = stage.publish(folder, step=1, fence=lease.fence, kind=CheckpointKind.FINAL, parent=None, info={})
        lease.release()
        return registry.add_version((final,), experiment="nightly", run_id=None, tags={})

    return add


@pytest.fixture
def remove(registry: ModelRegistry, store_uri: str, tmp_path: Path) -> Callable[..., list[int]]:
    def remove(keep_last: int, *protected: int) -> list[int]:
        return remove_old_versions(
            registry,
            keep_last=keep_last,
            protected=set(protected),
            store_uri=store_uri,
            cache_dir=tmp_path / "cache",
            run_id="nightly",
        )

    return remove


def is_committed(version: ModelVersion) -> bool:
    store_uri, name, *_ = version.checkpoint.uri.rsplit("/", 3)
    return bool(StageStore(store_uri, *name.split("-")).list_committed())


def test_the_last_ones_stay_with_their_checkpoints(
    registry: ModelRegistry, add: Add, remove: Callable[..., list[int]], tmp_path: Path
) -> None:
    first, second, third = (add(name) for name in ("first", "second", "third"))
    cached = tmp_path / "cache" / first.checkpoint.digest[:16]
    cached.mkdir(parents=True)
    assert remove(2) == [1]
    assert [version.number for version in registry.list_versions()] == [3, 2]
    assert [is_committed(version) for version in (first, second, third)] == [False, True, True]
    assert not cached.exists()
    assert remove(2) == []


def test_whatever_has_an_alias_or_is_protected_stays(
    registry: ModelRegistry, tracking_uri: str, add: Add, remove: Callable[..., list[int]]
) -> None:
    versions = [add(name) for name in ("champion", "production", "dethroned", "old", "last")]
    registry.promote(versions[0])
    connect(tracking_uri).set_registered_model_alias(registry.name, "production", "2")
    assert remove(1, 3) == [4]
    assert [is_committed(version) for version in versions] == [True, True, True, False, True]


def test_what_adapters_that_stay_were_trained_over_stays(add: Add, remove: Callable[..., list[int]]) -> None:
    base = add("base")
    between = add("between", base=base.checkpoint)
    add("unrelated")
    add("adapter", base=between.checkpoint)
    assert remove(1) == [3]
    assert is_committed(base)
    assert is_committed(between)


def test_what_shares_the_directory_of_one_that_stays_or_of_its_base_stays(
    registry: ModelRegistry, add: Add, remove: Callable[..., list[int]]
) -> None:
    add("champion")
    again = add("again", inputs="champion")
    add("base")
    base = add("base again", inputs="base")
    registry.promote(again)
    add("adapter", base=base.checkpoint)
    assert remove(1) == []
    assert read_manifest(again.checkpoint).step == 1
    assert read_manifest(base.checkpoint).step == 1
    add("next")
    add("next again", inputs="next")
    # Both of a directory go when neither is needed.
    add("last")
    assert remove(1) == [7, 6, 5, 4, 3]
    assert read_manifest(again.checkpoint).step == 1


def test_what_a_person_pinned_and_what_lies_elsewhere_stays(
    registry: ModelRegistry, add: Add, remove: Callable[..., list[int]], tmp_path: Path
) -> None:
    pinned = add("pinned")
    store_uri, name, *_ = pinned.checkpoint.uri.rsplit("/", 3)
    StageStore(store_uri, *name.split("-")).pin("paper", pinned.checkpoint)
    elsewhere = add("elsewhere", store=f"file://{tmp_path}/other")
    add("last")
    assert remove(1) == []
    assert is_committed(pinned)
    assert is_committed(elsewhere)
    assert len(registry.list_versions()) == 3


def test_nothing_goes_while_it_is_not_known_what_is_needed(
    add: Add, remove: Callable[..., list[int]], tmp_path: Path
) -> None:
    add("old")
    lost = CheckpointRef(f"file://{tmp_path}/store/finetune-{0:016x}/data/000000000001.000001.00000000", "0" * 64)
    add("adapter", base=lost)
    assert remove(1) == []


def test_versions_that_somebody_else_registered_are_not_seen(
    registry: ModelRegistry, tracking_uri: str, add: Add, remove: Callable[..., list[int]]
) -> None:
    add("ours")
    connect(tracking_uri).create_model_version(registry.name, source="s3://bucket/theirs")
    add("last")
    assert remove(1) == [1]
    numbers = [version.version for version in connect(tracking_uri).search_model_versions(f"name='{registry.name}'")]
    assert sorted(map(int, numbers)) == [2, 3]
