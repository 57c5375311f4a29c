"""Resizes by Pillow's bicubic rule, to the bit, in a fraction of Pillow's time.

Pillow's arithmetic is integer: weights with 22 bits behind the point, a rounded byte after each of two
passes. The loops are in resample.c, compiled at installation. Where that could not be, or where the result
is not what the installed Pillow gives, Pillow does the work: the pixels never depend on it.
Shapes: `R` rows and `C` columns of tiles, `S` side of a tile in px.
"""

import ctypes
import logging
from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import Image

from internvl_core.errors import ArgumentError

log = logging.getLogger(__name__)

Pixels = NDArray[np.uint8]

_FRACTION_BITS = 22  # As in resample.c.
_MAX_LANES = 8  # Of resample.c: rows of pixels that its horizontal pass handles together.

_BAND_BYTES = 4 << 20  # Still in the processor's cache when it is copied a second time.

# Since Pillow 13 (python-pillow/Pillow#9549); the order matters where a pass overshoots 0 or 255 and is clipped.
_CAN_BE_VERTICAL_FIRST = int(PIL.__version__.partition(".")[0]) >= 13


def resize(image: Image.Image, sizes: Sequence[tuple[int, int]]) -> list[Image.Image]:
    """Resize an RGB image to each of these (width, height) as `Image.resize` with BICUBIC does.

    Returns:
        Images of mode RGBX (or RGB, from Pillow), which save and convert like RGB.

    Raises:
        ArgumentError: the image is not RGB, or a side is not positive.
    """
    if image.mode not in ("RGB", "RGBX") or min(*image.size, *(side for size in sizes for side in size)) < 1:
        raise ArgumentError(f"resize: {image.mode} image of {image.size} px to {sizes}. Give RGB and sides from 1 px.")
    library = _load_library()
    if library is None:
        return [image.resize(size, Image.Resampling.BICUBIC) for size in sizes]
    pixels = _borrow_pixels(image)
    return [
        image.copy() if size == image.size else _show_pixels(_resize_pixels(library, pixels, *size)) for size in sizes
    ]


def cut(image: Image.Image, tiles: Pixels) -> None:
    """Cut an RGB image of R * S rows and C * S columns into contiguous tiles [R * C, 3, S, S], row by row.

    Raises:
        ArgumentError: the image does not have as many pixels as the tiles, or the tiles are not uint8 like that.
    """
    size = tiles.shape[-1]
    columns, rows = image.width // size, image.height // size
    is_fit = image.size == (columns * size, rows * size) and tiles.shape == (rows * columns, 3, size, size)
    if not is_fit or tiles.dtype != np.uint8 or not tiles.flags.c_contiguous or image.mode not in ("RGB", "RGBX"):
        raise ArgumentError(
            f"cut: {image.mode} image of {image.size} px into tiles {tiles.shape}. "
            f"They must be contiguous uint8 of [R * C, 3, S, S], the image RGB of C * S by R * S px."
        )
    library = _load_library()
    if library is not None:
        library.cut_planes(_borrow_pixels(image).ctypes.data, rows, columns, size, tiles.ctypes.data)
        return
    # Plane by plane out of Pillow's memory: no interleaved copy to take apart again.
    planes = [np.frombuffer(image.tobytes("raw", band), np.uint8).reshape(image.height, image.width) for band in "RGB"]
    arrange(planes, tiles)


def arrange(planes: Sequence[Pixels] | Pixels, tiles: Pixels) -> None:
    """Copy three planes [R * S, C * S] into tiles [R * C, 3, S, S], row by row."""
    size = tiles.shape[-1]
    columns = planes[0].shape[1] // size
    grid = tiles.reshape(-1, columns, 3, size, size)
    for band, plane in enumerate(planes):
        grid[:, :, band] = plane.reshape(-1, size, columns, size).transpose(0, 2, 1, 3)


def is_compiled() -> bool:
    """Whether the library is there and gives the installed Pillow's pixels."""
    return _load_library() is not None


def is_vertical_first(size: tuple[int, int], new_size: tuple[int, int]) -> bool:
    """Foretell which of the two passes Pillow does first, for sizes (width, height)."""
    lost_columns, lost_rows = size[0] - new_size[0], size[1] - new_size[1]
    return _CAN_BE_VERTICAL_FIRST and lost_rows > 0 and lost_rows > 2 * lost_columns


def _resize_pixels(library: ctypes.CDLL, pixels: Pixels, width: int, height: int) -> Pixels:
    is_vertical = [False, True]
    if is_vertical_first((pixels.shape[1], pixels.shape[0]), (width, height)):
        is_vertical.reverse()
    for is_next_vertical in is_vertical:
        if is_next_vertical and pixels.shape[0] != height:
            pixels = _resample_rows(library, pixels, height)
        elif not is_next_vertical and pixels.shape[1] != width:
            pixels = _resample_columns(library, pixels, width)
    return pixels


def _resample_rows(library: ctypes.CDLL, pixels: Pixels, new_height: int) -> Pixels:
    height, width, _ = pixels.shape
    starts, weights = _weigh_axis(height, new_height)
    result = np.empty((new_height, width, 4), np.uint8)
    axis = (starts.ctypes.data, weights.ctypes.data, weights.shape[1])
    library.resample_rows(pixels.ctypes.data, width, new_height, *axis, result.ctypes.data)
    return result


def _resample_columns(library: ctypes.CDLL, pixels: Pixels, new_width: int) -> Pixels:
    height, width, _ = pixels.shape
    starts, weights = _weigh_axis(width, new_width)
    turned = np.empty((width, _MAX_LANES, 4), np.uint8)
    result = np.empty((height, new_width, 4), np.uint8)
    axis = (starts.ctypes.data, weights.ctypes.data, weights.shape[1])
    library.resample_columns(
        pixels.ctypes.data, width, height, new_width, *axis, turned.ctypes.data, result.ctypes.data
    )
    return result


@lru_cache(maxsize=256)
def _weigh_axis(size: int, new_size: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Find the weights of one axis: for each new pixel the first old one [new_size], and the taps [new_size, taps].

    Keys' cubic with a = -0.5, widened when the axis shrinks. Each step is rounded as Pillow rounds it, so
    the order of the operations matters.
    """
    scale = size / new_size
    widening = max(scale, 1.0)
    support = 2.0 * widening
    centers = (np.arange(new_size) + 0.5) * scale
    first = np.maximum(np.trunc(centers - support + 0.5), 0).astype(np.int32)
    last = np.minimum(np.trunc(centers + support + 0.5), size).astype(np.int32)
    num_taps = int((last - first).max())
    # Windows of one width, moved inwards at the far border; what they see too much weighs nothing.
    starts = np.minimum(first, size - num_taps)
    places = starts[:, None] + np.arange(num_taps)
    x = np.abs((places - centers[:, None] + 0.5) * (1.0 / widening))
    near = (1.5 * x - 2.5) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * -0.5
    exact = np.where(x < 1, near, np.where(x < 2, far, 0.0))
    exact[(places < first[:, None]) | (places >= last[:, None])] = 0.0
    exact /= np.cumsum(exact, axis=1)[:, -1:]  # Added one by one, as a loop does; `sum` adds in pairs.
    weights = np.trunc(exact * (1 << _FRACTION_BITS) + np.copysign(0.5, exact)).astype(np.int32)
    return starts, weights


class _ArrowArray(ctypes.Structure):
    """The head of the Arrow C data interface's struct of that name."""


_ArrowArray._fields_ = [
    *((name, ctypes.c_int64) for name in ("length", "null_count", "offset", "n_buffers", "n_children")),
    ("buffers", ctypes.POINTER(ctypes.c_void_p)),
    ("children", ctypes.POINTER(ctypes.POINTER(_ArrowArray))),
]


_get_pointer: Callable[[object, bytes], int] = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


class _Lender:
    """Memory as numpy takes it; kept alive by the array, and keeps the image alive."""

    def __init__(self, owner: object, address: int, shape: tuple[int, ...]) -> None:
        self.owner = owner
        self.__array_interface__ = {"version": 3, "typestr": "|u1", "shape": shape, "data": (address, True)}


def _borrow_pixels(image: Image.Image) -> Pixels:
    """Show an image's memory as [height, width, 4], read-only; copied where it is not in one piece."""
    pixels = _find_pixels(image)
    if pixels is not None:
        return pixels
    # Pillow keeps an image in blocks of 16 MiB. Crops are in one piece again, and cheaper than `tobytes`.
    pixels = np.empty((image.height, image.width, 4), np.uint8)
    height = max(1, _BAND_BYTES // (image.width * 4))
    for top in range(0, image.height, height):
        band = image.crop((0, top, image.width, min(top + height, image.height)))
        found = _find_pixels(band)
        if found is None:  # PILLOW_ALIGNMENT or PILLOW_BLOCK_SIZE is set.
            found = np.frombuffer(band.tobytes("raw", "RGBX"), np.uint8).reshape(band.height, band.width, 4)
        pixels[top : top + height] = found
    return pixels


def _find_pixels(image: Image.Image) -> Pixels | None:
    try:
        _, capsule = image.__arrow_c_array__()
    except ValueError:
        return None
    values = _ArrowArray.from_address(_get_pointer(capsule, b"arrow_array")).children[0].contents
    shape = (image.height, image.width, 4)
    if values.length != image.height * image.width * 4:
        return None
    return np.asarray(_Lender(capsule, values.buffers[1] + values.offset, shape))


def _show_pixels(pixels: Pixels) -> Image.Image:
    height, width, _ = pixels.shape
    return Image.frombuffer("RGBX", (width, height), pixels, "raw", "RGBX", 0, 1)


@lru_cache(maxsize=1)
def _load_library() -> ctypes.CDLL | None:
    try:
        library = _open_library()
    except (OSError, AttributeError) as error:
        log.info("Pillow resizes the images, several times slower: %s Install again where gcc or clang is.", error)
        return None
    if not library.is_supported():
        log.info("Pillow resizes the images, several times slower: this processor has no AVX2.")
        return None
    if not _is_true_to_pillow(library):
        log.info("Pillow resizes the images: resample.c gives other pixels than Pillow %s.", PIL.__version__)
        return None
    return library


def _open_library() -> ctypes.CDLL:
    paths = [Path(__file__).with_name(f"_resample{suffix}") for suffix in EXTENSION_SUFFIXES]
    path = next((path for path in paths if path.exists()), None)
    if path is None:
        raise FileNotFoundError(f"{paths[0]} was not built.")
    library = ctypes.CDLL(str(path))  # Lets go of the interpreter's lock in every call.
    number, pointer = ctypes.c_int64, ctypes.c_void_p
    axis = (pointer, pointer, number)
    library.resample_rows.argtypes = (pointer, number, number, *axis, pointer)
    library.resample_columns.argtypes = (pointer, number, number, number, *axis, pointer, pointer)
    library.cut_planes.argtypes = (pointer, number, number, number, pointer)
    library.is_supported.argtypes = ()
    return library


def _is_true_to_pillow(library: ctypes.CDLL) -> bool:
    """Try a small picture of black and white dots, which overshoots everywhere, in both orders of the passes."""
    dots = np.random.default_rng(0).integers(0, 2, (83, 37, 3)).astype(np.uint8) * 255
    image = Image.fromarray(dots)
    sizes = [(20, 90), (31, 29), (90, 7), (53, 83)]
    return all(
        np.array_equal(
            _resize_pixels(library, _borrow_pixels(image), *size)[..., :3],
            np.asarray(image.resize(size, Image.Resampling.BICUBIC)),
        )
        for size in sizes
    )
