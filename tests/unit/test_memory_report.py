import pytest
import torch

from internvl_core.errors import OutOfMemory
from internvl_core.train.memory_report import explain_elsewhere, explaining_memory
from internvl_core.train.update import Forward, Update

CUDA = (
    "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79 GiB.\nIf reserved memory is ..."
)


def explain(update: Update, error: Exception, packs_per_forward: int | None = None) -> OutOfMemory:
    with pytest.raises(OutOfMemory) as caught, explaining_memory(update, packs_per_forward=packs_per_forward):
        raise error
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.fixture
def update() -> Update:
    update = Update()
    update.record(Forward(["pets:1"], 5, 0, 5), step=12)
    update.record(Forward(["pets:2", "cars:3"], 4000, 24, 4096), step=12)
    return update


def test_the_forward_that_did_not_fit_is_described_with_what_to_lower(update: Update) -> None:
    error = explain(update, torch.cuda.OutOfMemoryError(CUDA), packs_per_forward=2)
    assert str(error).startswith(
        "step 12, forward 2: CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total"
    )
    assert "2 packs of 2 samples: 4000 tokens (4096 with padding), 24 tiles" in str(error)
    assert "Lower max_packed_tokens, num_images_expected or per_device_train_batch_size" in str(error)
    assert (error.step, error.sample_ids) == (12, ["pets:2", "cars:3"])


def test_samples_that_are_padded_have_other_things_to_lower(update: Update) -> None:
    error = explain(update, RuntimeError("std::bad_alloc"))
    assert "2 samples: 4000 tokens" in str(error)
    assert "max_dynamic_patch" in str(error)
    assert "packed" not in str(error)


def test_memory_that_is_short_before_the_first_forward_is_described_without_one() -> None:
    error = explain(Update(), MemoryError())
    assert str(error).startswith("MemoryError. Outside of a step: ")
    assert (error.step, error.sample_ids) == (None, ())


def test_other_errors_are_passed_on(update: Update) -> None:
    for error in (RuntimeError("mat1 and mat2"), OSError("no such file"), KeyError("x")):
        with pytest.raises(type(error)) as caught, explaining_memory(update, packs_per_forward=None):
            raise error
        assert caught.value is error


def test_a_worker_that_ran_out_is_not_blamed_on_the_forward(update: Update) -> None:
    error = MemoryError(
        "Caught MemoryError in DataLoader worker process 1.\nOriginal Traceback (most recent call last):"
    )
    with pytest.raises(MemoryError), explaining_memory(update, packs_per_forward=None):
        raise error
    told = str(explain_elsewhere(error))
    assert told.startswith(
        "A worker of the data loader ran out of memory (Caught MemoryError in DataLoader worker process 1)"
    )
