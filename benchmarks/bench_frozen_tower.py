"""What a frozen vision tower costs if it is really frozen, and if the gradient passes through it all the same.

    python benchmarks/bench_frozen_tower.py [--model mini|1b] [--tiles 12] [--repeats 7]

The projector and the language model learn, the tower does not, as in the original's finetunes. "frozen": as the trainer
sets it up, in evaluation mode and without a graph. "stock": as transformers' gradient checkpointing leaves it when
asked through `gradient_checkpointing_enable`, in training mode, the embeddings' output requiring gradients.
Both recompute the activations of what learns. Sides take turns, repeat by repeat. Kept is what autograd holds for the
backward pass, summed over its tensors, weights left out. Prints a table and writes
benchmarks/results/<date>-frozen-tower-<device>.json.
"""

import argparse
import datetime
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from machine import name_processor
from synthetic import IMAGE_TOKEN, SHAPES, build_model, get_tile_size
from torch import Tensor, nn

from internvl_core.arguments import ModelArguments
from internvl_core.model.flops import DecoderShape, ModelShape, TowerShape
from internvl_core.model.internvl import InternVLForTraining
from internvl_core.model.trainable import enable_checkpointing, set_trainable

# The 1b model, a quarter as deep: the proportions of a layer are what counts.
MINI = ModelShape(TowerShape(1024, 6, 4096, 1024, 588), DecoderShape(896, 6, 4864, 896, 128, 8192), 256)
TEXT_TOKENS = 512


def build_side(shape: ModelShape, side: str, device: torch.device) -> InternVLForTraining:
    model = build_model(shape, is_checkpointed=False).to(device)
    set_trainable(model, ModelArguments(freeze_backbone=True))
    if side == "frozen":
        enable_checkpointing(model)
        return model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    return nn.Module.train(model, True)


def build_inputs(shape: ModelShape, tiles: int, device: torch.device) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    size = get_tile_size(shape)
    text = torch.randint(4, shape.decoder.vocab_size, (1, TEXT_TOKENS), generator=generator)
    input_ids = torch.cat([torch.full((1, tiles * shape.tokens_per_tile), IMAGE_TOKEN), text], dim=1)
    labels = input_ids.masked_fill(input_ids == IMAGE_TOKEN, -100)
    pixels = torch.randn(tiles, 3, size, size, generator=generator)
    weights = (labels != -100).float()
    batch = {"input_ids": input_ids, "labels": labels, "pixel_values": pixels, "loss_weights": weights}
    return {name: tensor.to(device) for name, tensor in batch.items()}


def measure_step(model: InternVLForTraining, inputs: dict[str, Tensor]) -> tuple[float, int, int | None]:
    """Run one step; returns seconds, bytes kept for the backward pass, and the peak of a GPU's memory in bytes."""
    kept: dict[tuple[int, int], int] = {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[(storage.data_ptr(), storage.nbytes())] = storage.nbytes()
        return tensor

    device = inputs["input_ids"].device
    model.zero_grad(set_to_none=True)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = model(**inputs).loss
        loss.backward()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - started
    return seconds, sum(kept.values()), torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", choices=["mini", *SHAPES], default="mini")
    parser.add_argument("--tiles", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape = MINI if arguments.model == "mini" else SHAPES[arguments.model]
    inputs = build_inputs(shape, arguments.tiles, device)
    sides = {side: build_side(shape, side, device) for side in ("frozen", "stock")}
    for model in sides.values():
        measure_step(model, inputs)
    measured: dict[str, list[tuple[float, int, int | None]]] = {side: [] for side in sides}
    for _ in range(arguments.repeats):
        for side, model in sides.items():
            measured[side].append(measure_step(model, inputs))
    report: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else name_processor(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        **vars(arguments),
        "sides": {
            side: {
                "median_step_s": statistics.median(seconds for seconds, _, _ in runs),
                "steps_s": [seconds for seconds, _, _ in runs],
                "kept_bytes": runs[-1][1],
                "peak_bytes": runs[-1][2],
            }
            for side, runs in measured.items()
        },
    }
    for side, result in report["sides"].items():
        sys.stdout.write(
            f"{side:<8} {result['median_step_s']:7.3f} s a step   {result['kept_bytes'] / 2**20:9.1f} MiB kept\n"
        )
    kind = "gpu" if device.type == "cuda" else "cpu"
    path = Path(__file__).parent / "results" / f"{report['date']}-frozen-tower-{kind}.json"
    path.write_text(json.dumps(report, indent=2) + "\n")
    sys.stdout.write(f"\nWrote {path}\n")


if __name__ == "__main__":
    main()
