"""Images: strictly decoded, cut into uint8 tiles, normalised on the device.

A file either decodes completely or raises `MediaError`; half an image is never trained on.
Shapes: `K` tiles, `S` side of a tile in px.
"""

import hashlib
import io
import stat
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from internvl_core.data.tiling import Tiling
from internvl_core.errors import ArgumentError, MediaError

# Formats whose decoders are part of Pillow; EPS, PDF and the like would start other programs.
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
# Pillow loads half of its decoders on first use, and `open` with a list of formats does not wait for that.
Image.init()

_SIXTEEN_BIT_MODES = ("I;16", "I;16L", "I;16B", "I;16N")
_EXIF_ORIENTATION = 0x0112
_SIDEWAYS = (5, 6, 7, 8)

# Mean and standard deviation of R, G, B in 0..1, with the digits the released models were trained with
# (those of "clip" differ from OpenAI's in the eighth decimal).
_NORMALIZATIONS = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": ((0.4814546, 0.4578275, 0.40821073), (0.2686295, 0.2613025, 0.2757711)),
    "siglip": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}


def find_image(root: Path, name: str) -> Path:
    """Find an image below a dataset's root, links followed.

    Raises:
        MediaError: it does not exist, is no regular file, or a link leads out of the root.
    """
    path = root / name
    try:
        resolved = path.resolve(strict=True)
        is_file = stat.S_ISREG(resolved.stat().st_mode)
    except (OSError, RuntimeError) as error:
        raise MediaError(f"{path}: no such image: {error}.") from None
    if not resolved.is_relative_to(root.resolve()):
        raise MediaError(f"{path}: leads to {resolved}, outside the dataset's root {root}.")
    if not is_file:
        raise MediaError(f"{path}: not a regular file.")
    return resolved


def load_image(path: Path) -> Image.Image:
    """Decode an image to RGB: upright by its EXIF, first frame, transparency over white, 16 bits rescaled to 8.

    Raises:
        MediaError: cannot be decoded to its last byte, larger than Pillow's limit against
            decompression bombs (about 89 megapixels), or of a format outside the allow-list.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # A bomb and a damaged header are only warnings to Pillow.
        try:
            with Image.open(path, formats=_FORMATS) as image:
                image.load()
                return _to_rgb(ImageOps.exif_transpose(image))
        except MediaError as error:
            raise MediaError(f"{path}: {error}") from None
        # Decoders report damage by whatever they stumble over; each of these means that the file is bad.
        except Exception as error:  # noqa: BLE001
            raise MediaError(f"{path}: cannot be decoded: {type(error).__name__}: {error}") from None


def read_image_size(path: Path) -> tuple[int, int]:
    """Read width and height in px, as `load_image` gives them, from the header alone.

    Raises:
        MediaError: no header of an allowed format.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            with Image.open(path, formats=_FORMATS) as image:
                width, height = image.size
                is_sideways = image.getexif().get(_EXIF_ORIENTATION) in _SIDEWAYS
        except Exception as error:  # noqa: BLE001 (see load_image)
            raise MediaError(f"{path}: cannot be decoded: {type(error).__name__}: {error}") from None
    return (height, width) if is_sideways else (width, height)


def cut_tiles(image: Image.Image, tiling: Tiling, *, jpeg_quality: int | None = None) -> Tensor:
    """Cut an image into square tiles, plus a thumbnail if there is more than one.

    Args:
        jpeg_quality: degrade by a JPEG round trip at this quality, the same for every tile; None leaves
            the pixels alone. It comes after the resize: artefacts have the scale the original gives them.

    Returns:
        Tiles [K, 3, S, S], uint8, row by row, the thumbnail last.
    """
    size = tiling.tile_size
    columns, rows = tiling.choose_grid(*image.size)
    canvas = _degrade(image.resize((size * columns, size * rows), Image.Resampling.BICUBIC), jpeg_quality)
    grid = torch.from_numpy(np.array(canvas)).view(rows, size, columns, size, 3)
    tiles = grid.permute(0, 2, 4, 1, 3).reshape(rows * columns, 3, size, size)
    if not tiling.has_thumbnail(columns, rows):
        return tiles
    thumbnail = _degrade(image.resize((size, size), Image.Resampling.BICUBIC), jpeg_quality)
    return torch.cat([tiles, torch.from_numpy(np.array(thumbnail)).permute(2, 0, 1)[None]])


def draw_jpeg_quality(*, seed: int, epoch: int, sample_id: str, image_index: int) -> int:
    """Draw the quality, 75 to 100, of one image in one epoch: the same on every rank, worker and resume."""
    key = f"{seed}/{epoch}/{sample_id}/{image_index}"
    return 75 + int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]) % 26


def normalise(tiles: Tensor, normalize_type: str, dtype: torch.dtype) -> Tensor:
    """Turn tiles [K, 3, S, S], uint8, into what the vision tower reads, on the device where they are.

    Raises:
        ArgumentError: `normalize_type` is none of imagenet, clip, siglip.
    """
    if normalize_type not in _NORMALIZATIONS:
        raise ArgumentError(f"normalize_type: {normalize_type!r}, must be one of {', '.join(_NORMALIZATIONS)}.")
    mean, std = (
        torch.tensor(values, device=tiles.device).view(1, 3, 1, 1) for values in _NORMALIZATIONS[normalize_type]
    )
    # In float32, because a bfloat16 quotient has lost the last bits of the pixel before the mean is taken off.
    return ((tiles.to(torch.float32) / 255 - mean) / std).to(dtype)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("F", "I"):
        raise MediaError(f"mode {image.mode} has no defined range of brightness. Convert it to 8 or 16 bits.")
    if image.mode in _SIXTEEN_BIT_MODES:
        # Pillow would clip at 255, which turns nearly all of a 16-bit image white.
        image = Image.fromarray((np.asarray(image).astype(np.uint32) / 257).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        background = Image.new("RGBA", image.size, "white")
        background.alpha_composite(image)
        image = background
    return image.convert("RGB")


def _degrade(image: Image.Image, jpeg_quality: int | None) -> Image.Image:
    if jpeg_quality is None:
        return image
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=jpeg_quality)
    return Image.open(buffer, formats=("JPEG",))
