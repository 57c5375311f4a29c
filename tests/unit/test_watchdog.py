"""Which pauses are stalls, and who is behind; the test owns the clock."""

import pytest

from internvl_core.supervision.progress import Phase
from internvl_core.supervision.watchdog import Limits, Stall, Watchdog

LIMITS = Limits(setup_s=100, stall_s=10, save_s=40)


class Run:
    """Two ranks under a watchdog."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.watchdog = Watchdog(LIMITS, self.now)

    def wait(self, seconds: float, *, tick_s: float = 0.5) -> Stall | None:
        end = self.now + seconds
        while self.now < end:
            self.now += tick_s
            self.watchdog.advance(self.now)
        return self.watchdog.find_stall()

    def tell(self, phase: Phase, step: int | None, *ranks: int) -> None:
        for rank in ranks or (0, 1):
            self.watchdog.hear(rank, phase, step)


@pytest.fixture
def run() -> Run:
    return Run()


@pytest.fixture
def stepping(run: Run) -> Run:
    run.tell(Phase.SETUP, None)
    run.wait(50)
    run.tell(Phase.STEP, 1)
    return run


def test_ranks_that_never_come_up_are_a_stall_of_the_setup(run):
    assert run.wait(100) is None
    stall = run.wait(1)
    assert (stall.phase, stall.step, stall.behind) == (Phase.SETUP, None, [])
    assert str(stall).startswith("No progress for 101 s in phase setup, before the first step; its limit is 100 s.")
    assert "No rank was ever up." in str(stall)


def test_a_setup_that_gets_on_without_a_first_step_is_a_stall_all_the_same(run):
    for _ in range(10):
        run.tell(Phase.SETUP, 0)
        assert run.wait(9.5) is None
    assert run.wait(6).phase is Phase.SETUP


def test_a_stage_of_which_only_the_evaluation_is_left_has_no_first_step(run):
    run.tell(Phase.EVALUATE, None)
    for _ in range(20):
        assert run.wait(9.5) is None
        run.tell(Phase.EVALUATE, None)


def test_a_long_setup_allows_no_long_steps(stepping):
    assert stepping.wait(10) is None
    stall = stepping.wait(1)
    assert (stall.phase, stall.step, stall.limit_s, stall.behind) == (Phase.STEP, 1, 10, [])
    assert "All 2 ranks stand at the same place." in str(stall)


def test_a_run_whose_steps_are_long_is_given_five_times_the_longest(stepping):
    stepping.wait(8)
    stepping.tell(Phase.STEP, 2)
    assert stepping.wait(40) is None
    assert stepping.wait(1).limit_s == 40


def test_a_save_may_last_as_long_as_a_stop_may_and_the_step_after_it_not(stepping):
    stepping.tell(Phase.SAVE, 1)
    assert stepping.wait(40) is None
    stepping.tell(Phase.STEP, 1)
    assert stepping.wait(10) is None
    assert stepping.wait(1).limit_s == 10


def test_a_rank_that_waits_for_one_that_saves_is_not_a_stall(stepping):
    stepping.tell(Phase.FINISH, 1, 0)
    stepping.tell(Phase.EVALUATE, None, 1)
    assert stepping.wait(39) is None
    assert stepping.wait(2).phase is Phase.FINISH


def test_a_rank_that_gets_on_alone_keeps_the_run_alive(stepping):
    for _ in range(5):
        assert stepping.wait(8) is None
        stepping.tell(Phase.EVALUATE, None, 1)


@pytest.mark.parametrize(
    ("told", "where"),
    [
        ([(Phase.STEP, 2)], "Behind the others (step, step 2): rank 0 (step, step 1)."),
        # A batch of the same step more.
        ([(Phase.STEP, 1)], "Behind the others (step, step 1): rank 0 (step, step 1)."),
    ],
)
def test_the_rank_that_has_done_less_is_named(stepping, told, where):
    for phase, step in told:
        stepping.tell(phase, step, 1)
    stall = stepping.wait(11)
    assert stall.behind == [0]
    assert where in str(stall)


def test_time_in_which_the_supervisor_was_held_up_does_not_count(stepping):
    assert stepping.wait(3600, tick_s=3600) is None
    assert stepping.wait(8) is None
    assert stepping.wait(2) is not None
