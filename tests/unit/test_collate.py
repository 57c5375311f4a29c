import torch

from internvl_core.data.collate import PromptCollator, SampleCollator
from internvl_core.data.dataset import Sample
from internvl_core.data.quarantine import BadSample
from internvl_core.errors import Reason

PAD = 7


def sample(ids: list[int], num_tiles: int, sample_id: str = "a:1") -> Sample:
    return {
        "input_ids": torch.tensor(ids),
        "labels": torch.tensor([-100, *ids[1:]]),
        "tiles": torch.full((num_tiles, 3, 2, 2), len(ids), dtype=torch.uint8),
        "sample_id": sample_id,
    }


def test_samples_are_padded_on_the_right_to_the_longest() -> None:
    batch = SampleCollator(PAD)([sample([1, 2, 3], 0), sample([4], 0)])
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, PAD, PAD]]
    assert batch["labels"].tolist() == [[-100, 2, 3], [-100, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


def test_real_tokens_are_attended_whatever_their_id() -> None:
    # F4: the original masked id 0, which is "!" in Qwen's vocabulary, and attended the padding.
    batch = SampleCollator(PAD)([sample([0, PAD, 0], 0), sample([1], 0)])
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


def test_prompts_are_padded_on_the_left() -> None:
    batch = PromptCollator(PAD)([sample([1, 2, 3], 0), sample([PAD], 0)])
    assert batch["input_ids"].tolist() == [[1, 2, 3], [PAD, PAD, PAD]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert "labels" not in batch


def test_tiles_are_joined_in_the_order_of_the_samples() -> None:
    batch = SampleCollator(PAD)([sample([1, 2], 2, "a:1"), sample([1], 0, "b:4"), sample([1, 2, 3], 1, "a:2")])
    assert batch["pixel_values"][:, 0, 0, 0].tolist() == [2, 2, 3]
    assert batch["pixel_values"].dtype == torch.uint8
    assert batch["sample_ids"] == ["a:1", "b:4", "a:2"]


def test_a_batch_of_text_has_no_pixels() -> None:
    # F18: the original paid for a white tile per text sample.
    assert "pixel_values" not in SampleCollator(PAD)([sample([1, 2], 0), sample([3], 0)])


BAD = BadSample("a", 3, Reason.MEDIA, "a.jsonl:3: broken")


def test_a_bad_sample_leaves_its_batch_and_nothing_takes_its_place() -> None:
    batch = SampleCollator(PAD)([sample([1, 2], 1, "a:1"), BAD, sample([4], 0, "a:2")])
    assert batch["input_ids"].tolist() == [[1, 2], [4, PAD]]
    assert batch["sample_ids"] == ["a:1", "a:2"]
    assert batch["bad_samples"] == [BAD]


def test_a_batch_of_which_nothing_is_left_teaches_nothing() -> None:
    # F7: without a guard its loss is 0/0.
    batch = SampleCollator(PAD)([BAD, BAD])
    assert batch["input_ids"].tolist() == [[PAD]]
    assert batch["labels"].tolist() == [[-100]]
    assert batch["sample_ids"] == []
    assert batch["bad_samples"] == [BAD, BAD]
    assert "pixel_values" not in batch
