"""An error of a data loader's worker, as the stage tells it."""

import errno
import os
import signal
import traceback

import pytest
from torch.utils.data import DataLoader, Dataset

from internvl_core.errors import (
    DataError,
    DiskFull,
    InternVLError,
    MediaError,
    OutOfMemory,
    StoreUnavailable,
    WorkerLost,
)
from internvl_core.train.entry import classify

MESSAGE = "data/a.jsonl:3: 2 <image> tags but 1 image. Fix the record."


class Broken(Dataset[int]):
    def __init__(self, error: InternVLError) -> None:
        self._error = error

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        try:
            raise type(self._error)("an error before it, which the traceback tells first")
        except InternVLError as first:
            raise self._error from first


class Killed(Dataset[int]):
    """As the kernel kills where memory is short."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


class Greedy(Dataset[int]):
    """As a collator without memory."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        raise MemoryError


def fail(error: InternVLError, *, num_workers: int) -> BaseException:
    with pytest.raises(InternVLError) as caught:
        next(iter(DataLoader(Broken(error), num_workers=num_workers)))
    return classify(caught.value)


def test_a_worker_that_is_killed_is_a_lost_worker_and_so_tried_again() -> None:
    with pytest.raises(RuntimeError) as caught:
        next(iter(DataLoader(Killed(), num_workers=1)))
    error = classify(caught.value)
    assert isinstance(error, WorkerLost)
    assert str(error).startswith("A worker of the data loader was lost: DataLoader worker (pid")
    assert "\n" not in str(error)


def test_an_error_of_the_program_stays_what_it_is() -> None:
    error = RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    assert classify(error) is error


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("kind", [DataError, MediaError, StoreUnavailable, InternVLError])
def test_an_error_has_the_same_class_and_message_from_a_worker(kind: type[InternVLError], num_workers: int) -> None:
    error = fail(kind(MESSAGE), num_workers=num_workers)
    assert (type(error), str(error)) == (kind, MESSAGE)


def test_the_lines_of_a_message_from_a_worker_become_one() -> None:
    error = fail(StoreUnavailable("s3://b: does not answer\n\n  refused twice: 503\n"), num_workers=1)
    assert str(error) == "s3://b: does not answer; refused twice: 503"
    # What failure.json keeps for whoever looks for the place.
    assert "in __getitem__" in "".join(traceback.format_exception(error))


@pytest.mark.parametrize("message", ["", "Two lines.\nOriginal Traceback: of none, it is text."])
def test_an_error_that_no_worker_raised_stays_as_it_is(message: str) -> None:
    error = DataError(message)
    assert classify(error) is error


def test_memory_that_a_worker_lacks_is_out_of_memory() -> None:
    with pytest.raises(MemoryError) as caught:
        next(iter(DataLoader(Greedy(), num_workers=1)))
    error = classify(caught.value)
    assert isinstance(error, OutOfMemory)
    assert "worker process 0" in str(error)
    assert "\n" not in str(error)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_sample_for_which_there_was_no_memory_is_known_outside_of_its_worker(num_workers: int) -> None:
    sent = OutOfMemory(
        "a.jsonl:3: no memory left for the sample cats: and dogs:3. Lower it.", sample_ids=["cats: and dogs:3"]
    )
    error = fail(sent, num_workers=num_workers)
    assert isinstance(error, OutOfMemory)
    assert str(error) == str(sent)
    assert list(error.sample_ids) == ["cats: and dogs:3"]


def test_a_disk_without_room_is_a_full_disk_wherever_it_is_met() -> None:
    error = classify(OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl"))
    assert isinstance(error, DiskFull)
    assert "'metrics.jsonl'" in str(error)
