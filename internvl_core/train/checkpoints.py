"""A stage's checkpoints as all its ranks see them: rank 0 deals with the store, the others wait for it."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from internvl_core.arguments import Arguments
from internvl_core.checkpoint.manifest import CheckpointKind
from internvl_core.checkpoint.store import fetch
from internvl_core.checkpoint.unsent import UnsentSave
from internvl_core.contract import CheckpointRef, StageFile, StageResult
from internvl_core.supervision.progress import Phase
from internvl_core.train.callbacks import CommitCallback
from internvl_core.train.commit import Committed, StageCommits
from internvl_core.train.commit_queue import WAIT_S, CommitQueue
from internvl_core.train.ledger import SampleLedger
from internvl_core.train.local_commits import LocalCommits
from internvl_core.train.meter import StepMeter
from internvl_core.train.metrics import MetricsFile
from internvl_core.train.ranks import wait_together
from internvl_core.train.resume import build_layout, fit_to_ranks
from internvl_core.train.room import DiskRoom, estimate_checkpoint_bytes, estimate_weights_bytes
from internvl_core.train.sampler import StepSampler
from internvl_core.train.supervisor_link import SupervisorLink
from internvl_core.train.trainer import InternVLTrainer
from internvl_core.train.upload import UploadLimits, Uploads


class StageCheckpoints:
    """Where an attempt resumes from, and where its saves go: a store, or for a run by hand its output_dir."""

    def __init__(
        self,
        stage: StageFile | None,
        values: Mapping[str, Any],
        arguments: Arguments,
        metrics: MetricsFile,
        link: SupervisorLink,
        *,
        entry: str,
    ) -> None:
        """Look at nothing yet.

        Args:
            stage: None for a run by hand.
            values: the arguments as they were given, defaults filled in.
            arguments: the same, prepared for launch.
            metrics: the loss curve; lies in the attempt's directory.
        """
        training, extension = arguments.training, arguments.extension
        self._training = training
        self._link = link
        self._cache_dir = Path(extension.cache_dir).expanduser()
        self._is_main = training.process_index == 0
        self._queue: CommitQueue | None = None
        self._weights_bytes = 0
        self._resumed: Committed | None = None
        self._converted: Path | None = None
        self._commits: StageCommits | LocalCommits
        kept: Any = {"layout": build_layout(training), "metrics": metrics, "cache_dir": self._cache_dir}
        if stage is None:
            output_dir = Path(training.output_dir)
            self._commits = LocalCommits(values, entry=entry, output_dir=output_dir, **kept)
            self.saves_dir = self._commits.saves_dir
        else:
            limits = UploadLimits(extension.max_unsent_checkpoints, extension.store_patience_s)
            self._commits = StageCommits(stage, limits=limits, save_total_limit=values["save_total_limit"], **kept)
            self.saves_dir = Path(training.output_dir)

    def acquire(self) -> Committed | None:
        """Take the stage, and find what every rank resumes from.

        Rank 0 chooses for all: a commit between two looks would send ranks to different steps.

        Raises:
            LeaseHeld: another run is at work.
            ArgumentError, CheckpointCorrupt: these ranks cannot take the state of those that wrote it.
        """
        chosen = [self._commits.acquire() if self._is_main else None]
        if dist.is_initialized():
            dist.broadcast_object_list(chosen)
        newest = chosen[0]
        if newest is not None and not self._is_main and not newest.path.is_dir():
            newest = replace(newest, path=fetch(newest.checkpoint, self._cache_dir))
        if newest is not None and newest.kind is CheckpointKind.TRAINING:
            path = fit_to_ranks(newest, training=self._training, cache_dir=self._cache_dir)
            self._converted = path if path != newest.path else None
            newest = replace(newest, path=path)
        self._resumed = newest
        return newest

    def follow(
        self,
        trainer: InternVLTrainer,
        ledger: SampleLedger,
        sampler: StepSampler,
        meter: StepMeter,
        *,
        note_base: Callable[[Path], None],
    ) -> None:
        """Have what a trainer saves committed.

        Args:
            note_base: writes into an adapter's folder what it belongs to.
        """
        has_masters = bool(self._training.deepspeed)
        # Merged or not: what a stage ends with may be the whole model.
        self._weights_bytes = estimate_weights_bytes(trainer.model)
        estimate_bytes = estimate_checkpoint_bytes(
            trainer.model, has_adapters=not trainer.is_whole, has_masters=has_masters
        )
        if self._is_main:
            size_bytes = self._resumed.size_bytes if self._resumed else estimate_bytes
            room = DiskRoom(Path(self._training.output_dir), size_bytes=size_bytes)
            self._queue = CommitQueue(
                self._commits, room, ledger, sampler, saves_dir=self.saves_dir, note_base=note_base
            )
        trainer.add_callback(CommitCallback(self._queue, meter, self._link))

    @property
    def are_committed(self) -> bool:
        """Whether all that this rank knows to be saved is committed."""
        return not (self._is_main and isinstance(self._commits, StageCommits)) or self._commits.uploads.are_committed

    def await_room_for_final(self, step: int) -> None:
        """Wait on all ranks until the final weights may be written.

        Raises:
            DiskFull, StoreUnavailable: they never may.
        """
        queue = self._queue
        self._wait_together(None if queue is None else lambda: queue.has_room(step, size_bytes=self._weights_bytes))

    def await_commits(self) -> None:
        """Wait on all ranks until what was saved is committed: the first to leave would end the others."""
        self._wait_together(self._are_committed if self._is_main else None)

    def can_leave_evaluation(self) -> bool:
        """Wait until what was saved is committed, where ranks are not at the same place, and say who leaves then.

        Rank 0 does, and its end is that of the others. They go on: it may need them for what it is at.
        """
        if not self._is_main:
            return isinstance(self._commits, LocalCommits)
        while not self._are_committed():
            self._link.tell(Phase.FINISH)
        return True

    def check(self) -> None:
        """Raise what keeps checkpoints from ever being committed."""
        if self._is_main:
            self._commits.check()

    def submit_final(self, directory: Path, step: int, counters: dict[str, int]) -> UnsentSave | None:
        """Have the stage's final weights committed while it is evaluated; the save is known to rank 0 only.

        What a run by hand ends with stays where it is.
        """
        if not self._is_main or isinstance(self._commits, LocalCommits):
            return None
        return self._commits.submit(directory, step, CheckpointKind.FINAL, counters)

    def hand_over(
        self, save: UnsentSave | CheckpointRef, build_result: Callable[[CheckpointRef], StageResult]
    ) -> StageResult:
        """Declare the stage finished, when all of it is in the store and read back; for rank 0.

        Args:
            save: its final weights.
            build_result: given what they became.
        """
        assert isinstance(self._commits, StageCommits)
        checkpoint = save if isinstance(save, CheckpointRef) else self._await_sent(save, self._commits.uploads)
        result = build_result(checkpoint)
        self._commits.hand_over(result)
        return result

    def close(self) -> None:
        """Let go of the stage; of an output_dir the kernel does, with the process."""
        if self._converted is not None and self._training.local_process_index == 0:
            shutil.rmtree(self._converted, ignore_errors=True)
        if self._is_main and isinstance(self._commits, StageCommits):
            self._commits.close()

    def _await_sent(self, save: UnsentSave, uploads: Uploads) -> CheckpointRef:
        while not uploads.wait(lambda: uploads.num_unsent == 0, WAIT_S):
            self._link.tell(Phase.FINISH)
        checkpoint = uploads.find_committed(save)
        assert checkpoint is not None
        return checkpoint

    def _are_committed(self) -> bool:
        if isinstance(self._commits, LocalCommits):
            return True
        uploads = self._commits.uploads
        return uploads.wait(lambda: uploads.are_committed, WAIT_S)

    def _wait_together(self, is_reached: Callable[[], bool] | None) -> None:
        wait_together(is_reached, self._training.device, tell=lambda: self._link.tell(Phase.FINISH))
