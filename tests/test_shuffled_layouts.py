"""Shuffled layouts, in the real simulator: what they may show, who is asked for, and the files that come of them."""

import json
import re
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from helpers import ROOT, run

from collection import demonstrator
from collection.demonstrator import Demonstrator, Outcome, begins_after_a_miss, demonstrate, expert_at_start
from collection.files import DemoSettings, check_settings, settings_text
from collection.task_demos import libero_attributes
from config import load_config
from demos.hdf5 import load_demos, split_demos
from demos.instructions import canonical_instruction, task_instruction
from errors import BadInput
from rollouts.episodes import STAND_STILL, Episode, Rollouts
from rollouts.policies import read_demo
from rollouts.worker import play_episode
from simulator.env import LiberoEnv, make_env
from simulator.layouts import (
    MOVED_BY,
    WITHHELD_CELLS,
    WITHHELD_PAIRS,
    cell_by_rule,
    graspable,
    in_withheld_cell,
    layout_with_withheld_exchange,
    layout_with_withheld_place,
    paired_by_rule,
    places_of,
    problem_text,
    shuffled_tasks,
    training_layout,
    withheld_partner,
    without_number,
)
from simulator.libero import import_libero
from simulator.scripted_expert import REACH
from simulator.suites import bddl_path, make_suite

SCENE = 2  # of the salad dressing, with ketchup, alphabet soup, cream cheese, milk and tomato sauce
SETTINGS = DemoSettings(64, 0.2, "after", 0.02, 0, layouts="shuffled")
LAYOUTS = 150


@pytest.fixture(scope="module")
def suite():
    return make_suite("libero_object")


@pytest.fixture(scope="module")
def tasks(suite):
    return shuffled_tasks(suite, range(10))


@pytest.fixture(scope="module")
def env(suite):
    env = make_env(suite, SCENE, SETTINGS.image_size, SETTINGS.visual_mesh_ratio)
    yield env
    env.close()


@pytest.fixture
def milk(tasks):
    return next(task for task in tasks if (task.scene, task.target) == (SCENE, "milk_1"))


def problem(suite, task_id: int) -> dict:
    import_libero()
    from libero.libero.envs.bddl_utils import robosuite_parse_problem

    return robosuite_parse_problem(str(bddl_path(suite, task_id)))


def places_in(suite, task_id: int) -> dict[str, str]:
    """Object -> the region that the BDDL file puts it in."""
    return {without_number(name): region for _, name, region in problem(suite, task_id)["initial_state"]}


def place_at(env: LiberoEnv, xy: np.ndarray) -> tuple[float, float]:
    """Of the six places the one within whose square xy (2,) lies."""
    (place,) = (place for place in WITHHELD_CELLS if np.abs(xy - place).max() <= MOVED_BY)
    return place


# What is kept for evaluation


def test_withheld_pairs_follow_their_rule_and_begin_with_what_libero_pro_exchanges(suite):
    swapped = make_suite("libero_object_swap")
    ids = {swapped.get_task(task_id).name: task_id for task_id in range(swapped.n_tasks)}
    found = {}
    for scene in range(suite.n_tasks):
        own = without_number(problem(suite, scene)["obj_of_interest"][0])
        before, after = places_in(suite, scene), places_in(swapped, ids[suite.get_task(scene).name])
        exchanged = tuple(name for name in before if before[name] != after[name])
        assert len(exchanged) == 2
        found[own] = paired_by_rule(own, before.keys() - {"basket"}, exchanged)
        assert sorted(name for pair in found[own] for name in pair) == sorted(before.keys() - {"basket"})
    assert found == WITHHELD_PAIRS


def test_withheld_cells_follow_their_rule(env):
    assert {place: cell_by_rule(place) for place in WITHHELD_CELLS} == WITHHELD_CELLS
    assert {places_of(env)[name] for name in graspable(env)} == set(WITHHELD_CELLS)


def test_no_training_layout_shows_what_is_withheld_and_all_else_occurs(env):
    places, rng, seen = places_of(env), np.random.default_rng(0), set()
    env.reset(seed=0)
    for _ in range(LAYOUTS):
        layout = training_layout(env, rng)
        for name in graspable(env):
            place = place_at(env, layout[name])
            assert place != places[withheld_partner(env, name)]
            assert not in_withheld_cell(place, layout[name])
            assert np.linalg.norm(layout[name] - env.domain.robots[0].base_pos[:2]) < REACH
            seen.add((name, place))
        assert len({place_at(env, layout[name]) for name in graspable(env)}) == 6
        assert np.abs(layout["basket_1"] - places["basket_1"]).max() <= MOVED_BY
    assert len(seen) == 6 * 5  # each object at every place but that of its partner


def test_each_object_is_moved_by_itself(env):
    rng, moves = np.random.default_rng(1), {}
    env.reset(seed=0)
    for _ in range(LAYOUTS):
        for name, xy in training_layout(env, rng).items():
            home = places_of(env)[name] if name == "basket_1" else place_at(env, xy)
            moves.setdefault(name, []).append(xy - home)
    moves = np.array([moves[name] for name in sorted(moves)])  # (7, LAYOUTS, 2)
    assert (moves.std(axis=1) > 0.02).all()  # 0.029 if uniform
    correlation = np.corrcoef(moves.transpose(0, 2, 1).reshape(14, LAYOUTS))
    assert np.abs(correlation - np.eye(14)).max() < 0.45  # 5.5 standard errors


@pytest.mark.parametrize("draw", [training_layout, layout_with_withheld_exchange, layout_with_withheld_place])
def test_no_two_objects_touch_at_the_start(env, draw):
    rng = np.random.default_rng(2)
    model = env.sim.model
    objects = {env.domain.obj_body_id[name] for name in env.domain.objects_dict}
    for _ in range(20):
        env.reset(seed=0)
        arguments = () if draw is training_layout else (graspable(env)[rng.integers(6)],)
        layout = draw(env, rng, *arguments)
        env.place_objects(layout)
        for name, xy in layout.items():
            np.testing.assert_allclose(env.sim.data.body_xpos[env.domain.obj_body_id[name]][:2], xy, atol=1e-9)
        for contact in env.sim.data.contact[: env.sim.data.ncon]:
            touching = {model.body_rootid[model.geom_bodyid[geom]] for geom in (contact.geom1, contact.geom2)}
            assert len(touching & objects) < 2


def test_evaluation_draws_the_withheld_exchange_and_nothing_else(env):
    rng, places = np.random.default_rng(3), places_of(env)
    env.reset(seed=0)
    for target in graspable(env):
        layout, partner = layout_with_withheld_exchange(env, rng, target), withheld_partner(env, target)
        assert withheld_partner(env, partner) == target
        expected = places | {target: places[partner], partner: places[target]}
        for name in graspable(env):
            assert place_at(env, layout[name]) == expected[name]
            assert not in_withheld_cell(expected[name], layout[name])


def test_evaluation_puts_the_object_asked_for_into_a_withheld_place_alone(env):
    rng, places = np.random.default_rng(4), places_of(env)
    env.reset(seed=0)
    for target in graspable(env):
        layout = layout_with_withheld_place(env, rng, target)
        for name in graspable(env):
            place = place_at(env, layout[name])
            assert place != places[withheld_partner(env, name)]
            assert in_withheld_cell(place, layout[name]) == (name == target)


# Who is asked for


@pytest.mark.parametrize("layouts", ["libero", "shuffled", "withheld_exchange", "withheld_place"])
def test_an_episode_begins_in_the_layout_that_was_asked_for(env, tmp_path, layouts):
    places = places_of(env)
    rollouts = Rollouts("libero_object", 64, 0.2, 1, 0.0, False, "none", tmp_path, layouts)
    found = []

    def stand_still(_obs):
        at = env.sim.data.body_xpos
        found.append({name: at[env.domain.obj_body_id[name]][:2].copy() for name in places})
        return STAND_STILL[None]

    for _ in range(2):
        play_episode(env, Episode("libero_object", SCENE, 0, 7), None, rollouts, stand_still)
    assert found[0].keys() == found[1].keys() and all((found[0][name] == found[1][name]).all() for name in places)
    target, partner = env.target, withheld_partner(env, env.target)
    near = {name: min(places, key=lambda place: np.linalg.norm(found[0][name] - places[place])) for name in places}
    exchanged = {"libero": {}, "withheld_exchange": {target: partner, partner: target}}
    if layouts in exchanged:
        assert near == {name: name for name in places} | exchanged[layouts]
    else:
        assert near[target] != partner and sum(name != place for name, place in near.items()) > 1
        own = places[near[target]]
        withheld = layouts == "withheld_place"
        assert in_withheld_cell(own, found[0][target]) == withheld


def test_the_object_asked_for_is_the_one_that_success_looks_at(env):
    for asked in graspable(env):
        env.reset(seed=0)
        env.ask_for(asked)
        assert env.domain.obj_of_interest == [asked, "basket_1"]
        assert not env.check_success()
        for name in graspable(env):
            env.reset(seed=0)
            env.place_objects({name: env.sim.data.body_xpos[env.domain.obj_body_id["basket_1"]][:2]})
            joint = env.domain.objects_dict[name].joints[-1]
            pose = env.sim.data.get_joint_qpos(joint).copy()
            pose[2] = env.sim.data.get_site_xpos("basket_1_contain_region")[2]
            env.sim.data.set_joint_qpos(joint, pose)
            env.sim.forward()
            assert env.check_success() == (name == asked)


def test_what_the_scene_does_not_hold_cannot_be_asked_for(env):
    with pytest.raises(BadInput, match="butter_1 cannot be asked for in the scene of pick_up_the_salad_dressing"):
        env.ask_for("butter_1")


def test_every_object_is_asked_for_in_each_scene_that_holds_it(suite, tasks):
    pairs = {
        (scene, name)
        for scene in range(suite.n_tasks)
        for names in problem(suite, scene)["objects"].values()
        for name in names
        if name != "basket_1"
    }
    assert len(tasks) == len(pairs) and {(task.scene, task.target) for task in tasks} == pairs
    assert len({task.name for task in tasks}) == len(tasks)


def test_name_problem_info_and_bddl_text_agree(suite, tasks, tmp_path):
    import_libero()
    from libero.libero.envs.bddl_utils import robosuite_parse_problem

    for task in tasks:
        words = without_number(task.target).replace("_", " ")
        attributes = libero_attributes(suite, task.scene, 64, task)
        with h5py.File(tmp_path / "attributes.hdf5", "w") as file:
            data = file.create_group("data")
            data.attrs.update(attributes)
            told = task_instruction(Path(f"{task.name}_demo.hdf5"), data)
            for name in ("problem_info", "bddl_file_content", "bddl_file_name"):  # each says it by itself
                del data.attrs[name]
            for name in ("problem_info", "bddl_file_content", "bddl_file_name"):
                data.attrs[name] = attributes[name]
                assert canonical_instruction(task_instruction(Path("any.hdf5"), data)) == told
                del data.attrs[name]
        assert told == f"pick up the {words} and place it in the basket"
        assert task.name == f"OBJECT_SCENE{task.scene + 1}_{told.replace(' ', '_')}"
        (tmp_path / "task.bddl").write_text(attributes["bddl_file_content"])
        asked, own = robosuite_parse_problem(str(tmp_path / "task.bddl")), problem(suite, task.scene)
        assert asked["obj_of_interest"] == [task.target, "basket_1"]
        assert asked["goal_state"] == [["in", task.target, "basket_1_contain_region"]]
        changed = {"obj_of_interest", "goal_state", "language_instruction"}
        for key in own.keys() - changed:
            assert asked[key] == own[key], key


def test_a_scenes_own_object_leaves_its_text_as_it_is(suite, tasks):
    for task in tasks:
        if task.rank == 0:
            text = bddl_path(suite, task.scene).read_text()
            assert problem_text(text, task.target) == text


# Demonstrations


@pytest.mark.parametrize("asked_for", [[6], [0, 6], range(10)])
def test_demos_of_an_instruction_are_spread_over_its_scenes_whichever_others_are_collected(suite, tasks, asked_for):
    for task in shuffled_tasks(suite, asked_for):
        assert task in tasks
    for wanted in range(1, 60):
        shares: dict[str, list[int]] = {}
        for task in tasks:
            shares.setdefault(task.target, []).append(task.share_of(wanted))
        for of_scenes in shares.values():
            assert sum(of_scenes) == wanted
            used = [share for share in of_scenes if share]
            assert max(used) - min(used) <= 1 and (min(used) >= 2 or wanted == 1)
            assert len(used) == 6 or wanted < 12


def test_missed_grasps_are_spread_over_all_scenes_of_an_instruction(tasks):
    butter = [task for task in tasks if task.target == "butter_1"]
    for share in (0.4, 0.5, 0.25, 1 / 3, 0.0, 1.0):
        chosen = np.array(
            [[begins_after_a_miss(attempt, share, task.rank / task.scenes) for attempt in range(12)] for task in butter]
        )
        assert (abs(chosen.sum(axis=1) - 12 * share) < 1).all()  # no scene has all of them, and none has none
        assert abs(chosen[:, :2].sum() - 12 * share) <= 2


def start(env: LiberoEnv, *entropy: int) -> np.ndarray:
    expert_at_start(env, np.random.default_rng(entropy), SETTINGS, shuffled=True)
    return env.state()


def test_a_demo_depends_on_seed_scene_object_and_attempt_alone(env, milk, monkeypatch):
    first = demonstrate(env, SCENE, 0, SETTINGS, milk)
    env.ask_for("ketchup_1")
    start(env, 5)
    again = demonstrate(env, SCENE, 0, SETTINGS, milk)
    np.testing.assert_array_equal(first.actions, again.actions)
    np.testing.assert_array_equal(first.states, again.states)
    monkeypatch.setattr(demonstrator, "LONGEST_DEMO", 1)
    monkeypatch.setattr(demonstrator, "SHORTEST_DEMO", 0)
    monkeypatch.setattr(demonstrator, "SUCCESS_STEPS", 0)  # what is left of a demo is its first state
    other = demonstrate(env, SCENE, 1, SETTINGS, milk)
    assert not np.array_equal(first.states[0], other.states[0])


def test_a_layout_whose_target_fell_over_is_no_attempt_and_is_counted(env, milk, monkeypatch, tmp_path):
    placed, place = [], LiberoEnv.place_objects

    def place_the_first_lying(self, layout):
        place(self, layout)
        placed.append(layout)
        if len(placed) == 1:
            joint = self.domain.objects_dict["milk_1"].joints[-1]
            pose = self.sim.data.get_joint_qpos(joint).copy()
            pose[2] += 0.05
            self.sim.data.set_joint_qpos(joint, pose)
            velocity = np.zeros(6)
            velocity[3:] = 12.0  # rad/s: it tumbles while the others settle
            self.sim.data.set_joint_qvel(joint, velocity)
            self.sim.forward()

    monkeypatch.setattr(LiberoEnv, "place_objects", place_the_first_lying)
    monkeypatch.setattr(LiberoEnv, "add_start_noise", lambda *arguments: None)  # it would stop all motion
    monkeypatch.setattr(Demonstrator, "env", env)
    monkeypatch.setattr(Demonstrator, "task_id", SCENE)
    monkeypatch.setattr(demonstrator, "LONGEST_DEMO", 3)  # the expert has no time to succeed
    outcome = Demonstrator.attempt(SCENE, 0, SETTINGS, tmp_path / "attempt_00000.hdf5", milk)
    assert outcome == Outcome(0, "", ["the target fell over"])
    assert len(placed) == 2 and not (placed[0]["milk_1"] == placed[1]["milk_1"]).all()


def test_files_of_liberos_layouts_are_what_they_were_and_are_not_mixed_with_shuffled_ones(tmp_path):
    libero = DemoSettings(64, 0.2, "after", 0.02, 0)
    assert "layouts" not in json.loads(settings_text(libero))
    with h5py.File(tmp_path / "demos.hdf5", "w") as file:
        file.attrs["collector"] = settings_text(libero)
        check_settings(tmp_path, file, libero)
        with pytest.raises(BadInput, match="was collected with layouts libero, not shuffled"):
            check_settings(tmp_path, file, SETTINGS)
        file.attrs["collector"] = settings_text(SETTINGS)
        check_settings(tmp_path, file, SETTINGS)
        with pytest.raises(BadInput, match="was collected with layouts shuffled, not libero"):
            check_settings(tmp_path, file, libero)


# The command


@pytest.fixture(scope="module")
def collected(tmp_path_factory):
    """A folder with two files, of two scenes and one instruction, and what the command said."""
    folder = tmp_path_factory.mktemp("shuffled")
    command = [
        sys.executable, ROOT / "collect_demos.py", "--config", ROOT / "conf/config.yaml", "--data_directory", folder,
        "--layouts", "shuffled", "--tasks", "6", "--demos_per_task", "4", "--num_workers", "2", "--image_size", "64",
        "--visual_mesh_ratio", "0.2",
    ]  # fmt: skip
    return folder, subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.PIPE, text=True).stdout


def test_the_loader_takes_the_files_of_several_scenes_as_one_instruction(collected):
    folder, said = collected
    words = "pick_up_the_butter_and_place_it_in_the_basket"
    paths = sorted(folder.iterdir())
    assert [path.name for path in paths] == [f"OBJECT_SCENE{i}_{words}_demo.hdf5" for i in (7, 8)]
    assert all(path.stem.removesuffix("_demo") in said for path in paths)
    data = load_config("conf/config.yaml", [f"data.data_directory={folder}"]).data
    demos, _ = load_demos(data, min_actions=10)
    assert [demo.task for demo in demos] == 4 * [words.replace("_", " ")]
    train, held_out = split_demos(demos, 0.9, seed=0)
    assert len(train) == len(held_out) == 2  # of each scene one
    assert all(torch.isfinite(demo.actions).all() for demo in demos)


def test_a_demo_of_a_file_is_solved_by_its_own_actions(collected, suite, tasks):
    """The file's own BDDL text decides, and its states set the scene."""
    folder, _ = collected
    path = folder / "OBJECT_SCENE8_pick_up_the_butter_and_place_it_in_the_basket_demo.hdf5"
    _, actions = read_demo(path, "demo_0")
    with h5py.File(path) as file:
        bddl, states = file["data"].attrs["bddl_file_content"], file["data/demo_0/states"][:]
        attempt = int(file["data/demo_0"].attrs["attempt"])
    scene_file = folder.parent / "asked.bddl"
    scene_file.write_text(bddl)
    env = LiberoEnv(scene_file, 64, 0.2)
    try:
        env.reset(seed=0)
        env.set_init_state(states[0])
        solved = [env.step(action) for action in actions]
        assert solved[-1] and not any(solved[: len(actions) // 2])
    finally:
        env.close()
    task = next(task for task in tasks if (task.scene, task.target) == (7, "butter_1"))
    env = make_env(suite, 7, 64, 0.2)
    try:
        demo = demonstrate(env, 7, attempt, SETTINGS, task)
        np.testing.assert_array_equal(demo.actions, actions)
        np.testing.assert_array_equal(demo.states, states)
    finally:
        env.close()


def test_shifting_the_target_of_a_shuffled_layout_is_refused(tmp_path):
    refused = run(
        "collect_demos.py", "--config", "conf/config.yaml", "--data_directory", tmp_path, "--layouts", "shuffled",
        "--shift_target", 0.05, expect=2,
    )  # fmt: skip
    assert re.fullmatch(
        r"error: --shift_target 0\.05: expected 0, shuffled layouts move every object already\n", refused.stderr
    )
    assert list(tmp_path.iterdir()) == []
