"""One attempt of the scripted expert, in a worker process: played without drawing, drawn and written if it succeeds.

A demonstration depends on its task, the number of its attempt and the settings alone. With shuffled layouts a task is a
scene and the object that is asked for in it.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np

from collection.files import CONTINUES, DemoSettings, picture_datasets, settings_text, written_hdf5
from collection.worker import Worker
from errors import BadInput, is_out_of_memory
from observation import DRAW_EVERY, SIMULATOR_KEYS, SIMULATOR_QUATERNION, axis_angle
from provenance import code_version
from simulator.env import LiberoEnv, SimulatorError
from simulator.layouts import ShuffledTask, graspable, training_layout
from simulator.scripted_expert import ScriptedExpert

LONGEST_DEMO = 245  # steps; LIBERO's own longest of this suite has 254
SHORTEST_DEMO = 40  # steps; in fewer a miss has brought the object to the basket, and no grasp is left to show
LAYOUTS_DRAWN = 20  # at most, until one is found whose target can be taken
SUCCESS_STEPS = 10  # a demo ends after so many solved steps in a row, as LIBERO's do


@dataclass
class Demonstration:
    """A solved episode, as far as it is recorded. Frame t is what the robot saw before actions[t]; there is one frame
    more than actions."""

    actions: np.ndarray  # (T, 7)
    states: np.ndarray  # (T, S) before each action
    proprioception: list  # T + 1 dicts of the simulator's observations without pictures
    poses: list  # T + 1 arguments for LiberoEnv.draw


def demonstrate(
    env: LiberoEnv,
    task_id: int,
    attempt: int,
    settings: DemoSettings,
    asked: ShuffledTask | None = None,
    discarded: list[str] | None = None,
) -> Demonstration | None:
    """Lets the expert try once, without drawing. None when it failed, or solved the task in less than SHORTEST_DEMO.

    With `asked` the layout is shuffled. One whose target has fallen over or lies out of reach before the expert begins
    is drawn anew, and `discarded` gets the reason.
    """
    if asked is None:
        rng = np.random.default_rng([settings.seed, task_id, attempt])
        expert = expert_at_start(env, rng, settings)
    else:
        env.ask_for(asked.target)
        rng = np.random.default_rng([settings.seed, task_id, attempt, 1 + graspable(env).index(asked.target)])
        for _ in range(LAYOUTS_DRAWN):
            expert = expert_at_start(env, rng, settings, shuffled=True)
            why_not = expert.why_target_cannot_be_taken()
            if not why_not:
                break
            if discarded is not None:
                discarded.append(why_not)
        else:
            raise SimulatorError(f"in none of {LAYOUTS_DRAWN} layouts {asked.target} could be taken: {why_not}")
    if begins_after_a_miss(attempt, settings.missed_grasps, offset=asked.rank / asked.scenes if asked else 0.0):
        for action in expert.missed_grasp():
            env.step(action)
    actions, states, proprioception, poses = [], [], [env.proprioception()], [env.poses()]
    solved_steps = 0
    for action in itertools.islice(expert.actions(), LONGEST_DEMO):
        states.append(env.state())
        solved = env.step(action)
        actions.append(action)
        proprioception.append(env.proprioception())
        poses.append(env.poses())
        solved_steps = solved_steps + 1 if solved else 0
        if solved_steps == SUCCESS_STEPS:
            if len(actions) < SHORTEST_DEMO:
                return None
            return Demonstration(np.array(actions), np.array(states), proprioception, poses)
    return None


def expert_at_start(
    env: LiberoEnv, rng: np.random.Generator, settings: DemoSettings, shuffled: bool = False
) -> ScriptedExpert:
    """Draws a scene and lets its objects settle. -> the expert that is to act in it."""
    env.reset(seed=int(rng.integers(2**31)))
    if shuffled:
        env.place_objects(training_layout(env, rng))
    env.add_start_noise(rng, settings.start_noise)
    if settings.shift_target:
        env.shift_target(rng, settings.shift_target)
    expert = ScriptedExpert(env, rng)
    for action in expert.settle():
        env.step(action)
    return expert


def begins_after_a_miss(attempt: int, share: float, offset: float = 0.0) -> bool:
    """Which attempts are recorded from a missed grasp on: `share` of them, spread evenly over those of a file. Files
    that share an instruction have other offsets, from 0 to 1, so that their misses do not all come at once."""
    return int((attempt + 1) * share + offset) > int(attempt * share + offset)


def write_demo(demo: h5py.Group, env: LiberoEnv, demonstration: Demonstration, settings: DemoSettings) -> None:
    """Draws a demonstration, or of it one step in settings.draw_every, and writes it in LIBERO's layout."""
    steps = range(len(demonstration.actions))
    frames = [t + 1 if settings.obs_alignment == "after" else t for t in steps]
    env_obs = [demonstration.proprioception[t] for t in frames]
    joints, fingers, ee_pos = (
        np.stack([o[SIMULATOR_KEYS[name]] for o in env_obs]) for name in ("joint_states", "gripper_states", "ee_pos")
    )
    ee_quat = np.stack([o[SIMULATOR_QUATERNION] for o in env_obs])
    ee_ori = np.stack([axis_angle(quaternion) for quaternion in ee_quat])
    robot_states = np.hstack([fingers, ee_pos, ee_quat])
    only_the_last = np.zeros(len(steps), dtype=np.uint8)
    only_the_last[-1] = 1

    demo["actions"], demo["states"] = demonstration.actions, demonstration.states
    demo["robot_states"], demo["rewards"], demo["dones"] = robot_states, only_the_last, only_the_last
    demo["obs/joint_states"], demo["obs/gripper_states"] = joints, fingers
    demo["obs/ee_pos"], demo["obs/ee_ori"], demo["obs/ee_states"] = ee_pos, ee_ori, np.hstack([ee_pos, ee_ori])
    drawn = frames[:: settings.draw_every]
    cameras = picture_datasets(demo["obs"], len(drawn), env.image_size)
    for i, t in enumerate(drawn):
        pictures = env.draw(demonstration.poses[t])
        for name, dataset in cameras.items():
            dataset[i] = pictures[SIMULATOR_KEYS[name]]
    demo.attrs["num_samples"] = len(steps)
    if settings.draw_every > 1:
        demo.attrs[DRAW_EVERY] = settings.draw_every
    demo.attrs["model_file"] = env.model_xml
    demo.attrs["init_state"] = demonstration.states[0]


class Outcome(NamedTuple):
    """Of one attempt."""

    length: int  # of the demo, 0 for a failure
    why_broken: str = ""  # where the simulation broke down: that is a failure, too, and the next time again
    discarded: Sequence[str] = ()  # why each layout was that was drawn anew before the expert began


class Demonstrator(Worker):
    """The worker process of demonstrations."""

    @classmethod
    def attempt(
        cls, task_id: int, attempt: int, settings: DemoSettings, demo_file: Path, asked: ShuffledTask | None = None
    ) -> Outcome:
        """Plays one attempt and writes it to `demo_file` if it succeeds."""
        env = cls.env_of(task_id, settings)
        discarded: list[str] = []
        try:
            demonstration = demonstrate(env, task_id, attempt, settings, asked, discarded)
        except SimulatorError as problem:
            cls.close()  # not to be trusted any more
            if is_out_of_memory(problem):  # the machine's failure, not the attempt's
                raise MemoryError(str(problem)) from None
            return Outcome(0, str(problem), discarded)
        if demonstration is None:
            return Outcome(0, "", discarded)
        demo_file.parent.mkdir(parents=True, exist_ok=True)
        try:
            with written_hdf5(demo_file, demo_file.parent) as file:
                demo = file.create_group("demo")
                write_demo(demo, env, demonstration, settings)
                demo.attrs["attempt"], demo.attrs["code"] = attempt, code_version()
                if asked is not None:
                    demo.attrs["layouts_discarded"] = len(discarded)
                file.attrs["collector"] = settings_text(settings)
        except SimulatorError as problem:  # only the renderer works here
            raise BadInput(f"task {task_id}: drawing a demo failed ({problem}); {CONTINUES}") from None
        return Outcome(len(demonstration.actions), "", discarded)
