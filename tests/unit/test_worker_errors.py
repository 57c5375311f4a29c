"""An error of a data loader's worker, as the stage tells it."""

import traceback

import pytest
from torch.utils.data import DataLoader, Dataset

from internvl_core.errors import DataError, InternVLError, MediaError, StoreUnavailable
from internvl_core.train.run import _unwrap_worker_error

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


def fail(error: InternVLError, *, num_workers: int) -> InternVLError:
    with pytest.raises(InternVLError) as caught:
        next(iter(DataLoader(Broken(error), num_workers=num_workers)))
    return _unwrap_worker_error(caught.value)


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
    assert _unwrap_worker_error(error) is error
