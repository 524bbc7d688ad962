"""The collector, with real demos of two cores' making (see conftest.py); takes about a minute."""

import contextlib
import itertools
import json
import os
import random
import re
import resource
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
from failing_worker import SEEDS, FailingWorker
from helpers import ROOT, batches_of, load, samples_of

import collect_demos
from collect_demos import report
from collection import demonstrator, task_demos
from collection.demonstrator import Demonstration, Demonstrator, Outcome, begins_after_a_miss, demonstrate, write_demo
from collection.files import UNFINISHED, DemoSettings, claimed, settings_text, written_hdf5
from collection.pool import collect, how_it_ended
from collection.task_demos import TaskDemos, check_expert
from config import load_config
from demos.frames import open_frames
from demos.hdf5 import drawn_rows
from demos.language import LanguageTable
from errors import BadInput
from observation import ROBOT_STATES, from_simulator
from provenance import code_version
from simulator.env import SimulatorError, make_env
from simulator.scripted_expert import SETTLE_STEPS
from simulator.suites import make_suite
from simulator.thin_meshes import _thinned_corners

TASK = 6
NAME = "pick_up_the_butter_and_place_it_in_the_basket"
# Those of the fixture collected_demos.
SETTINGS = DemoSettings(image_size=64, visual_mesh_ratio=0.2, obs_alignment="after", start_noise=0.02, seed=0)
SAME_SETTINGS = ("--tasks", "6", "--image_size", "64", "--visual_mesh_ratio", "0.2")


def command(*arguments) -> list:
    return [sys.executable, ROOT / "collect_demos.py", "--config", ROOT / "conf/config.yaml", *map(str, arguments)]


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


@pytest.fixture(scope="module")
def episode(env) -> Demonstration:
    """Attempt 0, played and not drawn."""
    return demonstrate(env, TASK, attempt=0, settings=SETTINGS)


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
        assert json.loads(data.attrs["attempts"]) == [demo.attrs["attempt"] for demo in data.values()]
        assert data.attrs["code"].tolist() == [data["demo_0"].attrs["code"]]
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
    """A demo is lived through again: its batches, made as in training, equal what a policy would see, with either state
    of the robot."""
    data = load_config("conf/config.yaml", [f"data.cache_directory={tmp_path}"]).data
    datasets = []
    for robot_state in ROBOT_STATES:
        demos, _ = load(collected_demos, f"data.robot_state={robot_state}")
        frames = open_frames(demos, data, 64, torch.device("cpu"))
        language = LanguageTable("none", {demos[1].task: torch.zeros(1)})
        datasets.append(samples_of(batches_of(demos, drawn_rows(demos[1:]), 0, language=language, frames=frames)))
    rng = np.random.default_rng([SETTINGS.seed, TASK, demo.attrs["attempt"]])
    env.reset(seed=int(rng.integers(2**31)))
    env.add_start_noise(rng, SETTINGS.start_noise)
    for _ in range(SETTLE_STEPS):
        env.step(np.array([0, 0, 0, 0, 0, 0, -1.0]))
    for t, action in enumerate(demo["actions"]):
        np.testing.assert_array_equal(env.state(), demo["states"][t])
        solved = env.step(action)
        if t % 20 == 0 or t == len(demo["actions"]) - 1:
            live, recorded = from_simulator(env.observe()), datasets[0][t]["obs"] | datasets[1][t]["obs"]
            assert live.keys() | {"language"} == recorded.keys()
            for name, value in live.items():
                assert value.dtype == recorded[name].numpy().dtype, name
                np.testing.assert_array_equal(recorded[name], value, err_msg=f"{name} {t}")
    assert solved


def test_the_hands_orientation_never_jumps_from_frame_to_frame(demo):
    """The hand points down, turned by pi: written as the shorter turn, its axis would change its sign there."""
    orientation, turned = demo["obs/ee_ori"][:], demo["robot_states"][:, 5:]
    assert turned[:, 3].min() < 0 < turned[:, 3].max()  # w: the angle is above and below pi
    assert np.abs(np.diff(orientation, axis=0)).max() < 0.1  # rad; half a second's turn would be more


def test_obs_before_the_action_are_the_same_frames_one_step_earlier(env, episode, tmp_path):
    start = replace(episode, actions=episode.actions[:15], states=episode.states[:15])
    with h5py.File(tmp_path / "both.hdf5", "w") as file:
        for alignment in ("after", "before"):
            write_demo(file.create_group(alignment), env, start, replace(SETTINGS, obs_alignment=alignment))
        for name, after in file["after/obs"].items():
            np.testing.assert_array_equal(file[f"before/obs/{name}"][1:], after[:-1], err_msg=name)
        np.testing.assert_array_equal(file["before/obs/joint_states"][:], file["before/states"][:, 1:8])


def test_of_every_few_steps_the_pictures_are_those_of_the_whole_film_and_all_numbers_are_there(env, episode, tmp_path):
    start = replace(episode, actions=episode.actions[:17], states=episode.states[:17])
    with h5py.File(tmp_path / "both.hdf5", "w") as file:
        for every in (1, 5):
            write_demo(file.create_group(str(every)), env, start, replace(SETTINGS, draw_every=every))
        for name, values in file["1/obs"].items():
            expected = values[::5] if name.endswith("_rgb") else values[:]
            np.testing.assert_array_equal(file[f"5/obs/{name}"][:], expected, err_msg=name)
        np.testing.assert_array_equal(file["5/actions"][:], file["1/actions"][:])
        assert file["5"].attrs["draw_every"] == 5 and "draw_every" not in file["1"].attrs


def test_a_demo_after_a_missed_grasp_shows_the_second_attempt_alone(env, episode):
    after_a_miss = demonstrate(env, TASK, attempt=0, settings=replace(SETTINGS, missed_grasps=1.0))
    seconds = [one.states[0][0] for one in (episode, after_a_miss)]
    assert seconds[0] == pytest.approx(SETTLE_STEPS / 20) and seconds[1] > seconds[0] + 40 / 20
    assert len(after_a_miss.actions) <= demonstrator.LONGEST_DEMO
    first_closed = np.flatnonzero(after_a_miss.actions[:, 6] == 1)[0]
    assert first_closed > 20  # it lets go at once and comes down on the target again before it closes
    heights = []
    for one in (episode, after_a_miss):
        env.sim.set_state_from_flattened(one.states[0])
        env.sim.forward()
        heights.append(float(env.sim.data.get_body_xpos("butter_1_main")[2]))
    assert heights[1] == pytest.approx(heights[0], abs=0.03)  # the target is on the floor, not in the hand


@pytest.mark.parametrize("share, expected", [(0.0, 0), (0.3, 6), (0.4, 8), (1.0, 20)])
def test_missed_grasps_are_spread_evenly_over_the_attempts(share, expected):
    chosen = [begins_after_a_miss(attempt, share) for attempt in range(20)]
    assert sum(chosen) == expected
    assert abs(sum(chosen[:10]) - expected / 2) <= 0.5


def test_killed_run_continues_and_gives_the_same_demos_as_an_undisturbed_one(collected_demos, env, episode, tmp_path):
    """The fixture's was killed after its first demo. Here both are played in one simulator, one after the other."""
    assert [path.name for path in collected_demos.iterdir() if path.is_file()] == [demo_file(collected_demos).name]
    assert not (collected_demos / UNFINISHED).exists()
    second = demonstrate(env, TASK, attempt=1, settings=SETTINGS)
    with h5py.File(demo_file(collected_demos)) as file, h5py.File(tmp_path / "undisturbed.hdf5", "w") as undisturbed:
        assert ["kept" in file[f"data/demo_{number}"].attrs for number in range(2)] == [True, False]
        for number, played in enumerate((episode, second)):
            write_demo(undisturbed.create_group(f"data/demo_{number}"), env, played, SETTINGS)
        assert_same_demos(file, undisturbed)


def assert_same_demos(found: h5py.File, expected: h5py.File):
    def compare(name, item):
        if isinstance(item, h5py.Dataset):
            np.testing.assert_array_equal(found[name][:], item[:], err_msg=name)

    assert sorted(found["data"]) == sorted(expected["data"])
    expected.visititems(compare)


def test_rerun_with_everything_there_changes_nothing(collected_demos, monkeypatch, capsys):
    before = demo_file(collected_demos).stat()
    words = command("--data_directory", collected_demos, "--demos_per_task", 2, *SAME_SETTINGS)[1:]
    monkeypatch.setattr(sys, "argv", list(map(str, words)))
    collect_demos.main()
    assert "6                 2/2   100.0%" in capsys.readouterr().out
    assert demo_file(collected_demos).stat() == before


@pytest.fixture
def worker(env, monkeypatch):
    """The class as it is in a worker process whose environment is there; `closed` tells whether it was closed."""
    monkeypatch.setattr(Demonstrator, "env", env)
    monkeypatch.setattr(Demonstrator, "task_id", TASK)
    Demonstrator.closed = False
    monkeypatch.setattr(env, "close", lambda: setattr(Demonstrator, "closed", True))
    return Demonstrator


def use_expert(monkeypatch, action: list[float]) -> None:
    """Makes the expert do the same all the time, for 20 steps."""

    class OtherExpert:
        def __init__(self, env, rng):
            pass

        def settle(self):
            return ()

        def actions(self):
            return itertools.repeat(np.array(action))

    monkeypatch.setattr(demonstrator, "ScriptedExpert", OtherExpert)
    monkeypatch.setattr(demonstrator, "LONGEST_DEMO", 20)


def standing_still(env) -> Demonstration:
    """Two steps that count as a success."""
    return Demonstration(np.zeros((2, 7)), np.tile(env.state(), (2, 1)), [env.proprioception()] * 3, [env.poses()] * 3)


def test_failed_attempts_are_never_written(worker, tmp_path, monkeypatch):
    use_expert(monkeypatch, [0, 0, 0, 0, 0, 0, -1.0])
    assert worker.attempt(TASK, 0, SETTINGS, tmp_path / "demos" / "attempt_00000.hdf5") == Outcome(0, "", [])
    assert list(tmp_path.iterdir()) == []
    assert not worker.closed


def test_an_attempt_that_breaks_the_simulation_is_a_failure_with_its_reason(worker, tmp_path, monkeypatch):
    use_expert(monkeypatch, [np.nan] * 7)
    length, why, _ = worker.attempt(TASK, 0, SETTINGS, tmp_path / "demos" / "attempt_00000.hdf5")
    assert length == 0 and "is not finite" in why
    assert list(tmp_path.iterdir()) == []
    assert worker.closed and worker.env is None  # the next attempt builds a new one


def test_a_simulation_without_memory_is_no_failed_attempt(worker, tmp_path, monkeypatch):
    def play(*arguments):
        raise SimulatorError("FatalError: Could not allocate memory")

    monkeypatch.setattr(demonstrator, "demonstrate", play)
    with pytest.raises(MemoryError):
        worker.attempt(TASK, 0, SETTINGS, tmp_path / "demos" / "attempt_00000.hdf5")


def test_a_renderer_that_breaks_down_is_no_failed_attempt(worker, tmp_path, monkeypatch):
    def draw(poses):
        raise SimulatorError("FatalError: OpenGL error 0x505")

    monkeypatch.setattr(demonstrator, "demonstrate", lambda env, *arguments: standing_still(env))
    monkeypatch.setattr(worker.env, "draw", draw)
    with pytest.raises(BadInput, match=r"^task 6: drawing a demo failed \(FatalError: OpenGL error 0x505\); what is"):
        worker.attempt(TASK, 0, SETTINGS, tmp_path / "attempt_00000.hdf5")
    assert list(tmp_path.iterdir()) == []


def test_a_demo_names_the_code_that_made_it(worker, tmp_path, monkeypatch):
    monkeypatch.setattr(demonstrator, "demonstrate", lambda env, *arguments: standing_still(env))
    assert worker.attempt(TASK, 3, SETTINGS, tmp_path / "attempt_00003.hdf5") == Outcome(2, "", [])
    with h5py.File(tmp_path / "attempt_00003.hdf5") as file:
        assert file["demo"].attrs["code"] == code_version()
        assert file["demo"].attrs["attempt"] == 3


def test_an_attempt_that_is_solved_too_soon_is_no_demo(env, episode, monkeypatch):
    for shortest, kept in ((len(episode.actions), True), (len(episode.actions) + 1, False)):
        monkeypatch.setattr(demonstrator, "SHORTEST_DEMO", shortest)
        assert (demonstrate(env, TASK, attempt=0, settings=SETTINGS) is not None) == kept


def test_any_seed_is_taken(env, monkeypatch):
    use_expert(monkeypatch, [0, 0, 0, 0, 0, 0, -1.0])
    huge = replace(SETTINGS, seed=2**70)
    assert demonstrate(env, TASK, attempt=0, settings=huge) is None
    assert json.loads(settings_text(huge))["seed"] == 2**70


def finish(task: TaskDemos, attempt: int, length: int, code: str = "first") -> None:
    """What a worker leaves behind: a file for a success, nothing for a failure (length 0)."""
    task.lengths[attempt] = length
    if length:
        task.unfinished.mkdir(parents=True, exist_ok=True)
        with h5py.File(task.demo_file(attempt), "w") as file:
            file.attrs["collector"] = settings_text(task.settings)
            file["demo/actions"] = np.full((length, 7), attempt)
            file["demo"].attrs.update({"attempt": attempt, "num_samples": length, "code": code})


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


def collected(suite, folder: Path, lengths: list[int]) -> Path:
    """A file of the demos of the attempts 0, 1, ... that have a length."""
    task = TaskDemos(suite, TASK, folder, wanted=sum(length > 0 for length in lengths), settings=SETTINGS)
    for attempt, length in enumerate(lengths):
        finish(task, attempt, length)
    task.assemble({})
    return task.path


def demos_in(path: Path) -> dict[str, int]:
    with h5py.File(path) as file:
        assert file["data"].attrs["num_demos"] == len(file["data"])
        assert file["data"].attrs["total"] == sum(len(demo["actions"]) for demo in file["data"].values())
        return {name: int(demo.attrs["attempt"]) for name, demo in file["data"].items()}


@pytest.mark.parametrize(
    ("deleted", "listed", "then"),
    [
        ("demo_1", True, {"demo_0": 0, "demo_2": 3, "demo_3": 4, "demo_4": 5}),
        ("demo_0", True, {"demo_1": 2, "demo_2": 3, "demo_3": 4, "demo_4": 5}),
        ("demo_2", True, {"demo_0": 0, "demo_1": 2, "demo_3": 4, "demo_4": 5}),
        # A file of before its attempts were listed: that a last demo was there is not known.
        ("demo_1", False, {"demo_0": 0, "demo_2": 3, "demo_3": 4, "demo_4": 5}),
        ("demo_2", False, {"demo_0": 0, "demo_1": 2, "demo_2": 3, "demo_3": 4}),
    ],
)
def test_a_deleted_demo_does_not_come_back_and_its_number_is_not_given_again(
    suite, tmp_path, deleted, listed, then, capsys
):
    """A number that stands in a list of held-out demos must go on to mean the same demo."""
    path = collected(suite, tmp_path, [8, 0, 9, 7])
    with h5py.File(path, "r+") as file:
        del file[f"data/{deleted}"]
        if not listed:
            del file["data"].attrs["attempts"]
    assert TaskDemos(suite, TASK, tmp_path, wanted=2, settings=SETTINGS).is_complete()
    more = TaskDemos(suite, TASK, tmp_path, wanted=4, settings=SETTINGS)
    for _ in range(2):
        finish(more, more.next_attempt(), 6)
    assert more.is_complete()
    more.assemble({})
    assert demos_in(path) == then
    again = TaskDemos(suite, TASK, tmp_path, wanted=4, settings=SETTINGS)
    assert again.is_complete()
    report([again])
    tried = max(then.values()) + 1  # of which attempt 1 failed; what was deleted later was a success
    assert f"{tried - 1}/{tried}" in capsys.readouterr().out


def test_all_demos_may_be_deleted(suite, tmp_path):
    path = collected(suite, tmp_path, [8, 9])
    with h5py.File(path, "r+") as file:
        del file["data/demo_0"], file["data/demo_1"]
    more = TaskDemos(suite, TASK, tmp_path, wanted=1, settings=SETTINGS)
    finish(more, more.next_attempt(), 6)
    more.assemble({})
    assert demos_in(path) == {"demo_2": 2}


def test_what_the_user_put_into_a_file_stays_in_it(suite, tmp_path):
    path = collected(suite, tmp_path, [8, 9])
    with h5py.File(path, "r+") as file:
        file["mask/train"] = ["demo_0"]
        file["data/notes"] = [1, 2]
        file.attrs["checked"] = "by hand"
        file["data/demo_1"].attrs["checked"] = True
    more = TaskDemos(suite, TASK, tmp_path, wanted=3, settings=SETTINGS)
    finish(more, more.next_attempt(), 6)
    more.assemble({})
    with h5py.File(path) as file:
        assert file["mask/train"][0] == b"demo_0" and file["data/notes"][1] == 2
        assert file.attrs["checked"] == "by hand" and file["data/demo_1"].attrs["checked"]
        assert sorted(file["data"]) == ["demo_0", "demo_1", "demo_2", "notes"]


def test_a_file_lists_every_version_of_the_code_that_added_to_it(suite, tmp_path):
    path = collected(suite, tmp_path, [8, 9])
    for wanted, code in ((3, "second"), (4, "second"), (5, "first")):
        more = TaskDemos(suite, TASK, tmp_path, wanted=wanted, settings=SETTINGS)
        finish(more, more.next_attempt(), 6, code)
        more.assemble({})
    with h5py.File(path) as file:
        assert file["data"].attrs["code"].tolist() == ["first", "second"]


def test_a_file_says_of_every_simulator_that_added_to_it(suite, tmp_path):
    path = collected(suite, tmp_path, [8, 9])
    own = "as LIBERO's own"
    for wanted, simulator, told in ((3, own, own), (4, own, own), (5, "another", [own, "another"])):
        more = TaskDemos(suite, TASK, tmp_path, wanted=wanted, settings=SETTINGS)
        finish(more, more.next_attempt(), 6)
        more.assemble({"simulator": simulator})
        with h5py.File(path) as file:
            assert np.asarray(file["data"].attrs["simulator"]).tolist() == told


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


def edit(path: str, key: str, value):
    def change(file: h5py.File):
        file[path].attrs[key] = value

    return change


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            edit("data/demo_1", "attempt", "three"),
            "/data/demo_1 is no demo of collect_demos.py: expected whole numbers",
        ),
        (
            edit("data/demo_1", "num_samples", 1.5),
            "/data/demo_1 is no demo of collect_demos.py: expected whole numbers",
        ),
        (lambda file: file["data/demo_1"].attrs.pop("attempt"), "found only ['code', 'num_samples']"),
        (lambda file: file.copy("data/demo_1", "data/demo_7"), "demo_1 and demo_7 are the same demo, of attempt 1"),
        (edit("data", "attempts", "0, 1"), "its attribute attempts is no list of whole numbers"),
        (edit("data", "attempts", 5), "its attribute attempts is no list of whole numbers"),
        (edit("data", "collector", "[]"), "not a file of collect_demos.py"),
        (edit("data", "collector", 5), "not a file of collect_demos.py"),
        (lambda file: file.pop("data"), "not a file of collect_demos.py"),
        (lambda file: file["data"].__setitem__("demo_2", h5py.SoftLink("/nowhere")), "link to something that is not"),
    ],
)
def test_a_file_that_was_changed_by_hand_is_refused_in_one_sentence(suite, tmp_path, change, sentence):
    path = collected(suite, tmp_path, [8, 9])
    with h5py.File(path, "r+") as file:
        change(file)
    with pytest.raises(BadInput, match=f"^{re.escape(str(path))}: .*{re.escape(sentence)}"):
        TaskDemos(suite, TASK, tmp_path, wanted=3, settings=SETTINGS)


def test_a_file_that_another_program_writes_is_not_called_damaged(suite, tmp_path):
    path = collected(suite, tmp_path, [8, 9])
    script = "import h5py, sys; file = h5py.File(sys.argv[1], 'r+'); print(flush=True); sys.stdin.read()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", script, path], **pipes) as writer:
        writer.stdout.readline()
        with pytest.raises(BadInput, match="is open in another process"):
            TaskDemos(suite, TASK, tmp_path, wanted=3, settings=SETTINGS)
        writer.stdin.close()


@contextlib.contextmanager
def files_of_at_most(size: int):
    """As on a disk that has no more room: the kernel refuses to let a file grow beyond."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_takes_nothing_that_was_written_before(suite, tmp_path):
    path = collected(suite, tmp_path, [8, 9])
    before = path.read_bytes()
    more = TaskDemos(suite, TASK, tmp_path, wanted=3, settings=SETTINGS)
    finish(more, 2, 3000)
    full = pytest.raises(BadInput, match=f"^{path}: cannot be written \\(File too large\\); what is finished is kept")
    with full, files_of_at_most(50_000):
        more.assemble({})
    assert path.read_bytes() == before
    assert [file.name for file in more.unfinished.iterdir()] == ["attempt_00002.hdf5"]
    again = TaskDemos(suite, TASK, tmp_path, wanted=3, settings=SETTINGS)
    again.assemble({})
    assert demos_in(path) == {"demo_0": 0, "demo_1": 1, "demo_2": 2}


def test_a_disk_that_fills_up_in_the_middle_of_a_demo_leaves_no_part_of_it(tmp_path):
    path = tmp_path / "attempt_00000.hdf5"
    with (
        pytest.raises(BadInput, match="File too large"),
        files_of_at_most(50_000),
        written_hdf5(path, tmp_path) as file,
    ):
        frames = file.create_dataset("frames", (500, 16, 16, 3), np.uint8, chunks=(1, 16, 16, 3))
        for i in range(500):
            frames[i] = i % 256
        frames[:]  # what is not there cannot be read either
    assert list(tmp_path.iterdir()) == []


# Several collectors


def test_a_second_collector_of_a_task_is_refused_in_one_sentence(tmp_path, said_by):
    folder = tmp_path / "demos"
    folder.mkdir()
    with claimed([NAME], folder):
        said = said_by("--demos_per_task", 2, *SAME_SETTINGS)
    assert re.fullmatch(
        rf"error: another collect_demos\.py is collecting {NAME} in {folder} \(process {os.getpid()} on .+\)\n", said
    )
    assert list(folder.iterdir()) == []


def test_collectors_of_different_tasks_share_a_folder(tmp_path):
    with claimed(["butter", "milk"], tmp_path):
        with claimed(["ketchup"], tmp_path):
            pass
        with (
            pytest.raises(BadInput, match=r"another collect_demos\.py is collecting milk"),
            claimed(["soup", "milk"], tmp_path),
        ):
            pass
        with claimed(["soup"], tmp_path):  # which the refused one had claimed before
            pass
    assert list(tmp_path.iterdir()) == []


def test_the_folder_of_unfinished_demos_may_go_while_another_collector_begins(tmp_path, monkeypatch):
    """Who ends last removes it, perhaps between the moment when another one makes it and when it locks a file in it."""
    real_open = Path.open

    def open_after_removal(path, *arguments):
        monkeypatch.setattr(Path, "open", real_open)
        path.parent.rmdir()
        return path.open(*arguments)

    monkeypatch.setattr(Path, "open", open_after_removal)
    with claimed(["butter"], tmp_path):
        assert (tmp_path / UNFINISHED / "butter.lock").exists()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("delay", [0, 1])  # while a worker is started, and while it imports what it needs
def test_ctrl_c_says_how_to_continue_and_leaves_no_lock(tmp_path, delay):
    arguments = ("--data_directory", tmp_path, "--demos_per_task", 2, "--num_workers", 1, *SAME_SETTINGS)
    options = {
        "stdout": subprocess.PIPE, "stderr": subprocess.PIPE,
        "preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore Ctrl-C
    }  # fmt: skip
    with subprocess.Popen(command(*arguments), cwd=ROOT, start_new_session=True, **options) as stopped:
        said = b""
        while b"collecting" not in said:
            said += (character := stopped.stderr.read(1))
            assert character, said
        time.sleep(delay)
        os.killpg(stopped.pid, signal.SIGINT)  # a terminal sends it to the workers, too
        printed, complaints = stopped.communicate(timeout=60)
    assert stopped.returncode == 130
    assert f"What is finished is kept in {tmp_path}; the same command continues." in printed.decode()
    assert b"Traceback" not in complaints
    assert list(tmp_path.iterdir()) == []


# Failures


@pytest.mark.parametrize(
    ("failure", "sentence"),
    [
        (
            "killed",
            r"a worker was killed \(SIGKILL\), most likely for want of memory \(1.5 GB each\); use fewer --num_wo",
        ),
        (
            "ended",
            r"a worker ended with exit code 3, it may have said above why; what is finished is kept, and the same",
        ),
        ("bad input", r"the renderer has no GPU"),
    ],
)
def test_the_failure_of_a_worker_process_is_named_as_what_it_is(suite, tmp_path, monkeypatch, failure, sentence):
    monkeypatch.setattr(task_demos, "Demonstrator", FailingWorker)
    settings = replace(SETTINGS, seed=SEEDS[failure])
    with pytest.raises(BadInput, match=f"^{sentence}"):
        collect([TaskDemos(suite, TASK, tmp_path, wanted=2, settings=settings)], 2, finish=None)


@pytest.mark.parametrize(
    ("exit_codes", "sentence"),
    [
        ([-15, -9, -15], "a worker was killed (SIGKILL), most likely for want of memory"),
        ([-15, -11], "a worker was ended by SIGSEGV"),
        ([-7], "a worker was ended by SIGBUS"),
        ([None, 1], "a worker ended with exit code 1"),
        ([-15, -15], "a worker was ended by SIGTERM"),  # the executor ends the others with it, too
    ],
)
def test_memory_is_suspected_only_where_the_kernel_killed(exit_codes, sentence):
    assert how_it_ended(exit_codes).startswith(sentence)


@pytest.mark.parametrize(
    ("changes", "advice"),
    [
        ({}, "it solves nine of ten and more in the simulator that requirements.txt names"),
        ({"start_noise": 0.5}, "less than --start_noise 0.5 makes it easier"),
        (
            {"start_noise": 0.5, "shift_target": 0.2},
            "less than --start_noise 0.5 and --shift_target 0.2 makes it easier",
        ),
    ],
)
def test_the_advice_for_an_expert_that_fails_fits_the_settings(suite, tmp_path, changes, advice):
    task = TaskDemos(suite, TASK, tmp_path, wanted=2, settings=replace(SETTINGS, **changes))
    task.lengths = dict.fromkeys(range(14), 0)
    check_expert(task)
    task.lengths[14] = 0
    task.broken = ["first", "no free place"]
    broken = "in 2 attempts the simulation broke down, the last time with no free place"
    with pytest.raises(
        BadInput, match=f"^task 6: the expert failed 15 times and succeeded 0 times; {broken}; {advice}$"
    ):
        check_expert(task)


def test_a_mesh_package_that_is_broken_is_not_called_missing(tmp_path, monkeypatch):
    (tmp_path / "fast_simplification.py").write_text("raise ImportError('undefined symbol: no_such_symbol')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "fast_simplification", raising=False)
    nothing = np.zeros((0, 3))
    with pytest.raises(BadInput, match=r"fast-simplification, which cannot be loaded \(undefined symbol: no_such_symb"):
        _thinned_corners(nothing, nothing, [], [], None, 1)
    monkeypatch.setitem(sys.modules, "fast_simplification", None)
    with pytest.raises(BadInput, match=r"run `pip install -r requirements-meshes\.txt`"):
        _thinned_corners(nothing, nothing, [], [], None, 1)


# The command line


@pytest.fixture
def said_by(monkeypatch, capsys, tmp_path):
    """What the command says, in this process, with exit code 2."""

    def call(*arguments) -> str:
        words = command("--data_directory", tmp_path / "demos", *arguments)[1:]
        monkeypatch.setattr(sys, "argv", list(map(str, words)))
        with pytest.raises(SystemExit) as ended:
            collect_demos.main()
        assert ended.value.code == 2
        printed = capsys.readouterr()
        assert printed.out == "" and printed.err.startswith("error: ") and printed.err.count("\n") == 1
        return printed.err

    return call


def test_workers_are_as_many_as_the_job_has_cores_and_memory_for(monkeypatch):
    monkeypatch.setattr(collect_demos, "affordable_processes", lambda gigabytes: {1.5: 3}[gigabytes])
    assert collect_demos.parse_arguments([]).num_workers == 3


def test_a_home_folder_is_found(tmp_path, monkeypatch, said_by):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    said_by("--data_directory", "~/demos", "--tasks", "10")
    assert (tmp_path / "home/demos").is_dir()
    assert "no home folder of ~nobody_here is known" in said_by("--data_directory", "~nobody_here/demos")


def test_which_of_several_folders_is_to_be_filled_is_asked(said_by, monkeypatch, capsys):
    several = ("--set", "data.data_directory=[a, b]")
    assert "--tasks 10: " in said_by(*several, "--tasks", "10")  # which --data_directory has told
    monkeypatch.setattr(sys, "argv", list(map(str, command(*several)[1:])))
    with pytest.raises(SystemExit):
        collect_demos.main()
    assert "data.data_directory lists 2 folders; say with --data_directory which" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--tasks", "3,10"], "--tasks 3,10: libero_object has the tasks 0 to 9"),
        (["--demos_per_task", "0"], "--demos_per_task 0: expected at least 1"),
        (["--image_size", "8"], "--image_size 8: expected 16 to 1024 pixels"),
        (["--visual_mesh_ratio", "1.5"], "--visual_mesh_ratio 1.5: expected above 0 and at most 1"),
        (["--missed_grasps", "1.5"], "--missed_grasps 1.5: expected a share of the demos, 0 to 1"),
        (["--visual_mesh_ratio", "nan"], "--visual_mesh_ratio nan: expected above 0 and at most 1"),
        (["--start_noise", "inf"], "--start_noise inf: expected 0 to 1 rad"),
        (["--shift_target", "nan"], "--shift_target nan: expected 0 to 0.2 metres"),
        (["--missed_grasps", "nan"], "--missed_grasps nan: expected a share of the demos, 0 to 1"),
        (["--seed", "-1"], "--seed -1: expected 0 or more"),
        (["--num_workers", "0"], "--num_workers 0: expected at least 1"),
        (["--data_directory", "/tmp/" + 300 * "x"], "File name too long"),
        (["--data_directory", ROOT / "collect_demos.py"], "collect_demos.py: the data directory is a file"),
        (["--data_directory", "/proc/demos"], "/proc/demos: the data directory cannot be made"),
        (["--set", "data.demos_per_tusk=3"], "--set data.demos_per_tusk=3: no such key; did you mean"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(said_by, arguments, sentence):
    assert sentence in said_by(*arguments)
