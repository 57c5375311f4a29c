"""Videos as a few of their frames: which ones, and how they are read.

A video is a file in any of the usual containers, a gif, or a folder of pictures (a name ending
in "/"). Frame `i` is what is shown in the middle of the `i`-th of equal intervals, so a variable
rate is read by its time stamps. How many frames a record takes depends on the record alone, so
that the index knows its length; which ones, on the key of the caller. Imports neither torch nor PyAV.
"""

import hashlib
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Literal, Self

from internvl_core.errors import ArgumentError, DataError, MediaError, Reason

if TYPE_CHECKING:
    from PIL import Image

    from internvl_core.data.media_root import MediaRoot

_PICTURES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
_FPS = re.compile(r"fps(\d+(?:\.\d+)?)")


@dataclass(frozen=True)
class FrameSampling:
    """How frames are picked."""

    method: Literal["uniform", "middle", "fps"]
    """Of each of equal intervals one frame at random, or the middle one; or one every 1/fps seconds."""
    fps: float | None
    """Frames per second; None unless the method is fps."""
    min_frames: int
    max_frames: int

    def __post_init__(self) -> None:
        if not 1 <= self.min_frames <= self.max_frames:
            raise ArgumentError(
                f"min_num_frame {self.min_frames}, max_num_frame {self.max_frames}: must be 1 <= min <= max."
            )

    @classmethod
    def parse(cls, text: str, min_frames: int, max_frames: int) -> Self:
        """Read `uniform`, `middle`, or `fps` with a rate, as in `fps0.5`.

        Raises:
            ArgumentError: none of them, or bounds that exclude every number.
        """
        if text == "uniform":
            return cls("uniform", None, min_frames, max_frames)
        if text == "middle":
            return cls("middle", None, min_frames, max_frames)
        found = _FPS.fullmatch(text)
        if not found or not 0 < float(found[1]) < math.inf:
            raise ArgumentError(f"video_sampling: {text!r}, must be uniform, middle or fpsX with X > 0, such as fps1.")
        return cls("fps", float(found[1]), min_frames, max_frames)


@dataclass(frozen=True)
class VideoInfo:
    """What is known of a video, or of the clip of it that a record names."""

    num_frames: int
    fps: float | None
    """Mean rate; None for a folder of pictures, which has no times."""
    width: int
    """Of the first picture, in px, by the header; a file's rotation is applied to its frames only."""
    height: int
    start_s: float = 0.0
    """Time stamp of the start of the video, or of the clip."""


def probe_video(root: "MediaRoot", name: str, clip: tuple[float, float] | None = None) -> VideoInfo:
    """Find out what a video, or a clip of it, has to give; decodes nothing.

    Args:
        clip: from and to, in seconds from the start; None for all of it.

    Raises:
        MediaError: missing, no video, damaged, too large, or shorter than the clip.
        DataError: a clip of a folder, or one that ends before it starts.
    """
    if clip is not None and not 0 <= clip[0] < clip[1]:
        raise DataError(f"clip [{clip[0]:g}, {clip[1]:g}] must be 0 <= from < to, in seconds.")
    if name.endswith("/"):
        return _probe_folder(root, name, clip)
    from internvl_core.data.video_source import open_video
    from internvl_core.data.video_timeline import measure_timeline

    with root.open(name) as file, open_video(file, name) as source:
        width, height = source.size
        timeline = measure_timeline(source)
    if clip is None:
        return VideoInfo(timeline.num_frames, timeline.fps, width, height, timeline.start_s)
    start, end = clip
    # To the frame: the end of a clip is often rounded up from the video's own.
    if start >= timeline.duration_s or end > timeline.duration_s + 1 / timeline.fps:
        raise MediaError(f"{name}: clip [{start:g}, {end:g}] s, but it lasts {timeline.duration_s:.2f} s.")
    shown_s = min(end, timeline.duration_s) - start
    # A millionth of a frame: bounds such as 1.1 s fall short of the frame they mean.
    num_frames = max(1, math.floor(shown_s * timeline.fps + 1e-6))
    return VideoInfo(num_frames, timeline.fps, width, height, timeline.start_s + start)


def count_frames(info: VideoInfo, sampling: FrameSampling, *, key: str) -> int:
    """Count the frames that a record takes: at most those there are, none twice.

    The original repeats the last frame of a short video up to the number wanted; here the record is
    shorter instead.

    Args:
        key: the record's own name; draws the number between the bounds unless the method is fps.
    """
    if sampling.method == "fps":
        wanted = max(_count_regular(info, sampling), sampling.min_frames)
    else:
        span = sampling.max_frames - sampling.min_frames + 1
        wanted = sampling.min_frames + _draw(f"{key}/frames", span)
    return min(wanted, sampling.max_frames, info.num_frames)


def choose_frames(info: VideoInfo, sampling: FrameSampling, *, count: int, key: str) -> list[int]:
    """Choose that many different frames, ascending.

    Raises:
        MediaError: there are fewer.
    """
    if not 1 <= count <= info.num_frames:
        raise MediaError(
            f"{count} frames wanted of {info.num_frames}. Was the video changed after it was indexed?",
            reason=Reason.SIZE_MISMATCH,
        )
    if sampling.method == "fps" and count == _count_regular(info, sampling):
        assert sampling.fps is not None
        step = (info.fps or sampling.fps) / sampling.fps
        return [math.floor((number + 0.5) * step) for number in range(count)]
    bounds = [number * info.num_frames // count for number in range(count + 1)]
    if sampling.method == "uniform":
        return [
            bounds[number] + _draw(f"{key}/{number}", bounds[number + 1] - bounds[number]) for number in range(count)
        ]
    return [(bounds[number] + bounds[number + 1] - 1) // 2 for number in range(count)]


def iter_frames(
    root: "MediaRoot",
    name: str,
    info: VideoInfo,
    sampling: FrameSampling,
    *,
    count: int,
    key: str,
    clip: tuple[float, float] | None = None,
) -> "Iterator[Image.Image]":
    """Yield the chosen frames as RGB images, upright; one at a time, because 32 frames of 4K are 0.8 GB.

    If all frames of a whole video are wanted, each picture of it is given once. Else a picture that
    is shown for long may be that of two frames.

    Args:
        info: of this video and this clip.
        key: seed, epoch and record; draws the frames where the method is uniform.

    Raises:
        MediaError: damaged, too large, or not what `info` says.
    """
    chosen = choose_frames(info, sampling, count=count, key=key)
    if name.endswith("/"):
        yield from _iter_pictures(root, name, chosen)
        return
    from internvl_core.data.video_reader import VideoReader
    from internvl_core.data.video_source import open_video

    assert info.fps is not None
    times = [(number + 0.5) / info.fps for number in chosen]
    with root.open(name) as file, open_video(file, name) as source:
        if count == info.num_frames and clip is None:
            images = list(itertools.islice(VideoReader(source).iter_all(), count + 1))
            if len(images) == count:
                yield from images
                return
            source.reopen()
        yield from VideoReader(source).iter_shown(times, start_s=info.start_s, frame_s=1 / info.fps)


def _count_regular(info: VideoInfo, sampling: FrameSampling) -> int:
    """Count frames at the middles of intervals of 1/fps seconds, possibly none; of a folder, all."""
    if info.fps is None or sampling.fps is None:
        return info.num_frames
    return math.ceil(info.num_frames / info.fps * sampling.fps - 0.5)


def _draw(key: str, span: int) -> int:
    """Draw a number below `span`, the same on every machine."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]) % span


def _probe_folder(root: "MediaRoot", name: str, clip: tuple[float, float] | None) -> VideoInfo:
    # Brings Pillow along, which an index of texts can do without.
    from internvl_core.data.media import read_image_size

    if clip is not None:
        raise DataError(f"clip of {name}: a folder of pictures has no times. Name a file, or leave clip out.")
    pictures = _list_pictures(root, name)
    with root.open(pictures[0]) as file:
        width, height = read_image_size(file, pictures[0])
    return VideoInfo(len(pictures), None, width, height)


def _iter_pictures(root: "MediaRoot", name: str, chosen: Sequence[int]) -> "Iterator[Image.Image]":
    from internvl_core.data.media import load_image

    pictures = _list_pictures(root, name)
    for number in chosen:
        with root.open(pictures[number]) as file:
            yield load_image(file, pictures[number])


def _list_pictures(root: "MediaRoot", name: str) -> list[str]:
    pictures = [path for path in root.list_files(name) if path.lower().endswith(_PICTURES)]
    if not pictures:
        raise MediaError(f"{name}: holds no pictures ({' '.join(_PICTURES)}).", reason=Reason.MISSING)
    return sorted(pictures, key=_frame_number)


def _frame_number(path: str) -> tuple[int, str]:
    """Sort by the number at the end of the stem; pictures without one come first."""
    found = re.search(r"(\d+)$", PurePosixPath(path).stem)
    return (int(found[1]) if found else -1), path
