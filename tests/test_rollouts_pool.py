"""rollouts/pool.py with real worker processes and the real simulator."""

import itertools
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from multiprocessing import Pipe
from pathlib import Path

import mujoco
import numpy as np
import pytest

import rollouts.pool
from errors import BadInput
from rollouts.crashes import exception_line
from rollouts.episodes import STAND_STILL, Episode, Rollouts
from rollouts.policies import ZeroPolicy
from rollouts.pool import Attempt, EpisodeQueue, SimulatorProcess, _receive, decide, play_all
from rollouts.worker import play_episode
from simulator.env import SimulatorError, make_env
from simulator.scripted_expert import ScriptedExpert
from simulator.suites import make_suite, task_init_states

TASK = 6
MAX_STEPS = 4


def episodes(*trials: int) -> list[Episode]:
    return [Episode("libero_object", TASK, trial, seed=trial) for trial in trials]


def play(folder: Path, policy, *trials: int, num_workers: int = 2, timeout: float = 300, suite="libero_object") -> dict:
    """-> trial -> its record."""
    states = task_init_states(make_suite("libero_object"), TASK)
    rollouts = Rollouts(suite, 64, 0.2, MAX_STEPS, 0.0, False, "none", folder)
    records = play_all(episodes(*trials), lambda e: states[e.trial], policy, rollouts, num_workers, timeout)
    return {record["trial"]: record for record in records}


def workers() -> list[int]:
    """Process ids of this process's workers."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return [int(pid) for pid in children if b"rollouts.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()]


class TroublePolicy(ZeroPolicy):
    """Kills the first worker that plays init state 0, sends NaN to the one that tries it again, and to init state 2
    what is no action, with which the worker's program fails."""

    def __init__(self):
        super().__init__(MAX_STEPS)
        self.killed = False

    def act(self, observations, episodes, generators):
        if any(episode.trial == 0 for episode in episodes) and not self.killed:
            self.killed = True
            for worker in workers():
                os.kill(worker, signal.SIGKILL)
        answers = {0: self.chunk * np.nan, 2: self.chunk[:, :5]}
        return [answers.get(episode.trial, self.chunk) for episode in episodes]


def test_what_the_machine_did_is_a_crash_and_what_the_policy_did_is_a_failure(tmp_path):
    records = play(tmp_path, TroublePolicy(), 0, 1, 2, num_workers=1)
    broken, ordinary, crashed = (records[trial] for trial in (0, 1, 2))
    assert not broken["crashed"] and not broken["success"] and broken["steps"] == 0
    assert broken["tries"] == 2 and broken["earlier_crash"] == "killed by SIGKILL"  # the crash alone is tried again
    assert broken["broken_by_policy"].startswith("after 0 steps: the action [nan, nan")
    assert (tmp_path / "task6_trial0_last.png").exists()
    assert not ordinary["crashed"] and ordinary["steps"] == MAX_STEPS and ordinary["tries"] == 1
    assert ordinary["broken_by_policy"] is None  # the environment that was broken before is not played on
    assert crashed["crashed"] and crashed["tries"] == 2 and crashed["steps"] is None
    first_line, *rest = crashed["error"].splitlines()
    assert first_line.startswith("ended with exit code 1: ") and first_line.split(": ", 1)[1] in rest
    assert "Traceback (most recent call last):" in rest
    assert not workers()


def test_a_simulation_that_blows_up_is_the_policys_failure_only_after_its_first_action(tmp_path, monkeypatch):
    """MuJoCo then resets itself without a word, and the reset scene passes for solved."""
    monkeypatch.chdir(tmp_path)  # MuJoCo writes its warnings there
    suite = make_suite("libero_object")
    env, init_state = make_env(suite, TASK, 64, visual_mesh_ratio=0.2), task_init_states(suite, TASK)[0]
    [episode] = episodes(0)

    def blows_up(obs):
        env.sim.data.qvel[:] = 1e12
        return np.tile(STAND_STILL, (MAX_STEPS, 1))

    rollouts = Rollouts("libero_object", 64, 0.2, MAX_STEPS, 0.0, False, "all", tmp_path)
    outcome = play_episode(env, episode, init_state, rollouts, blows_up)
    assert (outcome["success"], outcome["steps"]) == (False, 0)
    assert "after 0 steps: a position, velocity or acceleration became infinite or NaN" in outcome["broken_by_policy"]
    assert (tmp_path / "task6_trial0_failure.mp4").exists()

    def loses_memory(obs):
        def step(action):
            raise SimulatorError("FatalError: Could not allocate memory")

        patch.setattr(env, "step", step)
        return np.tile(STAND_STILL, (MAX_STEPS, 1))

    with monkeypatch.context() as patch, pytest.raises(SimulatorError):  # which is what the machine did
        play_episode(env, episode, init_state, rollouts, loses_memory)

    no_scene = np.full_like(init_state, 1e12)
    no_scene[0] = 1.0  # the time
    with pytest.raises(SimulatorError):
        play_episode(env, episode, no_scene, rollouts, blows_up)
    env.close()


def test_what_was_lifted_is_recorded_in_its_order(tmp_path):
    suite = make_suite("libero_object")
    env, init_state = make_env(suite, TASK, 64, visual_mesh_ratio=0.2), task_init_states(suite, TASK)[0]
    [episode] = episodes(0)
    acting = []

    def expert(obs):
        if not acting:
            scripted = ScriptedExpert(env, np.random.default_rng(0))
            acting.append(itertools.chain(scripted.settle(), scripted.actions()))
        return np.array([next(acting[0])])

    rollouts = Rollouts("libero_object", 64, 0.2, 90, 0.0, False, "none", tmp_path)
    outcome = play_episode(env, episode, init_state, rollouts, expert)
    assert (outcome["success"], outcome["asked_for"], outcome["lifted"]) == (False, ["butter_1"], ["butter_1"])
    short = replace(rollouts, max_steps=5)
    random_reset = play_episode(env, episode, None, short, lambda obs: np.tile(STAND_STILL, (5, 1)))
    assert random_reset["lifted"] == [] and random_reset["fingerprint"] != outcome["fingerprint"]
    assert random_reset["fallen"] == outcome["fallen"] == []
    check_that_what_was_knocked_over_is_recorded(env, episode, init_state, short)
    check_that_a_late_decision_is_the_same_actions_in_another_order(env, episode, init_state, rollouts)
    env.close()


def check_that_what_was_knocked_over_is_recorded(env, episode, init_state, rollouts):
    """Of three objects one is laid down, one turned in place, and one laid down and lifted."""
    down, turned, taken = "ketchup_1", "orange_juice_1", "tomato_sauce_1"

    def hand(obs):
        for name, axis, height in ((down, [1.0, 0, 0], 0), (turned, [0, 0, 1.0], 0), (taken, [1.0, 0, 0], 0.2)):
            joint, turn = env.domain.objects_dict[name].joints[-1], np.empty(4)
            pose = env.sim.data.get_joint_qpos(joint).copy()
            pose[2] += height
            mujoco.mju_axisAngle2Quat(turn, np.array(axis), np.pi / 2)
            mujoco.mju_mulQuat(pose[3:], turn, pose[3:].copy())
            env.sim.data.set_joint_qpos(joint, pose)
        return np.tile(STAND_STILL, (5, 1))

    outcome = play_episode(env, episode, init_state, rollouts, hand)
    assert (outcome["lifted"], outcome["fallen"]) == ([taken], [down])


def check_that_a_late_decision_is_the_same_actions_in_another_order(env, episode, init_state, rollouts):
    """Chunks of 5 of which 3 are executed before the next decision, which arrives 2 steps late."""
    chunks = np.random.default_rng(0).uniform(-0.1, 0.1, (5, 5, 7))
    first, second, third, fourth, _ = chunks
    expected = [*first[:3], *first[3:], *second[2:3], *second[3:], *third[2:3], *third[3:], *fourth[2:3]]
    late, at_once = iter(chunks), iter([np.array(expected)])
    rollouts = replace(rollouts, max_steps=len(expected))
    delayed = replace(rollouts, decision_delay_steps=2)
    found = play_episode(env, episode, init_state, delayed, lambda obs: next(late))
    assert found["steps"] == 12
    assert (
        found["fingerprint"]
        == play_episode(env, episode, init_state, rollouts, lambda obs: next(at_once))["fingerprint"]
    )


class SlowPolicy(ZeroPolicy):
    """Takes three hours for each decision, by the clock of the main process."""

    def __init__(self, monkeypatch):
        super().__init__(1)
        self.hours, real = 0, time.monotonic
        monkeypatch.setattr(rollouts.pool.time, "monotonic", lambda: real() + 3600 * self.hours)

    def act(self, observations, episodes, generators):
        self.hours += 3
        return super().act(observations, episodes, generators)


def test_the_clock_of_a_worker_stands_still_while_the_policy_decides(tmp_path, monkeypatch):
    policy = SlowPolicy(monkeypatch)
    record = play(tmp_path, policy, 0, num_workers=1, timeout=600)[0]
    assert policy.hours == 3 * MAX_STEPS
    assert not record["crashed"] and record["tries"] == 1 and record["steps"] == MAX_STEPS


def test_a_worker_whose_message_lies_unread_is_not_late():
    ours, theirs = Pipe()
    worker = SimulatorProcess.__new__(SimulatorProcess)
    worker.pipe, worker.deadline = ours, time.monotonic() - 1
    assert worker.is_late()
    theirs.send(("observation", None))
    assert not worker.is_late()


def test_the_exception_that_ended_a_worker_is_found_in_what_it_printed():
    output = """loading
Traceback (most recent call last):
  File "a.py", line 1, in f
ValueError: the first

During handling of the above exception, another exception occurred:

Traceback (most recent call last):
  File "b.py", line 2, in g
    raise MemoryError
MemoryError: Unable to allocate 3 GiB
for two arrays
Exception ignored in: <function EGLGLContext.__del__>
Traceback (most recent call last):
  File "c.py", line 3, in __del__
OpenGL.raw.EGL._errors.EGLError: EGL_NOT_INITIALIZED
the end"""
    assert exception_line(output) == "MemoryError: Unable to allocate 3 GiB"
    assert exception_line("Fatal Python error: Segmentation fault\n\nCurrent thread 0x1 (most recent call first):") == (
        "Fatal Python error: Segmentation fault"
    )
    assert exception_line("WARNING: nothing") is None


@pytest.mark.parametrize(
    "limited, to, temporary, sentence",
    [
        (resource.RLIMIT_NOFILE, 3, tempfile.gettempdir(), r"\(.*Too many open files.*\); try fewer --num_workers"),
        (resource.RLIMIT_FSIZE, 0, None, r"\(.*No usable temporary directory found in .*\)$"),  # looked for anew
    ],
)
def test_a_process_that_cannot_be_started_is_one_sentence(tmp_path, limited, to, temporary, sentence, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", temporary)
    before = resource.getrlimit(limited)
    states = task_init_states(make_suite("libero_object"), TASK)  # reads files
    rollouts = Rollouts("libero_object", 64, 0.2, MAX_STEPS, 0.0, False, "none", tmp_path)
    records = play_all(episodes(0), lambda e: states[e.trial], ZeroPolicy(MAX_STEPS), rollouts, 1, 300)
    resource.setrlimit(limited, (to, before[1]))
    try:
        with pytest.raises(BadInput, match=f"a simulator's process cannot be started {sentence}"):
            next(records)
    finally:
        resource.setrlimit(limited, before)


def test_running_out_of_memory_while_deciding_is_one_sentence():
    class LargePolicy(ZeroPolicy):
        def act(self, observations, episodes, generators):
            raise RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED")

    worker = SimulatorProcess.__new__(SimulatorProcess)
    worker.attempt, worker.generator = Attempt(episodes(0)[0]), None
    with pytest.raises(BadInput, match=r"out of memory while deciding for 1 simulators; try fewer --num_workers"):
        decide([(worker, None)], LargePolicy(MAX_STEPS))


def test_a_worker_that_dies_in_the_middle_of_a_message_has_died():
    ours, theirs = Pipe()
    os.write(theirs.fileno(), (1000).to_bytes(4, "big") + b"only the beginning")
    theirs.close()
    assert _receive(ours) == ("died", None)


def test_an_episode_that_hangs_is_ended(tmp_path):
    begun = time.monotonic()
    record = play(tmp_path, ZeroPolicy(MAX_STEPS), 0, timeout=0.5)[0]
    assert record["crashed"] and record["tries"] == 2 and record["steps"] is None
    assert "not finished within --episode_timeout 0.5 seconds of its own work" in record["error"]
    assert time.monotonic() - begun < 30 and not workers()


def test_a_machine_that_cannot_draw_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("MUJOCO_EGL_DEVICE_ID", "77")  # there is no such device
    with pytest.raises(BadInput, match="MuJoCo found no way to draw without a screen"):
        play(tmp_path, ZeroPolicy(MAX_STEPS), 0)
    assert not workers()


def test_a_worker_takes_the_simulator_of_a_relative_pythonpath_and_nothing_from_the_working_directory(
    tmp_path, monkeypatch
):
    for package in ("other/mujoco", "rollouts"):
        (tmp_path / package).mkdir(parents=True)
        (tmp_path / package / "__init__.py").write_text(f"raise ImportError({package!r})")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "other")
    with pytest.raises(BadInput, match="ImportError: other/mujoco"):
        play(tmp_path, ZeroPolicy(MAX_STEPS), 0)


def test_a_suite_whose_assets_are_not_installed_is_one_sentence(tmp_path):
    with pytest.raises(BadInput, match=r"the installed LIBERO lacks an asset of this task, .*red_sticker.xml"):
        play(tmp_path, ZeroPolicy(MAX_STEPS), 0, suite="libero_object_with_red_stick")


def test_a_picture_that_cannot_be_written_stops_the_evaluation(tmp_path):
    with pytest.raises(BadInput, match=r"task6_trial0_last.png: cannot be written"):
        play(tmp_path / "missing", ZeroPolicy(MAX_STEPS), 0)


def test_a_worker_never_imports_torch():
    """It would take a second and 0.2 GB in each of them; they hand numpy arrays over."""
    code = (
        "import sys, rollouts.worker\n"
        "rollouts.worker.make_suite('libero_object')\n"  # LIBERO and robosuite are imported by now
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent).returncode == 0


def test_workers_share_out_tasks_and_keep_to_their_own():
    queue = EpisodeQueue([Episode("suite", task, trial, 0) for task in (0, 1) for trial in range(2)])
    first = queue.next_for(None, []).episode
    second = queue.next_for(None, [first.task_id]).episode
    assert {first.task_id, second.task_id} == {0, 1}
    assert queue.next_for(second.task_id, [0, 1]).episode.task_id == second.task_id
    assert queue.next_for(second.task_id, [0, 1]).episode.task_id == first.task_id  # helps with what is left
    assert queue.next_for(0, [0, 1]) is None
