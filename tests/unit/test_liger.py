import copy
import importlib.util

import pytest
import torch
from tiny_internvl import build_batch, build_tiny_model

from internvl_core.errors import ArgumentError
from internvl_core.model.liger import apply_liger

HAS_LIGER = importlib.util.find_spec("liger_kernel") is not None


def test_an_activation_without_a_kernel_is_refused() -> None:
    language_model = build_tiny_model().model.language_model
    language_model.config.hidden_act = "gelu"
    with pytest.raises(ArgumentError, match=r"use_liger: there are no kernels for .* type qwen2 with activation gelu"):
        apply_liger(language_model)


@pytest.mark.skipif(HAS_LIGER, reason="asks what happens where liger-kernel is not installed")
def test_a_missing_package_is_named() -> None:
    with pytest.raises(ArgumentError, match="use_liger: liger-kernel cannot be imported"):
        apply_liger(build_tiny_model().model.language_model)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or not HAS_LIGER, reason="needs a CUDA device and liger-kernel")
def test_the_kernels_compute_the_same_in_this_model_and_in_no_other() -> None:
    plain = build_tiny_model().cuda()
    fused, other = copy.deepcopy(plain), copy.deepcopy(plain)
    apply_liger(fused.model.language_model)
    batch = {name: tensor.cuda() for name, tensor in build_batch().items()}
    outputs = {}
    for name, model in (("plain", plain), ("fused", fused)):
        outputs[name] = model.train()(**batch)
        outputs[name].loss.backward()
    torch.testing.assert_close(outputs["fused"].logits, outputs["plain"].logits, rtol=1e-4, atol=1e-4)
    for (name, expected), found in zip(plain.named_parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-3, atol=1e-4, msg=name)
    assert all("forward" not in module.__dict__ for module in other.modules())
    assert sum("forward" in module.__dict__ for module in fused.modules()) == 2 * 3 + 1
