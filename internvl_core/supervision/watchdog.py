"""Tell a run that stands still from one that is slow.

A phase's limit is the given floor or five times the longest pause that the run has made in that
phase, whichever is more. The run stands still when no rank gets on: ranks need each other, so one
that hangs soon holds up all. Standard library only, without a clock of its own.
"""

from dataclasses import dataclass

from internvl_core.supervision.progress import Phase

_TIMES_LONGEST = 5
_MAX_TICK_S = 1.0
_MAX_NAMED = 8


@dataclass(frozen=True)
class Limits:
    """How long a run may be without progress."""

    setup_s: float
    """From the start of the command to the end of the first step."""
    stall_s: float
    """Floor for every other phase."""
    save_s: float
    """Floor while saving."""


@dataclass
class _Position:
    """How far a rank is."""

    phase: Phase
    step: int | None
    heard: float
    num_heard: int = 1
    """Since the step changed: ranks say the same things in the same order."""

    @property
    def order(self) -> tuple[int, int]:
        return (-1 if self.step is None else self.step, self.num_heard)


@dataclass(frozen=True)
class Stall:
    """A run that stands still."""

    phase: Phase
    step: int | None
    seconds: float
    limit_s: float
    behind: list[int]
    """Ranks that have done less than others; none if all stand at the same place."""
    where: str

    def __str__(self) -> str:
        place = "before the first step" if self.step is None else f"after step {self.step}"
        return (
            f"No progress for {self.seconds:.0f} s in phase {self.phase}, {place}; its limit is {self.limit_s:g} s. "
            f"{self.where}"
        )


class Watchdog:
    """What is known about the progress of all ranks."""

    def __init__(self, limits: Limits, now: float) -> None:
        self._limits = limits
        self._now = now
        self._clock = 0.0
        self._ranks: dict[int, _Position] = {}
        self._longest: dict[Phase, float] = {}
        self._is_set_up = False

    @property
    def step(self) -> int | None:
        """The last step that any rank told."""
        return max((each.step for each in self._ranks.values() if each.step is not None), default=None)

    @property
    def phases(self) -> dict[int, Phase]:
        return {rank: each.phase for rank, each in self._ranks.items()}

    def advance(self, now: float) -> None:
        """Let time pass, at most a second a call: while the supervisor itself was held up, nothing was watched."""
        self._clock += min(now - self._now, _MAX_TICK_S)
        self._now = now

    def hear(self, rank: int, phase: Phase, step: int | None) -> None:
        """Note that a rank gets on."""
        self._is_set_up |= phase is not Phase.SETUP
        position = self._ranks.get(rank)
        if position is None:
            self._ranks[rank] = _Position(phase, step, self._clock)
            return
        pause_s = self._clock - position.heard
        self._longest[position.phase] = max(pause_s, self._longest.get(position.phase, 0.0))
        is_new_step = step is not None and step != position.step
        position.num_heard = 1 if is_new_step else position.num_heard + 1
        position.step = position.step if step is None else step
        position.phase, position.heard = phase, self._clock

    def find_stall(self) -> Stall | None:
        if not self._is_set_up:
            return self._describe(Phase.SETUP, self._clock, self._limits.setup_s)
        idle_s = self._clock - max(each.heard for each in self._ranks.values())
        # Who waits for a rank that saves has its limit.
        limit_s, phase = max((self._find_limit(each.phase), each.phase) for each in self._ranks.values())
        return self._describe(phase, idle_s, limit_s)

    def _find_limit(self, phase: Phase) -> float:
        floor_s = self._limits.stall_s
        if phase in (Phase.SAVE, Phase.FINISH):
            floor_s = max(floor_s, self._limits.save_s)
        # The pauses of a setup say nothing about the steps after it, nor does a rank that is late with its first.
        longest_s = 0.0 if phase is Phase.SETUP else self._longest.get(phase, 0.0)
        return max(floor_s, _TIMES_LONGEST * longest_s)

    def _describe(self, phase: Phase, seconds: float, limit_s: float) -> Stall | None:
        if seconds <= limit_s:
            return None
        furthest = max((each.order for each in self._ranks.values()), default=None)
        behind = sorted(rank for rank, each in self._ranks.items() if each.order != furthest)
        return Stall(phase, self.step, seconds, limit_s, behind, self._tell_places(behind))

    def _tell_places(self, behind: list[int]) -> str:
        if not self._ranks:
            return "No rank was ever up."
        if not behind:
            return f"All {len(self._ranks)} ranks stand at the same place."
        places = [f"rank {rank} ({self._tell_place(self._ranks[rank])})" for rank in behind[:_MAX_NAMED]]
        more = [f"{len(behind) - _MAX_NAMED} more"] if len(behind) > _MAX_NAMED else []
        ahead = max(self._ranks.values(), key=lambda each: each.order)
        return f"Behind the others ({self._tell_place(ahead)}): {', '.join([*places, *more])}."

    def _tell_place(self, position: _Position) -> str:
        return position.phase if position.step is None else f"{position.phase}, step {position.step}"
