import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from internvl_core.data.media import cut_tiles, draw_jpeg_quality, find_image, load_image, normalise, read_image_size
from internvl_core.data.tiling import Tiling
from internvl_core.errors import ArgumentError, MediaError

DYNAMIC = Tiling(16, 1, 6, use_thumbnail=True, is_dynamic=True)


def noise(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def png_bytes(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def test_tiles_lie_row_by_row_with_the_thumbnail_last() -> None:
    image = noise(48, 32)
    tiles = cut_tiles(image, DYNAMIC)
    assert tiles.shape == (7, 3, 16, 16)
    assert tiles.dtype == torch.uint8
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    for number in range(6):
        row, column = divmod(number, 3)
        crop = pixels[:, row * 16 : row * 16 + 16, column * 16 : column * 16 + 16]
        assert torch.equal(tiles[number], crop)
    thumbnail = torch.from_numpy(np.array(image.resize((16, 16), Image.Resampling.BICUBIC))).permute(2, 0, 1)
    assert torch.equal(tiles[6], thumbnail)


@pytest.mark.parametrize("size", [(48, 32), (10, 200), (16, 16), (33, 31)])
def test_as_many_tiles_are_cut_as_the_rule_counts(size: tuple[int, int]) -> None:
    assert len(cut_tiles(noise(*size), DYNAMIC)) == DYNAMIC.count_tiles(*size)


def test_a_jpeg_round_trip_changes_pixels_but_not_the_picture() -> None:
    gradient = Image.linear_gradient("L").resize((48, 32)).convert("RGB")
    plain, degraded = cut_tiles(gradient, DYNAMIC).float(), cut_tiles(gradient, DYNAMIC, jpeg_quality=75).float()
    assert not torch.equal(plain, degraded)
    assert (plain - degraded).abs().mean() < 4


def test_a_quality_is_drawn_per_seed_epoch_sample_and_image() -> None:
    def draw(**changes: object) -> int:
        key: dict[str, object] = {"seed": 1, "epoch": 0, "sample_id": "pets:1", "image_index": 0, **changes}
        return draw_jpeg_quality(**key)  # type: ignore[arg-type]

    assert draw() == draw()
    drawn = [draw(sample_id=f"pets:{number}") for number in range(2000)]
    assert set(drawn) == set(range(75, 101))
    for name in ("seed", "epoch", "image_index"):
        assert [draw(sample_id=f"pets:{n}", **{name: 7}) for n in range(50)] != drawn[:50]


def test_an_image_is_turned_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "a.jpg"
    noise(96, 64).save(path, exif=exif)
    assert load_image(path).size == (64, 96)
    assert read_image_size(path) == (64, 96)


def test_transparency_lies_over_white(tmp_path: Path) -> None:
    for mode, hidden in (("RGBA", (0, 0, 0, 0)), ("LA", (0, 0))):
        path = tmp_path / f"{mode}.png"
        Image.new(mode, (4, 4), hidden).save(path)
        assert load_image(path).getpixel((0, 0)) == (255, 255, 255)


def test_sixteen_bits_are_rescaled_and_not_clipped(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(np.array([[0, 4096, 65535]], dtype=np.uint16)).save(path)
    image = load_image(path)
    assert [image.getpixel((x, 0)) for x in range(3)] == [(0,) * 3, (16,) * 3, (255,) * 3]


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK"])
def test_other_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "a.tiff"
    Image.new("RGB", (4, 4), "white").convert(mode).save(path)
    assert load_image(path).mode == "RGB"
    assert load_image(path).getpixel((0, 0)) == (255, 255, 255)


def test_the_first_frame_stands_for_an_animation(tmp_path: Path) -> None:
    path = tmp_path / "a.gif"
    Image.new("RGB", (4, 4), "red").save(path, save_all=True, append_images=[Image.new("RGB", (4, 4), "blue")])
    assert load_image(path).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"<html>404</html>",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n",
        png_bytes(noise(64, 64))[:5000],
        png_bytes(noise(64, 64))[:40],
        png_bytes(noise(64, 64)).replace(b"IDAT", b"IDAT\xff", 1),
    ],
    ids=["empty", "html", "eps", "half", "header", "damaged"],
)
def test_a_file_that_does_not_decode_completely_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with pytest.raises(MediaError, match=r"a\.png: cannot be decoded"):
        load_image(path)


def test_a_decompression_bomb_is_refused_before_it_unfolds(tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    Image.new("1", (12_000, 12_000)).save(path)
    with pytest.raises(MediaError, match=r"bomb\.png: .*Decompression"):
        load_image(path)
    with pytest.raises(MediaError, match=r"bomb\.png: .*Decompression"):
        read_image_size(path)


def test_an_image_without_a_range_of_brightness_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tiff"
    Image.new("F", (4, 4), 0.5).save(path)
    with pytest.raises(MediaError, match=r"a\.tiff: mode F"):
        load_image(path)


def test_nothing_outside_the_root_is_opened(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    noise(4, 4).save(tmp_path / "outside.png")
    (root / "link.png").symlink_to(tmp_path / "outside.png")
    with pytest.raises(MediaError, match="outside the dataset's root"):
        find_image(root, "link.png")
    os.mkfifo(root / "fifo.png")
    with pytest.raises(MediaError, match="not a regular file"):
        find_image(root, "fifo.png")
    with pytest.raises(MediaError, match="no such image"):
        find_image(root, "missing.png")


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
