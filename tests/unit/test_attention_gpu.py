"""The attention kernels that need a GPU, against samples that run alone by transformers' own attention."""

import copy
from collections.abc import Callable

import pytest
import torch
from packs import TEXT_CONFIGS, build_model, make_samples, run_alone, run_packed
from torch import Tensor
from transformers.utils import is_flash_attn_2_available

from internvl_core.model.attention import choose_packed_attention, use_packed_attention
from internvl_core.model.internvl import InternVLForTraining

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the attention kernels stay untested"),
]
needs_flash_attention = pytest.mark.skipif(
    not is_flash_attn_2_available(), reason="flash-attn is not installed: its attention stays untested"
)
KERNELS = ["varlen", "sdpa", pytest.param("flash_attention_2", marks=needs_flash_attention)]
GPU = torch.device("cuda")


def run_backward(model: InternVLForTraining, run: Callable[..., list[Tensor]]) -> tuple[Tensor, Tensor]:
    """Logits of all samples, and the gradient of their squares' sum by every parameter of the language model."""
    logits = torch.cat(run(model, make_samples()))
    parameters = list(model.model.language_model.layers.parameters())
    gradients = torch.autograd.grad(logits.float().square().sum(), parameters)
    return logits.float(), torch.cat([gradient.flatten().float() for gradient in gradients])


@pytest.mark.parametrize("text", TEXT_CONFIGS)
def test_in_fp32_samples_of_a_pack_have_the_logits_that_they_have_alone(text: str) -> None:
    model = build_model(text).eval().to(GPU)
    expected = run_alone(model, make_samples())
    use_packed_attention(model, "sdpa")
    torch.testing.assert_close(run_packed(model, make_samples()), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("text", TEXT_CONFIGS)
@pytest.mark.parametrize("name", KERNELS)
def test_in_bf16_a_pack_is_no_further_from_fp32_than_the_samples_alone(name: str, text: str) -> None:
    exact = build_model(text).eval().to(GPU)
    model = copy.deepcopy(exact).to(torch.bfloat16)
    expected = run_backward(exact, run_alone)
    alone = run_backward(model, run_alone)
    use_packed_attention(model, name)
    packed = run_backward(model, run_packed)
    for of_pack, of_alone, truth in zip(packed, alone, expected, strict=True):
        assert (of_pack - truth).norm() < 1.5 * (of_alone - truth).norm()


@pytest.mark.parametrize("name", KERNELS)
def test_under_autocast_a_pack_of_fp32_weights_trains(name: str) -> None:
    model = build_model("qwen2").train().to(GPU)
    use_packed_attention(model, name)
    with torch.autocast("cuda", torch.bfloat16):
        logits, gradients = run_backward(model, run_packed)
    assert logits.isfinite().all()
    assert gradients.isfinite().all()
    assert gradients.any()


def test_auto_is_a_flash_kernel_where_it_can_run() -> None:
    expected = "flash_attention_2" if is_flash_attn_2_available() else "varlen"
    assert choose_packed_attention("auto", GPU, torch.bfloat16) == expected
    assert choose_packed_attention("auto", GPU, torch.float32) == "sdpa"
