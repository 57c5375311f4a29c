"""What libraries raise where memory or a disk is exhausted."""

import errno
from pathlib import Path

import pytest
import torch

from internvl_core.errors import OutOfMemory
from internvl_core.exhaustion import is_disk_full, is_out_of_memory


def test_memory_that_torch_cannot_allocate_is_recognised() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60)
    assert is_out_of_memory(caught.value)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("std::bad_alloc"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        OutOfMemory("of a worker"),
    ],
    ids=repr,
)
def test_errors_about_memory_are_recognised(error: Exception) -> None:
    assert is_out_of_memory(error)
    assert not is_disk_full(error)


@pytest.mark.parametrize(
    "error",
    [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("out of memory"), OSError(errno.EIO, "")],
)
def test_other_errors_are_not_about_memory(error: Exception) -> None:
    assert not is_out_of_memory(error)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_errors_about_room_are_recognised_also_as_a_cause(number: int, tmp_path: Path) -> None:
    cause = OSError(number, "as the system says it")
    error = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")
    assert is_disk_full(cause)
    assert not is_disk_full(error, tmp_path)
    error.__context__ = cause
    assert is_disk_full(error)


def test_what_safetensors_and_old_torch_files_say_of_a_full_disk_is_recognised() -> None:
    for text in (
        "Error while serializing: I/O error: No space left on device (os error 28)",
        "write(): fd 3 failed with No space left on device",
        "Error while serializing: I/O error: Disk quota exceeded (os error 122)",
    ):
        assert is_disk_full(RuntimeError(text))


def test_a_file_that_was_cut_short_where_there_is_room_is_something_else(tmp_path: Path) -> None:
    assert not is_disk_full(RuntimeError("PytorchStreamWriter failed writing file data/1: file write failed"), tmp_path)
    assert not is_disk_full(OSError(errno.EIO, "Input/output error"), tmp_path)
    assert list(tmp_path.iterdir()) == []
