"""rollouts/pool.py with real worker processes and the real simulator."""

import os
import signal
import time
from multiprocessing import Pipe
from pathlib import Path

import numpy as np
import pytest

from errors import BadInput
from libero_sim import make_suite, task_init_states
from rollouts.policies import ZeroPolicy
from rollouts.pool import Waiting, _receive, play_all
from rollouts.worker import Episode, Rollouts

TASK = 6
MAX_STEPS = 4


def episodes(*trials: int) -> list[Episode]:
    return [Episode("libero_object", TASK, trial, seed=trial) for trial in trials]


def play(folder: Path, policy, *trials: int, num_workers: int = 2, timeout: float = 300, suite="libero_object") -> dict:
    """-> trial -> its record."""
    states = task_init_states(make_suite("libero_object"), TASK)
    rollouts = Rollouts(suite, 64, 0.2, MAX_STEPS, 0.0, False, "none", folder)
    records = play_all(
        episodes(*trials), lambda e: states[e.trial], lambda e: str(e.trial), policy, rollouts, num_workers, timeout
    )
    return {record["trial"]: record for record in records}


def workers() -> list[int]:
    """Process ids of this process's workers."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return [int(pid) for pid in children if b"rollouts.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()]


class TroublePolicy(ZeroPolicy):
    """For init state 0 it kills the worker that asks first, and sends NaN to the one that tries again."""

    def __init__(self):
        super().__init__(MAX_STEPS)
        self.killed = False

    def act(self, observations, instructions, generators):
        if "0" in instructions and not self.killed:
            self.killed = True
            for worker in workers():
                os.kill(worker, signal.SIGKILL)
        return [self.chunk * (np.nan if instruction == "0" else 1) for instruction in instructions]


def test_a_crash_is_tried_once_more_and_then_reported_with_what_the_worker_said(tmp_path):
    records = play(tmp_path, TroublePolicy(), 0, 1, num_workers=1)
    assert records[0]["crashed"] and not records[0]["success"] and records[0]["tries"] == 2
    assert "killed by SIGKILL" in records[0]["earlier_crash"]
    assert "SimulatorError: the action [nan" in records[0]["error"] and "Traceback" in records[0]["error"]
    assert not records[1]["crashed"] and records[1]["steps"] == MAX_STEPS and records[1]["tries"] == 1
    assert not workers()


def test_a_worker_that_dies_in_the_middle_of_a_message_has_died():
    ours, theirs = Pipe()
    os.write(theirs.fileno(), (1000).to_bytes(4, "big") + b"only the beginning")
    theirs.close()
    assert _receive(ours) == ("died", None)


def test_an_episode_that_hangs_is_ended(tmp_path):
    begun = time.monotonic()
    record = play(tmp_path, ZeroPolicy(MAX_STEPS), 0, timeout=0.5)[0]
    assert record["crashed"] and record["tries"] == 2 and record["steps"] is None
    assert "not finished within --episode_timeout 0.5 seconds" in record["error"]
    assert time.monotonic() - begun < 30 and not workers()


def test_a_machine_that_cannot_draw_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("MUJOCO_EGL_DEVICE_ID", "77")  # there is no such device
    with pytest.raises(BadInput, match="MuJoCo found no way to draw without a screen"):
        play(tmp_path, ZeroPolicy(MAX_STEPS), 0)
    assert not workers()


def test_a_suite_whose_assets_are_not_installed_is_one_sentence(tmp_path):
    with pytest.raises(BadInput, match=r"the installed LIBERO lacks an asset of this task, .*red_sticker.xml"):
        play(tmp_path, ZeroPolicy(MAX_STEPS), 0, suite="libero_object_with_red_stick")


def test_a_picture_that_cannot_be_written_stops_the_evaluation(tmp_path):
    with pytest.raises(BadInput, match=r"task6_trial0_last.png: cannot be written"):
        play(tmp_path / "missing", ZeroPolicy(MAX_STEPS), 0)


def test_workers_share_out_tasks_and_keep_to_their_own():
    waiting = Waiting([Episode("suite", task, trial, 0) for task in (0, 1) for trial in range(2)])
    first = waiting.next_for(None, []).episode
    second = waiting.next_for(None, [first.task_id]).episode
    assert {first.task_id, second.task_id} == {0, 1}
    assert waiting.next_for(second.task_id, [0, 1]).episode.task_id == second.task_id
    assert waiting.next_for(second.task_id, [0, 1]).episode.task_id == first.task_id  # helps with what is left
    assert waiting.next_for(0, [0, 1]) is None
