"""The real lerobot, in an environment of its own: it opens and trains on what convert_lerobot.py exports, and what it
writes is imported."""

import json
import os
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from libero_files import TASK, write_task_file

from demos.language import EMBEDDINGS_FILE

ROOT = Path(__file__).parent.parent.parent
PROGRAM = Path(__file__).parent / "with_lerobot.py"
OTHER_TASK = "pick_up_the_butter_and_place_it_in_the_basket"
STEPS, EPISODES = 30, 4
CAMERAS = {"agentview_rgb": "observation.images.image", "eye_in_hand_rgb": "observation.images.image2"}


def call(*command: object, **variables: str) -> str:
    done = subprocess.run(
        [*map(str, command)], cwd=ROOT, env=os.environ | variables, capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def lerobot(home: Path, *command: object) -> str:
    """A program of LeRobot's environment, which keeps what it caches in `home` and asks no hub."""
    environment = Path(os.environ["INTEROP"]) / "interop-lerobot/bin"
    return call(environment / str(command[0]), *command[1:], HF_HOME=str(home / "home"), HF_HUB_OFFLINE="1")


@pytest.fixture(scope="module")
def demos(tmp_path_factory) -> Path:
    """Two tasks of two demos each in LIBERO's own alignment, with smooth pictures, which a film can show."""
    folder = tmp_path_factory.mktemp("demos")
    rng = np.random.default_rng(0)
    for task in (OTHER_TASK, TASK):
        path = write_task_file(folder, task, demos=2, steps=STEPS, image_size=64)
        with h5py.File(path, "a") as file:
            for demo in file["data"].values():
                for name in ("ee_pos", "ee_ori"):
                    if name not in demo["obs"]:
                        demo["obs"][name] = rng.normal(size=(STEPS, 3))
                for camera in CAMERAS:
                    rows, columns, moved = np.mgrid[:64, :64, :STEPS] / 64
                    waves = [np.sin(a * rows + b * columns + 3 * moved) for a, b in rng.uniform(0.5, 3, (3, 2))]
                    pictures = (127 + 120 * np.stack(waves, axis=-1)).astype(np.uint8)
                    demo["obs"][camera][...] = pictures.transpose(2, 0, 1, 3)
    texts = [task.replace("_", " ") for task in (OTHER_TASK, TASK)]
    vectors = np.random.default_rng(1).normal(size=(2, 512)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    np.savez(folder / EMBEDDINGS_FILE, texts=np.array(texts), embeddings=vectors, encoder=np.array("a test's"))
    return folder


@pytest.fixture(scope="module", params=["image", "video"])
def opened(request, demos, tmp_path_factory) -> tuple[str, Path, dict, dict]:
    """Kind of pictures, the dataset, every frame as the real loader gives it, and what it says of the whole."""
    folder = tmp_path_factory.mktemp(request.param)
    flags = "--pictures", request.param, "--language"
    call(sys.executable, "convert_lerobot.py", "export", demos, folder / "dataset", *flags)
    said = lerobot(folder, "python", PROGRAM, "read", folder / "dataset", folder / "found.npz")
    return request.param, folder / "dataset", dict(np.load(folder / "found.npz")), json.loads(said)


def originals(demos: Path) -> list[h5py.Group]:
    files = [h5py.File(path) for path in sorted(demos.glob("*.hdf5"))]
    return [file[f"data/demo_{number}"] for file in files for number in range(2)]


def test_the_real_loader_gives_equal_values(opened, demos):
    _, _, found, said = opened
    length = STEPS - 1
    assert said["episodes"] == EPISODES and said["fps"] == 20 and len(found["index"]) == EPISODES * length
    assert np.array_equal(found["index"], np.arange(EPISODES * length))
    table = np.load(demos / EMBEDDINGS_FILE)
    embeddings = dict(zip(table["texts"], table["embeddings"], strict=True))
    for number, demo in enumerate(originals(demos)):
        rows = slice(number * length, (number + 1) * length)
        expected = {
            "observation.state": np.hstack([demo["obs"][key] for key in ("ee_pos", "ee_ori", "gripper_states")]),
            "observation.states.joint_state": demo["obs/joint_states"][()],
            "observation.states.gripper_state": demo["obs/gripper_states"][()],
        }
        for key, values in expected.items():
            assert np.array_equal(found[key][rows], values[:length].astype(np.float32)), key
        for t in range(length):  # a chunk of three from the loader: the actions that follow, padded at the end
            chunk = demo["actions"][1:][[min(t + k, length - 1) for k in range(3)]].astype(np.float32)
            assert np.array_equal(found["action"][rows][t], chunk)
            assert found["action_is_pad"][rows][t].tolist() == [t + k >= length for k in range(3)]
        task = said["tasks"][number * length]
        assert task == Path(demo.file.filename).stem.removesuffix("_demo").replace("_", " ")
        np.testing.assert_allclose(
            found["observation.environment_state"][rows], embeddings[task][None].repeat(length, 0)
        )


def test_the_real_loader_gives_equal_pixels_of_images_and_close_ones_of_videos(opened, demos):
    kind, _, found, _ = opened
    for number, demo in enumerate(originals(demos)):
        for camera, feature in CAMERAS.items():
            turned = np.rot90(demo["obs"][camera][: STEPS - 1], 2, axes=(1, 2))
            film = found[feature][number * (STEPS - 1) : (number + 1) * (STEPS - 1)]
            if kind == "image":
                assert np.array_equal(film, turned)
                continue
            errors = ((film.astype(float) - turned) ** 2).mean(axis=(1, 2, 3))
            assert (10 * np.log10(255**2 / errors) > 36).all()  # dB, in every frame
            neighbours = ((film[1:].astype(float) - turned[:-1]) ** 2).mean(axis=(1, 2, 3))
            assert (neighbours > errors[1:]).all()  # no frame is that of another time


def test_the_real_loader_has_statistics_of_every_feature_and_knows_what_each_is(opened):
    _, _, found, said = opened
    assert set(said["statistics"]) == set(found) - {"action_is_pad"}
    for names in said["statistics"].values():
        assert {"min", "max", "mean", "std", "count", "q01", "q99"} <= set(names)
    kinds = {key: kind for key, (kind, _) in said["policy_features"].items()}
    assert kinds["observation.environment_state"] == "ENV" and kinds["action"] == "ACTION"
    assert kinds["observation.state"] == "STATE"
    for feature in CAMERAS.values():
        assert said["policy_features"][feature] == ["VISUAL", [3, 64, 64]]


def test_the_real_trainer_trains_act_on_an_export(demos, tmp_path):
    call(sys.executable, "convert_lerobot.py", "export", demos, tmp_path / "dataset", "--language")
    # fmt: off
    lerobot(
        tmp_path, "lerobot-train", "--dataset.repo_id=a/name", f"--dataset.root={tmp_path / 'dataset'}",
        "--policy.type=act", "--policy.device=cpu", "--policy.push_to_hub=false", "--policy.chunk_size=10",
        "--policy.n_action_steps=10", "--policy.dim_model=32", "--policy.dim_feedforward=32", "--policy.n_heads=2",
        "--policy.n_encoder_layers=1", "--policy.n_vae_encoder_layers=1", "--policy.pretrained_backbone_weights=null",
        f"--output_dir={tmp_path / 'run'}", "--batch_size=4", "--steps=2", "--num_workers=0", "--wandb.enable=false",
        "--save_freq=2",
    )
    # fmt: on
    saved = json.loads((tmp_path / "run/checkpoints/last/pretrained_model/config.json").read_text())
    assert saved["input_features"]["observation.environment_state"]["shape"] == [512]


def test_what_the_real_recorder_writes_is_imported(tmp_path):
    lerobot(tmp_path, "python", PROGRAM, "write", tmp_path / "dataset", tmp_path / "wrote.npz")
    wrote = dict(np.load(tmp_path / "wrote.npz"))
    said = call(sys.executable, "convert_lerobot.py", "import", tmp_path / "dataset", tmp_path / "back")
    assert "preset libero" in said and "1 closes (fingers agree to 100%)" in said and "missing: joint angles" in said
    names = ("put_the_bowl_on_the_plate_demo.hdf5", f"{TASK}_demo.hdf5")
    for episode in range(4):
        rows = slice(episode * STEPS, (episode + 1) * STEPS)
        with h5py.File(tmp_path / "back" / names[episode % 2]) as file:
            demo = file[f"data/demo_{episode // 2}"]
            assert np.array_equal(demo["actions"], wrote["action"][rows])
            state = np.hstack([demo["obs"][key] for key in ("ee_states", "gripper_states")])
            assert np.array_equal(state, wrote["observation.state"][rows])
            for camera, feature in CAMERAS.items():
                assert np.array_equal(demo["obs"][camera], np.rot90(wrote[feature][rows], 2, axes=(1, 2)))
