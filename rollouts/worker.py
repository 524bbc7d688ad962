"""One worker process of run_libero_eval.py: it owns a simulator, plays the episodes it is sent and asks for actions.

It runs with one argument, the file descriptor of its end of a pipe to pool.py, and never imports torch. Down the pipe
come the Rollouts, then (Episode, init_state) again and again; up go

    ("observation", (obs, seconds))  answered with the actions to execute, (n, 7) float64; seconds of work before it
    ("finished", outcome)            the episode's outcome, a dictionary
    ("no environment", why)          the environment cannot be built
    ("bad input", why)               one sentence that stops the evaluation, such as a full disk

A simulation that the policy's own actions break is an outcome, too. Nothing else is caught here: an error ends this
process, whose traceback the main process reads and reports.
"""

import faulthandler
import hashlib
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

import numpy as np

from errors import BadInput, is_out_of_memory
from observation import from_simulator
from rollouts.episodes import LIFTED, STAND_STILL, WAIT_STEPS, Episode, Rollouts
from rollouts.video import CONTROL_HZ, VIDEO_EVERY, VIDEO_SIZE, framed, upright, write_mp4, write_png
from simulator.env import LiberoEnv, SimulatorError, has_fallen, make_env
from simulator.layouts import LAYOUTS
from simulator.suites import make_suite


def play_episode(
    env: LiberoEnv,
    episode: Episode,
    init_state: np.ndarray | None,
    rollouts: Rollouts,
    ask: Callable[[dict | None], np.ndarray],
) -> dict:
    """One rollout, from an init state (S,) or, for None, from where the episode's seed puts the objects;
    `ask(obs)` gives the next actions. Pictures are drawn only when actions are due, or for a video.

    With a decision delay of N steps each chunk has N actions more than are executed before the next decision. They go
    on while that decision is made, and its own first N actions, whose time has passed by then, are left out. Nothing
    goes on before the first decision: the robot waits for it.

    An action that is not finite, or with which the simulation breaks down, ends the episode as a failure of the policy,
    named in `broken_by_policy`. Raises SimulatorError for what breaks down without it: the scene or the renderer.
    """
    env.reset(seed=episode.seed)
    if init_state is not None:
        env.set_init_state(init_state)
    if rollouts.layouts != "libero":
        assert env.target is not None, "every task of libero_object is about an object"
        env.place_objects(LAYOUTS[rollouts.layouts](env, np.random.default_rng(episode.seed), env.target))
    if rollouts.shift_target:
        env.shift_target(np.random.default_rng(episode.seed), rollouts.shift_target)
    for _ in range(WAIT_STEPS):
        env.step(STAND_STILL)

    frames = []
    executed = hashlib.sha256()  # two episodes with the same fingerprint went exactly the same way
    steps, success, broken = 0, False, None
    heights, rotations, lifted = env.object_heights(), env.object_rotations(), []
    going_on = np.empty((0, 7))  # of the chunk before, while the policy decides
    while steps < rollouts.max_steps and not success and broken is None:
        chunk = ask(from_simulator(env.observe()) if rollouts.policy_looks else None)
        executed_until = len(chunk) - rollouts.decision_delay_steps
        actions, going_on = [*going_on, *chunk[len(going_on) : executed_until]], chunk[executed_until:]
        for action in actions:
            poses = env.poses()
            if rollouts.save_video != "none" and steps % VIDEO_EVERY == 0:
                frames.append(draw_for_people(env, poses))
            executed.update(np.ascontiguousarray(action, np.float64).tobytes())
            try:
                success = env.step(action)
            except SimulatorError as problem:  # the scene has stood still before: these actions have done it
                if is_out_of_memory(problem):  # or the machine
                    raise
                broken = f"after {steps} steps: {problem}"
                break
            steps += 1
            for name, height in env.object_heights().items():
                if height > heights[name] + LIFTED and name not in lifted:
                    lifted.append(name)
            if success or steps == rollouts.max_steps:
                break
    executed.update(env.state().tobytes())

    if rollouts.save_video == "all" or not success:  # a failure's last frame is always kept
        frames.append(draw_for_people(env, poses if broken else env.poses()))  # of a broken one the last whole scene
        write_png(frames[-1], rollouts.pictures / f"{episode.name}_last.png")
        if rollouts.save_video != "none":
            video = rollouts.pictures / f"{episode.name}_{'success' if success else 'failure'}.mp4"
            write_mp4(framed(frames, success), video, CONTROL_HZ // VIDEO_EVERY)
    return {
        "success": success,
        "steps": steps,
        "fingerprint": executed.hexdigest(),
        "broken_by_policy": broken,
        "asked_for": env.asked_for,  # objects
        "lifted": lifted,  # objects, in the order in which they left their place
        "fallen": [  # objects that lie now, and were never lifted
            name
            for name, rotation in env.object_rotations().items()
            if name not in lifted and has_fallen(rotations[name], rotation)
        ],
    }


def draw_for_people(env: LiberoEnv, poses: dict) -> np.ndarray:
    return upright(env.draw(poses, VIDEO_SIZE, ("agentview",))["agentview_image"])


def serve(pipe: Connection) -> None:
    """Plays what the pipe brings until it closes; the environment of the last task is kept for the next episode."""
    rollouts = pipe.recv()
    env: LiberoEnv | None = None
    task_of_env: int | None = None
    working_since = 0.0

    def ask(obs: dict | None) -> np.ndarray:
        nonlocal working_since
        pipe.send(("observation", (obs, time.perf_counter() - working_since)))
        actions = pipe.recv()
        working_since = time.perf_counter()
        return actions

    while True:
        episode, init_state = pipe.recv()
        start = working_since = time.perf_counter()
        if env is None or task_of_env != episode.task_id:
            if env is not None:
                env.close()
            try:
                env = make_env(
                    make_suite(rollouts.task_suite), episode.task_id, rollouts.image_size, rollouts.visual_mesh_ratio
                )
            except BadInput as problem:
                pipe.send(("no environment", str(problem)))
                return
            task_of_env = episode.task_id
        built = time.perf_counter()
        try:
            outcome = play_episode(env, episode, init_state, rollouts, ask)
        except BadInput as problem:  # a picture that cannot be written
            pipe.send(("bad input", str(problem)))
            return
        end = time.perf_counter()
        times = {"seconds": end - built, "construction_seconds": built - start}
        pipe.send(("finished", outcome | times))
        if outcome["broken_by_policy"] is not None:
            task_of_env = None  # the next episode gets an environment that nothing is known against


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's to handle
    faulthandler.enable()  # a segmentation fault leaves a traceback, too
    faulthandler.register(signal.SIGUSR1, all_threads=False)  # where does it hang?
    try:
        serve(Connection(int(sys.argv[1])))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the main process is gone, or has no more episodes
