"""Pictures of rollouts for people: mp4 files and grids. Frames here are upright, (h, w, 3) uint8."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

SUCCESS, FAILURE = (46, 160, 67), (207, 34, 46)  # frame colours, RGB
BORDER = 6  # pixels


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
    """Several videos side by side; one that is over keeps showing its last frame."""
    length = max(len(video) for video in videos)
    columns = min(columns, len(videos))
    blank = np.full_like(videos[0][0], 255)
    frames = []
    for t in range(length):
        tiles = [video[min(t, len(video) - 1)] for video in videos]
        tiles += [blank] * (-len(tiles) % columns)
        rows = [np.concatenate(tiles[i : i + columns], axis=1) for i in range(0, len(tiles), columns)]
        frames.append(np.concatenate(rows, axis=0))
    return frames


def write_mp4(frames: Sequence[np.ndarray], path: Path, frames_per_second: int) -> None:
    """H.264 that plays in a browser. Sides are cut to even numbers, as the codec wants."""
    height, width = (side - side % 2 for side in frames[0].shape[:2])
    part = path.with_name(f".{path.name}")
    with av.open(str(part), "w", format="mp4") as container:
        stream = container.add_stream("h264", rate=Fraction(frames_per_second))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"crf": "23"}
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame[:height, :width]), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    part.replace(path)
