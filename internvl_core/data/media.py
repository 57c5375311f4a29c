"""Images: strictly decoded to RGB, or refused.

A file either decodes completely or raises `MediaError`; half an image is never trained on. What is
wrong with its metadata alone is passed over. The same limits hold whether an image is decoded or
only its header is read, so what the index lets in is what the workers can read. A disk that fails
on the way says nothing about the image, and is told as `StoreUnavailable`. Knows no torch.
"""

import io
import warnings
from typing import BinaryIO

import numpy as np
from PIL import Image, TiffImagePlugin, UnidentifiedImageError

from internvl_core.data.image_file import ImageFile, check_png, check_scans, check_size, read_whole
from internvl_core.data.tiling import Tiling
from internvl_core.errors import ArgumentError, InternVLError, MediaError, Reason

MAX_PIXELS = 89_478_485
"""Pillow's own limit against decompression bombs: 256 MiB of RGB."""
MIN_SIDE_PX = 8
"""Less is a spacer or a tracking pixel: even enlarged it fills no patch (14 px of a 448-px tile) with anything."""
MAX_ASPECT_RATIO = 200
"""Longer to shorter side; a line of text in a scroll reaches about 100. Qwen2-VL has the same limit."""

NORMALIZATIONS = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": ((0.4814546, 0.4578275, 0.40821073), (0.2686295, 0.2613025, 0.2757711)),
    "siglip": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
"""Mean and standard deviation of R, G, B in 0..1, with the digits the released models were trained with
(those of "clip" differ from OpenAI's in the eighth decimal)."""

# Formats whose decoders are part of Pillow; EPS, PDF and the like would start other programs.
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
# Pillow loads half of its decoders on first use, and `open` with a list of formats does not wait for that.
Image.init()

# Of the formats above, Pillow warns about metadata alone, and errs on damage to the pixels. For the process, because
# `catch_warnings` is not for threads, and headers are read in several.
warnings.filterwarnings("ignore", module=r"PIL\.")
_NO_PILLOW_WARNINGS = warnings.filters[0]

_SIXTEEN_BIT_MODES = ("I;16", "I;16L", "I;16B", "I;16N")
_EIGHT_OF_SIXTEEN_BITS = (np.arange(1 << 16) / 257).round().astype(np.uint8)
_EXIF_ORIENTATION = 0x0112
_TO_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = (5, 6, 7, 8)
_DRAFT_SCALES = (8, 4, 2)


def load_image(source: BinaryIO | bytes, name: str, *, draft_for: Tiling | None = None) -> Image.Image:
    """Decode an image to RGB: upright by its EXIF, first frame, transparency over white, 16 bits rescaled to 8.

    Args:
        name: what a message calls the image.
        draft_for: lets the JPEG decoder shrink by 2, 4 or 8 on the way, as far as the canvas that this tiling
            makes is still covered and the tiles stay as many. Faster, but not the same pixels. None decodes all.

    Raises:
        MediaError: cannot be decoded to its last byte, is too large, too small, too long, or of a format
            outside the allow-list.
        StoreUnavailable: the file cannot be read; says nothing about the image.
    """
    try:
        content = source if isinstance(source, bytes) else read_whole(source, name)
        with _open_image(io.BytesIO(content)) as image:
            if image.format == "PNG":
                check_png(content)
            if image.format in ("JPEG", "MPO"):
                check_scans(content)
            if draft_for is not None and image.format == "JPEG":
                _draft(image, draft_for)
            image.load()
            image = _to_rgb(_turn_upright(image))
            # Comments and profiles of the file would be written into every JPEG made of the image.
            image.info = {}
            return image
    except Exception as error:  # noqa: BLE001
        raise _tell_damage(name, error) from None


def read_image_size(source: BinaryIO | bytes, name: str) -> tuple[int, int]:
    """Read width and height in px, as `load_image` gives them, from the header alone.

    Pillow reads a WEBP whole. A PNG whose orientation is written behind its pixels is taken as it lies;
    `load_image` turns it.

    Raises:
        MediaError: no header of an allowed format, or a size that `load_image` would refuse.
        StoreUnavailable: the file cannot be read; says nothing about the image.
    """
    try:
        if isinstance(source, bytes):
            file: BinaryIO = io.BytesIO(source)
        else:
            check_size(source, name)
            file = io.BufferedReader(ImageFile(source, name))
        with _open_image(file) as image:
            return _find_upright_size(image)
    except Exception as error:  # noqa: BLE001
        raise _tell_damage(name, error) from None


def pad_to_square(image: Image.Image, normalize_type: str) -> Image.Image:
    """Centre an image on a square of the mean colour, which normalisation turns into zeros.

    Raises:
        ArgumentError: `normalize_type` is none of imagenet, clip, siglip.
    """
    mean, _ = get_normalization(normalize_type)
    side = max(image.size)
    if image.size == (side, side):
        return image
    square = Image.new("RGB", (side, side), tuple(int(channel * 255) for channel in mean))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def get_normalization(normalize_type: str) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Mean and standard deviation of R, G, B in 0..1.

    Raises:
        ArgumentError: `normalize_type` is none of imagenet, clip, siglip.
    """
    if normalize_type not in NORMALIZATIONS:
        raise ArgumentError(f"normalize_type: {normalize_type!r}, must be one of {', '.join(NORMALIZATIONS)}.")
    return NORMALIZATIONS[normalize_type]


def _open_image(file: BinaryIO) -> Image.Image:
    if not warnings.filters or warnings.filters[0] != _NO_PILLOW_WARNINGS:
        # Somebody set filters after us. Whether an image is good must not hang on `python -W error`.
        warnings.filterwarnings("ignore", module=r"PIL\.")
    image = Image.open(file, formats=_FORMATS)
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise _absurd(f"{width} x {height} px are more than {MAX_PIXELS / 1e6:.1f} megapixels.")
    if min(width, height) < MIN_SIDE_PX:
        raise _absurd(f"{width} x {height} px; each side must have at least {MIN_SIDE_PX}.")
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise _absurd(f"{width} x {height} px; one side may be at most {MAX_ASPECT_RATIO} times the other.")
    if isinstance(image, TiffImagePlugin.TiffImageFile) and image.tag_v2.next == image.tag_v2.offset:
        raise MediaError("cannot be decoded: the file ends before its directory does.")
    return image


def _absurd(message: str) -> MediaError:
    return MediaError(message, reason=Reason.MEDIA_SIZE)


def _tell_damage(name: str, error: Exception) -> InternVLError:
    if isinstance(error, MediaError):
        return MediaError(f"{name}: {error}", reason=error.reason)
    if isinstance(error, InternVLError):  # The store failed, not the image.
        return error
    if isinstance(error, Image.DecompressionBombError):
        return MediaError(f"{name}: more than {MAX_PIXELS / 1e6:.1f} megapixels.", reason=Reason.MEDIA_SIZE)
    if isinstance(error, UnidentifiedImageError):
        return MediaError(f"{name}: cannot be decoded: begins like none of {', '.join(_FORMATS)}.")
    # Decoders report damage by whatever they stumble over; each of these means that the file is bad.
    return MediaError(f"{name}: cannot be decoded: {type(error).__name__}: {' '.join(str(error).split())}")


def _find_upright_size(image: Image.Image) -> tuple[int, int]:
    width, height = image.size
    return (height, width) if _find_orientation(image) in _SIDEWAYS else (width, height)


def _turn_upright(image: Image.Image) -> Image.Image:
    method = _TO_UPRIGHT.get(_find_orientation(image))
    return image if method is None else image.transpose(method)


def _find_orientation(image: Image.Image) -> int:
    """Find how an image lies by its EXIF: 1 to 8, and 1, upright, where that cannot be told."""
    if image.format == "TIFF":  # Pillow has turned it already.
        return 1
    try:
        # The method of the base class: PNG's own one decodes the pixels to look behind them.
        orientation = Image.Image.getexif(image).get(_EXIF_ORIENTATION)
        return orientation if orientation in _TO_UPRIGHT else 1
    except Exception:  # noqa: BLE001 (damaged, it is reported by whatever Pillow stumbles over; the pixels are whole)
        return 1


def _draft(image: Image.Image, tiling: Tiling) -> None:
    size = _find_upright_size(image)
    columns, rows = tiling.choose_grid(*size)
    canvas = (columns * tiling.tile_size, rows * tiling.tile_size)
    for scale in _DRAFT_SCALES:
        width, height = (-(-side // scale) for side in size)
        if width >= canvas[0] and height >= canvas[1] and tiling.choose_grid(width, height) == (columns, rows):
            # Asked for no less than it rounds down to, the decoder takes this scale and rounds up.
            image.draft("RGB", (image.width // scale, image.height // scale))
            return


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in _SIXTEEN_BIT_MODES or (image.mode == "I" and image.format == "PPM"):
        return _to_eight_bits(image).convert("RGB")
    if image.mode in ("F", "I"):
        raise MediaError(f"mode {image.mode} has no defined range of brightness. Convert it to 8 or 16 bits.")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        background = Image.new("RGBA", image.size, "white")
        background.alpha_composite(image)
        image = background
    return image if image.mode == "RGB" else image.convert("RGB")


def _to_eight_bits(image: Image.Image) -> Image.Image:
    # Pillow would clip at 255, which turns nearly all of a 16-bit image white.
    values = np.asarray(image)
    grey = _EIGHT_OF_SIXTEEN_BITS[values]
    if "transparency" in image.info:
        grey[values == image.info["transparency"]] = 255
    return Image.fromarray(grey)
