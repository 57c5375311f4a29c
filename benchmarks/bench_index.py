"""How fast an annotation is indexed, and what a rank pays for an index of ten million records.

    python benchmarks/bench_index.py [--records 1000000] [--large 10000000] [--tokenizer DIR]

Records are generated: a question and an answer of about 150 bytes of text together, three of four
with an image whose width and height are given. Writes benchmarks/results/<date>-index.json and <date>-index-rank.json.
"""

import argparse
import datetime
import itertools
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

TEXT_BYTES = 150
SYLLABLES = ("ba", "co", "di", "fe", "gu", "ha", "ki", "lo", "mer", "nis", "pra", "qua", "ros", "tel", "vin")
# As in language: few words are most of a text, and nearly every text has a rare one.
WORDS = ["".join(parts) for length in (1, 2, 3) for parts in itertools.product(SYLLABLES, repeat=length)]
FREQUENCIES = [1 / rank for rank in range(1, len(WORDS) + 1)]


def generate_records(path: Path, num_records: int, *, seed: int = 0) -> int:
    """Write records; returns the bytes of their text."""
    order = random.Random(seed)  # noqa: S311
    # A pool, because drawing each record's words would take longer than indexing them.
    texts = [" ".join(order.choices(WORDS, FREQUENCIES, k=28))[: TEXT_BYTES // 2] for _ in range(200_000)]
    num_bytes = 0
    with path.open("w") as file:
        for number in range(num_records):
            question, answer = order.choice(texts), order.choice(texts)
            num_bytes += len(question) + len(answer)
            record = {"id": number, "conversations": []}
            if number % 4:
                record |= {"image": f"{number % 997}/{number}.jpg", "width": 640 + number % 700, "height": 480}
                question = f"<image>\n{question}"
            record["conversations"] = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
            file.write(json.dumps(record) + "\n")
    return num_bytes


def train_tokenizer(folder: Path) -> Path:
    """Train a byte-level BPE of 20,000 tokens, so that a word is one token or two, as with a real model's."""
    from internvl_core.smoke import components

    order = random.Random(1)  # noqa: S311
    texts = (" ".join(order.choices(WORDS, FREQUENCIES, k=28)) for _ in range(50_000))
    components.train_tokenizer(texts, 20_000).save_pretrained(folder)
    return folder


def write_meta(folder: Path, annotation: Path) -> Path:
    meta = folder / f"{annotation.stem}.json"
    meta.write_text(json.dumps({"bench": {"root": str(folder), "annotation": str(annotation)}}))
    return meta


# What a rank does; in a process of its own, whose memory is measured.
RANK = """
import json, sys, time
from pathlib import Path
meta_path, cache_dir, tokenizer, num_reads = sys.argv[1:]
import numpy
from internvl_core.data.encoding import Encoding
from internvl_core.data.index import open_index
from internvl_core.data.meta import load_meta
from internvl_core.data.mixture import Mixture
from internvl_core.data.text_encoder import load_text_encoder
from internvl_core.data.tiling import Tiling
from internvl_core.data.video import FrameSampling

def held_mb():
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    sizes = {line.split(":")[0]: int(line.split()[1]) for line in lines[1:]}
    return {"all": sizes["Rss"] / 1024, "own": (sizes["Private_Clean"] + sizes["Private_Dirty"]) / 1024}

tiling = Tiling(448, 1, 12, use_thumbnail=True, is_dynamic=True)
encoding = Encoding(load_text_encoder(tokenizer), tiling, FrameSampling.parse("uniform", 8, 32), "internvl2_5", 256)
(meta,) = load_meta(meta_path)
before = held_mb()
started = time.monotonic()
mixture = Mixture([open_index(meta, encoding, Path(cache_dir))], seed=0, max_tokens=8192)
first = next(mixture.iter_ids(0))
start_s = time.monotonic() - started
started = time.monotonic()
order = mixture.iter_ids(0)
for _ in range(int(num_reads)):
    draw = mixture.locate(next(order))
    index = mixture.sources[draw.dataset].index
    index.read_line(draw.row)
    index.tokens[draw.row], index.tiles[draw.row]
read_us = (time.monotonic() - started) / int(num_reads) * 1e6
after = held_mb()
print(json.dumps({"lines": index.num_lines, "start_s": start_s, "read_us": read_us,
    "held_mb": after["all"] - before["all"], "own_mb": after["own"] - before["own"]}))
"""


def build(meta: Path, cache_dir: Path, tokenizer: Path, num_processes: int) -> float:
    """Index in a process of its own; returns its seconds, start and imports left out."""
    code = (
        "import sys, time\nfrom pathlib import Path\n"
        "from internvl_core.data.encoding import Encoding\nfrom internvl_core.data.index import open_index\n"
        "from internvl_core.data.meta import load_meta\n"
        "from internvl_core.data.text_encoder import load_text_encoder\n"
        "from internvl_core.data.tiling import Tiling\nfrom internvl_core.data.video import FrameSampling\n"
        "if __name__ == '__main__':\n"
        "    meta_path, cache_dir, tokenizer, num_processes = sys.argv[1:]\n"
        "    tiling = Tiling(448, 1, 12, use_thumbnail=True, is_dynamic=True)\n"
        "    encoding = Encoding(load_text_encoder(tokenizer), tiling, FrameSampling.parse('uniform', 8, 32),\n"
        "        'internvl2_5', 256)\n"
        "    (meta,) = load_meta(meta_path)\n"
        "    started = time.monotonic()\n"
        "    open_index(meta, encoding, Path(cache_dir), num_processes=int(num_processes))\n"
        "    print(time.monotonic() - started)\n"
    )
    script = cache_dir.parent / "build.py"
    script.write_text(code)
    return float(run(str(script), str(meta), str(cache_dir), str(tokenizer), str(num_processes)))


def run(*arguments: str) -> str:
    return subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.PIPE, text=True).stdout


def measure_builds(folder: Path, tokenizer: Path, *, num_records: int, repeats: int) -> dict[str, object]:
    """Index with one process and with two, in turn."""
    annotation = folder / "records.jsonl"
    text_bytes = generate_records(annotation, num_records)
    meta = write_meta(folder, annotation)
    seconds: dict[int, list[float]] = {1: [], 2: []}
    for repeat in range(repeats):
        for num_processes in seconds:
            cache_dir = folder / f"cache-{num_processes}-{repeat}"
            seconds[num_processes].append(build(meta, cache_dir, tokenizer, num_processes))
    return {
        f"{num_processes} processes": {
            "records": num_records,
            "seconds": [round(run_s, 2) for run_s in runs],
            "records_per_s": round(num_records / statistics.median(runs)),
            "text_mb_per_s": round(text_bytes / statistics.median(runs) / 1e6, 2),
            "file_mb_per_s": round(annotation.stat().st_size / statistics.median(runs) / 1e6, 2),
        }
        for num_processes, runs in seconds.items()
    }


def measure_rank(folder: Path, tokenizer: Path, *, num_records: int, num_reads: int, repeats: int) -> dict[str, object]:
    """Open a large index as a rank does, warm, and read from it."""
    annotation = folder / "large.jsonl"
    generate_records(annotation, num_records)
    meta = write_meta(folder, annotation)
    cache_dir = folder / "cache-large"
    build_s = build(meta, cache_dir, tokenizer, 2)
    runs = [
        json.loads(run("-c", RANK, str(meta), str(cache_dir), str(tokenizer), str(num_reads))) for _ in range(repeats)
    ]
    return {"build_s": round(build_s, 1), "file_gb": round(annotation.stat().st_size / 1e9, 2), "runs": runs}


def write_result(name: str, content: dict[str, object]) -> None:
    result = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        "command": "python " + " ".join(sys.argv),
        **content,
    }
    text = json.dumps(result, indent=2)
    path = Path(__file__).with_name("results") / f"{datetime.date.today()}-{name}.json"
    path.write_text(text + "\n")
    sys.stdout.write(f"{text}\n{path}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, default=1_000_000, help="records to index; 0 for none")
    parser.add_argument("--large", type=int, default=10_000_000, help="records of the index a rank opens; 0 for none")
    parser.add_argument("--reads", type=int, default=200_000, help="records a rank reads of it")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tokenizer", type=Path, help="folder of one; by default one is trained on such texts")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-index-") as name:
        folder = Path(name)
        tokenizer = args.tokenizer or train_tokenizer(folder / "tokenizer")
        if args.records:
            builds = measure_builds(folder, tokenizer, num_records=args.records, repeats=args.repeats)
            write_result("index", builds)
        if args.large:
            rank = measure_rank(folder, tokenizer, num_records=args.large, num_reads=args.reads, repeats=args.repeats)
            write_result("index-rank", rank)


if __name__ == "__main__":
    main()
