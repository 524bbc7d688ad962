"""A scripted expert for "pick up the X and place it in the basket", the ten tasks of libero_object.

It reads the simulator's full state (object poses, collision boxes), which no policy sees, and acts through the same 7-D
actions as a policy: OSC_POSE deltas in [-1, 1] (1 is 0.05 m or 0.5 rad per step) and the gripper, -1 open, +1 closed.
Lengths are in metres, angles in rad, times in steps of 1/20 s; z points up.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from simulator.env import LiberoEnv, has_fallen

OPEN, CLOSED = -1.0, 1.0
SETTLE_STEPS = 5  # the objects drop onto the floor; LIBERO's files leave these steps out
CLOSING_STEPS, OPENING_STEPS = 12, 8
RETREAT_STEPS = 40  # from letting go until the expert gives up waiting for success and tries again
WIDEST_GRASP = 0.074  # the fingers open to 0.08
PALM_HEIGHT = 0.031  # over the point between the fingertips
TRAVEL_HEIGHT = 0.16  # of the hand on its way over the other objects
CLEAR_OF_RIM = 0.165  # lowest height of the carried object's bottom on its way to the basket
MISSED_BY = 0.02, 0.05  # from the middle of the grasp that was missed on purpose
UNNOTICED_STEPS = 70  # after it, at most: long enough to be over the basket with nothing in the hand
ACTION_NOISE = 0.05
REACH = 0.77  # from the base. Beyond, the elbow stretches to its limit, from where the hand does not come back.


@dataclass(frozen=True)
class Grasp:
    """Where the hand takes the object: centre `xy` (2,), `height` of the fingertips, `rotation` of the hand (3, 3)."""

    xy: np.ndarray
    height: float
    rotation: np.ndarray
    top: float  # of the object
    bottom: float


class ScriptedExpert:
    """The expert of one episode; its gains, heights and aim are drawn from `rng`, so no two episodes look alike.

    Use after `env.reset()`: every action of `settle()`, then perhaps of `missed_grasp()`, then of `actions()` goes to
    `env.step`.

    Tall objects are taken near their top. Lower down, the palm would stand on a carton or a bottle before the fingers
    are where they should be: the hand then presses for a second before it closes, from which a policy learns to press
    on, and a carton may stay on a finger that opens.
    """

    def __init__(self, env: LiberoEnv, rng: np.random.Generator):
        self.env, self.rng = env, rng
        self.target, self.basket = env.domain.obj_of_interest[:2]
        self.hand_site = env.sim.model.site_name2id("gripper0_grip_site")
        self.pads = [env.sim.model.geom_name2id(f"gripper0_finger{i}_pad_collision") for i in (1, 2)]
        self.position_gain = rng.uniform(9, 13)
        self.rotation_gain = rng.uniform(2.4, 3.6)
        self.hover = rng.uniform(0.08, 0.13)  # above the object before going down
        self.aim_offset = rng.normal(0, 0.004, 2)
        self.drop_offset = rng.uniform(-0.012, 0.012, 2)  # from the middle of the basket
        self.carry_height = CLEAR_OF_RIM + rng.uniform(0, 0.04)
        self.slow_noise = np.zeros(6)

    def settle(self) -> Iterator[np.ndarray]:
        """The hand waits until the objects have dropped onto the floor."""
        self.placed = self.env.object_rotations()[self.target]
        for _ in range(SETTLE_STEPS):
            yield np.array([0, 0, 0, 0, 0, 0, OPEN])
        _, rotation = self._hand()
        self.upright, self.upright_yaw = _pointing_down(rotation), self._closing_yaw()

    def why_target_cannot_be_taken(self) -> str:
        """After `settle()`: why this is no scene to show a grasp in, or "" if it is one."""
        if has_fallen(self.placed, self.env.object_rotations()[self.target]):
            return "the target fell over"
        base = self.env.domain.robots[0].base_pos
        if np.linalg.norm((self._object_position(self.target) - base)[:2]) > REACH:
            return "the target is out of reach"
        return ""

    def missed_grasp(self) -> Iterator[np.ndarray]:
        """A grasp beside the target, which it may push over, and what one does who has not noticed: lift, go to the
        basket, let go of nothing. Ends at a random moment after the fingers have closed."""
        direction, distance = self.rng.uniform(0, 2 * np.pi), self.rng.uniform(*MISSED_BY)
        while True:
            yield from self._grasp(distance * np.array([np.cos(direction), np.sin(direction)]))
            if not self._fingers_hold_target():
                break
            distance += 0.01  # a large object, caught all the same
        unnoticed = itertools.chain(self._lift(), self._let_go_over_basket())
        yield from itertools.islice(unnoticed, int(self.rng.integers(UNNOTICED_STEPS + 1)))

    def actions(self) -> Iterator[np.ndarray]:
        """Yields actions (7,) without end; whoever steps decides when the episode is over."""
        while True:
            yield from self._grasp()
            yield from self._lift()
            yield from self._place()
            self.aim_offset = self.rng.normal(0, 0.003, 2)  # slipped, or beside the basket: once more

    # The parts of an episode. Each yields actions until its goal is reached or its time is up.

    def _grasp(self, missed_by=(0.0, 0.0)) -> Iterator[np.ndarray]:
        """Above the object, or `missed_by` (2,) beside it, down, close."""
        grasp = self._plan_grasp()
        for _ in range(80):
            hand, _ = self._hand()
            goal = np.append(grasp.xy + missed_by + 2 * self.aim_offset, max(grasp.top, grasp.height) + self.hover)
            distance = np.linalg.norm((goal - hand)[:2])
            if distance < 0.018 and abs(goal[2] - hand[2]) < 0.03:
                break
            if distance > 0.06:
                goal[2] = max(goal[2], TRAVEL_HEIGHT)
            if distance > 0.018 and hand[2] < grasp.top + 0.02:
                goal[:2] = hand[:2]  # beside the object after a miss: up before anything else
            yield self._towards(goal, grasp.rotation, OPEN)

        grasp = self._plan_grasp()
        for _ in range(45):
            hand, _ = self._hand()
            goal = np.append(grasp.xy + missed_by + 0.5 * self.aim_offset, grasp.height)
            if abs(goal[2] - hand[2]) < 0.006:
                break
            if np.linalg.norm((goal - hand)[:2]) > 0.012 and hand[2] > grasp.top + 0.03:
                goal[2] = max(goal[2], hand[2] - 0.02)  # centre first, then go down
            yield self._towards(goal, grasp.rotation, OPEN, noise=0.4, fastest=0.7)

        closing_at, _ = self._hand()
        for _ in range(CLOSING_STEPS):
            goal = np.append(closing_at[:2], grasp.height)
            yield self._towards(goal, grasp.rotation, CLOSED, noise=0.1, fastest=0.3)
        self.grasp, self.closed_at = grasp, closing_at
        self.hand_over_bottom = self._hand()[0][2] - grasp.bottom  # of the object in it

    def _lift(self) -> Iterator[np.ndarray]:
        """Straight up, until what is in the hand clears the basket's rim."""
        for _ in range(60):
            goal = np.append(self.closed_at[:2], self.carry_height + self.hand_over_bottom)
            if self._hand()[0][2] > goal[2] - 0.03:
                break
            yield self._towards(goal, self.grasp.rotation, CLOSED, noise=0.7)

    def _place(self) -> Iterator[np.ndarray]:
        """Over the basket, a little down, open, up. Returns at once when the object is not or no longer in the hand."""
        for _ in range(80):
            if not self._holds_target():
                return
            goal = self._over_basket(self.carry_height)
            if np.linalg.norm((goal - self._hand()[0])[:2]) < 0.02:
                break
            yield self._towards(goal, self.upright, CLOSED)

        for _ in range(25):
            goal = self._over_basket(0.10)  # the object's bottom is then 4 to 5 cm below the rim
            if self._hand()[0][2] < goal[2] + 0.015:
                break
            yield self._towards(goal, self.upright, CLOSED, noise=0.4)

        letting_go_at, _ = self._hand()
        for _ in range(OPENING_STEPS):
            yield self._towards(letting_go_at, self.upright, OPEN, noise=0.2, fastest=0.3)
        retreat = np.append(letting_go_at[:2], 0.30)
        for _ in range(RETREAT_STEPS):
            yield self._towards(retreat, self.upright, OPEN, noise=0.5)
        while self.env.check_success():
            yield self._towards(retreat, self.upright, OPEN, noise=0.5)

    def _let_go_over_basket(self) -> Iterator[np.ndarray]:
        """As `_place`, with nothing in the hand."""
        goal = np.append(self._object_position(self.basket)[:2] + self.drop_offset, self._hand()[0][2])
        for gripper, steps in ((CLOSED, 40), (OPEN, UNNOTICED_STEPS)):
            for _ in range(steps):
                yield self._towards(goal, self.upright, gripper)

    def _towards(self, goal, rotation, gripper: float, noise: float = 1.0, fastest: float = 1.0) -> np.ndarray:
        """Proportional control of the hand to position `goal` (3,) and `rotation` (3, 3), as one noisy action (7,)."""
        hand, hand_rotation = self._hand()
        action = np.zeros(7)
        action[:3] = self.position_gain * (goal - hand)
        action[:3] *= fastest / max(fastest, np.abs(action[:3]).max())  # slower, but in the same direction
        action[3:6] = np.clip(self.rotation_gain * _axis_angle(rotation @ hand_rotation.T), -0.5, 0.5)
        # Part of the noise changes slowly (an AR(1) process of unit variance), so that demos differ in their paths.
        self.slow_noise = 0.85 * self.slow_noise + 0.53 * self.rng.normal(0, 1, 6)
        scale = ACTION_NOISE * noise
        action[:3] += 0.7 * scale * (self.slow_noise[:3] + self.rng.normal(0, 1, 3))
        action[3:6] += 0.3 * scale * self.slow_noise[3:]
        action[:6] = np.clip(action[:6], -1, 1)
        action[6] = gripper
        return action

    def _plan_grasp(self) -> Grasp:
        """The narrowest grasp from above whose fingers and palm miss the neighbours, at any yaw."""
        boxes = self.env.collision_boxes(self.target)  # (n, 8, 3)
        top, bottom = boxes[..., 2].max(), boxes[..., 2].min()
        height = max(bottom + 0.010, min(top - 0.028, 0.5 * (top + bottom) + 0.015))
        if top - height > PALM_HEIGHT:
            height = top - 0.018  # on a carton's gable, above the ledge under which an open finger can catch
        between_fingers = (boxes[..., 2].min(axis=1) <= height + 0.008) & (boxes[..., 2].max(axis=1) >= height - 0.008)
        outline = boxes[between_fingers].reshape(-1, 3)[:, :2]
        neighbours = [
            (box[:, :2], box[:, 2].max())
            for name in self.env.domain.obj_body_id
            if name != self.target
            for box in self.env.collision_boxes(name)
            if box[:, 2].max() > height - 0.01
        ]
        yaw_now = self._closing_yaw()
        best_cost, best_yaw, best_xy = np.inf, yaw_now, outline.mean(axis=0)
        for turn in np.deg2rad(np.arange(-90, 90, 5)):
            yaw = yaw_now + turn
            axes = np.array([[np.cos(yaw), np.sin(yaw)], [-np.sin(yaw), np.cos(yaw)]])  # rows: closing axis, across it
            extent = outline @ axes.T  # (m, 2)
            low, high = extent.min(axis=0), extent.max(axis=0)
            width, half_length = high[0] - low[0], (high[1] - low[1]) / 2
            for slide in (0.0, -0.012, 0.012, -0.024, 0.024):  # along the long side
                if slide and abs(slide) > half_length - 0.012:
                    continue
                xy = ((low + high) / 2 + [0, slide]) @ axes
                cost = width + 0.012 * abs(turn) + 0.25 * abs(slide)
                if width > WIDEST_GRASP:
                    cost += 1.0 + 10 * width
                cost += sum(_collision_cost((corners - xy) @ axes.T, top - height) for corners, top in neighbours)
                if cost < best_cost:
                    best_cost, best_yaw, best_xy = cost, yaw, xy
        # The two fingers are alike, so a quarter turn is the farthest that the hand ever has to turn.
        turn = (best_yaw - self.upright_yaw + np.pi / 2) % np.pi - np.pi / 2
        return Grasp(best_xy, height, _about_z(turn) @ self.upright, top, bottom)

    # What the expert reads from the simulator.

    def _hand(self) -> tuple[np.ndarray, np.ndarray]:
        data = self.env.sim.data
        return data.site_xpos[self.hand_site].copy(), data.site_xmat[self.hand_site].reshape(3, 3).copy()

    def _closing_yaw(self) -> float:
        """Heading of the axis along which the fingers close."""
        first, second = self.env.sim.data.geom_xpos[self.pads]
        axis = second - first
        if np.linalg.norm(axis[:2]) < 1e-3:  # closed fingers have no distance: the hand's x axis is the same
            axis = self._hand()[1][:, 0]
        return np.arctan2(axis[1], axis[0])

    def _object_position(self, name: str) -> np.ndarray:
        return self.env.sim.data.body_xpos[self.env.domain.obj_body_id[name]].copy()

    def _over_basket(self, bottom_height: float) -> np.ndarray:
        """Where the hand (3,) must be for the object in it to hang over the basket, its bottom at `bottom_height`."""
        hand_from_object = self._hand()[0][:2] - self._object_position(self.target)[:2]
        xy = self._object_position(self.basket)[:2] + self.drop_offset + hand_from_object
        return np.append(xy, bottom_height + self.hand_over_bottom)

    def _holds_target(self) -> bool:
        fingers = self.env.sim.data.qpos[self.env.domain.robots[0]._ref_gripper_joint_pos_indexes]
        distance = np.linalg.norm(self._object_position(self.target) - self._hand()[0])
        return bool(np.abs(fingers).sum() > 0.004 and distance < 0.16)

    def _fingers_hold_target(self) -> bool:
        """Whether both fingers touch it: unlike `_holds_target`, told apart from another object in the hand."""
        domain = self.env.domain
        return bool(domain._check_grasp(domain.robots[0].gripper, domain.objects_dict[self.target]))


def _collision_cost(corners: np.ndarray, top: float) -> float:
    """Cost of a neighbour's box: its corners (8, 2) along and across the closing axis, its top above the fingertips."""
    (low_along, low_across), (high_along, high_across) = corners.min(axis=0), corners.max(axis=0)

    def reaches(along, across):
        return low_along < along and high_along > -along and low_across < across and high_across > -across

    if reaches(0.066, 0.014):  # the open fingers
        return 0.2
    if top > 0.035 and reaches(0.11, 0.036):  # the palm
        return 0.1
    return 0.0


def _pointing_down(rotation: np.ndarray) -> np.ndarray:
    """The hand rotation (3, 3) that points straight down and keeps the yaw of `rotation`."""
    x = np.append(rotation[:2, 0], 0) / np.linalg.norm(rotation[:2, 0])
    z = np.array([0, 0, -1.0])
    return np.stack([x, np.cross(z, x), z], axis=1)


def _about_z(angle: float) -> np.ndarray:
    cos, sin = np.cos(angle), np.sin(angle)
    return np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])


def _axis_angle(rotation: np.ndarray) -> np.ndarray:
    """Rotation matrix (3, 3) of less than half a turn -> axis times angle (3,)."""
    skew = rotation - rotation.T
    sine_axis = np.array([skew[2, 1], skew[0, 2], skew[1, 0]]) / 2
    sine = np.linalg.norm(sine_axis)
    return sine_axis if sine < 1e-9 else sine_axis * (np.arctan2(sine, (np.trace(rotation) - 1) / 2) / sine)
