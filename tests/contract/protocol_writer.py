"""Writers that drive the commit protocol's real code over the model of a store, and may die or be overtaken."""

import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import greenlet
from protocol_model import FILES, ModelBackend, PowerCut

from internvl_core.checkpoint import garbage, handover, publication
from internvl_core.checkpoint.acquisition import BEAT_TTL_S, acquire
from internvl_core.checkpoint.commits import Commit, CommitName
from internvl_core.checkpoint.lease import Lease, Owner
from internvl_core.checkpoint.manifest import CheckpointKind, Manifest
from internvl_core.checkpoint.verify import verify
from internvl_core.contract import CheckpointRef
from internvl_core.errors import CheckpointCorrupt, CheckpointNotFound, Fenced, LeaseHeld, StoreUnavailable

KEEP = 2
TRAINING, FINAL = CheckpointKind.TRAINING, CheckpointKind.FINAL

T = TypeVar("T")


class LeapingClock:
    """One sleep, during which others may do something, and the TTL is over."""

    def __init__(self, on_sleep: Callable[[], None] = lambda: None) -> None:
        self._now_s = 0.0
        self._on_sleep = on_sleep

    def monotonic(self) -> float:
        return self._now_s

    def sleep(self, seconds: float, /) -> None:
        self._on_sleep()
        self._now_s += BEAT_TTL_S


@dataclass
class Writer:
    """One process of a training: takes the lease, saves, collects garbage, hands over; notes what was acknowledged."""

    name: str
    backend: ModelBackend
    last_step: int
    patience: int = 0
    """Outages that it survives."""
    takes_over: bool = False
    tries_for_lease: int = 1
    on_sleep: Callable[[], None] = lambda: None
    lease: Lease | None = None
    acknowledged: list[CommitName] = field(default_factory=list)
    has_handed_over: bool = False
    ending: str = "crashed"
    verified: set[str] = field(default_factory=set)

    @property
    def owner(self) -> Owner:
        return Owner(self.name, f"host of {self.name}", f"boot of {self.name}", "", 1, 1)

    def run(self) -> None:
        try:
            self._train()
            self.ending = "finished"
        except PowerCut:
            pass
        except (LeaseHeld, Fenced, StoreUnavailable) as error:
            self.ending = type(error).__name__

    def _train(self) -> None:
        if self._try(lambda: handover.find_handover(self.backend)):
            return
        while self.lease is None:
            try:
                self._try(self.take_lease)
            except LeaseHeld:
                self.tries_for_lease -= 1
                if self.tries_for_lease == 0:
                    raise
        base = self.lease.base
        for step in range(base.step + 1 if base else 1, self.last_step + 1):
            self._beat(step)
            self.save(step, TRAINING)
            self.collect()
        is_trained = base is not None and base.name.age >= (self.last_step, True)
        final = base.checkpoint if is_trained else self.save(self.last_step, FINAL)
        self._try(lambda: handover.hand_over(self.backend, final, {"by": self.name}, fence=self.fence))
        self.has_handed_over = True
        self.collect()
        self._try(self.lease.release)

    def take_lease(self) -> None:
        self.lease = acquire(
            self.backend,
            self.owner,
            choose_base=lambda commits: next((commit for commit in commits if is_whole(self.backend, commit)), None),
            takes_over=self.takes_over,
            clock=LeapingClock(self.on_sleep),
        )

    @property
    def fence(self) -> int:
        assert self.lease is not None
        return self.lease.fence

    def save(self, step: int, kind: CheckpointKind) -> CheckpointRef:
        tries = iter(range(100))

        def publish() -> CheckpointRef:
            return publication.publish(
                self.backend,
                f"{step:012d}.{self.fence:06d}.{ord(self.name):02x}{next(tries):02x}{kind is FINAL:02x}",
                Path(self.name, str(step)),
                FILES,
                Manifest("stage", "f" * 64, step, self.fence, kind, None, {"by": self.name}, ()),
            )

        checkpoint = self._try(publish)
        self.acknowledged.append(CommitName(step, self.fence, kind))
        with suppress(StoreUnavailable):
            verify(self.backend, checkpoint)
            self.verified.add(checkpoint.digest)
        return checkpoint

    def collect(self) -> None:
        with suppress(StoreUnavailable):
            garbage.collect_garbage(self.backend, self.fence, keep=KEEP, verified=self.verified)

    def _beat(self, step: int) -> None:
        assert self.lease is not None
        with suppress(StoreUnavailable):
            self.lease.beat(step=step, phase="training")

    def _try(self, act: Callable[[], T]) -> T:
        while True:
            try:
                return act()
            except StoreUnavailable:
                self.patience -= 1
                if self.patience < 0:
                    raise


def run_together(writers: Sequence[Writer], seed: int, *, crash_chance: float) -> None:
    """Let writers of one store go on in turns, an operation each, at random; some die on the way."""
    chance = random.Random(seed)
    hub = greenlet.getcurrent()
    share = chance.random()
    runs = {}
    for writer in writers:
        writer.backend.on_operation = hub.switch
        writer.on_sleep = lambda: [hub.switch() for _ in range(chance.randrange(40))]
        runs[writer.name] = greenlet.greenlet(writer.run)
    while runs:
        name = next(iter(runs)) if len(runs) == 1 or chance.random() < share else list(runs)[-1]
        if chance.random() < crash_chance:
            # One that has not begun cannot catch it itself.
            with suppress(PowerCut):
                runs[name].throw(PowerCut)
        else:
            runs[name].switch()
        runs = {name: run for name, run in runs.items() if not run.dead}


def is_whole(backend: ModelBackend, commit: Commit) -> bool:
    try:
        verify(backend, commit.checkpoint)
    except (CheckpointCorrupt, CheckpointNotFound):
        return False
    return True
