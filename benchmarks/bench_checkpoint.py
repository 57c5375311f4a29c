"""How fast a checkpoint is published and fetched, hashing and verification included, against plain copies.

    python benchmarks/bench_checkpoint.py [--repeats 7] [--scratch DIR]

On S3 (moto's server in a process of its own, over HTTP) the rival is boto3's transfer manager as it comes, which
verifies nothing; on local files it is `cp`. Every measurement is a process of its own, so that its peak memory is that
of the one transfer; the variants take turns. Prints a table and writes benchmarks/results/<date>-checkpoint.json.
"""

import argparse
import datetime
import json
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from machine import name_processor

MIB = 1 << 20
SHAPES = {"4 large": (4, 256 * MIB), "200 x 64 KiB": (200, MIB // 16)}
GOAL = 0.9
MAX_MEMORY_MB = 300
STEP = {"step": 1, "fence": 1, "parent": None, "info": {}}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--shard-mib", type=int, default=256, help="Size of the four large files.")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--only", choices=["s3", "file"], help="Only this kind of store.")
    parser.add_argument("--child", nargs=4, metavar=("VARIANT", "SOURCE", "STORE", "TARGET"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        sys.stdout.write(json.dumps(run_child(*arguments.child)))
        return
    SHAPES["4 large"] = (4, arguments.shard_mib * MIB)
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        results = []
        for shape in SHAPES:
            source = write_source(Path(scratch, "source"), *SHAPES[shape])
            if arguments.only != "file":
                results += measure_s3(shape, source, Path(scratch), arguments.repeats)
            if arguments.only != "s3":
                results += measure_files(shape, source, Path(scratch), arguments.repeats)
    goals = find_goals(results)
    write_table(results, goals)
    if arguments.only is None:
        write_results(arguments.repeats, arguments.shard_mib, results, goals)


def write_source(folder: Path, num_files: int, size_bytes: int) -> Path:
    """Make the files of a checkpoint, which nothing can compress."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for number in range(num_files):
        with (folder / f"shard-{number:03d}.safetensors").open("wb") as file:
            for _ in range(0, size_bytes, 8 * MIB):
                file.write(os.urandom(min(size_bytes, 8 * MIB)))
    os.sync()
    return folder


def measure_s3(shape: str, source: Path, scratch: Path, repeats: int) -> list[dict[str, Any]]:
    """Upload and download in turns; every round has a server of its own, because moto never forgets."""
    samples: dict[str, list[dict[str, float]]] = {}
    for number in range(repeats + 1):
        with serve_s3() as bucket:
            target = scratch / "target"
            uploads, downloads = ["boto3 upload", "our publish"], ["boto3 download", "our fetch", "our verify"]
            # Who comes second finds a server with more in its memory.
            order = uploads + downloads if number % 2 else uploads[::-1] + downloads[::-1]
            for variant in order:
                sample = run_variant(variant, source, bucket, target)
                sys.stderr.write(f"{shape} {variant}: {sample}\n")
                shutil.rmtree(target, ignore_errors=True)
                if number:  # The first round warms the page cache.
                    samples.setdefault(variant, []).append(sample)
    return [summarise("s3", shape, source, variant, found) for variant, found in samples.items()]


def measure_files(shape: str, source: Path, scratch: Path, repeats: int) -> list[dict[str, Any]]:
    samples: dict[str, list[dict[str, float]]] = {}
    other = Path("/dev/shm") / f"bench-{uuid.uuid4().hex}"  # noqa: S108 (another file system, in memory)
    try:
        for number in range(repeats + 1):
            store, target = scratch / "store", scratch / "target"
            plan = [
                ("cp", source, target),
                ("our publish", source, target),
                ("our fetch", source, target),
                ("our copy", source, target),
                ("cp to another file system", source, other),
                ("our publish to another file system", source, other),
            ]
            for variant, origin, where in plan:
                sample = run_variant(variant, origin, f"file://{store}", where)
                if variant != "our publish":
                    shutil.rmtree(where, ignore_errors=True)
                if number:
                    samples.setdefault(variant, []).append(sample)
            shutil.rmtree(store, ignore_errors=True)
    finally:
        shutil.rmtree(other, ignore_errors=True)
    return [summarise("file", shape, source, variant, found) for variant, found in samples.items()]


@contextmanager
def serve_s3() -> Iterator[str]:
    """Run moto's S3 server in a process of its own; yields the URI of an empty bucket."""
    import boto3

    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    command = [sys.executable, "-m", "moto.server", "--host", "127.0.0.1", "--port", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
        boto3.client("s3").create_bucket(Bucket="bench")
        yield "s3://bench"
    finally:
        server.kill()
        server.wait()


def run_variant(variant: str, source: Path, store: str, target: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--child", variant, str(source), store, str(target)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    sample: dict[str, float] = json.loads(done.stdout)
    return sample


def run_child(variant: str, source: str, store: str, target: str) -> dict[str, float]:
    """Do one transfer and say how long it took and how much memory this process had at most."""
    run = build_variant(variant, Path(source), store, Path(target))
    start, start_cpu = time.perf_counter(), time.process_time()
    run()
    seconds, cpu_s = time.perf_counter() - start, time.process_time() - start_cpu
    status = Path("/proc/self/status").read_text()
    peak = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return {"seconds": seconds, "cpu_s": cpu_s, "peak_mb": int(peak.split()[1]) / 1000}


def build_variant(variant: str, source: Path, store: str, target: Path) -> Callable[[], object]:
    if variant.startswith("boto3"):
        return build_rival(variant, source, target)
    if variant.startswith("cp"):
        return lambda: subprocess.run(["cp", "-r", source, target], check=True)  # noqa: S607
    from internvl_core.checkpoint.fetch import fetch
    from internvl_core.checkpoint.manifest import CheckpointKind
    from internvl_core.checkpoint.store import StageStore, read_manifest

    other = "another" in variant
    stage = StageStore(f"file://{target}" if other else store, "stage2", "0" * 64)
    # Ours too has its client before the clock runs.
    committed = stage.list_committed()
    if "publish" in variant:
        return lambda: stage.publish(source, kind=CheckpointKind.TRAINING, **STEP)
    checkpoint = committed[0].checkpoint
    if "fetch" in variant:
        return lambda: fetch(checkpoint, target)
    paths = [entry.path for entry in read_manifest(checkpoint).files]
    folder = checkpoint.uri.removeprefix(f"{stage.uri}/")
    if "copy" in variant:
        return lambda: stage._backend.download(folder, paths, target)
    return lambda: stage._backend.describe(folder, paths)


def build_rival(variant: str, source: Path, target: Path) -> Callable[[], object]:
    """All files at once through one transfer manager with boto3's own settings."""
    import boto3
    from boto3.s3.transfer import TransferConfig, create_transfer_manager

    names = sorted(path.name for path in source.iterdir())
    client = boto3.client("s3")
    target.mkdir(parents=True, exist_ok=True)

    def run() -> None:
        with create_transfer_manager(client, TransferConfig()) as manager:
            if variant == "boto3 upload":
                futures = [manager.upload(str(source / name), "bench", f"rival/{name}") for name in names]
            else:
                futures = [manager.download("bench", f"rival/{name}", str(target / name)) for name in names]
            for future in futures:
                future.result()

    return run


def summarise(store: str, shape: str, source: Path, variant: str, samples: list[dict[str, float]]) -> dict[str, Any]:
    size_mb = sum(path.stat().st_size for path in source.iterdir()) / 1e6
    seconds = statistics.median(sample["seconds"] for sample in samples)
    return {
        "store": store,
        "files": shape,
        "variant": variant,
        "mb_per_s": round(size_mb / seconds, 1),
        "seconds": round(seconds, 3),
        "fastest_s": round(min(sample["seconds"] for sample in samples), 3),
        "cpu_s": round(statistics.median(sample["cpu_s"] for sample in samples), 2),
        "peak_mb": round(max(sample["peak_mb"] for sample in samples)),
    }


def find_goals(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """On S3: 0.9 of boto3's speed, both ways, in bounded memory."""
    goals = []
    speeds = {(row["store"], row["files"], row["variant"]): row for row in results}
    for shape in SHAPES:
        for ours, rival in (("our publish", "boto3 upload"), ("our fetch", "boto3 download")):
            if ("s3", shape, ours) not in speeds:
                continue
            row, other = speeds["s3", shape, ours], speeds["s3", shape, rival]
            ratio = round(other["seconds"] / row["seconds"], 2)
            goals.append(
                {"files": shape, "variant": ours, "of": rival, "goal": GOAL, "is": ratio, "met": ratio >= GOAL}
                | {"peak_mb": row["peak_mb"], "memory_met": row["peak_mb"] < MAX_MEMORY_MB}
            )
    return goals


def write_table(results: list[dict[str, Any]], goals: list[dict[str, Any]]) -> None:
    sys.stdout.write(f"{'':6}{'files':14}{'':36}{'MB/s':>8}{'s':>8}{'CPU s':>8}{'peak MB':>9}\n")
    for row in results:
        sys.stdout.write(
            f"{row['store']:6}{row['files']:14}{row['variant']:36}{row['mb_per_s']:>8}{row['seconds']:>8}"
            f"{row['cpu_s']:>8}{row['peak_mb']:>9}\n"
        )
    for goal in goals:
        verdict = "met" if goal["met"] else "NOT met"
        memory = "" if goal["memory_met"] else f", but {goal['peak_mb']} MB"
        sys.stdout.write(
            f"{goal['files']:14}{goal['variant']:12} {goal['is']:.2f} of {goal['of']}'s speed, goal {GOAL}: {verdict}"
            f"{memory}\n"
        )


def write_results(repeats: int, shard_mib: int, results: list[dict[str, Any]], goals: list[dict[str, Any]]) -> None:
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    path = Path(__file__).parent / "results" / f"{today}-checkpoint.json"
    content = {
        "date": today,
        "command": f"python benchmarks/bench_checkpoint.py --repeats {repeats} --shard-mib {shard_mib}",
        "machine": {
            "cpu": name_processor(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            **{name: version(name) for name in ("boto3", "s3transfer", "botocore", "s3fs", "moto")},
        },
        "goals": goals,
        "results": results,
    }
    path.write_text(json.dumps(content, indent=1) + "\n")
    sys.stdout.write(f"\nWrote {path}\n")


if __name__ == "__main__":
    main()
