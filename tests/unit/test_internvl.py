import copy

import pytest
import torch
from tiny_internvl import build_batch, build_tiles, build_tiny_model
from torch import Tensor
from transformers import InternVLForConditionalGeneration

from internvl_core.model.internvl import InternVLForTraining, add_drop_path


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
