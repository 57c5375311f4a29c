"""An open video file: found to be one, and read within limits.

Whether a video is good hangs on what can be counted, its bytes, pictures and pixels, and never on how
busy the machine is: what takes too long by the clock is tried again.

libav is made to believe as little as can be: only the usual containers, none that opens other
files, and no picture that a decoder had to mend. PyAV is imported when a file is opened; it
keeps libav's log off.
"""

import errno
import io
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import TYPE_CHECKING, BinaryIO, NoReturn

from internvl_core.errors import InternVLError, MediaError, OutOfMemory, Reason, StoreUnavailable

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.stream import VideoStream

MAX_FILE_BYTES = 16 << 30
MAX_FRAME_PIXELS = 7680 * 4320
"""Width times height; 8K."""
MAX_DURATION_S = 24 * 3600

# For all that is done with a file from opening to closing it.
MAX_READS = 8
"""How often its bytes may be read, beside `MAX_EXTRA_BYTES`; two looks at the end and two runs through are usual."""
MAX_EXTRA_BYTES = 1 << 30
"""For jumps: libav reads some ten blocks of 32 KiB for each, however small the file."""
MAX_DECODED_FRAMES = 200_000
"""Two hours at 25 a second: a file that cannot be jumped in is decoded from its beginning."""
MAX_DECODED_PIXELS = 100_000_000_000
"""32 frames of 4K with keyframes 10 s apart are 80 billion; on one core of 2020 three minutes or so."""
TIME_LIMIT_S = 600.0
"""The last resort, against a store that trickles."""

# Playlists and image sequences are not among them: those would open other files.
_CONTAINERS = (
    "mov,mp4,m4a,3gp,3g2,mj2",
    "matroska,webm",
    *("apng", "asf", "avi", "dv", "flv", "gif", "ivf", "mpeg", "mpegts", "mxf", "nut", "ogg", "rm", "yuv4mpegpipe"),
)
_OPTIONS = {
    "format_whitelist": ",".join(_CONTAINERS),
    "protocol_whitelist": "none",
    "max_pixels": str(MAX_FRAME_PIXELS),
}
_DECODER_OPTIONS = {"max_pixels": str(MAX_FRAME_PIXELS)}
# Most decoders mark a picture that they mended; this one has to be told to refuse it.
_STRICT_OPTIONS = {"mjpeg": {"err_detect": "explode"}}
# Several pictures share a time stamp there, and libav guesses them anew from where it is.
_INEXACT_SEEK = ("mpeg",)


@contextmanager
def open_video(file: BinaryIO, name: str) -> "Iterator[VideoSource]":
    """Open a video; the file stays the caller's to close.

    Args:
        name: what messages call it.

    Raises:
        MediaError: no video, damaged, or beyond a limit of this module; from within the `with` block too.
        StoreUnavailable: the disk or the store failed while it was read, or it was not read in time.
    """
    import av

    guarded = _GuardedFile(file, name)
    try:
        source = VideoSource(guarded, name)
        try:
            yield source
        finally:
            source.container.close()
    except (av.FFmpegError, ArithmeticError, LookupError, MemoryError, ValueError) as error:
        guarded.check()
        told = error.strerror if isinstance(error, av.FFmpegError) else error
        raise MediaError(f"{name}: cannot be read as a video: {type(error).__name__}: {told}.") from None
    except MediaError:
        guarded.check()
        raise
    guarded.check()


class VideoSource:
    """The first video stream of an open file; made by `open_video`."""

    container: "InputContainer"
    stream: "VideoStream"

    def __init__(self, file: "_GuardedFile", name: str) -> None:
        self._file = file
        self._name = name
        self._num_decoded_frames = 0
        self._num_decoded_pixels = 0
        self._open()

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in px by the header, not turned upright."""
        return self.stream.codec_context.width, self.stream.codec_context.height

    @property
    def size_bytes(self) -> int:
        return self._file.size_bytes

    @property
    def has_exact_seek(self) -> bool:
        """Whether time stamps stay the same after a jump."""
        return self.container.format.name not in _INEXACT_SEEK

    @property
    def stated_duration_s(self) -> float:
        """How long the header says that the file lasts; 0 where it does not say."""
        return (self.container.duration or 0) / 1e6

    def reopen(self) -> None:
        """Go to the beginning; not every container can seek there."""
        self.container.close()
        self._file.seek(0)
        self._open()

    def check_time(self) -> None:
        """Count a picture that was decoded, and check that there may be another.

        Raises:
            MediaError: too many were decoded for the few that are wanted.
            StoreUnavailable: the time is up.
        """
        self._num_decoded_frames += 1
        self._num_decoded_pixels += math.prod(self.size)
        if self._num_decoded_frames > MAX_DECODED_FRAMES or self._num_decoded_pixels > MAX_DECODED_PIXELS:
            self.refuse(
                f"{self._num_decoded_frames} pictures of {self.size[0]} x {self.size[1]} px were decoded for those "
                f"wanted; at most {MAX_DECODED_FRAMES}, or {MAX_DECODED_PIXELS / 1e9:g} billion px, are. "
                "Cut it, lower its resolution, or give it more keyframes",
                Reason.MEDIA_SIZE,
            )
        self._file.check_time()

    def to_seconds(self, stamp: int) -> float:
        return float(stamp * self._time_base)

    def to_stamp(self, seconds: float) -> int:
        return math.floor(seconds / self._time_base)

    def refuse(self, problem: str, reason: Reason = Reason.MEDIA) -> NoReturn:
        """Raise a MediaError with the name of the file."""
        raise MediaError(f"{self._name}: {problem}.", reason=reason)

    def _open(self) -> None:
        import av

        container = av.open(self._file, mode="r", options=_OPTIONS, metadata_errors="replace")
        self.container = container
        # Nothing else in a gif says how many pictures there should be.
        if container.format.name == "gif" and not self._file.read_end().rstrip(b"\0").endswith(b";"):
            self.refuse("has no end mark. It was cut short")
        cover = av.stream.Disposition.attached_pic
        streams = [stream for stream in container.streams.video if not stream.disposition & cover]
        if not streams:
            self.refuse("holds no video")
        self.stream = streams[0]
        self._time_base = self.stream.time_base or Fraction(1)
        context = self.stream.codec_context
        if context is None:
            self.refuse("there is no decoder for its codec")
        if not 0 < context.width * context.height <= MAX_FRAME_PIXELS:
            self.refuse(
                f"{context.width} x {context.height} px; at most {MAX_FRAME_PIXELS} px are read", Reason.MEDIA_SIZE
            )
        if self.stated_duration_s > MAX_DURATION_S:
            self.refuse(f"lasts {self.stated_duration_s:g} s; at most {MAX_DURATION_S} s are read", Reason.MEDIA_SIZE)
        # Loader workers are processes already: threads of theirs would fight over the same cores.
        context.thread_count = 1
        context.options = {**_DECODER_OPTIONS, **_STRICT_OPTIONS.get(context.name, {})}


class _GuardedFile:
    """What libav reads through: ends where a limit is reached, and keeps what the file itself complains of.

    Nothing is raised within a callback, where libav may pass over it; `check` raises it afterwards.
    """

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._file = file
        self._name = name
        self._deadline = time.monotonic() + TIME_LIMIT_S
        self._error: InternVLError | None = None
        self._num_read_bytes = 0
        self.size_bytes = file.seek(0, io.SEEK_END)
        file.seek(0)
        if self.size_bytes > MAX_FILE_BYTES:
            raise MediaError(
                f"{name}: {self.size_bytes} bytes; at most {MAX_FILE_BYTES} are read.", reason=Reason.MEDIA_SIZE
            )

    def check(self) -> None:
        """Raise what stopped the reading.

        Raises:
            MediaError: too much was read.
            StoreUnavailable: the disk or the store failed, or the time is up.
        """
        if self._error is not None:
            raise self._error

    def check_time(self) -> None:
        """Raise what stopped the reading, or should now."""
        if self._error is None and time.monotonic() > self._deadline:
            self._error = StoreUnavailable(
                f"{self._name}: not read within {TIME_LIMIT_S:g} s. The store or the machine is too busy: lower "
                "dataloader_num_workers, or bring the files nearer."
            )
        self.check()

    def read(self, size: int) -> bytes:
        try:
            self.check_time()
            body = self._file.read(size)
            self._num_read_bytes += len(body)
            if self._num_read_bytes > MAX_READS * self.size_bytes + MAX_EXTRA_BYTES:
                raise MediaError(
                    f"{self._name}: {self._num_read_bytes} bytes were read of a file of {self.size_bytes}. "
                    "Its index is damaged, or missing: write it anew.",
                    reason=Reason.MEDIA_SIZE,
                )
        except InternVLError as error:
            self._error = error
        except MemoryError:
            self._error = OutOfMemory(f"Reading {self._name}: no memory left. Lower dataloader_num_workers.")
        except OSError as error:
            self._error = StoreUnavailable(f"Reading {self._name}: {type(error).__name__}: {error}.")
        else:
            return body
        return b""

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._file.tell(), io.SEEK_END: self.size_bytes}[whence]
        # A damaged index points anywhere; libav takes a negative answer for the error that it is.
        if not 0 <= base + offset <= self.size_bytes:
            return -errno.EINVAL
        return self._file.seek(base + offset)

    def read_end(self) -> bytes:
        """Read the last few bytes, and leave the file where it was."""
        position = self._file.tell()
        self._file.seek(max(0, self.size_bytes - 64))
        end = self.read(64)
        self._file.seek(position)
        return end

    def tell(self) -> int:
        return self._file.tell()
