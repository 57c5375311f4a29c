"""A model without weights, and weights put into it one at a time.

One way for every source: a folder of either format, components, resized or merged tensors. Under
ZeRO-3 each rank holds its share from the first parameter on, and a whole tensor at a time (F38).
Elsewhere the skeleton is memory that is reserved but not yet touched, so nothing is held twice.

Invariant: `fill` leaves no parameter as it found it.
"""

from collections.abc import Iterator, Mapping, Set
from contextlib import ExitStack, contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import InternVLConfig
from transformers.initialization import no_init_weights
from transformers.integrations import is_deepspeed_zero3_enabled

from internvl_core.errors import ArgumentError
from internvl_core.model.internvl import InternVLForTraining
from internvl_core.model.weights import LazyTensor

_SHOWN_NAMES = 3


def build_skeleton(config: InternVLConfig, *, dtype: torch.dtype) -> InternVLForTraining:
    """Build a model whose parameters hold nothing yet, in evaluation mode, its embeddings not tied.

    Under ZeRO-3 every parameter is partitioned over the ranks as soon as it is made.
    """
    # transformers 5.23 ties lm_head by the outer flag even when the inner one says no (reference 10.4.1).
    config.tie_word_embeddings = False
    config.text_config.tie_word_embeddings = False
    with ExitStack() as contexts:
        contexts.enter_context(no_init_weights())
        if is_deepspeed_zero3_enabled():
            contexts.enter_context(_partitioned())
        model: InternVLForTraining = InternVLForTraining._from_config(config, dtype=dtype)
    if model.lm_head.weight is model.get_input_embeddings().weight:
        raise ArgumentError("lm_head is tied to the input embeddings, which no InternVL checkpoint is.")
    model.eval()
    return model


def fill(model: nn.Module, weights: Mapping[str, LazyTensor], *, source: str) -> None:
    """Put a tensor into every parameter, cast to the parameter's type; one tensor is read at a time.

    Args:
        model: the whole model, on any device; under ZeRO-3 partitioned.
        weights: by the names that the parameters have in the model.
        source: where they come from, for the message.

    Raises:
        ArgumentError: a tensor is missing, left over or of another shape.
    """
    parameters = dict(model.named_parameters())
    _check_names(parameters.keys(), weights.keys(), source)
    for name, parameter in parameters.items():
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        if shape != tuple(weights[name].shape):
            raise ArgumentError(
                f"{source}: {name} is {list(weights[name].shape)}, but the configuration makes it {list(shape)}. "
                "The configuration and the weights do not belong together."
            )
    for name, parameter in parameters.items():
        with opened(parameter) as is_writer, torch.no_grad():
            if is_writer:
                parameter.copy_(weights[name].read())


@contextmanager
def opened(parameter: Tensor) -> Iterator[bool]:
    """Open a parameter for writing; yields whether this rank is the one to write.

    Under ZeRO-3 it is gathered, and what rank 0 wrote is spread again at the end.
    """
    if not hasattr(parameter, "ds_id"):
        yield True
        return
    import deepspeed  # seconds of imports that only ZeRO-3 needs

    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        yield deepspeed.comm.get_rank() == 0


@contextmanager
def _partitioned() -> Iterator[None]:
    import deepspeed
    from transformers.integrations.deepspeed import deepspeed_config, prevent_arange_dtype_change
    from transformers.modeling_utils import set_zero3_state

    # Otherwise DeepSpeed takes itself to be alone: the process group is there, but nobody has told it yet.
    deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False)
    # The last one keeps transformers from partitioning the parts by itself, a second time.
    with (
        prevent_arange_dtype_change(),
        deepspeed.zero.Init(config_dict_or_path=deepspeed_config()),
        set_zero3_state(),
    ):
        yield


def _check_names(expected: Set[str], found: Set[str], source: str) -> None:
    for names, what in ((expected - found, "missing"), (found - expected, "no part of the model")):
        if names:
            first = sorted(names)[:_SHOWN_NAMES]
            more = f" and {len(names) - len(first)} more" if len(names) > len(first) else ""
            raise ArgumentError(
                f"{source}: {', '.join(first)}{more}: {what}. The configuration and the weights do not belong together."
            )
