"""Demonstrations on disk: alignment, samples, split, language, and every way in which files were seen broken."""

import itertools
import json
import os
import re
import shutil
import threading
import time

import h5py
import numpy as np
import pytest
import torch
from broken_demos import BROKEN, replace
from helpers import CPU, INSTRUCTION, LANGUAGE, batches_of, data_config, load, samples_of
from libero_files import TASK, write_task_file

from dataloader import Batches, LowDimensional, chunk_rows, shift_pictures, transition_rows
from demos.frames import DeviceFrames, open_frames
from demos.hdf5 import drawn_rows, find_task_files, numbered_alone, split_demos
from demos.instructions import canonical_instruction, same_task, task_instruction
from demos.language import EMBEDDINGS_FILE, LanguageTable, embeddings_files, load_language
from errors import BadInput
from simulator.suites import bddl_path, make_suite

BUTTER = "pick_up_the_butter_and_place_it_in_the_basket"


# ------------------------------------------------------------------------------------------------------- alignment


@pytest.mark.parametrize("recorded", ["before", "after"])
def test_alignment_is_found_out_from_the_simulator_states(tmp_path, recorded):
    write_task_file(tmp_path, alignment=recorded)
    demos, observation = load(tmp_path)
    assert observation["obs_alignment"] == recorded
    assert {demo.lag for demo in demos} == {1 if recorded == "after" else 0}


def test_alignment_can_be_forced(tmp_path):
    write_task_file(tmp_path, alignment="after")
    assert load(tmp_path, "data.obs_alignment=before")[1]["obs_alignment"] == "before"


def test_files_that_disagree_about_the_alignment_are_refused(tmp_path):
    write_task_file(tmp_path, alignment="after")
    write_task_file(tmp_path, task=BUTTER, alignment="before")
    with pytest.raises(BadInput, match=r"obs_alignment is after, but pick_up_the_butter.* has before"):
        load(tmp_path)


def test_demos_of_one_file_that_disagree_about_the_alignment_are_named(tmp_path):
    path = write_task_file(tmp_path, demos=6)
    other = write_task_file(tmp_path, task=BUTTER, demos=6, alignment="before")
    with h5py.File(path, "a") as file, h5py.File(other) as source:
        for key in ("demo_2", "demo_4"):
            del file["data"][key]
            source.copy(f"data/{key}", file["data"])
    other.unlink()
    sentence = (
        rf"{path}: obs\[t\] was recorded before actions\[t\] in demo_2, demo_4, but after it in the other 4 demos"
    )
    with pytest.raises(BadInput, match=sentence):
        load(tmp_path)


def test_undecidable_alignment_asks_for_the_setting(tmp_path):
    path = write_task_file(tmp_path)
    with h5py.File(path, "a") as file:
        for demo in file["data"].values():
            del demo["states"]
    with pytest.raises(BadInput, match=r"key states is missing.*set data\.obs_alignment"):
        load(tmp_path)
    assert load(tmp_path, "data.obs_alignment=after")[0]


# --------------------------------------------------------------------------------------------------------- samples


@pytest.mark.parametrize("recorded, lag", [("before", 0), ("after", 1)])
def test_a_chunk_starts_with_the_action_that_follows_its_observation(tmp_path, recorded, lag):
    path = write_task_file(tmp_path, alignment=recorded, steps=30, demos=2)
    demos, _ = load(tmp_path)
    samples = samples_of(batches_of(demos, chunk_rows(demos, 10), 10))
    assert len(samples) == 2 * (30 - lag - 10 + 1)
    with h5py.File(path) as file:
        demo = file["data/demo_1"]
        sample = samples[len(samples) // 2 + 3]  # step 3 of the second demo
        np.testing.assert_array_equal(sample["obs"]["agentview_rgb"], demo["obs/agentview_rgb"][3])
        np.testing.assert_array_equal(sample["actions"], demo["actions"][3 + lag : 13 + lag].astype(np.float32))
        np.testing.assert_array_equal(samples[-1]["actions"], demo["actions"][-10:].astype(np.float32))


@pytest.mark.parametrize("recorded, lag", [("before", 0), ("after", 1)])
@pytest.mark.parametrize("gap", [1, 5])
def test_a_transition_holds_the_actions_between_its_two_observations(tmp_path, recorded, lag, gap):
    path = write_task_file(tmp_path, alignment=recorded, demos=2)
    demos, _ = load(tmp_path)
    samples = samples_of(batches_of(demos, transition_rows(demos, gap), gap, gap=gap))
    assert len(samples) == 2 * (30 - gap)
    with h5py.File(path) as file:
        demo = file["data/demo_1"]
        sample = samples[30 - gap + 7]
        for name, t in (("obs", 7), ("next_obs", 7 + gap)):
            for key in ("eye_in_hand_rgb", "joint_states", "gripper_states"):
                expected = demo[f"obs/{key}"][t]
                np.testing.assert_array_equal(sample[name][key], expected.astype(sample[name][key].numpy().dtype))
        np.testing.assert_array_equal(sample["actions"], demo["actions"][7 + lag : 7 + gap + lag].astype(np.float32))


@pytest.mark.parametrize("recorded, lag", [("before", 0), ("after", 1)])
@pytest.mark.parametrize("frames", ["read by a thread", "on the device"])
def test_a_batch_holds_its_two_frames_and_all_the_actions_between(tmp_path, recorded, lag, frames):
    gap, batch_size = 4, 5
    path = write_task_file(tmp_path, alignment=recorded, demos=2)
    demos, _ = load(tmp_path)
    rows = transition_rows(demos, gap)
    options = {"gap": gap, "batch_size": batch_size}
    if frames == "on the device":
        options["frames"] = DeviceFrames(open_frames(demos, data_config(tmp_path, "data.cache=ram"), 32, CPU), CPU)
    with h5py.File(path) as file:
        in_file = {
            key: np.concatenate([file["data"][demo.key][key] for demo in demos])
            for key in ("actions", *(f"obs/{name}" for name in file["data/demo_0/obs"]))
        }
    batches = list(copied(batches_of(demos, rows, gap, **options)))
    assert [len(batch["actions"]) for batch in batches] == [5] * 10 + [2]  # 2 x (30 - 4)
    for batch, starts in zip(batches, rows.split(batch_size), strict=True):
        for name, seen in (("obs", starts), ("next_obs", starts + gap)):
            for key in ("agentview_rgb", "eye_in_hand_rgb", "joint_states", "gripper_states"):
                found = batch[name][key].numpy()
                np.testing.assert_array_equal(found, in_file[f"obs/{key}"][seen].astype(found.dtype), f"{name} {key}")
            assert torch.equal(batch[name]["language"], LANGUAGE[INSTRUCTION].expand(len(seen), -1))
        for start, actions in zip(starts, batch["actions"], strict=True):
            expected = in_file["actions"][start + lag : start + lag + gap]
            np.testing.assert_array_equal(actions, expected.astype(np.float32))


IN_UNITS = {  # of a demo's obs: the robot state as a model reads it
    "joints": lambda obs: [obs["joint_states"], obs["gripper_states"][()] / 0.04],
    "end_effector": lambda obs: [obs["ee_pos"][()] / 0.1, obs["ee_ori"], obs["gripper_states"][()] / 0.04],
}


@pytest.mark.parametrize(
    "recorded, robot_state", [("before", "joints"), ("after", "joints"), ("after", "end_effector")]
)
def test_the_robots_future_is_read_from_its_own_demo_and_ends_with_it(tmp_path, recorded, robot_state):
    path = write_task_file(tmp_path, alignment=recorded, demos=2)
    demos, _ = load(tmp_path, f"data.robot_state={robot_state}")
    rows = transition_rows(demos, 6)
    batches = batches_of(demos, rows, 6, gap=6, ahead=(0, 2, 20), batch_size=len(rows))
    (batch,) = copied(batches)
    with h5py.File(path) as file:
        obs = [file["data"][demo.key]["obs"] for demo in demos]
        states = [np.concatenate(IN_UNITS[robot_state](one), axis=1).astype(np.float32) for one in obs]
    contexts = [(number, t) for number, demo in enumerate(demos) for t in range(len(demo) - 6)]
    assert batch["robot_ahead"].shape == (len(contexts), 3, 9 if robot_state == "joints" else 8)
    for (number, t), ahead in zip(contexts, batch["robot_ahead"], strict=True):
        expected = [states[number][min(t + frames, len(states[number]) - 1)] for frames in (0, 2, 20)]
        np.testing.assert_allclose(ahead, np.stack(expected), rtol=1e-6)


def copied(batches: Batches):
    """The batches as they come, each with memory of its own."""
    for batch in batches:
        yield {
            key: value.clone() if isinstance(value, torch.Tensor) else {name: v.clone() for name, v in value.items()}
            for key, value in batch.items()
        }


def test_a_transition_never_crosses_the_end_of_a_demo(tmp_path):
    write_task_file(tmp_path, demos=2, steps=15)
    write_task_file(tmp_path, task=BUTTER, demos=1, steps=13)
    demos, _ = load(tmp_path)
    demo_of_row = [number for number, demo in enumerate(demos) for _ in range(len(demo))]
    for reach in (1, 4, 12):
        inside = [row for row in range(len(demo_of_row) - reach) if demo_of_row[row] == demo_of_row[row + reach]]
        assert transition_rows(demos, reach).tolist() == inside != []


def test_an_observation_is_uint8_pictures_float32_state_and_language(tmp_path):
    write_task_file(tmp_path, image_size=48)
    demos, _ = load(tmp_path)
    obs = samples_of(batches_of(demos, drawn_rows(demos), 0))[5]["obs"]
    assert {name: (value.dtype, tuple(value.shape)) for name, value in obs.items()} == {
        "agentview_rgb": (torch.uint8, (48, 48, 3)),
        "eye_in_hand_rgb": (torch.uint8, (48, 48, 3)),
        "joint_states": (torch.float32, (7,)),
        "gripper_states": (torch.float32, (2,)),
        "language": (torch.float32, (512,)),
    }


@pytest.mark.parametrize("recorded", ["before", "after"])
def test_stored_states_meet_the_chunks_of_their_own_frames(tmp_path, recorded):
    write_task_file(tmp_path, alignment=recorded)
    demos, _ = load(tmp_path)
    states = torch.cat([demo.robot_state["joint_states"] for demo in demos])  # the joints stand for z
    rows = chunk_rows(demos[1:], 10)
    with_obs, with_states = (samples_of(batches_of(demos, rows, 10, **kind)) for kind in ({}, {"states": states}))
    assert len(with_obs) == len(with_states) > 0
    for seen, stored in zip(with_obs, with_states, strict=True):
        assert torch.equal(seen["obs"]["joint_states"], stored["z_t"])
        assert torch.equal(seen["actions"], stored["actions"])


def test_some_demos_can_be_numbered_alone(tmp_path):
    write_task_file(tmp_path, demos=4)
    demos, _ = load(tmp_path)
    alone = numbered_alone([demos[3], demos[1]])
    samples = samples_of(batches_of(alone, drawn_rows(alone), 0))
    assert len(samples) == 60
    assert torch.equal(samples[35]["obs"]["joint_states"], demos[1].robot_state["joint_states"][5])


def test_an_epoch_is_a_seeded_permutation_and_drops_only_the_incomplete_batch(tmp_path):
    write_task_file(tmp_path)
    demos, _ = load(tmp_path)
    states = torch.arange(90.0)[:, None]  # a row's z is its number
    batches = batches_of(demos, drawn_rows(demos)[:70], 0, seed=3, states=states)
    epochs = []
    for epoch in (0, 1, 0):
        batches.set_epoch(epoch)
        epochs.append(torch.cat([batch["z_t"].flatten() for batch in batches]))
    assert len(epochs[0]) == 64 == len(epochs[0].unique())
    assert torch.equal(epochs[0], epochs[2]) and not torch.equal(epochs[0], epochs[1])


def test_no_epoch_of_one_seed_has_the_order_of_another_seeds_epoch(tmp_path):
    write_task_file(tmp_path)
    demos, _ = load(tmp_path)
    states = torch.arange(90.0)[:, None]
    orders = []
    for seed in (0, 1, 20250101123045):
        batches = batches_of(demos, drawn_rows(demos), 0, seed=seed, states=states)
        for epoch in range(3):
            batches.set_epoch(epoch)
            orders.append(tuple(torch.cat([batch["z_t"].flatten() for batch in batches]).tolist()))
    assert len(set(orders)) == 9


def test_a_batch_is_what_its_ranks_get_together(tmp_path):
    write_task_file(tmp_path)
    demos, _ = load(tmp_path)
    states = torch.arange(90.0)[:, None]
    alone = batches_of(demos, drawn_rows(demos), 0, seed=0, states=states, batch_size=16)
    shares = [batches_of(demos, drawn_rows(demos), 0, seed=0, states=states, batch_size=8) for _ in range(2)]
    for rank, share in enumerate(shares):
        share.order.rank, share.order.ranks = rank, 2
    for joint, first, second in zip(alone, *shares, strict=True):
        assert set(joint["z_t"].flatten().tolist()) == set(torch.cat([first["z_t"], second["z_t"]]).flatten().tolist())


def test_demos_too_short_for_one_sample_are_refused_in_training_and_in_validation(tmp_path):
    write_task_file(tmp_path, alignment="before", steps=12)
    demos, _ = load(tmp_path)
    for seed in (0, None):
        with pytest.raises(BadInput, match="too short for a single sample"):
            batches_of(demos, transition_rows(demos, 12), 12, gap=12, seed=seed)


def test_reading_ahead_never_overwrites_the_batch_in_use(tmp_path):
    write_task_file(tmp_path, demos=6)
    demos, _ = load(tmp_path)
    batches = batches_of(demos, transition_rows(demos, 1), 1, gap=1, seed=0, batch_size=4)
    with h5py.File(demos[0].path) as file:
        frames = np.concatenate([file["data"][demo.key]["obs/agentview_rgb"] for demo in demos])
    joints = torch.cat([demo.robot_state["joint_states"] for demo in demos])
    for _ in range(2):  # the second epoch finds the buffers of the first
        for batch in batches:
            time.sleep(0.002)  # the reader fills whatever it may
            for i, joint_states in enumerate(batch["obs"]["joint_states"]):
                (row,) = (joints == joint_states).all(dim=1).nonzero()
                np.testing.assert_array_equal(batch["obs"]["agentview_rgb"][i], frames[row])
                np.testing.assert_array_equal(batch["next_obs"]["agentview_rgb"][i], frames[row + 1])


def test_an_epoch_that_is_left_early_leaves_no_thread_behind(tmp_path):
    write_task_file(tmp_path)
    demos, _ = load(tmp_path)
    before = threading.active_count()
    for _ in batches_of(demos, drawn_rows(demos), 0, batch_size=2):
        break
    assert threading.active_count() == before


def test_a_failing_read_is_raised_where_the_batch_is_awaited(tmp_path):
    path = write_task_file(tmp_path)
    demos, _ = load(tmp_path)
    with h5py.File(path, "a") as file:
        del file["data/demo_2/obs/agentview_rgb"]
    with pytest.raises(BadInput, match=r"demo_2: .*agentview_rgb"):
        list(batches_of(demos, drawn_rows(demos), 0))


def test_a_shift_moves_both_cameras_of_both_frames_of_a_sample_alike():
    torch.manual_seed(0)
    ramp = torch.arange(10, 42, dtype=torch.uint8).expand(64, 3, 32, 32).permute(0, 2, 3, 1)  # by column
    pictures = {"agentview_rgb": ramp, "eye_in_hand_rgb": ramp.transpose(1, 2)}
    batch = {"obs": pictures, "next_obs": pictures, "actions": torch.zeros(64, 1, 7)}
    shifted = shift_pictures(batch, 8, image_size=64)  # 8 of the model's pixels are 4 of these
    columns = shifted["obs"]["agentview_rgb"][:, 0, 16, 0].int() - 26  # shift of each sample along one side
    rows = shifted["obs"]["eye_in_hand_rgb"][:, 16, 0, 0].int() - 26
    assert set(columns.tolist()) == set(rows.tolist()) == set(range(-4, 5))
    for i, column in enumerate(columns.tolist()):
        expected = (torch.arange(32) + column).clamp(0, 31) + 10
        for name in ("obs", "next_obs"):
            assert torch.equal(shifted[name]["agentview_rgb"][i, 5, :, 1].long(), expected)
    assert torch.equal(shifted["obs"]["eye_in_hand_rgb"], shifted["next_obs"]["eye_in_hand_rgb"])


def test_openvlas_regenerated_files_are_read(tmp_path):
    write_task_file(tmp_path, alignment="before", official=False, image_size=64)
    demos, observation = load(tmp_path)
    assert [demo.key for demo in demos] == ["demo_1", "demo_3", "demo_5"]  # gaps in the numbers
    assert observation["obs_alignment"] == "before"
    assert observation["image_size"] == 64
    assert demos[0].task == INSTRUCTION


def test_demos_are_taken_in_the_order_of_their_numbers(tmp_path):
    write_task_file(tmp_path, demos=12)
    assert [demo.key for demo in load(tmp_path, "data.demos_per_task=11")[0]] == [f"demo_{i}" for i in range(11)]


# ----------------------------------------------------------------------------------------------- split and language


def test_split_is_by_demo_seeded_and_complete(tmp_path):
    write_task_file(tmp_path, demos=10)
    demos, _ = load(tmp_path)
    train, held_out = split_demos(demos, 0.8, seed=0)
    assert (len(train), len(held_out)) == (8, 2)
    assert {demo.name for demo in train} | {demo.name for demo in held_out} == {demo.name for demo in demos}
    assert not {demo.name for demo in train} & {demo.name for demo in held_out}
    assert [demo.name for demo in split_demos(demos, 0.8, seed=0)[1]] == [demo.name for demo in held_out]
    others = {tuple(demo.name for demo in split_demos(demos, 0.8, seed=seed)[1]) for seed in range(5)}
    assert len(others) > 1


def test_the_demos_held_out_have_other_numbers_in_every_task(tmp_path):
    for task in (TASK, BUTTER, TASK.replace("milk", "ketchup")):
        write_task_file(tmp_path, task=task, demos=10, steps=12)
    held_out = split_demos(load(tmp_path)[0], 0.7, seed=0)[1]
    keys = {path: tuple(demo.key for demo in held_out if demo.path == path) for path in {d.path for d in held_out}}
    assert len(keys) == 3 == len(set(keys.values()))


def test_a_split_that_a_checkpoint_lists_is_kept_and_other_files_take_the_rule(tmp_path):
    for task in (TASK, BUTTER):
        write_task_file(tmp_path, task=task, demos=5, steps=12)
    demos, _ = load(tmp_path)
    by_rule = {demo.name for demo in split_demos(demos, 0.8, seed=0)[1]}
    listed = [f"{TASK}_demo.hdf5/demo_{number}" for number in (0, 3)] + ["gone_demo.hdf5/demo_0"]
    train, held_out = split_demos(demos, 0.8, 0, listed)
    assert {demo.name for demo in held_out if demo.path.stem.startswith(TASK)} == set(listed[:2])
    assert {demo.name for demo in held_out if demo.path.stem.startswith(BUTTER)} == {
        name for name in by_rule if name.startswith(BUTTER)
    }
    assert len(train) + len(held_out) == 10
    with pytest.raises(BadInput, match="the checkpoint holds out all 5 demos, expected at least 1 to train on"):
        split_demos(demos, 0.8, 0, [f"{TASK}_demo.hdf5/demo_{number}" for number in range(5)])


def test_one_demo_cannot_be_split(tmp_path):
    write_task_file(tmp_path, demos=1)
    with pytest.raises(BadInput, match="has 1 demo, expected at least 2"):
        split_demos(load(tmp_path)[0], 0.9, seed=0)


@pytest.mark.parametrize(
    "text",
    [
        "pick up the milk and place it in the basket",  # the benchmark
        "Pick the milk and place it in the basket",  # BDDL files and HDF5 attributes
        " Pick up the milk and  place it in the basket.",
        "pick_up_the_milk_and_place_it_in_the_basket",
    ],
)
def test_every_spelling_of_an_instruction_is_one_task(text):
    assert canonical_instruction(text) == INSTRUCTION


def test_scene_prefix_of_libero_100_is_not_part_of_the_instruction(tmp_path):
    path = write_task_file(tmp_path, task="KITCHEN_SCENE10_close_the_top_drawer_of_the_cabinet")
    with h5py.File(path) as file:
        assert task_instruction(path, file["data"]) == "close the top drawer of the cabinet"


def test_a_renamed_file_takes_its_instruction_from_problem_info(tmp_path):
    path = write_task_file(tmp_path).rename(tmp_path / "collected.hdf5")
    with h5py.File(path) as file:
        assert task_instruction(path, file["data"]) == INSTRUCTION


def libero_tasks(name: str):
    """Name and BDDL text of each task of a suite of the installed LIBERO."""
    suite = make_suite(name)
    for task_id in range(suite.n_tasks):
        yield suite.get_task(task_id).name, bddl_path(suite, task_id).read_text()


def write_attributes(path, bddl_file_name: str, bddl: str, info: str | None = None) -> None:
    with h5py.File(path, "a") as file:
        attributes = file["data"].attrs
        attributes["bddl_file_name"], attributes["bddl_file_content"] = bddl_file_name, bddl
        info = info or re.search(r"\(:language\s+([^)]*)\)", bddl).group(1)
        attributes["problem_info"] = json.dumps({"language_instruction": info})


@pytest.mark.parametrize("suite", ["libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90"])
@pytest.mark.simulator
def test_no_task_of_liberos_own_contradicts_itself(tmp_path, suite):
    path = write_task_file(tmp_path, demos=1, steps=2, image_size=2)
    with h5py.File(path, "a") as file:
        attributes = file["data"].attrs
        for name, bddl in libero_tasks(suite):
            language = re.search(r"\(:language\s+([^)]*)\)", bddl).group(1)
            attributes["bddl_file_name"] = f"libero/libero/bddl_files/{suite}/{name}.bddl"
            attributes["bddl_file_content"] = bddl
            attributes["problem_info"] = json.dumps({"language_instruction": language})
            expected = canonical_instruction(re.sub(r"^[A-Z_]*SCENE\d+_", "", name))
            assert task_instruction(tmp_path / f"{name}_demo.hdf5", file["data"]) == expected


@pytest.mark.simulator
def test_liberos_instructions_are_told_apart():
    """Also where the same words stand in another order, or on and in make the difference."""
    told = set()
    for suite in ("libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90"):
        told |= {canonical_instruction(re.sub(r"^[A-Z_]*SCENE\d+_", "", name)) for name, _ in libero_tasks(suite)}
    assert len(told) == 112
    assert not [
        (first, second) for first, second in itertools.combinations(sorted(told), 2) if same_task(first, second)
    ]
    assert not same_task("turn on the stove", "turn off the stove")
    assert not same_task("turn on the stove", "turn on the stove and put the frying pan on it")


@pytest.mark.simulator
def test_a_name_and_an_attribute_that_disagree_are_both_named(tmp_path):
    path = write_task_file(tmp_path)
    path = path.rename(tmp_path / f"{BUTTER}_demo.hdf5")
    sentence = "its name says 'pick up the butter .*', but attribute problem_info 'pick up the milk .*'; rename"
    with pytest.raises(BadInput, match=f"{path}: {sentence}"):
        load(tmp_path)
    name, bddl = next(task for task in libero_tasks("libero_object") if task[0] == BUTTER)
    write_attributes(path, f"/elsewhere/libero_object/{name}.bddl", bddl)
    assert load(tmp_path)[0][0].task == BUTTER.replace("_", " ")
    write_attributes(path, f"/elsewhere/libero_object/{TASK}.bddl", bddl)
    with pytest.raises(BadInput, match="attribute bddl_file_name 'pick up the milk"):
        load(tmp_path)
    write_attributes(path, "/tmp/my_own_7.bddl", bddl)  # what other people call their BDDL files says nothing
    assert load(tmp_path)[0][0].task == BUTTER.replace("_", " ")


@pytest.mark.simulator
def test_a_name_of_another_scene_than_the_bddl_files_is_refused(tmp_path):
    words = "turn_on_the_stove"
    path = write_task_file(tmp_path, task=f"KITCHEN_SCENE3_{words}")
    bddl = "(define (:language turn on the stove))"
    write_attributes(path, f"libero/libero/bddl_files/libero_90/KITCHEN_SCENE3_{words}.bddl", bddl)
    assert load(tmp_path)[0]
    write_attributes(path, f"libero/libero/bddl_files/libero_90/KITCHEN_SCENE9_{words}.bddl", bddl)
    with pytest.raises(BadInput, match=r"KITCHEN_SCENE9_turn_on_the_stove\.bddl, which is of another scene"):
        load(tmp_path)


def test_a_name_with_its_scene_outweighs_problem_info_alone_and_both_are_named(tmp_path, capsys):
    path = write_task_file(tmp_path, task="KITCHEN_SCENE3_turn_on_the_stove")
    with h5py.File(path, "a") as file:
        file["data"].attrs["problem_info"] = json.dumps({"language_instruction": "Pick the butter"})
    assert load(tmp_path)[0][0].task == "turn on the stove"
    said = capsys.readouterr().out
    assert said.count("its name says 'turn on the stove', but attribute problem_info 'pick up the butter'") == 1
    with h5py.File(path, "a") as file:
        file["data"].attrs["bddl_file_content"] = "(define (:language pick the butter))"
    with pytest.raises(BadInput, match="rename the file or correct the attribute"):
        load(tmp_path)


@pytest.mark.parametrize("suite", ["libero_object_task", "libero_object_lan"])
@pytest.mark.simulator
def test_where_libero_pro_varies_the_task_its_bddl_file_speaks(tmp_path, suite):
    name, bddl = next(libero_tasks(suite))
    path = write_task_file(tmp_path, task=name)
    write_attributes(path, f"libero/libero/bddl_files/{suite}/{name}.bddl", bddl)
    expected = canonical_instruction(re.search(r"\(:language\s+([^)]*)\)", bddl).group(1))
    assert not same_task(expected, name)
    assert load(tmp_path)[0][0].task == expected


def test_files_of_one_instruction_stay_tasks_of_their_own(tmp_path):
    for scene in (3, 9):
        write_task_file(tmp_path, task=f"KITCHEN_SCENE{scene}_turn_on_the_stove", demos=2)
    demos, _ = load(tmp_path)
    table = LanguageTable("test encoder", {"turn on the stove": torch.nn.functional.normalize(torch.ones(512), dim=0)})
    low_dimensional = LowDimensional(demos, table, CPU)
    assert low_dimensional.task.tolist() == [0] * 60 + [1] * 60
    obs = low_dimensional.obs(torch.tensor([0, 100]))
    assert torch.equal(obs["language"][0], obs["language"][1])


def write_embeddings(path, texts, vectors):
    np.savez(path, texts=np.array(texts), embeddings=vectors, encoder=np.array("test 1"))


def test_embeddings_are_normalised_when_loaded(tmp_path):
    path = tmp_path / EMBEDDINGS_FILE
    write_embeddings(path, ["Pick the milk and place it in the basket"], np.full((1, 512), 11.0, np.float32))
    table = load_language(path, [INSTRUCTION], 512)
    assert table.encoder == "test 1"
    assert table[INSTRUCTION].norm().item() == pytest.approx(1)


def test_complex_embeddings_are_refused(tmp_path):
    path = tmp_path / EMBEDDINGS_FILE
    write_embeddings(path, [INSTRUCTION], np.full((1, 512), 1 + 1j, np.complex64))
    with pytest.raises(BadInput, match=r"not readable as language embeddings \(vectors are complex64, expected real"):
        load_language(path, [INSTRUCTION], 512)


def test_embeddings_lie_beside_the_demos_or_where_the_config_says(tmp_path):
    assert embeddings_files(data_config(tmp_path)) == [tmp_path / EMBEDDINGS_FILE]
    own = data_config(tmp_path, f"data.language_embeddings={tmp_path}/elsewhere/own.npz")
    assert embeddings_files(own) == [tmp_path / "elsewhere/own.npz"]
    with pytest.raises(BadInput, match=f"run `python embed_language.py --data_directory DIR --output {tmp_path}/else"):
        load_language(embeddings_files(own)[0], [INSTRUCTION], 512)


def test_a_task_without_an_embedding_is_an_error_that_says_what_to_run(tmp_path):
    write_task_file(tmp_path)
    path = tmp_path / EMBEDDINGS_FILE
    advice = f"run `python embed_language.py --data_directory {tmp_path}`"
    with pytest.raises(BadInput, match=rf"language_embeddings\.npz: no language embeddings; {advice}"):
        load_language(path, [INSTRUCTION], 512)
    write_embeddings(path, ["close the drawer"], np.ones((1, 512), np.float32))
    with pytest.raises(BadInput, match=f"no embedding for the task '{INSTRUCTION}'; {advice}"):
        load_language(path, [INSTRUCTION], 512)
    with pytest.raises(BadInput, match="no language embedding for the task 'fly'"):
        load_language(path, ["close the drawer"], 512)["fly"]


@pytest.mark.parametrize(
    "content, sentence",
    [
        (lambda p: p.write_bytes(b""), "not readable as language embeddings"),
        (lambda p: p.write_text("no archive"), "not readable as language embeddings"),
        (lambda p: p.mkdir(), r"cannot be read \(Is a directory\)"),
        (lambda p: np.save(p.open("wb"), np.ones(3)), "not readable as language embeddings"),
        (lambda p: write_embeddings(p, [INSTRUCTION], np.array([["x"] * 512])), "not readable as language embeddings"),
        (lambda p: write_embeddings(p, [INSTRUCTION], np.ones((1, 384))), r"are \(1, 384\), expected \(1, 512\)"),
        (lambda p: write_embeddings(p, [INSTRUCTION], np.zeros((1, 512))), "is zero or not finite"),
        (lambda p: write_embeddings(p, [INSTRUCTION], np.full((1, 512), np.nan)), "is zero or not finite"),
        (
            lambda p: write_embeddings(p, [INSTRUCTION, INSTRUCTION.upper()], np.eye(2, 512)),
            f"two embeddings of '{INSTRUCTION}'",
        ),
    ],
)
def test_broken_embeddings_are_one_sentence(tmp_path, content, sentence):
    path = tmp_path / EMBEDDINGS_FILE
    content(path)
    with pytest.raises(BadInput, match=f"{path}: .*{sentence}"):
        load_language(path, [INSTRUCTION], 512)


# --------------------------------------------------------------------------------------------------- broken files


@pytest.mark.parametrize("damage", BROKEN)
def test_a_broken_demo_is_named_with_what_was_found_and_expected(tmp_path, damage):
    path = write_task_file(tmp_path)
    change, sentence = BROKEN[damage]
    with h5py.File(path, "a") as file:
        change(file["data/demo_1"])
    with pytest.raises(BadInput, match=f"{path}: .*{sentence}") as said:
        load(tmp_path, "data.cache=none")
    assert "demo_1" in str(said.value) or "gone.hdf5" in str(said.value)


END_EFFECTOR = "data.robot_state=end_effector"


def test_files_without_joints_are_read_where_the_state_is_the_end_effectors(tmp_path):
    path = write_task_file(tmp_path, alignment="before")
    with h5py.File(path, "a") as file:
        for demo in file["data"].values():
            del demo["obs/joint_states"]
    advice = "demo_0: key obs/joint_states is missing, data.robot_state is joints; it has what data.robot_state end_eff"
    with pytest.raises(BadInput, match=f"{path}: {advice}"):
        load(tmp_path)
    with pytest.raises(
        BadInput, match=r"key obs/joint_states is missing, so whether .* set data\.obs_alignment to before"
    ):
        load(tmp_path, END_EFFECTOR)
    demos, observation = load(tmp_path, END_EFFECTOR, "data.obs_alignment=before")
    assert observation["robot_state"] == ["ee_pos", "ee_ori", "gripper_states"]
    obs = samples_of(batches_of(demos, drawn_rows(demos), 0))[40]["obs"]
    with h5py.File(path) as file:
        for name in observation["robot_state"]:
            np.testing.assert_array_equal(obs[name], file[f"data/demo_1/obs/{name}"][10].astype(np.float32))
    assert obs.keys() == {"agentview_rgb", "eye_in_hand_rgb", "language", *observation["robot_state"]}


BROKEN_END_EFFECTOR = {
    "no position": (lambda d: d["obs"].__delitem__("ee_pos"), "key obs/ee_pos is missing, data.robot_state is end_eff"),
    "a quaternion": (lambda d: replace(d, "obs/ee_ori", np.zeros((30, 4))), r"has shape \(30, 4\), expected \(30, 3\)"),
    "NaN orientation": (lambda d: d["obs/ee_ori"].__setitem__((3, 2), np.nan), "key obs/ee_ori holds NaN"),
    "a frozen camera": (
        lambda d: d["obs/agentview_rgb"].__setitem__(slice(None), d["obs/agentview_rgb"][0]),
        "the pictures of steps 0 and 29 are the same although the arm moved",
    ),
}


@pytest.mark.parametrize("damage", BROKEN_END_EFFECTOR)
def test_an_end_effectors_state_that_is_broken_is_named(tmp_path, damage):
    path = write_task_file(tmp_path)
    change, sentence = BROKEN_END_EFFECTOR[damage]
    with h5py.File(path, "a") as file:
        change(file["data/demo_1"])
    with pytest.raises(BadInput, match=f"{path}: demo_1: .*{sentence}"):
        load(tmp_path, END_EFFECTOR, "data.cache=none")


def test_demos_shorter_than_a_chunk_or_longer_than_allowed_are_named(tmp_path):
    path = write_task_file(tmp_path, steps=9)
    with pytest.raises(BadInput, match=f"{path}: demo_0: has 9 steps, expected at least 11"):
        load(tmp_path)
    write_task_file(tmp_path, steps=40)
    with pytest.raises(BadInput, match=r"demo_0: has 40 steps, data\.max_len_data allows 39"):
        load(tmp_path, "data.max_len_data=39")


def test_a_truncated_file_is_named(tmp_path):
    path = write_task_file(tmp_path)
    path.write_bytes(path.read_bytes()[:-5_000])
    with pytest.raises(BadInput, match=rf"{path}: it is truncated \([\d,]+ of [\d,]+ bytes\)"):
        load(tmp_path)


def test_a_file_without_a_group_of_demos_is_named(tmp_path):
    path = tmp_path / f"{TASK}_demo.hdf5"
    with h5py.File(path, "w") as file:
        file["data"] = np.zeros(3)
    with pytest.raises(BadInput, match=f"{path}: data is a dataset, expected a group"):
        load(tmp_path)
    with h5py.File(path, "w") as file:
        file["data"] = h5py.SoftLink("/gone")
    with pytest.raises(BadInput, match=f"{path}: data: it is a link to something that is not there"):
        load(tmp_path)


def test_attributes_of_other_programs_are_read_or_named(tmp_path):
    path = write_task_file(tmp_path)
    with h5py.File(path, "a") as file:
        attributes = file["data"].attrs
        attributes["macros_image_convention"] = np.bytes_(b"opengl")
        attributes["problem_info"] = np.bytes_(attributes["problem_info"].encode())
        for demo, value in zip(file["data"].values(), ("30", 30.0, np.array([30])), strict=True):
            demo.attrs["num_samples"] = value
    assert load(tmp_path)[1]["image_orientation"] == "opengl"
    with h5py.File(path, "a") as file:
        file["data"].attrs["visual_mesh_ratio"] = "x"
    with pytest.raises(BadInput, match=f"{path}: attribute visual_mesh_ratio is 'x', expected a number"):
        load(tmp_path)


def test_a_demo_that_is_there_twice_is_named_with_both_places(tmp_path):
    path = write_task_file(tmp_path, demos=4)
    copy = tmp_path / f"{TASK}_demo (1).hdf5"
    shutil.copy(path, copy)
    with h5py.File(copy, "a") as file:
        del file["data/demo_0"]
    said = rf"demo \(1\).hdf5: demo_1 is a copy of demo_1 in {path.name}|{path}: demo_1 is a copy of demo_1 in .*\(1\)"
    with pytest.raises(BadInput, match=said):
        load(tmp_path)
    copy.unlink()
    with h5py.File(path, "a") as file:
        file.copy("data/demo_1", "data/demo_7")
    with pytest.raises(BadInput, match=f"{path}: demo_7 is a copy of demo_1 in {path.name}"):
        load(tmp_path)
    assert load(tmp_path, "data.demos_per_task=4")[0]


def test_hidden_files_are_no_demonstrations_and_a_git_lfs_pointer_is_called_one(tmp_path):
    path = write_task_file(tmp_path)
    (tmp_path / f"._{path.name}").write_bytes(bytes.fromhex("00051607") + bytes(4000))
    assert {demo.path for demo in load(tmp_path)[0]} == {path}
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    with pytest.raises(BadInput, match=f"{path}: is a Git LFS pointer"):
        load(tmp_path)


def test_demos_that_lie_in_other_files_are_read_through_their_links(tmp_path):
    path = write_task_file(tmp_path)
    (tmp_path / "parts").mkdir()
    expected, _ = load(tmp_path)
    with h5py.File(path, "a") as file:
        for name in ("demo_0", "demo_2"):
            with h5py.File(tmp_path / f"parts/{name}.h5", "w") as part:
                file.copy(f"data/{name}", part, name="it")
            del file["data"][name]
            file["data"][name] = h5py.ExternalLink(f"parts/{name}.h5", "/it")
    demos, _ = load(tmp_path)
    assert [demo.parts for demo in demos] == [(tmp_path / "parts/demo_0.h5",), (), (tmp_path / "parts/demo_2.h5",)]
    assert all(torch.equal(a.actions, b.actions) for a, b in zip(demos, expected, strict=True))
    (tmp_path / "parts/demo_2.h5").unlink()
    with pytest.raises(
        BadInput, match=f"{path}: demo_2, a link to parts/demo_2.h5: it links to a file that is not there"
    ):
        load(tmp_path)


def test_a_folder_that_may_not_be_read_is_not_called_empty(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tmp_path.chmod(0o755)
    (tmp_path / "data").mkdir(mode=0)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)  # root may read everything
    try:
        with pytest.raises(BadInput, match=r"data.data_directory: data cannot be read \(Permission denied\)"):
            find_task_files("data")
    finally:
        os.seteuid(user)


def test_missing_and_empty_directories_are_named(tmp_path):
    with pytest.raises(BadInput, match=r"data\.data_directory: no such directory .*nowhere"):
        load(tmp_path / "nowhere")
    with pytest.raises(BadInput, match=r"holds no \*\.hdf5 file"):
        load(tmp_path)
    (tmp_path / f"{TASK}_demo.hdf5").write_bytes(b"")
    with pytest.raises(BadInput, match="is empty, expected an HDF5 file"):
        load(tmp_path)
