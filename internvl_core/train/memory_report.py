"""Say of a training that ran out of memory what it was at, and what to lower."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from internvl_core.errors import OutOfMemory
from internvl_core.exhaustion import is_out_of_memory
from internvl_core.train.update import Update

_WORKER = re.compile(r"Caught \w+ in DataLoader worker process \d+")
_GIB = 1024**3


@contextmanager
def explaining_memory(update: Update, *, packs_per_forward: int | None) -> Iterator[None]:
    """Turn what libraries raise where memory runs out into one error that names the forward.

    Args:
        packs_per_forward: None where samples are padded.

    Raises:
        OutOfMemory: with the samples of the forward.
    """
    try:
        yield
    except (MemoryError, OSError, RuntimeError) as error:
        if not is_out_of_memory(error) or _WORKER.match(str(error)):
            raise
        raise _explain(error, update, packs_per_forward) from error


def explain_elsewhere(error: BaseException) -> OutOfMemory:
    """Describe an error about memory outside of a forward: while a model is loaded, in a worker of the data loader."""
    said = _tell(error)
    worker = _WORKER.match(said)
    if worker:
        return OutOfMemory(
            f"A worker of the data loader ran out of memory ({worker[0]}). Lower dataloader_num_workers or "
            "dataloader_prefetch_factor, or give the run more memory."
        )
    return OutOfMemory(
        f"{said}. Outside of a step: give the run more memory, or spread the model over more GPUs (deepspeed: zero3)."
    )


def _explain(error: BaseException, update: Update, packs_per_forward: int | None) -> OutOfMemory:
    if not update.forwards:
        return explain_elsewhere(error)
    forward = update.forwards[-1]
    if packs_per_forward is None:
        unit = f"{len(forward.sample_ids)} samples"
        advice = "per_device_train_batch_size (gradient_accumulation_steps makes up for it), max_dynamic_patch or"
        advice += " max_seq_length"
    else:
        unit = f"{packs_per_forward} packs of {len(forward.sample_ids)} samples"
        advice = "max_packed_tokens, num_images_expected or per_device_train_batch_size"
    return OutOfMemory(
        f"step {update.step}, forward {len(update.forwards)}: {_tell(error)}. It was at {unit}: "
        f"{forward.tokens} tokens ({forward.places} with padding), {forward.tiles} tiles{_tell_peak()}. Lower "
        f"{advice}, or set grad_checkpoint; internvl plan estimates what fits.",
        step=update.step,
        sample_ids=list(forward.sample_ids),
    )


def _tell(error: BaseException) -> str:
    """Take the first line; torch adds paragraphs about the allocator's settings."""
    line = next(iter(str(error).splitlines()), "").rstrip(". ")
    return line if line else type(error).__name__


def _tell_peak() -> str:
    if not torch.cuda.is_available():
        return ""
    return f", at most {torch.cuda.max_memory_allocated() / _GIB:.1f} GiB of the GPU so far"
