"""Images: strictly decoded to RGB, or refused.

A file either decodes completely or raises `MediaError`; half an image is never trained on, and
what Pillow only warns about counts as damage. The same limits hold whether an image is decoded or
only its header is read, so what the index lets in is what the workers can read. Knows no torch.
"""

import io
import warnings
import zlib
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from internvl_core.data.media_root import MAX_FILE_BYTES
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

# Pillow warns where it fills in what a file does not say. Set once for the process: `catch_warnings`
# is not for threads, and headers are read in several.
warnings.filterwarnings("error", module=r"PIL\.")
# Cameras store a second picture behind the first, and editors drop it: the first one is whole.
warnings.filterwarnings("ignore", message="Image appears to be a malformed MPO file", module=r"PIL\.")

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_CHUNK_FRAME_BYTES = 12  # Length, kind and checksum.
_JPEG_SCAN = b"\xff\xda"
# An encoder makes about ten. Each goes over all pixels (0.07 s for 89 megapixels), and may have no more than 100 bytes.
_MAX_JPEG_SCANS = 100
_SIXTEEN_BIT_MODES = ("I;16", "I;16L", "I;16B", "I;16N")
_EIGHT_OF_SIXTEEN_BITS = (np.arange(1 << 16) / 257).round().astype(np.uint8)
_EXIF_ORIENTATION = 0x0112
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
    """
    try:
        content = source if isinstance(source, bytes) else _read_whole(source)
        with _open_image(io.BytesIO(content)) as image:
            if image.format == "PNG":
                _check_png(content)
            if image.format in ("JPEG", "MPO"):
                _check_scans(content)
            if draft_for is not None and image.format == "JPEG":
                _draft(image, draft_for)
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            image = _to_rgb(image)
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
    """
    try:
        if not isinstance(source, bytes):
            _check_size(source)
        with _open_image(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
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


def _read_whole(file: BinaryIO) -> bytes:
    _check_size(file)
    return file.read()


def _check_size(file: BinaryIO) -> None:
    """Refuse a huge file before any of it is read: a decoder may want all of it."""
    size_bytes = file.seek(0, io.SEEK_END)
    file.seek(0)
    if size_bytes > MAX_FILE_BYTES:
        raise _absurd(f"{size_bytes} bytes are more than {MAX_FILE_BYTES >> 20} MiB.")


def _open_image(file: BinaryIO) -> Image.Image:
    image = Image.open(file, formats=_FORMATS)
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise _absurd(f"{width} x {height} px are more than {MAX_PIXELS / 1e6:.1f} megapixels.")
    if min(width, height) < MIN_SIDE_PX:
        raise _absurd(f"{width} x {height} px; each side must have at least {MIN_SIDE_PX}.")
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise _absurd(f"{width} x {height} px; one side may be at most {MAX_ASPECT_RATIO} times the other.")
    return image


def _absurd(message: str) -> MediaError:
    return MediaError(message, reason=Reason.MEDIA_SIZE)


def _tell_damage(name: str, error: Exception) -> InternVLError:
    if isinstance(error, MediaError):
        return MediaError(f"{name}: {error}", reason=error.reason)
    if isinstance(error, InternVLError):  # The store failed, not the image.
        return error
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return MediaError(f"{name}: more than {MAX_PIXELS / 1e6:.1f} megapixels.", reason=Reason.MEDIA_SIZE)
    if isinstance(error, UnidentifiedImageError):
        return MediaError(f"{name}: cannot be decoded: begins like none of {', '.join(_FORMATS)}.")
    # Decoders report damage by whatever they stumble over; each of these means that the file is bad.
    return MediaError(f"{name}: cannot be decoded: {type(error).__name__}: {' '.join(str(error).split())}")


def _check_png(content: bytes) -> None:
    """Compare the checksum of each chunk; Pillow skips those of the pixels and decodes whatever it finds."""
    view = memoryview(content)
    position = len(_PNG_SIGNATURE)
    kind = b""
    while kind != b"IEND":
        if position + _PNG_CHUNK_FRAME_BYTES > len(content):
            raise MediaError("cannot be decoded: the file ends before the image does.")
        length = int.from_bytes(content[position : position + 4])
        end = position + 8 + length
        kind = content[position + 4 : position + 8]
        if zlib.crc32(view[position + 4 : end]) != int.from_bytes(content[end : end + 4]):
            raise MediaError(f"cannot be decoded: wrong checksum at byte {end}, of chunk {kind!r}.")
        position = end + 4


def _check_scans(content: bytes) -> None:
    """Refuse a JPEG that would be decoded for hours; within its pixels the mark of a scan cannot occur."""
    num_scans = content.count(_JPEG_SCAN)
    if num_scans > _MAX_JPEG_SCANS:
        raise _absurd(f"{num_scans} scans; at most {_MAX_JPEG_SCANS} are decoded.")


def _find_upright_size(image: Image.Image) -> tuple[int, int]:
    width, height = image.size
    if image.format == "TIFF":  # Pillow has turned it already.
        return width, height
    # The method of the base class: PNG's own one decodes the pixels to look behind them.
    orientation = Image.Image.getexif(image).get(_EXIF_ORIENTATION)
    return (height, width) if orientation in _SIDEWAYS else (width, height)


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
