"""A projector by itself, to be put between a vision tower and a language model (`mlp_path`).

Invariant: it is whole. Half of one would leave the other half random, or another model's.
"""

import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from internvl_core.checkpoint.folder import fetch_folder, is_weights_file
from internvl_core.checkpoint.store import is_checkpoint_uri
from internvl_core.errors import ArgumentError
from internvl_core.model.sources import find_folder, open_whole, take
from internvl_core.model.weights import Weights, from_state_dict

PROJECTOR = "model.multi_modal_projector."

# What the original's tool writes: the entries of its nn.Sequential (reference 2.4, 10.1).
_PROJECTOR_PARTS = {"0": "layer_norm", "1": "linear_1", "3": "linear_2"}


def find_projector(path: str, cache_dir: Path) -> Path:
    """Find the local folder or file of a projector; of a remote file its folder is fetched."""
    if Path(path).is_file():
        return Path(path)
    if is_checkpoint_uri(path) and is_weights_file(path):
        folder, _, name = path.rpartition("/")
        return fetch_folder(folder, cache_dir) / name
    return find_folder(path, cache_dir, argument="mlp_path")


def open_projector(path: str, cache_dir: Path) -> Weights:
    """Open a projector alone: a whole model, a .safetensors file, or the .pth file of the original's tool.

    Raises:
        ArgumentError: no such file, or no projector in it.
    """
    file = find_projector(path, cache_dir)
    if file.is_dir():
        whole = open_whole(file, cache_dir, argument="mlp_path")
        return take(whole.weights, PROJECTOR)
    try:
        # weights_only: a pickle from elsewhere must not run code.
        tensors = _read_safetensors(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)
        weights = from_state_dict({_name_projector_tensor(name): tensor for name, tensor in tensors.items()})
    except (OSError, ValueError, RuntimeError, AttributeError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ArgumentError(
            f"mlp_path: {path} cannot be read as the weights of a projector: {reason} Give a whole model, a "
            ".safetensors file, or what extract_mlp wrote."
        ) from error
    expected = {f"{PROJECTOR}{part}.{kind}" for part in _PROJECTOR_PARTS.values() for kind in ("weight", "bias")}
    if weights.keys() != expected:
        odd = sorted(weights.keys() ^ expected)
        raise ArgumentError(
            f"mlp_path: {path} is no whole projector: {odd[0].removeprefix(PROJECTOR)} is "
            f"{'missing' if odd[0] in expected else 'no part of one'} ({len(odd)} such tensors)."
        )
    return weights


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(str(error)) from error


def _name_projector_tensor(name: str) -> str:
    for prefix in ("mlp1.", "model.", "multi_modal_projector."):
        name = name.removeprefix(prefix)
    part, _, kind = name.partition(".")
    return f"{PROJECTOR}{_PROJECTOR_PARTS.get(part, part)}.{kind}"
