import math
from typing import Any

import pytest
import torch
from torch import nn

from internvl_core.errors import NonFinite
from internvl_core.train.finite_weights import check_optimizer, check_tensors, check_weights


def build() -> tuple[nn.Module, Any]:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    optimizer = torch.optim.AdamW(model[1].parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return model, optimizer


def test_sound_weights_pass() -> None:
    model, optimizer = build()
    check_weights(model, is_whole=True, step=1)
    check_optimizer(model, optimizer, step=1)
    check_tensors([("ids", torch.tensor([1])), ("none", torch.empty(0)), ("most", torch.tensor([3e38, -3e38]))], step=1)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_first_tensor_that_is_not_finite_is_named(value: float, dtype: torch.dtype) -> None:
    tensors = {name: torch.ones(5, dtype=dtype) for name in "abcd"}
    tensors["b"][4] = tensors["d"][0] = value
    with pytest.raises(
        NonFinite, match=r"^step 7: b is not finite \(2 of 4 tensors of this rank are not\)\. "
    ) as caught:
        check_tensors(tensors.items(), step=7)
    assert caught.value.step == 7
    assert "\n" not in str(caught.value)


def test_what_is_frozen_is_looked_at_only_where_it_is_written() -> None:
    model, _ = build()
    model.get_parameter("0.weight").data[0, 0] = math.nan
    check_weights(model, is_whole=False, step=1)
    with pytest.raises(NonFinite, match=r"0\.weight is not finite"):
        check_weights(model, is_whole=True, step=1)


def test_under_zero3_the_part_of_the_rank_is_looked_at() -> None:
    model, _ = build()
    weight: Any = model.get_parameter("1.weight")
    weight.ds_tensor = torch.tensor([1.0, math.nan])
    with pytest.raises(NonFinite, match=r"1\.weight is not finite"):
        check_weights(model, is_whole=False, step=1)


def test_a_moment_that_is_not_finite_is_named() -> None:
    model, optimizer = build()
    optimizer.state[model.get_parameter("1.bias")]["exp_avg_sq"][1] = math.inf
    with pytest.raises(NonFinite, match=r"the optimizer's exp_avg_sq of 1\.bias is not finite"):
        check_optimizer(model, optimizer, step=1)


def test_a_master_of_deepspeed_that_is_not_finite_is_named() -> None:
    model, optimizer = build()
    optimizer.state[torch.tensor([math.nan])] = {"step": torch.tensor(1.0)}
    with pytest.raises(NonFinite, match=r"the optimizer's weights, part 2 of this rank's share is not finite"):
        check_optimizer(model, optimizer, step=1)
