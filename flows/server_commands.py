"""`internvl up`, `internvl deploy`: servers of one's own, and our flows on a Prefect server."""

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from flows.deployments import DEFAULT_FILE, register
from flows.left_runs import LeftRuns
from flows.live_runs import LiveRuns
from flows.local_services import (
    HOST,
    POOL,
    LocalServices,
    build_environment,
    check_ports,
    count_signals,
    describe_mlflow,
    describe_prefect,
    describe_worker,
    hold_directory,
)
from internvl_core.errors import ArgumentError, InternVLError

_POLL_S = 0.5
_LOST_POLL_S = 10.0
_LEFT_POLL_S = 2.0


def up(
    directory: Annotated[Path, typer.Option(help="Databases and logs of the servers.")] = Path("runs/servers"),
    prefect_port: Annotated[int, typer.Option(help="Of the Prefect server and its UI.")] = 4200,
    mlflow_port: Annotated[int, typer.Option(help="Of the MLflow server and its UI.")] = 5000,
    file: Annotated[Path, typer.Option(help="The deployments to register.")] = DEFAULT_FILE,
) -> None:
    """Start a Prefect server, MLflow and a worker here, with the deployments; Ctrl-C ends them all."""
    check_ports({"--prefect-port": prefect_port, "--mlflow-port": mlflow_port})
    directory = directory.absolute()
    services = LocalServices(directory)
    # SIGHUP: the terminal was closed.
    with hold_directory(directory), count_signals((signal.SIGINT, signal.SIGTERM, signal.SIGHUP)) as count:
        try:
            _tell(f"Starting a Prefect server, MLflow and a worker; logs in {directory}")
            _serve(services, directory, prefect_port, mlflow_port, file, count)
        except KeyboardInterrupt:
            _tell("Stopping when the servers have made their databases.")
            raise
        finally:
            services.stop()
    _tell("Stopped.")


def _serve(
    services: LocalServices,
    directory: Path,
    prefect_port: int,
    mlflow_port: int,
    file: Path,
    count: Callable[[], int],
) -> None:
    """Start all, and keep it until a signal; the runs of the worker are stopped, whatever ends this.

    Raises:
        KeyboardInterrupt: the signal came before all were up.
        InternVLError: one of them does not start, or ends again and again.
    """
    prefect_url, mlflow_url = f"http://{HOST}:{prefect_port}", f"http://{HOST}:{mlflow_port}"
    api_url = f"{prefect_url}/api"
    prefect, mlflow = describe_prefect(directory, prefect_port), describe_mlflow(directory, mlflow_port)
    worker = describe_worker(directory, prefect_url=api_url, mlflow_url=mlflow_url)

    def check() -> None:
        services.check()
        if count() > 0:
            raise KeyboardInterrupt

    services.start(prefect)
    services.start(mlflow)
    services.wait_for(prefect, check=check)
    environment = build_environment(worker.environment)
    deployed = register(file, api_url=api_url, pool=POOL, environment=environment, check=check)
    services.wait_for(mlflow, check=check)
    runs = LiveRuns(api_url, POOL)
    left = LeftRuns(runs)
    left.keep_queue()
    try:
        services.start(worker)
        _tell(f"Prefect     {prefect_url}/v2/deployments")
        _tell(f"MLflow      {mlflow_url}")
        _tell(f"Deployed    {', '.join(deployed)}")
        _tell(f"Command     PREFECT_API_URL={api_url} internvl run ...    shows up there too")
        _tell("Ctrl-C stops all of it.")
        _watch(services, left, count)
    finally:
        _stop_runs(runs, left, count)


def _watch(services: LocalServices, left: LeftRuns, count: Callable[[], int]) -> None:
    """Start again what ends, and look after the runs that a worker has left, until a signal."""
    next_look = 0.0
    while count() == 0:
        revived = services.revive()
        for line in revived:
            _tell(line, err=True)
        if revived:
            left.may_be_there = True
        now = time.monotonic()
        if revived or now >= next_look:
            next_look = now + (_LEFT_POLL_S if left.may_be_there else _LOST_POLL_S)
            # A server that is just started again does not answer yet.
            with suppress(InternVLError):
                if left.may_be_there:
                    left.keep_queue()
                _mark_lost(left)
        time.sleep(_POLL_S)


def _mark_lost(left: LeftRuns) -> None:
    for name in left.mark_lost():
        _tell(f"{name}: its process is gone. Run it again, and it resumes.", err=True)


def deploy(
    file: Annotated[Path, typer.Option(help="The deployments to register.")] = DEFAULT_FILE,
    pool: Annotated[str, typer.Option(help="Work pool of the machines that train.")] = POOL,
) -> None:
    """Register the deployments, their work pool and the watch for dead runs on the server in PREFECT_API_URL."""
    api_url = os.environ.get("PREFECT_API_URL", "").rstrip("/")
    if not api_url:
        raise ArgumentError(
            "PREFECT_API_URL: not set. Give the server's address, such as http://127.0.0.1:4200/api, or start one "
            "with `internvl up`."
        )
    for name in register(file, api_url=api_url, pool=pool):
        typer.echo(name)
    typer.echo(f"Start a worker on the machine that trains: prefect worker start --pool {pool} --limit 1")


def _stop_runs(runs: LiveRuns, left: LeftRuns, count: Callable[[], int]) -> None:
    """Have the runs of the pool save and end, while their server and worker are still there; Ctrl-C again: leave it.

    What is queued stays so, for the next `up`.
    """
    # Two at once are two: the second is not to be waited for.
    told = min(count(), 1)
    try:
        runs.hold_queue()
        names = runs.cancel()
        if names:
            _tell(f"Stopping {', '.join(names)}: it saves first. Ctrl-C again does not wait for it.")
            runs.wait(lambda: count() > told, look=lambda: _mark_lost(left))
    except InternVLError as error:
        _tell(f"Runs are not waited for, and save when the worker ends: {error}", err=True)


def _tell(line: str, *, err: bool = False) -> None:
    """Print a line, unless the terminal is gone: that must not keep what is to be stopped alive."""
    with suppress(OSError):
        typer.echo(line, err=err)
