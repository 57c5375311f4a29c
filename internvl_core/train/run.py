"""One attempt of a stage inside a rank: build, train, commit, evaluate, hand over.

torchrun starts `main` through `internvl_core.pretrain` or `internvl_core.finetune`. Whatever
goes wrong leaves through one frame that writes failure.json.
"""

import logging
import os
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from transformers import set_seed

from internvl_core.argument_rules import check_arguments
from internvl_core.arguments import Arguments, parse_arguments
from internvl_core.checkpoint.manifest import CheckpointKind
from internvl_core.checkpoint.store import fetch, is_checkpoint_uri, resolve_checkpoint
from internvl_core.contract import METRICS_FILE, CheckpointRef, StageFailure, StageFile, StageResult
from internvl_core.data.collate import SampleCollator
from internvl_core.data.dataset import SupervisedDataset
from internvl_core.data.encoding import Encoding
from internvl_core.data.pixels import PixelRules
from internvl_core.data.questions import QuestionEncoder
from internvl_core.data.text_encoder import TextEncoder
from internvl_core.errors import InternVLError, OutOfMemory, Preempted
from internvl_core.evaluate.generate import evaluate_held_out
from internvl_core.model.load import ADAPTER_FILE, LoadedModel, build_model, load_checkpoint, write_base
from internvl_core.model.trainable import count_parameters, count_trainable, enable_checkpointing, set_trainable
from internvl_core.train.callbacks import CommitCallback, ConsensusCallback, MetricsCallback
from internvl_core.train.commit import Committed, StageCommits
from internvl_core.train.ledger import SampleLedger
from internvl_core.train.metrics import MetricsFile
from internvl_core.train.stop_request import StopRequest
from internvl_core.train.trainer import InternVLTrainer
from internvl_core.train.training_data import build_training_data, list_data_values

logger = logging.getLogger(__name__)


def main(entry: str, stop_request: StopRequest, started: float) -> None:
    """Run a stage with the process's command line and exit with the error tree's code."""
    logging.basicConfig(level=logging.INFO, format=f"%(asctime)s [rank {_rank()}] %(name)s: %(message)s")
    attempt_dir: Path | None = None
    try:
        # Before parsing: a command line that cannot be parsed is reported as well.
        attempt_dir = _find_attempt_dir(sys.argv[1:])
        arguments = parse_arguments(sys.argv[1:])
        attempt_dir = Path(arguments.extension.attempt_dir) if arguments.extension.attempt_dir else None
        check_arguments(arguments.to_values(), entry=entry)
        StageRun(arguments, StageFile.get(attempt_dir) if attempt_dir else None, stop_request, started).run()
        if dist.is_initialized():
            dist.destroy_process_group()
    except BaseException as error:  # noqa: BLE001 (the outermost frame: whatever happened is told to the task)
        _report_failure(error, attempt_dir)
    # Libraries' threads now and then abort the interpreter on its way out, and a finished stage would count as lost.
    _leave(0)


class StageRun:
    """Everything one attempt of a stage needs, on one rank.

    Without a stage.json (a bare torchrun by hand) nothing is committed; the weights end up in `output_dir`.
    """

    def __init__(
        self, arguments: Arguments, stage: StageFile | None, stop_request: StopRequest, started: float
    ) -> None:
        # On the monotonic clock, before the seconds of imports, which are setup too.
        self._started = started
        self._arguments = arguments
        self._stage = stage
        self._stop_request = stop_request
        self._seconds: dict[str, float] = {}
        self._start: CheckpointRef | None = None
        training = arguments.training
        _settle(arguments)
        training.prepare_for_launch()
        set_seed(training.seed)
        self._output_dir = Path(training.output_dir)
        self._output_dir.mkdir(parents=True, exist_ok=True)
        self._cache_dir = Path(arguments.extension.cache_dir).expanduser()
        directory = Path(arguments.extension.attempt_dir or self._output_dir)
        self._directory = directory
        self._metrics = MetricsFile(directory / METRICS_FILE)
        self._commits = (
            StageCommits(stage, world_size=training.world_size, metrics=self._metrics, cache_dir=self._cache_dir)
            if stage
            else None
        )

    def run(self) -> None:
        """Train from where the stage stands, evaluate, and hand the result over."""
        newest = self._find_newest()
        if newest is not None and newest.kind is CheckpointKind.FINAL:
            logger.info("Step %d is trained and committed already: only the evaluation is left", newest.step)
            loaded = load_checkpoint(str(newest.path), cache_dir=self._cache_dir, dtype=self._dtype)
            trained: Any = loaded.model.to(self._arguments.training.device)
            self._continue_curve(newest)
            step, counters = newest.step, newest.counters
            final: CheckpointRef | None = newest.checkpoint
        else:
            loaded = self._build_model()
            dataset = build_training_data(self._arguments, self._encoding(loaded), self._cache_dir)
            ledger = self._open_ledger(dataset, newest)
            trainer = self._train(loaded, dataset, ledger, newest)
            step, counters = trainer.state.global_step, {**_count(trainer), **ledger.counters}
            final = self._save_final(trainer, counters)
            trained = trainer.model
        scores = self._evaluate(trained, loaded)
        if self._commits is None or final is None or not self._is_rank_zero:
            return
        result = StageResult(step, final, {**self._summarize_curve(), **scores}, counters, self._seconds)
        self._commits.hand_over(result)
        result.write(self._directory)

    @property
    def _is_rank_zero(self) -> bool:
        return bool(self._arguments.training.process_index == 0)

    @property
    def _dtype(self) -> torch.dtype:
        """Of the parameters. DeepSpeed keeps fp32 masters of bf16 weights itself; elsewhere autocast needs fp32."""
        training = self._arguments.training
        return torch.bfloat16 if training.bf16 and training.deepspeed else torch.float32

    def _find_newest(self) -> Committed | None:
        """Let rank 0 choose for all: a commit between two looks would send ranks to different steps."""
        if self._commits is None:
            return None
        chosen = [self._commits.find_newest() if self._is_rank_zero else None]
        if dist.is_initialized():
            dist.broadcast_object_list(chosen)
        newest = chosen[0]
        if newest is None:
            return None
        with self._arguments.training.main_process_first(desc="fetching the checkpoint to resume from"):
            path = newest.path if self._is_rank_zero else fetch(newest.checkpoint, self._cache_dir)
        return replace(newest, path=path)

    def _build_model(self) -> LoadedModel:
        arguments = self._arguments
        model_arguments = arguments.model
        with arguments.training.main_process_first(desc="fetching the checkpoint to start from"):
            self._start = self._find_start()
            if self._start is not None:
                model_arguments.model_name_or_path = str(fetch(self._start, self._cache_dir))
        loaded = build_model(model_arguments, arguments.data, cache_dir=self._cache_dir, dtype=self._dtype)
        if model_arguments.grad_checkpoint:
            enable_checkpointing(loaded.model)
        return loaded

    def _find_start(self) -> CheckpointRef | None:
        if self._stage is not None and self._stage.start_from is not None:
            return self._stage.start_from
        path = self._arguments.model.model_name_or_path
        return resolve_checkpoint(path) if path is not None and is_checkpoint_uri(path) else None

    def _open_ledger(self, dataset: SupervisedDataset, newest: Committed | None) -> SampleLedger:
        ledger = SampleLedger(
            dataset.dataset_names,
            self._directory,
            mixture=dataset.mixture.digest,
            rank=self._arguments.training.process_index,
            max_bad_fraction=self._arguments.extension.max_bad_fraction,
        )
        if newest is not None:
            ledger.load(newest.path)
        return ledger

    def _train(
        self, loaded: LoadedModel, dataset: SupervisedDataset, ledger: SampleLedger, newest: Committed | None
    ) -> InternVLTrainer:
        arguments = self._arguments
        consensus = ConsensusCallback(self._stop_request, ledger)
        callbacks = [consensus, MetricsCallback(self._metrics, ledger)]
        if self._commits is not None:
            callbacks.append(CommitCallback(partial(self._publish_training, ledger)))
        trainer = InternVLTrainer(
            ledger=ledger,
            normalize_type=arguments.data.normalize_type,
            decay_all=arguments.extension.decay_all,
            model=set_trainable(loaded.model, arguments.model),
            args=arguments.training,
            train_dataset=dataset,
            data_collator=SampleCollator(loaded.tokenizer.pad_token_id),
            processing_class=loaded.tokenizer,
            callbacks=callbacks,
        )
        if self._stop_request.is_set:
            raise Preempted("Stopped on request before the first step; nothing was lost.")
        if newest is not None:
            logger.info("Resuming from step %d: %s", newest.step, newest.checkpoint.uri)
            self._continue_curve(newest)
        self._seconds["setup"] = time.monotonic() - self._started
        started = time.monotonic()
        trainer.train(resume_from_checkpoint=str(newest.path) if newest else None)
        self._seconds["train"] = time.monotonic() - started
        if consensus.is_stopping:
            raise Preempted(f"Stopped on request at step {trainer.state.global_step}; a checkpoint is committed.")
        return trainer

    def _publish_training(self, ledger: SampleLedger, directory: Path, step: int) -> None:
        assert self._commits is not None
        ledger.save(directory)
        self._commits.publish(directory, step, CheckpointKind.TRAINING)

    def _continue_curve(self, newest: Committed) -> None:
        if self._is_rank_zero:
            self._metrics.continue_from(newest.path / METRICS_FILE, step=newest.step)

    def _save_final(self, trainer: InternVLTrainer, counters: dict[str, int]) -> CheckpointRef | None:
        final_dir = self._output_dir / "final" if self._stage else self._output_dir
        if self._stage is not None and self._start is None:
            # An adapter is of use only with its base, and that is in no store.
            trainer.save_merged(str(final_dir))
        else:
            trainer.save_model(str(final_dir))
        if self._commits is None or not self._is_rank_zero:
            return None
        if (final_dir / ADAPTER_FILE).exists() and self._start is not None:
            write_base(final_dir, self._start)
        return self._commits.publish(final_dir, trainer.state.global_step, CheckpointKind.FINAL, counters=counters)

    def _evaluate(self, model: Any, loaded: LoadedModel) -> dict[str, float]:
        started = time.monotonic()
        encoder = QuestionEncoder(self._encoding(loaded), PixelRules.from_arguments(list_data_values(self._arguments)))
        scores = evaluate_held_out(model, loaded.tokenizer, encoder, self._arguments)
        self._seconds["evaluate"] = time.monotonic() - started
        return scores

    def _encoding(self, loaded: LoadedModel) -> Encoding:
        encoder = TextEncoder.from_tokenizer(loaded.tokenizer)
        return Encoding.from_arguments(
            list_data_values(self._arguments), encoder=encoder, tokens_per_tile=loaded.tokens_per_tile
        )

    def _summarize_curve(self) -> dict[str, float]:
        curve = self._metrics.read()
        if not curve:
            return {}
        speeds = sorted(line["tokens_per_s"] for line in curve)
        return {
            "first_loss": curve[0]["loss"],
            "last_loss": curve[-1]["loss"],
            "tokens_per_s": speeds[len(speeds) // 2],
        }


def _settle(arguments: Arguments) -> None:
    """Set what the trainer decides itself, whatever the arguments say."""
    training = arguments.training
    training.remove_unused_columns = False
    training.label_names = ["labels"]
    if training.save_total_limit is not None:
        logger.warning("save_total_limit: only local copies are pruned; what is committed stays in the store.")
    if training.disable_tqdm is None:
        # The log is a file, and metrics.jsonl is what progress is shown from.
        training.disable_tqdm = True
    # A NaN must be seen, not replaced in the running mean (F7).
    training.logging_nan_inf_filter = False
    training.include_num_input_tokens_seen = "non_padding"
    # Trainer would switch it on a second time, in the reentrant kind.
    arguments.model.grad_checkpoint |= bool(training.activation_checkpointing)
    training.activation_checkpointing = False
    if training.ddp_find_unused_parameters is None:
        training.ddp_find_unused_parameters = False


def _count(trainer: InternVLTrainer) -> dict[str, int]:
    return {
        "trainable_parameters": count_trainable(trainer.model),
        "total_parameters": count_parameters(trainer.model),
        "tokens": int(trainer.state.num_input_tokens_seen),
    }


def _find_attempt_dir(items: Sequence[str]) -> Path | None:
    prefix = "--attempt_dir="
    return next((Path(item.removeprefix(prefix)) for item in items if item.startswith(prefix)), None)


def _report_failure(error: BaseException, attempt_dir: Path | None) -> None:
    """Write failure.json and leave at once; the supervisor ends the other ranks."""
    if isinstance(error, SystemExit) and not error.code:
        return
    # torch's CPU allocator raises a plain RuntimeError.
    if isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error):
        error = OutOfMemory(f"{error}. Lower per_device_train_batch_size or max_dynamic_patch.")
    if isinstance(error, InternVLError):
        error = _unwrap_worker_error(error)
    failure = StageFailure.from_exception(error, rank=_rank())
    if attempt_dir is not None:
        with suppress(OSError):  # a full disk must not hide the cause, which is logged below
            failure.write_first(attempt_dir)
    if isinstance(error, InternVLError):
        logger.error("%s: %s", failure.error, failure.message)
    else:
        logger.error("%s", failure.message, exc_info=error)
    # Not sys.exit: interpreter exit would wait for collectives that other ranks never join.
    _leave(error.exit_code if isinstance(error, InternVLError) else InternVLError.exit_code)


def _unwrap_worker_error(error: InternVLError) -> InternVLError:
    """Find the message of a data loader's worker, in one line; torch wraps it in the worker's whole traceback."""
    kind = type(error)
    head, _, traceback = str(error).partition("\nOriginal Traceback")
    # The last of them: an error that was raised from another of its kind comes after it.
    _, _, message = traceback.rpartition(f"\n{kind.__module__}.{kind.__qualname__}: ")
    if not head.startswith(f"Caught {kind.__name__} in DataLoader worker process") or not message:
        return error
    unwrapped = kind("; ".join(line.strip() for line in message.splitlines() if line.strip()))
    # So that failure.json keeps where in the worker it was.
    unwrapped.__cause__ = error
    return unwrapped


def _leave(exit_code: int) -> NoReturn:
    """End the process without the interpreter's teardown."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))
