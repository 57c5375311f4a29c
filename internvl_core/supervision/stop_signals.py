"""Signals that ask for a stop, counted alike by the supervisor and in its ranks. Standard library only."""

import signal

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

_NUM_TO_LEAVE = 3
_WINDOW_S = 10.0


class StopSignals:
    """What was asked for: the first signal asks to save and leave, the next changes nothing, a third soon means now."""

    def __init__(self) -> None:
        self._received: list[tuple[float, str]] = []

    def note(self, number: int, now: float) -> None:
        self._received.append((now, signal.Signals(number).name))

    @property
    def first(self) -> str | None:
        return self._received[0][1] if self._received else None

    @property
    def is_impatient(self) -> bool:
        """Whether three came within 10 s: whoever sends them does not want to wait for a save."""
        times = [when for when, _ in self._received]
        return any(late - early <= _WINDOW_S for early, late in zip(times, times[_NUM_TO_LEAVE - 1 :], strict=False))

    def __str__(self) -> str:
        return ", ".join(name for _, name in self._received[-_NUM_TO_LEAVE:])
