"""Liger's fused kernels in the language model.

Only this model's own modules change: none of transformers' classes do, so that a second model in
the process stays as it was. Not replaced: the rotary embedding, a function of transformers' modules that
could only be replaced for the whole process; and the loss, which is weighted and sees supervised
positions only.
"""

import logging

from transformers import PreTrainedModel

from internvl_core.errors import ArgumentError

logger = logging.getLogger(__name__)

_GATED = {
    **dict.fromkeys(("LlamaMLP", "Qwen2MLP", "Qwen3MLP"), "LigerSwiGLUMLP"),
    "Phi3MLP": "LigerPhi3SwiGLUMLP",
}
"""Gated layers by the name of their class, and Liger's class that computes the same over the same weights."""


def apply_liger(language_model: PreTrainedModel) -> None:
    """Let the norms and gated layers of a language model compute with Liger's kernels (liger-kernel 0.8).

    Call it before adapters are put into the model. Results differ by rounding only.

    Raises:
        ArgumentError: liger-kernel is not installed, or has no kernels for a model of this kind.
    """
    activation = language_model.config.hidden_act
    gated = [module for module in language_model.modules() if type(module).__name__ in _GATED]
    if not gated or activation not in ("silu", "swish"):
        raise ArgumentError(
            f"use_liger: there are no kernels for a language model of type {language_model.config.model_type} with "
            f"activation {activation}. Leave it out."
        )
    try:
        import liger_kernel.transformers as liger
        from liger_kernel.transformers import monkey_patch
    except ImportError as error:
        raise ArgumentError(
            f"use_liger: liger-kernel cannot be imported ({error}). Install it or leave use_liger out."
        ) from error
    norms = [module for module in language_model.modules() if type(module).__name__.endswith("RMSNorm")]
    # Two of its functions work on one module; the rest of that file replaces classes.
    for norm in norms:
        monkey_patch._patch_rms_norm_module(norm)
    for layer in gated:
        monkey_patch._patch_swiglu_module(layer, getattr(liger, _GATED[type(layer).__name__]))
    logger.info("Liger's kernels compute %d norms and %d gated layers", len(norms), len(gated))
