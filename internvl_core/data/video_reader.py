"""The pictures of an open video: decoded in order, from a keyframe at or before what is wanted.

Which picture is shown at a time never depends on how the reader got there, by a jump or by decoding
all that comes before.
"""

import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from PIL import Image

from internvl_core.data.video_source import VideoSource
from internvl_core.data.video_timeline import KEYFRAME_INTERVAL_S

if TYPE_CHECKING:
    from av import VideoFrame

_FIRST_JUMP_S = 1.0

_UPRIGHT = {90: Image.Transpose.ROTATE_90, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_270}


class VideoReader:
    """Pictures of a video that has just been opened; reads once, forward."""

    def __init__(self, source: VideoSource) -> None:
        self._source = source
        self._frames: Iterator[VideoFrame] | None = None
        """None before anything is decoded."""
        self._shown: VideoFrame | None = None
        """Latest picture at or before the time that was asked for."""
        self._ahead: VideoFrame | None = None
        """The picture after it, if there is one."""
        self._can_seek = source.has_exact_seek
        self._has_jumped = False
        self._size: tuple[int, int] | None = None

    def iter_all(self) -> Iterator[Image.Image]:
        """Yield every picture once.

        Raises:
            MediaError: one is damaged.
        """
        return (self._to_image(frame) for frame in self._decode())

    def iter_shown(self, times_s: Iterable[float], *, start_s: float, frame_s: float) -> Iterator[Image.Image]:
        """Yield, for each of ascending times, the picture that is shown then; a lasting one more than once.

        Args:
            times_s: from the start of the video.
            start_s: time stamp of the start.
            frame_s: how much the last picture may fall short of a time.

        Raises:
            MediaError: damaged on the way, or at its end before a time.
        """
        for time_s in times_s:
            due = start_s + time_s
            self._reach(due, start_s)
            picture = self._shown or self._ahead
            if picture is None:
                self._source.refuse("holds no picture that can be decoded")
            if self._ahead is None and due >= self._end_of(picture) + frame_s:
                self._source.refuse(f"its pictures end before {time_s:.2f} s. It was cut short")
            yield self._to_image(picture)

    @property
    def _position(self) -> float:
        """Up to where is decoded, by the time stamps."""
        return math.inf if self._ahead is None else self._time_of(self._ahead)

    def _should_seek(self, due: float, position: float) -> bool:
        if due <= position or not self._can_seek:
            return False
        index = self._source.stream.index_entries
        keyframe = index.search_timestamp(self._source.to_stamp(due)) if len(index) else -1
        is_nearer = keyframe >= 0 and self._source.to_seconds(index[keyframe].timestamp) > position
        # Some containers read their index no sooner than at the first jump.
        return is_nearer or due - position > (KEYFRAME_INTERVAL_S if self._has_jumped else _FIRST_JUMP_S)

    def _reach(self, due: float, start_s: float) -> None:
        """Decode up to the time, from the nearest keyframe before it or from where the reader is."""
        position = start_s if self._frames is None else self._position
        if self._should_seek(due, position):
            self._jump(due, position)
        elif self._frames is None:
            self._start()
        self._advance(due)

    def _jump(self, due: float, position: float) -> None:
        """Go to a keyframe at or before the time."""
        import av

        self._has_jumped = True
        for back_s in (0.0, KEYFRAME_INTERVAL_S):
            try:
                self._source.container.seek(self._source.to_stamp(due - back_s), stream=self._source.stream)
            except av.FFmpegError:
                continue
            self._start()
            if self._position <= due:
                # Some containers always go back to their beginning; once is enough.
                self._can_seek = self._position > position or due - position <= KEYFRAME_INTERVAL_S
                return
        self._can_seek = False
        self._source.reopen()
        self._start()

    def _start(self) -> None:
        self._frames = self._decode()
        self._shown, self._ahead = None, next(self._frames, None)

    def _advance(self, due: float) -> None:
        assert self._frames is not None
        while self._ahead is not None and self._time_of(self._ahead) <= due:
            self._shown, self._ahead = self._ahead, next(self._frames, None)

    def _decode(self) -> "Iterator[VideoFrame]":
        is_entered = False
        for packet in self._source.container.demux(self._source.stream):
            # Some containers jump to any packet; what is before a keyframe leans on pictures that were not read.
            is_entered = is_entered or packet.is_keyframe
            if not is_entered:
                continue
            if packet.is_corrupt:
                self._source.refuse("is damaged")
            for frame in packet.decode():
                self._source.check_time()
                if frame.is_corrupt:
                    self._source.refuse("is damaged")
                if frame.pts is None:
                    self._source.refuse("its pictures have no time stamps")
                yield frame

    def _time_of(self, frame: "VideoFrame") -> float:
        assert frame.pts is not None
        return self._source.to_seconds(frame.pts)

    def _end_of(self, frame: "VideoFrame") -> float:
        return self._time_of(frame) + self._source.to_seconds(frame.duration or 0)

    def _to_image(self, frame: "VideoFrame") -> Image.Image:
        """Convert to RGB, transparency over white, upright.

        Raises:
            MediaError: not of the size of the pictures before.
        """
        size = (frame.width, frame.height)
        if self._size not in (None, size):
            self._source.refuse(f"its pictures change from {self._size} to {size} px in the middle")
        self._size = size
        # One thread: a process that is forked from here would wait forever for others when it frees the frame.
        if any(component.is_alpha for component in frame.format.components):
            image = Image.fromarray(frame.to_ndarray(format="rgba", threads=1))
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
        else:
            image = Image.fromarray(frame.to_ndarray(format="rgb24", threads=1))
        turn = _UPRIGHT.get(frame.rotation % 360)
        return image if turn is None else image.transpose(turn)
