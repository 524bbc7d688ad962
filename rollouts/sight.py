"""Does an encoder see what the words ask for? In scenes that it never saw the simulator knows where that is.

Asked is a phase-1 checkpoint with gaze, whose eyes point at the object on both pictures, or with the head of place,
which tells from z where it is. The scenes are of libero_object: at LIBERO's own places with the target moved, and in
the layouts that no training data shows (simulator/layouts.py). It costs a minute, and decides before any policy is
trained whether one could look.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from demos.simulator_truth import Kinematics
from errors import BadInput
from jepa.gaze import FOUND_WITHIN
from observation import from_simulator
from rollouts.episodes import STAND_STILL, WAIT_STEPS, reset_seed
from rollouts.evaluation import tasks_of
from simulator.env import LiberoEnv, SimulatorError, make_env
from simulator.layouts import LAYOUTS, MOVED_BY
from simulator.suites import make_suite

SUITE = "libero_object"
LAYOUTS_SEEN = {
    "libero": "LIBERO's own places, the target moved by up to 5 cm",
    "withheld_exchange": "two objects at withheld exchanges of their places",
    "withheld_place": "shuffled, the target in a withheld place",
}


class Seen(NamedTuple):
    """What an encoder says of an observation; None where it has no eyes, or no head of place."""

    at: np.ndarray | None  # (2, 2) of each camera, right and up from the picture's middle, whose edges are -1 and 1
    place: np.ndarray | None  # (3,) in metres; where the head tells the goal's place, too, (6,), and the hand's, (9,)


See = Callable[[dict, str], Seen]  # observation, instruction


class Shown(NamedTuple):
    """A scene: what the encoder says of it, and what the simulator knows."""

    seen: Seen
    at: np.ndarray  # (2, 2) as Seen's, NaN behind a camera
    place: np.ndarray  # (3,)
    goal: np.ndarray | None  # (3,) of what the target is to be brought to, None where that is no object


def sight(see: See, instructions: Sequence[str], observation: dict, scenes: int, seed: int) -> dict[str, dict]:
    """Layout -> "scenes", and of each camera "in_view" and "found", the numbers of scenes in which the object is on its
    picture and where it was found there; with the head of place the errors of x and y, "mm_mean" and "mm_median", and
    where it tells the goal's place, too, "goal_mm_mean" and "goal_mm_median".

    instructions: those that the encoder knows. `scenes` random resets of each task and layout. Raises BadInput where
    none of the suite's tasks is known, or a scene cannot be set.
    """
    shown: dict[str, list[Shown]] = {layout: [] for layout in LAYOUTS_SEEN}
    for task, instruction in tqdm(tasks_of(SUITE, instructions).items(), desc="setting scenes", unit="task"):
        env = make_env(make_suite(SUITE), task, observation["image_size"], observation["visual_mesh_ratio"])
        for layout, of_layout in shown.items():
            seeds = [reset_seed(f"sight, {layout}", SUITE, task, scene, seed) for scene in range(scenes)]
            of_layout += scenes_of_layout(env, see, instruction, layout, seeds)
        env.close()
    return {layout: figures(of_layout) for layout, of_layout in shown.items()}


def scenes_of_layout(env: LiberoEnv, see: See, instruction: str, layout: str, seeds: Sequence[int]) -> Iterator[Shown]:
    """One scene of a layout for each seed."""
    kinematics = Kinematics(env.model_xml, str(env.bddl_file), "sight needs it")
    target = env.target
    assert target is not None, "every task of libero_object is about an object"
    for seed in seeds:
        try:
            set_scene(env, layout, target, seed)
        except SimulatorError as problem:
            raise BadInput(f"--sight: {problem}; another --seed has other scenes") from None
        at = kinematics.on_pictures(env.state()[None], [target])[0, :, 0]
        place = env.sim.data.body_xpos[env.domain.obj_body_id[target]].copy()
        goal = None
        if (others := env.domain.obj_of_interest[1:]) and others[0] in env.domain.obj_body_id:
            goal = env.sim.data.body_xpos[env.domain.obj_body_id[others[0]]].copy()
        yield Shown(see(from_simulator(env.observe()), instruction), at, place, goal)


def set_scene(env: LiberoEnv, layout: str, target: str, seed: int) -> None:
    """Sets a scene of a layout and lets its objects settle."""
    env.reset(seed=seed)
    rng = np.random.default_rng(seed)
    if layout == "libero":
        env.shift_target(rng, MOVED_BY)
    else:
        env.place_objects(LAYOUTS[layout](env, rng, target))
    for _ in range(WAIT_STEPS):
        env.step(STAND_STILL)


def figures(shown: Sequence[Shown]) -> dict:
    """Of one layout, as `sight` returns them."""
    result: dict = {"scenes": len(shown)}
    looked = [(scene.seen.at, scene.at) for scene in shown if scene.seen.at is not None]
    if looked:
        in_view = np.array([(np.abs(at) < 1).all(axis=1) for _, at in looked])  # (n, 2), False for NaN
        found = np.array([np.linalg.norm(eyes - at, axis=1) < FOUND_WITHIN for eyes, at in looked])
        result |= {"in_view": in_view.sum(axis=0).tolist(), "found": (found & in_view).sum(axis=0).tolist()}
    told = [(scene.seen.place, scene) for scene in shown if scene.seen.place is not None]
    if told:
        result |= _errors([(place[:2], scene.place[:2]) for place, scene in told], "mm")
    both = [(place[3:5], scene.goal[:2]) for place, scene in told if len(place) >= 6 and scene.goal is not None]
    if both:
        result |= _errors(both, "goal_mm")
    return result


def _errors(pairs: Sequence[tuple[np.ndarray, np.ndarray]], name: str) -> dict[str, float]:
    mm = np.array([1000 * np.linalg.norm(of_z - place) for of_z, place in pairs])
    return {f"{name}_mean": float(mm.mean()), f"{name}_median": float(np.median(mm))}
