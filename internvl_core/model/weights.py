"""Tensors of a model by name, read from their files only when somebody asks for one.

Conversions between formats are functions from such a mapping to another: they rename, cut and
join, and nothing is read until the result is written or copied into a model. So a model of any
size passes through with one tensor in memory.

Three kinds of names occur. Module names are those of our model in memory
(`model.vision_tower...`, `lm_head.weight`); published names those of a native file
(`vision_tower...`, `language_model.lm_head.weight`); chat names those of OpenGVLab's own format.
"""

import errno
import json
import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from internvl_core.errors import ArgumentError, DiskFull

INDEX_SUFFIX = ".index.json"
SAFETENSORS = "model.safetensors"
PICKLE = "pytorch_model.bin"

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}

_PUBLISHED_PREFIXES = {
    "language_model.lm_head.": "lm_head.",
    "language_model.model.": "model.language_model.",
    "vision_tower.": "model.vision_tower.",
    "multi_modal_projector.": "model.multi_modal_projector.",
}


@dataclass(frozen=True)
class LazyTensor:
    """What is known of a tensor without reading it, and how to read it. Each read may give a new tensor or a view."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


Weights = Mapping[str, LazyTensor]


def from_state_dict(state: Mapping[str, Tensor]) -> dict[str, LazyTensor]:
    """Wrap tensors that are in memory already."""
    return {
        name: LazyTensor(tuple(tensor.shape), tensor.dtype, lambda tensor=tensor: tensor)  # type: ignore[misc]
        for name, tensor in state.items()
    }


def open_weights(folder: Path) -> dict[str, LazyTensor]:
    """Open the weights of a model's folder, of one file or of several with an index.

    Only headers are read. safetensors files go before pickled ones, of which plain tensors alone are accepted.

    Args:
        folder: local.

    Returns:
        Tensors in the order of their names.

    Raises:
        ArgumentError: there are no weights, a file is missing, cut off or no such file, or the index
            names tensors that its file has not.
    """
    for file_name in (SAFETENSORS, PICKLE):
        index = folder / (file_name + INDEX_SUFFIX)
        if (folder / file_name).is_file():
            weights = _open_file(folder / file_name)
        elif index.is_file():
            weights = _open_shards(index)
        else:
            continue
        return {name: weights[name] for name in sorted(weights)}
    raise ArgumentError(
        f"{folder} holds no weights: neither {SAFETENSORS} nor {PICKLE}, nor an index of either. "
        "Give a folder in Hugging Face's format."
    )


def to_module_names(weights: Weights) -> dict[str, LazyTensor]:
    """Rename from a native file, whose names may have the module's prefix already."""
    return {swap_prefix(name, _PUBLISHED_PREFIXES): tensor for name, tensor in weights.items()}


def to_published_names(weights: Weights) -> dict[str, LazyTensor]:
    """Rename for a native file; the inverse of `to_module_names`."""
    inverse = {module: published for published, module in _PUBLISHED_PREFIXES.items()}
    return {swap_prefix(name, inverse): tensor for name, tensor in weights.items()}


def write_weights(
    weights: Weights,
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 4 << 30,
    on_file: Callable[[Path], None] | None = None,
) -> list[str]:
    """Write safetensors files under the names Hugging Face gives them, one tensor in memory at a time.

    Args:
        weights: what to write.
        folder: made if missing.
        dtype: of the floating point tensors in the files; None keeps each one's own.
        max_shard_bytes: a file is not longer than this, unless a single tensor is.
        on_file: called with each finished file, which it may remove.

    Returns:
        The names of the files in the order written; the index, if there are several, is the last.

    Raises:
        DiskFull: there is no room.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shards = _plan_shards({name: cast_tensor(tensor, dtype) for name, tensor in weights.items()}, max_shard_bytes)
    names = [
        SAFETENSORS if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        for number in range(1, len(shards) + 1)
    ]
    for file_name, shard in zip(names, shards, strict=True):
        _write_file(folder / file_name, shard)
        if on_file is not None:
            on_file(folder / file_name)
    if len(shards) > 1:
        total = sum(tensor.num_bytes for shard in shards for tensor in shard.values())
        places = {name: file_name for file_name, shard in zip(names, shards, strict=True) for name in shard}
        index = folder / (SAFETENSORS + INDEX_SUFFIX)
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": places}, indent=2, sort_keys=True)
        with _room_needed(index):
            index.write_text(text + "\n")
        names.append(index.name)
        if on_file is not None:
            on_file(index)
    return names


def _open_shards(index: Path) -> dict[str, LazyTensor]:
    try:
        places = {name: str(file_name) for name, file_name in json.loads(index.read_text())["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArgumentError(f"{index} is no index of weights: {_tell(error)}. Fetch it again.") from error
    weights: dict[str, LazyTensor] = {}
    for file_name in sorted(set(places.values())):
        if Path(file_name).name != file_name:
            raise ArgumentError(f"{index} leads out of its folder: {file_name!r}. Fetch it again.")
        path = index.parent / file_name
        if not path.is_file():
            raise ArgumentError(f"{path} is missing, but {index.name} names it. Fetch it again.")
        shard = _open_file(path)
        missing = [name for name, place in places.items() if place == file_name and name not in shard]
        if missing:
            raise ArgumentError(
                f"{path} has no tensor {missing[0]} ({len(missing)} missing), but {index.name} says so. "
                "Fetch both again."
            )
        weights |= {name: shard[name] for name, place in places.items() if place == file_name}
    return weights


def _open_file(path: Path) -> dict[str, LazyTensor]:
    try:
        if path.suffix == ".safetensors":
            return _open_safetensors(path)
        # mmap: the pickle holds only where each tensor lies.
        return from_state_dict(torch.load(path, map_location="cpu", weights_only=True, mmap=True))
    except (SafetensorError, RuntimeError, ValueError, EOFError, AttributeError, pickle.UnpicklingError) as error:
        raise ArgumentError(f"{path} is no file of weights, or cut off: {_tell(error)}. Fetch it again.") from error


def _open_safetensors(path: Path) -> dict[str, LazyTensor]:
    # The library checks the header; its own tensors are a mapping of the file, whose pages would stay in memory.
    with safe_open(path, framework="pt"):
        pass
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(length))
    weights = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in _DTYPES:
            raise ArgumentError(
                f"{path}: tensor {name} is of type {entry['dtype']}, which is not read. Convert it first."
            )
        dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
        start, end = entry["data_offsets"]
        read: Callable[[], Tensor] = partial(_read_part, path, 8 + length + start, end - start, dtype, shape)
        weights[name] = LazyTensor(shape, dtype, read)
    return weights


def _read_part(path: Path, start: int, num_bytes: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    if not num_bytes:
        return torch.empty(shape, dtype=dtype)
    content = bytearray(num_bytes)
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        view = memoryview(content)
        # One call reads 2 GiB at most.
        while view:
            count = file.readinto(view)
            if not count:
                raise ArgumentError(f"{path} was cut off while it was read. Fetch it again.")
            view = view[count:]
    return torch.frombuffer(content, dtype=dtype).reshape(shape)


def swap_prefix(name: str, prefixes: Mapping[str, str]) -> str:
    """Exchange the beginning of a name for what the first of the prefixes that fits says."""
    for old, new in prefixes.items():
        if name.startswith(old):
            return new + name[len(old) :]
    return name


def cast_tensor(tensor: LazyTensor, dtype: torch.dtype | None) -> LazyTensor:
    """Cast what is a floating point number, when it is read; None leaves the type."""
    if dtype is None or dtype == tensor.dtype or not tensor.dtype.is_floating_point:
        return tensor
    return LazyTensor(tensor.shape, dtype, lambda: tensor.read().to(dtype))


def _plan_shards(weights: Weights, max_shard_bytes: int) -> list[dict[str, LazyTensor]]:
    """Fill files one after the other; there is always at least one."""
    shards: list[dict[str, LazyTensor]] = [{}]
    filled = 0
    for name, tensor in weights.items():
        if filled + tensor.num_bytes > max_shard_bytes and shards[-1]:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += tensor.num_bytes
    return shards


def _write_file(path: Path, weights: Weights) -> None:
    """Write one safetensors file (format: https://huggingface.co/docs/safetensors), tensor after tensor.

    The library's own writer wants all of a file in memory, twice.
    """
    # Wide types first: the format wants every tensor at a multiple of its item's size.
    ordered = sorted(weights.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in ordered:
        start, end = end, end + tensor.num_bytes
        header[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with _room_needed(path), path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for name, tensor in ordered:
            value = tensor.read().detach().cpu().contiguous()
            if tuple(value.shape) != tensor.shape or value.dtype != tensor.dtype:
                # The header is written: a tensor of another size would shift all that follow.
                raise ValueError(f"{name} was read as {list(value.shape)} {value.dtype}, not as announced.")
            file.write(value.reshape(-1).view(torch.uint8).numpy().data)


@contextmanager
def _room_needed(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(f"{path}: no room for the weights. Make room and run again.") from error
        raise


def _tell(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200].rstrip('.')}"
