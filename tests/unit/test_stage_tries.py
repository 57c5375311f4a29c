"""When a stage is tried again, and when not."""

import pytest

from internvl_core.errors import InternVLError, NoProgress, Stalled, StoreUnavailable, WorkerLost
from tasks.stage_tries import StageTries


def fail(tries: StageTries, *, reached: int | None, committed: int | None) -> InternVLError:
    lost = WorkerLost("No failure.json was left: rank 1 was killed by SIGKILL. Log: /attempts/1/trainer.log")
    return tries.note(lost, reached=reached, committed=committed)


def test_the_fourth_failure_without_a_newer_commit_is_no_progress_and_lists_all():
    tries = StageTries("stage1", 3)
    stalled = Stalled("No progress for 600 s.")
    assert isinstance(fail(tries, reached=37, committed=30), WorkerLost)
    assert tries.note(stalled, reached=None, committed=30) is stalled
    assert isinstance(fail(tries, reached=31, committed=30), WorkerLost)
    error = fail(tries, reached=33, committed=30)
    assert isinstance(error, NoProgress)
    assert not error.is_retryable
    assert str(error) == (
        "stage1: retried 3 times without a newer commit; the newest is step 30. "
        "Try 1: WorkerLost at step 37: No failure.json was left: rank 1 was killed by SIGKILL. "
        "Try 2: Stalled: No progress for 600 s. "
        "Try 3: WorkerLost at step 31: No failure.json was left: rank 1 was killed by SIGKILL. "
        "Try 4: WorkerLost at step 33: No failure.json was left: rank 1 was killed by SIGKILL. "
        "Remove the cause and run the recipe again: it resumes there."
    )


def test_a_newer_commit_begins_the_count_anew():
    tries = StageTries("stage1", 3)
    for committed in range(0, 300, 10):
        assert isinstance(fail(tries, reached=committed + 7, committed=committed), WorkerLost)
    for _ in range(2):
        assert isinstance(fail(tries, reached=297, committed=290), WorkerLost)
    assert isinstance(fail(tries, reached=297, committed=290), NoProgress)


def test_a_first_commit_is_a_newer_one():
    tries = StageTries("stage1", 1)
    assert isinstance(fail(tries, reached=3, committed=None), WorkerLost)
    assert isinstance(fail(tries, reached=3, committed=2), WorkerLost)
    assert isinstance(fail(tries, reached=3, committed=2), NoProgress)


def test_a_store_that_cannot_say_what_is_committed_is_no_progress():
    tries = StageTries("stage1", 2)
    assert isinstance(fail(tries, reached=7, committed=5), WorkerLost)
    tries.note(StoreUnavailable("s3://bucket: no answer."), reached=None, committed=None)
    assert "resuming from step 5" in tries.describe_retry(None)
    error = tries.note(StoreUnavailable("s3://bucket: no answer."), reached=None, committed=None)
    assert isinstance(error, NoProgress)
    assert "the newest is step 5" in str(error)


def test_a_failure_that_is_noted_twice_counts_once():
    tries = StageTries("stage1", 1)
    lost = WorkerLost("gone")
    for _ in range(3):
        assert tries.note(lost, reached=1, committed=None) is lost


def test_all_tries_that_failed_are_remembered_with_what_they_lost_through_newer_commits_too():
    tries = StageTries("stage1", 3)
    fail(tries, reached=37, committed=30)
    fail(tries, reached=60, committed=60)
    tries.note(Stalled("No progress for 600 s."), reached=None, committed=60)
    assert [each.describe() for each in tries.failed] == [
        "WorkerLost at step 37, 7 steps lost",
        "WorkerLost at step 60",
        "Stalled",
    ]


def test_without_retries_the_failure_itself_is_told():
    assert isinstance(fail(StageTries("stage1", 0), reached=1, committed=None), WorkerLost)


def test_more_than_three_retries_in_a_row_are_not_granted():
    tries = StageTries("stage1", 10)
    errors = [fail(tries, reached=1, committed=None) for _ in range(4)]
    assert [type(error) for error in errors] == [WorkerLost] * 3 + [NoProgress]
    assert "nothing is committed" in str(errors[-1])


@pytest.mark.parametrize(
    ("reached", "committed", "told"),
    [
        (37, 30, "stage1: try 2 of 4 after WorkerLost at step 37, resuming from step 30; 7 steps lost"),
        (30, 30, "stage1: try 2 of 4 after WorkerLost at step 30, resuming from step 30"),
        (4, None, "stage1: try 2 of 4 after WorkerLost at step 4, from the start; 4 steps lost"),
        (None, None, "stage1: try 2 of 4 after WorkerLost, from the start"),
        (None, 30, "stage1: try 2 of 4 after WorkerLost, resuming from step 30"),
    ],
)
def test_a_retry_says_what_it_comes_after_and_where_it_goes_on(reached, committed, told):
    tries = StageTries("stage1", 3)
    assert tries.describe_retry(committed) is None
    fail(tries, reached=reached, committed=committed)
    assert tries.describe_retry(committed) == told
