"""What retries of a stage come to, in a real run of a recipe."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from stage_runs import Inputs, make_inputs

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def run_recipe(directory: Path, arguments: dict[str, Any], **recipe: Any) -> subprocess.CompletedProcess[str]:
    """Run a recipe of one stage to its end, with a Prefect server of its own."""
    content = {
        "name": "retried",
        "workspace": str(directory / "workspace"),
        "stages": [{"name": "stage1", "entry": "finetune", "arguments": arguments}],
        **recipe,
    }
    path = directory / "retried.yaml"
    path.write_text(yaml.safe_dump(content))
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("PREFECT_API")},
        "PREFECT_HOME": str(directory / "prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    }
    command = [sys.executable, "-m", "flows.cli", "run", str(path)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.fault(31, "no progress", how="retries without a newer commit", then="NoProgress with all reasons, 93")
def test_three_retries_without_a_newer_commit_end_the_run_with_the_reasons_of_all_tries(
    inputs: Inputs, tmp_path: Path
) -> None:
    # No rank can be up by then.
    run = run_recipe(tmp_path, {**inputs.arguments, "setup_limit_s": 0.2}, retry_delays_s=[0, 0, 0, 0])
    assert run.returncode == 93, run.stdout + run.stderr
    last_line = run.stderr.splitlines()[-1]
    assert last_line.startswith(
        "NoProgress: stage1: retried 3 times without a newer commit; nothing is committed. Try 1: Stalled: No progress"
    )
    assert len(re.findall(r"Try \d: Stalled: No progress for", last_line)) == 4
    failures = sorted((tmp_path / "workspace/attempts").glob("stage1-*/*/failure.json"))
    assert [json.loads(path.read_text())["error"] for path in failures] == ["Stalled"] * 4
    told = re.findall(r"stage1: (try \d of 4 after Stalled, from the start)", run.stdout + run.stderr)
    assert told == [f"try {number} of 4 after Stalled, from the start" for number in (2, 3, 4)]
