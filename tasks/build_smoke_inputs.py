"""Make what the smoke recipe trains on and from: the digits data set and the tiny components."""

from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks.run_module import run_module


@task(name="build smoke inputs", cache_policy=NO_CACHE)
def build_smoke_inputs(workspace: Path) -> None:
    """Write `data` and `components` into the workspace; what is there already and whole stays. The workspace exists.

    Runs two short processes: scikit-learn draws the images, transformers the components.
    """
    run_module("internvl_core.smoke.digits", str(workspace / "data"))
    run_module(
        "internvl_core.smoke.components", str(workspace / "components"), "--texts", str(workspace / "data/annotations")
    )
