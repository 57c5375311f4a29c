"""`internvl up`, `internvl deploy`: servers of one's own, and our flows on a Prefect server."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import httpx
import typer

from flows.deployments import DEFAULT_FILE, register
from flows.live_runs import LiveRuns
from flows.local_services import (
    HOST,
    POOL,
    LocalServices,
    check_port,
    describe_mlflow,
    describe_prefect,
    describe_worker,
    told_by_signals,
)
from internvl_core.errors import ArgumentError

_POLL_S = 0.5


def up(
    directory: Annotated[Path, typer.Option(help="Databases and logs of the servers.")] = Path("runs/servers"),
    prefect_port: Annotated[int, typer.Option(help="Of the Prefect server and its UI.")] = 4200,
    mlflow_port: Annotated[int, typer.Option(help="Of the MLflow server and its UI.")] = 5000,
    file: Annotated[Path, typer.Option(help="The deployments to register.")] = DEFAULT_FILE,
) -> None:
    """Start a Prefect server, MLflow and a worker here, with the deployments; Ctrl-C ends them all."""
    check_port(prefect_port, "--prefect-port")
    check_port(mlflow_port, "--mlflow-port")
    directory = directory.absolute()
    services = LocalServices(directory)
    prefect_url, mlflow_url = f"http://{HOST}:{prefect_port}", f"http://{HOST}:{mlflow_port}"
    api_url = f"{prefect_url}/api"
    prefect, mlflow = describe_prefect(directory, prefect_port), describe_mlflow(directory, mlflow_port)
    worker = describe_worker(directory, prefect_url=api_url, mlflow_url=mlflow_url)
    with told_by_signals((signal.SIGINT, signal.SIGTERM)) as count_signals:
        try:
            typer.echo(f"Starting a Prefect server, MLflow and a worker; logs in {directory}")
            services.start(prefect)
            services.start(mlflow)
            services.wait_for(prefect)
            deployed = register(file, api_url=api_url, pool=POOL)
            services.wait_for(mlflow)
            services.start(worker)
            typer.echo(f"Prefect     {prefect_url}/v2/deployments")
            typer.echo(f"MLflow      {mlflow_url}")
            typer.echo(f"Deployed    {', '.join(deployed)}")
            typer.echo(f"Command     PREFECT_API_URL={api_url} internvl run ...    shows up there too")
            typer.echo("Ctrl-C stops all of it.")
            while count_signals() == 0:
                for line in services.revive():
                    typer.echo(line, err=True)
                time.sleep(_POLL_S)
            _stop_runs(LiveRuns(api_url, POOL), services, count_signals)
        finally:
            services.stop()
    typer.echo("Stopped.")


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


def _stop_runs(runs: LiveRuns, services: LocalServices, count_signals: Callable[[], int]) -> None:
    """Have the runs of the pool save and end, while their server and worker are still there; Ctrl-C again: leave it."""
    told = count_signals()
    try:
        live = runs.find()
        if not live:
            return
        typer.echo(f"Stopping {', '.join(live.values())}: it saves first. Ctrl-C again does not wait for it.")
        runs.cancel()
        runs.wait(lambda: count_signals() > told)
    except httpx.HTTPError as error:
        typer.echo(f"The server does not tell which runs are at work ({error}); they stop by themselves.", err=True)
