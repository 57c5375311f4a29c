"""How many signals mean what."""

import signal

import pytest

from internvl_core.supervision.stop_signals import StopSignals


@pytest.mark.parametrize(
    ("times", "is_impatient"),
    [([], False), ([0, 0], False), ([0, 5, 10], True), ([0, 5, 11], False), ([0, 60, 63, 69], True)],
)
def test_three_signals_within_ten_seconds_mean_now(times, is_impatient):
    signals = StopSignals()
    for time in times:
        signals.note(signal.SIGTERM, time)
    assert signals.is_impatient is is_impatient


def test_the_first_one_is_the_reason():
    signals = StopSignals()
    assert signals.first is None
    signals.note(signal.SIGINT, 0)
    signals.note(signal.SIGTERM, 1)
    assert (signals.first, str(signals)) == ("SIGINT", "SIGINT, SIGTERM")
