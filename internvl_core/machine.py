"""What arguments ask of the machine that they are launched on."""

import importlib.util
from collections.abc import Iterator
from typing import Any

import torch


def iter_machine_problems(training: Any) -> Iterator[str]:
    """Yield what this machine cannot do of what the training arguments ask for.

    Args:
        training: `TrainingArguments`, with `use_cpu` as it will be.
    """
    has_cuda = not training.use_cpu and torch.cuda.is_available()
    if training.fp16 and training.use_cpu:
        yield "fp16: needs a GPU, and none is used. Use bf16, which a CPU can do."
    if training.bf16 and has_cuda and not torch.cuda.is_bf16_supported():
        yield f"bf16: {torch.cuda.get_device_name()} cannot do it. Use fp16 or a GPU of Ampere or later."
    if training.tf32 and training.use_cpu:
        yield "tf32: needs a GPU of Ampere or later, and none is used. Leave it out."
    if "tensorboard" in (training.report_to or []) and importlib.util.find_spec("tensorboard") is None:
        yield "report_to: tensorboard is not installed. Run pip install tensorboard, or use none."
    if training.use_liger and not has_cuda:
        yield "use_liger: its kernels need a CUDA GPU, and none is used. Leave it out."
    elif training.use_liger and importlib.util.find_spec("liger_kernel") is None:
        yield 'use_liger: liger-kernel is not installed. Run pip install "liger-kernel>=0.8.5,<0.9", or leave it out.'
