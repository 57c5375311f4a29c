"""The tokenizer and the patch size of a model that is not loaded: small files of a folder, a hub id or a checkpoint.

What an index is keyed by must be what the trainer will find in the loaded model, or the trainer would
build another one. Of a checkpoint or a remote folder no weight is fetched.
"""

import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from internvl_core.checkpoint.base_model import BASE_FILE, get_base
from internvl_core.checkpoint.folder import RemoteFolder, resolve_folder
from internvl_core.checkpoint.store import is_checkpoint_uri, read_file, read_manifest
from internvl_core.contract import CheckpointRef
from internvl_core.data.text_encoder import TextEncoder, load_text_encoder
from internvl_core.errors import ArgumentError
from internvl_core.inspection.hub import check_model
from internvl_core.inspection.lint_report import TokenizerSource

USUAL_PATCH_PX = 14
"""Of every released InternVL."""

_CONFIG_FILE = "config.json"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
# Tokenizers of large vocabularies have some 20 MB; what is larger is no part of one.
_MAX_FILE_BYTES = 256 << 20


def load_encoder(source: TokenizerSource, cache_dir: Path) -> TextEncoder:
    """Load the tokenizer of a source, InternVL's special tokens included.

    Raises:
        ArgumentError: there is none.
    """
    return load_text_encoder(_find_folder(source.tokenizer, cache_dir))


def count_tokens_per_tile(source: TokenizerSource | None, values: Mapping[str, Any], cache_dir: Path) -> int:
    """Count the tokens that a tile becomes, by the arguments and the vision tower's patch size.

    Raises:
        ArgumentError: the tile size is not a whole number of patches, or the config says no size.
    """
    patch = USUAL_PATCH_PX if source is None else _read_patch_size(source.vision or source.tokenizer, cache_dir)
    size = int(values["force_image_size"])
    if size % patch:
        raise ArgumentError(
            f"force_image_size: {size} px is not a whole number of patches, which are {patch} px wide. Nearest: "
            f"{max(1, size // patch) * patch}."
        )
    return int((size // patch) ** 2 * values["down_sample_ratio"] ** 2)


def _read_patch_size(source: str, cache_dir: Path) -> int:
    config = _read_config(_find_folder(source, cache_dir))
    # A language model's config, beside its tokenizer, has no word about vision.
    patch = config.get("vision_config", config).get("patch_size", USUAL_PATCH_PX)
    side = patch[0] if isinstance(patch, list) and patch else patch
    if isinstance(side, bool) or not isinstance(side, int) or side < 1:
        raise ArgumentError(f"{source}: {_CONFIG_FILE} says patch_size {patch!r}, which is no number of pixels.")
    return side


def _read_config(path: str) -> dict[str, Any]:
    file = Path(path) / _CONFIG_FILE
    if not Path(path).is_dir():
        file = _fetch_from_hub(path)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ArgumentError(f"{file}: is not a config in JSON: {error}.") from None
    if not isinstance(content, dict):
        raise ArgumentError(f"{file}: is not a config in JSON: must be an object.")
    return content


def _fetch_from_hub(name: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return Path(hf_hub_download(name, _CONFIG_FILE))
    except EntryNotFoundError:
        return Path(name) / _CONFIG_FILE


def _find_folder(source: str, cache_dir: Path) -> str:
    """Give the local folder of a source, small files of a remote one copied; a hub id is its own."""
    found = resolve_folder(source) if is_checkpoint_uri(source) else Path(source)
    folder = found if isinstance(found, Path) else _copy_small_files(found, cache_dir)
    while (folder / BASE_FILE).is_file():
        base = get_base(folder)
        if base.kind != "checkpoint":
            return _find_folder(base.name, cache_dir)
        folder = _copy_small_files(CheckpointRef(base.name, base.digest), cache_dir)
    if isinstance(found, Path) and folder == found:
        check_model(str(folder))
    return str(folder)


def _copy_small_files(source: CheckpointRef | RemoteFolder, cache_dir: Path) -> Path:
    """Copy the files that are no weights; none twice."""
    if isinstance(source, CheckpointRef):
        sizes_bytes = {entry.path: entry.size_bytes for entry in read_manifest(source).files}
        read: Callable[[str], bytes] = partial(read_file, source)
    else:
        sizes_bytes = {name: int(entry["size"]) for name, entry in source.files.items()}
        read = source.read
    # By address as well: two saves with equal bytes are two checkpoints.
    key = hashlib.sha256(f"{source.uri}\0{source.digest}".encode()).hexdigest()[:32]
    folder = cache_dir / "tokenizers" / key
    for name, size_bytes in sizes_bytes.items():
        is_small = size_bytes <= _MAX_FILE_BYTES and not name.endswith(_WEIGHTS)
        if "/" not in name and is_small and not (folder / name).exists():
            _write(folder / name, read(name))
    return folder


def _write(path: Path, content: bytes) -> None:
    # By a rename: runs that start together copy it together.
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", delete=False) as file:
        file.write(content)
    Path(file.name).replace(path)
