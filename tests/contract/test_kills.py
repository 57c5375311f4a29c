"""SIGKILL at any time, on real stores: nothing acknowledged is lost, nothing half-written is read, nothing leaks."""

import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from stage_store import FINGERPRINT, list_objects, read_files
from store_writer import STAGE, make_contents

from internvl_core.checkpoint.store import StageStore, fetch

WRITER = Path(__file__).parent / "store_writer.py"
START_LIMIT_S = 120.0


def kill_writer(store_uri: str, chance: random.Random) -> list[int]:
    """Start a writer, kill it at a random time, and return the steps that it was told are committed."""
    lines: list[str] = []
    # Some die while they take the lease, most at some moment of their first saves, however slow the machine is.
    num_lines = chance.choice((0, 1, 1, 2, 2, 3))
    has_come_far = threading.Event()

    with subprocess.Popen([sys.executable, str(WRITER), store_uri], stdout=subprocess.PIPE, text=True) as process:

        def listen() -> None:
            assert process.stdout is not None
            for line in process.stdout:
                lines.append(line)
                if len(lines) == num_lines:
                    has_come_far.set()
            has_come_far.set()

        listener = threading.Thread(target=listen)
        listener.start()
        if num_lines:
            assert has_come_far.wait(START_LIMIT_S)
        time.sleep(chance.uniform(0, 1.0))
        process.kill()
        listener.join()
    assert process.returncode == -9, f"it was not killed, but ended with {process.returncode}"
    return [int(line.split()[1]) for line in lines if line.startswith("acknowledged") and line.endswith("\n")]


def check_kills(store_uri: str, tmp_path: Path, *, num_kills: int, seed: int) -> None:
    chance = random.Random(seed)
    store = StageStore(store_uri, STAGE, FINGERPRINT)
    acknowledged: list[int] = []
    for number in range(num_kills):
        acknowledged += kill_writer(store_uri, chance)
        check_newest(store, acknowledged, tmp_path / str(number), f"kill {number}, --fault-seed={seed}")
    subprocess.run([sys.executable, str(WRITER), store_uri, "--steps", "2"], check=True)
    print(f"{num_kills} kills, {len(acknowledged)} commits acknowledged")
    check_no_leak(store)


def check_newest(store: StageStore, acknowledged: list[int], cache_dir: Path, where: str) -> None:
    newest = next(iter(store.list_committed()), None)
    assert (newest.step if newest else 0) >= max(acknowledged, default=0), where
    if newest:
        assert read_files(fetch(newest.checkpoint, cache_dir)) == make_contents(newest.step), where


def check_no_leak(store: StageStore) -> None:
    commits = store.list_committed(include_dead=True)
    objects = list_objects(store)
    assert len(commits) == 2
    expected = {commit.checkpoint.uri.rpartition("/")[2] for commit in commits}
    assert {name.split("/")[1] for name in objects if name.startswith("data/")} == expected
    assert {name.rpartition(".")[2] for name in objects if name.startswith("lease/")} == {"json", "beat"}
    assert not [name for name in objects if "/." in name and not name.startswith("lease/")]


@pytest.mark.fault(
    32,
    "writers to files are killed at any time",
    how="SIGKILL at drawn moments, 60 times",
    then="nothing acknowledged is lost, nothing half-written is read, nothing leaks",
)
@pytest.mark.integration
def test_a_few_kills_of_writers_to_files_lose_nothing(tmp_path: Path, sample_seed: int) -> None:
    check_kills(f"file://{tmp_path}/store", tmp_path, num_kills=6, seed=sample_seed)


@pytest.mark.fault(
    32,
    "writers to S3 are killed at any time",
    how="SIGKILL at drawn moments, 40 times",
    then="nothing acknowledged is lost, nothing half-written is read, nothing leaks",
)
@pytest.mark.integration
def test_a_few_kills_of_writers_to_s3_lose_nothing(s3_bucket_uri: str, tmp_path: Path, sample_seed: int) -> None:
    check_kills(s3_bucket_uri, tmp_path, num_kills=3, seed=sample_seed)


@pytest.mark.slow
@pytest.mark.integration
def test_kills_of_writers_to_files_lose_nothing(tmp_path: Path, sample_seed: int) -> None:
    check_kills(f"file://{tmp_path}/store", tmp_path, num_kills=60, seed=sample_seed)


@pytest.mark.slow
@pytest.mark.integration
def test_kills_of_writers_to_s3_lose_nothing(s3_bucket_uri: str, tmp_path: Path, sample_seed: int) -> None:
    check_kills(s3_bucket_uri, tmp_path, num_kills=40, seed=sample_seed)
