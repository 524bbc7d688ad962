"""Demonstrations made small enough to carry to a GPU machine without network, and HDF5 files again there.

    python benchmarks/carry_demos.py pack data/libero_object packed           1 KB a step instead of 90
    python benchmarks/carry_demos.py unpack packed data/libero_object

What training reads is kept: pictures, both robot states and actions. The pictures become H.264 (4:4:4, 35 dB and
better): close to the original, but not the same bytes, so a result got from them says so. Without the simulator's
states nothing tells when pictures were recorded (data.obs_alignment is to be before or after) or where objects are (no
probes). pack wants PyAV, unpack PyAV or OpenCV. Files already there stay.
"""

import argparse
import io
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import h5py
import numpy as np

CAMERAS = ("obs/agentview_rgb", "obs/eye_in_hand_rgb")
ATTRIBUTES = ("num_samples", "draw_every")
NUMBERS = ("actions", "obs/joint_states", "obs/gripper_states", "obs/ee_pos", "obs/ee_ori")  # of them what is there
QUALITY = 22  # x264's constant rate factor; 0 would lose nothing
LANGUAGE = "language_embeddings.npz"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["pack", "unpack"])
    parser.add_argument("source", type=Path, help="folder of *_demo.hdf5 files and language_embeddings.npz")
    parser.add_argument("target", type=Path, help="folder to write")
    parser.add_argument("--num_workers", type=int, default=1, help="processes (default: %(default)s)")
    settings = parser.parse_args()
    files = sorted(settings.source.glob("*_demo.hdf5"))
    if not files:
        sys.exit(f"error: {settings.source} holds no *_demo.hdf5 file")
    settings.target.mkdir(parents=True, exist_ok=True)
    if (settings.source / LANGUAGE).exists():
        (settings.target / LANGUAGE).write_bytes((settings.source / LANGUAGE).read_bytes())
    with ProcessPoolExecutor(settings.num_workers) as pool:
        for path in pool.map(partial(convert, settings.what == "pack", settings.target), files):
            print(f"{path}: {path.stat().st_size / 1e6:.1f} MB", flush=True)


def convert(packing: bool, folder: Path, path: Path) -> Path:
    """Writes a file's packed or unpacked form into `folder`, unless it is there."""
    target = folder / path.name
    if target.exists():
        return target
    part = target.with_name(f"{target.name}.part")
    with h5py.File(path) as before, h5py.File(part, "w") as after:
        data = after.create_group("data")
        data.attrs.update(before["data"].attrs)
        for name, demo in before["data"].items():
            copied = data.create_group(name)
            copied.attrs.update({name: demo.attrs[name] for name in ATTRIBUTES if name in demo.attrs})
            for key in filter(demo.__contains__, NUMBERS):
                copied.create_dataset(key, data=demo[key][:].astype(np.float32), compression="gzip", shuffle=True)
            for key in CAMERAS:
                if packing:
                    copied[key] = np.frombuffer(encoded(demo[key][:]), np.uint8)
                else:
                    frames = decoded(demo[key][:].tobytes())
                    copied.create_dataset(key, data=frames, chunks=(1, *frames.shape[1:]))
    os.replace(part, target)
    return target


def encoded(frames: np.ndarray) -> bytes:
    """(T, S, S, 3) uint8 -> an mp4 file's bytes."""
    import av

    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=20, options={"crf": str(QUALITY), "preset": "slow"})
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv444p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def decoded(video: bytes) -> np.ndarray:
    """An mp4 file's bytes -> (T, S, S, 3) uint8."""
    try:
        import av
    except ImportError:
        return decoded_by_opencv(video)
    with av.open(io.BytesIO(video)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def decoded_by_opencv(video: bytes) -> np.ndarray:
    import cv2

    with tempfile.NamedTemporaryFile(suffix=".mp4") as file:  # it reads nothing but paths
        file.write(video)
        file.flush()
        opened, frames = cv2.VideoCapture(file.name), []
        while (read := opened.read())[0]:
            frames.append(read[1][..., ::-1])
    return np.stack(frames)


if __name__ == "__main__":
    main()
