"""What checkpoints cost a training that goes well, and what they save of one that is killed.

    python benchmarks/bench_survival.py [--hidden-size 768] [--steps 24] [--repeats 3] [--kills 5]
        [--kill-hidden-size 512] [--kill-steps 300]

Stall: a model is trained on one rank and saved every few steps to S3 over HTTP (moto, a process of its own).
"background" is the trainer as it is; "blocking" waits at each save until the store has it and has read it back.
Sides take turns. Measured is how long the step loop stands still for a save, and the wall time of all steps.

Goodput: a stage on two ranks, a `file://` store, is ended by SIGKILL of a rank so many times at drawn moments
and started again each time; its steps, each at the median time of all, over the wall time from the first start to
the result. Prints a table and writes benchmarks/results/<date>-survival.json.
"""

import argparse
import datetime
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from machine import name_processor

from internvl_core.checkpoint.store import StageStore
from internvl_core.checkpoint.unsent import publish_unsent
from internvl_core.contract import StageFile, StageResult
from internvl_core.smoke.components import ComponentsSettings, generate_components
from internvl_core.smoke.digits import DigitsSettings, generate_digits
from internvl_core.supervision.process_tree import find_descendants
from tasks.launch import RunningStage, build_command, get_limits, launch_command

BLOCKING_RANK = Path(__file__).with_name("blocking_rank.py")
SAVE_STEPS = 6
KILL_SAVE_STEPS = 20
BUCKET = "bench-survival"
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "bench", "AWS_SECRET_ACCESS_KEY": "bench", "AWS_DEFAULT_REGION": "us-east-1"}


class Stage:
    """One stage of the benchmark, attempt by attempt."""

    def __init__(self, folder: Path, inputs: Path, store_uri: str, *, num_ranks: int, **arguments: Any) -> None:
        self._folder = folder
        self._store_uri = store_uri
        self._num_ranks = num_ranks
        self._num_attempts = 0
        self._arguments = {
            "vision_path": str(inputs / "components" / "vision"),
            "llm_path": str(inputs / "components" / "llm"),
            "meta_path": str(inputs / "data" / "finetune.json"),
            "cache_dir": str(folder / "cache"),
            "conv_style": "internvl2_5",
            "force_image_size": 32,
            "max_seq_length": 192,
            "grad_checkpoint": False,
            "per_device_train_batch_size": 4,
            "save_strategy": "steps",
            "save_total_limit": 2,
            "logging_steps": 1,
            **arguments,
        }

    @property
    def store(self) -> StageStore:
        return StageStore(self._store_uri, "stage", "0" * 64)

    def start(self, script: Path | None = None) -> RunningStage:
        self._num_attempts += 1
        directory = self._folder / "attempts" / str(self._num_attempts)
        directory.mkdir(parents=True)
        stage = StageFile(
            run_id="bench",
            stage="stage",
            attempt=self._num_attempts,
            fingerprint="0" * 64,
            entry="finetune",
            arguments={"output_dir": str(directory / "output"), **self._arguments},
            launcher={"kind": "local", "nproc_per_node": self._num_ranks},
            store_uri=self._store_uri,
            start_from=None,
            resume=True,
            save_budget_s=600,
        )
        stage.write(directory)
        command = build_command(stage, directory)
        if script is not None:
            module = command.index("internvl_core.finetune")
            command[module - 1 : module + 1] = [str(script)]
        return launch_command(command, directory, get_limits(stage))

    def take_over(self) -> None:
        publish_unsent(self._folder / "attempts", self.store, cache_dir=self._folder / "cache")


def run_stall(inputs: Path, side: str, num_steps: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        store_uri = f"s3://{BUCKET}/{Path(folder).name}"
        stage = Stage(Path(folder), inputs, store_uri, num_ranks=1, max_steps=num_steps, save_steps=SAVE_STEPS)
        with stage.start(BLOCKING_RANK if side == "blocking" else None) as running:
            exit_code = running.process.wait()
            if exit_code:
                raise SystemExit((running.attempt_dir / "trainer.log").read_text()[-2000:])
        result = StageResult.get(running.attempt_dir)
        (newest, *_) = stage.store.list_committed()
        size_bytes = sum(path["size"] for path in _open_s3().find(newest.checkpoint.uri, detail=True).values())
    num_saves = num_steps // SAVE_STEPS
    return {
        "stall_s_per_save": result.seconds["checkpoint_stall"] / num_saves,
        "train_s": result.seconds["train"],
        "checkpoint_mb": size_bytes / 1e6,
    }


def run_killed(inputs: Path, num_steps: int, num_kills: int, seed: int) -> dict[str, float]:
    draw = random.Random(seed)  # noqa: S311
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        stage = Stage(
            folder, inputs, f"file://{folder}/store", num_ranks=2, max_steps=num_steps, save_steps=KILL_SAVE_STEPS
        )
        started = time.monotonic()
        reached: list[int] = []
        resumed: list[int] = []
        # A share of the steps for each life, so that no kill comes after the end.
        for number in range(num_kills):
            with stage.start() as running:
                target = int(num_steps * (number + draw.uniform(0.3, 0.9)) / (num_kills + 1))
                step = _await_step(running, target)
                os.kill(_find_rank(running.pid), signal.SIGKILL)
                running.process.wait()
            reached.append(step)
            stage.take_over()
            resumed.append(max((commit.step for commit in stage.store.list_committed()), default=0))
        with stage.start() as running:
            lines = list(running.iter_metrics())
            running.result()
        wall_s = time.monotonic() - started
    step_s = statistics.median(1 / line["steps_per_s"] for line in lines)
    lost = sum(step - start for step, start in zip(reached, resumed, strict=True))
    return {
        "steps": num_steps,
        "kills": num_kills,
        "wall_s": wall_s,
        "step_s": step_s,
        "goodput": num_steps * step_s / wall_s,
        "lost_steps": lost,
        "lost_s": lost * step_s,
        "other_s_per_start": (wall_s - (num_steps + lost) * step_s) / (num_kills + 1),
    }


def _await_step(running: RunningStage, target: int) -> int:
    step = 0
    for line in running.iter_metrics(0.02):
        step = line["step"]
        if step >= target:
            return step
    raise SystemExit((running.attempt_dir / "trainer.log").read_text()[-2000:])


def _find_rank(supervisor: int) -> int:
    for pid in find_descendants(supervisor):
        if b"--attempt_dir=" in Path(f"/proc/{pid}/cmdline").read_bytes() and b"RANK=1\0" in (
            Path(f"/proc/{pid}/environ").read_bytes()
        ):
            return pid
    raise SystemExit("no rank is alive")


def _open_s3() -> Any:
    import fsspec

    return fsspec.filesystem("s3", use_listings_cache=False)


def start_s3(folder: Path) -> "subprocess.Popen[bytes]":
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).with_name("moto_server")), "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=(folder / "s3.log").open("wb"), stderr=subprocess.STDOUT)
    os.environ.update(CREDENTIALS, AWS_ENDPOINT_URL=f"http://127.0.0.1:{port}")
    while process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            break
        except OSError:
            time.sleep(0.1)
    _open_s3().mkdir(BUCKET)
    return process


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--hidden-size", type=int, default=768)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--kill-hidden-size", type=int, default=512)
    parser.add_argument("--kill-steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    report: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "device": name_processor(),
        "cores": os.cpu_count(),
        **vars(options),
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        large, small = folder / "large", folder / "small"
        for inputs, hidden_size in ((large, options.hidden_size), (small, options.kill_hidden_size)):
            generate_digits(inputs / "data", DigitsSettings(400, 20))
            settings = ComponentsSettings(hidden_size=hidden_size)
            generate_components(inputs / "components", inputs / "data" / "annotations", settings)
        s3 = start_s3(folder)
        try:
            runs: dict[str, list[dict[str, float]]] = {"background": [], "blocking": []}
            for _ in range(options.repeats):
                for side, measured in runs.items():
                    measured.append(run_stall(large, side, options.steps))
        finally:
            s3.terminate()
            s3.wait()
        report["stall"] = {
            side: {name: statistics.median(run[name] for run in measured) for name in measured[0]} | {"runs": measured}
            for side, measured in runs.items()
        }
        report["goodput"] = run_killed(small, options.kill_steps, options.kills, options.seed)
    for side, result in report["stall"].items():
        sys.stdout.write(
            f"{side:<11}{result['checkpoint_mb']:8.0f} MB a save {result['stall_s_per_save']:8.2f} s stall a save "
            f"{result['train_s']:8.1f} s for {options.steps} steps\n"
        )
    goodput = report["goodput"]
    sys.stdout.write(
        f"goodput     {goodput['goodput']:.3f} of {goodput['wall_s']:.0f} s; {goodput['kills']} kills, "
        f"{goodput['lost_steps']} of {goodput['steps']} steps lost, {goodput['other_s_per_start']:.1f} s a start\n"
    )
    path = Path(__file__).parent / "results" / f"{report['date']}-survival.json"
    path.write_text(json.dumps(report, indent=2) + "\n")
    sys.stdout.write(f"\nWrote {path}\n")


if __name__ == "__main__":
    main()
