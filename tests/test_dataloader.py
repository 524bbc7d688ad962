"""Demonstrations on disk: alignment, samples, split, language, and every way in which files were seen broken."""

import threading
import time

import h5py
import numpy as np
import pytest
import torch
from libero_files import TASK, write_task_file

from config import load_config
from dataloader import (
    EMBEDDINGS_FILE,
    Batches,
    LanguageTable,
    LowDimensional,
    canonical_instruction,
    chunk_rows,
    frame_rows,
    load_demos,
    load_language,
    numbered_alone,
    shift_pictures,
    split_demos,
    task_instruction,
    transition_rows,
)
from errors import BadInput
from frame_cache import DeviceFrames, HDF5Frames, open_frames

INSTRUCTION = "pick up the milk and place it in the basket"
LANGUAGE = LanguageTable("test encoder", {INSTRUCTION: torch.nn.functional.normalize(torch.ones(512), dim=0)})


CPU = torch.device("cpu")


def data_config(directory, *overrides):
    return load_config("conf/config.yaml", [f"data.data_directory={directory}", *overrides]).data


def load(directory, *overrides, min_actions=10):
    return load_demos(data_config(directory, *overrides), min_actions)


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
    write_task_file(tmp_path, task="pick_up_the_butter_and_place_it_in_the_basket", alignment="before")
    with pytest.raises(BadInput, match=r"obs_alignment is after, but pick_up_the_butter.* has before"):
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


def batches_of(demos, rows, num_actions, batch_size=16, language=LANGUAGE, **options) -> Batches:
    if "states" not in options:
        options.setdefault("frames", HDF5Frames(demos))
    return Batches(rows, LowDimensional(demos, language, CPU), num_actions, batch_size, **options)


def samples_of(batches: Batches) -> list[dict]:
    """The batches' rows one by one, copied: a batch's pictures live in a buffer that is filled again."""

    def row(batch, i):
        return {key: row(value, i) if isinstance(value, dict) else value[i].clone() for key, value in batch.items()}

    return [row(batch, i) for batch in batches for i in range(len(batch["actions"]))]


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
def test_a_window_holds_its_frames_one_after_the_other_and_all_the_actions_between(tmp_path, recorded, lag, frames):
    predictions, gap, batch_size = 3, 4, 5
    path = write_task_file(tmp_path, alignment=recorded, demos=2)
    demos, _ = load(tmp_path)
    rows, reach = transition_rows(demos, predictions * gap), predictions * gap
    options = {"gap": gap, "rollout_length": predictions, "batch_size": batch_size}
    if frames == "on the device":
        options["frames"] = DeviceFrames(open_frames(demos, data_config(tmp_path, "data.cache=ram"), 32, CPU), CPU)
    with h5py.File(path) as file:
        in_file = {
            key: np.concatenate([file["data"][demo.key][key] for demo in demos])
            for key in ("actions", *(f"obs/{name}" for name in file["data/demo_0/obs"]))
        }
    batches = list(copied(batches_of(demos, rows, reach, **options)))
    assert [len(batch["actions"]) for batch in batches] == [5] * 7 + [1]  # 2 x (30 - 12)
    for batch, starts in zip(batches, rows.split(batch_size), strict=True):
        for name, first in (("obs", 0), ("next_obs", 1)):
            seen = torch.cat([starts + frame * gap for frame in range(first, first + predictions)])
            for key in ("agentview_rgb", "eye_in_hand_rgb", "joint_states", "gripper_states"):
                found = batch[name][key].numpy()
                np.testing.assert_array_equal(found, in_file[f"obs/{key}"][seen].astype(found.dtype), f"{name} {key}")
            assert torch.equal(batch[name]["language"], LANGUAGE[INSTRUCTION].expand(len(seen), -1))
        for start, actions in zip(starts, batch["actions"], strict=True):
            expected = in_file["actions"][start + lag : start + lag + reach]
            np.testing.assert_array_equal(actions, expected.astype(np.float32))


@pytest.mark.parametrize("recorded", ["before", "after"])
def test_the_robots_future_is_read_from_its_own_demo_and_ends_with_it(tmp_path, recorded):
    path = write_task_file(tmp_path, alignment=recorded, demos=2)
    demos, _ = load(tmp_path)
    rows = transition_rows(demos, 6)
    batches = batches_of(demos, rows, 6, gap=3, rollout_length=2, ahead=(0, 2, 20), batch_size=len(rows))
    (batch,) = copied(batches)
    with h5py.File(path) as file:
        obs = [file["data"][demo.key]["obs"] for demo in demos]
        states = [
            np.concatenate([one["joint_states"], one["gripper_states"][()] / 0.04], axis=1).astype(np.float32)
            for one in obs
        ]
    contexts = [(number, t) for number, demo in enumerate(demos) for t in range(len(demo) - 6)]
    contexts += [(number, t + 3) for number, t in contexts]  # frame by frame of the window
    assert batch["robot_ahead"].shape == (len(contexts), 3, 9)
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


def test_a_window_never_crosses_the_end_of_a_demo(tmp_path):
    write_task_file(tmp_path, demos=2, steps=15)
    write_task_file(tmp_path, task="pick_up_the_butter_and_place_it_in_the_basket", demos=1, steps=13)
    demos, _ = load(tmp_path)
    demo_of_row = [number for number, demo in enumerate(demos) for _ in range(len(demo))]
    for reach in (1, 4, 12):
        inside = [row for row in range(len(demo_of_row) - reach) if demo_of_row[row] == demo_of_row[row + reach]]
        assert transition_rows(demos, reach).tolist() == inside != []


def test_an_observation_is_uint8_pictures_float32_state_and_language(tmp_path):
    write_task_file(tmp_path, image_size=48)
    demos, _ = load(tmp_path)
    obs = samples_of(batches_of(demos, frame_rows(demos), 0))[5]["obs"]
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
    states = torch.cat([demo.joint_states for demo in demos])  # the joints stand for z
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
    samples = samples_of(batches_of(alone, frame_rows(alone), 0))
    assert len(samples) == 60
    assert torch.equal(samples[35]["obs"]["joint_states"], demos[1].joint_states[5])


def test_an_epoch_is_a_seeded_permutation_and_drops_only_the_incomplete_batch(tmp_path):
    write_task_file(tmp_path)
    demos, _ = load(tmp_path)
    states = torch.arange(90.0)[:, None]  # a row's z is its number
    batches = batches_of(demos, frame_rows(demos)[:70], 0, seed=3, states=states)
    epochs = []
    for epoch in (0, 1, 0):
        batches.set_epoch(epoch)
        epochs.append(torch.cat([batch["z_t"].flatten() for batch in batches]))
    assert len(epochs[0]) == 64 == len(epochs[0].unique())
    assert torch.equal(epochs[0], epochs[2]) and not torch.equal(epochs[0], epochs[1])


def test_a_batch_is_what_its_ranks_get_together(tmp_path):
    write_task_file(tmp_path)
    demos, _ = load(tmp_path)
    states = torch.arange(90.0)[:, None]
    alone = batches_of(demos, frame_rows(demos), 0, seed=0, states=states, batch_size=16)
    shares = [batches_of(demos, frame_rows(demos), 0, seed=0, states=states, batch_size=8) for _ in range(2)]
    for rank, share in enumerate(shares):
        share.rank, share.ranks = rank, 2
    for joint, first, second in zip(alone, *shares, strict=True):
        assert set(joint["z_t"].flatten().tolist()) == set(torch.cat([first["z_t"], second["z_t"]]).flatten().tolist())


def test_reading_ahead_never_overwrites_the_batch_in_use(tmp_path):
    write_task_file(tmp_path, demos=6)
    demos, _ = load(tmp_path)
    batches = batches_of(demos, transition_rows(demos, 1), 1, gap=1, seed=0, batch_size=4)
    with h5py.File(demos[0].path) as file:
        frames = np.concatenate([file["data"][demo.key]["obs/agentview_rgb"] for demo in demos])
    joints = torch.cat([demo.joint_states for demo in demos])
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
    for _ in batches_of(demos, frame_rows(demos), 0, batch_size=2):
        break
    assert threading.active_count() == before


def test_a_failing_read_is_raised_where_the_batch_is_awaited(tmp_path):
    path = write_task_file(tmp_path)
    demos, _ = load(tmp_path)
    with h5py.File(path, "a") as file:
        del file["data/demo_2/obs/agentview_rgb"]
    with pytest.raises(KeyError, match="agentview_rgb"):
        list(batches_of(demos, frame_rows(demos), 0))


@pytest.mark.parametrize("predictions", [1, 3])
def test_a_shift_moves_both_cameras_of_all_frames_of_a_sample_alike(predictions):
    torch.manual_seed(0)
    ramp = torch.arange(10, 42, dtype=torch.uint8).expand(64 * predictions, 3, 32, 32).permute(0, 2, 3, 1)  # by column
    pictures = {"agentview_rgb": ramp, "eye_in_hand_rgb": ramp.transpose(1, 2)}
    batch = {"obs": pictures, "next_obs": pictures, "actions": torch.zeros(64, 1, 7)}
    shifted = shift_pictures(batch, 8, image_size=64)  # 8 of the model's pixels are 4 of these
    columns = shifted["obs"]["agentview_rgb"][:, 0, 16, 0].int() - 26  # shift of each sample along one side
    rows = shifted["obs"]["eye_in_hand_rgb"][:, 16, 0, 0].int() - 26
    assert set(columns.tolist()) == set(rows.tolist()) == set(range(-4, 5))
    assert torch.equal(columns.view(predictions, 64), columns[:64].expand(predictions, -1))  # frame by frame
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


def write_embeddings(directory, texts, vectors):
    np.savez(directory / EMBEDDINGS_FILE, texts=np.array(texts), embeddings=vectors, encoder=np.array("test 1"))


def test_embeddings_are_normalised_when_loaded(tmp_path):
    write_embeddings(tmp_path, ["Pick the milk and place it in the basket"], np.full((1, 512), 11.0, np.float32))
    table = load_language(tmp_path, [INSTRUCTION], 512)
    assert table.encoder == "test 1"
    assert table[INSTRUCTION].norm().item() == pytest.approx(1)


def test_a_task_without_an_embedding_is_an_error_that_says_what_to_run(tmp_path):
    with pytest.raises(BadInput, match=r"language_embeddings\.npz: no language embeddings; run `python embed_language"):
        load_language(tmp_path, [INSTRUCTION], 512)
    write_embeddings(tmp_path, ["close the drawer"], np.ones((1, 512), np.float32))
    with pytest.raises(BadInput, match=f"no embedding for the task '{INSTRUCTION}'; run `python embed_language"):
        load_language(tmp_path, [INSTRUCTION], 512)
    with pytest.raises(BadInput, match="no language embedding for the task 'fly'"):
        load_language(tmp_path, ["close the drawer"], 512)["fly"]


# --------------------------------------------------------------------------------------------------- broken files


def replace(demo: h5py.Group, key: str, value: np.ndarray) -> None:
    del demo[key]
    demo[key] = value


BROKEN = {  # what was done to demo_1 -> (how, what the sentence must name)
    "no num_samples": (lambda d: d.attrs.__delitem__("num_samples"), "attribute num_samples is missing, expected 30"),
    "wrong num_samples": (lambda d: d.attrs.modify("num_samples", 29), "num_samples is 29, but actions has 30 steps"),
    "eight state dimensions": (
        lambda d: replace(d, "obs/gripper_states", np.zeros((30, 1))),
        r"key obs/gripper_states has shape \(30, 1\), expected \(30, 2\)",
    ),
    "flat gripper": (
        lambda d: replace(d, "obs/gripper_states", np.zeros(30)),
        r"obs/gripper_states has shape \(30,\), expected \(30, 2\)",
    ),
    "gripper in {0, 1}": (
        lambda d: d["actions"].__setitem__((slice(None), 6), (d["actions"][:, 6] + 1) / 2),
        r"gripper values \[0.0, 1.0\], expected -1 \(open\) or 1",
    ),
    "NaN action": (lambda d: d["actions"].__setitem__((3, 2), np.nan), "key actions holds NaN"),
    "NaN joint": (lambda d: d["obs/joint_states"].__setitem__((3, 2), np.nan), "key obs/joint_states holds NaN"),
    "large action": (lambda d: d["actions"].__setitem__((3, 2), 2.5), r"pose delta of size 2.5, expected values in"),
    "seven-DoF joint actions": (
        lambda d: replace(d, "actions", np.zeros((30, 8))),
        r"key actions has shape \(30, 8\), expected \(T, 7\)",
    ),
    "mixed image sizes": (
        lambda d: [
            replace(d, f"obs/{c}_rgb", np.ones((30, 16, 16, 3), np.uint8)) for c in ("agentview", "eye_in_hand")
        ],
        "images are 16 px, those of demo_0 32 px",
    ),
    "cameras of two sizes": (
        lambda d: replace(d, "obs/eye_in_hand_rgb", np.ones((30, 16, 16, 3), np.uint8)),
        r"key obs/eye_in_hand_rgb has shape \(30, 16, 16, 3\), expected square images of one size",
    ),
    "float images": (
        lambda d: replace(d, "obs/agentview_rgb", np.ones((30, 32, 32, 3), np.float32)),
        r"key obs/agentview_rgb is float32 .*, expected uint8 \(30, h, w, 3\)",
    ),
    "channels first": (
        lambda d: replace(d, "obs/agentview_rgb", np.ones((30, 3, 32, 32), np.uint8)),
        r"key obs/agentview_rgb is uint8 \(30, 3, 32, 32\)",
    ),
    "missing camera": (lambda d: d["obs"].__delitem__("eye_in_hand_rgb"), "key obs/eye_in_hand_rgb is missing"),
    "black frames": (
        lambda d: d["obs/agentview_rgb"].__setitem__(slice(None), 0),
        "key obs/agentview_rgb starts with an all-black frame",
    ),
}


@pytest.mark.parametrize("damage", BROKEN)
def test_a_broken_demo_is_named_with_what_was_found_and_expected(tmp_path, damage):
    path = write_task_file(tmp_path)
    change, sentence = BROKEN[damage]
    with h5py.File(path, "a") as file:
        change(file["data/demo_1"])
    with pytest.raises(BadInput, match=f"{path}: demo_1: .*{sentence}"):
        load(tmp_path)


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
    with pytest.raises(BadInput, match=f"{path}: not readable as HDF5, is it truncated"):
        load(tmp_path)


def test_missing_and_empty_directories_are_named(tmp_path):
    with pytest.raises(BadInput, match=r"data\.data_directory: no such directory .*nowhere"):
        load(tmp_path / "nowhere")
    with pytest.raises(BadInput, match=r"holds no \*\.hdf5 file"):
        load(tmp_path)
    (tmp_path / f"{TASK}_demo.hdf5").write_bytes(b"")
    with pytest.raises(BadInput, match="not readable as HDF5"):
        load(tmp_path)
