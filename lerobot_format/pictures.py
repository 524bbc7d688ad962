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
import torch
from PIL import Image

from errors import BadInput
from jepa.tokenizer import resize_images

LARGEST_SIDE = 4096  # pixels; what claims to be larger is no camera of a robot


def turned(pictures: np.ndarray) -> np.ndarray:
    """(..., H, W, 3) turned by 180 degrees, which is its own reverse."""
    return pictures[..., ::-1, ::-1, :]


def resized(pictures: np.ndarray, size: int) -> np.ndarray:
    """(N, H, W, 3) uint8 -> (N, size, size, 3), as every model here resizes them."""
    return resize_images(torch.from_numpy(pictures), size).permute(0, 2, 3, 1).numpy()


def png_of(picture: np.ndarray) -> bytes:
    """picture (H, W, 3) uint8 as a PNG file, which keeps every pixel."""
    stream = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(picture)).save(stream, "PNG", compress_level=1)
    return stream.getvalue()


class VideoWriter:
    """One mp4, to which pictures are added: h264, yuv420p, every second frame a key frame. One thread, no B-frames and
    no macroblock tree: the file's bytes then depend on the pictures alone, and every frame's time is its number / fps.
    Of pictures as small as 32 px, x264's macroblock tree decides by memory that nobody has written, and now and then
    gives a frame another quality."""

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
        stream.options = {"crf": "12", "g": "2", "bf": "0", "preset": "medium", "mbtree": "0", "threads": "1"}
        yield VideoWriter(container, stream)
        container.mux(stream.encode(None))


def decoded_png(content: bytes | None, where: str) -> np.ndarray:
    """The file `content`, PNG or JPEG, as (H, W, 3) uint8. Raises BadInput, which begins with `where`."""
    if not content:
        raise BadInput(f"{where} has no bytes; pictures in files of their own are not read")
    try:
        with Image.open(io.BytesIO(content), formats=("PNG", "JPEG")) as image:
            if max(image.size) > LARGEST_SIDE:  # looked at before anything is unpacked
                raise BadInput(f"{where} is {image.size[0]} x {image.size[1]} px, expected at most {LARGEST_SIDE}")
            return np.asarray(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as problem:
        raise BadInput(f"{where} is no readable PNG or JPEG ({problem})") from None


def decoded_video(path: Path, begin: float, length: int, fps: float, what: str) -> Iterator[np.ndarray]:
    """`length` frames of an mp4 from the second `begin` on, (H, W, 3) uint8 each. Raises BadInput where it cannot be
    decoded, or has no frame at the time of one; `what` says whose frames they are."""
    if not path.is_file():
        raise BadInput(f"{path}: is missing, {what} should be in it")
    found = 0
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise BadInput(f"{path}: has no video in it")
            stream = container.streams.video[0]
            if stream.time_base is None or max(stream.width, stream.height) > LARGEST_SIDE:
                raise BadInput(f"{path}: is {stream.width} x {stream.height} px, expected at most {LARGEST_SIDE}")
            container.seek(round(begin / stream.time_base), stream=stream)  # to the key frame before it
            for frame in container.decode(stream):
                place = -1.0 if frame.time is None else (frame.time - begin) * fps
                if place < -0.5:
                    continue
                if abs(place - found) > 0.1 or max(frame.width, frame.height) > LARGEST_SIDE:
                    raise BadInput(f"{path}: {what} has no frame at {begin + found / fps:.3f} s, its frame {found}")
                yield frame.to_ndarray(format="rgb24")
                found += 1
                if found == length:
                    return
    except (av.FFmpegError, ValueError) as problem:
        raise BadInput(f"{path}: {what} cannot be decoded after {found} of {length} frames ({problem})") from None
    raise BadInput(f"{path}: ends after {found} of the {length} frames of {what}")
