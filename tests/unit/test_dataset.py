import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

from internvl_core.data.conversation import IMAGE_CONTEXT
from internvl_core.data.dataset import (
    Encoding,
    SupervisedDataset,
    encode_question,
    load_questions,
    select_positions,
)
from internvl_core.data.meta import DatasetMeta, load_meta
from internvl_core.data.tiling import Tiling
from internvl_core.errors import ArgumentError, DataError, MediaError

TOKENIZER = AutoTokenizer.from_pretrained(Path(__file__).parents[1] / "data" / "tokenizer")
CONTEXT_ID = TOKENIZER.convert_tokens_to_ids(IMAGE_CONTEXT)
TILING = Tiling(16, 1, 6, use_thumbnail=True, is_dynamic=True)
TOKENS_PER_TILE = 4


def record(image: str | list[str] | None = None, answer: str = "A cat.") -> dict[str, Any]:
    tags = "<image>\n" * (len(image) if isinstance(image, list) else int(image is not None))
    turns = [{"from": "human", "value": f"{tags}What is it?"}, {"from": "gpt", "value": answer}]
    return {"image": image, "conversations": turns}


def write_meta(folder: Path, datasets: dict[str, list[dict[str, Any]]], **entry: Any) -> Path:
    for number, size in enumerate([(16, 16), (48, 32), (20, 90)]):
        pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    meta = {}
    for name, records in datasets.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(content) + "\n" for content in records))
        meta[name] = {"root": ".", "annotation": f"{name}.jsonl", **entry}
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder / "meta.json"


def build(path: Path, *, max_seq_length: int = 512, seed: int = 0, tiling: Tiling = TILING) -> SupervisedDataset:
    encoding = Encoding(TOKENIZER, tiling, "internvl2_5", TOKENS_PER_TILE)
    return SupervisedDataset(load_meta(path), encoding, max_seq_length=max_seq_length, seed=seed)


def test_every_sample_has_one_run_of_context_tokens_per_tile(tmp_path: Path) -> None:
    records = [record(), record("0.png"), record("1.png"), record(["1.png", "2.png"])]
    dataset = build(write_meta(tmp_path, {"pets": records}))
    samples = [dataset[index] for index in range(len(dataset))]
    # Two images share the bound of 6: 3 each, and a thumbnail on top of each grid.
    assert [len(sample["tiles"]) for sample in samples] == [0, 1, 7, 7]
    for sample in samples:
        assert sample["tiles"].shape[1:] == (3, 16, 16)
        assert (sample["input_ids"] == CONTEXT_ID).sum() == TOKENS_PER_TILE * len(sample["tiles"])
        assert sample["labels"].shape == sample["input_ids"].shape


def test_lengths_are_exact_without_decoding(tmp_path: Path) -> None:
    # F22: the original guessed from the number of characters.
    records = [record(), record("1.png"), record(["1.png", "2.png"], answer="long " * 20)]
    dataset = build(write_meta(tmp_path, {"pets": records}, repeat_time=2))
    assert dataset.lengths == [len(dataset[index]["input_ids"]) for index in range(len(dataset))]


def test_datasets_follow_each_other_and_repeat(tmp_path: Path) -> None:
    dataset = build(write_meta(tmp_path, {"a": [record()] * 4, "b": [record()]}, repeat_time=1.5))
    ids = [dataset[index]["sample_id"] for index in range(len(dataset))]
    assert ids[:4] == ["a:1", "a:2", "a:3", "a:4"]
    assert len(set(ids[4:6])) == 2
    assert ids[6:] == ["b:1"]
    assert dataset.dataset_names == ["a", "b"]


def test_a_share_is_drawn_by_the_seed_and_not_from_the_head() -> None:
    # F40: the original kept the first lines, which are often sorted by source.
    meta = DatasetMeta("pets", Path(), Path("a.jsonl"), False, 0.1, None)
    drawn = [select_positions(meta, 1000, seed=seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) == 100
    assert drawn[0][-1] > 500


def test_a_datasets_own_bound_limits_its_tiles(tmp_path: Path) -> None:
    dataset = build(write_meta(tmp_path, {"pets": [record("1.png")]}, max_dynamic_patch=1))
    assert len(dataset[0]["tiles"]) == 1


def test_augmentation_differs_by_epoch_and_repeats_exactly(tmp_path: Path) -> None:
    path = write_meta(tmp_path, {"pets": [record("1.png")] * 8}, data_augment=True)
    dataset, again = build(path), build(path)
    first = torch.stack([dataset[index]["tiles"] for index in range(8)])
    dataset.set_epoch(1)
    second = torch.stack([dataset[index]["tiles"] for index in range(8)])
    assert not torch.equal(first, second)
    assert torch.equal(first, torch.stack([again[index]["tiles"] for index in range(8)]))


def test_workers_that_outlive_an_epoch_hear_of_the_next(tmp_path: Path) -> None:
    dataset = build(write_meta(tmp_path, {"a": [record("1.png")]}, data_augment=True, repeat_time=1))
    loader = DataLoader(
        dataset, batch_size=None, num_workers=1, persistent_workers=True, multiprocessing_context="fork"
    )
    tiles = []
    for epoch in (0, 1):
        dataset.set_epoch(epoch)
        tiles.append(next(iter(loader))["tiles"])
    assert not tiles[0].equal(tiles[1])


def test_an_over_long_sample_is_refused_and_not_cut(tmp_path: Path) -> None:
    dataset = build(write_meta(tmp_path, {"pets": [record("1.png")]}), max_seq_length=64)
    with pytest.raises(DataError, match=r"pets\.jsonl:1: \d+ tokens \(7 tiles\), but max_seq_length is 64"):
        dataset[0]
    with pytest.raises(DataError, match="max_seq_length is 64"):
        _ = dataset.lengths


def test_a_bad_image_is_named_with_its_record_and_not_replaced(tmp_path: Path) -> None:
    # F8: the original trained on a random other record instead.
    path = write_meta(tmp_path, {"pets": [record("0.png"), record("3.png")]})
    (tmp_path / "3.png").write_bytes(b"no image")
    with pytest.raises(MediaError, match=r"pets\.jsonl:2: .*3\.png: cannot be decoded"):
        build(path)[1]


def test_a_tokenizer_without_internvls_tokens_is_refused(tmp_path: Path) -> None:
    bare = AutoTokenizer.from_pretrained(Path(__file__).parents[1] / "data" / "tokenizer").__class__()
    with pytest.raises(ArgumentError, match=r"tokenizer: lacks .*<IMG_CONTEXT>"):
        Encoding(bare, TILING, "internvl2_5", TOKENS_PER_TILE)


def test_a_question_is_how_the_training_sample_begins(tmp_path: Path) -> None:
    path = write_meta(tmp_path, {"pets": [record("1.png", answer="A dog.")]})
    (question,) = load_questions(path)
    sample = build(path)[0]
    prompt = encode_question(question, Encoding(TOKENIZER, TILING, "internvl2_5", TOKENS_PER_TILE))
    assert (question.answer, question.sample_id) == ("A dog.", "pets:1")
    assert question.meta.name == "pets"
    assert torch.equal(sample["input_ids"][: len(prompt["input_ids"])], prompt["input_ids"])
    assert torch.equal(sample["tiles"], prompt["tiles"])


def test_only_the_last_answer_of_a_conversation_is_asked_for(tmp_path: Path) -> None:
    content = record()
    content["conversations"] += [{"from": "human", "value": "And now?"}, {"from": "gpt", "value": "Gone."}]
    (question,) = load_questions(write_meta(tmp_path, {"pets": [content]}))
    assert [turn.text for turn in question.turns] == ["What is it?", "A cat.", "And now?"]
    assert question.answer == "Gone."
