"""A rank of our own trainer that notes the bytes it holds between batches and whenever its optimizer is about to step.

Usage under torchrun: held_memory.py FOLDER --key=value ... Each rank writes FOLDER/<rank>.json, the most of each kind.
Storages are counted once each, however many tensors share them.
"""

import gc
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from internvl_core.model.internvl import InternVLForTraining
from internvl_core.train.entry import main
from internvl_core.train.supervisor_link import SupervisorLink


def note(folder: Path, optimizer: Any) -> None:
    (model,) = (each for each in gc.get_objects() if isinstance(each, InternVLForTraining))
    parameters = list(model.parameters())
    storages: set[int] = set()
    held = {
        "weights": add_up(storages, [*parameters, *(getattr(each, "ds_tensor", None) for each in parameters)]),
        "gradients": add_up(storages, [*(each.grad for each in parameters), *iter_gradients(optimizer)]),
        "optimizer": add_up(storages, iter_state(optimizer)),
    }
    path = folder / f"{os.environ['RANK']}.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({kind: max(held[kind], before.get(kind, 0)) for kind in held}))


def add_up(storages: set[int], tensors: Iterable[Tensor | None]) -> int:
    num_bytes = 0
    for tensor in tensors:
        if tensor is not None and tensor.untyped_storage().data_ptr() not in storages:
            storages.add(tensor.untyped_storage().data_ptr())
            num_bytes += tensor.untyped_storage().nbytes()
    return num_bytes


def iter_gradients(optimizer: Any) -> Iterator[Tensor]:
    for gradients in getattr(optimizer, "averaged_gradients", {}).values():
        yield from gradients or ()
    flat = getattr(optimizer, "grad_partitions_flat_buffer", None)
    if flat is not None:
        yield flat


def iter_state(optimizer: Any) -> Iterator[Tensor]:
    yield from getattr(optimizer, "single_partition_of_fp32_groups", ())
    yield from getattr(optimizer, "fp32_partitioned_groups_flat", ())
    for state in getattr(optimizer, "optimizer", optimizer).state.values():
        yield from (each for each in state.values() if isinstance(each, Tensor))


def watch(folder: Path) -> None:
    backward = deepspeed.DeepSpeedEngine.backward

    def backward_and_note(engine: Any, *args: Any, **kwargs: Any) -> Any:
        result = backward(engine, *args, **kwargs)
        note(folder, engine.optimizer)
        return result

    if any(item.startswith("--deepspeed=") for item in sys.argv):
        deepspeed.DeepSpeedEngine.backward = backward_and_note
    else:
        register_optimizer_step_pre_hook(lambda optimizer, args, kwargs: note(folder, optimizer))


if __name__ == "__main__":
    started = time.monotonic()
    folder = Path(sys.argv.pop(1))
    torch.set_num_threads(1)
    watch(folder)
    main("finetune", SupervisorLink.connect(), started)
