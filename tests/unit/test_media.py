import errno
import io
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from image_files import damaged, encode, many_scans, noise, png_chunk, png_of, sixteen_bits, with_exif
from PIL import Image

from internvl_core.data.media import MAX_PIXELS, load_image, pad_to_square, read_image_size
from internvl_core.data.tiling import Tiling
from internvl_core.errors import ArgumentError, MediaError, OutOfMemory, Reason, StoreUnavailable

TILING = Tiling(16, 1, 6, use_thumbnail=True, is_dynamic=True)
# As in a motion photo; compressed, it may hold the marks of a JPEG by the thousand.
FILM = b"\0\0\0\x18ftypmp42" + b"\xff\xda\0\x02" * 1000


def exif_jpeg(directory: bytes) -> bytes:
    """A JPEG that lies on its side (96 x 64), with this after the head of its EXIF."""
    return encode(noise(96, 64), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0" + directory)


def entries(*tags: bytes) -> bytes:
    return struct.pack("<H", len(tags)) + b"".join(tags) + bytes(4)


def entry(tag: int, kind: int, count: int, value: int) -> bytes:
    return struct.pack("<HHII", tag, kind, count, value)


def cut_directory(tiff: bytes) -> bytes:
    """Move the directory of a TIFF to its end, and cut off the last three entries."""
    start = struct.unpack("<I", tiff[4:8])[0]
    end = start + 2 + 12 * struct.unpack("<H", tiff[start : start + 2])[0]
    return tiff[:4] + struct.pack("<I", len(tiff)) + tiff[8:] + tiff[start : end - 36]


def with_marks(jpeg: bytes) -> bytes:
    """Put a mark that decoders pass over before each scan but the first, with what would be a length of 64 KiB."""
    first, *others = jpeg.split(b"\xff\xda")[1:]
    scans = b"".join(b"\xff\x01\xff\xff\xff\xda" + scan for scan in others)
    return jpeg[: jpeg.index(b"\xff\xda") + 2] + first + scans


SIDEWAYS = entry(0x0112, 3, 1, 6)
PNG, JPEG = encode(noise()), encode(noise(), "JPEG")
SMOOTH_PNG = encode(Image.linear_gradient("L"))
COLOURS = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]

REFUSED: dict[str, tuple[Callable[[], bytes], Reason]] = {
    "zero bytes": (lambda: b"", Reason.MEDIA),
    "half a JPEG": (lambda: JPEG[: len(JPEG) // 2], Reason.MEDIA),
    "a JPEG without its last two bytes": (lambda: JPEG[:-2], Reason.MEDIA),
    "a JPEG header": (lambda: JPEG[:200], Reason.MEDIA),
    "half a PNG": (lambda: PNG[: len(PNG) // 2], Reason.MEDIA),
    "a PNG header": (lambda: PNG[:40], Reason.MEDIA),
    "a wrong checksum of PNG pixels": (lambda: damaged(PNG, PNG.index(b"IEND") - 5), Reason.MEDIA),
    "a bit flipped in a PNG body": (lambda: damaged(SMOOTH_PNG, SMOOTH_PNG.index(b"IDAT") + 29), Reason.MEDIA),
    "a PNG without its end": (lambda: PNG[:-12], Reason.MEDIA),
    "a wrong checksum of a PNG header": (lambda: damaged(PNG, 30), Reason.MEDIA),
    "an error page": (lambda: b"<html><title>404 Not Found</title></html>", Reason.MEDIA),
    "text": (lambda: b"a cat on a mat\n" * 9, Reason.MEDIA),
    "float TIFF": (lambda: encode(Image.new("F", (16, 16), 0.5), "TIFF"), Reason.MEDIA),
    "NaN TIFF": (lambda: encode(Image.new("F", (16, 16), float("nan")), "TIFF"), Reason.MEDIA),
    "32-bit TIFF": (lambda: encode(Image.new("I", (16, 16), 70_000), "TIFF"), Reason.MEDIA),
    "half a TIFF": (lambda: encode(noise(), "TIFF")[:6000], Reason.MEDIA),
    "half a WEBP": (lambda: encode(noise(), "WEBP")[:600], Reason.MEDIA),
    "half a GIF": (lambda: encode(noise(), "GIF")[:1000], Reason.MEDIA),
    "one pixel": (lambda: encode(Image.new("RGB", (1, 1))), Reason.MEDIA_SIZE),
    "a tracking pixel": (lambda: encode(Image.new("P", (1, 1)), "GIF"), Reason.MEDIA_SIZE),
    "seven pixels high": (lambda: encode(Image.new("RGB", (100, 7))), Reason.MEDIA_SIZE),
    "a column": (lambda: encode(Image.new("RGB", (1, 20_000))), Reason.MEDIA_SIZE),
    "a row": (lambda: encode(Image.new("RGB", (20_000, 1))), Reason.MEDIA_SIZE),
    "201 times as wide as high": (lambda: encode(Image.new("RGB", (8 * 201, 8))), Reason.MEDIA_SIZE),
    "144 megapixels": (lambda: png_of(12_000, 12_000, bits=1), Reason.MEDIA_SIZE),
    "400 megapixels": (lambda: png_of(20_000, 20_000, bits=1), Reason.MEDIA_SIZE),
    "2^31 - 1 pixels wide": (lambda: png_of((1 << 31) - 1, (1 << 31) - 1), Reason.MEDIA_SIZE),
    "5 MB of compressed comment": (
        lambda: png_of(16, 16, before_pixels=png_chunk(b"zTXt", b"c\0\0" + zlib.compress(bytes(5_000_000)))),
        Reason.MEDIA,
    ),
    "EPS": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\n%%EndComments\n", Reason.MEDIA),
    "PDF": (lambda: encode(noise(), "PDF"), Reason.MEDIA),
    "SVG": (lambda: b'<svg xmlns="http://www.w3.org/2000/svg" width="40" height="40"/>', Reason.MEDIA),
    "icon": (lambda: encode(noise(), "ICO"), Reason.MEDIA),
    "2000 scans": (lambda: many_scans(2000), Reason.MEDIA_SIZE),
    "2000 scans before a film": (lambda: many_scans(2000) + FILM, Reason.MEDIA_SIZE),
    "2000 scans, each behind a mark that is passed over": (lambda: with_marks(many_scans(2000)), Reason.MEDIA_SIZE),
    "a TIFF without the end of its directory": (lambda: cut_directory(encode(noise(), "TIFF")), Reason.MEDIA),
}

# What a file becomes: its size, and the colour in its upper left corner.
ACCEPTED: dict[str, tuple[Callable[[], bytes], tuple[int, int], tuple[int, int, int] | None]] = {
    "a PNG by another name": (lambda: PNG, (64, 64), None),
    "a bit flipped in a JPEG body": (lambda: damaged(JPEG, len(JPEG) - 100), (64, 64), None),
    "sideways by EXIF": (lambda: with_exif(6), (64, 96), None),
    "a sideways PNG": (lambda: with_exif(8, file_format="PNG"), (64, 96), None),
    "a sideways WEBP": (lambda: with_exif(5, file_format="WEBP"), (64, 96), None),
    "a sideways TIFF": (lambda: with_exif(6, file_format="TIFF"), (64, 96), None),
    "upside down by EXIF": (lambda: with_exif(3), (96, 64), None),
    "EXIF orientation 99": (lambda: with_exif(99), (96, 64), None),
    "CMYK": (lambda: encode(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "TIFF"), (16, 16), (255, 0, 0)),
    "CMYK JPEG": (lambda: encode(Image.new("CMYK", (16, 16)), "JPEG"), (16, 16), (255, 255, 255)),
    "grey": (lambda: encode(Image.new("L", (16, 16), 77)), (16, 16), (77, 77, 77)),
    "one bit": (lambda: encode(Image.new("1", (16, 16), 1)), (16, 16), (255, 255, 255)),
    "palette": (lambda: encode(COLOURS[0].convert("P")), (16, 16), (255, 0, 0)),
    "transparent palette": (lambda: encode(Image.new("P", (16, 16)), transparency=0), (16, 16), (255, 255, 255)),
    "transparent grey": (lambda: encode(Image.new("LA", (16, 16), (0, 0))), (16, 16), (255, 255, 255)),
    "transparent over black": (lambda: encode(Image.new("RGBA", (16, 16), (0, 0, 0, 0))), (16, 16), (255, 255, 255)),
    "half transparent": (lambda: encode(Image.new("RGBA", (16, 16), (255, 0, 0, 128))), (16, 16), (255, 127, 127)),
    "16 bits": (lambda: encode(Image.fromarray(sixteen_bits(4096, 65535))), (16, 8), (16, 16, 16)),
    "16 bits in TIFF": (lambda: encode(Image.fromarray(sixteen_bits(4096, 0)), "TIFF"), (16, 8), (16, 16, 16)),
    "16 bits in PGM": (lambda: b"P5 16 8 65535\n" + sixteen_bits(4096, 0).astype(">u2").tobytes(), (16, 8), (16,) * 3),
    "16 bits, one grey transparent": (
        lambda: png_of(16, 16, bits=16, before_pixels=png_chunk(b"tRNS", b"\0\0")),
        (16, 16),
        (255, 255, 255),
    ),
    "animated GIF": (
        lambda: encode(COLOURS[0], "GIF", save_all=True, append_images=COLOURS[1:]),
        (16, 16),
        (255, 0, 0),
    ),
    "animated WEBP": (
        lambda: encode(COLOURS[0], "WEBP", save_all=True, append_images=COLOURS[1:], lossless=True),
        (16, 16),
        (255, 0, 0),
    ),
    "TIFF of several pages": (
        lambda: encode(COLOURS[0], "TIFF", save_all=True, append_images=COLOURS[1:]),
        (16, 16),
        (255, 0, 0),
    ),
    "EXIF cut short": (lambda: exif_jpeg(b"\xff\xff" + SIDEWAYS[:9]), (96, 64), None),
    "EXIF that is none": (lambda: encode(noise(96, 64), "JPEG", exif=b"Exif\0\0garbage!"), (96, 64), None),
    "EXIF of nothing": (lambda: encode(noise(96, 64), "JPEG", exif=b"Exif\0\0II"), (96, 64), None),
    "sideways, with two resolutions": (
        lambda: exif_jpeg(entries(SIDEWAYS, entry(0x0128, 3, 2, 2))),
        (64, 96),
        None,
    ),
    "sideways, with a tag larger than the file": (
        lambda: exif_jpeg(entries(entry(0x010E, 2, 1 << 30, 100), SIDEWAYS)),
        (64, 96),
        None,
    ),
    "an orientation that is text": (lambda: exif_jpeg(entries(entry(0x0112, 2, 4, 6))), (96, 64), None),
    "a PNG with EXIF that is none": (
        lambda: png_of(16, 8, before_pixels=png_chunk(b"eXIf", b"garbage!")),
        (16, 8),
        (0, 0, 0),
    ),
    "a PNG with a bad count of pictures": (
        lambda: png_of(16, 8, before_pixels=png_chunk(b"acTL", bytes(8))),
        (16, 8),
        (0, 0, 0),
    ),
    "a JPEG before a film": (lambda: JPEG + FILM, (64, 64), None),
    "a JPEG with marks of scans in a comment": (
        lambda: encode(noise(), "JPEG", comment=b"\xff\xda" * 200),
        (64, 64),
        None,
    ),
    "100 scans": (lambda: many_scans(100 - many_scans(0).count(b"\xff\xda")), (64, 64), (128, 128, 128)),
    "8 pixels": (lambda: encode(Image.new("RGB", (8, 8), "red")), (8, 8), (255, 0, 0)),
    "200 times as wide as high": (lambda: encode(Image.new("RGB", (1600, 8), "red")), (1600, 8), (255, 0, 0)),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_sound_image_is_refused_with_its_name_and_reason(kind: str) -> None:
    build, reason = REFUSED[kind]
    with pytest.raises(MediaError, match=r"^pets/a\.jpg: ") as caught:
        load_image(build(), "pets/a.jpg")
    assert caught.value.reason == reason
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "kind", [kind for kind in REFUSED if REFUSED[kind][1] == Reason.MEDIA_SIZE and "scans" not in kind]
)
def test_a_header_alone_shows_an_absurd_size(kind: str) -> None:
    build, _ = REFUSED[kind]
    with pytest.raises(MediaError, match=r"^pets/a\.jpg: ") as caught:
        read_image_size(build()[:500], "pets/a.jpg")
    assert caught.value.reason == Reason.MEDIA_SIZE


@pytest.mark.parametrize("kind", ACCEPTED)
def test_every_sound_image_becomes_rgb_of_the_size_its_header_promised(kind: str) -> None:
    build, size, corner = ACCEPTED[kind]
    image = load_image(build(), "a.jpg")
    assert (image.mode, image.size) == ("RGB", size)
    if corner is not None:
        assert image.getpixel((0, 0)) == corner
    assert read_image_size(build(), "a.jpg") == size


def test_eight_orientations_show_the_same_picture() -> None:
    upright = np.array(noise(40, 24))
    stored = {1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1]}
    stored |= {5: upright.transpose(1, 0, 2), 6: np.rot90(upright), 7: upright[::-1, ::-1].transpose(1, 0, 2)}
    stored |= {8: np.rot90(upright, -1)}
    for orientation, pixels in stored.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        content = encode(Image.fromarray(np.ascontiguousarray(pixels)), exif=exif)
        assert np.array_equal(np.array(load_image(content, "a.png")), upright), orientation


def test_an_orientation_behind_the_pixels_of_a_png_is_honoured() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encode(noise(96, 64))
    late = png_chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0"))
    end = content.index(b"IEND") - 4
    assert load_image(content[:end] + late + content[end:], "a.png").size == (64, 96)


def test_a_header_is_read_without_the_pixels() -> None:
    for content in (JPEG[:700], PNG[:60], encode(noise(), "GIF")[:800]):
        assert read_image_size(content, "a") == (64, 64)


def test_the_largest_image_allowed_is_read_and_one_row_more_is_not() -> None:
    width = 9000
    height = MAX_PIXELS // width
    assert read_image_size(png_of(width, height, bits=1), "a.png") == (width, height)
    with pytest.raises(MediaError, match="megapixels"):
        read_image_size(png_of(width, height + 1, bits=1), "a.png")


def test_a_camera_file_that_lost_its_second_picture_is_read() -> None:
    content = encode(noise(), "MPO", save_all=True, append_images=[noise()])
    first = content[: content.index(b"\xff\xd9") + 2]
    assert load_image(first, "a.jpg").size == (64, 64)


def test_an_image_is_read_from_an_open_file_too(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(PNG)
    with (tmp_path / "a.png").open("rb") as file:
        assert read_image_size(file, "a.png") == (64, 64)
        file.seek(0)
        assert np.array_equal(np.array(load_image(file, "a.png")), np.array(noise()))


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.webp"
    path.write_bytes(encode(noise(), "WEBP"))
    with path.open("r+b") as file:
        file.truncate(1 << 40)
    for read in (load_image, read_image_size):
        with path.open("rb") as file, pytest.raises(MediaError, match=r"^a\.webp: 1099511627776 bytes") as caught:
            read(file, "a.webp")
        assert caught.value.reason == Reason.MEDIA_SIZE


def test_an_outage_while_reading_is_not_taken_for_a_broken_image() -> None:
    class Outage(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            raise StoreUnavailable("s3://bucket/a.jpg does not answer.")

    for read in (load_image, read_image_size):
        with pytest.raises(StoreUnavailable):
            read(Outage(JPEG), "a.jpg")


@pytest.mark.parametrize(
    "error", [OSError(errno.EIO, "Input/output error"), OSError(errno.ESTALE, "Stale"), MemoryError()]
)
@pytest.mark.parametrize("num_good_reads", [0, 1])
def test_a_disk_that_fails_is_not_taken_for_a_broken_image(error: Exception, num_good_reads: int) -> None:
    class Failing(io.BytesIO):
        num_reads = 0

        def read(self, size: int | None = -1, /) -> bytes:
            self.num_reads += 1
            if self.num_reads > num_good_reads:
                raise error
            return super().read(100)

    expected = OutOfMemory if isinstance(error, MemoryError) else StoreUnavailable
    for content in (JPEG, encode(noise(), "TIFF")):
        with pytest.raises(expected, match=r"^Reading pets/a\.jpg failed: "):
            read_image_size(Failing(content), "pets/a.jpg")
    if not num_good_reads:
        with pytest.raises(expected, match=r"^Reading pets/a\.jpg failed: "):
            load_image(Failing(JPEG), "pets/a.jpg")


@pytest.mark.parametrize("content", [b"", JPEG[:100], PNG[:20], encode(noise(), "TIFF")[:20], b"text" * 99])
def test_a_broken_image_in_an_open_file_is_not_taken_for_a_disk_that_fails(content: bytes) -> None:
    for read in (load_image, read_image_size):
        with pytest.raises(MediaError, match=r"^pets/a\.jpg: cannot be decoded"):
            read(io.BytesIO(content), "pets/a.jpg")


def test_filters_of_warnings_decide_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    sound, huge = exif_jpeg(b"\xff\xff" + SIDEWAYS[:9]), png_of(12_000, 12_000, bits=1)
    for set_filter in (
        warnings.resetwarnings,
        lambda: warnings.simplefilter("ignore"),
        lambda: warnings.simplefilter("error"),
        lambda: warnings.simplefilter("always"),
    ):
        with warnings.catch_warnings():
            set_filter()
            assert load_image(sound, "a.jpg").size == read_image_size(sound, "a.jpg") == (96, 64)
            for read in (load_image, read_image_size):
                with pytest.raises(MediaError) as caught:
                    read(huge, "a.png")
                assert caught.value.reason == Reason.MEDIA_SIZE
    assert capfd.readouterr() == ("", "")


def test_comments_of_a_file_do_not_travel_with_its_pixels() -> None:
    assert load_image(encode(noise(), "JPEG", comment=b"c" * 1000), "a.jpg").info == {}


@pytest.mark.parametrize("size", [(200, 130), (133, 257), (1001, 333)])
@pytest.mark.parametrize("orientation", [1, 6])
def test_a_draft_is_smaller_but_covers_the_canvas_and_has_as_many_tiles(
    size: tuple[int, int], orientation: int
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encode(noise(*size), "JPEG", exif=exif)
    full = load_image(content, "a.jpg")
    draft = load_image(content, "a.jpg", draft_for=TILING)
    grid = TILING.choose_grid(*full.size)
    assert full.size == (size if orientation == 1 else size[::-1])
    assert draft.width < full.width
    assert TILING.choose_grid(*draft.size) == grid
    assert draft.width >= 16 * grid[0]
    assert draft.height >= 16 * grid[1]


def test_a_draft_that_would_not_cover_the_canvas_is_not_taken() -> None:
    content = encode(noise(48, 32), "JPEG")
    draft = load_image(content, "a.jpg", draft_for=TILING)
    assert np.array_equal(np.array(draft), np.array(load_image(content, "a.jpg")))


@pytest.mark.parametrize(
    ("normalize_type", "background"),
    [("imagenet", (123, 116, 103)), ("clip", (122, 116, 104)), ("siglip", (127, 127, 127))],
)
def test_an_image_is_centred_on_a_square_of_the_mean_colour(
    normalize_type: str, background: tuple[int, int, int]
) -> None:
    image = noise(9, 4)
    square = np.array(pad_to_square(image, normalize_type))
    assert square.shape == (9, 9, 3)
    assert np.array_equal(square[2:6], np.array(image))
    assert {tuple(pixel) for pixel in np.concatenate([square[:2], square[6:]]).reshape(-1, 3).tolist()} == {background}
    upright = np.array(pad_to_square(image.transpose(Image.Transpose.TRANSPOSE), normalize_type))
    assert np.array_equal(upright, square.transpose(1, 0, 2))


def test_a_square_is_not_padded() -> None:
    image = noise(9, 9)
    assert pad_to_square(image, "siglip") is image


def test_an_unknown_mean_is_refused() -> None:
    with pytest.raises(ArgumentError, match="normalize_type: 'mean'"):
        pad_to_square(noise(9, 4), "mean")
