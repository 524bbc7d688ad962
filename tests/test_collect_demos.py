"""The collector, with real demos of two cores' making (see conftest.py); takes about a minute."""

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from test_dataloader import batches_of, load, samples_of

import collect_demos
from collect_demos import (
    Settings,
    TaskDemos,
    Worker,
    begins_after_a_miss,
    collector_text,
    play_episode,
    write_demo,
)
from config import load_config
from dataloader import LanguageTable, frame_rows
from errors import BadInput
from frame_cache import open_frames
from libero_sim import from_simulator, make_env, make_suite
from scripted_expert import SETTLE_STEPS

REPO = Path(__file__).parent.parent
TASK = 6
NAME = "pick_up_the_butter_and_place_it_in_the_basket"
# Those of the fixture collected_demos.
SETTINGS = Settings(image_size=64, visual_mesh_ratio=0.2, obs_alignment="after", start_noise=0.02, seed=0)
SAME_SETTINGS = ("--tasks", "6", "--image_size", "64", "--visual_mesh_ratio", "0.2")


def command(*arguments) -> list:
    return [sys.executable, REPO / "collect_demos.py", "--config", REPO / "conf/config.yaml", *map(str, arguments)]


def run(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run(command(*arguments), cwd=REPO, capture_output=True, text=True)


def demo_file(folder: Path) -> Path:
    return folder / f"{NAME}_demo.hdf5"


@pytest.fixture(scope="module")
def suite():
    return make_suite("libero_object")


@pytest.fixture(scope="module")
def env(suite):
    env = make_env(suite, TASK, SETTINGS.image_size, SETTINGS.visual_mesh_ratio)
    yield env
    env.close()


@pytest.fixture
def demo(collected_demos):
    with h5py.File(demo_file(collected_demos)) as file:
        yield file["data/demo_1"]


def test_file_has_liberos_layout(collected_demos):
    with h5py.File(demo_file(collected_demos)) as file:
        data = file["data"]
        assert sorted(data) == ["demo_0", "demo_1"]
        assert data.attrs["tag"] == "libero-v1"
        assert data.attrs["env_name"] == "Libero_Floor_Manipulation"
        assert data.attrs["macros_image_convention"] == "opengl"
        assert data.attrs["bddl_file_name"] == f"libero/libero/bddl_files/libero_object/{NAME}.bddl"
        assert data.attrs["bddl_file_content"].startswith("(define (problem LIBERO_Floor_Manipulation)")
        problem_info = json.loads(data.attrs["problem_info"])
        assert problem_info["language_instruction"].lower() == "pick the butter and place it in the basket"
        assert json.loads(data.attrs["env_args"])["env_kwargs"]["camera_heights"] == 64
        assert data.attrs["num_demos"] == 2
        assert data.attrs["total"] == sum(len(demo["actions"]) for demo in data.values())
        assert data.attrs["visual_mesh_ratio"] == 0.2
        for demo in data.values():
            check_demo_layout(demo)


def check_demo_layout(demo):
    steps = len(demo["actions"])
    items = []
    demo.visititems(lambda name, item: items.append((name, item)))
    assert {name: (item.shape, str(item.dtype)) for name, item in items if isinstance(item, h5py.Dataset)} == {
        "actions": ((steps, 7), "float64"),
        "states": ((steps, 110), "float64"),
        "robot_states": ((steps, 9), "float64"),
        "rewards": ((steps,), "uint8"),
        "dones": ((steps,), "uint8"),
        "obs/agentview_rgb": ((steps, 64, 64, 3), "uint8"),
        "obs/eye_in_hand_rgb": ((steps, 64, 64, 3), "uint8"),
        "obs/joint_states": ((steps, 7), "float64"),
        "obs/gripper_states": ((steps, 2), "float64"),
        "obs/ee_states": ((steps, 6), "float64"),
        "obs/ee_pos": ((steps, 3), "float64"),
        "obs/ee_ori": ((steps, 3), "float64"),
    }
    assert demo.attrs["num_samples"] == steps
    assert demo.attrs["model_file"].startswith("<mujoco")
    np.testing.assert_array_equal(demo.attrs["init_state"], demo["states"][0])
    for name in ("rewards", "dones"):
        assert demo[name][:].tolist() == [0] * (steps - 1) + [1]
    actions = demo["actions"][:]
    assert np.abs(actions).max() <= 1
    assert set(actions[:, 6]) == {-1.0, 1.0}
    assert demo["obs/agentview_rgb"].chunks == (1, 64, 64, 3)


def test_obs_are_recorded_after_their_action(demo):
    np.testing.assert_array_equal(demo["obs/joint_states"][:-1], demo["states"][1:, 1:8])


def test_simulator_and_dataset_give_the_same_observation(collected_demos, demo, env, tmp_path):
    """A demo is lived through again: its batches, made as in training, equal what a policy would see."""
    demos, _ = load(collected_demos)
    data = load_config("conf/config.yaml", [f"data.cache_directory={tmp_path}"]).data
    frames = open_frames(demos, data, 64, torch.device("cpu"))
    language = LanguageTable("none", {demos[1].task: torch.zeros(1)})
    dataset = samples_of(batches_of(demos, frame_rows(demos[1:]), 0, language=language, frames=frames))
    rng = np.random.default_rng([SETTINGS.seed, TASK, demo.attrs["attempt"]])
    env.reset(seed=int(rng.integers(2**31)))
    env.add_start_noise(rng, SETTINGS.start_noise)
    for _ in range(SETTLE_STEPS):
        env.step(np.array([0, 0, 0, 0, 0, 0, -1.0]))
    for t, action in enumerate(demo["actions"]):
        np.testing.assert_array_equal(env.state(), demo["states"][t])
        solved = env.step(action)
        if t % 20 == 0 or t == len(demo["actions"]) - 1:
            live, recorded = from_simulator(env.observe()), dataset[t]["obs"]
            assert live.keys() | {"language"} == recorded.keys()
            for name, value in live.items():
                assert value.dtype == recorded[name].numpy().dtype, name
                np.testing.assert_array_equal(recorded[name], value, err_msg=f"{name} {t}")
    assert solved


def test_obs_before_the_action_are_the_same_frames_one_step_earlier(env, tmp_path):
    episode = play_episode(env, TASK, attempt=0, settings=SETTINGS)
    start = replace(episode, actions=episode.actions[:15], states=episode.states[:15])
    with h5py.File(tmp_path / "both.hdf5", "w") as file:
        for alignment in ("after", "before"):
            write_demo(file.create_group(alignment), env, start, alignment)
        for name, after in file["after/obs"].items():
            np.testing.assert_array_equal(file[f"before/obs/{name}"][1:], after[:-1], err_msg=name)
        np.testing.assert_array_equal(file["before/obs/joint_states"][:], file["before/states"][:, 1:8])


def test_a_demo_after_a_missed_grasp_shows_the_second_attempt_alone(env):
    whole = play_episode(env, TASK, attempt=0, settings=SETTINGS)
    after_a_miss = play_episode(env, TASK, attempt=0, settings=replace(SETTINGS, missed_grasps=1.0))
    seconds = [episode.states[0][0] for episode in (whole, after_a_miss)]
    assert seconds[0] == pytest.approx(SETTLE_STEPS / 20) and seconds[1] > seconds[0] + 40 / 20
    assert len(after_a_miss.actions) <= collect_demos.LONGEST_DEMO
    first_closed = np.flatnonzero(after_a_miss.actions[:, 6] == 1)[0]
    assert first_closed > 20  # it lets go at once and comes down on the target again before it closes
    heights = []
    for episode in (whole, after_a_miss):
        env.sim.set_state_from_flattened(episode.states[0])
        env.sim.forward()
        heights.append(float(env.sim.data.get_body_xpos("butter_1_main")[2]))
    assert heights[1] == pytest.approx(heights[0], abs=0.03)  # the target is on the floor, not in the hand


@pytest.mark.parametrize("share, expected", [(0.0, 0), (0.3, 6), (0.4, 8), (1.0, 20)])
def test_missed_grasps_are_spread_evenly_over_the_attempts(share, expected):
    chosen = [begins_after_a_miss(attempt, share) for attempt in range(20)]
    assert sum(chosen) == expected
    assert abs(sum(chosen[:10]) - expected / 2) <= 0.5


def test_killed_run_continues_and_gives_the_same_demos_as_an_undisturbed_one(collected_demos, tmp_path):
    """Undisturbed, of two workers: the fixture. Here one worker, killed after its first demo and started again."""
    arguments = ("--data_directory", tmp_path, "--demos_per_task", 2, "--num_workers", 1, *SAME_SETTINGS)
    first_demo = tmp_path / collect_demos.UNFINISHED / NAME / "attempt_00000.hdf5"
    killed = subprocess.Popen(command(*arguments), cwd=REPO, stderr=subprocess.DEVNULL)
    while not first_demo.exists():
        assert killed.poll() is None, "the run ended before it wrote a demo"
        time.sleep(0.05)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    with h5py.File(first_demo, "r+") as file:
        file["demo"].attrs["kept"] = True

    continued = run(*arguments)
    assert continued.returncode == 0, continued.stderr
    assert "6                 2/2   100.0%" in continued.stdout
    assert [path.name for path in tmp_path.iterdir()] == [demo_file(tmp_path).name]
    with h5py.File(demo_file(tmp_path)) as found, h5py.File(demo_file(collected_demos)) as expected:
        assert "kept" in found["data/demo_0"].attrs
        assert_same_demos(found, expected)


def assert_same_demos(found: h5py.File, expected: h5py.File):
    def compare(name, item):
        if isinstance(item, h5py.Dataset):
            np.testing.assert_array_equal(found[name][:], item[:], err_msg=name)

    assert sorted(found["data"]) == sorted(expected["data"])
    expected.visititems(compare)


def test_rerun_with_everything_there_changes_nothing(collected_demos):
    before = demo_file(collected_demos).stat()
    again = run("--data_directory", collected_demos, "--demos_per_task", 2, *SAME_SETTINGS)
    assert again.returncode == 0, again.stderr
    assert demo_file(collected_demos).stat() == before


def test_failed_attempts_are_never_written(env, tmp_path, monkeypatch):
    class IdleExpert:
        def __init__(self, env, rng):
            pass

        def settle(self):
            return ()

        def actions(self):
            return itertools.repeat(np.array([0, 0, 0, 0, 0, 0, -1.0]))

    monkeypatch.setattr(collect_demos, "ScriptedExpert", IdleExpert)
    monkeypatch.setattr(collect_demos, "LONGEST_DEMO", 20)
    monkeypatch.setattr(Worker, "env", env)
    monkeypatch.setattr(Worker, "task_id", TASK)
    assert Worker.attempt(TASK, 0, SETTINGS, tmp_path / "demos" / "attempt_00000.hdf5") == 0
    assert list(tmp_path.iterdir()) == []


def finish(task: TaskDemos, attempt: int, length: int) -> None:
    """What a worker leaves behind: a file for a success, nothing for a failure (length 0)."""
    task.lengths[attempt] = length
    if length:
        task.unfinished.mkdir(parents=True, exist_ok=True)
        with h5py.File(task.demo_file(attempt), "w") as file:
            file.attrs["collector"] = collector_text(task.settings)
            file["demo/actions"] = np.full((length, 7), attempt)
            file["demo"].attrs.update({"attempt": attempt, "num_samples": length})


def attempts_in(path: Path) -> list[int]:
    with h5py.File(path) as file:
        assert file["data"].attrs["num_demos"] == len(file["data"])
        return [int(file[f"data/demo_{i}"].attrs["attempt"]) for i in range(len(file["data"]))]


@pytest.mark.parametrize("num_workers", [1, 2, 5])
def test_demos_are_the_first_successes_for_any_worker_count(suite, tmp_path, num_workers):
    fails = {1, 4, 5, 8}
    task = TaskDemos(suite, TASK, tmp_path, wanted=6, settings=SETTINGS)
    order = random.Random(num_workers)
    running = []
    while not task.is_complete():
        while len(running) < num_workers and (attempt := task.next_attempt()) is not None:
            task.lengths[attempt] = None
            running.append(attempt)
        attempt = running.pop(order.randrange(len(running)))  # whichever is done first
        finish(task, attempt, 0 if attempt in fails else 10)
    task.assemble({})
    assert not running
    assert attempts_in(task.path) == [0, 2, 3, 6, 7, 9]
    assert len(task.lengths) == 10


def test_more_demos_are_added_to_a_finished_file(suite, tmp_path):
    task = TaskDemos(suite, TASK, tmp_path, wanted=2, settings=SETTINGS)
    for attempt, length in enumerate([8, 0, 9]):
        finish(task, attempt, length)
    task.assemble({})
    assert TaskDemos(suite, TASK, tmp_path, wanted=1, settings=SETTINGS).is_complete()

    more = TaskDemos(suite, TASK, tmp_path, wanted=3, settings=SETTINGS)
    assert more.next_attempt() == 3  # attempt 1 is known to have failed
    finish(more, 3, 7)
    more.assemble({})
    assert attempts_in(more.path) == [0, 2, 3]
    with h5py.File(more.path) as file:
        assert file["data"].attrs["total"] == 8 + 9 + 7


@pytest.mark.parametrize(
    "name, value", [("image_size", 32), ("seed", 1), ("visual_mesh_ratio", 1.0), ("missed_grasps", 0.5)]
)
def test_files_of_other_settings_are_not_added_to(suite, collected_demos, name, value):
    with pytest.raises(BadInput, match=f"{NAME}_demo.hdf5: was collected with {name} .*, not {value}"):
        TaskDemos(suite, TASK, collected_demos, wanted=3, settings=replace(SETTINGS, **{name: value}))


def test_files_of_others_are_left_alone(suite, tmp_path):
    with h5py.File(demo_file(tmp_path), "w") as file:
        file.create_group("data/demo_0")
    with pytest.raises(BadInput, match=r"not a file of collect_demos\.py"):
        TaskDemos(suite, TASK, tmp_path, wanted=1, settings=SETTINGS)


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--tasks", "3,10"], "--tasks 3,10: libero_object has the tasks 0 to 9"),
        (["--demos_per_task", "0"], "--demos_per_task 0: expected at least 1"),
        (["--image_size", "8"], "--image_size 8: expected 16 to 1024 pixels"),
        (["--visual_mesh_ratio", "1.5"], "--visual_mesh_ratio 1.5: expected above 0 and at most 1"),
        (["--missed_grasps", "1.5"], "--missed_grasps 1.5: expected a share of the demos, 0 to 1"),
        (["--data_directory", REPO / "collect_demos.py"], "collect_demos.py: the data directory is a file"),
        (["--data_directory", "/proc/demos"], "/proc/demos: the data directory cannot be made"),
        (["--set", "data.demos_per_tusk=3"], "--set data.demos_per_tusk=3: no such key; did you mean"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(tmp_path, arguments, sentence):
    ended = run("--data_directory", tmp_path / "demos", *arguments)
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert ended.stderr.count("\n") == 1
    assert sentence in ended.stderr
