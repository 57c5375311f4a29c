"""Attempts of a stage without its training: they take the lease, save what they are told to, and send it."""

import os
import uuid
from pathlib import Path

import pytest
from tcp_proxy import TcpProxy
from training_checkpoints import write_training_files

from internvl_core.checkpoint.manifest import CheckpointKind
from internvl_core.checkpoint.store import StageStore, fetch
from internvl_core.checkpoint.training_files import TrainingLayout
from internvl_core.checkpoint.unsent import UnsentSave
from internvl_core.contract import CheckpointRef, StageFile
from internvl_core.train.commit import Committed, StageCommits
from internvl_core.train.metrics import MetricsFile
from internvl_core.train.upload import UploadLimits, Uploads

DEADLINE_S = 60.0
FINGERPRINT = "0123456789abcdef" * 4
LAYOUT = TrainingLayout(1)


class Attempt:
    """An attempt of a stage without its training: it saves what it is told to."""

    def __init__(
        self,
        folder: Path,
        store_uri: str,
        *,
        number: int = 1,
        run_id: str = "run",
        resume: bool = True,
        resume_from: CheckpointRef | None = None,
        far_store: TcpProxy | None = None,
        **limits: float,
    ) -> None:
        self.directory = folder / "attempts" / str(number)
        self.directory.mkdir(parents=True)
        self.store = StageStore(store_uri, "stage1", FINGERPRINT)
        stage = StageFile(
            run_id=run_id,
            stage="stage1",
            attempt=number,
            fingerprint=FINGERPRINT,
            entry="pretrain",
            arguments={},
            launcher={"kind": "local", "nproc_per_node": 1},
            store_uri=store_uri,
            start_from=None,
            resume=resume,
            save_budget_s=1,
            resume_from=resume_from,
        )
        self.commits = StageCommits(
            stage,
            layout=LAYOUT,
            metrics=MetricsFile(self.directory / "metrics.jsonl"),
            cache_dir=folder / "cache",
            limits=UploadLimits(**{"max_unsent": 2, "patience_s": DEADLINE_S, **limits}),
            save_total_limit=1,
        )

        self._far_store = far_store
        # Connects, and keeps the address it connected to.
        self.store.list_committed()

    def acquire(self) -> Committed | None:
        """Take the stage; the uploader goes to the store by the proxy, if there is one, and this process directly."""
        with pytest.MonkeyPatch.context() as environment:
            if self._far_store is not None:
                environment.setenv("AWS_ENDPOINT_URL", self._far_store.url)
            return self.commits.acquire()

    @property
    def uploads(self) -> Uploads:
        return self.commits.uploads

    def save(self, step: int, *, num_bytes: int = 1000, kind: CheckpointKind = CheckpointKind.TRAINING) -> UnsentSave:
        directory = self.directory / "output" / f"checkpoint-{step}"
        write_training_files(directory, step, LAYOUT)
        (directory / "model.safetensors").write_bytes(step.to_bytes(4) + os.urandom(num_bytes))
        return self.commits.submit(directory, step, kind)

    def commit(self, step: int) -> CheckpointRef:
        save = self.save(step)
        self.await_all()
        checkpoint = self.uploads.find_committed(save)
        assert checkpoint is not None
        return checkpoint

    def await_all(self) -> None:
        assert self.uploads.wait(lambda: self.uploads.num_unsent == 0, DEADLINE_S), self.uploads.describe_backlog()

    def list_steps(self) -> list[int]:
        return [commit.step for commit in self.store.list_committed()]

    def read_step(self, step: int) -> int:
        """Read from the store which step the weights of a commit say they are."""
        (commit,) = [commit for commit in self.store.list_committed() if commit.step == step]
        folder = fetch(commit.checkpoint, self.directory / uuid.uuid4().hex)
        return int.from_bytes((folder / "model.safetensors").read_bytes()[:4])
