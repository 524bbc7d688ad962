"""What the robot sees: cameras and robot state, their widths and units, their names in HDF5 files and in the simulator.

An observation of one frame is a dictionary, from a file and from the simulator alike:
    agentview_rgb, eye_in_hand_rgb  (h, w, 3) uint8, rows in LIBERO's raw OpenGL order: nothing is ever flipped
    joint_states (7,) float32, rad;  gripper_states (2,) float32, m
    ee_pos (3,) float32, m;  ee_ori (3,) float32, rad: the end effector in the world, its turn as `axis_angle` writes it
The simulator gives all of it. `data.robot_state` says which parts a model reads, and those alone come from files.

This file needs numpy alone: the simulator's worker processes import it, and torch has no place there.
"""

import math

import numpy as np

CAMERAS = ("agentview_rgb", "eye_in_hand_rgb")
ROBOT_STATES = {  # data.robot_state -> the parts that it is made of, in order, and their widths
    "joints": {"joint_states": 7, "gripper_states": 2},  # 9-D, the training guide's
    "end_effector": {"ee_pos": 3, "ee_ori": 3, "gripper_states": 2},  # 8-D, that of openpi's LIBERO message
}
STATE_WIDTHS = {name: width for parts in ROBOT_STATES.values() for name, width in parts.items()}  # of every part
SIMULATOR_KEYS = {  # name in the HDF5 files and in this repo -> name in the simulator
    "agentview_rgb": "agentview_image",
    "eye_in_hand_rgb": "robot0_eye_in_hand_image",
    "joint_states": "robot0_joint_pos",
    "gripper_states": "robot0_gripper_qpos",
    "ee_pos": "robot0_eef_pos",
}
SIMULATOR_QUATERNION = "robot0_eef_quat"  # of which ee_ori is made
SIMULATOR_CAMERAS = tuple(SIMULATOR_KEYS[camera].removesuffix("_image") for camera in CAMERAS)
ORIENTATION = "opengl"  # of the rows of every picture, as files call it
MIXED = "mixed"  # obs_alignment of demonstrations of which some were recorded before and some after their actions
FINGER_TRAVEL = 0.04  # metres that each Panda finger moves
# What counts as 1 where a model reads it, for parts that would hardly move in metres beside joints in radians: fingers
# enter as shares of their travel, the end effector's position in decimetres.
UNITS = {"gripper_states": FINGER_TRAVEL, "ee_pos": 0.1}
DRAW_EVERY = "draw_every"  # attribute of a demo that has pictures of every so many-th step alone
ARM_JOINTS = slice(1, 8)  # of a flattened simulator state, whose [0] is the time


def state_of_width(robot_state_dim: int) -> dict[str, int]:
    """The parts of the robot state that is so many numbers wide, and the width of each."""
    return {sum(parts.values()): parts for parts in ROBOT_STATES.values()}[robot_state_dim]


def from_simulator(env_obs: dict) -> dict:
    """The observation from what the simulator calls one; the batches of dataloader.py hold the same."""
    obs = {
        name: np.asarray(env_obs[key], dtype=np.uint8 if name in CAMERAS else np.float32)
        for name, key in SIMULATOR_KEYS.items()
    }
    return obs | {"ee_ori": axis_angle(env_obs[SIMULATOR_QUATERNION]).astype(np.float32)}


def nothing_seen(image_size: int) -> dict:
    """An observation to try a policy with: black pictures, zero robot state."""
    black = {camera: np.zeros((image_size, image_size, 3), np.uint8) for camera in CAMERAS}
    return black | {name: np.zeros(width, np.float32) for name, width in STATE_WIDTHS.items()}


def axis_angle(quaternion: np.ndarray) -> np.ndarray:
    """(x, y, z, w) -> the axis times the angle, 0 to 2 pi rad: (3,) float64, bit for bit what robosuite's
    quat2axisangle gives, which made `ee_ori` in LIBERO's files and makes the state in openpi's LIBERO messages.

    q and -q are one rotation and get two answers, angle and 2 pi - angle. That keeps it continuous: the simulator's
    quaternion follows the joints without ever changing its sign, and a hand that points down, turned by pi, moves
    through w = 0 as through any other place. Only at angle 0, where a hand would point up, is there a jump.
    """
    w = min(max(float(quaternion[3]), -1.0), 1.0)
    sine = np.sqrt(1.0 - w * w)  # of half the angle
    return np.zeros(3) if sine == 0 else np.asarray(quaternion[:3]) * 2.0 * math.acos(w) / sine
