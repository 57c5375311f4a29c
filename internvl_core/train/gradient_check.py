"""What learns is what was declared to learn: checked once, on the gradients of the first step (F9-F11)."""

from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from internvl_core.errors import InternVLError
from internvl_core.model.trainable import list_trainable


class GradientCheck(TrainerCallback):
    """Stop training before its first update if other parameters have a gradient than were to learn.

    It watches gradients as they are accumulated: under DeepSpeed nothing is left of them behind
    the backward pass, and under ZeRO-3 no rank ever has them whole.
    """

    def __init__(self, model: nn.Module) -> None:
        """Note what is to learn.

        Args:
            model: as `set_trainable` returned it.
        """
        self._declared = set(list_trainable(model))
        self._reached: set[str] = set()
        self._handles: list[RemovableHandle] = []

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        assert model is not None
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                handle = parameter.register_post_accumulate_grad_hook(self._watch(name))  # type: ignore[no-untyped-call]
                self._handles.append(handle)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not self._handles:
            return
        num_watched = len(self._handles)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        missing, surplus = self._declared - self._reached, self._reached - self._declared
        if missing or surplus or num_watched != len(self._declared):
            raise InternVLError(
                "Internal error: the gradients of the first step are not those of the parameters that are to learn. "
                f"Without a gradient: {_list_some(missing)}. With one, but to stay frozen: {_list_some(surplus)}. "
                f"Watched: {num_watched} of {len(self._declared)}. Nothing was updated. Please report it with the "
                "arguments of the stage."
            )

    def _watch(self, name: str) -> Any:
        def enter(parameter: Tensor) -> None:
            self._reached.add(name)

        return enter


def _list_some(names: set[str]) -> str:
    shown = ", ".join(sorted(names)[:3])
    return f"{shown} ({len(names)} in all)" if names else "none"
