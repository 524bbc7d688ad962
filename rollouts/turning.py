"""Does a policy look? In a paused scene one thing changes, and the policy's chunk should turn towards the object.

At a paused state the policy gives a chunk of actions, and the scripted expert those that it would execute. Then, in the
same state of the arm, one of CHANGES is made and both answer again. With the change dp of the policy's summed x and y
and the change de of the expert's, the turn is sum <dp, de> / sum |de|^2 over all scenes: 0 where the change is ignored,
1 where the policy turns as far as the expert does. It costs some minutes, and offline errors do not tell it.

Only in libero_object, where the expert acts.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from observation import from_simulator
from rollouts.episodes import reset_seed
from rollouts.evaluation import tasks_of
from simulator.env import LiberoEnv, SimulatorError, make_env
from simulator.layouts import MOVED_BY, graspable, without_number
from simulator.scripted_expert import ScriptedExpert
from simulator.suites import make_suite

SUITE = "libero_object"
CHANGES = {
    "exchanged": "the asked object and another have exchanged their places",
    "moved": "the asked object stands up to 5 cm from where it stood",
    "another asked for": "the words ask for another object of the scene",
}
PAUSES = (0, 15)  # steps of the expert before the scene is paused: at the start, and on the way
LEAST_TURN = 0.5  # of the expert, in robot units: a change that asks for less says nothing

Decide = Callable[[dict, str], np.ndarray]  # observation, instruction -> chunk (H, 7)


class Turn(NamedTuple):
    """How far policy and expert turn at one change: summed x and y of their chunks afterwards less before, (2,)."""

    change: str
    policy: np.ndarray
    expert: np.ndarray


def turning(
    decide: Decide, instructions: Sequence[str], chunk_length: int, observation: dict, scenes: int, seed: int
) -> dict[str, dict]:
    """Change -> "turn" (None where the expert turns nowhere) and "changes", their number.

    instructions: those that the policy knows. observation: what its demonstrations were recorded with. `scenes` random
    resets of each task. Raises BadInput where none of the suite's tasks is known.
    """
    turns: list[Turn] = []
    for task, instruction in tqdm(tasks_of(SUITE, instructions).items(), desc="pausing scenes", unit="task"):
        env = make_env(make_suite(SUITE), task, observation["image_size"], observation["visual_mesh_ratio"])
        for scene in range(scenes):
            env.reset(seed=reset_seed("turning", SUITE, task, scene, seed))
            rng = np.random.default_rng([seed, task, scene])
            turns += turns_of_scene(env, decide, instruction, instructions, chunk_length, rng)
        env.close()
    return {change: slope([turn for turn in turns if turn.change == change]) for change in CHANGES}


def slope(turns: Sequence[Turn]) -> dict:
    told = [turn for turn in turns if np.linalg.norm(turn.expert) >= LEAST_TURN]
    along = sum(float(turn.policy @ turn.expert) for turn in told)
    whole = sum(float(turn.expert @ turn.expert) for turn in told)
    return {"turn": along / whole if told else None, "changes": len(told)}


def turns_of_scene(
    env: LiberoEnv, decide: Decide, instruction: str, known: Sequence[str], chunk_length: int, rng: np.random.Generator
) -> Iterator[Turn]:
    """Every change at every pause of a scene that has just been reset."""
    asked = env.target
    assert asked is not None, "every task of libero_object is about an object"
    expert = ScriptedExpert(env, np.random.default_rng(0))
    for action in expert.settle():
        env.step(action)
    approach, steps = expert.actions(), 0
    for pause in PAUSES:
        for action in itertools.islice(approach, pause - steps):
            env.step(action)
        steps, paused = pause, env.state()

        def answers(told: str) -> tuple[np.ndarray, np.ndarray]:
            """Summed x and y (2,) of the policy's chunk and of the expert's, in the scene as it stands."""
            chunk = decide(from_simulator(env.observe()), told)
            return chunk[:, :2].sum(axis=0), expert_chunk(env, chunk_length)[:, :2].sum(axis=0)

        env.set_init_state(paused)  # as before every change: it reads sensors a little later than a step does
        before = answers(instruction)
        for change in CHANGES:
            env.set_init_state(paused)
            told = changed(env, change, asked, instruction, known, rng)
            if told is not None:
                after = answers(told)
                yield Turn(change, after[0] - before[0], after[1] - before[1])
            env.ask_for(asked)
        env.set_init_state(paused)


def changed(
    env: LiberoEnv, change: str, asked: str, instruction: str, known: Sequence[str], rng: np.random.Generator
) -> str | None:
    """Makes the change and returns what the robot is told now; None where the scene does not allow it."""
    others = [name for name in graspable(env) if name != asked]
    if change == "moved":
        try:
            env.shift_target(rng, MOVED_BY)
        except SimulatorError:  # no free place
            return None
        return instruction
    if change == "exchanged":
        other = others[rng.integers(len(others))]
        place = {name: env.sim.data.body_xpos[env.domain.obj_body_id[name]][:2].copy() for name in (asked, other)}
        env.place_objects({asked: place[other], other: place[asked]})
        return instruction
    words = {name: instruction.replace(spoken(asked), spoken(name)) for name in others}
    told = {name: text for name, text in words.items() if text in known}
    if not told:
        return None
    other = list(told)[rng.integers(len(told))]
    env.ask_for(other)
    return told[other]


def spoken(name: str) -> str:
    """milk_1 -> milk, as instructions say it."""
    return without_number(name).replace("_", " ")


def expert_chunk(env: LiberoEnv, chunk_length: int) -> np.ndarray:
    """What the expert executes from here (H, 7), always with the same noise. The scene is put back afterwards."""
    paused = env.state()
    expert = ScriptedExpert(env, np.random.default_rng(0))
    for _ in expert.settle():  # it looks at where hand and object are, and waits for nothing
        pass
    actions = []
    for action in itertools.islice(expert.actions(), chunk_length):
        actions.append(action)
        env.step(action)
    env.set_init_state(paused)
    return np.array(actions)
