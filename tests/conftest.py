"""Fixtures that more than one kind of test needs."""

import os
import random
import secrets
import shutil
import signal
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import hypothesis
import pytest
from supervised import DEADLINE_S, FAKES, MARK, SupervisedAttempt

from internvl_core.supervision.watchdog import Limits
from tasks.launch import RunningStage, launch_command

# Before any test imports Prefect, which makes its home then: neither the user's nor that of the last run.
PREFECT_HOME = tempfile.mkdtemp(prefix="internvl-tests-")
os.environ["PREFECT_HOME"] = PREFECT_HOME


# Drawn once for all processes of pytest-xdist, which must collect the same tests.
FAULT_SEED = "INTERNVL_TEST_FAULT_SEED"
os.environ.setdefault(FAULT_SEED, str(secrets.randbelow(10_000)))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fault-sample", type=int, metavar="N", help="run only so many of those in tests/faults")
    parser.addoption(
        "--fault-seed", type=int, default=int(os.environ[FAULT_SEED]), help="of that draw and other samples"
    )


def pytest_report_header(config: pytest.Config) -> str:
    size, seed = config.getoption("--fault-sample"), config.getoption("--fault-seed")
    if size is None:
        return f"samples: again the same with --fault-seed={seed}"
    return f"faults: {size} drawn; again the same: --fault-sample={size} --fault-seed={seed}"


@pytest.fixture
def sample_seed(pytestconfig: pytest.Config) -> int:
    """Give what a test may draw a sample of its cases with; the head of the run tells it."""
    return int(pytestconfig.getoption("--fault-seed"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    size = config.getoption("--fault-sample")
    # Faults are tested elsewhere too: those tests always run.
    faults = [item for item in items if item.get_closest_marker("fault") and item.path.parent.name == "faults"]
    if size is None or len(faults) <= size:
        return
    drawn = set(random.Random(config.getoption("--fault-seed")).sample(faults, size))
    left_out = set(faults) - drawn
    config.hook.pytest_deselected(items=list(left_out))
    items[:] = [item for item in items if item not in left_out]


def pytest_unconfigure() -> None:
    shutil.rmtree(PREFECT_HOME, ignore_errors=True)


# What a property says does not depend on how busy the machine is.
hypothesis.settings.register_profile(
    "machine independent", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("machine independent")


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """Run a real S3 server on a free port of this machine and point every SDK of the session at it.

    It starts empty. Child processes find it too: the address and the credentials are in the environment.
    """
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("AWS_ENDPOINT_URL", endpoint)
        environment.setenv("AWS_ACCESS_KEY_ID", "testing")
        environment.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        environment.setenv("AWS_DEFAULT_REGION", "us-east-1")
        yield endpoint
    server.stop()


@pytest.fixture
def s3_bucket_uri(s3_endpoint: str) -> str:
    """Make an empty bucket: `s3://...`."""
    bucket = f"runs-{uuid.uuid4().hex}"
    fsspec.filesystem("s3", endpoint_url=s3_endpoint).mkdir(bucket)
    return f"s3://{bucket}"


@pytest.fixture
def attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SupervisedAttempt]:
    mark = uuid.uuid4().hex
    monkeypatch.setenv(MARK, mark)
    monkeypatch.setenv("PYTHONPATH", str(FAKES.parents[2]))
    attempt = SupervisedAttempt(tmp_path, mark)
    yield attempt
    for pid in attempt.find_processes():
        os.kill(pid, signal.SIGKILL)


@pytest.fixture
def launch(attempt: SupervisedAttempt) -> Iterator[Callable[..., RunningStage]]:
    """Launch a command in the attempt; what still runs at the end of the test is stopped."""
    launched: list[RunningStage] = []

    def launch(
        *command: object,
        save_budget_s: float = DEADLINE_S,
        setup_limit_s: float = 10 * DEADLINE_S,
        stall_limit_s: float = 10 * DEADLINE_S,
        leave_after_s: float | None = None,
    ) -> RunningStage:
        limits = Limits(setup_s=setup_limit_s, stall_s=stall_limit_s, save_s=save_budget_s)
        words = [str(item) for item in command]
        running = launch_command(words, attempt.directory, limits, leave_after_s=leave_after_s)
        launched.append(running)
        return running

    yield launch
    for running in launched:
        running.ask_to_stop()
        running.process.kill()
        running.process.wait()


@pytest.fixture
def start_attempt(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Start attempts of a stage (upload_attempts.py); all are closed at the end."""
    from upload_attempts import Attempt

    started: list[Attempt] = []

    def start(store_uri: str, **options: object) -> Attempt:
        attempt = Attempt(tmp_path, store_uri, **options)
        started.append(attempt)
        return attempt

    yield start
    for attempt in started:
        attempt.commits.close()


@pytest.fixture
def far_store(s3_endpoint: str) -> Iterator[Any]:
    """Put a proxy between uploaders and the S3 server."""
    from tcp_proxy import TcpProxy

    with TcpProxy(s3_endpoint) as proxy:
        yield proxy
