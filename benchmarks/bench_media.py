"""How fast a JPEG becomes tiles on one core: the original's pipeline against ours, step by step in turns.

    python benchmarks/bench_media.py [--repeats 31]

Pictures are generated: noise of several scales over gradients, saved at quality 90, which gives about as
many bytes as photographs have. All variants run in turns in one process with one thread. Prints a table
and writes benchmarks/results/<date>-media.json.
"""

import argparse
import datetime
import io
import itertools
import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL.features
import torch
from machine import name_processor
from PIL import Image
from torch import Tensor

from internvl_core.data.media import NORMALIZATIONS, load_image
from internvl_core.data.resample import is_compiled, resize
from internvl_core.data.tiles import MAX_JPEG_QUALITY, MIN_JPEG_QUALITY, cut_tiles
from internvl_core.data.tiling import Tiling

TILING = Tiling(448, 1, 12, use_thumbnail=True, is_dynamic=True)
SIZES = [(640, 427), (1280, 853), (1920, 1280), (4032, 3024)]
"""Those of the goal, and a telephone's photograph, where a draft has something to save."""
GOALS = {"exact": 1.3, "fast": 2.0}
BASELINE = "original"


def make_jpeg(width: int, height: int) -> bytes:
    """A picture with detail of every scale: 1.6 bits a pixel at quality 90, as photographs have."""
    generator = np.random.default_rng(0)
    pixels = np.full((height, width, 3), 128.0, dtype=np.float32)
    for cells, strength in ((4, 60), (16, 45), (64, 30), (200, 18)):
        coarse = generator.integers(0, 256, (1 + height * cells // 1280, 1 + width * cells // 1280, 3), dtype=np.uint8)
        layer = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        pixels += strength / 128 * (np.asarray(layer, dtype=np.float32) - 128)
    pixels += generator.normal(0, 3, pixels.shape)
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, format="JPEG", quality=90)
    return buffer.getvalue()


def run_original(content: bytes, *, is_augmented: bool) -> Tensor:
    """The original's steps (its dataset.py, written anew): float tiles, normalised on the CPU."""
    image = Image.open(io.BytesIO(content)).convert("RGB")
    size = TILING.tile_size
    columns, rows = TILING.choose_grid(*image.size)
    canvas = image.resize((size * columns, size * rows), Image.Resampling.BICUBIC)
    corners = itertools.product(range(0, canvas.height, size), range(0, canvas.width, size))
    tiles = [canvas.crop((left, top, left + size, top + size)) for top, left in corners]
    if len(tiles) != 1:
        tiles.append(image.resize((size, size), Image.Resampling.BICUBIC))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in NORMALIZATIONS["imagenet"])
    normalised = []
    for tile in tiles:
        shown = degrade(tile, draw_quality()) if is_augmented else tile
        # Resize to the tile's size does nothing; then ToTensor and Normalize as torchvision does them.
        pixels = torch.from_numpy(np.array(shown, dtype=np.uint8, copy=True)).permute(2, 0, 1).contiguous()
        normalised.append(pixels.to(torch.float32).div(255).clone().sub_(mean).div_(std))
    return torch.stack(normalised)


def degrade(tile: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    tile.convert("RGB").save(buffer, format="JPEG", quality=quality)
    return Image.open(buffer).copy()


def draw_quality() -> int:
    return random.randint(MIN_JPEG_QUALITY, MAX_JPEG_QUALITY)  # noqa: S311


def run_ours(content: bytes, *, is_augmented: bool, is_fast: bool = False, can_draft: bool = False) -> Tensor:
    """Ours: uint8 tiles; they are normalised on the device."""
    image = load_image(content, "a.jpg", draft_for=TILING if can_draft else None)
    return cut_tiles(image, TILING, jpeg_quality=draw_quality() if is_augmented else None, is_fast=is_fast)


def run_ours_per_tile(content: bytes, *, is_augmented: bool) -> Tensor:
    image = load_image(content, "a.jpg")
    qualities = [draw_quality() for _ in range(TILING.count_tiles(*image.size))]
    return cut_tiles(image, TILING, jpeg_quality=qualities if is_augmented else None)


def list_variants(content: bytes) -> dict[str, Callable[[], object]]:
    """Whole pipelines, with and without augmentation, and single steps, which show the limits."""
    variants: dict[str, Callable[[], object]] = {}
    for suffix, is_augmented in ((" +jpeg", True), ("", False)):
        pipelines: dict[str, Callable[..., object]] = {
            BASELINE: run_original,
            "exact": run_ours,
            "fast": partial(run_ours, is_fast=True),
            "fast draft": partial(run_ours, is_fast=True, can_draft=True),
        }
        if is_augmented:
            pipelines["exact, quality per tile"] = run_ours_per_tile
        for name, pipeline in pipelines.items():
            variants[name + suffix] = partial(pipeline, content, is_augmented=is_augmented)
    return variants | list_steps(content)


def list_steps(content: bytes) -> dict[str, Callable[[], object]]:
    image = load_image(content, "a.jpg")
    columns, rows = TILING.choose_grid(*image.size)
    size = TILING.tile_size
    shapes = [(columns * size, rows * size), (size, size)]
    resized = [image.resize(shape, Image.Resampling.BICUBIC) for shape in shapes]
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]

    def resize_in_torch(shape: tuple[int, int]) -> Tensor:
        return torch.nn.functional.interpolate(pixels, shape[::-1], mode="bicubic", antialias=True)

    def round_trip(picture: Image.Image) -> object:
        buffer = io.BytesIO()
        picture.save(buffer, format="JPEG", quality=88)
        return Image.open(buffer).load()

    return {
        "decode alone": lambda: Image.open(io.BytesIO(content)).load(),
        "resize alone, Pillow": lambda: [image.resize(shape, Image.Resampling.BICUBIC) for shape in shapes],
        "resize alone, exact": lambda: resize(image, shapes),
        "resize alone, torch": lambda: [resize_in_torch(shape) for shape in shapes],
        "JPEG round trip alone": lambda: [round_trip(picture) for picture in resized],
    }


def measure(variants: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median milliseconds of processor time of each, run in turns: a busy machine is equally unfair to all."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(repeats + 2):
        for name, run in variants.items():
            start = time.process_time()
            run()
            if number >= 2:  # Two rounds to warm up.
                times[name].append((time.process_time() - start) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def measure_size(width: int, height: int, repeats: int) -> dict[str, Any]:
    content = make_jpeg(width, height)
    medians = measure(list_variants(content), repeats)
    num_tiles = TILING.count_tiles(width, height)
    rows = []
    for name, median in medians.items():
        row: dict[str, Any] = {"name": name, "median_ms": round(median, 2)}
        if not name.partition(" alone")[1]:
            suffix = " +jpeg" if name.endswith(" +jpeg") else ""
            row["ms_per_tile"] = round(median / num_tiles, 2)
            row["tiles_per_s"] = round(num_tiles / median * 1e3, 1)
            row["times_original"] = round(medians[BASELINE + suffix] / median, 2)
        rows.append(row)
    return {
        "size": f"{width}x{height}",
        "file_bytes": len(content),
        "bits_per_pixel": round(len(content) * 8 / width / height, 2),
        "tiles": num_tiles,
        "rows": rows,
    }


def find_goals(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The goals of the three smaller sizes, with augmentation: reached or not."""
    goals = []
    for result, (name, goal) in itertools.product(results[:3], GOALS.items()):
        reached = next(row["times_original"] for row in result["rows"] if row["name"] == f"{name} +jpeg")
        goals.append({"size": result["size"], "variant": name, "goal": goal, "is": reached, "met": reached >= goal})
    return goals


def describe_machine() -> dict[str, Any]:
    return {
        "cpu": name_processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_vectors": torch.backends.cpu.get_cpu_capability(),
        "pillow": PIL.__version__,
        "resample_compiled": is_compiled(),
        "libjpeg": PIL.features.version("libjpeg_turbo"),
    }


def write_table(results: list[dict[str, Any]], goals: list[dict[str, Any]]) -> None:
    for result in results:
        sys.stdout.write(
            f"\n{result['size']}: {result['tiles']} tiles, {result['file_bytes'] >> 10} KiB, "
            f"{result['bits_per_pixel']} bits a pixel\n{'':32}{'ms':>8}{'ms/tile':>9}{'tiles/s':>9}{'x original':>12}\n"
        )
        for row in result["rows"]:
            cells = "".join(
                f"{row.get(key, ''):>{width}}"
                for key, width in (("median_ms", 8), ("ms_per_tile", 9), ("tiles_per_s", 9), ("times_original", 12))
            )
            sys.stdout.write(f"  {row['name']:30}{cells}\n")
    sys.stdout.write("\nGoals, with augmentation\n")
    for goal in goals:
        verdict = "met" if goal["met"] else "NOT met"
        sys.stdout.write(
            f"  {goal['size']:>10} {goal['variant']:6} {goal['is']:.2f} of {goal['goal']:.1f}  {verdict}\n"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=31)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    random.seed(0)
    results = [measure_size(*size, arguments.repeats) for size in SIZES]
    goals = find_goals(results)
    write_table(results, goals)
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    path = Path(__file__).parent / "results" / f"{today}-media.json"
    path.parent.mkdir(exist_ok=True)
    content = {
        "date": today,
        "command": f"python benchmarks/bench_media.py --repeats {arguments.repeats}",
        "machine": describe_machine(),
        "goals": goals,
        "results": results,
    }
    path.write_text(json.dumps(content, indent=1) + "\n")
    sys.stdout.write(f"\nWrote {path}\n")


if __name__ == "__main__":
    main()
