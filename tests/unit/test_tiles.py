import io
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from internvl_core.data.media import load_image, pad_to_square
from internvl_core.data.tiles import cut_tiles, draw_jpeg_quality, normalise
from internvl_core.data.tiling import Tiling
from internvl_core.errors import ArgumentError

DYNAMIC = Tiling(16, 1, 6, use_thumbnail=True, is_dynamic=True)
STATIC = Tiling(16, 1, 6, use_thumbnail=True, is_dynamic=False)
WHOLE = Tiling(56, 1, 12, use_thumbnail=True, is_dynamic=True)

# Enlarged, shrunk, shrunk in one direction only, long, tall, square, and exactly the canvas.
SIZES = [
    (31, 17),
    (640, 427),
    (427, 640),
    (100, 60),
    (500, 60),
    (60, 500),
    (10, 1200),
    (1200, 10),
    (333, 333),
    (56, 56),
]


def noise(width: int, height: int, *, levels: int = 256) -> Image.Image:
    """Random pixels; two levels make every resize overshoot."""
    pixels = np.random.default_rng(0).integers(0, levels, (height, width, 3)) * (255 // (levels - 1))
    return Image.fromarray(pixels.astype(np.uint8))


def round_trip(image: Image.Image, quality: int) -> torch.Tensor:
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=quality)
    return to_planes(Image.open(buffer))


def to_planes(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def largest_difference(first: torch.Tensor, second: torch.Tensor) -> int:
    return int((first.int() - second.int()).abs().max())


def test_tiles_lie_row_by_row_with_the_thumbnail_last() -> None:
    image = noise(48, 32)
    tiles = cut_tiles(image, DYNAMIC)
    assert tiles.shape == (7, 3, 16, 16)
    assert tiles.dtype == torch.uint8
    pixels = to_planes(image)
    for number in range(6):
        row, column = divmod(number, 3)
        crop = pixels[:, row * 16 : row * 16 + 16, column * 16 : column * 16 + 16]
        assert torch.equal(tiles[number], crop)
    assert torch.equal(tiles[6], to_planes(image.resize((16, 16), Image.Resampling.BICUBIC)))


@pytest.mark.parametrize("is_fast", [False, True])
@given(st.integers(8, 300), st.integers(8, 300))
def test_as_many_tiles_are_cut_as_the_rule_counts(is_fast: bool, width: int, height: int) -> None:
    image = Image.new("RGB", (width, height), "red")
    for tiling in (DYNAMIC, STATIC):
        tiles = cut_tiles(image, tiling, is_fast=is_fast)
        assert len(tiles) == tiling.count_tiles(width, height)
        assert tiles[:, 0].min() == 255
        assert tiles[:, 1:].max() == 0


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("levels", [2, 256])
def test_pixels_equal_those_of_transformers(size: tuple[int, int], levels: int) -> None:
    image = noise(*size, levels=levels)
    processor = GotOcr2ImageProcessorPil(
        size={"height": 56, "width": 56}, crop_to_patches=True, min_patches=1, max_patches=12, resample=3
    )
    expected = processor(images=[image], do_rescale=False, do_normalize=False, return_tensors="pt")["pixel_values"]
    assert torch.equal(cut_tiles(image, WHOLE), expected)


def test_normalised_pixels_equal_those_of_transformers() -> None:
    image = noise(200, 100)
    processor = GotOcr2ImageProcessorPil(
        size={"height": 56, "width": 56},
        crop_to_patches=True,
        max_patches=12,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    expected = processor(images=[image], return_tensors="pt")["pixel_values"]
    assert torch.allclose(normalise(cut_tiles(image, WHOLE), "siglip", torch.float32), expected, atol=1e-6)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("levels", [2, 256])
def test_the_fast_path_is_within_two_levels_of_the_default(size: tuple[int, int], levels: int) -> None:
    image = noise(*size, levels=levels)
    for tiling in (WHOLE, STATIC):
        assert largest_difference(cut_tiles(image, tiling), cut_tiles(image, tiling, is_fast=True)) <= 2


def test_the_fast_path_begins_with_the_pass_that_pillow_begins_with() -> None:
    # Both sides of the border at which Pillow changes the order: twice as many rows lost as columns.
    for width, height in itertools.product((112, 113, 120, 140), (112, 113, 114, 128, 129, 168, 169, 170)):
        image = noise(width, height, levels=2)
        tiling = Tiling(112, 1, 1, use_thumbnail=False, is_dynamic=False)
        difference = largest_difference(cut_tiles(image, tiling), cut_tiles(image, tiling, is_fast=True))
        assert difference <= 2, (width, height)


def test_a_draft_shows_the_same_picture() -> None:
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((1600, 1200)).convert("RGB").save(buffer, format="JPEG")
    whole = cut_tiles(load_image(buffer.getvalue(), "a.jpg"), WHOLE)
    draft = cut_tiles(load_image(buffer.getvalue(), "a.jpg", draft_for=WHOLE), WHOLE, is_fast=True)
    assert draft.shape == whole.shape
    assert largest_difference(draft, whole) <= 3


@pytest.mark.parametrize("is_fast", [False, True])
def test_one_quality_degrades_the_whole_picture_before_it_is_cut(is_fast: bool) -> None:
    image = noise(48, 32)
    tiles = cut_tiles(image, DYNAMIC, jpeg_quality=80, is_fast=is_fast)
    expected = round_trip(image, 80)
    for number in range(6):
        row, column = divmod(number, 3)
        crop = expected[:, row * 16 : row * 16 + 16, column * 16 : column * 16 + 16]
        assert torch.equal(tiles[number], crop)
    thumbnail = cut_tiles(image, STATIC, is_fast=is_fast)[0]
    assert torch.equal(tiles[6], round_trip(Image.fromarray(thumbnail.permute(1, 2, 0).contiguous().numpy()), 80))


@pytest.mark.parametrize("is_fast", [False, True])
def test_a_quality_for_each_tile_degrades_tile_by_tile_as_the_original_does(is_fast: bool) -> None:
    image = noise(48, 32)
    qualities = [75, 80, 85, 90, 95, 100, 77]
    tiles = cut_tiles(image, DYNAMIC, jpeg_quality=qualities, is_fast=is_fast)
    plain = cut_tiles(image, DYNAMIC, is_fast=is_fast)
    for tile, crop, quality in zip(tiles, plain, qualities, strict=True):
        assert torch.equal(tile, round_trip(Image.fromarray(crop.permute(1, 2, 0).contiguous().numpy()), quality))


def test_a_quality_too_few_is_refused() -> None:
    with pytest.raises(ArgumentError, match="6 JPEG qualities for 7 tiles"):
        cut_tiles(noise(48, 32), DYNAMIC, jpeg_quality=[90] * 6)


def test_a_quality_is_drawn_by_the_key_and_the_tile() -> None:
    drawn = [draw_jpeg_quality(f"1/0/pets:{number}/0") for number in range(2000)]
    assert drawn == [draw_jpeg_quality(f"1/0/pets:{number}/0") for number in range(2000)]
    assert set(drawn) == set(range(75, 101))
    for other in ("2/0/pets:{}/0", "1/1/pets:{}/0", "1/0/pets:{}/1"):
        assert [draw_jpeg_quality(other.format(number)) for number in range(50)] != drawn[:50]
    by_tile = [draw_jpeg_quality("1/0/pets:1/0", tile=tile) for tile in range(50)]
    assert len(set(by_tile)) > 10
    assert by_tile == [draw_jpeg_quality("1/0/pets:1/0", tile=tile) for tile in range(50)]


def test_a_padded_image_is_one_tile_with_the_mean_at_its_borders() -> None:
    padded = pad_to_square(noise(32, 16), "siglip")
    tiles = cut_tiles(padded, STATIC)
    assert len(tiles) == 1
    assert normalise(tiles, "siglip", torch.float32)[:, :, 0].abs().max() < 0.01


def test_no_tile_shares_memory_with_another_image() -> None:
    image = noise(48, 32)
    first = cut_tiles(image, DYNAMIC)
    kept = first.clone()
    cut_tiles(noise(48, 32, levels=2), DYNAMIC).fill_(0)
    assert torch.equal(first, kept)
    assert first.is_contiguous()


@pytest.mark.parametrize(
    ("normalize_type", "black", "white"),
    [
        ("imagenet", [-2.1179, -2.0357, -1.8044], [2.2489, 2.4286, 2.6400]),
        ("clip", [-1.7923, -1.7521, -1.4802], [1.9303, 2.0749, 2.1459]),
        ("siglip", [-1.0, -1.0, -1.0], [1.0, 1.0, 1.0]),
    ],
)
def test_normalised_pixels_have_the_published_range(
    normalize_type: str, black: list[float], white: list[float]
) -> None:
    tiles = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 2, 2)
    low, high = normalise(tiles, normalize_type, torch.float32)[:, :, 0, 0]
    assert torch.allclose(low, torch.tensor(black), atol=1e-4)
    assert torch.allclose(high, torch.tensor(white), atol=1e-4)
    assert normalise(tiles, normalize_type, torch.bfloat16).dtype == torch.bfloat16


def test_an_unknown_normalisation_is_refused() -> None:
    with pytest.raises(ArgumentError, match="normalize_type: 'mean'"):
        normalise(torch.zeros((1, 3, 2, 2), dtype=torch.uint8), "mean", torch.float32)


def test_an_animation_gives_tiles_of_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (40, 20), colour) for colour in ("red", "blue")]
    for file_format in ("GIF", "WEBP"):
        path = tmp_path / file_format
        frames[0].save(path, format=file_format, save_all=True, append_images=frames[1:], lossless=True)
        tiles = cut_tiles(load_image(path.read_bytes(), file_format), DYNAMIC)
        assert tiles[:, 0].float().mean() > 250
        assert tiles[:, 2].float().mean() < 5
