import importlib.machinery
import logging
import shutil
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from internvl_core.data import resample
from internvl_core.data.resample import cut, is_compiled, resize
from internvl_core.errors import ArgumentError

Size = tuple[int, int]

needs_library = pytest.mark.skipif(not is_compiled(), reason="resample.c is not compiled here: `make install`")


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory in which the library is looked for anew."""
    monkeypatch.setattr(resample, "__file__", str(tmp_path / "resample.py"))
    resample._load_library.cache_clear()
    yield tmp_path
    resample._load_library.cache_clear()


def dots(width: int, height: int, *, levels: int = 2) -> Image.Image:
    """Random pixels; two levels make every resize overshoot."""
    pixels = np.random.default_rng(width + height).integers(0, levels, (height, width, 3)) * (255 // (levels - 1))
    return Image.fromarray(pixels.astype(np.uint8))


def to_pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image)[..., :3]


def is_like_pillow(image: Image.Image, size: Size) -> bool:
    (resized,) = resize(image, [size])
    assert resized.size == size
    return np.array_equal(to_pixels(resized), np.asarray(image.resize(size, Image.Resampling.BICUBIC)))


sides = st.integers(1, 300) | st.integers(1, 2000)


@needs_library
@settings(max_examples=60, deadline=None)
@given(st.tuples(sides, sides), st.tuples(sides, sides), st.sampled_from([2, 256]))
@example((300, 200), (300, 77), 2)  # One axis stays.
@example((300, 200), (77, 200), 2)
@example((1, 1), (50, 50), 256)
@example((1, 2000), (2000, 1), 2)
@example((2000, 1), (1, 2000), 2)
@example((113, 168), (112, 112), 2)  # Either side of the border at which Pillow begins with the other pass.
@example((140, 169), (112, 112), 2)
@example((140, 168), (112, 112), 2)
def test_pixels_equal_those_of_pillow(size: Size, new_size: Size, levels: int) -> None:
    assert is_like_pillow(dots(*size, levels=levels), new_size)


@needs_library
def test_an_image_in_several_blocks_of_memory_is_read_whole() -> None:
    image = dots(2100, 2100)
    with pytest.raises(ValueError, match=r"not contiguous|multiple"):
        image.__arrow_c_array__()
    assert is_like_pillow(image, (70, 90))


def test_each_size_is_made_from_the_image_itself() -> None:
    image = dots(60, 40)
    for resized, size in zip(
        resize(image, [(30, 20), (90, 90), (60, 40)]), [(30, 20), (90, 90), (60, 40)], strict=True
    ):
        assert np.array_equal(to_pixels(resized), np.asarray(image.resize(size, Image.Resampling.BICUBIC)))


@pytest.mark.parametrize("size", [(60, 40), (60, 20), (30, 40)])
def test_what_was_resized_shares_no_memory_with_the_image(size: Size) -> None:
    image = dots(60, 40)
    (resized,) = resize(image, [size])
    kept = to_pixels(resized).copy()
    image.paste("red", (0, 0, 60, 40))
    del image
    assert np.array_equal(to_pixels(resized), kept)


def test_threads_do_not_disturb_each_other() -> None:
    images = [dots(400 + number, 300) for number in range(8)]
    expected = [np.asarray(image.resize((301, 299), Image.Resampling.BICUBIC)) for image in images]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            found = pool.map(lambda image: to_pixels(resize(image, [(301, 299)])[0]), images)
            assert all(np.array_equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("mode", ["RGB", "RGBX"])
def test_tiles_are_cut_row_by_row(mode: str) -> None:
    image = dots(30, 20, levels=256).convert(mode)
    tiles = np.zeros((6, 3, 10, 10), np.uint8)
    cut(image, tiles)
    for number, tile in enumerate(tiles):
        row, column = divmod(number, 3)
        crop = to_pixels(image)[row * 10 : row * 10 + 10, column * 10 : column * 10 + 10]
        assert np.array_equal(tile, crop.transpose(2, 0, 1))


@pytest.mark.parametrize(
    ("image", "tiles"),
    [
        (Image.new("RGB", (30, 20)), np.zeros((5, 3, 10, 10), np.uint8)),
        (Image.new("RGB", (30, 21)), np.zeros((6, 3, 10, 10), np.uint8)),
        (Image.new("RGB", (30, 20)), np.zeros((6, 4, 10, 10), np.uint8)),
        (Image.new("RGB", (30, 20)), np.zeros((6, 3, 10, 10), np.float32)),
        (Image.new("RGB", (30, 20)), np.zeros((6, 10, 10, 3), np.uint8).transpose(0, 3, 1, 2)),
        (Image.new("L", (30, 20)), np.zeros((6, 3, 10, 10), np.uint8)),
    ],
    ids=["too few", "a row too many", "four bands", "floats", "not contiguous", "grey"],
)
def test_tiles_that_do_not_fit_the_image_are_refused(image: Image.Image, tiles: np.ndarray) -> None:
    with pytest.raises(ArgumentError, match="cut: "):
        cut(image, tiles)


@pytest.mark.parametrize("is_grey", [False, True])
def test_what_cannot_be_resized_is_refused(is_grey: bool) -> None:
    with pytest.raises(ArgumentError, match="resize: "):
        resize(Image.new("L" if is_grey else "RGB", (4, 4)), [(4, 4) if is_grey else (4, 0)])


@pytest.mark.parametrize("content", ["none", "no library", "another library"])
def test_without_the_library_pillow_gives_the_same_pixels_and_one_line_says_so(
    content: str, elsewhere: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = elsewhere / f"_resample{importlib.machinery.EXTENSION_SUFFIXES[0]}"
    if content == "no library":
        path.write_text("text")
    elif content == "another library":
        # Any one that has none of the functions, as a library built from an earlier source lacks some.
        shutil.copy(next(Path(sysconfig.get_path("stdlib")).glob("lib-dynload/_bisect*")), path)
    tiles, expected = np.zeros((2, 6, 3, 10, 10), np.uint8)
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            cut(resize(dots(100, 80), [(30, 20)])[0], tiles)
    assert not is_compiled()
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert "Pillow resizes the images" in caplog.text
    cut(dots(100, 80).resize((30, 20), Image.Resampling.BICUBIC), expected)
    assert np.array_equal(tiles, expected)


@needs_library
def test_a_library_that_is_not_true_to_pillow_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(resample, "_CAN_BE_VERTICAL_FIRST", not resample._CAN_BE_VERTICAL_FIRST)
    resample._load_library.cache_clear()
    with caplog.at_level(logging.INFO):
        assert is_like_pillow(dots(100, 300), (20, 30))
    resample._load_library.cache_clear()
    assert "other pixels than Pillow" in caplog.text
