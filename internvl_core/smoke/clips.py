"""The smoke videos: a few pictures, one after the other, as an mp4."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

FRAMES_PER_PICTURE = 4
_FPS = 4


def write_clip(path: Path, pictures: Sequence[Image.Image]) -> None:
    """Write a video that shows each of some RGB pictures of one size for a second."""
    with av.open(str(path), "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        # One thread: with several, the number of cores decides the bytes.
        stream = container.add_stream("libx264", rate=_FPS, options={"crf": "18", "threads": "1"})
        stream.pix_fmt = "yuv420p"
        stream.width, stream.height = pictures[0].size
        for number, picture in enumerate(picture for picture in pictures for _ in range(FRAMES_PER_PICTURE)):
            frame = av.VideoFrame.from_ndarray(np.asarray(picture))
            frame.pts, frame.time_base = number, Fraction(1, _FPS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
