"""Bad pictures and videos, and odd ones that are good."""

import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bad_cases import GOOD, Line, Outcome, Write, bad_sample, left_out, show_image, show_video
from image_files import damaged, encode, many_scans, noise, png_chunk, png_of, sixteen_bits, with_exif
from PIL import Image
from video_files import (
    make_audio,
    make_empty_video,
    make_growing_video,
    make_noise,
    make_video,
    patch,
    patch_box,
    patch_duration,
)

from internvl_core.data import video_source
from internvl_core.data.media_root import MAX_FILE_BYTES
from internvl_core.errors import Reason

PNG, JPEG = encode(noise()), encode(noise(), "JPEG")
COLOURS = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\n%%EndComments\n(secret/secret.txt) run\n"
SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="40" height="40"><image href="../secret/secret.png"/></svg>'
WEB_PAGE = b"<!DOCTYPE html><html><title>404 Not Found</title></html>\n" * 50
COMMENT = png_chunk(b"zTXt", b"c\0\0" + zlib.compress(bytes(5_000_000)))

NO_IMAGE = left_out(Reason.MEDIA, "begins like none of")
BAD_HEADER = left_out(Reason.MEDIA, "cannot be decoded")
BAD_PIXELS = bad_sample(Reason.MEDIA, "cannot be decoded")
NO_RANGE = bad_sample(Reason.MEDIA, "no defined range of brightness")
ABSURD = left_out(Reason.MEDIA_SIZE, "px|megapixels")


def animate(file_format: str) -> bytes:
    return encode(COLOURS[0], file_format, save_all=True, append_images=COLOURS[1:])


def flat(
    mode: str, colour: Any = 0, file_format: str = "PNG", size: tuple[int, int] = (16, 16), **options: Any
) -> bytes:
    return encode(Image.new(mode, size, colour), file_format, **options)


def show_bytes(build: Callable[[], bytes], suffix: str = ".jpg") -> Write:
    def write(folder: Path, stem: str) -> Line:
        (folder / f"{stem}{suffix}").write_bytes(build())
        return show_image(f"{stem}{suffix}")

    return write


def show_sparse(start: bytes, size_bytes: int, show: Callable[[str], Line]) -> Write:
    """Write the beginning of a file that is much longer."""

    def write(folder: Path, stem: str) -> Line:
        (folder / f"{stem}.sparse").write_bytes(start)
        os.truncate(folder / f"{stem}.sparse", size_bytes)
        return show(f"{stem}.sparse")

    return write


_FILES: dict[str, tuple[Callable[[], bytes], Outcome]] = {
    "49 zero bytes": (lambda: b"", NO_IMAGE),
    "50 half a JPEG": (lambda: JPEG[: len(JPEG) // 2], BAD_PIXELS),
    "51 JPEG without its last two bytes": (lambda: JPEG[:-2], BAD_PIXELS),
    "52 a JPEG's header": (lambda: JPEG[:200], BAD_HEADER),
    "53 half a PNG": (lambda: PNG[: len(PNG) // 2], BAD_PIXELS),
    "54 checksum of a PNG's pixels": (lambda: damaged(PNG, len(PNG) // 2), BAD_PIXELS),
    "55 checksum of a PNG's header": (lambda: damaged(PNG, 30), BAD_HEADER),
    # Nothing but a digest of the file could tell.
    "56 a bit flipped in a JPEG's body": (lambda: damaged(JPEG, len(JPEG) - 100), GOOD),
    "57 web page": (lambda: WEB_PAGE, NO_IMAGE),
    "58 text": (lambda: b"not found\n", NO_IMAGE),
    "59 PNG by another name": (lambda: PNG, GOOD),
    "60 sideways by EXIF": (lambda: with_exif(6), GOOD),
    "60 sideways TIFF": (lambda: with_exif(6, file_format="TIFF"), GOOD),
    "60 sideways PNG": (lambda: with_exif(6, file_format="PNG"), GOOD),
    "60 sideways WEBP": (lambda: with_exif(6, file_format="WEBP"), GOOD),
    "61 EXIF orientation 99": (lambda: with_exif(99), GOOD),
    "62 CMYK": (lambda: flat("CMYK", file_format="JPEG"), GOOD),
    "63 grey": (lambda: flat("L", 77), GOOD),
    "63 one bit": (lambda: flat("1", 1), GOOD),
    "63 grey, transparent": (lambda: flat("LA", (0, 0)), GOOD),
    "63 palette, transparent": (lambda: flat("P", transparency=0), GOOD),
    "64 transparent over black": (lambda: flat("RGBA", (0, 0, 0, 0)), GOOD),
    "65 16 bits": (lambda: encode(Image.fromarray(sixteen_bits(4096, 65535))), GOOD),
    "66 float TIFF": (lambda: flat("F", 0.5, "TIFF"), NO_RANGE),
    "66 NaN TIFF": (lambda: flat("F", float("nan"), "TIFF"), NO_RANGE),
    "67 animated GIF": (lambda: animate("GIF"), GOOD),
    "67 animated WEBP": (lambda: animate("WEBP"), GOOD),
    "68 TIFF of two pages": (lambda: animate("TIFF"), GOOD),
    "69 one pixel": (lambda: flat("RGB", size=(1, 1)), ABSURD),
    "69 a column": (lambda: flat("RGB", size=(1, 20_000)), ABSURD),
    "69 a row": (lambda: flat("RGB", size=(20_000, 1)), ABSURD),
    "70 144 megapixels": (lambda: png_of(12_000, 12_000, bits=1), ABSURD),
    "71 400 megapixels": (lambda: png_of(20_000, 20_000, bits=1), ABSURD),
    "72 2^31 - 1 pixels wide": (lambda: png_of((1 << 31) - 1, (1 << 31) - 1), ABSURD),
    "73 5 MB of compressed comment": (lambda: png_of(16, 16, before_pixels=COMMENT), BAD_HEADER),
    "74 EPS": (lambda: EPS, NO_IMAGE),
    "74 PDF": (lambda: encode(noise(), "PDF"), NO_IMAGE),
    "74 SVG": (lambda: SVG, NO_IMAGE),
    "icon": (lambda: encode(noise(), "ICO"), NO_IMAGE),
    "half a GIF": (lambda: encode(noise(), "GIF")[:1000], BAD_PIXELS),
    "half a TIFF": (lambda: encode(noise(), "TIFF")[:6000], BAD_PIXELS),
    "half a WEBP": (lambda: encode(noise(), "WEBP")[:600], BAD_HEADER),
    "scans by the thousand": (lambda: many_scans(2000), bad_sample(Reason.MEDIA_SIZE, "scans; at most")),
}
IMAGES: dict[str, tuple[Write, Outcome]] = {
    **{name: (show_bytes(build), outcome) for name, (build, outcome) in _FILES.items()},
    "a terabyte of JPEG": (
        show_sparse(JPEG, 1 << 40, show_image),
        left_out(Reason.MEDIA_SIZE, f"more than {MAX_FILE_BYTES >> 20} MiB"),
    ),
    "a size that is not the picture's": (
        lambda *_: show_image("good.png", width=16, height=16),
        bad_sample(Reason.SIZE_MISMATCH, "width and height"),
    ),
}


# --- videos


def erase_pictures() -> bytes:
    """A video of which the index is whole, and the pictures of the first moments."""
    body = make_noise("mp4", "libx264", num_frames=20)
    end = body.rindex(b"moov") - 4
    pictures = slice(end // 3, end)
    return patch(body, pictures, bytes(pictures.stop - pictures.start))


def show_video_bytes(build: Callable[[], bytes], **content: Any) -> Write:
    def write(folder: Path, stem: str) -> Line:
        (folder / f"{stem}.mp4").write_bytes(build())
        return show_video(f"{stem}.mp4", **content)

    return write


def show_frames(*pictures: bytes) -> Write:
    def write(folder: Path, stem: str) -> Line:
        (folder / stem).mkdir()
        for number, picture in enumerate(pictures):
            (folder / stem / f"{number}.png").write_bytes(picture)
        return show_video(f"{stem}/")

    return write


PLAYLIST = b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n../secret/secret.mp4\n#EXT-X-ENDLIST\n"
CONCAT = b"ffconcat version 1.0\nfile ../secret/secret.mp4\n"
MPD = (
    b'<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"><Period><AdaptationSet>'
    b"<Representation><BaseURL>../secret/secret.mp4</BaseURL></Representation></AdaptationSet></Period></MPD>"
)
RATE_IN_A_MILLION = (20_000_000).to_bytes(4)
GIF_SIZE = slice(6, 10)

NO_VIDEO = left_out(Reason.MEDIA, "cannot be read as a video|holds no")
VIDEOS: dict[str, tuple[Write, Outcome]] = {
    "75 empty video": (show_video_bytes(lambda: b""), NO_VIDEO),
    "76 moov missing": (show_video_bytes(lambda: make_video()[:2000]), NO_VIDEO),
    "77 no frame": (show_video_bytes(make_empty_video), left_out(Reason.MEDIA, "no picture|no video|cannot be read")),
    "77 one frame": (show_video_bytes(lambda: make_video(times=range(1))), GOOD),
    "78 no time between frames": (
        show_video_bytes(lambda: patch_box(make_video(), b"stts", 12, bytes(4))),
        left_out(Reason.MEDIA, "should last"),
    ),
    "78 a million frames a second": (
        show_video_bytes(lambda: patch_box(make_video(), b"mdhd", 12, RATE_IN_A_MILLION)),
        left_out(Reason.MEDIA, "at most 1000 a second"),
    ),
    "79 a million seconds": (show_video_bytes(lambda: patch_duration(1e6)), left_out(Reason.MEDIA_SIZE, "lasts")),
    "80 audio only": (show_video_bytes(make_audio), left_out(Reason.MEDIA, "holds no video")),
    "81 the size changes": (
        show_video_bytes(make_growing_video),
        bad_sample(Reason.MEDIA, "change from .* px in the middle"),
    ),
    "82 4 gigapixels": (
        show_video_bytes(lambda: patch(make_video("gif", "gif"), GIF_SIZE, b"\xff" * 4)),
        left_out(Reason.MEDIA_SIZE, "px are read"),
    ),
    "82 a terabyte": (
        show_sparse(make_video(times=range(8)), 1 << 40, show_video),
        left_out(Reason.MEDIA_SIZE, f"at most {video_source.MAX_FILE_BYTES} are read"),
    ),
    "erased pictures": (show_video_bytes(erase_pictures), bad_sample(Reason.MEDIA)),
    "a playlist of a file outside": (show_video_bytes(lambda: PLAYLIST), NO_VIDEO),
    "a list of a file outside": (show_video_bytes(lambda: CONCAT), NO_VIDEO),
    "a manifest of a file outside": (show_video_bytes(lambda: MPD), NO_VIDEO),
    "a web page as video": (show_video_bytes(lambda: WEB_PAGE), NO_VIDEO),
    "a clip beyond the end": (
        show_video_bytes(make_video, clip=[1, 99]),
        left_out(Reason.MEDIA, r"clip \[1, 99\] s, but it lasts 4"),
    ),
    "a folder without frames": (show_frames(), left_out(Reason.MISSING, "holds no pictures")),
    "a broken first frame": (show_frames(b"", PNG), left_out(Reason.MEDIA, "begins like none")),
    "a broken second frame": (show_frames(PNG, b""), bad_sample(Reason.MEDIA, "begins like none")),
}
