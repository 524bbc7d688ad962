"""Scenes without a demonstration, drawn in a worker process: everything stands in a random training layout, and the arm
is in a pose that a demonstration had, and nothing is stepped.

A scene depends on its task, its own number and the settings alone; arm poses are among those.

Letters: n scenes of one order, S numbers of a flattened simulator state, P arm poses.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from collection.files import CONTINUES, SceneSettings, picture_datasets, settings_text, written_hdf5
from collection.worker import Worker
from errors import BadInput, is_out_of_memory
from observation import SIMULATOR_KEYS
from provenance import code_version
from seeds import mixed_seed
from simulator.env import LiberoEnv, SimulatorError
from simulator.layouts import training_layout

RESTING_STEPS = 10  # until everything stands; bottles drop from 2 cm above
HOLD_STILL = np.array([0, 0, 0, 0, 0, 0, -1.0])
TRIES = 200


@dataclass(frozen=True)
class ArmPoses:
    """How the arm may be posed, from demonstrations: joints (P, 7) in rad and fingers (P, 2) in metres."""

    joints: np.ndarray
    fingers: np.ndarray

    def __len__(self) -> int:
        return len(self.joints)


class SceneDrawer(Worker):
    """The worker process of scenes."""

    @classmethod
    def draw(cls, task_id: int, scenes: range, arm_poses: ArmPoses, settings: SceneSettings, path: Path) -> None:
        """Draws the scenes of these numbers and writes them to `path`."""
        env = cls.env_of(task_id, settings)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            heights = resting_heights(env)
            with written_hdf5(path, path.parent) as file:
                cameras = picture_datasets(file, len(scenes), env.image_size)
                states = []
                for i, scene in enumerate(scenes):
                    rng = np.random.default_rng(mixed_seed("scene", settings.seed, task_id, scene))
                    set_scene(env, rng, heights, arm_poses)
                    states.append(env.state())
                    pictures = env.draw(env.poses())
                    for name, dataset in cameras.items():
                        dataset[i] = pictures[SIMULATOR_KEYS[name]]
                file["states"] = np.stack(states)  # (n, S)
                file.attrs["model_file"], file.attrs["code"] = env.model_xml, code_version()
                file.attrs["collector"] = settings_text(settings)
        except SimulatorError as problem:
            cls.close()  # not to be trusted any more
            if is_out_of_memory(problem):
                raise MemoryError(str(problem)) from None
            raise BadInput(f"task {task_id}: drawing a scene failed ({problem}); {CONTINUES}") from None


def resting_heights(env: LiberoEnv) -> dict[str, float]:
    """How high each object of a scene is once it stands on the floor, in metres; `reset()` drops it from above."""
    env.reset(seed=0)
    for _ in range(RESTING_STEPS):
        env.step(HOLD_STILL)
    return env.object_heights()


def set_scene(env: LiberoEnv, rng: np.random.Generator, heights: Mapping[str, float], arm_poses: ArmPoses) -> None:
    """Sets one: a layout and an arm pose drawn from `rng`, again where the arm would touch an object."""
    for _ in range(TRIES):
        env.reset(seed=int(rng.integers(2**31)))
        env.place_objects(training_layout(env, rng), heights)
        pose = rng.integers(len(arm_poses))
        env.pose_arm(arm_poses.joints[pose], arm_poses.fingers[pose])
        if not env.arm_touches_an_object():
            return
    raise SimulatorError(f"none of {TRIES} layouts leaves room for the arm in a pose of the demonstrations")
