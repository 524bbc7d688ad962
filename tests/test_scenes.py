"""Scenes without a demonstration, in the real simulator: what they show, and the files that they end up in."""

import json
import re
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
from helpers import one_sentence, run

from collection.files import SceneSettings, claimed
from collection.scene_drawer import HOLD_STILL, ArmPoses, SceneDrawer, resting_heights, set_scene
from collection.scenes import SceneBlocks, arm_poses_in, fingerprint
from demos.hdf5_writing import SCENES_FOLDER
from demos.simulator_truth import Kinematics
from observation import CAMERAS, SIMULATOR_KEYS, from_simulator
from provenance import code_version
from simulator.env import SimulatorError, make_env
from simulator.layouts import MOVED_BY, WITHHELD_CELLS, graspable, in_withheld_cell, places_of, withheld_partner
from simulator.suites import bddl_path, make_suite

SCENE = 2  # of the salad dressing, with ketchup, alphabet soup, cream cheese, milk and tomato sauce
NAME = "OBJECT_SCENE3_scenes"
SIZE, MESHES = 32, 1.0  # thinning the meshes takes longer than drawing these few scenes with all of them
DRAWN = ("states", *CAMERAS)
FLAGS = ("--tasks", SCENE, "--image_size", SIZE, "--visual_mesh_ratio", MESHES, "--num_workers", 1)
READY = np.array([0, -0.16, 0, -2.44, 0, 2.23, 0.79])  # rad, the arm over the floor


def write_demos(folder: Path, lengths=(4, 3)) -> np.ndarray:
    """A file for each length, of one demo of so many frames. -> all arm poses in it (P, 9)."""
    rng, poses = np.random.default_rng(0), []
    folder.mkdir(exist_ok=True)
    for i, length in enumerate(lengths):
        joints = READY + rng.normal(0, 0.1, (length, 7))
        fingers = rng.uniform(0.01, 0.04, (length, 1)) * [1, -1]
        with h5py.File(folder / f"task_{i}_demo.hdf5", "w") as file:
            file["data/demo_0/actions"] = np.zeros((length, 7))
            file["data/demo_0/obs/joint_states"], file["data/demo_0/obs/gripper_states"] = joints, fingers
        poses.append(np.hstack([joints, fingers]))
    return np.concatenate(poses)


def command(folder: Path, *arguments: object, expect: int = 0):
    words = ("collect_demos.py", "--config", "conf/config.yaml", "--data_directory", folder, *FLAGS, *arguments)
    return run(*words, expect=expect)


def scene_file(folder: Path) -> Path:
    return folder / "scenes" / f"{NAME}.hdf5"


@pytest.fixture(scope="module")
def suite():
    return make_suite("libero_object")


@pytest.fixture(scope="module")
def env(suite):
    env = make_env(suite, SCENE, SIZE, MESHES)
    yield env
    env.close()


@pytest.fixture(scope="module")
def collected(tmp_path_factory) -> Path:
    """A folder with two demonstrations and three scenes, which a process of its own drew."""
    folder = tmp_path_factory.mktemp("data")
    write_demos(folder)
    assert re.search(rf"\n +{SCENE} +3 +\d+  {NAME}\n", command(folder, "--scenes", 3).stdout)
    return folder


@pytest.fixture
def drawer(env, monkeypatch):
    """The worker as it is in a process whose environment is there; `closed` tells whether it was closed."""
    monkeypatch.setattr(SceneDrawer, "env", env)
    monkeypatch.setattr(SceneDrawer, "task_id", SCENE)
    monkeypatch.setattr(SceneDrawer, "closed", False, raising=False)
    monkeypatch.setattr(env, "close", lambda: setattr(SceneDrawer, "closed", True))
    return SceneDrawer


def blocks_in(folder: Path, suite, wanted: int, block: int = 2) -> SceneBlocks:
    poses = arm_poses_in(folder)
    settings = SceneSettings(SIZE, MESHES, 0, fingerprint(poses))
    return SceneBlocks(suite, SCENE, folder, wanted, settings, poses, block)


def work_off(blocks: SceneBlocks, last_first: bool = False) -> None:
    """All orders, as the pool does it, in this process."""
    orders = []
    while (order := blocks.next_order()) is not None:
        orders.append(order)
    for order in reversed(orders) if last_first else orders:
        assert not blocks.is_complete()
        order.finished(order.function(*order.arguments), 1.0)
    assert blocks.is_complete()
    blocks.assemble({})


def drawn(path: Path) -> dict[str, np.ndarray]:
    with h5py.File(path) as file:
        return {name: file[name][()] for name in DRAWN}


def assert_same_scenes(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    for name in DRAWN:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)


# The file


def test_a_file_says_what_its_scenes_are(collected, suite, env):
    assert [path.name for path in (collected / "scenes").iterdir()] == [f"{NAME}.hdf5"]
    with h5py.File(scene_file(collected)) as file:
        assert sorted(file) == sorted(DRAWN)
        assert file["states"].shape == (3, len(env.state())) and file["states"].dtype == np.float64
        for camera in CAMERAS:
            assert file[camera].shape == (3, SIZE, SIZE, 3) and file[camera].dtype == np.uint8
            assert (file[camera].chunks, file[camera].compression) == ((1, SIZE, SIZE, 3), "gzip")
            assert len(np.unique(file[camera][()].reshape(3, -1), axis=0)) == 3
        told = dict(file.attrs)
    assert (told["num_scenes"], told["visual_mesh_ratio"]) == (3, MESHES)
    assert told["code"].tolist() == [code_version()]
    assert told["model_file"] == env.model_xml
    assert told["bddl_file_content"] == bddl_path(suite, SCENE).read_text()
    assert told["bddl_file_name"] == f"libero/libero/bddl_files/libero_object/{bddl_path(suite, SCENE).name}"
    assert told["macros_image_convention"] == "opengl"
    instructions = json.loads(told["instructions"])
    assert sorted(instructions) == sorted(graspable(env))
    assert instructions["milk_1"] == "pick up the milk and place it in the basket"
    assert instructions["salad_dressing_1"] == suite.get_task(SCENE).language
    assert json.loads(told["collector"]) == {
        "program": "collect_demos.py", "image_size": SIZE, "visual_mesh_ratio": MESHES, "seed": 0,
        "arm_poses": fingerprint(arm_poses_in(collected)),
    }  # fmt: skip


def test_the_instructions_of_all_scenes_are_the_suites_own_words(suite, tmp_path):
    write_demos(tmp_path)
    own = {suite.get_task(task_id).language for task_id in range(suite.n_tasks)}
    poses = arm_poses_in(tmp_path)
    for task_id in range(suite.n_tasks):
        blocks = SceneBlocks(suite, task_id, tmp_path, 1, SceneSettings(SIZE, MESHES, 0, ""), poses)
        instructions = json.loads(blocks.attributes()["instructions"])
        assert len(instructions) == 6 and set(instructions.values()) <= own
        assert suite.get_task(task_id).language in instructions.values()


def test_a_scene_is_the_same_whatever_blocks_order_processes_and_interruptions(collected, suite, drawer, tmp_path):
    """Those of the fixture were drawn in one go, by another process."""
    write_demos(tmp_path)
    killed = blocks_in(tmp_path, suite, 5)
    order = killed.next_order()
    order.function(*order.arguments)
    killed.block_file(range(2, 4)).with_suffix(".hdf5.1_abc.part").write_bytes(b"killed while it wrote this")
    again = blocks_in(tmp_path, suite, 5)
    assert (again.missing(), again.not_begun) == (3, [range(2, 4), range(4, 5)])
    work_off(again, last_first=True)
    found = drawn(scene_file(tmp_path))
    assert_same_scenes({name: values[:3] for name, values in found.items()}, drawn(scene_file(collected)))
    assert len(np.unique(found["states"], axis=0)) == 5
    assert not list((tmp_path / "scenes").glob(".unfinished/*"))


def test_more_scenes_are_added_to_a_finished_file(collected, suite, drawer, tmp_path):
    write_demos(tmp_path)
    work_off(blocks_in(tmp_path, suite, 1))
    with h5py.File(scene_file(tmp_path), "r+") as file:
        file["labels/own"] = [1, 2]
        file.attrs["checked"], file.attrs["code"] = "by hand", ["first"]
    more = blocks_in(tmp_path, suite, 3)
    assert more.not_begun == [range(1, 2), range(2, 3)]
    work_off(more)
    assert_same_scenes(drawn(scene_file(tmp_path)), drawn(scene_file(collected)))
    with h5py.File(scene_file(tmp_path)) as file:
        assert file["labels/own"][:].tolist() == [1, 2] and file.attrs["checked"] == "by hand"
        assert file.attrs["code"].tolist() == ["first", code_version()]
        assert file.attrs["num_scenes"] == 3
    fewer = blocks_in(tmp_path, suite, 2)
    assert fewer.is_complete() and fewer.missing() == 0 and fewer.wanted == 3


def test_another_seed_draws_other_scenes(collected, drawer, tmp_path):
    poses, first = arm_poses_in(collected), drawn(scene_file(collected))["states"][0]
    drawer.draw(SCENE, range(1), poses, SceneSettings(SIZE, MESHES, 1, ""), tmp_path / "other.hdf5")
    other = drawn(tmp_path / "other.hdf5")["states"][0]
    assert np.abs(other[10:] - first[10:]).max() > 0.01  # metres


def test_a_rerun_with_everything_there_changes_nothing(collected):
    before = scene_file(collected).stat()
    command(collected, "--scenes", 3)
    assert scene_file(collected).stat() == before


# What a scene shows


def test_a_picture_is_that_of_the_stored_state(collected, env):
    found = drawn(scene_file(collected))
    for i, state in enumerate(found["states"]):
        env.reset(seed=i)
        env.set_init_state(state)
        seen = env.observe()
        for camera in CAMERAS:
            np.testing.assert_array_equal(found[camera][i], seen[SIMULATOR_KEYS[camera]], err_msg=f"{camera} {i}")


def test_the_arm_is_in_a_pose_of_the_demonstrations(collected, env, tmp_path):
    poses = write_demos(tmp_path)
    read = arm_poses_in(tmp_path)
    np.testing.assert_array_equal(np.hstack([read.joints, read.fingers]), poses)
    states = drawn(scene_file(collected))["states"]
    told = Kinematics(env.model_xml, "the scene", "a test needs it").robot_state(states)
    for i, state in enumerate(states):
        env.reset(seed=0)
        env.set_init_state(state)
        seen = env.proprioception()
        for part, values in told.items():
            expected = from_simulator(env.observe())[part]
            np.testing.assert_allclose(values[i], expected, atol=1e-5, err_msg=part)
        pose = np.hstack([seen[SIMULATOR_KEYS[name]] for name in ("joint_states", "gripper_states")])
        assert (pose == poses).all(axis=1).any()
    used, heights = np.zeros(len(poses), int), resting_heights(env)
    for scene in range(200):
        set_scene(env, np.random.default_rng(scene), heights, read)
        used[np.abs(read.joints - env.proprioception()["robot0_joint_pos"]).sum(axis=1).argmin()] += 1
    assert used.min() > 10  # of 28.6 each


def test_no_object_is_where_training_never_shows_it_and_all_stand_still(env):
    places, heights = places_of(env), resting_heights(env)
    pose = ArmPoses(READY[None], np.array([[0.04, -0.04]]))
    seen = set()
    for scene in range(15):
        set_scene(env, np.random.default_rng(scene), heights, pose)
        at = {name: env.sim.data.body_xpos[env.domain.obj_body_id[name]].copy() for name in env.domain.objects_dict}
        for name in graspable(env):
            (place,) = (place for place in WITHHELD_CELLS if np.abs(at[name][:2] - place).max() <= MOVED_BY)
            assert place != places[withheld_partner(env, name)]
            assert not in_withheld_cell(place, at[name][:2])
            seen.add((name, place))
        for _ in range(3 if scene < 3 else 0):
            env.step(HOLD_STILL)
        for name, before in at.items():
            now = env.sim.data.body_xpos[env.domain.obj_body_id[name]]
            np.testing.assert_allclose(now, before, atol=1e-3, err_msg=name)  # metres
    assert len(seen) > 25  # of 30


def test_an_arm_inside_of_an_object_touches_it(env):
    env.reset(seed=0)
    assert not env.arm_touches_an_object()
    hand = env.sim.data.site_xpos[env.sim.model.site_name2id("gripper0_grip_site")]
    env.place_objects({"milk_1": hand[:2].copy()}, {"milk_1": float(hand[2])})
    assert env.arm_touches_an_object()


# Wrong use


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--demos_per_task", 2), ("--shift_target", 0.0), ("--missed_grasps", 0.5), ("--start_noise", 0.02),
        ("--obs_alignment", "after"), ("--layouts", "shuffled"),
    ],
)  # fmt: skip
def test_flags_of_demonstrations_are_refused(tmp_path, flag, value):
    said = one_sentence(command(tmp_path, "--scenes", 3, flag, value, expect=2))
    assert said == f"error: --scenes 3: goes without {flag}, which say what a demonstration is like"


def test_scenes_are_at_least_one(tmp_path):
    assert one_sentence(command(tmp_path, "--scenes", 0, expect=2)) == "error: --scenes 0: expected at least 1"


def test_without_demonstrations_there_are_no_arm_poses(tmp_path):
    (tmp_path / "._task_demo.hdf5").write_bytes(b"left by macOS")
    said = one_sentence(command(tmp_path, "--scenes", 3, expect=2))
    assert said.startswith(f"error: {tmp_path}: holds no demonstration (*_demo.hdf5)")
    assert not (tmp_path / "scenes").exists()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda demo: demo.pop("obs/joint_states"), "demo_0: key obs/joint_states is missing"),
        (lambda demo: demo["obs/joint_states"].write_direct(np.full((4, 7), np.nan)), "(4, 7) or holds NaN, expected"),
        (lambda demo: demo.pop("actions"), "demo_0: key actions is missing"),
    ],
)
def test_demonstrations_without_poses_are_named(tmp_path, change, sentence):
    write_demos(tmp_path)
    path = tmp_path / "task_0_demo.hdf5"
    with h5py.File(path, "r+") as file:
        change(file["data/demo_0"])
    said = one_sentence(command(tmp_path, "--scenes", 3, expect=2))
    assert said.startswith(f"error: {path}: ") and sentence in said


@pytest.fixture
def copy(collected, tmp_path) -> Path:
    return Path(shutil.copytree(collected, tmp_path / "copy"))


@pytest.mark.parametrize(("flag", "value"), [("seed", 1), ("image_size", 16), ("visual_mesh_ratio", 0.3)])
def test_files_of_other_settings_are_not_added_to(copy, flag, value):
    said = one_sentence(command(copy, "--scenes", 4, f"--{flag}", value, expect=2))
    assert re.fullmatch(
        rf"error: {scene_file(copy)}: was collected with {flag} \S+, not {value}; delete the file, and .*", said
    )


def test_scenes_with_arm_poses_of_other_demonstrations_are_not_added_to(copy):
    write_demos(copy, lengths=(4, 3, 2))
    said = one_sentence(command(copy, "--scenes", 4, expect=2))
    assert re.search(r"was collected with arm_poses 7 \(digest \w+\), not 9 \(digest \w+\); delete the file", said)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda file: file["agentview_rgb"].resize(2, axis=0), "holds 3 states, 2 agentview_rgb, 3 eye_in_hand_rgb"),
        (lambda file: file.pop("states"), "states is missing"),
        (lambda file: file.attrs.pop("collector"), "not a file of collect_demos.py"),
    ],
)
def test_a_file_that_was_changed_by_hand_is_refused_in_one_sentence(copy, change, sentence):
    with h5py.File(scene_file(copy), "r+") as file:
        pictures = file["agentview_rgb"][()]
        del file["agentview_rgb"]
        file.create_dataset("agentview_rgb", data=pictures, maxshape=(None, SIZE, SIZE, 3))
        change(file)
    said = one_sentence(command(copy, "--scenes", 4, expect=2))
    assert said.startswith(f"error: {scene_file(copy)}: ") and sentence in said


def test_a_second_collector_of_a_scene_is_refused_in_one_sentence(tmp_path):
    write_demos(tmp_path)
    with claimed([NAME], tmp_path / "scenes"):
        said = one_sentence(command(tmp_path, "--scenes", 3, expect=2))
    assert f"another collect_demos.py is collecting {NAME} in {tmp_path / SCENES_FOLDER} (process " in said
    assert not (tmp_path / "scenes").exists()  # which nothing came into


@pytest.mark.parametrize(
    ("problem", "error", "sentence"),
    [
        ("FatalError: OpenGL error 0x505", Exception, r"task 2: drawing a scene failed \(FatalError: OpenGL error"),
        ("FatalError: Could not allocate memory", MemoryError, "Could not allocate memory"),
    ],
)
def test_a_drawing_that_breaks_down_leaves_no_part_of_a_block(drawer, tmp_path, monkeypatch, problem, error, sentence):
    def draw(poses):
        raise SimulatorError(problem)

    monkeypatch.setattr(drawer.env, "draw", draw)
    settings, pose = SceneSettings(SIZE, MESHES, 0, ""), ArmPoses(READY[None], np.full((1, 2), 0.04))
    with pytest.raises(error, match=sentence):
        drawer.draw(SCENE, range(1), pose, settings, tmp_path / "block.hdf5")
    assert list(tmp_path.iterdir()) == []
    assert drawer.closed and drawer.env is None
