import pytest
import torch

from internvl_core.data.collate import PackCollator, PromptCollator, SampleCollator
from internvl_core.data.dataset import Sample
from internvl_core.data.quarantine import BadSample
from internvl_core.data.sizes import PackLimits
from internvl_core.errors import DataError, Reason

PAD = 7
BAD = BadSample("a", 3, Reason.MEDIA, "a.jsonl:3: broken")


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


def test_weights_of_padded_samples_stand_where_their_labels_do() -> None:
    samples = [sample([1, 2, 3], 0), sample([4], 0)]
    weights = SampleCollator(PAD, "sample")(samples)["loss_weights"]
    assert weights.tolist() == [[0, 0.5, 0.5], [0, 0, 0]]
    assert weights.dtype == torch.float32


@pytest.mark.parametrize("is_packed", [True, False])
def test_weights_are_those_of_each_sample_whatever_its_batch(is_packed: bool) -> None:
    samples = [sample([1, 2, 3, 4, 5], 0), sample([6, 7], 0)]
    collator = PackCollator(PAD, "square") if is_packed else SampleCollator(PAD, "square")
    weights = collator(samples)["loss_weights"].flatten()
    torch.testing.assert_close(weights[weights > 0], torch.tensor([0.5] * 4 + [1.0]))


@pytest.mark.parametrize("limits", [None, PackLimits(max_tokens=20, max_tiles=9)])
def test_tokens_and_tiles_are_counted_without_padding(limits: PackLimits | None) -> None:
    samples = [sample([1, 2, 3], 2), BAD, sample([4], 1)]
    for batch in (PackCollator(PAD, "token", limits)(samples), SampleCollator(PAD, "token")(samples)):
        assert (batch["num_tokens"], batch["num_tiles"]) == (4, 3)
    assert (PackCollator(PAD, "token", limits)([BAD])["num_tokens"]) == 0


def test_samples_of_a_pack_follow_one_another_and_each_begins_at_position_0() -> None:
    batch = PackCollator(PAD, "token")([sample([1, 2, 3], 0, "a:1"), sample([PAD], 0, "a:2"), sample([4, 5], 0, "b:1")])
    assert batch["input_ids"].tolist() == [[1, 2, 3, PAD, 4, 5]]
    assert batch["labels"].tolist() == [[-100, 2, 3, -100, -100, 5]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1]]
    assert batch["loss_weights"].tolist() == [[0, 1, 1, 0, 0, 1]]
    assert batch["cu_seq_lens"].tolist() == [0, 3, 4, 6]
    assert batch["cu_seq_lens"].dtype == torch.int32
    assert batch["max_seq_len"] == 3
    assert type(batch["max_seq_len"]) is int
    assert batch["sample_ids"] == ["a:1", "a:2", "b:1"]
    assert batch["num_tiles"] == 0
    assert "pixel_values" not in batch
    assert "attention_mask" not in batch


def test_tiles_of_a_pack_are_joined_in_the_order_of_the_samples() -> None:
    batch = PackCollator(PAD, "token")([sample([1, 2], 2), sample([1], 0), sample([1, 2, 3], 1)])
    assert batch["pixel_values"][:, 0, 0, 0].tolist() == [2, 2, 3]
    assert batch["pixel_values"].dtype == torch.uint8
    assert batch["num_tiles"] == 3


def test_strict_mode_fills_tokens_and_tiles_with_a_segment_that_teaches_nothing() -> None:
    collator = PackCollator(PAD, "token", PackLimits(max_tokens=10, max_tiles=4))
    batch = collator([sample([1, 2, 3], 1), sample([4, 5], 0)])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, *[PAD] * 5]]
    assert batch["labels"][0, 5:].tolist() == [-100] * 5
    assert not batch["loss_weights"][0, 5:].any()
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1, 2, 3, 4]]
    assert batch["cu_seq_lens"].tolist() == [0, 3, 5, 10]
    assert batch["max_seq_len"] == 5
    assert batch["pixel_values"].shape == (4, 3, 2, 2)
    assert not batch["pixel_values"][1:].any()
    assert batch["num_tiles"] == 1


def test_strict_mode_adds_nothing_to_a_full_pack() -> None:
    samples = [sample([1, 2, 3], 1), sample([4, 5], 1)]
    full, free = (PackCollator(PAD, "token", limits)(samples) for limits in (PackLimits(5, 2), None))
    for name in ("input_ids", "cu_seq_lens", "pixel_values", "loss_weights"):
        torch.testing.assert_close(full[name], free[name])


def test_strict_mode_fills_a_pack_of_text_with_tiles_so_that_all_shapes_are_equal() -> None:
    batch = PackCollator(PAD, "token", PackLimits(max_tokens=10, max_tiles=4))([sample([1, 2], 0)])
    assert batch["pixel_values"].shape == (4, 3, 2, 2)
    assert batch["num_tiles"] == 0


def test_several_packs_of_a_batch_are_filled_to_as_many_times_the_limits() -> None:
    collator = PackCollator(PAD, "token", PackLimits(max_tokens=6, max_tiles=2), packs_per_batch=2)
    batch = collator([sample([1, 2, 3, 4, 5], 1), sample([6, 7, 8], 1)])
    assert batch["input_ids"].shape == (1, 12)
    assert len(batch["pixel_values"]) == 4


@pytest.mark.parametrize(
    ("limits", "message"),
    [(PackLimits(4, 9), "5 tokens, but at most 4 fit"), (PackLimits(9, 1), "2 tiles, but at most 1 fit")],
)
def test_a_pack_over_its_limits_is_refused(limits: PackLimits, message: str) -> None:
    with pytest.raises(DataError, match=message):
        PackCollator(PAD, "token", limits)([sample([1, 2, 3], 1), sample([4, 5], 1)])


def test_a_bad_sample_leaves_its_pack_and_nothing_takes_its_place() -> None:
    batch = PackCollator(PAD, "token")([sample([1, 2], 1, "a:1"), BAD, sample([4], 0, "a:2")])
    assert batch["cu_seq_lens"].tolist() == [0, 2, 3]
    assert batch["sample_ids"] == ["a:1", "a:2"]
    assert batch["bad_samples"] == [BAD]


@pytest.mark.parametrize("num_tokens", [1, 8])
def test_a_pack_of_which_nothing_is_left_teaches_nothing(num_tokens: int) -> None:
    limits = None if num_tokens == 1 else PackLimits(max_tokens=num_tokens, max_tiles=2)
    batch = PackCollator(PAD, "sample", limits)([BAD, BAD])
    assert batch["input_ids"].tolist() == [[PAD] * num_tokens]
    assert not batch["loss_weights"].any()
    assert batch["loss_weights"].isfinite().all()
    assert batch["cu_seq_lens"].tolist() == [0, num_tokens]
    assert batch["num_tiles"] == 0
    assert batch["sample_ids"] == []
    assert batch["bad_samples"] == [BAD, BAD]


def test_padding_is_cut_so_that_attention_over_it_stays_cheap() -> None:
    collator = PackCollator(PAD, "token", PackLimits(3000, 4), packs_per_batch=2)
    batch = collator([sample([1, 2, 3], 1), sample([4, 5], 0)])
    lengths = batch["cu_seq_lens"].diff()
    assert lengths[:2].tolist() == [3, 2]
    assert lengths.sum() == 6000 == batch["input_ids"].shape[1]
    assert max(lengths[2:]) == batch["max_seq_len"] == 512
    starts = batch["cu_seq_lens"][:-1].long()
    assert not batch["position_ids"][0, starts].any()
