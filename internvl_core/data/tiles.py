"""Tiles: cut from an image as uint8, normalised on the device.

The default path gives Pillow's pixels, bit for bit (`resample`). The fast path resizes with torch, whose
weights have fewer bits: at most 2/255 off, and about 1 value in 200 differs.
Shapes: `K` tiles, `S` side of a tile in px, `C` columns and `R` rows of tiles.
"""

import hashlib
import io
import itertools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from internvl_core.data.media import get_normalization
from internvl_core.data.resample import Pixels, arrange, cut, is_vertical_first, resize
from internvl_core.data.tiling import Tiling
from internvl_core.errors import ArgumentError

MIN_JPEG_QUALITY, MAX_JPEG_QUALITY = 75, 100
"""Range of the augmentation, both ends included."""


def cut_tiles(
    image: Image.Image, tiling: Tiling, *, jpeg_quality: int | Sequence[int] | None = None, is_fast: bool = False
) -> Tensor:
    """Cut an RGB image into square tiles, plus a thumbnail if there is more than one.

    Args:
        jpeg_quality: degrade by a JPEG round trip after the resize, so that artefacts have the scale the original
            gives them. One number degrades the whole picture alike, before it is cut; a list, one number for each
            tile, degrades tile by tile as the original does. None leaves the pixels alone.
        is_fast: resize with torch.

    Returns:
        Tiles [K, 3, S, S], uint8, row by row, the thumbnail last.

    Raises:
        ArgumentError: not as many qualities as tiles.
    """
    size = tiling.tile_size
    columns, rows = tiling.choose_grid(*image.size)
    tiles = np.empty((tiling.count_tiles(*image.size), 3, size, size), dtype=np.uint8)
    if isinstance(jpeg_quality, Sequence) and len(jpeg_quality) != len(tiles):
        raise ArgumentError(f"{len(jpeg_quality)} JPEG qualities for {len(tiles)} tiles. Give one for each.")
    sizes = [(columns * size, rows * size)]
    if tiling.has_thumbnail(columns, rows):
        sizes.append((size, size))
    pictures: Iterable[Image.Image | Pixels] = _resize_in_torch(image, sizes) if is_fast else resize(image, sizes)
    start = 0
    for picture, (width, height) in zip(pictures, sizes, strict=True):
        part = slice(start, start + width // size * (height // size))
        start = part.stop
        _cut(picture, tiles[part], jpeg_quality[part] if isinstance(jpeg_quality, Sequence) else jpeg_quality)
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


def _resize_in_torch(image: Image.Image, sizes: Sequence[tuple[int, int]]) -> Iterator[Pixels]:
    """Give the planes [3, height, width] of the image in each of these (width, height)."""
    # Channels last in memory, for which torch has vector instructions.
    whole = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    for width, height in sizes:
        pixels = whole
        if is_vertical_first(image.size, (width, height)):  # Torch itself begins with the horizontal pass.
            pixels = torch.nn.functional.interpolate(pixels, (height, image.width), mode="bicubic", antialias=True)
        yield torch.nn.functional.interpolate(pixels, (height, width), mode="bicubic", antialias=True)[0].numpy()


def _cut(picture: Image.Image | Pixels, tiles: Pixels, jpeg_quality: int | Sequence[int] | None) -> None:
    if not isinstance(picture, Image.Image):
        if jpeg_quality is None:
            arrange(picture, tiles)
            return
        picture = Image.merge("RGB", [Image.fromarray(plane) for plane in picture])
    if not isinstance(jpeg_quality, Sequence):
        cut(picture if jpeg_quality is None else _degrade(picture, jpeg_quality), tiles)
        return
    size = tiles.shape[-1]
    corners = itertools.product(range(0, picture.height, size), range(0, picture.width, size))
    for tile, quality, (top, left) in zip(tiles, jpeg_quality, corners, strict=True):
        cut(_degrade(picture.crop((left, top, left + size, top + size)), quality), tile[None])


def _degrade(image: Image.Image, jpeg_quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=jpeg_quality)
    return Image.open(buffer, formats=("JPEG",))
