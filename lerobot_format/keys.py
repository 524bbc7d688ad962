"""Which feature of a LeRobot dataset is which key of LIBERO's HDF5 files, with presets for the sets that are known.

A source is a feature, or a part of one: `observation.state[0:6]` are its numbers 0 to 5.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from errors import BadInput
from lerobot_format.dataset import LeRobotDataset
from lerobot_format.layout import ACTION, FINGERS, JOINTS, OWN, PICTURES, STATE
from observation import CAMERAS

# HDF5 key -> how many numbers it has; those of `obs` but for the actions.
WIDTHS = {"actions": 7, "joint_states": 7, "gripper_states": 2, "ee_states": 6}
TARGETS = (*CAMERAS, *WIDTHS)
NEEDED = (*CAMERAS, "actions", "gripper_states")
ARM = ("joint_states", "ee_states")  # one of the two at least

# The first whose features are all there is taken.
PRESETS = {
    OWN: PICTURES  # our own export
    | {"actions": ACTION, "joint_states": JOINTS, "gripper_states": FINGERS, "ee_states": f"{STATE}[0:6]"},
    "ipec": {  # IPEC-COMMUNITY's
        "agentview_rgb": "observation.images.image",
        "eye_in_hand_rgb": "observation.images.wrist_image",
        "actions": "action",
        "joint_states": "observation.states.joint_state",
        "gripper_states": "observation.states.gripper_state",
        "ee_states": "observation.states.ee_state",
    },
    "libero": {  # lerobot/libero and HuggingFaceVLA/libero
        "agentview_rgb": "observation.images.image",
        "eye_in_hand_rgb": "observation.images.image2",
        "actions": "action",
        "gripper_states": "observation.state[6:8]",
        "ee_states": "observation.state[0:6]",
    },
    "physical-intelligence": {  # physical-intelligence/libero
        "agentview_rgb": "image",
        "eye_in_hand_rgb": "wrist_image",
        "actions": "actions",
        "gripper_states": "state[6:8]",
        "ee_states": "state[0:6]",
    },
}


@dataclass(frozen=True)
class Source:
    """Where a key's values come from."""

    feature: str
    part: slice

    def __str__(self) -> str:
        ends = (self.part.start, self.part.stop)
        return self.feature if ends == (None, None) else f"{self.feature}[{ends[0]}:{ends[1]}]"


def sources_of(dataset: LeRobotDataset, preset: str | None, changes: Sequence[str]) -> tuple[str, dict[str, Source]]:
    """The preset's name ("none" without one) and the source of each HDF5 key. `changes` are KEY=FEATURE or
    KEY=FEATURE[a:b].

    Raises BadInput where no preset fits and the changes do not say enough, or for a source that is not there or is of
    another width.
    """
    changed = dict(_change(text) for text in changes)
    name = preset or next((name for name, keys in PRESETS.items() if _fits(dataset, keys | changed)), "none")
    texts = PRESETS.get(name, {}) | changed
    missing = [key for key in NEEDED if key not in texts] or ([] if set(ARM) & set(texts) else list(ARM[:1]))
    if missing:
        there = "; ".join(f"{name} {feature.get('shape')}" for name, feature in dataset.features.items())
        raise BadInput(
            f"{dataset.root}: no preset knows its features ({there}); say what is what with "
            f"{' '.join(f'--key {key}=FEATURE' for key in missing)}, or FEATURE[0:6] for a part of one"
        )
    sources = {key: _source(key, texts[key]) for key in TARGETS if key in texts}
    for key, source in sources.items():
        if key in CAMERAS:
            dataset.size_of_pictures(source.feature)
            continue
        width = len(range(dataset.width(source.feature))[source.part])
        if width != WIDTHS[key]:
            raise BadInput(f"{dataset.root}: {source} has {width} numbers, {key} is of {WIDTHS[key]}")
    return name, sources


def _fits(dataset: LeRobotDataset, texts: Mapping[str, str]) -> bool:
    return all(_source(key, text).feature in dataset.features for key, text in texts.items())


def _change(text: str) -> tuple[str, str]:
    key, separator, source = text.partition("=")
    if not separator or key not in TARGETS:
        raise BadInput(f"--key {text}: expected KEY=FEATURE with one of the keys {', '.join(TARGETS)}")
    return key, source


def _source(key: str, text: str) -> Source:
    match = re.fullmatch(r"([^\[\]]+)(?:\[(\d{1,4}):(\d{1,4})\])?", text)
    if not match or (key in CAMERAS and match.group(2)):
        raise BadInput(
            f"--key {key}={text}: expected a feature such as observation.state, or a part of one, state[0:6]"
        )
    part = slice(int(match.group(2)), int(match.group(3))) if match.group(2) else slice(None)
    return Source(match.group(1), part)
