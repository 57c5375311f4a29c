"""How full and how even packs are, and what planning them takes: our packer and the original's, side by side.

    python benchmarks/bench_packing.py [LENGTHS.npz ...] [--repeats 5]

Besides the files that are named, packs generated sets of several kinds, with several models and limits. Every
repeat has an order of samples of its own; medians are printed. Times are of the processor, of one thread.
Writes benchmarks/results/<date>-packing.json.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from machine import name_processor
from numpy.typing import NDArray

from internvl_core.data.packing import PackSampler
from internvl_core.data.sizes import PackLimits, SampleCost
from internvl_core.inspection.pack_report import Lengths, LengthStream, load_lengths, report_packs
from internvl_core.model.flops import NAMED_SHAPES, build_sample_cost

RANKS = (8, 64, 512)
ROWS = 60_000
TOKENS_PER_TILE = 256
STANDARD = (PackLimits(16384, 48), "8b")
GOAL_BALANCE, GOAL_EFFICIENCY, GOAL_US = 0.99, 0.96, 25.0

Sizes = tuple[NDArray[np.int64], NDArray[np.int64]]
Draw = np.random.Generator


def draw_text(draw: Draw, median: float, spread: float, highest: int) -> NDArray[np.int64]:
    return np.clip(median * np.exp(draw.normal(0, spread, ROWS)), 16, highest).astype(np.int64)


def choose_kind(draw: Draw, shares: list[float], kinds: list[Sizes]) -> Sizes:
    kind = draw.choice(len(kinds), ROWS, p=shares)
    tokens, tiles = (np.choose(kind, [sizes[part] for sizes in kinds]) for part in (0, 1))
    return tokens, tiles


def add_tiles(text: NDArray[np.int64], tiles: NDArray[np.int64]) -> Sizes:
    return text + TOKENS_PER_TILE * tiles, tiles


def build_text(draw: Draw) -> Sizes:
    return add_tiles(draw_text(draw, 700, 1.0, 8000), np.zeros(ROWS, np.int64))


def build_photos(draw: Draw) -> Sizes:
    return add_tiles(draw_text(draw, 120, 0.6, 1500), draw.choice([2, 3, 4, 5, 7], ROWS, p=[0.1, 0.2, 0.2, 0.2, 0.3]))


def build_documents(draw: Draw) -> Sizes:
    return add_tiles(draw_text(draw, 500, 0.8, 4000), draw.integers(5, 14, ROWS))


def build_videos(draw: Draw) -> Sizes:
    return add_tiles(draw_text(draw, 250, 0.7, 3000), draw.integers(8, 33, ROWS))


def build_mixture(draw: Draw) -> Sizes:
    kinds = [build(draw) for build in (build_text, build_photos, build_documents, build_videos)]
    return choose_kind(draw, [0.25, 0.3, 0.35, 0.1], kinds)


def build_text_heavy(draw: Draw) -> Sizes:
    """Three quarters text; one sample in a hundred costs nearly a pack."""
    long_text = add_tiles(draw_text(draw, 500, 1.2, 12000), np.zeros(ROWS, np.int64))
    return choose_kind(draw, [0.75, 0.25], [long_text, build_documents(draw)])


def build_long_text(draw: Draw) -> Sizes:
    """One in 600 costs up to a fifth more than a full pack of others: attention within 15,000 tokens."""
    return add_tiles(draw_text(draw, 700, 1.0, 15000), np.zeros(ROWS, np.int64))


def build_video_heavy(draw: Draw) -> Sizes:
    return choose_kind(draw, [0.6, 0.4], [build_videos(draw), build_photos(draw)])


def build_captions(draw: Draw) -> Sizes:
    return add_tiles(draw_text(draw, 60, 0.5, 500), np.ones(ROWS, np.int64))


def build_short_text(draw: Draw) -> Sizes:
    return add_tiles(draw_text(draw, 45, 0.4, 200), np.zeros(ROWS, np.int64))


def build_two_kinds(draw: Draw) -> Sizes:
    """Long videos, of which no two fit together, and captions: no packing fills these packs."""
    videos = add_tiles(draw_text(draw, 100, 0.5, 800), draw.integers(20, 33, ROWS))
    return choose_kind(draw, [0.3, 0.7], [videos, build_captions(draw)])


GENERATED: list[tuple[str, Callable[[Draw], Sizes], PackLimits, str]] = [
    ("mixture", build_mixture, *STANDARD),
    ("mixture 26b", build_mixture, PackLimits(16384, 48), "26b"),
    ("mixture 1b", build_mixture, PackLimits(16384, 48), "1b"),
    ("mixture 78b", build_mixture, PackLimits(16384, 48), "78b"),
    ("mixture 32k", build_mixture, PackLimits(32768, 96), "8b"),
    ("mixture 8k", build_mixture, PackLimits(8192, 32), "8b"),
    ("mixture 8k 26b", build_mixture, PackLimits(8192, 32), "26b"),
    ("photos", build_photos, *STANDARD),
    ("photos 4k", build_photos, PackLimits(4096, 12), "8b"),
    ("documents", build_documents, *STANDARD),
    ("video-heavy", build_video_heavy, *STANDARD),
    ("video-heavy 26b", build_video_heavy, PackLimits(16384, 48), "26b"),
    ("text only", build_text, *STANDARD),
    ("text-heavy", build_text_heavy, *STANDARD),
    ("long text", build_long_text, *STANDARD),
    ("captions", build_captions, *STANDARD),
    ("short text", build_short_text, *STANDARD),
    ("two kinds", build_two_kinds, *STANDARD),
]


def build_cost(model: str) -> SampleCost:
    return build_sample_cost(
        NAMED_SHAPES[model], learns_vision=True, learns_projector=True, learns_llm=True, is_checkpointed=True
    )


def measure_set(name: str, lengths: Lengths, limits: PackLimits, model: str, repeats: int) -> dict[str, Any]:
    """Pack a set with both packers in turns."""
    result: dict[str, Any] = {
        "set": name,
        "model": model,
        "max_tokens": limits.max_tokens,
        "max_tiles": limits.max_tiles,
        "samples": len(lengths.tokens),
        "left_out": lengths.num_left_out,
    }
    runs: dict[str, list[dict[str, Any]]] = {"balanced": [], "legacy": []}
    cost = build_cost(model)
    for seed in range(repeats):
        runs["balanced"].append(report_packs(lengths, limits, cost, ranks=RANKS, seed=seed).to_json())
        legacy = report_packs(lengths, limits, cost, ranks=RANKS, packer="legacy", seed=seed)
        runs["legacy"].append(legacy.to_json())
    for packer, reports in runs.items():
        result[packer] = {
            key: round(statistics.median(report[key] for report in reports), 5)
            for key in ("packs", "efficiency", "token_fill", "tile_fill", "cost_over_highest", "max_delay")
        }
        for key in ("us_per_sample", "trial_s"):
            result[packer][key] = round(statistics.median(report[key] for report in reports), 3)
        for key in ("balance", "block_steps"):
            result[packer][key] = {
                ranks: round(statistics.median(report[key][ranks] for report in reports), 5)
                for ranks in reports[0][key]
                if reports[0][key][ranks] is not None
            }
    result["resume"] = [measure_resume(lengths, limits, cost, packs) for packs in (8, 512)]
    return result


def measure_resume(lengths: Lengths, limits: PackLimits, cost: SampleCost, packs_per_step: int) -> dict[str, Any]:
    """Save and load the state at an early step and in the second epoch."""
    stream = LengthStream(lengths, seed=0)

    def build() -> PackSampler:
        return PackSampler(stream, limits, cost, totals=stream.totals, seed=0, packs_per_step=packs_per_step)

    sampler = build()
    result: dict[str, Any] = {"packs_per_step": packs_per_step, "block_steps": 1}
    epoch, step = 0, 0
    while epoch == 0:
        epoch = sampler.take_step()[-1].epoch
        step += 1
        if step == 3 or epoch:
            state = json.dumps(sampler.state())
            resumed = build()
            started = time.process_time()
            resumed.load_state(json.loads(state))
            found = resumed.take_step()
            seconds = time.process_time() - started
            if found != sampler.take_step():
                raise RuntimeError("the resumed sampler takes another step")
            step += 1
            when = "late" if epoch else "early"
            result |= {f"{when}_step": step, f"{when}_state_bytes": len(state), f"{when}_load_s": round(seconds, 4)}
    result["block_steps"] = sampler.block_steps
    return result


def judge(result: dict[str, Any]) -> dict[str, Any]:
    """Say which goals a set reaches."""
    ours = result["balanced"]
    return {
        "balance": all(value >= GOAL_BALANCE for value in ours["balance"].values()),
        "efficiency": ours["efficiency"] >= GOAL_EFFICIENCY,
        "us_per_sample": ours["us_per_sample"] <= GOAL_US,
    }


def describe_machine() -> dict[str, Any]:
    return {
        "cpu": name_processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "numpy": np.__version__,
    }


def write_table(results: list[dict[str, Any]]) -> None:
    names = [f"bal {ranks}" for ranks in RANKS]
    sys.stdout.write(
        f"{'':18}{'packer':>9}{'packs':>8}{'eff':>8}{''.join(f'{name:>9}' for name in names)}"
        f"{'grouped':>12}{'delay':>8}{'us':>6}{'state B':>9}{'load s':>8}\n"
    )
    for result in results:
        for packer in ("balanced", "legacy"):
            row = result[packer]
            balances = "".join(f"{row['balance'].get(str(ranks), float('nan')):9.4f}" for ranks in RANKS)
            grouped = "/".join(str(int(steps)) for steps in row["block_steps"].values())
            resume = result["resume"][-1]
            late = f"{resume['late_state_bytes']:9}{resume['late_load_s']:8.3f}" if packer == "balanced" else ""
            sys.stdout.write(
                f"{result['set'] if packer == 'balanced' else '':18}{packer:>9}{int(row['packs']):8}"
                f"{row['efficiency']:8.4f}{balances}{grouped:>12}{int(row['max_delay']):8}"
                f"{row['us_per_sample']:6.1f}{late}\n"
            )
    for result in results:
        missed = [goal for goal, is_met in result["goals"].items() if not is_met]
        if missed:
            sys.stdout.write(f"{result['set']}: NOT met: {', '.join(missed)}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("lengths", nargs="*", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    limits, model = STANDARD
    sets = [(path.stem, load_lengths(path, limits), limits, model) for path in arguments.lengths]
    for name, build, its_limits, its_model in GENERATED:
        tokens, tiles = build(np.random.default_rng(0))
        fits = (tokens <= its_limits.max_tokens) & (tiles <= its_limits.max_tiles)
        sets.append((name, Lengths(tokens[fits], tiles[fits], int((~fits).sum())), its_limits, its_model))
    results = []
    for parts in sets:
        results.append(measure_set(*parts, arguments.repeats))
        results[-1]["goals"] = judge(results[-1])
        sys.stderr.write(f"{parts[0]}\n")
    write_table(results)
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    path = Path(__file__).parent / "results" / f"{today}-packing.json"
    names = " ".join(path.name for path in arguments.lengths)
    content = {
        "date": today,
        "command": f"python benchmarks/bench_packing.py {names} --repeats {arguments.repeats}",
        "machine": describe_machine(),
        "goals": {"balance": GOAL_BALANCE, "efficiency": GOAL_EFFICIENCY, "us_per_sample": GOAL_US},
        "results": results,
    }
    path.write_text(json.dumps(content, indent=1) + "\n")
    sys.stdout.write(f"\nWrote {path}\n")


if __name__ == "__main__":
    main()
