"""What training reads without a word, and its user should know: one sentence each about the demos of a file.

Letters: T steps of a demo.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from checkup.recording import Recording
from demos.hdf5 import first_few
from observation import CAMERAS, FINGER_TRAVEL, STATE_WIDTHS

STILL = 1e-3  # pose deltas below this move no arm: 0.05 mm or 0.03 degrees
MANY_NO_OPS = 0.1  # share of a file's actions; a person at the device makes some
MANY_CLIPPED = 0.35  # share of a file's steps; the scripted expert moves at full speed in up to a fourth
PUSHES, BLOCKED = 0.15, 2e-3  # a pose delta that moves a free arm, and rad in a step that it then turns a joint by
MANY_BLOCKED = 0.04  # share of a file's steps
SMALL_ACTIONS = 0.06  # a file whose largest pose delta is below it has metres in place of the controller's units
FINGERS_MOVE = 5e-4  # m in a step
FEW_MOVES = 5  # steps from which no convention is concluded
JUMP = 0.5  # rad in a step of 1/20 s; the arm's fastest joint turns 0.13
TURN = 2 * np.pi  # rad; no joint of the arm goes so far
DARK = 16  # of 255

DIMENSIONS = ("x", "y", "z", "rx", "ry", "rz", "gripper")


class Gripper(NamedTuple):
    """What the last dimension of the actions means."""

    values: str  # which there are: "-1/+1", "0/1", "other", "none"
    closes: str  # which of them the fingers close after: "high", as LIBERO has it, "low", "unclear", "unseen"

    def __str__(self) -> str:
        if (self.values, self.closes) == ("-1/+1", "high"):
            return "as expected"
        found = {"high": "high closes", "low": "low closes", "unclear": "unclear", "unseen": "fingers rest"}
        return f"{self.values}, {found[self.closes]}"


def gripper_convention(recordings: Sequence[Recording]) -> Gripper:
    """Found from how the fingers move while a command holds: whether obs[t] was recorded before or after actions[t]
    shifts this by one step of many."""
    commands = [recording.actions[:, 6] for recording in recordings if recording.actions is not None]
    if not commands:
        return Gripper("none", "unseen")
    found = np.unique(np.concatenate(commands))
    values = "-1/+1" if np.isin(found, (-1, 1)).all() else "0/1" if np.isin(found, (0, 1)).all() else "other"
    middle = 0.5 if values == "0/1" else 0.0
    closing = moving = 0
    for recording in recordings:
        if recording.actions is None or recording.opening is None or len(recording.opening) != recording.steps:
            continue
        change = np.diff(recording.opening)  # (T - 1,)
        moves = np.abs(change) > FINGERS_MOVE
        is_high = recording.actions[1:, 6] > middle
        moving += int(moves.sum())
        closing += int((moves & (is_high == (change < 0))).sum())
    if moving < FEW_MOVES:
        return Gripper(values, "unseen")
    share = closing / moving
    return Gripper(values, "high" if share > 0.8 else "low" if share < 0.2 else "unclear")


def no_ops(actions: np.ndarray) -> np.ndarray:
    """Which of the actions (T, 7) do nothing: no pose delta, and the gripper as it was. (T,) of bool."""
    still = (np.abs(actions[:, :6]) < STILL).all(axis=1)
    return still & np.append(False, actions[1:, 6] == actions[:-1, 6])


def blocked(recording: Recording) -> np.ndarray:
    """In which steps the actions ask for motion and neither arm nor fingers move: the hand pushes against something.
    (T - 1,) of bool, empty where the demo does not say."""
    joints = recording.robot_state.get("joint_states")
    if recording.actions is None or joints is None or recording.opening is None:
        return np.zeros(0, dtype=bool)
    if not len(recording.actions) == len(joints) == len(recording.opening):
        return np.zeros(0, dtype=bool)
    asked = np.abs(recording.actions[:-1, :6]).max(axis=1) >= PUSHES
    rests = np.abs(np.diff(recording.opening)) < FINGERS_MOVE
    return asked & rests & (np.abs(np.diff(joints, axis=0)).max(axis=1) < BLOCKED)


def clipped(actions: np.ndarray) -> np.ndarray:
    """Which steps have a pose delta at the end of its range. (T,) of bool."""
    return (np.abs(actions[:, :6]) >= 1 - 1e-6).any(axis=1)


def oddities(path: Path, recordings: Sequence[Recording]) -> Iterator[str]:
    """All that is odd about the demos of a file."""
    yield from _of_actions(path, [(one.key, one.actions) for one in recordings if one.actions is not None])
    yield from _of_blocked_hands(path, recordings)
    yield from _of_gripper(path, recordings)
    yield from _of_robot_state(path, recordings)
    yield from _of_pictures(path, recordings)
    failed = [one.key for one in recordings if one.ends_in_success is False]
    if failed:
        yield f"{path}: key dones ends with 0 in {first_few(failed)}, expected 1; was the task not solved?"


def _of_actions(path: Path, demos: list[tuple[str, np.ndarray]]) -> Iterator[str]:
    if not demos:
        return
    actions = np.concatenate([actions for _, actions in demos])
    share = np.concatenate([no_ops(actions) for _, actions in demos]).mean()
    if share > MANY_NO_OPS:
        yield (
            f"{path}: key actions: {share:.0%} do nothing (pose deltas below {STILL}, the gripper as before), expected "
            f"less than {MANY_NO_OPS:.0%}; a policy learns to stand still from them"
        )
    share = clipped(actions).mean()
    if share > MANY_CLIPPED:
        yield (
            f"{path}: key actions: {share:.0%} of the steps have a pose delta of -1 or 1, expected less than "
            f"{MANY_CLIPPED:.0%}; were they clipped?"
        )
    largest = np.abs(actions[:, :6]).max()
    if 0 < largest < SMALL_ACTIONS:
        yield (
            f"{path}: key actions: no pose delta is above {largest:.2g}, expected up to 1 (0.05 m or 0.5 rad); are "
            "they metres?"
        )
    constant = [f"{DIMENSIONS[i]} is {actions[0, i] + 0.0:.3g}" for i in np.flatnonzero(np.ptp(actions, axis=0) == 0)]
    if constant:
        yield f"{path}: key actions: {', '.join(constant)} in all of its demos, expected values that vary"
    seen: dict[bytes, str] = {}
    for key, of_demo in demos:
        first = seen.setdefault(of_demo.tobytes(), key)
        if first != key:
            yield f"{path}: {key}: key actions is that of {first}, expected a motion of its own"


def _of_blocked_hands(path: Path, recordings: Sequence[Recording]) -> Iterator[str]:
    steps = np.concatenate([blocked(one) for one in recordings]) if recordings else np.zeros(0)
    if steps.size and steps.mean() > MANY_BLOCKED:
        yield (
            f"{path}: key actions: in {steps.mean():.0%} of the steps the hand is blocked (a pose delta of {PUSHES} or "
            f"more turns no joint by {BLOCKED} rad, and the fingers rest), expected less than {MANY_BLOCKED:.0%}; a "
            "policy learns to push on from them"
        )


def _of_gripper(path: Path, recordings: Sequence[Recording]) -> Iterator[str]:
    found = gripper_convention(recordings)
    if found.closes == "low":
        yield (
            f"{path}: key actions: the fingers close after the lower gripper command, expected after the higher one "
            "(-1 opens, 1 closes); the convention is inverted"
        )
    if found.closes == "unclear":
        yield (
            f"{path}: key actions: the fingers do not follow the gripper commands, expected them to open after -1 and "
            "close after 1"
        )


def _of_robot_state(path: Path, recordings: Sequence[Recording]) -> Iterator[str]:
    for name in STATE_WIDTHS:
        parts = list(_parts(recordings, name).values())
        constant = np.flatnonzero(np.ptp(np.concatenate(parts), axis=0) == 0).tolist() if parts else []
        if constant:
            numbers = ", ".join(map(str, constant))
            yield f"{path}: key obs/{name}: number {numbers} is the same in all of its demos, expected values that vary"
    joints = _parts(recordings, "joint_states")
    far = [key for key, values in joints.items() if np.abs(values).max(initial=0) > TURN]
    if far:
        yield (
            f"{path}: key obs/joint_states goes beyond a full turn in {first_few(far)}, expected rad; is it in degrees?"
        )
    for key, values in joints.items():
        jumps = np.abs(np.diff(values, axis=0)).max(axis=1, initial=0)
        if key not in far and (jumps > JUMP).any():
            step = int(jumps.argmax())
            yield (
                f"{path}: {key}: key obs/joint_states jumps by {jumps[step]:.2g} rad from step {step} to {step + 1}, "
                f"expected at most {JUMP}; are steps missing?"
            )
    fingers = _parts(recordings, "gripper_states")
    far = [key for key, values in fingers.items() if np.abs(values).max(initial=0) > 1.5 * FINGER_TRAVEL]
    if far:
        yield (
            f"{path}: key obs/gripper_states goes beyond {1.5 * FINGER_TRAVEL:g} in {first_few(far)}, expected at most "
            f"{FINGER_TRAVEL} m"
        )


def _parts(recordings: Sequence[Recording], name: str) -> dict[str, np.ndarray]:
    """One part of the robot state of each demo that has it."""
    return {one.key: one.robot_state[name] for one in recordings if name in one.robot_state}


def _of_pictures(path: Path, recordings: Sequence[Recording]) -> Iterator[str]:
    seen: dict[tuple[str, int], str] = {}
    for one in recordings:
        for camera, film in one.films.items():
            first = seen.setdefault((camera, film.checksum), one.key)
            if first != one.key:
                yield f"{path}: {one.key}: key obs/{camera} shows what it shows in {first}, expected a film of its own"
            if 0 < film.brightest < DARK:
                yield (
                    f"{path}: {one.key}: key obs/{camera}: no pixel is brighter than {film.brightest} of 255; was it "
                    "dark, or are these shares of 1?"
                )
        checksums = [film.checksum for film in one.films.values()]
        if len(checksums) == len(CAMERAS) and len(set(checksums)) == 1:
            yield f"{path}: {one.key}: both cameras show the same, expected {' and '.join(CAMERAS)} to differ"
