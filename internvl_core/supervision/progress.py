"""What a rank and its supervisor say to each other: short lines, over the supervisor's socket.

A rank says how far it is, that a signal asked it to stop, and that it leaves on purpose; the
supervisor says `STOP`. Whoever vanishes without a word is lost. Standard library only.
"""

import enum
import json
import signal
from dataclasses import asdict, dataclass

STOP = b"stop\n"

STACKS_SIGNAL = signal.SIGUSR2
"""On it a rank writes the stacks of its threads into its file of `STACKS_DIR`. SIGUSR1 is Slurm's favourite."""


class Phase(enum.StrEnum):
    """What a rank is at; each has a limit of its own."""

    SETUP = "setup"
    """Until the end of the first step."""
    STEP = "step"
    SAVE = "save"
    EVALUATE = "evaluate"
    FINISH = "finish"
    """The final weights: saved, published, handed over."""

    @property
    def has_work_to_lose(self) -> bool:
        """Whether there is something that a stop has to wait for."""
        return self not in (Phase.SETUP, Phase.EVALUATE)


class Kind(enum.StrEnum):
    """What a line says."""

    PROGRESS = "progress"
    SIGNAL = "signal"
    """A signal asked this rank to stop."""
    IMPATIENCE = "impatience"
    """Signals asked this rank not to wait for a save; it is gone."""
    LEAVE = "leave"
    """This rank ends itself, well or with a failure that it has told."""


@dataclass(frozen=True)
class Message:
    """One line of a rank."""

    kind: Kind
    rank: int
    phase: Phase = Phase.SETUP
    step: int | None = None
    text: str = ""

    def to_line(self) -> bytes:
        return json.dumps(asdict(self)).encode() + b"\n"

    @classmethod
    def from_line(cls, line: bytes) -> "Message":
        """Raises:
        ValueError: it is none.
        """
        try:
            content = json.loads(line)
            return cls(
                kind=Kind(content["kind"]),
                rank=int(content["rank"]),
                phase=Phase(content["phase"]),
                step=None if content["step"] is None else int(content["step"]),
                text=str(content["text"]),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a rank's line: {error}") from None
