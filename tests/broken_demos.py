"""Ways to break one demo of a file of libero_files.py, with the sentence that names each, and what training and
check_demos.py say of a folder."""

import dataclasses
import functools
from pathlib import Path

import h5py
import numpy as np
from helpers import CPU, INSTRUCTION

from checkup.folder import FolderReport, examine
from config import Config, load_config
from demos.frames import open_frames
from demos.hdf5 import between_pictures, load_demos, split_demos
from demos.language import EMBEDDINGS_FILE, load_languages
from demos.problems import first_raised
from errors import BadInput


def replace(demo: h5py.Group, key: str, value: np.ndarray) -> None:
    del demo[key]
    if isinstance(value, h5py.VirtualSource):
        layout = h5py.VirtualLayout(value.shape, value.dtype)
        layout[:] = value
        demo.create_virtual_dataset(key, layout)
    else:
        demo[key] = value


BROKEN = {  # what was done to demo_1 -> (how, what the sentence must name)
    "no num_samples": (lambda d: d.attrs.__delitem__("num_samples"), "attribute num_samples is missing, expected 30"),
    "wrong num_samples": (lambda d: d.attrs.modify("num_samples", 29), "num_samples is 29, but actions has 30 steps"),
    "eight state dimensions": (
        lambda d: replace(d, "obs/gripper_states", np.zeros((30, 1))),
        r"key obs/gripper_states has shape \(30, 1\), expected \(30, 2\)",
    ),
    "flat gripper": (
        lambda d: replace(d, "obs/gripper_states", np.zeros(30)),
        r"obs/gripper_states has shape \(30,\), expected \(30, 2\)",
    ),
    "gripper in {0, 1}": (
        lambda d: d["actions"].__setitem__((slice(None), 6), (d["actions"][:, 6] + 1) / 2),
        r"gripper values \[0.0, 1.0\], expected -1 \(open\) or 1",
    ),
    "NaN action": (lambda d: d["actions"].__setitem__((3, 2), np.nan), "key actions holds NaN"),
    "NaN joint": (lambda d: d["obs/joint_states"].__setitem__((3, 2), np.nan), "key obs/joint_states holds NaN"),
    "a joint beyond float32": (
        lambda d: d["obs/joint_states"].__setitem__((3, 2), 1e39),
        "key obs/joint_states holds NaN or values that are infinite as float32",
    ),
    "large action": (lambda d: d["actions"].__setitem__((3, 2), 2.5), r"pose delta of size 2.5, expected values in"),
    "seven-DoF joint actions": (
        lambda d: replace(d, "actions", np.zeros((30, 8))),
        r"key actions has shape \(30, 8\), expected \(T, 7\)",
    ),
    "mixed image sizes": (
        lambda d: [replace(d, f"obs/{c}_rgb", d[f"obs/{c}_rgb"][:, :16, :16]) for c in ("agentview", "eye_in_hand")],
        "images are 16 px, those of demo_0 32 px",
    ),
    "cameras of two sizes": (
        lambda d: replace(d, "obs/eye_in_hand_rgb", d["obs/eye_in_hand_rgb"][:, :16, :16]),
        r"key obs/eye_in_hand_rgb has shape \(30, 16, 16, 3\), expected square images of one size",
    ),
    "float images": (
        lambda d: replace(d, "obs/agentview_rgb", np.ones((30, 32, 32, 3), np.float32)),
        r"key obs/agentview_rgb is float32 .*, expected uint8 \(30, h, w, 3\)",
    ),
    "channels first": (
        lambda d: replace(d, "obs/agentview_rgb", np.ones((30, 3, 32, 32), np.uint8)),
        r"key obs/agentview_rgb is uint8 \(30, 3, 32, 32\)",
    ),
    "missing camera": (lambda d: d["obs"].__delitem__("eye_in_hand_rgb"), "key obs/eye_in_hand_rgb is missing"),
    "black frames": (
        lambda d: d["obs/agentview_rgb"].__setitem__(slice(None), 0),
        "key obs/agentview_rgb: the picture of step 0 is all black; was the camera rendered",
    ),
    "a last frame of one colour": (
        lambda d: d["obs/agentview_rgb"].__setitem__(29, np.array([0, 135, 0], np.uint8)),
        r"key obs/agentview_rgb: the picture of step 29 is all of one colour, \[0, 135, 0\]",
    ),
    "a frozen camera": (
        lambda d: d["obs/eye_in_hand_rgb"].__setitem__(slice(None), d["obs/eye_in_hand_rgb"][0]),
        "key obs/eye_in_hand_rgb: the pictures of steps 0 and 29 are the same although the arm moved",
    ),
    "num_samples no number": (
        lambda d: d.attrs.__setitem__("num_samples", "abc"),
        "num_samples is 'abc', expected a number",
    ),
    "a group instead of actions": (
        lambda d: [d.__delitem__("actions"), d.create_group("actions")],
        "key actions is a group, expected a dataset",
    ),
    "a dataset instead of obs": (lambda d: replace(d, "obs", np.zeros(3)), "is a dataset, expected a group"),
    "actions as text": (
        lambda d: replace(d, "actions", np.array([b"x"] * 30)),
        "key actions holds no array of numbers",
    ),
    "a link inside the file that leads nowhere": (
        lambda d: replace(d, "actions", h5py.SoftLink("/data/gone")),
        "key actions: it is a link to something that is not there",
    ),
    "a link to a file that is gone": (
        lambda d: replace(d, "obs", h5py.ExternalLink("gone.hdf5", "/obs")),
        "it links to a file that is not there",
    ),
    "a camera whose file is gone": (
        lambda d: replace(d, "obs/agentview_rgb", h5py.VirtualSource("gone.hdf5", "x", (30, 32, 32, 3), "u1")),
        "takes data from gone.hdf5, which is not there",
    ),
    "a damaged chunk": (lambda d: damage(d, "obs/agentview_rgb"), "filter returned failure"),
}


def damage(demo: h5py.Group, key: str) -> None:
    """Overwrites the first chunk of what is written compressed anew."""
    values = demo[key][()]
    del demo[key]
    made = demo.create_dataset(key, data=values, chunks=(1, *values.shape[1:]), compression="gzip")
    made.id.write_direct_chunk((0,) * values.ndim, b"no deflate stream")


def close_the_fingers(path: Path) -> None:
    """Puts fingers into a file that follow the gripper commands as the robot's do."""
    with h5py.File(path, "a") as file:
        for demo in file["data"].values():
            opening = (0.04 - 0.004 * np.cumsum(demo["actions"][:, 6] > 0)).clip(0)
            demo["obs/gripper_states"][...] = np.stack([opening, -opening], axis=1)


def write_embeddings(folder: Path, *instructions: str, encoder: str = "test 1") -> None:
    texts = np.array(instructions or [INSTRUCTION, INSTRUCTION.replace("milk", "butter")])
    np.savez(folder / EMBEDDINGS_FILE, texts=texts, embeddings=np.eye(len(texts), 512), encoder=np.array(encoder))


read_once = functools.cache(load_config)


def settings(directory: Path, *overrides: str) -> Config:
    config = read_once((), ("model.image_size=32", *overrides))
    data = dataclasses.replace(
        config.data, data_directory=str(directory), cache_directory=str(directory.parent / "frames")
    )
    return dataclasses.replace(config, data=data)


def trains_on(config: Config) -> None:
    """Reads the data as a training does that starts with it. Raises what it raises."""
    demos, _ = load_demos(config.data, max(config.model.action_seq_len, config.model.prediction_gap))
    first_raised(between_pictures(demos, config.model.prediction_gap))
    split_demos(demos, config.data.train_split, config.data.split_seed)
    load_languages(config.data, demos, config.model.lang_emb_dim)
    open_frames(demos, config.data, config.model.image_size, CPU)


def verdict(config: Config) -> FolderReport:
    """The doctor's findings, which agree with what training does."""
    found = examine(config)
    try:
        trains_on(config)
    except BadInput as refused:
        assert str(refused) in found.all_errors(), found.all_errors()
    else:
        assert found.all_errors() == []
    return found
