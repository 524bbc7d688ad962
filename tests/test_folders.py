"""One policy from several folders of demonstrations: numbered through, named apart, aligned each as it is."""

import itertools
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from helpers import CPU, INSTRUCTION, LANGUAGE, batches_of, data_config, load, one_sentence, run, samples_of, settings
from libero_files import TASK, write_task_file

from dataloader import chunk_rows
from demos.frames import HDF5Frames, open_frames
from demos.hdf5 import drawn_rows, folder_prefixes, listed_names, split_demos
from demos.language import load_languages
from errors import BadInput
from jepa.tokenizer import resize_images
from rollouts.episodes import Episode, Task
from rollouts.policies import CheckpointPolicy, check_observation, training_demo
from statevla_model import load_checkpoint
from training.checkpoint import read_checkpoint

BUTTER = "pick_up_the_butter_and_place_it_in_the_basket"


@pytest.fixture
def folders(tmp_path) -> list[Path]:
    """Own demonstrations as LIBERO records them, and imported ones of the same task and another, before their actions
    and of twice the size."""
    own, imported = tmp_path / "own", tmp_path / "imported"
    own.mkdir(), imported.mkdir()
    write_task_file(own, demos=4, steps=20)
    write_task_file(imported, demos=4, steps=16, seed=1, alignment="before", image_size=64)
    write_task_file(imported, task=BUTTER, demos=4, steps=18, alignment="before", image_size=64)
    return [own, imported]


def both(folders: list[Path]) -> str:
    return f"[{', '.join(map(str, folders))}]"


def test_rows_are_numbered_through_and_chunks_start_as_each_folder_is_aligned(folders):
    demos, observation = load(both(folders))
    assert [demo.first_row for demo in demos] == [0, *itertools.accumulate(len(demo) for demo in demos)][:-1]
    assert [demo.path.parent for demo in demos] == [folders[0]] * 4 + [folders[1]] * 8
    assert observation["obs_alignment"] == "mixed" and observation["image_size"] == 32  # the first folder's
    language = type(LANGUAGE)("", LANGUAGE.embeddings | {BUTTER.replace("_", " "): LANGUAGE[INSTRUCTION]})
    samples = iter(samples_of(batches_of(demos, chunk_rows(demos, 10), 10, language=language)))
    for demo in demos:
        lag = 1 if demo.path.parent == folders[0] else 0
        with h5py.File(demo.path) as file:
            group = file["data"][demo.key]
            for t in range(len(demo) - lag - 9):
                sample = next(samples)
                expected = group["actions"][t + lag : t + lag + 10].astype(np.float32)
                np.testing.assert_array_equal(sample["actions"], expected)
                joints = group["obs/joint_states"][t].astype(np.float32)
                np.testing.assert_array_equal(sample["obs"]["joint_states"], joints)
    assert next(samples, None) is None


def test_one_folder_in_a_list_is_that_folder(folders):
    (alone, of_alone), (listed, of_listed) = load(folders[0]), load(f"[{folders[0]}]")
    assert of_alone == of_listed
    names = [f"{TASK}_demo.hdf5/demo_{number}" for number in range(4)]
    assert [demo.name for demo in alone] == [demo.name for demo in listed] == names


def test_demos_are_named_apart_by_as_much_of_their_folders_paths_as_it_takes(folders):
    names = {demo.name for demo in load(both(folders))[0]}
    assert len(names) == 12
    assert {name for name in names if TASK in name} == {
        f"{folder}/{TASK}_demo.hdf5/demo_{number}" for folder in ("own", "imported") for number in range(4)
    }
    assert names == {demo.name for demo in load(both(folders[::-1]))[0]}
    paths = [Path("/a/data"), Path("/b/data"), Path("/b/more")]
    assert list(folder_prefixes(paths).values()) == ["a/data/", "b/data/", "b/more/"]


def test_what_was_held_out_of_one_folder_stays_held_out_of_several(folders):
    alone, together = (load(which)[0] for which in (folders[0], both(folders)))
    for seed in range(3):
        held_out = [demo.name for demo in split_demos(alone, 0.7, seed)[1]]
        train, unseen = split_demos(together, 0.7, 0, held_out)
        of_own = {f"{demo.path.name}/{demo.key}" for demo in unseen if demo.path.parent == folders[0]}
        assert of_own == set(held_out)
        again = split_demos(together, 0.7, 1, [demo.name for demo in unseen])  # a checkpoint of several goes on
        assert [demo.name for demo in again[1]] == [demo.name for demo in unseen]
        back = split_demos(alone, 0.7, 1, [demo.name for demo in unseen])[1]  # and one that leaves a folder out
        assert set(held_out) <= {demo.name for demo in back}
        assert {demo.path for demo in train} == {demo.path for demo in unseen} == {demo.path for demo in together}
    assert listed_names(["a/x/demo_0", "b/x/demo_0"], ["a/x/demo_0"]) == {"a/x/demo_0"}


def test_frames_come_to_the_models_size_and_are_cached_in_their_own_folders(folders):
    demos, _ = load(both(folders))
    frames = open_frames(demos, data_config(both(folders)), 32, CPU)
    direct = HDF5Frames(demos, 32)
    rows = drawn_rows(demos).numpy()
    cached, read = (np.empty((len(rows), 2, 32, 32, 3), np.uint8) for _ in range(2))
    frames.read(rows, cached), direct.read(rows, read)
    np.testing.assert_array_equal(cached, read)
    for demo in (demos[1], demos[6]):
        with h5py.File(demo.path) as file:
            whole = torch.from_numpy(file["data"][demo.key]["obs/eye_in_hand_rgb"][:])
        expected = resize_images(whole, 32).permute(0, 2, 3, 1)
        np.testing.assert_array_equal(cached[demo.first_row : demo.first_row + len(demo), 1], expected)
    assert [len(list((folder / "frame_cache").glob("*.frames"))) for folder in folders] == [1, 2]


@pytest.mark.parametrize("cache", ["disk", "none"])
def test_sizes_that_differ_below_the_models_are_named_with_their_folders(folders, cache):
    demos, _ = load(both(folders))
    own, imported = folders
    sentence = f"{own}: images are 32 px, those of {imported} 64 px; .* smaller than model.image_size, 48"
    with pytest.raises(BadInput, match=sentence):
        open_frames(demos, data_config(both(folders), f"data.cache={cache}"), 48, CPU)


def test_folders_that_do_not_fit_together_are_named(folders, tmp_path):
    own, imported = folders
    with h5py.File(own / f"{TASK}_demo.hdf5", "a") as file:
        file["data"].attrs["macros_image_convention"] = "opencv"
    with pytest.raises(BadInput, match=f"{imported}: image_orientation is opengl, but own has opencv; all folders"):
        load(both(folders))
    (tmp_path / "link").symlink_to(own)
    with pytest.raises(BadInput, match=f"data.data_directory: {own} is there twice"):
        load(both([own, imported, tmp_path / "link"]))
    with pytest.raises(BadInput, match=f"no such directory {tmp_path / 'gone'}"):
        load(both([own, tmp_path / "gone"]))


@pytest.mark.parametrize("robot_state", ["joints", "end_effector"])
def test_a_demo_that_another_folder_has_too_is_named_however_it_is_aligned(folders, robot_state):
    own, imported = folders
    source = own / f"{TASK}_demo.hdf5"
    with h5py.File(source) as file, h5py.File(imported / f"{TASK}_demo.hdf5", "a") as target:
        demo = target["data"].create_group("demo_4")
        demo["actions"], demo["states"] = file["data/demo_2/actions"][1:], file["data/demo_2/states"][1:]
        for name, values in file["data/demo_2/obs"].items():
            demo[f"obs/{name}"] = values[:-1] if values.ndim == 2 else np.repeat(values[:-1], 2, 1).repeat(2, 2)
        demo.attrs["num_samples"] = 19
    with pytest.raises(BadInput, match=f"demo_4 is a copy of demo_2 in {source}, it has the same actions and robot"):
        load(both(folders), f"data.robot_state={robot_state}")


def embed(folder: Path, encoder: str, *texts: str, seed: int = 0) -> None:
    vectors = np.random.default_rng(seed).normal(size=(len(texts), 512))
    np.savez(folder / "language_embeddings.npz", texts=np.array(texts), embeddings=vectors, encoder=np.array(encoder))


def test_embeddings_of_all_folders_are_one_table_or_what_differs_is_named(folders):
    own, imported = folders
    config, (demos, _) = data_config(both(folders)), load(both(folders))
    embed(own, "one 1", INSTRUCTION)
    with pytest.raises(BadInput, match=f"{imported}/language_embeddings.npz: no language embeddings; .* {imported}`"):
        load_languages(config, demos, 512)
    embed(imported, "one 1", INSTRUCTION, BUTTER)
    table = load_languages(config, demos, 512)
    assert list(table.embeddings) == [INSTRUCTION, BUTTER.replace("_", " ")]
    embed(imported, "two 2", INSTRUCTION, BUTTER)
    names = f"encoder is 'two 2', but that of {own}/language_embeddings.npz is 'one 1'"
    with pytest.raises(BadInput, match=f"{imported}/language_embeddings.npz: language {names}"):
        load_languages(config, demos, 512)
    embed(imported, "one 1", INSTRUCTION, BUTTER, seed=1)
    with pytest.raises(BadInput, match=f"the embedding of '{INSTRUCTION}' differs from that of {own}"):
        load_languages(config, demos, 512)
    embed(own.parent, "one 1", INSTRUCTION, BUTTER)
    shared = data_config(both(folders), f"data.language_embeddings={own.parent}/language_embeddings.npz")
    assert load_languages(shared, demos, 512).encoder == "one 1"


def test_a_replay_is_chosen_from_all_folders_among_what_was_trained_on(folders):
    own, imported = folders
    with h5py.File(imported / f"{TASK}_demo.hdf5") as file:
        starts = [demo["states"][0] for demo in file["data"].values()]
    task = Task(TASK, INSTRUCTION, True, np.array([starts[3]]))
    assert training_demo(task, folders, 50, []) == (imported / f"{TASK}_demo.hdf5", "demo_3")
    assert training_demo(task, folders, 50, [f"imported/{TASK}_demo.hdf5/demo_3"])[1] != "demo_3"
    elsewhere = task.init_states + 0.5  # rad: no arm starts there
    with pytest.raises(BadInput, match=f"{own}, {imported}: has no training demo"):
        training_demo(Task(TASK, INSTRUCTION, True, elsewhere), folders, 50, [])
    with h5py.File(imported / f"{TASK}_demo.hdf5", "a") as file:
        for demo in file["data"].values():
            del demo["states"]  # as imported ones are
    with h5py.File(own / f"{TASK}_demo.hdf5") as file:
        task = Task(TASK, INSTRUCTION, True, file["data/demo_1/states"][:1])
    assert training_demo(task, folders, 50, []) == (own / f"{TASK}_demo.hdf5", "demo_1")


@pytest.mark.slow
def test_one_policy_is_trained_on_the_end_effectors_state_of_all_folders(folders, tmp_path):
    """Both phases, with foresight; the checkpoint then decides and is evaluated offline by itself."""
    own, imported = folders
    changes = {
        "data.data_directory": both(folders), "data.robot_state": "end_effector", "training.phase1.num_epochs": 1,
        "training.phase2.num_epochs": 1, "training.checkpoint_directory": tmp_path / "runs",
    }  # fmt: skip
    changed = settings(**changes)
    run("embed_language.py", "--encoder", "offline", "--set", f"data.data_directory={both(folders)}")
    assert all((folder / "language_embeddings.npz").exists() for folder in folders)
    encoder, policy = (
        tmp_path / f"runs/{name}/checkpoint_latest.pt" for name in ("phase1_temporal_jepa", "phase2_flow_matching")
    )
    said = run("train.py", "--phase", 1, *changed).stdout
    assert f"{own}: 4 demos, 32 px, obs[t] was recorded after actions[t]" in said
    assert f"{imported}: 8 demos, 64 px, obs[t] was recorded before actions[t]" in said
    run("train.py", "--phase", 2, "--phase1_checkpoint", encoder, *changed)
    checkpoint = read_checkpoint(policy)
    assert checkpoint["observation"]["robot_state"] == ["ee_pos", "ee_ori", "gripper_states"]
    assert read_checkpoint(encoder)["model_state_dict"]["robot_normalizer.mean"].shape == (8,)
    model = load_checkpoint(policy)
    obs = {camera: np.zeros((32, 32, 3), np.uint8) for camera in checkpoint["observation"]["cameras"]}
    obs |= {"ee_pos": np.zeros(3, np.float32), "ee_ori": np.zeros(3, np.float32)}
    with pytest.raises(BadInput, match="the observation lacks gripper_states; this model reads agentview_rgb, "):
        model.decide(obs, INSTRUCTION)
    obs |= {"gripper_states": np.zeros(2, np.float32)}
    chunk = model.decide(obs, INSTRUCTION, flow_start="zero")
    np.testing.assert_array_equal(model.decide(obs | {"joint_states": None}, INSTRUCTION, flow_start="zero"), chunk)
    moved = model.decide(obs | {"ee_pos": np.ones(3, np.float32)}, INSTRUCTION, flow_start="zero")
    assert chunk.shape == (10, 7) and not np.array_equal(chunk, moved)
    check_observation(checkpoint["observation"], str(policy))  # as before a rollout, whose observations have all states
    assert model.language is not None
    in_rollouts = CheckpointPolicy(model, {0: model.language[INSTRUCTION]}, CPU, 10, 4, "zero")
    whole = obs | {"joint_states": np.ones(7, np.float32)}
    [executed] = in_rollouts.act([whole], [Episode("libero_object", 0, 0, 0)], [torch.Generator()])
    np.testing.assert_array_equal(executed, chunk.astype(np.float64))
    assert "held-out demos" in run("eval.py", "--checkpoint", policy).stdout
    said = one_sentence(run("eval.py", "--checkpoint", policy, "--set", "data.robot_state=joints", expect=2))
    assert f"{own}, {imported}: robot_state is ['joint_states', 'gripper_states'], the checkpoint expects" in said
    joints = settings(**changes | {"data.robot_state": "joints"})
    said = one_sentence(run("train.py", "--phase", 2, "--phase1_checkpoint", encoder, *joints, expect=2))
    assert f"{encoder}: model.robot_state_dim is 8, but this run has 9" in said
