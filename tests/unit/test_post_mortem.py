"""What a dead trainer's files are taken to say."""

import json

import pytest

from internvl_core.contract import LOG_FILE
from internvl_core.supervision.post_mortem import TORCHELASTIC_FILE, explain_exit, explain_stop

REPORT = """\
step 3 loss 1.2

Traceback (most recent call last):
  File "rank.py", line 7, in <module>
RuntimeError: boom
=====================
W1121 11:36:14.140000 7563 torch/distributed/elastic/multiprocessing/api.py:1028] Sending process 7568 closing signal
E1121 11:36:14.142000 7563 torch/distributed/elastic/multiprocessing/api.py:1002] failed (exitcode: 1) local_rank: 1
Traceback (most recent call last):
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
Failures:
[1]:
  rank      : 0 (local_rank: 0)
  exitcode  : -15 (pid: 7568)  (SIGTERM)
------------------------------------------------------------
Root Cause (first observed failure):
[0]:
  time      : 2026-11-21_11:36:14
  host      : localhost
  rank      : 5 (local_rank: 1)
  exitcode  : {exit_code} (pid: 7569)
"""


@pytest.mark.parametrize(
    ("exit_code", "cause"),
    [(1, "rank 5 ended with exit code 1"), (-11, "rank 5 was killed by SIGSEGV. "), (-40, "killed by signal 40.")],
)
def test_the_rank_that_failed_first_is_named_and_not_those_that_torchrun_ended(tmp_path, exit_code, cause):
    (tmp_path / LOG_FILE).write_text(REPORT.format(exit_code=exit_code))

    failure = explain_exit(tmp_path, 1)

    assert failure.error == "WorkerLost"
    assert failure.rank == 5
    assert cause in failure.message
    assert failure.message.endswith(f"Log: {tmp_path / LOG_FILE}")


def test_the_last_words_are_the_trainers_and_not_torchruns(tmp_path):
    (tmp_path / LOG_FILE).write_text(REPORT)

    assert explain_exit(tmp_path, 1).traceback.splitlines() == [
        "step 3 loss 1.2",
        "Traceback (most recent call last):",
        '  File "rank.py", line 7, in <module>',
        "RuntimeError: boom",
    ]


@pytest.mark.parametrize("message", ["ValueError: no\nmore", {"message": "ValueError: no", "extraInfo": {}}])
def test_the_exception_in_torchruns_error_file_is_part_of_the_cause(tmp_path, message):
    (tmp_path / TORCHELASTIC_FILE).write_text(json.dumps({"message": message}))

    assert "ended with exit code 1 (ValueError: no)." in explain_exit(tmp_path, 1).message


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"message": null}', '{"message": {}}', '{"message": " "}'])
def test_an_error_file_that_says_nothing_hides_nothing(tmp_path, content):
    (tmp_path / TORCHELASTIC_FILE).write_text(content)

    assert "the trainer's command ended with exit code 1. Log" in explain_exit(tmp_path, 1).message


def test_only_the_end_of_a_long_log_is_kept(tmp_path):
    (tmp_path / LOG_FILE).write_text("".join(f"line {number}\n" for number in range(100_000)))

    assert explain_exit(tmp_path, 1).traceback.splitlines() == [f"line {number}" for number in range(99_995, 100_000)]


def test_a_stop_says_why_nothing_was_committed(tmp_path):
    assert "committed: no rank was up yet." in explain_stop(tmp_path, -9, "no rank was up yet").message
    assert "committed: the trainer's command ended with exit code 1." in explain_stop(tmp_path, 1, None).message
