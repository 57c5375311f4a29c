"""Tiles: cut from an image as uint8, normalised on the device.

The default path gives Pillow's pixels, bit for bit. The fast path resizes with torch, whose
weights have fewer bits: at most 2/255 off, and about 1 value in 200 differs.
Shapes: `K` tiles, `S` side of a tile in px, `C` columns and `R` rows of tiles.
"""

import hashlib
import io
from collections.abc import Sequence

import numpy as np
import PIL
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from internvl_core.data.media import get_normalization
from internvl_core.data.tiling import Tiling
from internvl_core.errors import ArgumentError

Pixels = NDArray[np.uint8]

MIN_JPEG_QUALITY, MAX_JPEG_QUALITY = 75, 100
"""Range of the augmentation, both ends included."""

# Since Pillow 13 (python-pillow/Pillow#9549); the order matters where a pass overshoots 0 or 255 and is clipped.
_CAN_BE_VERTICAL_FIRST = int(PIL.__version__.partition(".")[0]) >= 13


def cut_tiles(
    image: Image.Image, tiling: Tiling, *, jpeg_quality: int | Sequence[int] | None = None, is_fast: bool = False
) -> Tensor:
    """Cut an RGB image into square tiles, plus a thumbnail if there is more than one.

    Args:
        jpeg_quality: degrade by a JPEG round trip after the resize, so that artefacts have the scale the original
            gives them. One number degrades the whole picture alike, before it is cut; a list, one number for each
            tile, degrades tile by tile as the original does. None leaves the pixels alone.
        is_fast: resize with torch instead of Pillow.

    Returns:
        Tiles [K, 3, S, S], uint8, row by row, the thumbnail last.

    Raises:
        ArgumentError: not as many qualities as tiles.
    """
    size = tiling.tile_size
    columns, rows = tiling.choose_grid(*image.size)
    num_tiles = tiling.count_tiles(*image.size)
    whole_quality = jpeg_quality if isinstance(jpeg_quality, int) else None
    tiles = np.empty((num_tiles, 3, size, size), dtype=np.uint8)
    _fill(tiles[: rows * columns], _resize(image, columns * size, rows * size, whole_quality, is_fast), columns)
    if tiling.has_thumbnail(columns, rows):
        _fill(tiles[-1:], _resize(image, size, size, whole_quality, is_fast), 1)
    if jpeg_quality is not None and not isinstance(jpeg_quality, int):
        if len(jpeg_quality) != num_tiles:
            raise ArgumentError(f"{len(jpeg_quality)} JPEG qualities for {num_tiles} tiles. Give one for each.")
        for tile, quality in zip(tiles, jpeg_quality, strict=True):
            _fill(tile[None], _split(_degrade(_merge(list(tile)), quality)), 1)
    return torch.from_numpy(tiles)


def draw_jpeg_quality(key: str, *, tile: int | None = None) -> int:
    """Draw the quality of one image: the same on every rank, worker and resume.

    Args:
        key: seed, epoch, sample and number of the image within the sample: "42/0/pets:17/0".
        tile: number of the tile, where each has a quality of its own.
    """
    text = key if tile is None else f"{key}/{tile}"
    draw = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])
    return MIN_JPEG_QUALITY + draw % (MAX_JPEG_QUALITY - MIN_JPEG_QUALITY + 1)


def normalise(tiles: Tensor, normalize_type: str, dtype: torch.dtype) -> Tensor:
    """Turn tiles [K, 3, S, S], uint8, into what the vision tower reads, on the device where they are.

    Raises:
        ArgumentError: `normalize_type` is none of imagenet, clip, siglip.
    """
    mean, std = (
        torch.tensor(values, device=tiles.device).view(1, 3, 1, 1) for values in get_normalization(normalize_type)
    )
    # In float32, because a bfloat16 quotient has lost the last bits of the pixel before the mean is taken off.
    return ((tiles.to(torch.float32) / 255 - mean) / std).to(dtype)


def _resize(image: Image.Image, width: int, height: int, jpeg_quality: int | None, is_fast: bool) -> Sequence[Pixels]:
    """Give the three planes of the resized and degraded image."""
    if is_fast:
        planes = _resize_in_torch(image, width, height)
        return planes if jpeg_quality is None else _split(_degrade(_merge(planes), jpeg_quality))
    canvas = image.resize((width, height), Image.Resampling.BICUBIC)
    return _split(canvas if jpeg_quality is None else _degrade(canvas, jpeg_quality))


def _resize_in_torch(image: Image.Image, width: int, height: int) -> list[Pixels]:
    sizes = [(height, width)]
    if _is_vertical_first(image, width, height):
        sizes = [(height, image.width), (height, width)]
    # Channels last in memory, for which torch has vector instructions.
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    for size in sizes:
        pixels = torch.nn.functional.interpolate(pixels, size, mode="bicubic", antialias=True)
    return list(pixels[0].numpy())


def _is_vertical_first(image: Image.Image, width: int, height: int) -> bool:
    """Foretell Pillow's choice of the pass that it does first; torch always begins with the rows."""
    lost_rows, lost_columns = image.height - height, image.width - width
    return _CAN_BE_VERTICAL_FIRST and lost_rows > 0 and lost_rows > 2 * lost_columns


def _degrade(image: Image.Image, jpeg_quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=jpeg_quality)
    return Image.open(buffer, formats=("JPEG",))


def _split(image: Image.Image) -> list[Pixels]:
    # Plane by plane out of Pillow's memory: no interleaved copy to take apart again.
    return [np.frombuffer(image.tobytes("raw", band), np.uint8).reshape(image.height, image.width) for band in "RGB"]


def _merge(planes: Sequence[Pixels]) -> Image.Image:
    return Image.merge("RGB", [Image.fromarray(plane) for plane in planes])


def _fill(tiles: Pixels, planes: Sequence[Pixels], columns: int) -> None:
    """Cut planes [R * S, C * S] into tiles [R * C, 3, S, S]."""
    size = tiles.shape[-1]
    grid = tiles.reshape(-1, columns, 3, size, size)
    for channel, plane in enumerate(planes):
        grid[:, :, channel] = plane.reshape(-1, size, columns, size).transpose(0, 2, 1, 3)
