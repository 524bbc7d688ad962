"""What the real lerobot does with our datasets, and a dataset that it writes. test_lerobot.py runs it with a Python
that has it:

    with_lerobot.py read DATASET FOUND.npz      every frame as its loader gives it, and what it says of the whole
    with_lerobot.py write DATASET WROTE.npz     a dataset with LIBERO's features, as its recorder writes it
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.datasets.utils import dataset_to_policy_features

CHUNK = 3
CAMERAS = ("observation.images.image", "observation.images.image2")


def read(root: Path, found: Path) -> None:
    dataset = LeRobotDataset(
        "a/name", root=root, video_backend="pyav", delta_timestamps={"action": [t / 20 for t in range(CHUNK)]}
    )
    frames = [dataset[index] for index in range(len(dataset))]
    arrays = {key: torch.stack([frame[key] for frame in frames]) for key in frames[0] if key != "task"}
    for camera in CAMERAS:
        arrays[camera] = (arrays[camera].permute(0, 2, 3, 1) * 255).round().to(torch.uint8)
    np.savez(found, **{key: array.numpy() for key, array in arrays.items()})
    said = {
        "episodes": dataset.num_episodes,
        "fps": dataset.fps,
        "tasks": [frame["task"] for frame in frames],
        "statistics": {key: sorted(of_feature) for key, of_feature in dataset.meta.stats.items()},
        "policy_features": {
            key: [feature.type.value, list(feature.shape)]
            for key, feature in dataset_to_policy_features(dataset.meta.features).items()
        },
    }
    print(json.dumps(said))


def write(root: Path, wrote: Path) -> None:
    rng, steps, size = np.random.default_rng(0), 30, 64
    picture = {"dtype": "image", "shape": (size, size, 3), "names": ["height", "width", "channel"]}
    features = dict.fromkeys(CAMERAS, picture) | {
        "observation.state": {"dtype": "float32", "shape": (8,), "names": None},
        "action": {"dtype": "float32", "shape": (7,), "names": None},
    }
    dataset = LeRobotDataset.create("a/name", fps=20, features=features, root=root, use_videos=False)
    kept: dict[str, list] = {key: [] for key in features}
    for task in ("put the bowl on the plate", "pick up the milk and place it in the basket") * 2:
        closed = np.arange(steps) >= steps // 2
        opening = np.clip(0.04 - 0.006 * np.cumsum(np.roll(closed, 1) * (np.arange(steps) > 0)), 0, 0.04)
        for t in range(steps):
            state, action = rng.normal(size=8).astype(np.float32), rng.uniform(-1, 1, 7).astype(np.float32)
            state[6:], action[6] = (opening[t], -opening[t]), 1 if closed[t] else -1
            frame = {camera: rng.integers(0, 256, (size, size, 3), dtype=np.uint8) for camera in CAMERAS}
            frame |= {"observation.state": state, "action": action}
            for key, value in frame.items():
                kept[key].append(value)
            dataset.add_frame(frame | {"task": task})
        dataset.save_episode()
    dataset.finalize()
    np.savez(wrote, **{key: np.stack(values) for key, values in kept.items()})


if __name__ == "__main__":
    {"read": read, "write": write}[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]))
