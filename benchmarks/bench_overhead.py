"""What the pipeline costs beside its trainers.

    python benchmarks/bench_overhead.py [--repeats 3]

"pipeline" is `internvl run smoke` against a running Prefect server, from the first import to the report. "script" is
the same four torchrun commands, with the same arguments and evaluations, one after another by hand; sides take turns,
and each has inputs, indexes and caches of its own, the inputs made beforehand. The fixed cost of a stage is what its
task takes on the server less the life of its supervisor, which is a torchrun's. Refusal is `internvl run smoke` with
an unknown argument in its last stage. Prints a table and writes benchmarks/results/<date>-overhead.json.
"""

import argparse
import datetime
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from machine import name_processor

from flows.local_services import LocalServices, check_ports, describe_prefect
from flows.recipe import Recipe, load_recipe
from internvl_core.contract import STATE_FILE
from internvl_core.smoke.components import ComponentsSettings, generate_components
from internvl_core.smoke.digits import DigitsSettings, generate_digits

GOAL_RATIO = 1.15
GOAL_STAGE_S = 2.0
GOAL_REFUSAL_S = 5.0
PORT = 42080


def make_inputs(folder: Path) -> Path:
    generate_digits(folder / "data", DigitsSettings())
    generate_components(folder / "components", folder / "data" / "annotations", ComponentsSettings())
    return folder


def run_pipeline(inputs: Path, workspace: Path, environment: dict[str, str]) -> float:
    shutil.copytree(inputs, workspace)
    return time_command(["run", "smoke", "--set", f"workspace={workspace}"], environment)


def measure_stages(workspace: Path, api_url: str) -> float:
    """Measure what the tasks of the stages took beside their torchruns; returns the mean of the stages in seconds."""
    query = {"sort": "EXPECTED_START_TIME_DESC", "limit": 50}
    tasks = httpx.post(f"{api_url}/task_runs/filter", json=query, timeout=30).raise_for_status().json()
    beside = []
    for stage in load_recipe("smoke").stages:
        task = next(task for task in tasks if task["name"] == stage.name)
        (state_path,) = (workspace / "attempts").glob(f"{stage.name}-*/1/{STATE_FILE}")
        began = json.loads(state_path.read_text())["started"]
        beside.append(task["total_run_time"] - (state_path.stat().st_mtime - began))
    return statistics.mean(beside)


def run_refusal(workspace: Path, environment: dict[str, str]) -> float:
    wrong = "stages.finetune.arguments.learning_rat=1"
    command = ["run", "smoke", "--set", f"workspace={workspace}", "--set", wrong]
    return time_command(command, environment, exit_code=64)


def time_command(arguments: list[str], environment: dict[str, str], exit_code: int = 0) -> float:
    started = time.monotonic()
    command = [sys.executable, "-m", "flows.cli", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    seconds = time.monotonic() - started
    if done.returncode != exit_code:
        raise SystemExit(done.stdout + done.stderr)
    return seconds


def run_script(inputs: Path, workspace: Path) -> float:
    shutil.copytree(inputs, workspace)
    lines = ["set -euo pipefail", *iter_commands(load_recipe("smoke", {"workspace": str(workspace)}))]
    script = workspace / "train.sh"
    script.write_text("\n".join(lines) + "\n")
    started = time.monotonic()
    with (workspace / "train.log").open("wb") as log:
        code = subprocess.run(["bash", script], stdout=log, stderr=log, check=False).returncode  # noqa: S607
    seconds = time.monotonic() - started
    if code != 0:
        raise SystemExit((workspace / "train.log").read_text()[-3000:])
    return seconds


def iter_commands(recipe: Recipe) -> Iterator[str]:
    """Write the torchrun command of each stage over the output folder of the one before."""
    before: Path | None = None
    for stage in recipe.stages:
        output_dir = recipe.directory / stage.name
        arguments = {**stage.arguments, "output_dir": output_dir, "cache_dir": recipe.directory / "cache"}
        if before is not None:
            arguments["model_name_or_path"] = before
        given = " ".join(f"--{name}={value}" for name, value in arguments.items())
        yield (
            f"{sys.executable} -m torch.distributed.run --standalone --nproc-per-node={stage.launcher.nproc_per_node} "
            f"-m internvl_core.{stage.entry} {given}"
        )
        before = output_dir


@contextmanager
def serve_prefect(folder: Path) -> Iterator[dict[str, str]]:
    """Run a Prefect server; yield the environment in which a run goes to it."""
    check_ports({"this benchmark's server": PORT})
    services, service = LocalServices(folder), describe_prefect(folder, PORT)
    services.start(service)
    try:
        services.wait_for(service)
        home = {"PREFECT_HOME": service.environment["PREFECT_HOME"]}
        yield {**os.environ, **home, "PREFECT_API_URL": f"http://127.0.0.1:{PORT}/api"}
    finally:
        services.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    sides: dict[str, list[float]] = {"pipeline": [], "script": [], "stage": [], "refusal": []}
    with tempfile.TemporaryDirectory() as name, serve_prefect(Path(name) / "servers") as environment:
        folder = Path(name)
        inputs = make_inputs(folder / "inputs")
        for number in range(options.repeats + 1):
            turn: dict[str, float] = {}
            for side in ("pipeline", "script") if number % 2 else ("script", "pipeline"):
                workspace = folder / f"{side}-{number}"
                is_pipeline = side == "pipeline"
                turn[side] = (
                    run_pipeline(inputs, workspace, environment) if is_pipeline else run_script(inputs, workspace)
                )
                if is_pipeline:
                    turn["stage"] = measure_stages(workspace, environment["PREFECT_API_URL"])
                shutil.rmtree(workspace)
            turn["refusal"] = run_refusal(folder / "refused", environment)
            sys.stderr.write(f"{number}: {turn}\n")
            if number:  # The first turn compiles DeepSpeed's operation and warms the page cache.
                for side, seconds in turn.items():
                    sides[side].append(seconds)
    write(options.repeats, sides)


def write(repeats: int, sides: dict[str, list[float]]) -> None:
    medians = {side: statistics.median(seconds) for side, seconds in sides.items()}
    ratio = medians["pipeline"] / medians["script"]
    goals: list[dict[str, Any]] = [
        {"what": "wall time of the pipeline over the script's", "is": round(ratio, 3), "goal": GOAL_RATIO},
        {"what": "seconds a stage beside its trainer", "is": round(medians["stage"], 2), "goal": GOAL_STAGE_S},
        {"what": "seconds to refuse a recipe", "is": round(medians["refusal"], 2), "goal": GOAL_REFUSAL_S},
    ]
    for side, seconds in sides.items():
        sys.stdout.write(f"{side:10} {medians[side]:8.1f} s   of {', '.join(f'{value:.1f}' for value in seconds)}\n")
    for goal in goals:
        goal["met"] = goal["is"] <= goal["goal"]
        sys.stdout.write(f"{goal['what']}: {goal['is']}, goal {goal['goal']}: {'met' if goal['met'] else 'NOT met'}\n")
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    path = Path(__file__).parent / "results" / f"{today}-overhead.json"
    content = {
        "date": today,
        "command": f"python benchmarks/bench_overhead.py --repeats {repeats}",
        "machine": {"cpu": name_processor(), "cores": os.cpu_count()},
        "seconds": sides,
        "goals": goals,
    }
    path.write_text(json.dumps(content, indent=1) + "\n")
    sys.stdout.write(f"\nWrote {path}\n")


if __name__ == "__main__":
    main()
