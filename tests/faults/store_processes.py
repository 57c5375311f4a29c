"""Writers of a store that live, die at a given operation, and are listened to."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import store_writer
from stage_store import (
    list_objects,
    read_files,
)
from store_writer import make_contents

from internvl_core.checkpoint.store import StageStore, fetch
from internvl_core.errors import CheckpointCorrupt

START_LIMIT_S = 120.0


def run_writer(store_uri: str, *options: str, **environment: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, store_writer.__file__, store_uri, *options],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
    )


@contextmanager
def living_writer(store_uri: str, *options: str, **environment: str) -> Iterator["subprocess.Popen[str]"]:
    """A writer that is at work; killed afterwards if it is still there."""
    with run_writer(store_uri, *options, **environment) as process:
        try:
            await_line(process, "acknowledged")
            yield process
        finally:
            process.kill()


def await_line(process: "subprocess.Popen[str]", start: str) -> str:
    """Read what a writer says up to a line that begins so; its death ends the wait."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(start):
            return line
    raise AssertionError(f"the writer ended with {process.wait()} before it said {start!r}")


def kill_at(store_uri: str, operation: str, *options: str) -> list[int]:
    """Let a writer run into its death at an operation; returns the steps that it was told are committed."""
    with run_writer(store_uri, "--die-at", operation, *options) as process:
        output, _ = process.communicate(timeout=START_LIMIT_S)
    assert process.returncode == -signal.SIGKILL, output
    return [int(line.split()[1]) for line in output.splitlines() if line.startswith("acknowledged")]


def read_newest(store: StageStore, cache_dir: Path) -> int | None:
    """Fetch the newest live commit that verifies in full, and compare it with what its step should be."""
    for commit in store.list_committed():
        try:
            found = read_files(fetch(commit.checkpoint, cache_dir))
        except CheckpointCorrupt:
            continue
        assert found == make_contents(commit.step)
        return commit.step
    return None


def list_saves(store: StageStore) -> set[str]:
    return {name.split("/")[1] for name in list_objects(store) if name.startswith("data/")}
