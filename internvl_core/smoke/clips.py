"""The smoke videos: a few pictures, one after the other, as an mp4."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

FRAMES_PER_PICTURE = 4
_FPS = 4
# Equal pictures, equal bytes: with several threads the number of cores decides the bytes, and with its macroblock
# tree x264 reads memory that it never wrote (92 of 150 clips of 112 px came out in two versions).
_X264 = {"crf": "18", "threads": "1", "mbtree": "0"}


def write_clip(path: Path, pictures: Sequence[Image.Image]) -> None:
    """Write a video that shows each of some RGB pictures of one size for a second."""
    with av.open(str(path), "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("libx264", rate=_FPS, options=dict(_X264))
        stream.pix_fmt = "yuv420p"
        stream.width, stream.height = pictures[0].size
        for number, picture in enumerate(picture for picture in pictures for _ in range(FRAMES_PER_PICTURE)):
            frame = av.VideoFrame.from_ndarray(np.asarray(picture))
            frame.pts, frame.time_base = number, Fraction(1, _FPS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
