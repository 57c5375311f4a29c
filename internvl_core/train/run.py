"""One attempt of a stage inside a rank: build, train, commit, evaluate, hand over."""

import logging
import time
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from internvl_core.arguments import Arguments
from internvl_core.checkpoint.base_model import BaseModel, write_base
from internvl_core.checkpoint.folder import find_committed
from internvl_core.checkpoint.manifest import CheckpointKind
from internvl_core.checkpoint.store import fetch, is_checkpoint_uri
from internvl_core.checkpoint.unsent import UnsentSave
from internvl_core.contract import METRICS_FILE, CheckpointRef, StageFile, StageResult
from internvl_core.data.dataset import SupervisedDataset
from internvl_core.errors import Preempted
from internvl_core.model.adapter_weights import is_adapter
from internvl_core.model.attention import choose_packed_attention, use_packed_attention
from internvl_core.model.liger import apply_liger
from internvl_core.model.load import LoadedModel, build_model, fetch_sources, load_checkpoint
from internvl_core.model.sources import describe_base
from internvl_core.model.trainable import count_parameters, count_trainable, enable_checkpointing, set_trainable
from internvl_core.packing_rules import is_packed
from internvl_core.supervision.progress import Phase
from internvl_core.train.callbacks import (
    ConsensusCallback,
    MetricsCallback,
    ProgressCallback,
    StopAfterSaveCallback,
)
from internvl_core.train.checkpoints import StageCheckpoints
from internvl_core.train.commit import Committed
from internvl_core.train.extension_locks import clear_left_locks
from internvl_core.train.finite import FiniteSteps
from internvl_core.train.fixed_arguments import fix_arguments
from internvl_core.train.held_out import build_encoding, choose_dtype, place_untrained, score_held_out
from internvl_core.train.ledger import SampleLedger
from internvl_core.train.machine_meter import MachineMeter
from internvl_core.train.meter import StepMeter
from internvl_core.train.metrics import MetricsFile
from internvl_core.train.supervisor_link import SupervisorLink
from internvl_core.train.trainer import InternVLTrainer
from internvl_core.train.training_data import (
    build_collator,
    build_step_sampler,
    build_training_data,
    get_pack_limits,
)
from internvl_core.train.update import Update

logger = logging.getLogger(__name__)


class StageRun:
    """Everything one attempt of a stage needs, on one rank.

    Without a stage.json (a bare torchrun by hand) checkpoints stay in `output_dir`, and the weights end up in it.
    """

    def __init__(
        self, arguments: Arguments, stage: StageFile | None, link: SupervisorLink, started: float, *, entry: str
    ) -> None:
        # On the monotonic clock, before the seconds of imports, which are setup too.
        self._started = started
        self._arguments = arguments
        values = arguments.to_values()
        self._is_packed = is_packed(values, entry=entry)
        self._stage = stage
        self._link = link
        self._seconds: dict[str, float] = {}
        self._start: CheckpointRef | None = None
        self._base: BaseModel | None = None
        training = arguments.training
        fix_arguments(arguments, save_budget_s=stage.save_budget_s if stage else 0.0)
        if training.deepspeed is not None:
            clear_left_locks()
        training.prepare_for_launch()
        set_seed(training.seed)
        self._output_dir = Path(training.output_dir)
        self._output_dir.mkdir(parents=True, exist_ok=True)
        self._cache_dir = Path(arguments.extension.cache_dir).expanduser()
        directory = Path(arguments.extension.attempt_dir or self._output_dir)
        self._directory = directory
        self._metrics = MetricsFile(directory / METRICS_FILE)
        self._checkpoints = StageCheckpoints(stage, values, arguments, self._metrics, link, entry=entry)

    def run(self) -> None:
        """Train from where the stage stands, evaluate, and hand the result over."""
        try:
            self._run()
        finally:
            self._checkpoints.close()

    def _run(self) -> None:
        newest = self._checkpoints.acquire()
        self._leave_early()
        if newest is not None and newest.kind is CheckpointKind.FINAL:
            logger.info("Step %d is trained and committed already: only the evaluation is left", newest.step)
            loaded = load_checkpoint(str(newest.path), cache_dir=self._cache_dir, dtype=choose_dtype(self._arguments))
            trained: Any = place_untrained(loaded.model, self._arguments)
            self._continue_curve(newest)
            step, counters = newest.step, newest.counters
            final: UnsentSave | CheckpointRef | None = newest.checkpoint
        else:
            loaded = self._build_model()
            encoding = build_encoding(self._arguments, loaded)
            dataset = build_training_data(self._arguments, encoding, self._cache_dir, is_packed=self._is_packed)
            ledger = self._open_ledger(dataset, newest)
            trainer = self._train(loaded, dataset, ledger, newest)
            step, counters = trainer.state.global_step, {**_count(trainer), **ledger.counters}
            final = self._save_final(trainer, counters)
            trained = trainer.model
        scores = self._evaluate(trained, loaded)
        self._link.tell(Phase.FINISH)
        if self._stage is None or final is None or not self._is_rank_zero:
            return
        metrics = {**self._summarize_curve(), **scores}
        result = self._checkpoints.hand_over(
            final, lambda checkpoint: StageResult(step, checkpoint, metrics, counters, self._seconds)
        )
        result.write(self._directory)

    @property
    def _is_rank_zero(self) -> bool:
        return bool(self._arguments.training.process_index == 0)

    def _choose_attention(self) -> str:
        training = self._arguments.training
        dtype = torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else torch.float32
        return choose_packed_attention(self._arguments.extension.packed_attention, training.device, dtype)

    def _build_model(self) -> LoadedModel:
        arguments = self._arguments
        model_arguments = arguments.model
        with arguments.training.main_process_first(desc="fetching the checkpoint to start from"):
            self._start = self._find_start()
            if self._start is not None:
                model_arguments.model_name_or_path = str(fetch(self._start, self._cache_dir))
            fetch_sources(model_arguments, self._cache_dir)
        self._base = self._describe_base()
        loaded = build_model(
            model_arguments, arguments.data, cache_dir=self._cache_dir, dtype=choose_dtype(self._arguments)
        )
        if model_arguments.use_liger:
            apply_liger(loaded.model.model.language_model)
        if model_arguments.grad_checkpoint:
            enable_checkpointing(loaded.model)
        return loaded

    def _find_start(self) -> CheckpointRef | None:
        if self._stage is not None and self._stage.start_from is not None:
            return self._stage.start_from
        path = self._arguments.model.model_name_or_path
        return find_committed(path) if path is not None and is_checkpoint_uri(path) else None

    def _describe_base(self) -> BaseModel | None:
        """Describe what adapters will belong to; None if there are none, or if their base is nowhere as it is here."""
        model = self._arguments.model
        has_adapters = bool(model.use_llm_lora or model.use_backbone_lora)
        if not (has_adapters and self._is_rank_zero) or model.model_name_or_path is None or model.mlp_path is not None:
            return None
        if self._start is not None:
            return BaseModel("checkpoint", self._start.uri, self._start.digest)
        return describe_base(model.model_name_or_path, self._cache_dir)

    def _leave_early(self) -> None:
        """Leave if that was asked for before there is anything to save."""
        self._link.tell(Phase.SETUP)
        if self._link.is_set:
            raise Preempted("Stopped on request before the first step; nothing was lost.")

    def _open_ledger(self, dataset: SupervisedDataset, newest: Committed | None) -> SampleLedger:
        ledger = SampleLedger(
            dataset.dataset_names,
            self._directory,
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
        model = set_trainable(loaded.model, arguments.model)
        sampler = build_step_sampler(
            arguments,
            dataset.mixture,
            loaded.model,
            is_packed=self._is_packed,
            resume_from=newest.path if newest else None,
        )
        meter = StepMeter(
            sampler.share,
            get_pack_limits(arguments) if self._is_packed else None,
            tell=lambda: self._link.tell(Phase.SETUP if curve.first_step_s is None else Phase.STEP),
        )
        update = Update()
        finite = FiniteSteps(update, max_in_a_row=arguments.extension.max_non_finite_steps)
        consensus = ConsensusCallback(self._link, ledger, meter, sampler, finite)
        curve = MetricsCallback(self._metrics, ledger, meter, finite, MachineMeter(self._directory))
        if self._is_packed:
            use_packed_attention(loaded.model, self._choose_attention())
        trainer = InternVLTrainer(
            sampler=sampler,
            ledger=ledger,
            meter=meter,
            update=update,
            finite=finite,
            normalize_type=arguments.data.normalize_type,
            decay_all=arguments.extension.decay_all,
            saves_dir=self._checkpoints.saves_dir,
            model=model,
            args=arguments.training,
            train_dataset=dataset,
            data_collator=build_collator(arguments, loaded.tokenizer.pad_token_id, is_packed=self._is_packed),
            processing_class=loaded.tokenizer,
            callbacks=[ProgressCallback(self._link), consensus, finite, curve],
        )
        self._checkpoints.follow(trainer, ledger, sampler, meter, note_base=self._note_base)
        trainer.add_callback(StopAfterSaveCallback(self._link, consensus))
        self._leave_early()
        if newest is not None:
            logger.info("Resuming from step %d: %s", newest.step, newest.checkpoint.uri)
            self._continue_curve(newest)
        elif self._is_rank_zero:
            # In the output_dir of a run by hand there may be the curve of an earlier one.
            self._metrics.path.unlink(missing_ok=True)
        self._seconds["setup"] = time.monotonic() - self._started
        started = time.monotonic()
        trainer.train(resume_from_checkpoint=str(newest.path) if newest else None)
        self._seconds["train"] = time.monotonic() - started
        self._seconds["first_step"] = curve.first_step_s or 0.0
        self._seconds["checkpoint_stall"] = meter.total_stall_s
        if consensus.is_stopping:
            self._checkpoints.await_commits()
            raise Preempted(f"Stopped on request at step {trainer.state.global_step}; a checkpoint is committed.")
        return trainer

    def _note_base(self, directory: Path) -> None:
        if self._base is not None and is_adapter(directory):
            write_base(directory, self._base)

    def _continue_curve(self, newest: Committed) -> None:
        if self._is_rank_zero:
            self._metrics.continue_from(newest.path / METRICS_FILE, step=newest.step)

    def _save_final(self, trainer: InternVLTrainer, counters: dict[str, int]) -> UnsentSave | None:
        self._link.tell(Phase.FINISH, trainer.state.global_step)
        final_dir = self._output_dir / "final" if self._stage else self._output_dir
        self._checkpoints.await_room_for_final(trainer.state.global_step)
        if self._arguments.model.model_name_or_path is None or self._arguments.model.mlp_path is not None:
            # An adapter is of use only with its base, and components, or a projector put into a model, are none.
            trainer.save_merged(str(final_dir))
        else:
            trainer.save_model(str(final_dir))
        self._note_base(final_dir)
        return self._checkpoints.submit_final(final_dir, trainer.state.global_step, counters)

    def _evaluate(self, model: Any, loaded: LoadedModel) -> dict[str, float]:
        started = time.monotonic()
        scores = score_held_out(model, loaded, self._arguments, self._directory, on_batch=self._note_answers)
        self._seconds["evaluate"] = time.monotonic() - started
        return scores

    def _note_answers(self) -> None:
        # Only when the final weights are out may a stop end the evaluation without a word to the ranks.
        self._link.tell(Phase.EVALUATE if self._checkpoints.are_committed else Phase.FINISH)
        self._checkpoints.check()
        if self._link.is_set and self._checkpoints.can_leave_evaluation():
            raise Preempted(
                "Stopped on request during the evaluation: the trained weights are committed, only the evaluation is "
                "left."
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


def _count(trainer: InternVLTrainer) -> dict[str, int]:
    return {
        **trainer.finite.counters,
        "trainable_parameters": count_trainable(trainer.model),
        "total_parameters": count_parameters(trainer.model),
        "tokens": int(trainer.state.num_input_tokens_seen),
    }
