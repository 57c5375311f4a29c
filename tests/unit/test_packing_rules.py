from typing import Any

import pytest

from internvl_core.argument_rules import check_arguments, load_properties, resolve_arguments
from internvl_core.data.sizes import MAX_PACK_TILES, MAX_PACK_TOKENS
from internvl_core.errors import ArgumentError
from internvl_core.packing_rules import is_packed

GOOD: dict[str, Any] = {"model_name_or_path": "m", "meta_path": "meta.json"}


def check(changes: dict[str, Any], *, entry: str) -> None:
    check_arguments(resolve_arguments({**GOOD, **changes}), entry=entry)


def refuse(changes: dict[str, Any], *, entry: str) -> str:
    with pytest.raises(ArgumentError) as caught:
        check(changes, entry=entry)
    return str(caught.value)


@pytest.mark.parametrize(
    ("entry", "use_packed_ds", "packs"),
    [("pretrain", False, True), ("pretrain", True, True), ("finetune", False, False), ("finetune", True, True)],
)
def test_pretrain_always_packs_and_finetune_where_it_is_asked_to(entry: str, use_packed_ds: bool, packs: bool) -> None:
    assert is_packed(resolve_arguments({"use_packed_ds": use_packed_ds}), entry=entry) == packs


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_images_expected", 48),
        ("max_packed_tokens", 16384),
        ("log_freq", 10),
        ("strict_mode", False),
        ("replacement", True),
        ("packer", "legacy"),
        ("packed_attention", "sdpa"),
    ],
)
def test_arguments_of_packing_are_said_to_do_nothing_where_batches_are_padded(
    name: str, value: Any, caplog: pytest.LogCaptureFixture
) -> None:
    others = {"max_steps": 10}
    check({**others, name: value, "use_packed_ds": True}, entry="finetune")
    check({**others, name: value}, entry="pretrain")
    assert not caplog.records
    check({**others, name: value}, entry="finetune")
    assert f"{name}: no effect on a stage that pads its batches" in caplog.text


def test_the_buffer_of_the_original_belongs_to_its_packer() -> None:
    for entry in ("pretrain", "finetune"):
        assert "max_buffer_size: 7 belongs to packer legacy" in refuse({"max_buffer_size": 7}, entry=entry)
    check({"max_buffer_size": 7, "packer": "legacy"}, entry="pretrain")


def test_a_sample_must_fit_into_a_pack() -> None:
    assert "8192 is more than max_packed_tokens, 4096" in refuse({"max_packed_tokens": 4096}, entry="pretrain")
    check({"max_packed_tokens": 4096, "max_seq_length": 4096}, entry="pretrain")


def test_packs_are_not_grouped_by_length() -> None:
    assert "group_by_length: packs leave no padding" in refuse({"group_by_length": True}, entry="pretrain")


def test_data_that_start_over_need_a_number_of_steps() -> None:
    assert "replacement: data that start over never end" in refuse({"replacement": True}, entry="pretrain")
    check({"replacement": True, "max_steps": 3}, entry="pretrain")


def test_a_pack_never_grows_over_its_limit() -> None:
    assert "allow_overflow: True: a pack that grew over its limit" in refuse({"allow_overflow": True}, entry="pretrain")


def test_a_pack_has_a_size_that_can_be_counted() -> None:
    properties = load_properties()
    assert properties["max_packed_tokens"]["maximum"] == MAX_PACK_TOKENS
    assert properties["num_images_expected"]["maximum"] == MAX_PACK_TILES
    with pytest.raises(ArgumentError, match=r"max_packed_tokens: .*at most 16777216"):
        resolve_arguments({"max_packed_tokens": 2**32})


def test_an_unknown_reduction_of_the_loss_is_refused_before_any_step() -> None:
    with pytest.raises(ArgumentError, match=r"loss_reduction: .*token, sample, square"):
        resolve_arguments({"loss_reduction": "mean"})
