"""The command line that trains a stage: a list of arguments, never a text for a shell."""

import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from internvl_core.contract import StageFile
from internvl_core.errors import ArgumentError


def build_command(stage: StageFile, attempt_dir: Path, *, node_rank: int = 0) -> list[str]:
    """Build the argv that trains a stage; every argument is one item `--key=value`, never seen by a shell.

    Args:
        node_rank: which of the launcher's nodes it is for; rank 0 is on node 0.

    Raises:
        ArgumentError: the launcher is of a kind that is not built yet, or a value cannot be passed to a process.
    """
    launcher = stage.launcher
    _check_kind(launcher)
    num_nodes, num_ranks = (_get_count(launcher, name) for name in ("nnodes", "nproc_per_node"))
    return [
        *(sys.executable, "-m", "torch.distributed.run"),
        *(f"--nnodes={num_nodes}", f"--nproc-per-node={num_ranks}"),
        *_build_rendezvous(stage, num_nodes, node_rank),
        # Between a SIGTERM to torchrun and its kill of the ranks; its default of 30 s cuts a save short.
        f"--shutdown-timeout={math.ceil(stage.save_budget_s)}",
        # Its default is /tmp, where a killed torchrun leaves a directory behind.
        f"--log-dir={attempt_dir / 'torchrun'}",
        *("-m", f"internvl_core.{stage.entry}"),
        f"--attempt_dir={attempt_dir}",
        *_build_arguments(stage.arguments),
    ]


def _check_kind(launcher: Mapping[str, Any]) -> None:
    kind = launcher.get("kind", "local")
    if kind != "local":
        raise ArgumentError(f"launcher.kind: {kind!r} is not built yet; use 'local'.")


def _get_count(launcher: Mapping[str, Any], name: str) -> int:
    count = launcher.get(name, 1)
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise ArgumentError(f"launcher.{name}: {count!r} should be a number, 1 or more.")
    return count


def _build_rendezvous(stage: StageFile, num_nodes: int, node_rank: int) -> list[str]:
    """Say where the nodes of a stage meet."""
    if num_nodes == 1:
        # Port 0: the kernel picks a free one, so that runs on one machine never meet.
        return ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    endpoint = stage.launcher.get("rdzv_endpoint")
    if not endpoint:
        raise ArgumentError(f"launcher.rdzv_endpoint: {num_nodes} nodes need one: host:port of the first of them.")
    if not 0 <= node_rank < num_nodes:
        raise ArgumentError(f"node rank: {node_rank} should be from 0 to {num_nodes - 1}.")
    return [
        # Not c10d: it numbers nodes by their names, and rank 0 writes metrics and result where the flow looks for them.
        *("--rdzv-backend=static", f"--rdzv-endpoint={endpoint}", f"--node-rank={node_rank}"),
        # Nodes of two attempts never meet: a node that is late would train with the next one.
        f"--rdzv-id={stage.run_id}-{stage.stage}-{stage.attempt}",
    ]


def _build_arguments(arguments: Mapping[str, Any]) -> Iterator[str]:
    for key, value in arguments.items():
        if value is None:
            continue
        text = json.dumps(value) if isinstance(value, list | dict) else str(value)
        item = f"--{key}={text}"
        if not _is_passable(item):
            raise ArgumentError(
                f"arguments: {key}: {text!r} cannot be passed on. Write text without NUL or surrogates."
            )
        yield item


def _is_passable(item: str) -> bool:
    try:
        return b"\0" not in os.fsencode(item)
    except UnicodeEncodeError:
        return False
