"""Pictures of rollouts for people: mp4 files, grids and last frames. Frames here are upright, (h, w, 3) uint8."""

import contextlib
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from errors import BadInput
from files import replaced_whole, unwritable_named

VIDEO_SIZE, VIDEO_EVERY, CONTROL_HZ = 256, 2, 20  # pixels; environment steps between video frames; steps a second
HELD_FRAMES = 10  # a grid's last frame stays for a second, so that the outcomes can be read
SUCCESS, FAILURE = (46, 160, 67), (207, 34, 46)  # frame colours, RGB
BORDER = 6  # pixels
MP4 = {"movflags": "faststart"}  # a server's video begins to play before all of it has come


def upright(raw: np.ndarray) -> np.ndarray:
    """MuJoCo's raw pictures are stored bottom row first; a person wants the top row first."""
    return raw[::-1]


def framed(frames: Sequence[np.ndarray], success: bool) -> list[np.ndarray]:
    """The last frame gets a border, green for a success and red for a failure."""
    last = frames[-1].copy()
    colour = SUCCESS if success else FAILURE
    for edge in (np.s_[:BORDER], np.s_[-BORDER:], np.s_[:, :BORDER], np.s_[:, -BORDER:]):
        last[edge] = colour
    return [*frames[:-1], last]


def grid(videos: Sequence[Sequence[np.ndarray]], columns: int = 5) -> list[np.ndarray]:
    """Several videos side by side; one that is over keeps showing its last frame, with the colour of its outcome."""
    length = max(len(video) for video in videos) + HELD_FRAMES
    columns = min(columns, len(videos))
    blank = np.full_like(videos[0][0], 255)
    frames = []
    for t in range(length):
        tiles = [video[min(t, len(video) - 1)] for video in videos]
        tiles += [blank] * (-len(tiles) % columns)
        rows = [np.concatenate(tiles[i : i + columns], axis=1) for i in range(0, len(tiles), columns)]
        frames.append(np.concatenate(rows, axis=0))
    return frames


def halved(frame: np.ndarray) -> np.ndarray:
    """(h, w, 3) -> (h / 2, w / 2, 3), each pixel the mean of four."""
    h, w, _ = frame.shape
    return frame.reshape(h // 2, 2, w // 2, 2, 3).mean(axis=(1, 3)).round().astype(np.uint8)


def write_mp4(frames: Sequence[np.ndarray], path: Path, frames_per_second: int) -> None:
    """H.264 that plays in a browser. Sides are cut to even numbers, as the codec wants."""
    height, width = (side - side % 2 for side in frames[0].shape[:2])
    with _written_whole(path) as part, av.open(str(part), "w", format="mp4", options=MP4) as container:
        stream = container.add_stream("h264", rate=Fraction(frames_per_second))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"crf": "23"}
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame[:height, :width]), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))


def read_mp4(path: Path) -> list[np.ndarray]:
    try:
        with av.open(str(path)) as container:
            return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    except (OSError, IndexError, av.FFmpegError) as problem:  # IndexError: no video in it
        raise BadInput(f"{path}: not readable as a video ({problem}); delete it, and the report goes without") from None


def write_png(frame: np.ndarray, path: Path) -> None:
    codec = av.CodecContext.create("png", "w")
    codec.height, codec.width = frame.shape[:2]
    codec.pix_fmt, codec.time_base = "rgb24", Fraction(1)
    packets = codec.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24"))
    with _written_whole(path) as part:
        part.write_bytes(b"".join(bytes(packet) for packet in [*packets, *codec.encode(None)]))


@contextlib.contextmanager
def _written_whole(path: Path) -> Iterator[Path]:
    """`replaced_whole`. Raises BadInput on a full disk."""
    with unwritable_named(path), replaced_whole(path) as part:
        try:
            yield part
        except av.FFmpegError as problem:  # not every one of the system's refusals is an OSError here
            raise OSError(problem.errno, problem.strerror) from None
