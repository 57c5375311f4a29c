"""How a rank begins and ends: arguments in, failure.json and an exit code out.

Whatever goes wrong leaves through one frame. torchrun turns every failure into exit code 1, so the
cause travels in failure.json.
"""

import logging
import os
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import torch.distributed as dist

from internvl_core.argument_rules import check_arguments
from internvl_core.arguments import Arguments, parse_arguments
from internvl_core.contract import EVALUATION, StageFailure, StageFile
from internvl_core.data.dataset import find_sample_ids
from internvl_core.errors import ArgumentError, DiskFull, InternVLError, StageError, WorkerLost
from internvl_core.exhaustion import is_disk_full, is_out_of_memory
from internvl_core.train.evaluation import EvaluationRun
from internvl_core.train.memory_report import explain_elsewhere
from internvl_core.train.run import StageRun
from internvl_core.train.supervisor_link import SupervisorLink

logger = logging.getLogger(__name__)

# Of gloo, and of the store through which ranks find each other.
_LOST_PEER = re.compile(r"gloo/.*(Connection|Socket|[Tt]imed out|Broken pipe)|Connection (closed|reset) by peer")
_PEER_WORDS = re.compile(r"remote|peer|closed|reset|refused|abort|tim(ed |e)out|broken pipe", re.IGNORECASE)
_KILLED_WORKER = re.compile(r"DataLoader worker \(pid.*(killed by signal|exited unexpectedly)")


def main(entry: str, link: SupervisorLink, started: float) -> None:
    """Run a stage with the process's command line and exit with the error tree's code."""
    logging.basicConfig(level=logging.INFO, format=f"%(asctime)s [rank {_rank()}] %(name)s: %(message)s")
    attempt_dir: Path | None = None
    try:
        # Before parsing: a command line that cannot be parsed is reported as well.
        attempt_dir = _find_attempt_dir(sys.argv[1:])
        arguments = parse_arguments(sys.argv[1:])
        attempt_dir = Path(arguments.extension.attempt_dir) if arguments.extension.attempt_dir else None
        _build_run(entry, arguments, attempt_dir, link, started).run()
        if dist.is_initialized():
            dist.destroy_process_group()
    except BaseException as error:  # noqa: BLE001 (the outermost frame: whatever happened is told to the task)
        _report_failure(error, attempt_dir, link)
    # Libraries' threads now and then abort the interpreter on its way out, and a finished stage would count as lost.
    _leave(0, link)


def _build_run(
    entry: str, arguments: Arguments, attempt_dir: Path | None, link: SupervisorLink, started: float
) -> StageRun | EvaluationRun:
    if entry == EVALUATION:
        if attempt_dir is None:
            raise ArgumentError("attempt_dir: missing. An evaluation is told by its stage.json what to score.")
        return EvaluationRun(arguments, StageFile.get(attempt_dir), link, started)
    check_arguments(arguments.to_values(), entry=entry)
    stage = StageFile.get(attempt_dir) if attempt_dir else None
    return StageRun(arguments, stage, link, started, entry=entry)


def _find_attempt_dir(items: Sequence[str]) -> Path | None:
    prefix = "--attempt_dir="
    return next((Path(item.removeprefix(prefix)) for item in items if item.startswith(prefix)), None)


def classify(error: BaseException) -> BaseException:
    """Give an error its class of the error tree where libraries have none for it."""
    if isinstance(error, InternVLError):
        return _unwrap_worker_error(error)
    if is_out_of_memory(error):
        return explain_elsewhere(error)
    if is_disk_full(error):
        return DiskFull(f"{str(error).splitlines()[0].rstrip('. ')}. Make room on that disk and run again.")
    # A plain RuntimeError is what the data loader raises that lost a worker.
    if isinstance(error, RuntimeError) and _KILLED_WORKER.search(str(error)):
        return WorkerLost(
            f"A worker of the data loader was lost: {str(error).splitlines()[0].rstrip('. ')}. The kernel kills them "
            "where memory is short: if it comes again, lower dataloader_num_workers."
        )
    return error


def _report_failure(error: BaseException, attempt_dir: Path | None, link: SupervisorLink) -> None:
    """Write failure.json and leave at once; the supervisor ends the other ranks."""
    if isinstance(error, SystemExit) and not error.code:
        return
    classified = classify(error)
    # What has a class of ours is a cause, whoever raised it: NCCL too runs out of memory.
    if attempt_dir is not None and not isinstance(classified, InternVLError) and _is_about_a_peer(error):
        # A symptom. Who vanished has told the cause, or the supervisor finds it.
        logger.error("This rank leaves, for another one is gone: %s", error)
        _leave(WorkerLost.exit_code, link)
    error = classified
    failure = StageFailure.from_exception(error, rank=_rank())
    is_first = True
    if attempt_dir is not None:
        with suppress(OSError):  # a full disk must not hide the cause, which is logged below
            is_first = failure.write_first(attempt_dir)
    if isinstance(error, InternVLError) or not is_first:
        logger.error("%s: %s", failure.error, failure.message)
    else:
        logger.error("%s", failure.message, exc_info=error)
    # Not sys.exit: interpreter exit would wait for collectives that other ranks never join.
    _leave(error.exit_code if isinstance(error, InternVLError) else InternVLError.exit_code, link)


def _is_about_a_peer(error: BaseException) -> bool:
    """Tell what torch raises in a rank whose partner in a collective is gone."""
    words = str(error)
    # Raised for what is wrong here as well: a network interface, two ranks on one GPU.
    is_network = isinstance(error, (dist.DistNetworkError, dist.DistBackendError))
    return (is_network and _PEER_WORDS.search(words) is not None) or (
        isinstance(error, RuntimeError) and _LOST_PEER.search(words) is not None
    )


def _unwrap_worker_error(error: InternVLError) -> InternVLError:
    """Find the message of a data loader's worker, in one line; torch wraps it in the worker's whole traceback."""
    kind = type(error)
    head, _, traceback = str(error).partition("\nOriginal Traceback")
    # The last of them: an error that was raised from another of its kind comes after it.
    _, _, message = traceback.rpartition(f"\n{kind.__module__}.{kind.__qualname__}: ")
    if not head.startswith(f"Caught {kind.__name__} in DataLoader worker process") or not message:
        return error
    unwrapped = kind("; ".join(line.strip() for line in message.splitlines() if line.strip()))
    if isinstance(unwrapped, StageError):
        # An exception leaves its worker as text alone.
        unwrapped.sample_ids = find_sample_ids(str(unwrapped))
    # So that failure.json keeps where in the worker it was.
    unwrapped.__cause__ = error
    return unwrapped


def _leave(exit_code: int, link: SupervisorLink) -> NoReturn:
    """End the process without the interpreter's teardown."""
    link.leave()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))
