"""Small data sets for the tests of the data side: pictures, records, meta files, and how they are encoded."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers import AutoTokenizer

from internvl_core.data.encoding import Encoding
from internvl_core.data.index import open_index
from internvl_core.data.meta import load_meta
from internvl_core.data.mixture import Mixture
from internvl_core.data.text_encoder import TextEncoder
from internvl_core.data.tiling import Tiling
from internvl_core.data.video import FrameSampling

TOKENIZER = AutoTokenizer.from_pretrained(Path(__file__).parents[1] / "data" / "tokenizer")
TILING = Tiling(16, 1, 6, use_thumbnail=True, is_dynamic=True)
FRAMES = FrameSampling.parse("uniform", 2, 4)
TOKENS_PER_TILE = 4
SIZES = ((16, 16), (48, 32), (20, 90))


def build_encoding(*, tiling: Tiling = TILING, conv_style: str = "internvl2_5") -> Encoding:
    return Encoding(TextEncoder.from_tokenizer(TOKENIZER), tiling, FRAMES, conv_style, TOKENS_PER_TILE)


def record(image: str | list[str] | None = None, answer: str = "A cat.", **content: Any) -> dict[str, Any]:
    tags = "<image>\n" * (len(image) if isinstance(image, list) else int(image is not None))
    turns = [{"from": "human", "value": f"{tags}What is it?"}, {"from": "gpt", "value": answer}]
    return {"image": image, "conversations": turns, **content}


def write_images(folder: Path) -> None:
    """Write 0.png, 1.png and 2.png, of the three `SIZES`."""
    for number, (width, height) in enumerate(SIZES):
        pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")


def write_records(path: Path, records: list[dict[str, Any] | str]) -> None:
    """Write an annotation file; a text is a line as it stands."""
    lines = [content if isinstance(content, str) else json.dumps(content) for content in records]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def write_meta(folder: Path, datasets: dict[str, list[Any]], **entry: Any) -> Path:
    """Write images, annotations and a meta file in which every data set has the same entry."""
    write_images(folder)
    meta = {}
    for name, records in datasets.items():
        write_records(folder / f"{name}.jsonl", records)
        meta[name] = {"root": ".", "annotation": f"{name}.jsonl", **entry}
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder / "meta.json"


def build_mixture(folder: Path, sizes: dict[str, int], *, seed: int) -> Mixture:
    """Mix data sets of so many texts, of between 1 and 101 words."""
    records = {
        name: [record(answer="word " * (1 + (7 * number) % 101)) for number in range(size)]
        for name, size in sizes.items()
    }
    indexes = [open_index(meta, build_encoding(), folder / "cache") for meta in load_meta(write_meta(folder, records))]
    return Mixture(indexes, seed=seed, max_tokens=None)
