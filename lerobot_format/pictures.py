"""Pictures as LeRobot keeps them: PNG in the table or frames of an mp4, turned by 180 degrees against LIBERO's rows.

Letters: N frames, H, W picture height and width.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

LARGEST_SIDE = 4096  # pixels; what claims to be larger is no camera of a robot


def turned(pictures: np.ndarray) -> np.ndarray:
    """(..., H, W, 3) turned by 180 degrees, which is its own reverse."""
    return pictures[..., ::-1, ::-1, :]


def png_of(picture: np.ndarray) -> bytes:
    """picture (H, W, 3) uint8 as a PNG file, which keeps every pixel."""
    stream = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(picture)).save(stream, "PNG", compress_level=1)
    return stream.getvalue()


class VideoWriter:
    """One mp4, to which pictures are added: h264, yuv420p, every second frame a key frame. One thread and no B-frames:
    the file's bytes then depend on the pictures alone, and every frame's time is its number / fps."""

    def __init__(self, container, stream):
        self._container, self._stream, self._frames = container, stream, 0

    def add(self, picture: np.ndarray) -> None:
        """picture (H, W, 3) uint8"""
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
        frame.pts, frame.time_base = self._frames, self._stream.codec_context.time_base
        self._container.mux(self._stream.encode(frame))
        self._frames += 1


@contextmanager
def written_video(path: Path, image_size: int, fps: int) -> Iterator[VideoWriter]:
    """A `VideoWriter` of the new file `path`, complete when the block ends."""
    with av.open(str(path), "w", format="mp4", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.width = stream.height = image_size
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = Fraction(1, fps)
        stream.options = {"crf": "12", "g": "2", "bf": "0", "preset": "medium", "threads": "1"}
        yield VideoWriter(container, stream)
        container.mux(stream.encode(None))
