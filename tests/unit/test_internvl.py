import copy
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torch.distributed as dist
from packs import PAD, make_sample, make_samples, normalise_batch, pack, run_alone
from tiny_internvl import build_batch, build_tiles, build_tiny_model
from torch import Tensor, nn
from transformers import InternVLForConditionalGeneration

from internvl_core.arguments import ModelArguments
from internvl_core.data.collate import SampleCollator
from internvl_core.data.dataset import Sample
from internvl_core.data.loss_weights import LossReduction
from internvl_core.data.sizes import PackLimits
from internvl_core.errors import ArgumentError, DataError
from internvl_core.model.attention import use_packed_attention
from internvl_core.model.internvl import InternVLForTraining, add_drop_path
from internvl_core.model.trainable import enable_checkpointing, set_trainable


def run_branch(model: InternVLForTraining, layer: int, *, num_tiles: int) -> Tensor:
    """Run the MLP branch of a vision layer over tiles of ones; with equal rows, a row tells what was dropped."""
    return model.model.vision_tower.encoder.layer[layer].mlp(torch.ones(num_tiles, 17, 16))


def learning_parts(model: InternVLForTraining) -> list[torch.nn.Parameter]:
    return [*model.model.vision_tower.parameters(), *model.model.multi_modal_projector.parameters()]


def test_the_loss_is_that_of_the_native_class() -> None:
    model, batch = build_tiny_model().train(), build_batch()
    native = InternVLForConditionalGeneration(copy.deepcopy(model.config))
    native.load_state_dict(model.state_dict())
    for extra in ({}, {"num_items_in_batch": torch.tensor(3)}):
        torch.testing.assert_close(model(**batch, **extra).loss, native.train()(**batch, **extra).loss, rtol=0, atol=0)


def test_the_number_of_image_tokens_must_be_that_of_the_tiles() -> None:
    batch = build_batch(num_tiles=2)
    batch["pixel_values"] = batch["pixel_values"][:1]
    with pytest.raises(ValueError, match="tokens: 8, features: 4"):
        build_tiny_model()(**batch)


def test_drop_path_rises_linearly_from_zero_at_the_first_layer() -> None:
    model = build_tiny_model(num_vision_layers=4)
    add_drop_path(model, 0.6)
    torch.manual_seed(0)
    shares = []
    for layer in range(4):
        rows = run_branch(model.train(), layer, num_tiles=4000)
        shares.append((rows.abs().amax(dim=(1, 2)) == 0).float().mean().item())
    assert shares[0] == 0
    assert shares == pytest.approx([0, 0.2, 0.4, 0.6], abs=0.03)


def test_drop_path_drops_whole_tiles_in_both_branches_and_scales_the_rest() -> None:
    model, untouched = build_tiny_model().train(), build_tiny_model().train()
    add_drop_path(model, 0.5)
    torch.manual_seed(0)
    tiles = torch.randn(64, 17, 16)
    for name in ("mlp", "attention"):
        dropped, full = (getattr(each.model.vision_tower.encoder.layer[1], name)(tiles) for each in (model, untouched))
        rows, expected = (output[0] if name == "attention" else output for output in (dropped, full))
        is_zero = rows.flatten(1).abs().amax(dim=1) == 0
        assert 10 < is_zero.sum() < 54
        torch.testing.assert_close(rows[~is_zero], 2 * expected[~is_zero])


def test_drop_path_keeps_the_expectation() -> None:
    model, untouched = build_tiny_model().train(), build_tiny_model().train()
    add_drop_path(model, 0.3)
    torch.manual_seed(0)
    mean = run_branch(model, 1, num_tiles=20_000).mean(dim=0)
    torch.testing.assert_close(mean, run_branch(untouched, 1, num_tiles=1)[0], rtol=0.03, atol=1e-3)


def test_drop_path_is_off_in_evaluation() -> None:
    model, tiles = build_tiny_model().eval(), build_tiles(8)
    before = model.get_image_features(pixel_values=tiles).pooler_output
    add_drop_path(model, 0.9)
    torch.testing.assert_close(model.get_image_features(pixel_values=tiles).pooler_output, before, rtol=0, atol=0)


def test_drop_path_of_zero_leaves_the_model_alone() -> None:
    model = build_tiny_model().train()
    add_drop_path(model, 0.0)
    assert not any(module._forward_hooks for module in model.modules())


def test_a_frozen_tower_stays_in_evaluation_mode() -> None:
    # F11: in the original drop path stays active in a frozen tower.
    model, tiles = build_tiny_model(), build_tiles(8)
    add_drop_path(model, 0.9)
    model.model.vision_tower.requires_grad_(False)
    model.eval()
    before = model.get_image_features(pixel_values=tiles).pooler_output
    model.train()
    assert not any(module.training for module in model.model.vision_tower.modules())
    assert model.model.language_model.training
    torch.testing.assert_close(model.get_image_features(pixel_values=tiles).pooler_output, before, rtol=0, atol=0)


def test_a_tower_of_which_one_layer_learns_is_in_training_mode() -> None:
    model = build_tiny_model()
    model.model.vision_tower.requires_grad_(False)
    model.model.vision_tower.encoder.layer[1].requires_grad_(True)
    assert model.train().model.vision_tower.training


def test_a_batch_of_text_reaches_every_parameter_of_tower_and_projector_without_changing_the_loss() -> None:
    model, batch = build_tiny_model(), build_batch(num_tiles=0)
    alone = model.eval()(**batch).loss
    loss = model.train()(**batch).loss
    torch.testing.assert_close(loss, alone, rtol=0, atol=0)
    loss.backward()
    for parameter in learning_parts(model):
        assert parameter.grad is not None
        assert not parameter.grad.any()
    assert model.model.language_model.embed_tokens.weight.grad.any()


def test_a_batch_with_tiles_gets_no_dummy_tile() -> None:
    model, seen = build_tiny_model().train(), []
    model.model.vision_tower.register_forward_hook(lambda module, inputs, output: seen.append(1))
    model(**build_batch(num_tiles=2))
    assert len(seen) == 1


def test_text_is_not_charged_a_dummy_tile_in_evaluation() -> None:
    model, seen = build_tiny_model().eval(), []
    model.model.vision_tower.register_forward_hook(lambda module, inputs, output: seen.append(1))
    model(**build_batch(num_tiles=0))
    assert not seen


def compute_alone(model: InternVLForTraining, sample: Sample, reduction: LossReduction) -> tuple[Tensor, float]:
    """Sum of weight x cross entropy of one sample by the native forward, and the sum of its weights."""
    logits = run_alone(model, [sample])[0]
    losses = [
        -logits[place - 1].log_softmax(0)[label] for place, label in enumerate(sample["labels"].tolist()) if label >= 0
    ]
    weight = {"token": 1, "sample": 1 / len(losses), "square": len(losses) ** -0.5}[reduction] if losses else 0
    return sum(losses, start=0.0 * logits.sum()) * weight, weight * len(losses)


def pad_batch(samples: list[Sample], reduction: LossReduction) -> dict[str, Any]:
    return normalise_batch(dict(SampleCollator(PAD, reduction)(samples)))


def check_all_learn_nothing(model: torch.nn.Module) -> None:
    """Check that every parameter that learns has a gradient, and that it is zero."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert not parameter.grad.any(), name


# One sample of one token, of which nothing can be learnt, is among them.
SAMPLES = [*make_samples(), make_sample(7, 1, seed=5, is_learnt=False)]
REDUCTIONS: tuple[LossReduction, ...] = get_args(LossReduction)


@pytest.mark.parametrize("is_packed", [True, False])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_weighted_loss_and_its_gradients_are_those_of_the_samples_alone(
    reduction: LossReduction, is_packed: bool
) -> None:
    model = build_tiny_model().train()
    reference = copy.deepcopy(model)
    sums = [compute_alone(reference, sample, reduction) for sample in SAMPLES]
    expected = sum(loss for loss, _ in sums) / sum(weight for _, weight in sums)
    expected.backward()
    batch = pack(SAMPLES, reduction) if is_packed else pad_batch(SAMPLES, reduction)
    if is_packed:
        use_packed_attention(model, "sdpa")
    loss = model(**batch, loss_normalizer=batch["loss_weights"].sum()).loss
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-6)
    for (name, ours), (_, theirs) in zip(model.named_parameters(), reference.named_parameters(), strict=True):
        torch.testing.assert_close(
            ours.grad, theirs.grad, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: name + text
        )


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_loss_of_packs_together_does_not_depend_on_how_they_were_packed(reduction: LossReduction) -> None:
    model = build_tiny_model().eval()
    use_packed_attention(model, "sdpa")
    totals = []
    for packs in ([[0, 1, 2, 3, 4, 5]], [[5, 3], [4, 0], [2, 1]], [[0], [1], [2], [3], [4], [5]]):
        batches = [pack([SAMPLES[number] for number in numbers], reduction) for numbers in packs]
        normalizer = sum(batch["loss_weights"].sum() for batch in batches)
        totals.append(sum(model(**batch, loss_normalizer=normalizer).loss for batch in batches))
    torch.testing.assert_close(totals, [totals[0]] * 3, rtol=0, atol=1e-6)


def test_without_a_normalizer_the_sum_is_the_loss() -> None:
    model, batch = build_tiny_model().eval(), pad_batch(SAMPLES, "square")
    total, mean = model(**batch).loss, model(**batch, loss_normalizer=4.0).loss
    torch.testing.assert_close(total, 4 * mean)


def test_only_what_is_learnt_reaches_the_head_and_no_logits_come_out() -> None:
    # F20: the original computes the logits of all 16,384 positions of a pack.
    model, seen = build_tiny_model().train(), []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(tuple(inputs[0].shape)))
    use_packed_attention(model, "sdpa")
    batch = pack(SAMPLES)
    output = model(**batch)
    assert output.logits is None
    num_learnt = int((batch["labels"] != -100).sum())
    assert 0 < num_learnt < batch["labels"].numel() / 2
    assert seen == [(num_learnt, 16)]


@pytest.mark.parametrize("num_tiles", [0, 1])
@pytest.mark.parametrize("is_packed", [True, False])
@pytest.mark.parametrize("normalizer", [None, 3.0, torch.tensor(0.0)])
def test_a_batch_that_teaches_nothing_costs_nothing_and_has_all_gradients(
    normalizer: Tensor | float | None, is_packed: bool, num_tiles: int
) -> None:
    # F7: in the original it is 0 / 0. A gradient that is missing would let the other ranks of DDP wait for ever.
    model = build_tiny_model().train()
    samples = [make_sample(7, num_tiles, is_learnt=False), make_sample(3, is_learnt=False)]
    if is_packed:
        use_packed_attention(model, "sdpa")
    loss = model(**(pack(samples) if is_packed else pad_batch(samples, "token")), loss_normalizer=normalizer).loss
    assert loss.item() == 0
    loss.backward()
    check_all_learn_nothing(model)


def test_a_batch_of_which_all_samples_are_bad_has_all_gradients() -> None:
    model = build_tiny_model().train()
    use_packed_attention(model, "sdpa")
    loss = model(**pack([]), loss_normalizer=5.0).loss
    assert loss.item() == 0
    loss.backward()
    check_all_learn_nothing(model)


@pytest.mark.parametrize("learning", ["multi_modal_projector", "lm_head", "language_model.layers.1", "vision_tower"])
def test_what_alone_learns_has_a_gradient_even_if_there_is_nothing_to_learn(learning: str) -> None:
    model = build_tiny_model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(learning in name)
    model.train()
    use_packed_attention(model, "sdpa")
    model(**pack([make_sample(7, is_learnt=False)])).loss.backward()
    check_all_learn_nothing(model)


def test_ranks_of_ddp_take_packs_of_any_kind_one_after_the_other(tmp_path: Path) -> None:
    # DDP raises at the next forward if a parameter had no gradient in the last.
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        model = build_tiny_model().train()
        use_packed_attention(model, "sdpa")
        ranks = nn.parallel.DistributedDataParallel(model)
        for samples in (SAMPLES, [make_sample(5)], [make_sample(5, 1, is_learnt=False)], [], SAMPLES):
            ranks(**pack(samples), loss_normalizer=7.0).loss.backward()
    finally:
        dist.destroy_process_group()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_recomputed_activations_give_the_same_gradients() -> None:
    model = build_tiny_model().train()
    use_packed_attention(model, "sdpa")
    recomputing = copy.deepcopy(model)
    enable_checkpointing(recomputing)
    for each in (model, recomputing):
        each(**pack(SAMPLES)).loss.backward()
    for ours, theirs in zip(recomputing.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT 0.21
@pytest.mark.parametrize("is_recomputing", [False, True])
def test_packs_pass_through_adapters(is_recomputing: bool) -> None:
    model = build_tiny_model().eval()
    use_packed_attention(model, "sdpa")
    expected = model(**pack(SAMPLES)).loss
    if is_recomputing:
        enable_checkpointing(model)
    lora = ModelArguments(freeze_llm=True, freeze_backbone=True, freeze_mlp=True, use_llm_lora=4, use_backbone_lora=4)
    adapted = set_trainable(model, lora)
    use_packed_attention(adapted, "sdpa")
    # A fresh adapter adds nothing.
    torch.testing.assert_close(adapted.eval()(**pack(SAMPLES)).loss, expected)
    adapted.train()
    for samples in (SAMPLES, [make_sample(5)]):
        adapted.zero_grad()
        adapted(**pack(samples)).loss.backward()
        assert all(parameter.grad is not None for parameter in adapted.parameters() if parameter.requires_grad)


def test_padding_of_strict_mode_changes_neither_loss_nor_gradient() -> None:
    model = build_tiny_model().train()
    use_packed_attention(model, "sdpa")
    padded = copy.deepcopy(model)
    loss = model(**pack(SAMPLES)).loss
    loss.backward()
    batch = pack(SAMPLES, padded_to=PackLimits(max_tokens=100, max_tiles=9))
    assert batch["input_ids"].shape == (1, 100)
    assert len(batch["pixel_values"]) == 9
    padded_loss = padded(**batch).loss
    padded_loss.backward()
    torch.testing.assert_close(padded_loss, loss)
    for ours, theirs in zip(padded.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)


def test_every_tile_of_strict_mode_costs_the_tower_the_same() -> None:
    model, seen = build_tiny_model().train(), []
    model.model.vision_tower.register_forward_hook(lambda module, inputs, output: seen.append(output[0].shape[0]))
    use_packed_attention(model, "sdpa")
    for samples in (SAMPLES, [make_sample(5)]):
        model(**pack(samples, padded_to=PackLimits(max_tokens=100, max_tiles=9)))
    assert seen == [9, 9]


@pytest.mark.parametrize(
    ("num_tiles", "message"),
    [
        (1, "16 image tokens, but 1 tiles x 4 tokens = 4"),
        (None, "16 image tokens, but 3 tiles x 4 tokens = 12"),
        (0, "16 image tokens, but 0 tiles x 4 tokens = 0"),
    ],
)
def test_image_tokens_that_are_not_those_of_the_tiles_are_refused_with_both_numbers(
    num_tiles: int | None, message: str
) -> None:
    # F5: the original multiplies the loss by zero and goes on.
    model = build_tiny_model().train()
    use_packed_attention(model, "sdpa")
    batch = pack(SAMPLES)
    batch["pixel_values"] = batch["pixel_values"][:3]
    with pytest.raises(DataError, match=message):
        model(**{**batch, "num_tiles": num_tiles})


@pytest.mark.parametrize("is_training", [True, False])
def test_image_tokens_without_any_tile_are_refused(is_training: bool) -> None:
    model = build_tiny_model().train(is_training)
    use_packed_attention(model, "sdpa")
    batch = pack(SAMPLES)
    del batch["pixel_values"]
    with pytest.raises(DataError, match="16 image tokens, but 0 tiles"):
        model(**batch)


def test_rounded_weights_are_refused() -> None:
    # What DeepSpeed's integration does to every floating tensor that nobody keeps from it.
    batch = pad_batch(SAMPLES, "sample")
    with pytest.raises(ArgumentError, match="bfloat16, not float32"):
        build_tiny_model()(**{**batch, "loss_weights": batch["loss_weights"].bfloat16()})


def test_rotary_frequencies_stay_exact_when_the_model_is_cast() -> None:
    # DeepSpeed casts the whole module: at position 4,000 a frequency of 8 bits is radians off.
    model = build_tiny_model()
    exact = model.model.language_model.rotary_emb.inv_freq.clone()
    for cast in (model.bfloat16(), model.to(torch.bfloat16), model.half()):
        assert cast.lm_head.weight.dtype != torch.float32
        assert torch.equal(cast.model.language_model.rotary_emb.inv_freq, exact)
