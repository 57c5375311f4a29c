"""When a video begins, when it ends and how many frames it has, without decoding any.

No header is believed about the end: the last packets are looked at, because a length that is wrong
is found out only after the index has counted on it.
"""

import math
from dataclasses import dataclass

from internvl_core.data.video_source import VideoSource

MAX_FPS = 1000
KEYFRAME_INTERVAL_S = 10.0
"""Where there is no index, a keyframe is expected at least this often: encoders' limit is 250 frames or so."""

# What may be missing of the length that a header states: this share of it, and at least these seconds.
_MISSING_SHARE, _MISSING_S = 0.1, 1.0


@dataclass(frozen=True)
class Timeline:
    """When a video shows something."""

    num_frames: int
    start_s: float
    """Time stamp of the first picture; not every container begins at 0."""
    duration_s: float
    """From the first picture to the end of the last."""

    @property
    def fps(self) -> float:
        """Mean rate; where the rate is constant, that."""
        return self.num_frames / self.duration_s


def measure_timeline(source: VideoSource) -> Timeline:
    """Measure a video that has just been opened; leaves it at its end.

    Raises:
        MediaError: it has no pictures, was cut short, or its rate cannot be.
    """
    # Taken down now: the tail may need the file opened anew, and a stream does not outlive its container.
    stated_frames, stated = source.stream.frames, source.stated_duration_s
    rate = float(source.stream.average_rate or 0)
    index = source.stream.index_entries
    if len(index) and index[-1].pos + index[-1].size > source.size_bytes:
        source.refuse(f"has {source.size_bytes} bytes, but its index points beyond. It was cut short")
    start = _find_start(source)
    tail = _read_tail(source, frame_s=1 / rate if rate else 0.0)
    if tail.latest_s - start < min(stated * (1 - _MISSING_SHARE), stated - _MISSING_S):
        source.refuse(f"ends after {tail.latest_s - start:.2f} s, but should last {stated:.2f} s. It was cut short")
    duration = tail.end_s - start
    num_frames = stated_frames or _estimate_frames(tail, start, rate)
    if num_frames == 1:
        return Timeline(1, start, duration if duration > 0 else 1.0)
    if num_frames > duration * MAX_FPS:
        source.refuse(f"{num_frames} frames in {duration:g} s; at most {MAX_FPS} a second are read")
    return Timeline(num_frames, start, duration)


def _estimate_frames(tail: "_Tail", start: float, rate: float) -> int:
    """Count the frames where the tail is all of the video, else go by the rate: that of the header or of the tail."""
    if tail.first_s <= start or not (rate or tail.end_s > tail.first_s):
        return tail.num_pictures
    rate = rate or tail.num_pictures / (tail.end_s - tail.first_s)
    return max(tail.num_pictures, round((tail.end_s - start) * rate))


def _find_start(source: VideoSource) -> float:
    for packet in source.container.demux(source.stream):
        if packet.is_keyframe and packet.pts is not None:
            # An edit list hides what comes before the stream's start.
            return source.to_seconds(max(packet.pts, source.stream.start_time or packet.pts))
    source.refuse("holds no picture that a video can start with")


@dataclass(frozen=True)
class _Tail:
    """What the packets from some point to the end of the file say."""

    num_pictures: int
    first_s: float
    """Earliest time stamp of a picture."""
    end_s: float
    """When the last picture ends."""
    latest_s: float
    """When the last packet of any stream ends."""


def _read_tail(source: VideoSource, *, frame_s: float) -> _Tail:
    """Read the last packets, or all where the container cannot seek.

    Args:
        frame_s: how long a picture lasts of which the container does not say it.
    """
    import av

    stream = source.stream
    last = source.to_seconds(stream.start_time or 0)
    last += source.to_seconds(stream.duration or 0) or source.stated_duration_s
    if len(stream.index_entries):
        last = max(last, source.to_seconds(stream.index_entries[-1].timestamp))
    for back_s in (0.0, KEYFRAME_INTERVAL_S) if source.has_exact_seek else ():
        try:
            source.container.seek(source.to_stamp(last - back_s), stream=stream)
        except av.FFmpegError:
            continue
        if found := _read_to_end(source, frame_s):
            return found
    source.reopen()
    return _read_to_end(source, frame_s) or source.refuse("holds no picture")


def _read_to_end(source: VideoSource, frame_s: float) -> _Tail | None:
    starts, ends, latest = [], [], -math.inf
    for packet in source.container.demux():
        stamp = packet.dts if packet.pts is None else packet.pts
        if stamp is None or not packet.size:
            continue
        start = float(stamp * packet.time_base)
        end = start + float((packet.duration or 0) * packet.time_base)
        if packet.stream_index == source.stream.index:
            end = end if packet.duration else start + frame_s
            starts.append(start)
            ends.append(end)
        latest = max(latest, end)
    return _Tail(len(starts), min(starts), max(ends), latest) if starts else None
