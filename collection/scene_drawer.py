"""Scenes without a demonstration, drawn in a worker process: everything stands in a random training layout, and the arm
is in a pose that a demonstration had. In grasps the hand was over an object there, and the expert, asked for that one,
has gone on: it is on its way down, closing, lifting, carrying, or letting go.

A scene depends on its task, its own number and the settings alone; arm poses are among those.

Letters: n scenes of one order, S numbers of a flattened simulator state, P arm poses.
"""

from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from collection.files import CONTINUES, SceneSettings, picture_datasets, settings_text, written_hdf5
from collection.worker import Worker
from errors import BadInput, is_out_of_memory
from observation import ASKED, EXPERT_ACTIONS, FINGER_TRAVEL, SIMULATOR_KEYS
from provenance import code_version
from seeds import mixed_seed
from simulator.env import LiberoEnv, SimulatorError
from simulator.layouts import graspable, training_layout
from simulator.scripted_expert import ScriptedExpert, Upright

RESTING_STEPS = 10  # until everything stands; bottles drop from 2 cm above
HOLD_STILL = np.array([0, 0, 0, 0, 0, 0, -1.0])
NEAR = 0.08  # metres beside an object's middle, within which the hand is over it
OPEN = 0.9  # share of their travel from which on the fingers are open
CHUNK = 10  # actions of the expert, the guide's chunk
GRASP_STEPS = 120  # of the expert's, from over an object until it has let go of it
UNMOVED = 0.02  # metres that it may push another object
TRIES = 200


@dataclass(frozen=True)
class ArmPoses:
    """How the arm may be posed, from demonstrations: joints (P, 7) in rad, fingers (P, 2) and where the hand is (P, 3)
    in metres."""

    joints: np.ndarray
    fingers: np.ndarray
    hands: np.ndarray

    def __len__(self) -> int:
        return len(self.joints)

    def near(self, xy: np.ndarray) -> np.ndarray:
        """Numbers of those with open fingers over a place (2,), at any height."""
        are_open = np.abs(self.fingers).sum(axis=1) > OPEN * 2 * FINGER_TRAVEL
        return np.flatnonzero(are_open & (np.linalg.norm(self.hands[:, :2] - xy, axis=1) < NEAR))


class SceneDrawer(Worker):
    """The worker process of scenes."""

    @classmethod
    def draw(cls, task_id: int, scenes: range, arm_poses: ArmPoses, settings: SceneSettings, path: Path) -> None:
        """Draws the scenes of these numbers and writes them to `path`."""
        env = cls.env_of(task_id, settings)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            resting = at_rest(env)
            with written_hdf5(path, path.parent) as file:
                cameras = picture_datasets(file, len(scenes), env.image_size)
                states, acted = [], []
                for i, scene in enumerate(scenes):
                    rng = np.random.default_rng(mixed_seed("scene", settings.seed, task_id, scene))
                    drawn = draw_scene(env, rng, resting, arm_poses, settings.grasps)
                    for name, dataset in cameras.items():
                        dataset[i] = drawn.pictures[SIMULATOR_KEYS[name]]
                    states.append(drawn.state)
                    acted += [] if drawn.expert is None else [drawn.expert]
                file["states"] = np.stack(states)  # (n, S)
                if acted:
                    file[ASKED], file[EXPERT_ACTIONS] = map(np.stack, zip(*acted, strict=True))  # (n,), (n, CHUNK, 7)
                file.attrs["model_file"], file.attrs["code"] = env.model_xml, code_version()
                file.attrs["collector"] = settings_text(settings)
        except SimulatorError as problem:
            cls.close()  # not to be trusted any more
            if is_out_of_memory(problem):
                raise MemoryError(str(problem)) from None
            raise BadInput(f"task {task_id}: drawing a scene failed ({problem}); {CONTINUES}") from None


@dataclass(frozen=True)
class AtRest:
    """Of a scene once everything stands: how high each object is in metres (`reset()` drops it from above), and the
    hand in the arm's start pose."""

    heights: dict[str, float]
    upright: Upright


def at_rest(env: LiberoEnv) -> AtRest:
    env.reset(seed=0)
    upright = ScriptedExpert(env, np.random.default_rng(0)).hand_upright()
    for _ in range(RESTING_STEPS):
        env.step(HOLD_STILL)
    return AtRest(env.object_heights(), upright)


@dataclass(frozen=True)
class DrawnScene:
    """state (S,) and pictures of each camera; where the expert acts, the number of the object that it was asked for,
    among the sorted names of those that can be, and its next actions (CHUNK, 7) float32."""

    state: np.ndarray
    pictures: dict[str, np.ndarray]
    expert: tuple[int, np.ndarray] | None = None


def draw_scene(
    env: LiberoEnv, rng: np.random.Generator, resting: AtRest, arm_poses: ArmPoses, grasps: float
) -> DrawnScene:
    """One scene from `rng`. With `grasps` above 0, the share of those, the expert acts in every one; whoever is asked
    for what is out of reach, or pushes something else, draws anew."""
    if not grasps:
        set_scene(env, rng, resting, arm_poses)
        return DrawnScene(env.state(), env.draw(env.poses()))
    names, own = sorted(graspable(env)), env.domain.obj_of_interest[0]
    for _ in range(TRIES):
        name, steps = names[rng.integers(len(names))], 0
        if rng.random() < grasps:
            set_scene(env, rng, resting, arm_poses, over=name)
            steps = int(rng.integers(GRASP_STEPS + 1))
        else:
            set_scene(env, rng, resting, arm_poses)
        env.ask_for(name)
        try:
            drawn = _drawn_after(steps, env, rng, resting.upright, names.index(name))
        finally:
            env.ask_for(own)
        if drawn is not None:
            return drawn
    raise SimulatorError(f"in none of {TRIES} layouts the expert could do what it was asked for")


def _drawn_after(
    steps: int, env: LiberoEnv, rng: np.random.Generator, upright: Upright, asked: int
) -> DrawnScene | None:
    """The scene once the expert has gone on for so many steps, and what it does next. None where it cannot."""
    expert = ScriptedExpert(env, rng)
    others = [name for name in env.domain.objects_dict if name != expert.target]
    if not expert.is_in_reach():
        return None
    before, acting = places(env, others), expert.actions_from_here(upright)
    for action in islice(acting, steps):
        env.step(action)
    state, pictures, chunk = env.state(), env.draw(env.poses()), []
    for action in islice(acting, CHUNK):
        chunk.append(action)
        env.step(action)
    if np.linalg.norm(places(env, others) - before, axis=1).max() > UNMOVED:
        return None
    return DrawnScene(state, pictures, (asked, np.array(chunk, np.float32)))


def set_scene(
    env: LiberoEnv, rng: np.random.Generator, resting: AtRest, arm_poses: ArmPoses, over: str | None = None
) -> None:
    """Sets one: a layout and an arm pose drawn from `rng`, again where the arm would touch an object; open and `over`
    that object, where one is named."""
    for _ in range(TRIES):
        env.reset(seed=int(rng.integers(2**31)))
        env.place_objects(training_layout(env, rng), resting.heights)
        choice = np.arange(len(arm_poses)) if over is None else arm_poses.near(places(env, [over])[0, :2])
        if len(choice):
            pose = rng.choice(choice)
            env.pose_arm(arm_poses.joints[pose], arm_poses.fingers[pose])
            if not env.arm_touches_an_object():
                return
    raise SimulatorError(f"none of {TRIES} layouts leaves room for the arm in a pose of the demonstrations")


def places(env: LiberoEnv, names: list[str]) -> np.ndarray:
    """Where objects are, (names, 3) in metres."""
    return env.sim.data.body_xpos[[env.domain.obj_body_id[name] for name in names]]
