"""openpi's LIBERO message <-> what a policy here sees (observation.py), in both directions.

    observation/image, observation/wrist_image   (S, S, 3) uint8, upright: LIBERO's raw rows turned by 180 degrees
    observation/state           (8,)  end effector: position 3 in m, axis-angle 3 in rad; finger positions 2 in m
    prompt                            what the robot is told
    observation/joint_position  (7,)  arm joints in rad             beyond openpi's message
    observation/gripper_qpos    (2,)  finger positions in m         beyond it; without them state's last two
    observation/sampling_seed         seed of the policy's noise    beyond it; without it noise that nobody can repeat
    observation/decision              number of the episode's decisions before this one, 0 unless said

The noise of a decision is a function of these last two: who sends an episode's seed gets the episode that is played
without a server.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from demos.instructions import canonical_instruction
from observation import CAMERAS, STATE_WIDTHS
from serving.messages import BadMessage

IMAGES = dict(zip(CAMERAS, ("observation/image", "observation/wrist_image"), strict=True))
STATE, PROMPT = "observation/state", "prompt"
SEED, DECISION = "observation/sampling_seed", "observation/decision"
WIDTHS = {STATE: 8, "observation/joint_position": 7, "observation/gripper_qpos": 2}
SOURCES = {  # part of the robot's state -> where a message may have it, key and first column, the best first
    "joint_states": (("observation/joint_position", 0),),
    "gripper_states": (("observation/gripper_qpos", 0), (STATE, 6)),
    "ee_pos": ((STATE, 0),),
    "ee_ori": ((STATE, 3),),
}
UNITS = {
    STATE: "end effector: position 3 in m, axis-angle 3 in rad; finger positions 2 in m",
    "observation/joint_position": "rad",
    "observation/gripper_qpos": "m",
}
ORIENTATION = "upright: LIBERO's raw (OpenGL) rows turned by 180 degrees, raw[::-1, ::-1]"
OPENPI_IMAGE_SIZE = 224  # of a policy that says nothing else
LARGEST_IMAGE = 512  # pixels a side that are accepted
MOST_DECISIONS = 100_000  # of an episode
LARGEST_SEED = 2**63 - 1


class Request(NamedTuple):
    """What a message asks for."""

    obs: dict[str, np.ndarray]  # as observation.from_simulator's
    instruction: str  # canonical
    seed: int | None
    decision: int


def message_of(obs: Mapping[str, np.ndarray], instruction: str, seed: int, decision: int) -> dict:
    """obs: observation.from_simulator's with `ee_pos` and `ee_ori` besides."""
    state = np.concatenate([obs["ee_pos"], obs["ee_ori"], obs["gripper_states"]])
    pictures = {key: turned(obs[camera]) for camera, key in IMAGES.items()}
    return pictures | {
        STATE: state.astype(np.float64),
        "observation/joint_position": obs["joint_states"],
        "observation/gripper_qpos": obs["gripper_states"],
        PROMPT: instruction,
        SEED: seed,
        DECISION: decision,
    }


def turned(picture: np.ndarray) -> np.ndarray:
    """(h, w, 3) uint8 by 180 degrees, picture[::-1, ::-1] as a copy: its pixels in reverse order."""
    pixels = np.ascontiguousarray(picture).reshape(-1).view("V3")
    return np.ascontiguousarray(pixels[::-1]).view(np.uint8).reshape(picture.shape)


class RequestReader:
    """Messages -> requests, for a policy of this robot state, picture sizes and instructions."""

    def __init__(self, robot_state: Sequence[str], image_size: int, least_image_size: int, instructions: Sequence[str]):
        """robot_state: names of the parts that the policy reads, as its checkpoint lists them. image_size: of the
        pictures that it was trained on. Others are resized by the model, from least_image_size on."""
        self.robot_state, self.image_size, self.instructions = tuple(robot_state), image_size, frozenset(instructions)
        self.least_image_size = min(least_image_size, image_size)
        self.largest_image_size = max(LARGEST_IMAGE, image_size)

    @property
    def largest_message(self) -> int:
        """Bytes: two of the largest pictures, and more than enough for all else."""
        return len(IMAGES) * 3 * self.largest_image_size**2 + 2**16

    def keys(self) -> dict[str, dict]:
        """What a message has to have, for the server's metadata."""
        picture = {
            "shape": [self.image_size, self.image_size, 3],
            "dtype": "uint8",
            "orientation": ORIENTATION,
            "sizes_accepted": [self.least_image_size, self.largest_image_size],
        }
        vectors = {key for part in self.robot_state for key, _ in SOURCES[part][-1:]}
        return {
            **dict.fromkeys(IMAGES.values(), picture),
            **{key: {"shape": [WIDTHS[key]], "dtype": "float", "unit": UNITS[key]} for key in sorted(vectors)},
            PROMPT: {"dtype": "str"},
        }

    def read(self, message: Mapping[Any, Any]) -> Request:
        """Raises BadMessage for a message that lacks something, or has it in another form."""
        obs = {camera: self._picture(message, key) for camera, key in IMAGES.items()}
        obs |= {part: _part(message, part) for part in self.robot_state}
        return Request(
            obs,
            self._instruction(message),
            _whole_number(message, SEED, LARGEST_SEED),
            _whole_number(message, DECISION, MOST_DECISIONS - 1) or 0,
        )

    def _picture(self, message: Mapping[Any, Any], key: str) -> np.ndarray:
        picture = _array(message, key)
        size, least, largest = self.image_size, self.least_image_size, self.largest_image_size
        height, width = picture.shape[:2] if picture.ndim == 3 else (0, 1)
        if picture.dtype != np.uint8 or picture.shape[2:] != (3,) or height != width or not least <= height <= largest:
            raise BadMessage(
                f"key {key} is {picture.dtype} {picture.shape}, expected uint8 ({size}, {size}, 3), or another square"
                f" picture of {least} to {largest} pixels a side"
            )
        return turned(picture)  # LIBERO's raw rows

    def _instruction(self, message: Mapping[Any, Any]) -> str:
        prompt = _value(message, PROMPT)
        if not isinstance(prompt, str):
            raise BadMessage(f"key {PROMPT} is of type {type(prompt).__name__}, expected a text")
        instruction = canonical_instruction(prompt)
        if instruction not in self.instructions:
            raise BadMessage(
                f"key {PROMPT} is '{prompt[:80]}', which is none of the {len(self.instructions)} instructions that the"
                " server's metadata lists"
            )
        return instruction


def _value(message: Mapping[Any, Any], key: str) -> Any:
    if key not in message:
        raise BadMessage(f"the message lacks the key {key}")
    return message[key]


def _array(message: Mapping[Any, Any], key: str) -> np.ndarray:
    value = _value(message, key)
    if not isinstance(value, np.ndarray):
        raise BadMessage(f"key {key} is of type {type(value).__name__}, expected an array")
    return value


def _part(message: Mapping[Any, Any], part: str) -> np.ndarray:
    """(n,) float32 of the robot's state."""
    sources = SOURCES[part]
    key, first = next((source for source in sources if source[0] in message), sources[-1])
    vector = _array(message, key)
    if vector.dtype.kind != "f" or vector.shape != (WIDTHS[key],):
        raise BadMessage(f"key {key} is {vector.dtype} {vector.shape}, expected floats ({WIDTHS[key]},)")
    with np.errstate(over="ignore"):
        found = vector[first : first + STATE_WIDTHS[part]].astype(np.float32)
    if not np.isfinite(found).all():
        raise BadMessage(f"key {key} has a value that is not finite")
    return found


def _whole_number(message: Mapping[Any, Any], key: str, largest: int) -> int | None:
    value = message.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not 0 <= value <= largest:
        raise BadMessage(f"key {key} is {str(value)[:40]}, expected a whole number from 0 to {largest}")
    return int(value)
