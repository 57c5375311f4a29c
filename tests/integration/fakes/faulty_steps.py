"""A rank of our own trainer whose steps go wrong: what is not finite, what does not fit into memory.

Usage under torchrun: faulty_steps.py ENTRY FAULTS --key=value ... with FAULTS a JSON object:
    loss, gradient   {step: [value, ranks]}: multiplies the loss, or the gradient of one parameter, on those ranks
    weight           {step: [value, ranks]}: put into the rank's part of a weight once the step is done
    memory           {step: [kind, ranks]}: raises what runs out of memory raise (`MEMORY_ERRORS`)
    room             {step: [[folder, bytes], ranks]}: fills the folder's disk but for so many, when the step is saved
Each rank leaves `state-<rank>.jsonl` in the attempt's directory: digests of what it trains before and behind each step.
"""

import hashlib
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from internvl_core.train import run
from internvl_core.train.entry import main as enter
from internvl_core.train.supervisor_link import SupervisorLink

RANK = int(os.environ["RANK"])

MEMORY_ERRORS = {
    "cuda": lambda: torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has ..."),
    "bad_alloc": lambda: RuntimeError("std::bad_alloc"),
    "cpu": lambda: torch.empty(1 << 60),
}


class FaultyTrainer(run.InternVLTrainer):
    """The trainer, with the faults of this rank."""

    faults: dict[str, dict[str, list[Any]]]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_callback(StateLog(self))
        self.model.register_forward_hook(self._spoil_loss)
        learning = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        learning[0].register_hook(self._spoil_gradient)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        if (kind := self.find("memory")) is not None:
            raise MEMORY_ERRORS[kind]()
        return super().compute_loss(*args, **kwargs)

    def _save_checkpoint(self, *args: Any) -> None:
        room = self.find("room", is_over=True)
        if room is not None:
            fill(*room)
        super()._save_checkpoint(*args)

    def find(self, kind: str, *, is_over: bool = False) -> Any:
        step = self.state.global_step + (not is_over)
        value, ranks = self.faults.get(kind, {}).get(str(step), (None, []))
        return value if RANK in ranks else None

    def _spoil_loss(self, module: Any, inputs: Any, output: Any) -> Any:
        value = self.find("loss")
        if value is not None and output.loss is not None:
            output.loss = output.loss * value
        return output

    def _spoil_gradient(self, gradient: Tensor) -> Tensor:
        value = self.find("gradient")
        return gradient if value is None else gradient * value


class StateLog(TrainerCallback):
    """Digests of weights and of the optimizer's state, before and behind each step."""

    def __init__(self, trainer: FaultyTrainer) -> None:
        self._trainer = trainer
        self._path = Path(trainer.args.output_dir).parent / f"state-{RANK}.jsonl"
        self._before: str | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._before = self._digest()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        line = {"step": state.global_step, "before": self._before, "after": self._digest()}
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        value = self._trainer.find("weight", is_over=True)
        if value is not None:
            parameter = [parameter for parameter in self._trainer.model.parameters() if parameter.requires_grad][-1]
            getattr(parameter, "ds_tensor", parameter).data.view(-1)[0] = value

    def _digest(self) -> str:
        digest = hashlib.sha256()
        for parameter in self._trainer.model.parameters():
            enter_tensor(digest, getattr(parameter, "ds_tensor", parameter))
        for parameter, moments in self._trainer.optimizer.state.items():
            enter_tensor(digest, parameter)
            for name, value in sorted(moments.items()):
                digest.update(name.encode())
                enter_tensor(digest, torch.as_tensor(value))
        return digest.hexdigest()


def fill(folder: str, left_bytes: int) -> None:
    # A checkpoint that is sent, and removed in the middle of the save, would make room for it.
    end = time.monotonic() + 60
    while any(Path(folder).glob("output/checkpoint-*")) and time.monotonic() < end:
        time.sleep(0.02)
    os.truncate(descriptor := os.open(f"{folder}/filler", os.O_CREAT | os.O_WRONLY), 0)
    os.posix_fallocate(descriptor, 0, shutil.disk_usage(folder).free - left_bytes)


def enter_tensor(digest: Any, tensor: Tensor) -> None:
    digest.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())


def main() -> None:
    started = time.monotonic()
    entry = sys.argv.pop(1)
    FaultyTrainer.faults = json.loads(sys.argv.pop(1))
    link = SupervisorLink.connect()
    link.hear_signals()
    run.InternVLTrainer = FaultyTrainer
    enter(entry, link, started)


if __name__ == "__main__":
    main()
