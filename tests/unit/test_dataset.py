import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from data_sets import TILING, TOKENIZER, TOKENS_PER_TILE, build_encoding, record, write_meta
from torch.utils.data import DataLoader

from internvl_core.data.annotation import AnnotationChanged
from internvl_core.data.conversation import IMAGE_CONTEXT
from internvl_core.data.dataset import Sample, SupervisedDataset, build_dataset
from internvl_core.data.meta import load_meta
from internvl_core.data.pixels import PixelRules
from internvl_core.data.quarantine import BadSample
from internvl_core.data.questions import QuestionEncoder, load_questions
from internvl_core.errors import DataError, Reason

CONTEXT_ID = TOKENIZER.convert_tokens_to_ids(IMAGE_CONTEXT)
RULES = PixelRules("imagenet")


def build(
    path: Path, *, max_seq_length: int = 512, seed: int = 0, rules: PixelRules = RULES, **options: Any
) -> SupervisedDataset:
    return build_dataset(
        load_meta(path),
        build_encoding(),
        rules,
        cache_dir=path.parent / "cache",
        max_seq_length=max_seq_length,
        seed=seed,
        **options,
    )


def get(dataset: SupervisedDataset, number: int) -> Sample:
    sample = dataset[number]
    assert not isinstance(sample, BadSample), sample.message
    return sample


def get_bad(dataset: SupervisedDataset, number: int) -> BadSample:
    sample = dataset[number]
    assert isinstance(sample, BadSample)
    return sample


def test_every_sample_has_one_run_of_context_tokens_per_tile(tmp_path: Path) -> None:
    records = [record(), record("0.png"), record("1.png"), record(["1.png", "2.png"])]
    dataset = build(write_meta(tmp_path, {"pets": records}))
    samples = [get(dataset, number) for number in range(len(dataset))]
    # Two images share the bound of 6: 3 each, and a thumbnail on top of each grid.
    assert [len(sample["tiles"]) for sample in samples] == [0, 1, 7, 7]
    for sample in samples:
        assert sample["tiles"].shape[1:] == (3, 16, 16)
        assert (sample["input_ids"] == CONTEXT_ID).sum() == TOKENS_PER_TILE * len(sample["tiles"])
        assert sample["labels"].shape == sample["input_ids"].shape


def test_the_index_knows_every_length_exactly(tmp_path: Path) -> None:
    # F22: the original guessed from the number of characters.
    records = [record(), record("1.png"), record(["1.png", "2.png"], answer="long " * 20)]
    dataset = build(write_meta(tmp_path, {"pets": records}, repeat_time=2))
    lengths = dataset.mixture.count_tokens(range(len(dataset)))
    assert lengths == [len(get(dataset, number)["input_ids"]) for number in range(len(dataset))]


def test_a_datasets_own_bound_limits_its_tiles(tmp_path: Path) -> None:
    dataset = build(write_meta(tmp_path, {"pets": [record("1.png")]}, max_dynamic_patch=1))
    assert len(get(dataset, 0)["tiles"]) == 1


def test_a_datasets_own_system_prompt_and_chat_format_are_used(tmp_path: Path) -> None:
    def text(**entry: Any) -> str:
        path = write_meta(tmp_path, {"pets": [record()]}, **entry)
        return str(TOKENIZER.decode(get(build(path), 0)["input_ids"]))

    assert text(system_prompt="Be brief.").startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user")
    assert text(system_prompt="", conv_style="Hermes-2").startswith("<|im_start|>system\n<|im_end|><|im_start|>user")
    assert "InternVL" in text()


@pytest.mark.parametrize("rules", [RULES, PixelRules("imagenet", augment_per_tile=True, is_fast=True)])
def test_augmentation_differs_by_epoch_and_repeats_exactly(tmp_path: Path, rules: PixelRules) -> None:
    path = write_meta(tmp_path, {"pets": [record("1.png")] * 8}, data_augment=True)
    dataset, again = build(path, rules=rules), build(path, rules=rules)
    first, second = (torch.stack([get(dataset, id)["tiles"] for id in ids]) for ids in (range(8), range(8, 16)))
    assert not torch.equal(first, second)
    for id in range(15, -1, -1):
        assert torch.equal(torch.cat([first, second])[id], get(again, id)["tiles"])


def test_a_pass_within_an_epoch_is_augmented_anew(tmp_path: Path) -> None:
    dataset = build(write_meta(tmp_path, {"pets": [record("1.png")] * 4}, data_augment=True, repeat_time=2))
    tiles = torch.stack([get(dataset, number)["tiles"] for number in range(8)])
    assert not torch.equal(tiles[:4], tiles[4:])


def test_workers_give_what_the_id_says_whatever_they_gave_before(tmp_path: Path) -> None:
    dataset = build(write_meta(tmp_path, {"b": [record("1.png")] * 2}, data_augment=True))
    ids = [5, 0, 1_000_000, 4, 5]
    loader = DataLoader(dataset, sampler=ids, batch_size=None, num_workers=2, multiprocessing_context="fork")
    samples = list(loader)
    for id, sample in zip(ids, samples, strict=True):
        assert torch.equal(sample["tiles"], get(dataset, id)["tiles"])
    assert torch.equal(samples[0]["tiles"], samples[4]["tiles"])
    assert not torch.equal(samples[0]["tiles"], samples[3]["tiles"])


def test_a_pass_of_an_endless_data_set_is_augmented_anew(tmp_path: Path) -> None:
    dataset = build(write_meta(tmp_path, {"b": [record("1.png")]}, data_augment=True), is_endless=True)
    ids = list(itertools.islice(dataset.mixture.iter_ids(0), 4))
    tiles = [get(dataset, id)["tiles"] for id in ids]
    assert any(not torch.equal(tiles[0], other) for other in tiles[1:])


def test_what_the_index_leaves_out_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    records = [record(), "broken", record(answer="long " * 200)]
    assert len(build(write_meta(tmp_path, {"pets": records}), max_seq_length=300)) == 1
    assert "pets: 2 of 3 records are left out: 1 not_json, 1 too_long" in caplog.text


def test_samples_that_no_pack_holds_are_left_out_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dataset = build(write_meta(tmp_path, {"pets": [record("0.png"), record("1.png"), record("1.png")]}), max_tiles=6)
    assert [get(dataset, id)["sample_id"] for id in range(len(dataset))] == ["pets:1"]
    assert "pets: 2 of 3 records are left out: 2 too_many_tiles" in caplog.text


def test_a_bad_image_is_named_with_its_record_and_not_replaced(tmp_path: Path) -> None:
    # F8: the original trained on a random other record instead.
    sizes = {"width": 16, "height": 16}
    records = [record("0.png"), record("3.png", **sizes), record("4.png", **sizes)]
    path = write_meta(tmp_path, {"pets": records})
    (tmp_path / "3.png").write_bytes(b"no image")
    dataset = build(path)
    broken, missing = get_bad(dataset, 1), get_bad(dataset, 2)
    assert (broken.sample_id, broken.reason) == ("pets:2", Reason.MEDIA)
    assert "pets.jsonl:2: 3.png" in broken.message
    assert (missing.sample_id, missing.reason) == ("pets:3", Reason.MISSING)
    assert get(dataset, 0)["sample_id"] == "pets:1"


def test_a_picture_that_is_not_of_the_size_its_record_says_is_no_sample(tmp_path: Path) -> None:
    # F5, F6: the original trained on, with a loss of zero.
    dataset = build(write_meta(tmp_path, {"pets": [record("1.png", width=16, height=16)]}))
    bad = get_bad(dataset, 0)
    assert bad.reason is Reason.SIZE_MISMATCH
    assert "7 tiles" in bad.message


def test_an_edit_of_the_annotation_is_no_bad_sample(tmp_path: Path) -> None:
    path = write_meta(tmp_path, {"pets": [record()] * 2})
    dataset = build(path)
    get(dataset, 0)
    (tmp_path / "pets.jsonl").write_text(json.dumps(record(answer="Another.")) + "\n")
    with pytest.raises(AnnotationChanged):
        dataset[1]


def test_a_question_is_how_the_training_sample_begins(tmp_path: Path) -> None:
    path = write_meta(tmp_path, {"pets": [record("1.png", answer="A dog.")]}, data_augment=False)
    (question,) = load_questions(path, tmp_path / "cache")
    sample = get(build(path), 0)
    prompt = QuestionEncoder(build_encoding(tiling=TILING), RULES).encode(question)
    assert (question.answer, prompt["sample_id"], question.meta.name) == ("A dog.", "pets:1", "pets")
    assert torch.equal(sample["input_ids"][: len(prompt["input_ids"])], prompt["input_ids"])
    assert torch.equal(sample["tiles"], prompt["tiles"])


def test_only_the_last_answer_of_a_conversation_is_asked_for(tmp_path: Path) -> None:
    content = record()
    content["conversations"] += [{"from": "human", "value": "And now?"}, {"from": "gpt", "value": "Gone."}]
    (question,) = load_questions(write_meta(tmp_path, {"pets": [content]}), tmp_path / "cache")
    assert [turn["value"] for turn in question.record.content.turns] == ["What is it?", "A cat.", "And now?"]
    assert question.answer == "Gone."


def test_a_bad_question_is_an_error_with_its_place(tmp_path: Path) -> None:
    path = write_meta(tmp_path, {"pets": [record("0.png"), record("3.png")]})
    questions = load_questions(path, tmp_path / "cache")
    encoder = QuestionEncoder(build_encoding(), RULES)
    with pytest.raises(DataError, match=r"pets\.jsonl:2: .*3\.png"):
        encoder.encode(questions[1])
    write_meta(tmp_path, {"pets": [record(), "broken"]})
    with pytest.raises(DataError, match=r"pets\.jsonl:2: not one JSON object"):
        load_questions(path, tmp_path / "cache")
