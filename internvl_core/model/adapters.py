"""Checkpoints of adapters and of what learns in full beside them, and folding them into the base.

An adapter's folder has PEFT's files: plain PEFT puts it over the base, `adapter_weights` merges it. What
learns in full is stored in them as PEFT stores `modules_to_save`, although nothing is wrapped while it learns.
Where PEFT has no words for it (the adapted part itself learns, or single parameters do), it lies in `LEARNT_FILE`
beside them, which only this module reads: good to resume from, but the stage's result is then the whole model.

Three kinds of names: of the base (`model.multi_modal_projector.linear_1.weight`), in memory
(`base_model.model.` before them, `.base_layer` and `.lora_A.default` within) and in PEFT's files.
"""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from internvl_core.errors import CheckpointCorrupt
from internvl_core.model.adapter_weights import PREFIX, WEIGHTS_FILE, add_product

LEARNT_FILE = "learnt_parameters.safetensors"

_ADAPTER = "default"


def save_adapter(model: Any, folder: Path, state_dict: Mapping[str, Tensor] | None = None) -> None:
    """Save the adapters and all that learns in full beside them.

    Args:
        model: the PEFT model.
        folder: made if it is missing.
        state_dict: names in memory and whole tensors, as gathered from the ranks of ZeRO-3; it may leave out what
            is frozen. None for the model's own.
    """
    state = model.state_dict() if state_dict is None else state_dict
    modules = find_saved_modules(model)
    config = copy.copy(model.peft_config[_ADAPTER])
    config.modules_to_save = modules or None
    config.inference_mode = True
    tensors = {_drop_adapter(name): tensor for name, tensor in state.items() if _is_of_adapter(name)}
    learnt = {}
    if modules is None:
        learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        learnt = {get_base_name(name): state[name] for name in learning if not _is_of_adapter(name)}
    else:
        inside = tuple(f"{PREFIX}{module}." for module in modules)
        tensors |= {name: tensor for name, tensor in state.items() if name.startswith(inside)}
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(folder))
    _write(tensors, folder / WEIGHTS_FILE)
    if learnt:
        _write(learnt, folder / LEARNT_FILE)


def load_adapter_into(model: Any, folder: Path) -> None:
    """Set adapters and what learns in full to what `save_adapter` saved of the same arguments.

    Raises:
        CheckpointCorrupt: a learning parameter is missing in the folder, or the model has none of a saved name.
    """
    saved = {_insert_adapter(name): tensor for name, tensor in load_file(folder / WEIGHTS_FILE).items()}
    parameters = dict(model.named_parameters())
    if (folder / LEARNT_FILE).is_file():
        in_memory = {get_base_name(name): name for name in parameters if not _is_of_adapter(name)}
        saved |= {in_memory.get(name, name): tensor for name, tensor in load_file(folder / LEARNT_FILE).items()}
    learning = {name for name, parameter in parameters.items() if parameter.requires_grad}
    state = model.state_dict()
    for names, problem in ((learning - saved.keys(), "has no"), (saved.keys() - state.keys(), "has an unknown")):
        if names:
            raise CheckpointCorrupt(
                f"{folder}: {problem} {', '.join(sorted(names)[:3])} ({len(names)} in all). It was saved of a model "
                "with other learning parts. Resume with the arguments it was trained with."
            )
    with torch.no_grad():
        for name, tensor in saved.items():
            state[name].copy_(tensor)


def fold_adapters(model: Any, state_dict: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Compute the weights of the base with its adapters folded in, on the CPU: W + scaling x B A, in float32.

    The model itself stays as it is.

    Args:
        model: the PEFT model; under ZeRO-3 its own tensors are not looked at.
        state_dict: as in `save_adapter`, but with everything frozen too.

    Returns:
        Tensors by the names of the base.
    """
    state = model.state_dict() if state_dict is None else state_dict
    folded = {get_base_name(name): tensor for name, tensor in state.items() if not _is_of_adapter(name)}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and _ADAPTER in module.lora_A:
            down, up = (state[f"{name}.{side}.{_ADAPTER}.weight"] for side in ("lora_A", "lora_B"))
            weight = folded[get_base_name(f"{name}.weight")]
            folded[get_base_name(f"{name}.weight")] = add_product(weight, down, up, module.scaling[_ADAPTER]).cpu()
    return {name: tensor.cpu() for name, tensor in folded.items()}


def find_saved_modules(model: Any) -> list[str] | None:
    """Name the modules of the base that learn as a whole, the largest ones; None if PEFT cannot save what learns so."""
    modules: list[str] = []
    return modules if _collect(model.get_base_model(), "", modules) else None


def get_base_name(name: str) -> str:
    """Turn a parameter's name in memory into its name in the base."""
    return name.removeprefix(PREFIX).replace(".base_layer.", ".")


def _collect(module: nn.Module, name: str, modules: list[str]) -> bool:
    """Append the largest wholly learning modules below this one; tell if there is nothing else that learns."""
    parameters = dict(module.named_parameters())
    learning = {key for key, parameter in parameters.items() if parameter.requires_grad}
    if not any(not _is_of_adapter(key) for key in learning):
        return True
    # PEFT wraps no lists: they are not called.
    if name and len(learning) == len(parameters) and not any(map(_is_of_adapter, learning)):
        if not isinstance(module, nn.ModuleList):
            modules.append(name)
            return True
    elif any(key in learning for key, _ in module.named_parameters(recurse=False)) or hasattr(module, "lora_A"):
        return False
    return all(_collect(child, f"{name}.{key}".lstrip("."), modules) for key, child in module.named_children())


def _is_of_adapter(name: str) -> bool:
    return ".lora_A." in f".{name}" or ".lora_B." in f".{name}"


def _drop_adapter(name: str) -> str:
    return name.replace(f".{_ADAPTER}.", ".")


def _insert_adapter(name: str) -> str:
    for side in (".lora_A.", ".lora_B."):
        name = name.replace(side, f"{side}{_ADAPTER}.")
    return name


def _write(tensors: Mapping[str, Tensor], path: Path) -> None:
    save_file(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"}
    )
