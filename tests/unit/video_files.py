"""Videos that tests make on the spot: small, and their pictures say which frames they are."""

import io
import random
import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.stream import Disposition
from PIL import Image

from internvl_core.data.media_root import MediaRoot
from internvl_core.data.video import FrameSampling, count_frames, iter_frames, probe_video

SHADE = 6
"""Frame i is grey, of brightness SHADE * i: the pictures of a video say which frames they are."""


def make_video(
    container: str = "mp4",
    codec: str = "libx264",
    *,
    times: Sequence[int] = range(40),
    fps: int = 10,
    size: tuple[int, int] = (32, 32),
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
) -> bytes:
    """Encode a video, a keyframe at least every 8 frames.

    Args:
        times: of each frame, in 1/fps s.
        size: width and height.
    """
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container, container_options=container_options) as output:
        stream: Any = output.add_stream(codec, rate=fps, options=options or {})
        stream.width, stream.height = size
        stream.pix_fmt = {"mjpeg": "yuvj420p", "apng": "rgb24", "gif": "rgb8"}.get(codec, "yuv420p")
        stream.codec_context.gop_size = 8
        stream.codec_context.bit_rate = 1_000_000
        stream.codec_context.time_base = Fraction(1, fps)
        for number, shown_at in enumerate(times):
            shade = SHADE * number % 256
            frame = to_frame(Image.new("RGB", size, (shade, shade, shade)))
            frame.pts, frame.time_base = shown_at, Fraction(1, fps)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return buffer.getvalue()


def make_growing_video() -> bytes:
    """Make a video whose pictures grow from 32 x 32 to 64 x 48 in the middle."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as output:
        stream: Any = output.add_stream("mjpeg", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuvj420p"
        other: Any = av.CodecContext.create("mjpeg", "w")
        other.width, other.height, other.pix_fmt, other.time_base = 64, 48, "yuvj420p", Fraction(1, 10)
        for number in range(20):
            encoder, size = (stream, (32, 32)) if number < 10 else (other, (64, 48))
            frame = to_frame(Image.new("RGB", size))
            frame.pts, frame.time_base = number, Fraction(1, 10)
            for packet in encoder.encode(frame):
                packet.stream = stream
                output.mux(packet)
    return buffer.getvalue()


def make_gif(path: Path, durations_ms: Sequence[int]) -> None:
    frames = [Image.new("RGB", (32, 32), (SHADE * number,) * 3) for number in range(len(durations_ms))]
    frames[0].save(path, format="gif", save_all=True, append_images=frames[1:], duration=list(durations_ms))


def make_noise(container: str, codec: str, *, num_frames: int, options: dict[str, str] | None = None) -> bytes:
    """Encode a video with much in its pictures, each of which leans on the one before."""
    noise, buffer = random.Random(0), io.BytesIO()
    with av.open(buffer, "w", format=container) as output:
        stream: Any = output.add_stream(codec, rate=10, options=options or {})
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.codec_context.gop_size = 20
        for number in range(num_frames):
            # Stripes, turned: noise through and through would make every frame a keyframe in all but name.
            picture = Image.frombytes("RGB", (64, 64), noise.randbytes(64 * 3) * 64).rotate(7 * number)
            output.mux(stream.encode(to_frame(picture)))
        output.mux(stream.encode())
    return buffer.getvalue()


def to_frame(image: Image.Image) -> av.VideoFrame:
    return av.VideoFrame.from_ndarray(np.asarray(image))


def read_number(image: Image.Image) -> int:
    """Tell which frame a picture is."""
    grey = image.resize((1, 1)).getpixel((0, 0))
    assert isinstance(grey, tuple)
    return round(grey[0] / SHADE)


def every(min_frames: int, max_frames: int | None = None, method: str = "middle") -> FrameSampling:
    return FrameSampling.parse(method, min_frames, max_frames or min_frames)


def load_numbers(
    root: MediaRoot, name: str, sampling: FrameSampling, *, key: str = "0", clip: tuple[float, float] | None = None
) -> list[int]:
    info = probe_video(root, name, clip)
    count = count_frames(info, sampling, key=key)
    frames = list(iter_frames(root, name, info, sampling, count=count, key=key, clip=clip))
    return [read_number(frame) for frame in frames]


def patch(body: bytes, place: slice, value: bytes) -> bytes:
    patched = bytearray(body)
    patched[place] = value
    return bytes(patched)


def patch_box(body: bytes, box: bytes, offset: int, value: bytes) -> bytes:
    """Overwrite part of the first mp4 box of that name; the offset counts from after the name."""
    start = body.index(box) + 4 + offset
    return patch(body, slice(start, start + len(value)), value)


def patch_duration(duration_s: float) -> bytes:
    """Make a Matroska file of four seconds whose header says otherwise."""
    body = make_video("matroska")
    duration = body.index(b"\x44\x89\x88") + 3
    return patch(body, slice(duration, duration + 8), struct.pack(">d", duration_s * 1000))


def make_audio(*, has_cover: bool = False) -> bytes:
    """Encode a moment of silence, with or without a picture of the record."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as output:
        stream = output.add_stream("aac", rate=8000)
        cover: Any = output.add_stream("png") if has_cover else None
        if cover:
            cover.width, cover.height, cover.pix_fmt, cover.disposition = 32, 32, "rgb24", Disposition.attached_pic
        frame = av.AudioFrame(format="fltp", layout="mono", samples=1024)
        frame.sample_rate = 8000
        frame.planes[0].update(bytes(4096))
        output.mux([*stream.encode(frame), *stream.encode(None)])
        if cover:
            output.mux(cover.encode(to_frame(Image.new("RGB", (32, 32)))))
    return buffer.getvalue()


def make_empty_video() -> bytes:
    """An mp4 whose track has no frame."""
    body = make_video(times=range(1))
    body = patch_box(body, b"stsz", 8, bytes(4))
    body = patch_box(body, b"stts", 4, bytes(4))
    body = patch_box(body, b"stsc", 4, bytes(4))
    return patch_box(body, b"stco", 4, bytes(4))
