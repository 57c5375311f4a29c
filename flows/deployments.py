"""What a Prefect server has to know to run our flows: the pool, the deployments, the watch for dead runs."""

import os
import subprocess
import sys
from pathlib import Path

from internvl_core.errors import ArgumentError, InternVLError

ROOT = Path(__file__).resolve().parents[1]
DEFAULT_FILE = ROOT / "deployments" / "prefect.yaml"
_LIMIT_S = 180


def register(file: Path, *, api_url: str, pool: str) -> list[str]:
    """Register all of it on a server; what is there is updated.

    Args:
        file: the deployments; its flows are looked for from the folder above its own.
        api_url: of the server, ending in /api.
        pool: its workers train.

    Returns:
        The names of the deployments.

    Raises:
        ArgumentError: no such file.
        InternVLError: Prefect refuses; with what it said.
    """
    if not file.is_file():
        raise ArgumentError(f"{file}: no such file of deployments. Give its path by --file.")
    _run_prefect("work-pool", "create", pool, "--type", "process", "--overwrite", api_url=api_url)
    output = _run_prefect(
        "deploy", "--prefect-file", str(file), "--all", api_url=api_url, directory=file.resolve().parents[1]
    )
    _run_module("flows.dead_runs", api_url=api_url)
    return sorted(set(_find_deployed(output)))


def _find_deployed(output: str) -> list[str]:
    """Find `flow/deployment` in what `prefect deploy` prints: Deployment 'pretrain/smoke' successfully created."""
    return [line.split("'")[1] for line in output.splitlines() if "Deployment '" in line and line.count("'") >= 2]


def _run_prefect(*arguments: str, api_url: str, directory: Path | None = None) -> str:
    return _run([sys.executable, "-m", "prefect", "--no-prompt", *arguments], api_url, directory)


def _run_module(module: str, *, api_url: str) -> str:
    return _run([sys.executable, "-m", module], api_url, None)


def _run(command: list[str], api_url: str, directory: Path | None) -> str:
    environment = {**os.environ, "PREFECT_API_URL": api_url, "COLUMNS": "200", "DO_NOT_TRACK": "1"}
    try:
        completed = subprocess.run(
            command,
            cwd=directory,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=_LIMIT_S,
        )
    except subprocess.TimeoutExpired:
        raise InternVLError(f"{api_url} has not answered `{' '.join(command[2:])}` in {_LIMIT_S} s.") from None
    if completed.returncode != 0:
        raise InternVLError(f"{api_url} refused `{' '.join(command[2:])}`:\n{completed.stdout.rstrip()}")
    return completed.stdout
