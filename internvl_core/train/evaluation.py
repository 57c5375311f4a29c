"""Score a checkpoint on the held-out questions inside a rank; nothing is trained, nothing is committed."""

import time
from pathlib import Path

from transformers import set_seed

from internvl_core.arguments import Arguments
from internvl_core.checkpoint.store import fetch, read_manifest
from internvl_core.contract import StageFile, StageResult
from internvl_core.errors import ArgumentError, Preempted
from internvl_core.model.load import fetch_sources, load_checkpoint
from internvl_core.supervision.progress import Phase
from internvl_core.train.extension_locks import clear_left_locks
from internvl_core.train.fixed_arguments import fix_arguments
from internvl_core.train.held_out import choose_dtype, place_untrained, score_held_out
from internvl_core.train.supervisor_link import SupervisorLink


class EvaluationRun:
    """One attempt to score the checkpoint that stage.json starts from, with the arguments of a stage."""

    def __init__(self, arguments: Arguments, stage: StageFile, link: SupervisorLink, started: float) -> None:
        """Set the process up.

        Args:
            arguments: of the stage whose held-out questions are asked.
            stage: what stage.json says; `start_from` is what is scored.
            link: to the supervisor.
            started: on the monotonic clock, before the seconds of imports.

        Raises:
            ArgumentError: there is nothing to score, or nothing to score it on.
        """
        if stage.start_from is None or arguments.extension.eval_meta_path is None:
            raise ArgumentError("An evaluation needs start_from in stage.json, and eval_meta_path. Give both.")
        self._arguments = arguments
        self._checkpoint = stage.start_from
        self._link = link
        self._started = started
        self._directory = Path(arguments.extension.attempt_dir or ".")
        self._cache_dir = Path(arguments.extension.cache_dir).expanduser()
        fix_arguments(arguments, save_budget_s=0)
        if arguments.training.deepspeed is not None:
            clear_left_locks()
        arguments.training.prepare_for_launch()
        set_seed(arguments.training.seed)

    def run(self) -> None:
        """Fetch, load, ask, and write the result.

        Raises:
            Preempted: stopped on request.
        """
        self._link.tell(Phase.SETUP)
        arguments = self._arguments
        with arguments.training.main_process_first(desc="fetching the checkpoint to score"):
            path = str(fetch(self._checkpoint, self._cache_dir))
            # An adapter's base too.
            arguments.model.model_name_or_path = path
            fetch_sources(arguments.model, self._cache_dir)
        loaded = load_checkpoint(path, cache_dir=self._cache_dir, dtype=choose_dtype(arguments))
        model = place_untrained(loaded.model, arguments)
        asked_at = time.monotonic()
        seconds = {"setup": asked_at - self._started}
        scores = score_held_out(model, loaded, arguments, self._directory, on_batch=self._note_answers)
        seconds["evaluate"] = time.monotonic() - asked_at
        self._link.tell(Phase.FINISH)
        if arguments.training.process_index == 0:
            step = read_manifest(self._checkpoint).step
            StageResult(step, self._checkpoint, scores, {}, seconds).write(self._directory)

    def _note_answers(self) -> None:
        self._link.tell(Phase.EVALUATE)
        if self._link.is_set:
            raise Preempted("Stopped on request during the evaluation; nothing was lost. Run it again.")
