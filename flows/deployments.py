"""What a Prefect server has to know to run our flows: the pool, the deployments, the watch for dead runs."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from flows.kept_settings import KeptSettings
from flows.prefect_api import PrefectApi
from internvl_core.errors import ArgumentError, InternVLError
from tasks.address import hide_password

ROOT = Path(__file__).resolve().parents[1]
DEFAULT_FILE = ROOT / "deployments" / "prefect.yaml"
POOL_VARIABLE = "PREFECT_DEFAULT_WORK_POOL_NAME"
"""Prefect's own; prefect.yaml takes the pool's name from it, for `prefect deploy --all` heeds no `--pool`."""

_LIMIT_S = 180
_POLL_S = 0.2


def register(
    file: Path,
    *,
    api_url: str,
    pool: str,
    environment: Mapping[str, str] | None = None,
    check: Callable[[], None] = lambda: None,
) -> list[str]:
    """Register all of it on a server; what is there is updated, but not the settings of the pool.

    Schedules, parameters and pauses of deployments that somebody set on the server stay, unless the file is one's own.

    Args:
        file: the deployments; its flows are looked for from the folder above its own.
        api_url: of the server, ending in /api.
        pool: its workers train.
        environment: with Prefect's settings; None: this process's.
        check: called now and then; what it raises ends the registering.

    Returns:
        The names of the deployments.

    Raises:
        ArgumentError: no such file; no such server, or it wants a password.
        InternVLError: Prefect refuses; with what it said.
    """
    if not file.is_file():
        raise ArgumentError(f"{file}: no such file of deployments. Give its path by --file.")
    inherited = os.environ if environment is None else environment
    server = _Server(api_url, {**inherited, "PREFECT_API_URL": api_url, POOL_VARIABLE: pool}, check)
    api = PrefectApi(api_url, server.environment)
    api.check()
    # Not `create --overwrite`: it would undo what somebody has set.
    if api.find(f"work_pools/{pool}") is None:
        server.run("prefect", "--no-prompt", "work-pool", "create", pool, "--type", "process")
    deploy = ("prefect", "--no-prompt", "deploy", "--prefect-file", str(file.resolve()), "--all")
    # A file of somebody's own says what he wants.
    kept = KeptSettings(api) if file.resolve() == DEFAULT_FILE.resolve() else None
    try:
        output = server.run(*deploy, directory=file.resolve().parents[1])
    finally:
        # One that is cut has changed some of it, and the next would take that for what was set.
        if kept is not None:
            kept.restore()
    server.run("flows.dead_runs")
    return sorted(set(_find_deployed(output)))


def _find_deployed(output: str) -> list[str]:
    """Find `flow/deployment` in what `prefect deploy` prints: Deployment 'pretrain/smoke' successfully created."""
    return [line.split("'")[1] for line in output.splitlines() if "Deployment '" in line and line.count("'") >= 2]


@dataclass(frozen=True)
class _Server:
    """A Prefect server, to which other processes talk: this one does not wait for the import of Prefect."""

    api_url: str
    environment: Mapping[str, str]
    check: Callable[[], None]

    def run(self, *module: str, directory: Path | None = None) -> str:
        """Run a module with its arguments; return what it prints."""
        end = time.monotonic() + _LIMIT_S
        with subprocess.Popen(
            [sys.executable, "-m", *module],
            cwd=directory,
            env={**self.environment, "COLUMNS": "200", "DO_NOT_TRACK": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            # A Ctrl-C in a terminal is for this process, which ends the other one.
            start_new_session=True,
        ) as process:
            try:
                while process.returncode is None:
                    self.check()
                    try:
                        output, _ = process.communicate(timeout=_POLL_S)
                    except subprocess.TimeoutExpired:
                        if time.monotonic() > end:
                            raise InternVLError(
                                f"{hide_password(self.api_url)} has not answered `{' '.join(module)}` in {_LIMIT_S} s."
                            ) from None
            finally:
                process.kill()
        if process.returncode != 0:
            raise InternVLError(hide_password(f"{self.api_url} refused `{' '.join(module)}`:\n{output.rstrip()}"))
        return output
