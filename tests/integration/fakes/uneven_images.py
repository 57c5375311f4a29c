"""Ten updates on two ranks, of which only the first ever sees a tile: DDP and every ZeRO stage, one after the other.

Usage under torchrun: uneven_images.py FOLDER. Rank 0 saves the weights of each way as FOLDER/<way>.pt.
"""

import os
import sys
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parents[2] / "unit"))
from tiny_internvl import build_batch, build_tiny_model

NUM_STEPS = 10
LEARNING_RATE = 0.01


def build_inputs(step: int, rank: int) -> dict[str, Tensor]:
    batch = build_batch(num_tiles=2 if rank == 0 else 0, seed=2 * step + rank)
    batch["loss_weights"] = (batch["labels"] != -100).float()
    return batch


def train(way: str) -> dict[str, Tensor]:
    model = build_tiny_model()
    engine, optimizer = wrap(model, way)
    model.train()
    for step in range(NUM_STEPS):
        loss = engine(**build_inputs(step, dist.get_rank())).loss
        if way == "ddp":
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        else:
            engine.backward(loss)
            engine.step()
    parameters = dict(model.named_parameters())
    if way != "zero3":
        return {name: parameter.detach().clone() for name, parameter in parameters.items()}
    with deepspeed.zero.GatheredParameters(list(parameters.values())):
        return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def wrap(model: nn.Module, way: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    if way == "ddp":
        return DistributedDataParallel(model), optimizer
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": int(way[-1]), "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,
    }
    engine, optimizer, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine, optimizer


def main() -> None:
    deepspeed.init_distributed("gloo")
    folder = Path(sys.argv[1])
    for way in ("ddp", "zero1", "zero2", "zero3"):
        weights = train(way)
        if dist.get_rank() == 0:
            torch.save(weights, folder / f"{way}.pt")
    dist.destroy_process_group()
    # As the trainer's own entry does: libraries' threads now and then abort the interpreter on its way out.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
