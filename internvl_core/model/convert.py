"""From one checkpoint format to the other, and adapters into the model they were trained over.

Tensors pass one at a time from the source's files to the target's; a model is in memory only to check the merging of
an adapter. Invariant: `config.json` is written last, so a target without it is no model and loads nowhere.
"""

import json
import logging
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import InternVLConfig

from internvl_core.checkpoint.base_model import get_base
from internvl_core.checkpoint.target import TargetFolder, check_target, open_target
from internvl_core.contract import write_json_atomically
from internvl_core.errors import ArgumentError
from internvl_core.model.adapter_weights import is_adapter, merge_adapter_weights
from internvl_core.model.chat_config import build_chat_config, has_tied_embeddings, is_chat_config
from internvl_core.model.chat_weights import to_chat
from internvl_core.model.export import ASSUMED_CONV_STYLE, CHAT_TEMPLATE_FILE, find_conv_style, write_companions
from internvl_core.model.merge_check import MergeDifference, check_merge
from internvl_core.model.sources import WholeModel, find_folder, open_base, open_whole, read_config
from internvl_core.model.tokenizer import Format
from internvl_core.model.weights import (
    LazyTensor,
    Weights,
    cast_tensor,
    open_weights,
    to_published_names,
    write_weights,
)

logger = logging.getLogger(__name__)

FORMATS: tuple[Format, ...] = ("native", "chat")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

SHARD_BYTES = 4 << 30
"""Of a file at most: so much of this machine's disk is taken by a model on its way to a remote target."""

_CONFIG_FILE = "config.json"
_ADAPTER_MARK = ".lora_A."
# Of a folder that stays in its format and is complete in it, everything is kept but what is written anew.
_WRITTEN_ANEW = (".safetensors", ".bin", ".index.json")


@dataclass(frozen=True)
class ConversionReport:
    """What was written, and how far the merged model is from the adapted one."""

    source: str
    target: str
    source_format: str
    target_format: Format
    num_tensors: int
    num_parameters: int
    num_bytes: int
    """Of all files of the target."""
    dtype: str
    """Of most of the weights."""
    seconds: float
    merged: str | None
    """What was merged; None for nothing."""
    difference: dict[str, float] | None
    """`MergeDifference`; None where no adapter in PEFT's format was merged."""
    remarks: list[str]


@dataclass(frozen=True)
class _Source:
    """A source opened and merged; nothing is read yet."""

    whole: WholeModel
    format: Literal["native", "chat", "adapter"]
    folder: Path
    merged: str | None = None
    base: WholeModel | None = None
    """Of an adapter: what it was trained over. Then the weights of `whole` are float32."""


def convert(
    source_uri: str,
    target_uri: str,
    *,
    to: Format,
    merge: bool = False,
    dtype: str | None = None,
    cache_dir: Path,
) -> dict[str, Any]:
    """Write a model in a format.

    Args:
        source_uri: local folder, fsspec URI, committed checkpoint or hub id, of a model or an adapter.
        target_uri: local folder or fsspec URI, empty.
        to: format to write.
        merge: fold the source's adapters into its weights; without them it is refused, as they are without it.
        dtype: one of `DTYPES`, for the floating point tensors; None keeps each one's own.
        cache_dir: where what is remote is fetched to, and where files wait for a remote target.

    Returns:
        `ConversionReport` as a dictionary.

    Raises:
        ArgumentError: source, target and options do not go together, or merging changed what the model says.
        CheckpointNotFound, CheckpointCorrupt, StoreUnavailable, DiskFull: the stores, the disk.
    """
    started = time.monotonic()
    if to not in FORMATS:
        raise ArgumentError(f"--to: {to!r} must be {' or '.join(FORMATS)}.")
    if dtype is not None and dtype not in DTYPES:
        raise ArgumentError(f"--dtype: {dtype!r} must be one of {', '.join(DTYPES)}.")
    check_target(target_uri)
    source = _open_source(source_uri, cache_dir, merge=merge)
    config = source.whole.config
    _check_formats(source, source_uri, to=to, is_cast=dtype is not None)
    weights = _cast(source.whole.weights, DTYPES[dtype] if dtype else None, like=source.base)
    main_dtype = _find_main_dtype(weights)
    difference = _check_merge(source, weights, main_dtype, source_uri)
    for part in (config, config.vision_config, config.text_config):
        part.dtype = main_dtype
    named = to_published_names(weights) if to == "native" else to_chat(weights, config)
    content = _build_config(source, to)
    with open_target(target_uri, scratch_dir=cache_dir) as target:
        _write_companions(target, source, to)
        write_weights(
            named, target.folder, max_shard_bytes=SHARD_BYTES, on_file=lambda path: _store_weights(target, path)
        )
        write_json_atomically(target.folder / _CONFIG_FILE, content)
        target.store(target.folder / _CONFIG_FILE)
    report = ConversionReport(
        source=source_uri,
        target=target.uri,
        source_format=source.format,
        target_format=to,
        num_tensors=len(named),
        num_parameters=sum(torch.Size(tensor.shape).numel() for tensor in named.values()),
        num_bytes=sum(target.sizes_bytes.values()),
        dtype=str(main_dtype).removeprefix("torch."),
        seconds=round(time.monotonic() - started, 1),
        merged=source.merged,
        difference=asdict(difference) if difference is not None else None,
        remarks=list(_iter_remarks(config, to)),
    )
    return asdict(report)


def _open_source(uri: str, cache_dir: Path, *, merge: bool) -> _Source:
    folder = find_folder(uri, cache_dir, argument="SRC")
    if is_adapter(folder):
        if not merge:
            raise ArgumentError(f"{uri} holds an adapter. Say --merge to fold it into the model it was trained over.")
        return _open_adapter(folder, cache_dir)
    is_chat = is_chat_config(read_config(folder, argument="SRC"))
    num_adapted = sum(_ADAPTER_MARK in name for name in open_weights(folder)) if is_chat else 0
    if num_adapted and not merge:
        raise ArgumentError(f"{uri} was saved with its adapters apart. Say --merge to fold them into the weights.")
    if merge and not num_adapted:
        raise ArgumentError(f"{uri} has no adapters, so there is nothing to merge. Leave out --merge.")
    return _Source(
        open_whole(folder, cache_dir, argument="SRC"),
        "chat" if is_chat else "native",
        folder,
        merged=f"{num_adapted} adapters of the original trainer, computed in float32" if num_adapted else None,
    )


def _open_adapter(folder: Path, cache_dir: Path) -> _Source:
    base = open_base(folder, cache_dir, argument="SRC")
    # Merged before it is rounded, so that the sum is rounded once.
    merged = merge_adapter_weights(_cast(base.weights, torch.float32), folder)
    return _Source(
        replace(base, weights=merged), "adapter", folder, merged=f"the adapter into {get_base(folder).name}", base=base
    )


def _check_formats(source: _Source, uri: str, *, to: Format, is_cast: bool) -> None:
    if to == "native" and getattr(source.whole.config, "ps_version", "v2") == "v1":
        remedy = "It stays as it is" if source.format == "chat" and source.merged is None else "Give --to chat"
        raise ArgumentError(
            f"{uri} has ps_version v1, the first pixel shuffle, which the native format lacks. {remedy}."
        )
    if source.format == to and source.merged is None and not is_cast:
        raise ArgumentError(
            f"{uri} is in the {to} format already. Give the other one, or --dtype to change the type of its weights."
        )


def _cast(weights: Weights, dtype: torch.dtype | None, *, like: WholeModel | None = None) -> dict[str, LazyTensor]:
    """Cast what is a floating point number: to one type, else to that of the same tensor in another model."""
    cast = {}
    for name, tensor in weights.items():
        cast[name] = cast_tensor(tensor, dtype or (like.weights[name].dtype if like is not None else None))
    return cast


def _find_main_dtype(weights: Weights) -> torch.dtype:
    counts: Counter[torch.dtype] = Counter()
    for tensor in weights.values():
        counts[tensor.dtype] += tensor.num_bytes
    return counts.most_common(1)[0][0]


def _check_merge(source: _Source, weights: Weights, dtype: torch.dtype, uri: str) -> MergeDifference | None:
    if source.base is None:
        return None
    logger.info("Comparing the adapted model with the merged one")
    return check_merge(
        source.base, source.folder, merged=source.whole.weights, written=weights, dtype=dtype, source=uri
    )


def _build_config(source: _Source, to: Format) -> dict[str, Any]:
    config = source.whole.config
    if to == "native":
        config.architectures = ["InternVLForConditionalGeneration"]
        content: dict[str, Any] = json.loads(config.to_json_string())
        return content
    content = build_chat_config(config)
    if source.format == "chat" and _is_complete(source.folder, "chat"):
        # Its Python files come along, so that it need not look for them on the hub.
        content["auto_map"] = read_config(source.folder, argument="SRC").get("auto_map", content["auto_map"])
    return content


def _write_companions(target: TargetFolder, source: _Source, to: Format) -> None:
    if source.format == to and _is_complete(source.folder, to):
        for path in sorted(source.folder.iterdir()):
            if path.is_file() and path.name != _CONFIG_FILE and not path.name.endswith(_WRITTEN_ANEW):
                shutil.copyfile(path, target.folder / path.name)
    else:
        write_companions(
            target.folder,
            config=source.whole.config,
            tokenizer=source.whole.tokenizer,
            generation_config=source.whole.generation_config,
            format=to,
        )
    for path in sorted(target.folder.iterdir()):
        target.store(path)


def _is_complete(folder: Path, format: Format) -> bool:
    """Tell a published folder, whose files are all as their authors want them, from a checkpoint of a trainer."""
    if format == "chat":
        return any(folder.glob("*.py"))
    return (folder / "processor_config.json").is_file() and (folder / CHAT_TEMPLATE_FILE).is_file()


def _store_weights(target: TargetFolder, path: Path) -> None:
    size_gb = path.stat().st_size / 1e9
    target.store(path)
    logger.info("%s: %.3g GB", path.name, size_gb)


def _iter_remarks(config: InternVLConfig, to: Format) -> Iterator[str]:
    settings = getattr(config, "chat_settings", None) or {}
    if has_tied_embeddings(config):
        yield "Head and embeddings, one tensor in the source, are two equal ones now, as in every published InternVL."
    if find_conv_style(config) is None:
        named = settings.get("template")
        why = f"the conversation style {named!r} is unknown here" if named else "the source names no conversation style"
        yield f"The chat template is that of {ASSUMED_CONV_STYLE}: {why}."
    if to == "native" and settings.get("dynamic_image_size", True) and not settings.get("use_thumbnail", True):
        yield "The native image processor adds a thumbnail to the tiles of an image; this model was trained without."
    if to == "native" and settings.get("pad2square"):
        yield "The native image processor does not pad images to a square; this model was trained with pad2square."
