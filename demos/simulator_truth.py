"""What the simulator knew when a picture was taken: where things are, and where on the pictures they appear.

It comes out of an HDF5 file alone. `states` are MuJoCo's positions and velocities, and `model_file` is the scene that
they belong to. Without its meshes, which a clone need not have, MuJoCo still computes where bodies and cameras are.

Letters: T steps of a demo, N scenes, S numbers of a flattened state, K objects.
"""

import importlib
import os
import re
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence

import h5py
import numpy as np
import torch
from torch import Tensor

from demos.hdf5 import Demo
from demos.hdf5_errors import open_dataset, open_hdf5, text_attribute
from errors import BadInput
from observation import CAMERAS, SIMULATOR_CAMERAS, axis_angle

# What of a model decides where bodies and cameras are. A file from elsewhere gets nothing else to MuJoCo.
PARTS = {"worldbody", "body", "joint", "freejoint", "camera"}
COMPILER = {"angle", "eulerseq", "autolimits"}
# What robosuite's Panda is called: the joints that each part of the robot state reads, the body at the grip site, and
# the one whose turn is the end effector's.
JOINTS = {
    "joint_states": [f"robot0_joint{i}" for i in range(1, 8)],
    "gripper_states": [f"gripper0_finger_joint{i}" for i in (1, 2)],
}
GRIP, HAND = "gripper0_eef", "robot0_right_hand"


def import_mujoco():
    """MuJoCo without a renderer: where nothing is drawn, a machine that cannot draw will do."""
    if "mujoco" not in sys.modules:
        before = os.environ.get("MUJOCO_GL")
        os.environ["MUJOCO_GL"] = "disable"
        try:
            importlib.import_module("mujoco")
        except ImportError as problem:
            raise BadInput(f"MuJoCo cannot be imported ({problem}); `pip install -r requirements.txt`") from None
        finally:
            os.environ.pop("MUJOCO_GL") if before is None else os.environ.update(MUJOCO_GL=before)
    return sys.modules["mujoco"]


class Kinematics:
    """A MuJoCo model without anything that is seen or touched: from positions (S,) to where bodies and cameras are."""

    def __init__(self, model_file: str, where: str, needed_by: str):
        """model_file: the XML as a demonstration's attribute holds it; `where` and `needed_by` are for sentences.

        Raises BadInput where it is missing or no MuJoCo model."""
        if not model_file:
            raise BadInput(f"{where}: attribute model_file is missing, {needed_by}")
        self.mujoco = mujoco = import_mujoco()
        try:
            self.model = mujoco.MjModel.from_xml_string(_skeleton(model_file))
        except (ElementTree.ParseError, ValueError) as problem:
            words = " ".join(str(problem).split())
            raise BadInput(f"{where}: attribute model_file is no MuJoCo model ({words})") from None
        self.data = mujoco.MjData(self.model)
        self.where, self.needed_by = where, needed_by
        free = np.flatnonzero(self.model.jnt_type == mujoco.mjtJoint.mjJNT_FREE)
        names = {int(joint): re.sub(r"_joint\d+$", "", self.model.joint(joint).name) for joint in free}
        self.addresses = {name: int(self.model.jnt_qposadr[joint]) for joint, name in names.items()}  # of x in qpos
        self.bodies = {name: int(self.model.jnt_bodyid[joint]) for joint, name in names.items()}

    def positions(self, states: np.ndarray, name: str) -> np.ndarray:
        """Flattened states (T, S) -> where an object that moves freely is, (T, 3) in metres."""
        first = 1 + self.addresses[name]  # states[:, 0] is the time
        if states.shape[1] < first + 3:
            raise BadInput(f"{self.where}: key states has {states.shape[1]} columns, too few for {name}")
        return states[:, first : first + 3]

    def on_pictures(self, states: np.ndarray, names: Sequence[str]) -> np.ndarray:
        """Flattened states (T, S) -> where the middles of objects appear: (T, 2, K, 2) float32 of each camera, right
        and up from the picture's middle, its edges being -1 and 1. NaN for what is behind the camera."""
        mujoco, model, data = self.mujoco, self.model, self.data
        if states.shape[1] < 1 + model.nq:
            raise BadInput(
                f"{self.where}: key states has {states.shape[1]} columns, the model has {model.nq} positions"
            )
        cameras = [self._id("camera", name) for name in SIMULATOR_CAMERAS]
        bodies = [self.bodies[name] for name in names]
        appear = np.full((len(states), len(cameras), len(bodies), 2), np.nan, np.float32)
        for state, row in zip(states, appear, strict=True):
            data.qpos[:] = state[1 : 1 + model.nq]
            mujoco.mj_kinematics(model, data)
            mujoco.mj_camlight(model, data)
            for camera, points in zip(cameras, row, strict=True):
                seen = (data.xpos[bodies] - data.cam_xpos[camera]) @ data.cam_xmat[camera].reshape(3, 3)
                focal = 1 / np.tan(np.radians(model.cam_fovy[camera]) / 2)
                ahead = -seen[:, 2]  # a MuJoCo camera looks along its -z
                points[ahead > 0] = focal * seen[ahead > 0, :2] / ahead[ahead > 0, None]
        return appear

    def robot_state(self, states: np.ndarray) -> dict[str, np.ndarray]:
        """Flattened states (T, S) -> all parts of the robot state that observations have (observation.py), (T, width)
        float32 each. Raises BadInput where the model has no arm of robosuite's Panda."""
        robot = {
            part: states[:, [1 + self.model.jnt_qposadr[self._id("joint", name)] for name in names]]
            for part, names in JOINTS.items()
        }
        grip, hand = (self._id("body", name) for name in (GRIP, HAND))
        robot["ee_pos"], robot["ee_ori"] = np.empty((len(states), 3)), np.empty((len(states), 3))
        for state, position, turn in zip(states, robot["ee_pos"], robot["ee_ori"], strict=True):
            self.data.qpos[:] = state[1 : 1 + self.model.nq]
            self.mujoco.mj_kinematics(self.model, self.data)
            position[:] = self.data.xpos[grip]
            turn[:] = axis_angle(np.roll(self.data.xquat[hand], -1))  # MuJoCo's quaternions begin with w
        return {part: values.astype(np.float32) for part, values in robot.items()}

    def _id(self, what: str, name: str) -> int:
        """Of a camera, body or joint."""
        number = self.mujoco.mj_name2id(self.model, getattr(self.mujoco.mjtObj, f"mjOBJ_{what.upper()}"), name)
        if number < 0:
            raise BadInput(f"{self.where}: attribute model_file has no {what} {name}, {self.needed_by}")
        return number


def _skeleton(model_file: str) -> str:
    """The model's bodies, joints and cameras, each body with some mass, without which MuJoCo takes none that moves."""
    root = ElementTree.fromstring(model_file)
    kept = ElementTree.Element("mujoco")
    told = {name: value for part in root.findall("compiler") for name, value in part.items() if name in COMPILER}
    kept.append(ElementTree.Element("compiler", told))
    kept.extend(root.findall("worldbody"))
    for body in list(kept.iter()):
        for part in [part for part in body if part.tag not in PARTS | {"compiler"}]:
            body.remove(part)
        for name in ("class", "childclass"):  # of defaults, which are left away
            body.attrib.pop(name, None)
        if body.tag == "body":
            ElementTree.SubElement(body, "inertial", pos="0 0 0", mass="1", diaginertia="1 1 1")
    return ElementTree.tostring(kept, encoding="unicode")


def objects_of_interest(bddl: str, where: object, needed_by: str) -> list[str]:
    """What a task is about, as its BDDL file names it: what is moved and, mostly, where to."""
    match = re.search(r"\(:obj_of_interest\s([^)]*)\)", bddl)
    if not match or not match.group(1).strip():
        raise BadInput(f"{where}: attribute bddl_file_content names no obj_of_interest, {needed_by}")
    return match.group(1).split()


def states_seen(demo: Demo, file: h5py.File, needed_by: str) -> np.ndarray:
    """The flattened state that each obs[t] shows, (T, S). One that was recorded after actions[t] shows states[t + 1],
    so the last frame of such a demo has none (NaN)."""
    states = _dataset(demo, file, "states", None, needed_by)
    seen = np.full_like(states, np.nan)
    seen[: len(states) - demo.lag] = states[demo.lag :]
    return seen


def simulator_truth(demo: Demo, needed_by: str = "the probes need it") -> dict[str, Tensor]:
    """What the simulator knows at each obs[t], in metres: target, end_effector (T, 3), gripper (T, 1), and, where it is
    an object, the goal that the target is brought to (T, 3). NaN where a frame has no truth.

    Raises BadInput where the file lacks what this takes: states, model_file, obs/ee_pos and a target that can move.
    """
    with open_hdf5(demo.path) as file:
        states = states_seen(demo, file, needed_by).astype(np.float32)
        hand = _dataset(demo, file, "obs/ee_pos", 3, needed_by).astype(np.float32)
        kinematics, target, others = _scene(demo, file, needed_by)
    truth = {"end_effector": torch.from_numpy(hand)}
    truth["target"] = torch.from_numpy(kinematics.positions(states, target))
    if others and others[0] in kinematics.addresses:
        truth["goal"] = torch.from_numpy(kinematics.positions(states, others[0]))
    truth["gripper"] = demo.robot_state["gripper_states"].abs().sum(dim=1, keepdim=True)
    return truth


def target_on_pictures(demo: Demo, needed_by: str) -> Tensor:
    """Where the object that is asked for appears on both pictures of each obs[t], (T, 2, 2), as `on_pictures` has it.

    Raises BadInput as `simulator_truth`, and where the file's model lacks one of the cameras."""
    with open_hdf5(demo.path) as file:
        states = states_seen(demo, file, needed_by)
        kinematics, target, _ = _scene(demo, file, needed_by)
    known = np.isfinite(states).all(axis=1)
    appear = np.full((len(states), len(CAMERAS), 2), np.nan, np.float32)
    appear[known] = kinematics.on_pictures(states[known], [target])[:, :, 0]
    return torch.from_numpy(appear)


def _scene(demo: Demo, file: h5py.File, needed_by: str) -> tuple[Kinematics, str, list[str]]:
    """The kinematics of a demo's scene, its target, which moves freely, and what else the task is about."""
    group, where = file["data"][demo.key], f"{demo.path}: {demo.key}"
    kinematics = Kinematics(text_attribute(group.attrs, "model_file", demo.path), where, needed_by)
    bddl = text_attribute(file["data"].attrs, "bddl_file_content", demo.path)
    target, *others = objects_of_interest(bddl, demo.path, needed_by)
    if target not in kinematics.addresses:
        raise BadInput(f"{where}: its target {target} is no object that moves freely, {needed_by}")
    return kinematics, target, others


def _dataset(demo: Demo, file: h5py.File, key: str, width: int | None, needed_by: str) -> np.ndarray:
    group = file["data"][demo.key]
    if key not in group:
        raise BadInput(f"{demo.path}: {demo.key}: key {key} is missing, {needed_by}")
    dataset = open_dataset(demo.path, demo.key, group, key)
    shape = dataset.shape
    if len(shape) != 2 or shape[0] != len(demo) or shape[1] != (width or shape[1]):
        raise BadInput(
            f"{demo.path}: {demo.key}: key {key} is {shape}, expected ({len(demo)}, {width or 'S'}), {needed_by}"
        )
    return dataset[()]
