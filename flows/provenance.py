"""Where a run comes from: the code, and the flow run that started it."""

import subprocess
from pathlib import Path

from prefect.client.schemas.objects import FlowRun
from prefect.utilities.urls import url_for

from internvl_core import __version__
from tasks.address import hide_password

_CHECKOUT = Path(__file__).resolve().parents[1]


def collect_tags(flow_run: FlowRun | None) -> dict[str, str]:
    """Collect the tags by which a run is traced back, those that are known."""
    tags = {"internvl.version": __version__, "mlflow.source.git.commit": _find_commit()}
    if flow_run is not None:
        tags |= {"prefect.flow_run_id": str(flow_run.id), "prefect.flow_run_url": _find_page(flow_run)}
    return {name: value for name, value in tags.items() if value}


def _find_page(flow_run: FlowRun) -> str | None:
    url = url_for(flow_run)
    return hide_password(url) if url else None


def _find_commit() -> str | None:
    """Find the commit of the checkout that runs; None for an installed package, or without git."""
    if not (_CHECKOUT / ".git").exists():
        return None
    command = ["git", "-C", str(_CHECKOUT), "rev-parse", "HEAD"]
    try:
        completed = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return completed.stdout.strip() or None
