"""How fast packed training goes against padded training, on the same samples, with the same optimizer.

    python benchmarks/bench_step.py [--lengths lengths.npz] [--model tiny|1b|2b|...] [--repeats 5]

The sides take turns, repeat by repeat: packs, padded batches in random order, padded batches of like
lengths (`group_by_length`). Each sees every sample once and updates the weights equally often. A token
is useful if it is no padding. On a GPU the model trains in bf16, and the model FLOPs utilisation counts
the vision tower too. Weights and samples are random; lengths are those of a file of `tokens` and
`tiles`, or of a mix of text, pictures, documents and videos. Data loading is not part of the time.
Prints a table and writes benchmarks/results/<date>-step-<device>.json.
"""

import argparse
import datetime
import itertools
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from machine import name_processor
from synthetic import PAD, REFERENCE_TOKENS_PER_TILE, SHAPES, Sizes, build_model, draw_sizes, make_samples
from transformers.trainer_pt_utils import get_length_grouped_indices

from internvl_core.data.collate import PackCollator, SampleCollator
from internvl_core.data.dataset import Sample
from internvl_core.data.packing import PackSampler
from internvl_core.data.sizes import PackLimits
from internvl_core.data.tiles import normalise
from internvl_core.model.attention import choose_packed_attention, use_packed_attention, use_padded_attention
from internvl_core.model.flops import ModelShape, build_sample_cost, count_model_flops
from internvl_core.model.internvl import InternVLForTraining

PACK_TOKENS, PACK_TILES = 16384, 48
LEARNS = {"learns_vision": True, "learns_projector": True, "learns_llm": True}
# Dense bf16 by the makers' data sheets, FLOP/s, by a part of the name that CUDA gives the device.
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
}


Step = list[list[int]]
"""Batches of one update, each a list of samples' numbers."""


@dataclass
class Side:
    """One way to train on the samples."""

    steps: list[Step]
    collate: Any
    attention: str | None
    """Of packs; None for padded batches."""


def build_sides(sizes: Sizes, shape: ModelShape, arguments: argparse.Namespace, attention: str) -> dict[str, Side]:
    """Plan each side's batches; an update has about `packs_per_step` packs' worth of samples on every side."""
    scale = shape.tokens_per_tile / REFERENCE_TOKENS_PER_TILE
    limits = PackLimits(int(PACK_TOKENS * scale), PACK_TILES)
    cost = build_sample_cost(shape, **LEARNS, is_checkpointed=arguments.checkpointing)
    sampler = PackSampler(sizes, limits, cost, totals=sizes.totals, seed=0)
    packs: list[list[int]] = []
    while sum(map(len, packs)) < len(sizes.tokens):
        packs.extend(list(pack.ids) for pack in sampler.take_step())
    packed = [list(step) for step in batched(packs, arguments.packs_per_step)]
    generator = torch.Generator().manual_seed(0)
    orders = {
        "padded": torch.randperm(len(sizes.tokens), generator=generator).tolist(),
        "padded, group_by_length": get_length_grouped_indices(
            sizes.tokens.tolist(), arguments.batch_size, generator=generator
        ),
    }
    sides = {"packed": Side(packed, PackCollator(PAD, "token"), attention)}
    for name, order in orders.items():
        chunks = [chunk.tolist() for chunk in np.array_split(np.array(order), len(packed))]
        steps = [[list(batch) for batch in batched(chunk, arguments.batch_size)] for chunk in chunks]
        sides[name] = Side(steps, SampleCollator(PAD, "token"), None)
    return sides


def batched(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))


class Bench:
    """Trains one model on every side in turn."""

    def __init__(self, model: InternVLForTraining, samples: list[Sample], device: torch.device) -> None:
        self.model = model.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
        self.samples = samples
        self.device = device
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def run(self, side: Side) -> float:
        """Train on all samples once; seconds without data loading, of the processor where there is no GPU."""
        self._switch(side)
        return sum(self._time_step(side, step) for step in side.steps)

    def compute_loss(self, side: Side) -> float:
        """Compute the sum of the loss over all samples, the same on every side."""
        self._switch(side)
        with torch.no_grad():
            batches = (self._load(side, batch) for step in side.steps for batch in step)
            return sum(float(self.model(**self._move(batch)).loss) for batch in batches)

    def _switch(self, side: Side) -> None:
        if side.attention is None:
            use_padded_attention(self.model)
        else:
            use_packed_attention(self.model, side.attention)

    def _time_step(self, side: Side, step: Step) -> float:
        batches = [self._load(side, batch) for batch in step]
        normalizer = float(sum(batch["loss_weights"].sum() for batch in batches))
        start = self._read_clock()
        for batch in batches:
            self.model(**self._move(batch), loss_normalizer=normalizer).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return self._read_clock() - start

    def _load(self, side: Side, batch: list[int]) -> dict[str, Any]:
        loaded = side.collate([self.samples[number] for number in batch])
        return {key: value for key, value in loaded.items() if key not in ("sample_ids", "bad_samples", "num_tokens")}

    def _move(self, batch: dict[str, Any]) -> dict[str, Any]:
        moved = {key: value.to(self.device) if torch.is_tensor(value) else value for key, value in batch.items()}
        if "pixel_values" in moved:
            moved["pixel_values"] = normalise(moved["pixel_values"], "imagenet", self.model.dtype)
        return moved

    def _read_clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()


def measure(bench: Bench, sides: dict[str, Side], repeats: int) -> dict[str, Any]:
    """Median seconds of each side, run in turns after one repeat to warm up, and the most memory of a GPU."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    memory: dict[str, int | None] = dict.fromkeys(sides)
    for number, (name, side) in itertools.product(range(repeats + 1), sides.items()):
        if bench.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        taken = bench.run(side)
        if bench.device.type == "cuda":
            memory[name] = torch.cuda.max_memory_allocated()
        if number:
            seconds[name].append(taken)
    return {name: (statistics.median(values), values, memory[name]) for name, values in seconds.items()}


def summarize(
    measured: dict[str, Any], sides: dict[str, Side], sizes: Sizes, bench: Bench, shape: ModelShape
) -> list[dict[str, Any]]:
    num_learnt = sum(int((sample["labels"] != -100).sum()) for sample in bench.samples)
    totals = sizes.totals
    flops = count_model_flops(
        shape,
        **LEARNS,
        tokens=totals.tokens,
        tokens_squared=totals.tokens_squared,
        tiles=totals.tiles,
        supervised_tokens=num_learnt,
    )
    peak = find_peak(bench.device)
    rows = []
    for name, (median, values, memory) in measured.items():
        batches = [batch for step in sides[name].steps for batch in step]
        longest = [max(sizes.tokens[batch]) * len(batch) for batch in batches]
        places = totals.tokens if sides[name].attention else float(sum(longest))
        rows.append(
            {
                "side": name,
                "attention": sides[name].attention or "sdpa with a mask",
                "median_s": round(median, 3),
                "all_s": [round(value, 3) for value in values],
                "useful_tokens_per_s": round(totals.tokens / median, 1),
                "samples_per_s": round(totals.num_samples / median, 2),
                "times_padded": round(measured["padded"][0] / median, 2),
                "useful_share_of_tokens": round(totals.tokens / places, 4),
                "updates": len(sides[name].steps),
                "batches": len(batches),
                "model_tflops_per_s": round(flops / median / 1e12, 4),
                "mfu": round(flops / median / peak, 4) if peak else None,
                "peak_memory_gib": round(memory / 2**30, 2) if memory else None,
            }
        )
    return rows


def find_peak(device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


def describe_machine(device: torch.device) -> dict[str, Any]:
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else name_processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def write_table(rows: list[dict[str, Any]]) -> None:
    columns = ("median_s", "useful_tokens_per_s", "samples_per_s", "times_padded", "useful_share_of_tokens", "mfu")
    sys.stdout.write(f"{'':26}" + "".join(f"{column:>24}" for column in columns) + "\n")
    for row in rows:
        cells = "".join(f"{'-' if row[column] is None else row[column]:>24}" for column in columns)
        sys.stdout.write(f"{row['side']:26}{cells}\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--lengths", type=Path, help="npz with arrays tokens and tiles; without it a mix is drawn")
    parser.add_argument("--samples", type=int, default=480)
    parser.add_argument("--model", choices=SHAPES, default="tiny")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--packs-per-step", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=8, help="samples of a padded batch; a pack has about 7")
    parser.add_argument("--attention", default="auto", help="over packs: auto, flash_attention_2, varlen or sdpa")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations in the backward pass")
    parser.add_argument("--note", default="", help="what else the machine was doing")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(1)
    load_before = os.getloadavg()
    attention = choose_packed_attention(
        arguments.attention, device, torch.bfloat16 if device.type == "cuda" else torch.float32
    )
    shape = SHAPES[arguments.model]
    sizes = draw_sizes(arguments.lengths, arguments.samples, shape.tokens_per_tile)
    sides = build_sides(sizes, shape, arguments, attention)
    bench = Bench(build_model(shape, is_checkpointed=arguments.checkpointing), make_samples(sizes, shape), device)
    losses = {name: bench.compute_loss(side) for name, side in sides.items()}
    rows = summarize(measure(bench, sides, arguments.repeats), sides, sizes, bench, shape)
    write_table(rows)
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    machine = describe_machine(device)
    label = "cpu" if device.type == "cpu" else machine["device"].lower().replace(" ", "-")
    path = Path(__file__).parent / "results" / f"{today}-step-{label}-{arguments.model}.json"
    content = {
        "date": today,
        "command": " ".join(["python benchmarks/bench_step.py", *sys.argv[1:]]),
        "machine": machine,
        "clock": "wall" if device.type == "cuda" else "processor",
        "load_average_before_and_after": [load_before[0], os.getloadavg()[0]],
        "note": arguments.note,
        "samples": arguments.samples,
        "tokens": int(sizes.tokens.sum()),
        "tiles": int(sizes.tiles.sum()),
        "loss_of_all_samples_before_training": losses,
        "sides": rows,
    }
    path.write_text(json.dumps(content, indent=1) + "\n")
    sys.stdout.write(f"\nWrote {path}\n")


if __name__ == "__main__":
    main()
