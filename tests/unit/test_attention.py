import copy
import json
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from packs import TEXT_CONFIGS, build_model, make_sample, make_samples, pack, prepare_alone, run_alone, run_packed
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from internvl_core.errors import ArgumentError
from internvl_core.model import attention
from internvl_core.model.attention import (
    attend_by_segment,
    choose_packed_attention,
    use_packed_attention,
    use_padded_attention,
)

CPU = torch.device("cpu")


def assert_like_alone(text: str, name: str) -> None:
    model, samples = build_model(text).eval(), make_samples()
    expected = run_alone(model, samples)
    use_packed_attention(model, name)
    for packed, alone in zip(run_packed(model, samples), expected, strict=True):
        torch.testing.assert_close(packed, alone, rtol=0, atol=1e-5)


def attend_naively(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> Tensor:
    """What torch documents of varlen_attn, written out: [T, H, D]; the kernel itself needs a GPU."""
    assert cu_seq_q.dtype == torch.int32
    assert max_q == max_k == cu_seq_q.diff().max()
    assert enable_gqa == (query.shape[1] != key.shape[1])
    group = query.shape[1] // key.shape[1]
    starts, ends = cu_seq_q.tolist()[:-1], cu_seq_q.tolist()[1:]
    output = torch.empty_like(query)
    for start, end in zip(starts, ends, strict=True):
        for row in range(start, end):
            left = start if window_size[0] < 0 else max(start, row - window_size[0])
            seen = slice(left, row + window_size[1] + 1)
            for head in range(query.shape[1]):
                scores = key[seen, head // group] @ query[row, head] * scale
                output[row, head] = scores.softmax(0) @ value[seen, head // group]
    return output


@pytest.mark.parametrize("text", TEXT_CONFIGS)
def test_samples_of_a_pack_have_the_logits_that_they_have_alone(text: str) -> None:
    assert_like_alone(text, "sdpa")


@pytest.mark.parametrize("text", TEXT_CONFIGS)
def test_what_is_asked_of_varlen_is_what_samples_do_alone(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "varlen_attn", attend_naively)
    with torch.no_grad():
        assert_like_alone(text, "varlen")


def test_without_segments_the_logits_would_be_others() -> None:
    # That the two tests above can fail.
    model, samples = build_model("qwen2").eval(), make_samples()
    joined = pack(samples)
    logits = model(input_ids=joined["input_ids"], pixel_values=joined["pixel_values"]).logits[0]
    assert (logits[-2:] - run_alone(model, samples)[-1]).abs().max() > 0.1


def test_no_sample_of_a_pack_can_tell_what_the_others_are() -> None:
    model, samples = build_model("qwen2").eval(), make_samples()
    use_packed_attention(model, "sdpa")
    before = run_packed(model, samples)
    samples[1] = make_sample(6, 2, seed=99)
    after = run_packed(model, samples)
    assert not torch.equal(before[1], after[1])
    for place in (0, 2, 3, 4):
        torch.testing.assert_close(after[place], before[place], rtol=0, atol=0)


@pytest.mark.parametrize("text", ["qwen2", "qwen2 with a window"])
def test_gradients_are_those_of_the_samples_alone(text: str) -> None:
    model, samples = build_model(text).train(), make_samples()
    alone = copy.deepcopy(model)
    for sample in samples:
        # The image's sample reaches the tower; the others have no dummy tile here, as they have no loss.
        alone(**{**prepare_alone(sample), "labels": None}).logits.square().sum().backward()
    use_packed_attention(model, "sdpa")
    torch.cat(run_packed(model, samples)).square().sum().backward()
    for (name, packed), (_, apart) in zip(model.named_parameters(), alone.named_parameters(), strict=True):
        torch.testing.assert_close(
            packed.grad, apart.grad, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: name + text
        )


def count_flops(lengths: list[int]) -> int:
    """FLOPs of attention over a pack, forward and backward."""
    module = build_model("qwen2").model.language_model.layers[0].self_attn
    states = [torch.randn(1, heads, sum(lengths), 8, requires_grad=True) for heads in (4, 2, 2)]
    # Only the plain implementation consists of products that the counter knows on a CPU.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        attend_by_segment(module, *states, None, segment_lengths=lengths)[0].sum().backward()
    return counter.get_total_flops()


def test_cost_grows_with_the_squares_of_the_segments() -> None:
    whole = count_flops([256])
    assert whole > 0
    assert count_flops([64] * 4) == whole / 4
    assert count_flops([128, 64, 32, 32]) == whole * (128**2 + 64**2 + 2 * 32**2) / 256**2


class CountQuestions(TorchDispatchMode):
    """Counts how often the host asks the device for a number."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


def test_layers_never_ask_the_device_for_a_number() -> None:
    # F19: the original asks for the longest segment in every layer. Tensors without data cannot answer.
    with FakeTensorMode():
        model = build_model("qwen2").model.language_model
        model.set_attn_implementation("packed_varlen")
        bounds = torch.empty(3, dtype=torch.int32)
        with pytest.raises(DataDependentOutputException):
            bounds.max().item()
        output = model(
            inputs_embeds=torch.empty(1, 14, 32),
            position_ids=torch.empty(1, 14, dtype=torch.int64),
            use_cache=False,
            cu_seq_lens_q=bounds,
            cu_seq_lens_k=bounds,
            max_length_q=9,
            max_length_k=9,
        ).last_hidden_state
        output.sum().backward()
    assert output.shape == (1, 14, 32)
    assert all(layer.self_attn.k_proj.weight.grad is not None for layer in model.layers)


def test_questions_to_the_device_do_not_grow_with_the_layers() -> None:
    counts = []
    for num_layers in (1, 2):
        model = build_model("qwen2").train()
        del model.model.language_model.layers[num_layers:]
        model.model.language_model.config.num_hidden_layers = num_layers
        use_packed_attention(model, "sdpa")
        with CountQuestions() as questions:
            model(**pack(make_samples())).loss.backward()
        counts.append(questions.count)
    assert counts[0] == counts[1] < 10


def test_dropout_is_that_of_the_samples_alone_and_off_in_evaluation() -> None:
    model, sample = build_model("qwen2"), make_sample(20)
    for layer in model.model.language_model.layers:
        layer.self_attn.attention_dropout = 0.5
    runs: list[Callable[[], Tensor]] = [partial(run_alone, model, [sample]), partial(run_packed, model, [sample])]
    for is_training in (True, False):
        model.train(is_training)
        model.model.language_model.set_attn_implementation("sdpa")
        torch.manual_seed(0)
        alone = runs[0]()[0]
        use_packed_attention(model, "sdpa")
        torch.manual_seed(0)
        torch.testing.assert_close(runs[1]()[0], alone)
        # Other random numbers, so another result exactly if there is dropout.
        assert torch.allclose(runs[1]()[0], alone) is not is_training


def test_only_the_language_model_is_switched_and_back(caplog: pytest.LogCaptureFixture) -> None:
    model = build_model("qwen2").eval()
    before = run_alone(model, [make_sample(9, 1)])[0]
    vision = model.model.vision_tower.config._attn_implementation
    with caplog.at_level(logging.INFO):
        use_packed_attention(model, "sdpa")
    assert "sdpa" in caplog.text
    assert model.model.vision_tower.config._attn_implementation == vision
    use_padded_attention(model)
    after = model(**prepare_alone(make_sample(9, 1))).logits[0]
    torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_a_saved_model_does_not_know_how_it_attended(tmp_path: Path) -> None:
    model = build_model("qwen2")
    use_packed_attention(model, "sdpa")
    model.save_pretrained(tmp_path)
    assert "packed" not in json.dumps(json.loads((tmp_path / "config.json").read_text()))


def test_a_padded_batch_is_refused_where_packs_are_expected() -> None:
    model = build_model("qwen2")
    use_packed_attention(model, "sdpa")
    with pytest.raises(ArgumentError, match="use_padded_attention"):
        model(input_ids=torch.ones(2, 5, dtype=torch.int64))


def test_a_pack_is_refused_where_attention_would_cross_samples() -> None:
    with pytest.raises(ArgumentError, match=r"attention is sdpa\. Call use_packed_attention"):
        run_packed(build_model("qwen2"), make_samples())


@pytest.mark.parametrize(
    ("text", "name", "change", "message"),
    [
        ("qwen2", "varlen", {"attention_dropout": 0.1}, "dropout of 0.1, which varlen lacks"),
        ("qwen3 with wide heads", "varlen", {"head_dim": 20}, "heads 20 wide, and varlen takes multiples of 8"),
        ("qwen3 with wide heads", "varlen", {"head_dim": 512}, "heads 512 wide, and varlen takes at most 256"),
    ],
)
def test_an_attention_that_cannot_do_what_the_model_asks_is_refused(
    text: str, name: str, change: dict[str, float], message: str
) -> None:
    model = build_model(text)
    for key, value in change.items():
        setattr(model.model.language_model.config, key, value)
    with pytest.raises(ArgumentError, match=message):
        use_packed_attention(model, name)


def test_a_softcap_is_refused_rather_than_left_out() -> None:
    states = [torch.randn(1, 2, 4, 8)] * 3
    with pytest.raises(ArgumentError, match="softcap"):
        attend_by_segment(nn.Module(), *states, None, segment_lengths=[4], softcap=30.0)


def test_auto_is_sdpa_where_there_is_no_gpu() -> None:
    assert choose_packed_attention("auto", CPU, torch.bfloat16) == "sdpa"
    assert choose_packed_attention("sdpa", CPU, torch.float32) == "sdpa"


@pytest.mark.parametrize(
    ("wanted", "device", "dtype", "message"),
    [
        ("flash_attention_2", "cpu", torch.bfloat16, "it needs a CUDA device, and this is cpu"),
        ("varlen", "cpu", torch.bfloat16, "it needs a CUDA device, and this is cpu"),
        ("varlen", "cuda", torch.float32, "it computes in bfloat16 or float16, and this is float32"),
        ("flex", "cpu", torch.float32, "flex is none of auto, flash_attention_2, varlen, sdpa"),
    ],
)
def test_what_cannot_run_here_is_refused_with_the_reason(
    wanted: str, device: str, dtype: torch.dtype, message: str
) -> None:
    with pytest.raises(ArgumentError, match=message):
        choose_packed_attention(wanted, torch.device(device), dtype)


def test_under_autocast_all_three_states_have_its_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    # Rotary embeddings turn query and key back to fp32, which no flash kernel takes.
    dtypes = []

    def attend(*states: Tensor | int, **kwargs: object) -> Tensor:
        dtypes.extend(state.dtype for state in states[:3])
        return attend_naively(*states, **kwargs)

    monkeypatch.setattr(attention, "varlen_attn", attend)
    model = build_model("qwen2").eval()
    use_packed_attention(model, "varlen")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        run_packed(model, make_samples())
    assert dtypes == [torch.bfloat16] * 6
