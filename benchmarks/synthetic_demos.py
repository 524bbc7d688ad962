"""Made-up demonstrations in LIBERO's HDF5 layout, for measuring the loader where there are no real ones.

    python benchmarks/synthetic_demos.py DIR --demos 4 --steps 100 --image_size 128

The pictures are as compressible as a simulator's: large smooth areas, fine texture that stays, a few things that move,
and a little noise. The motion means nothing; nothing can be learnt from it.
"""

import argparse
import json
from pathlib import Path

import h5py
import numpy as np
import torch
import torch.nn.functional as F

TASKS = ("pick_up_the_milk_and_place_it_in_the_basket", "pick_up_the_butter_and_place_it_in_the_basket")
CAMERAS = ("agentview_rgb", "eye_in_hand_rgb")


def pictures(steps: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """One camera's film: (steps, size, size, 3) uint8."""
    coarse = torch.from_numpy(rng.uniform(40, 215, (1, 3, 6, 6)).astype(np.float32))
    scene = F.interpolate(coarse, (size, size), mode="bilinear")[0].permute(1, 2, 0).numpy()
    scene[size // 2 :] += rng.normal(0, 5, (size - size // 2, size, 1))  # the floor's texture
    film = np.repeat(scene[None], steps, axis=0)
    row, column = np.mgrid[:size, :size]
    for _ in range(3):
        start, end = rng.uniform(0.1, 0.9, (2, 2)) * size
        colour, radius = rng.uniform(0, 255, 3), rng.uniform(0.05, 0.15) * size
        for t in range(steps):
            y, x = start + (end - start) * t / max(steps - 1, 1)
            film[t][(row - y) ** 2 + (column - x) ** 2 < radius**2] = colour
    noisy = rng.random((steps, size, size, 1)) < 0.02
    film += noisy * rng.normal(0, 3, film.shape)
    return film.clip(0, 255).astype(np.uint8)


def write_demos(
    directory: Path,
    tasks: int = 1,
    demos: int = 4,
    steps: int = 100,
    image_size: int = 128,
    compression: str | None = None,
    lang_emb_dim: int = 512,
) -> None:
    """One file a task and the language embeddings. `compression` None is LIBERO's own way (contiguous); "gzip" is how
    HDF5 files are often shrunk, in the chunks that h5py chooses."""
    rng = np.random.default_rng(0)
    directory.mkdir(parents=True, exist_ok=True)
    for task in TASKS[:tasks]:
        with h5py.File(directory / f"{task}_demo.hdf5", "w") as file:
            data = file.create_group("data")
            data.attrs["macros_image_convention"] = "opengl"
            data.attrs["num_demos"] = demos
            data.attrs["problem_info"] = json.dumps({"language_instruction": task.replace("_", " ")})
            for number in range(demos):
                demo = data.create_group(f"demo_{number}")
                demo.attrs["num_samples"] = steps
                joints = np.cumsum(rng.normal(0, 0.05, (steps + 1, 7)), axis=0)
                states = np.zeros((steps, 110))
                states[:, 1:8] = joints[:-1]
                actions = rng.uniform(-0.9, 0.9, (steps, 7))
                actions[:, 6] = np.where(np.arange(steps) < steps // 2, -1.0, 1.0)
                demo["states"], demo["actions"] = states, actions
                obs = demo.create_group("obs")
                obs["joint_states"] = joints[1:]  # recorded after the action, as LIBERO does
                obs["gripper_states"] = rng.uniform(0, 0.04, (steps, 2))
                for camera in CAMERAS:
                    obs.create_dataset(camera, data=pictures(steps, image_size, rng), compression=compression)
    texts = [task.replace("_", " ") for task in TASKS]
    vectors = rng.normal(size=(len(texts), lang_emb_dim)).astype(np.float32)
    np.savez(directory / "language_embeddings.npz", texts=texts, embeddings=vectors, encoder="made up")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--tasks", type=int, default=1, choices=range(1, len(TASKS) + 1))
    parser.add_argument("--demos", type=int, default=4, help="demos a task (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=100, help="steps a demo (default: %(default)s)")
    parser.add_argument("--image_size", type=int, default=128, help="pixels (default: %(default)s)")
    parser.add_argument("--compression", choices=["gzip"], help="default: none, as LIBERO's files")
    settings = parser.parse_args()
    write_demos(**vars(settings))


if __name__ == "__main__":
    main()
