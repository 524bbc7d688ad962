"""convert_lerobot.py: what goes out comes back, other people's datasets come in, and what is broken is one sentence.

That LeRobot's own loader opens what is exported is shown in tests/interop, in an environment that has it.
"""

import ctypes
import io
import json
import random
import shutil
import sys
from fractions import Fraction
from pathlib import Path

import av
import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers import load, one_sentence, run
from libero_files import TASK, write_task_file
from PIL import Image

import lerobot_format.export
import lerobot_format.to_hdf5
from demos.language import EMBEDDINGS_FILE
from errors import BadInput
from jepa.tokenizer import resize_images
from lerobot_format.gripper import GripperConvention
from lerobot_format.pictures import written_video
from lerobot_format.statistics import picture_counts, picture_statistics
from lerobot_format.unfinished import becomes_whole

OTHER_TASK = "pick_up_the_butter_and_place_it_in_the_basket"
INSTRUCTIONS = [task.replace("_", " ") for task in (OTHER_TASK, TASK)]  # in the order of the files
STEPS = 12


def add_poses(path: Path) -> Path:
    """The end effector's poses, which only an export reads, and smooth pictures, which a film can show."""
    with h5py.File(path, "a") as file:
        for number, demo in enumerate(file["data"].values()):
            rng = np.random.default_rng([number, len(path.name)])
            steps = len(demo["actions"])
            for name in {"ee_pos", "ee_ori"} - demo["obs"].keys():
                demo[f"obs/{name}"] = rng.normal(size=(steps, 3))
            for camera in ("agentview_rgb", "eye_in_hand_rgb"):
                film = demo["obs"][camera]
                film[...] = moving_pictures(rng, steps, film.shape[1])
    return path


def moving_pictures(rng: np.random.Generator, steps: int, size: int) -> np.ndarray:
    rows, columns, moved = np.mgrid[:size, :size, :steps].astype(float) / size
    waves = [np.sin(a * rows + b * columns + 3 * moved + c) for a, b, c in rng.uniform(0.5, 1.5, (3, 3))]
    return (127 + 120 * np.stack(waves, axis=-1)).astype(np.uint8).transpose(2, 0, 1, 3)


@pytest.fixture(scope="module")
def demos(tmp_path_factory) -> Path:
    """Two tasks of two demos each, in LIBERO's own alignment: obs[t] was recorded after actions[t]."""
    folder = tmp_path_factory.mktemp("demos")
    for task in (OTHER_TASK, TASK):
        add_poses(write_task_file(folder, task, demos=2, steps=STEPS, image_size=32))
    return folder


@pytest.fixture(scope="module")
def exported(demos, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "dataset"
    run("convert_lerobot.py", "export", demos, out)
    return out


@pytest.fixture
def damaged(exported, tmp_path) -> Path:
    """A copy of the exported dataset, to be damaged."""
    return Path(shutil.copytree(exported, tmp_path / "damaged"))


def refused(dataset: Path, *flags: str) -> str:
    """The sentence of an import that must fail, which leaves no folder that looks whole."""
    out = dataset.parent / "refused"
    sentence = one_sentence(run("convert_lerobot.py", "import", dataset, out, *flags, expect=2))
    assert not out.exists()
    return sentence


def change_info(dataset: Path, **changes) -> None:
    info = json.loads((dataset / "meta/info.json").read_text())
    (dataset / "meta/info.json").write_text(json.dumps(info | changes))


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ------------------------------------------------------------------------------------------------------ there and back


@pytest.mark.parametrize("alignment", ["after", "before"])
def test_export_and_import_give_the_demos_back_exactly(alignment, tmp_path):
    """Of files recorded after the action the last observation has no action: it and the first action are lost."""
    folder = tmp_path / "demos"
    folder.mkdir()
    for task in (OTHER_TASK, f"LIVING_ROOM_SCENE2_{TASK}"):
        add_poses(write_task_file(folder, task, 2, STEPS, alignment=alignment, official=alignment == "after"))
    run("convert_lerobot.py", "export", folder, tmp_path / "dataset")
    run("convert_lerobot.py", "import", tmp_path / "dataset", tmp_path / "back")
    lag = int(alignment == "after")
    paths = sorted(folder.glob("*.hdf5"))
    assert [path.name for path in paths] == sorted(path.name for path in (tmp_path / "back").iterdir())
    for path in paths:
        with h5py.File(path) as before, h5py.File(tmp_path / "back" / path.name) as after:
            originals = sorted(before["data"].values(), key=lambda demo: int(demo.name[len("/data/demo_") :]))
            assert len(originals) == len(after["data"]) == 2
            for number, original in enumerate(originals):
                demo = after[f"data/demo_{number}"]
                assert demo.attrs["num_samples"] == STEPS - lag
                assert np.array_equal(demo["actions"], original["actions"][lag:].astype(np.float32))
                assert demo["obs"].keys() == {*original["obs"], "ee_states"}
                for key, values in original["obs"].items():
                    kept = values[: STEPS - lag]
                    kept = kept if kept.dtype == np.uint8 else kept.astype(np.float32)
                    assert np.array_equal(demo["obs"][key], kept), key
    loaded, description = load(tmp_path / "back", min_actions=1)
    originals, _ = load(folder, min_actions=1)
    assert description["obs_alignment"] == "before"
    for demo, original in zip(loaded, originals, strict=True):
        assert demo.task == original.task and demo.lag == 0
        assert np.array_equal(demo.actions, original.actions[lag:])


def test_a_mesh_ratio_and_the_instruction_of_a_bddl_file_survive(tmp_path):
    """A checkpoint tells the evaluation with which meshes its pictures were drawn."""
    path = add_poses(write_task_file(tmp_path, TASK, demos=2, steps=STEPS, image_size=16))
    with h5py.File(path, "a") as file:
        file["data"].attrs["visual_mesh_ratio"] = 0.2
        file["data"].attrs["bddl_file_name"] = f"libero/libero/bddl_files/libero_object/{TASK}.bddl"
    run("convert_lerobot.py", "export", tmp_path, tmp_path / "dataset")
    run("convert_lerobot.py", "import", tmp_path / "dataset", tmp_path / "back")
    _, description = load(tmp_path / "back", min_actions=1)
    assert description["visual_mesh_ratio"] == 0.2
    with h5py.File(tmp_path / "back" / path.name) as file:
        assert file["data"].attrs["bddl_file_name"].endswith(f"{TASK}.bddl")


def test_videos_show_nearly_what_the_pictures_were(demos, tmp_path):
    run("convert_lerobot.py", "export", demos, tmp_path / "dataset", "--pictures", "video")
    run("convert_lerobot.py", "import", tmp_path / "dataset", tmp_path / "back")
    for path in demos.glob("*.hdf5"):
        with h5py.File(path) as before, h5py.File(tmp_path / "back" / path.name) as after:
            for key, demo in after["data"].items():
                for camera in ("agentview_rgb", "eye_in_hand_rgb"):
                    film, original = demo["obs"][camera][()], before["data"][key]["obs"][camera][:-1]
                    errors = ((film.astype(float) - original) ** 2).mean(axis=(1, 2, 3))
                    assert (10 * np.log10(255**2 / errors) > 36).all()  # dB, in every single frame
                    shifted = ((film[1:].astype(float) - original[:-1]) ** 2).mean(axis=(1, 2, 3))
                    assert (shifted > errors[1:]).all()  # none is its neighbour


# ------------------------------------------------------------------------------------------------- what an export has


def test_an_export_pairs_each_observation_with_the_action_taken_there(demos, exported):
    table = pq.read_table(exported / "data/chunk-000/file-000.parquet")
    length = STEPS - 1
    assert len(table) == 4 * length
    assert table["index"].to_pylist() == list(range(4 * length))
    assert table["episode_index"].to_pylist() == [episode for episode in range(4) for _ in range(length)]
    assert table["task_index"].to_pylist() == [0] * 2 * length + [1] * 2 * length
    times = (np.arange(length) / 20).astype(np.float32)
    assert np.array_equal(table["timestamp"].to_numpy().reshape(4, length), np.tile(times, (4, 1)))
    with h5py.File(demos / f"{OTHER_TASK}_demo.hdf5") as file:
        demo = file["data/demo_1"]
        row = table.slice(length + 3, 1).to_pylist()[0]  # frame 3 of episode 1
        assert row["action"] == demo["actions"][4].astype(np.float32).tolist()
        parts = [demo["obs"][key][3] for key in ("ee_pos", "ee_ori", "gripper_states")]
        assert row["observation.state"] == np.concatenate(parts).astype(np.float32).tolist()
        assert row["observation.states.joint_state"] == demo["obs/joint_states"][3].astype(np.float32).tolist()
        picture = np.asarray(Image.open(io.BytesIO(row["observation.images.image2"]["bytes"])))
        assert np.array_equal(picture, np.rot90(demo["obs/eye_in_hand_rgb"][3], 2))


def test_tasks_are_the_index_that_pandas_would_read(exported):
    table = pq.read_table(exported / "meta/tasks.parquet")
    assert table.to_pydict() == {"task_index": [0, 1], "task": INSTRUCTIONS}
    assert json.loads(table.schema.metadata[b"pandas"])["index_columns"] == ["task"]


def test_statistics_are_those_of_the_values(exported):
    statistics = json.loads((exported / "meta/stats.json").read_text())
    info = json.loads((exported / "meta/info.json").read_text())
    table = pq.read_table(exported / "data/chunk-000/file-000.parquet")
    episodes = pq.read_table(exported / "meta/episodes/chunk-000/file-000.parquet").to_pylist()
    assert statistics.keys() == info["features"].keys()
    actions = np.array(table["action"].to_pylist())
    pictures = table["observation.images.image"].combine_chunks().field("bytes").to_pylist()
    pictures = np.stack([np.asarray(Image.open(io.BytesIO(content))) for content in pictures]) / 255
    for values, of_feature, axes in (
        (actions, "action", 0),
        (pictures, "observation.images.image", (0, 1, 2)),
    ):
        found = {name: np.array(value) for name, value in statistics[of_feature].items()}
        assert found["count"].tolist() == [len(values)]
        for name, function in {"min": np.min, "max": np.max, "mean": np.mean, "std": np.std}.items():
            np.testing.assert_allclose(found[name].ravel(), function(values, axis=axes), atol=1e-9)
        np.testing.assert_allclose(found["q50"].ravel(), np.median(values, axis=axes), atol=1 / 255)
        of_episode = values[STEPS - 1 : 2 * (STEPS - 1)]
        np.testing.assert_allclose(
            np.ravel(episodes[1][f"stats/{of_feature}/mean"]), np.mean(of_episode, axis=axes), atol=1e-9
        )
    assert np.array(statistics["observation.images.image"]["mean"]).shape == (3, 1, 1)


def test_counts_of_pictures_give_their_statistics():
    pictures = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    found = picture_statistics(picture_counts(pictures[:1]) + picture_counts(pictures[1:]), 4)
    flat = pictures.reshape(-1, 3) / 255
    for name, percent in (("q01", 1), ("q50", 50), ("q99", 99)):
        expected = np.percentile(flat, percent, axis=0, method="inverted_cdf")
        np.testing.assert_allclose(np.ravel(found[name]), expected, atol=1e-12)


def test_smaller_pictures_are_those_that_a_model_of_that_size_sees(demos, tmp_path):
    export = "convert_lerobot.py", "export", demos, tmp_path / "dataset", "--image_size"
    run(*export, 16)
    table = pq.read_table(tmp_path / "dataset/data/chunk-000/file-000.parquet")
    with h5py.File(demos / f"{OTHER_TASK}_demo.hdf5") as file:
        recorded = torch.from_numpy(file["data/demo_0/obs/agentview_rgb"][2][None])
    seen = resize_images(recorded, 16).squeeze(0).permute(1, 2, 0).numpy()
    picture = np.asarray(Image.open(io.BytesIO(table["observation.images.image"][2]["bytes"].as_py())))
    assert np.array_equal(picture, np.rot90(seen, 2))
    assert "--image_size 64: expected 1 to 32" in one_sentence(run(*export, 64, expect=2))


def test_language_becomes_the_state_of_the_environment(demos, tmp_path):
    folder = Path(shutil.copytree(demos, tmp_path / "demos"))
    export = "convert_lerobot.py", "export", folder, tmp_path / "dataset", "--language"
    assert "embed_language.py" in one_sentence(run(*export, expect=2))
    vectors = np.eye(2, 512, dtype=np.float32)
    np.savez(folder / EMBEDDINGS_FILE, texts=np.array(INSTRUCTIONS), embeddings=vectors, encoder=np.array("test"))
    run(*export)
    table = pq.read_table(tmp_path / "dataset/data/chunk-000/file-000.parquet")
    embedded = np.array(table["observation.environment_state"].to_pylist())
    assert np.array_equal(embedded, vectors[table["task_index"].to_numpy()])
    run("convert_lerobot.py", "import", tmp_path / "dataset", tmp_path / "back")  # it has no place in our files


@pytest.mark.skipif(sys.platform != "linux", reason="fills fresh memory by a setting of glibc")
def test_a_videos_bytes_do_not_depend_on_what_was_in_memory_before(demos, tmp_path):
    with h5py.File(demos / f"{OTHER_TASK}_demo.hdf5") as file:
        film = file["data/demo_0/obs/agentview_rgb"][:]
    libc, perturb = ctypes.CDLL(None), -6
    seen, memory, rng = set(), [b""] * 30, random.Random(0)
    try:
        for _ in range(200):  # with x264's macroblock tree one in fifteen differed
            libc.mallopt(perturb, rng.choice([0, 1, 85, 165, 255]))
            memory[rng.randrange(30)] = rng.randbytes(rng.randint(10, 300_000))  # moves what is allocated next
            with written_video(tmp_path / "film.mp4", film.shape[1], 20) as video:
                for picture in film:
                    video.add(picture)
            seen.add((tmp_path / "film.mp4").read_bytes())
    finally:
        libc.mallopt(perturb, 0)
    assert len(seen) == 1


# ------------------------------------------------------------------------------------------------------ interruptions


class Stop(Exception):
    pass


def stopping(function, after: int):
    """The function, which raises Stop instead of its call number `after`, as a process that is killed there."""
    calls = []

    def stops(*arguments):
        calls.append(arguments)
        if len(calls) > after:
            raise Stop
        return function(*arguments)

    return stops


@pytest.mark.parametrize(
    ("left", "stays"), [(["plan.json", "lock", "more/x"], False), (["plan.json", "result/x"], True), (["x"], True)]
)
def test_what_a_conversion_leaves_that_was_killed_after_its_end_goes_the_next_time(tmp_path, left, stays):
    for name in ["out/meta/info.json", *(f"out.part/{name}" for name in left)]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for place, why in ((tmp_path / "link", "link: is a symbolic link"), (Path("."), r"\.: is no name of a folder")):
        with pytest.raises(BadInput, match=f"{why}, expected a folder that can be made"), becomes_whole(place, {}):
            raise AssertionError("it was begun")
    with pytest.raises(BadInput, match="out: is there already"), becomes_whole(tmp_path / "out", {}):
        pass
    assert (tmp_path / "out/meta/info.json").exists() and (tmp_path / "out.part").exists() == stays


@pytest.mark.parametrize("pictures", ["image", "video"])
def test_an_interrupted_export_goes_on_and_ends_with_the_same_bytes(pictures, demos, tmp_path, monkeypatch):
    monkeypatch.setattr(lerobot_format.export, "DATA_MB", 0.1)  # a file an episode
    export = ["convert_lerobot.py", "export", demos, tmp_path / "dataset", "--pictures", pictures]
    run(*export[:3], tmp_path / "at_once", *export[4:])
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(lerobot_format.export.Export, "_row", stopping(lerobot_format.export.Export._row, after=2))
        run(*export)
    assert not (tmp_path / "dataset").exists()
    first = tmp_path / "dataset.part/result/data/chunk-000/file-000.parquet"
    written = first.stat().st_mtime_ns
    run(*export)
    assert (tmp_path / "dataset/data/chunk-000/file-000.parquet").stat().st_mtime_ns == written
    assert tree(tmp_path / "dataset") == tree(tmp_path / "at_once")
    assert len(tree(tmp_path / "dataset")) == 4 + (4 if pictures == "image" else 12)
    assert not (tmp_path / "dataset.part").exists()


@pytest.mark.parametrize("method", ["write_episode", "write_task_file"])
def test_an_interrupted_import_goes_on_and_ends_with_the_same_bytes(method, exported, tmp_path, monkeypatch):
    run("convert_lerobot.py", "import", exported, tmp_path / "at_once")
    convert = "convert_lerobot.py", "import", exported, tmp_path / "back"
    cls = lerobot_format.to_hdf5.Import
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(cls, method, stopping(getattr(cls, method), after=1))
        run(*convert)
    assert not (tmp_path / "back").exists()
    run(*convert)
    assert tree(tmp_path / "back") == tree(tmp_path / "at_once")


def test_a_conversion_goes_on_only_as_it_was_begun(demos, tmp_path, monkeypatch):
    export = "convert_lerobot.py", "export", demos, tmp_path / "dataset"
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(lerobot_format.export.Export, "write_meta", stopping(None, after=0))
        run(*export)
    sentence = one_sentence(run(*export, "--pictures", "video", expect=2))
    assert "dataset.part" in sentence and "another pictures" in sentence
    run(*export)
    before = tree(tmp_path / "dataset")
    assert "is there already" in one_sentence(run(*export, expect=2))
    assert tree(tmp_path / "dataset") == before


# ------------------------------------------------------------------------------------------- other people's datasets


def write_v21(
    root: Path, names: dict[str, str], close: float, open_: float, tasks: list[str], videos: bool = False, fps: int = 20
) -> list[dict]:
    """A dataset v2.1 as others write it, an episode a file; returns what is in it. `names`: of a dataset's features."""
    rng = np.random.default_rng(0)
    (root / "meta").mkdir(parents=True)
    (root / "data/chunk-000").mkdir(parents=True)
    widths = {"action": 7, "state": 8, "joints": 7, "fingers": 2, "pose": 6}
    episodes, features, steps = [], {}, 40
    for kind, name in names.items():
        shape = [widths[kind]] if kind in widths else [16, 16, 3]
        dtype = "float32" if kind in widths else "video" if videos else "image"
        features[name] = {"dtype": dtype, "shape": shape, "names": None}
    for number in range(len(tasks)):
        closed = (np.arange(steps) // 10) % 2 == 1  # opens and closes every ten steps
        opening = np.empty(steps)
        opening[0] = 0.04
        for t in range(1, steps):
            opening[t] = np.clip(opening[t - 1] + (-0.006 if closed[t - 1] else 0.006), 0, 0.04)
        values = {kind: rng.uniform(-0.5, 0.5, (steps, width)).astype(np.float32) for kind, width in widths.items()}
        values["fingers"] = np.stack([opening, -opening], axis=1).astype(np.float32)
        values["state"][:, 6:] = values["fingers"]
        values["action"][:, 6] = np.where(closed, close, open_)
        films = {kind: moving_pictures(rng, steps, 16) for kind in names if kind not in widths}
        columns = {
            names[kind]: pa.FixedSizeListArray.from_arrays(pa.array(values[kind].ravel()), widths[kind])
            for kind in names
            if kind in widths
        }
        columns["episode_index"] = pa.array(np.full(steps, number))
        for kind, film in films.items():
            if videos:
                write_film(root / f"videos/chunk-000/{names[kind]}/episode_{number:06d}.mp4", film, fps)
                continue
            cells = []
            for picture in film:
                stream = io.BytesIO()
                Image.fromarray(picture).save(stream, "PNG")
                cells.append({"bytes": stream.getvalue(), "path": None})
            columns[names[kind]] = pa.array(cells)
        pq.write_table(pa.table(columns), root / f"data/chunk-000/episode_{number:06d}.parquet", row_group_size=7)
        episodes.append(values | films | {"closed": closed})
    lines = [{"episode_index": i, "tasks": [task], "length": steps} for i, task in enumerate(tasks)]
    (root / "meta/episodes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    info = {
        "codebase_version": "v2.1",
        "fps": fps,
        "chunks_size": 1000,
        "total_episodes": len(tasks),
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
        "features": features,
    }
    (root / "meta/info.json").write_text(json.dumps(info))
    return episodes


def write_film(path: Path, film: np.ndarray, fps: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("h264", rate=fps, options={"crf": "5"})  # with B-frames, as ffmpeg has them
        stream.width, stream.height, stream.pix_fmt = film.shape[2], film.shape[1], "yuv420p"
        stream.codec_context.time_base = Fraction(1, fps)
        for picture in film:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))


IPEC = {
    "agent": "observation.images.image",
    "hand": "observation.images.wrist_image",
    "joints": "observation.states.joint_state",
    "fingers": "observation.states.gripper_state",
    "pose": "observation.states.ee_state",
    "action": "action",
}
OPENPI = {"agent": "image", "hand": "wrist_image", "state": "state", "action": "actions"}


def test_a_v21_set_with_joints_and_a_reversed_gripper_is_read(tmp_path):
    """Two spellings of a task are one file; 1 opens in this set, as in RLDS exports."""
    tasks = [INSTRUCTIONS[1], "Pick the milk and place it in the basket", "turn on the stove (left)"]
    episodes = write_v21(tmp_path / "set", IPEC, close=0, open_=1, tasks=tasks)
    done = run("convert_lerobot.py", "import", tmp_path / "set", tmp_path / "back")
    assert "preset ipec" in done.stdout
    assert "gripper commands 0 to 1, 0 closes (fingers agree to 100%)" in done.stdout
    assert "missing: simulator states" in done.stdout
    names = {path.name for path in (tmp_path / "back").iterdir()}
    assert names == {f"{TASK}_demo.hdf5", "turn_on_the_stove_left.hdf5"}
    loaded, description = load(tmp_path / "back", min_actions=1)
    assert [demo.task for demo in loaded] == [INSTRUCTIONS[1], INSTRUCTIONS[1], "turn on the stove (left)"]
    assert description["obs_alignment"] == "before" and description["image_size"] == 16
    for demo, episode in zip(loaded, episodes, strict=True):
        assert np.array_equal(demo.actions[:, 6], np.where(episode["closed"], 1, -1))
        assert np.array_equal(demo.actions[:, :6], episode["action"][:, :6])
        with h5py.File(demo.path) as file:
            obs = file["data"][demo.key]["obs"]
            assert np.array_equal(obs["joint_states"], episode["joints"])
            assert np.array_equal(obs["ee_pos"], episode["pose"][:, :3])
            assert np.array_equal(obs["agentview_rgb"], np.rot90(episode["agent"], 2, axes=(1, 2)))


def test_a_v21_set_of_videos_without_joints_is_read_and_what_is_missing_said(tmp_path):
    episodes = write_v21(tmp_path / "set", OPENPI, 1, -1, INSTRUCTIONS, videos=True, fps=10)
    done = run("convert_lerobot.py", "import", tmp_path / "set", tmp_path / "back")
    assert "preset physical-intelligence" in done.stdout
    assert "gripper commands -1 to 1, 1 closes" in done.stdout
    assert "10 frames a second, LIBERO has 20" in done.stdout
    assert "missing: joint angles" in done.stdout
    for task, episode in zip((OTHER_TASK, TASK), episodes, strict=True):
        with h5py.File(tmp_path / f"back/{task}_demo.hdf5") as file:
            obs = file["data/demo_0/obs"]
            assert "joint_states" not in obs
            assert np.array_equal(np.hstack([obs["ee_pos"], obs["ee_ori"], obs["gripper_states"]]), episode["state"])
            turned = np.rot90(episode["hand"], 2, axes=(1, 2)).astype(float)
            assert np.abs(obs["eye_in_hand_rgb"] - turned).mean() < 6
    demos, _ = load(tmp_path / "back", "data.robot_state=end_effector", min_actions=1)
    assert np.array_equal(np.hstack(list(demos[0].robot_state.values())), episodes[0]["state"])
    run("convert_lerobot.py", "export", tmp_path / "back", tmp_path / "again")
    assert (
        "observation.states.joint_state" not in json.loads((tmp_path / "again/meta/info.json").read_text())["features"]
    )


def test_unknown_features_are_listed_and_can_be_mapped(tmp_path):
    names = OPENPI | {"agent": "top", "state": "proprio"}
    (episode,) = write_v21(tmp_path / "set", names, 1, -1, INSTRUCTIONS[:1])
    sentence = refused(tmp_path / "set")
    assert "no preset knows its features (top [16, 16, 3]; wrist_image" in sentence
    assert "--key agentview_rgb=FEATURE" in sentence
    keys = [f"--key={key}" for key in (
        "agentview_rgb=top", "eye_in_hand_rgb=wrist_image", "actions=actions", "ee_states=proprio[0:6]",
        "gripper_states=proprio[6:8]",
    )]  # fmt: skip
    assert "--key gripper_states=FEATURE" in refused(tmp_path / "set", *keys[:-1])
    assert "--key agent=top" in refused(tmp_path / "set", "--key", "agent=top")
    wrong = [*keys[:-1], "--key=gripper_states=proprio[5:8]"]
    assert "proprio[5:8] has 3 numbers, gripper_states is of 2" in refused(tmp_path / "set", *wrong)
    run("convert_lerobot.py", "import", tmp_path / "set", tmp_path / "back", *keys, "--orientation", "raw")
    with h5py.File(tmp_path / f"back/{OTHER_TASK}_demo.hdf5") as file:
        assert np.array_equal(file["data/demo_0/obs/agentview_rgb"], episode["agent"])


def test_a_gripper_that_says_nothing_has_to_be_told(tmp_path):
    write_v21(tmp_path / "set", OPENPI, 1, 1, INSTRUCTIONS[:1])  # always the same command
    assert "--closes high or --closes low" in refused(tmp_path / "set")
    run("convert_lerobot.py", "import", tmp_path / "set", tmp_path / "back", "--closes", "low")
    with h5py.File(tmp_path / f"back/{OTHER_TASK}_demo.hdf5") as file:
        assert (file["data/demo_0/actions"][:, 6] == -1).all()


@pytest.mark.parametrize(("open_", "close"), [(-1, 1), (1, -1), (0, 1), (1, 0), (-0.9, 0.7)])
def test_fingers_tell_which_command_closes(open_, close):
    """Fingers answer two steps late, hold still at an object and are noisy."""
    rng, convention = np.random.default_rng(0), GripperConvention()
    for _ in range(3):
        closed = (np.arange(120) // 40) % 2 == 1
        opening = np.full(120, 0.04)
        for t in range(3, 120):
            opening[t] = np.clip(opening[t - 1] + (-0.004 if closed[t - 3] else 0.004), 0.015, 0.04)
        fingers = np.stack([opening, -opening], axis=1) + rng.normal(0, 2e-5, (120, 2))
        convention.add(np.where(closed, close, open_), fingers)
    high = convention.closing_is_high("set", None)
    assert high == (close > open_)
    assert convention.as_libero(np.array([open_, close]), high).tolist() == [-1, 1]


def test_fingers_that_contradict_themselves_are_refused():
    convention = GripperConvention()
    commands = np.where(np.arange(40) < 20, -1, 1)
    for sign in (1, -1):
        opening = 0.02 + sign * 0.001 * np.arange(40)
        convention.add(commands, np.stack([opening, -opening], axis=1))
    with pytest.raises(BadInput, match="cannot be found out"):
        convention.closing_is_high("set", None)


# ---------------------------------------------------------------------------------------------------------- bad input


def test_what_is_no_dataset_is_refused(tmp_path):
    (tmp_path / "set/meta").mkdir(parents=True)
    assert "expected meta/info.json" in refused(tmp_path / "set")
    (tmp_path / "set/meta/info.json").write_text("{")
    assert "is no JSON" in refused(tmp_path / "set")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"codebase_version": "v1.6"}, "codebase_version is 'v1.6', expected v3.0 or v2.1"),
        ({"fps": "fast"}, "fps is 'fast', expected int or float"),
        ({"features": []}, "features is [], expected dict"),
        ({"total_episodes": 7}, "says 7 episodes, but meta has 4"),
        ({"data_path": "../other/file-{file_index:03d}.parquet"}, "leaves the dataset"),
        ({"data_path": "/etc/{file_index}.parquet"}, "leaves the dataset"),
        ({"data_path": "data/{chunk_index.__class__}/x.parquet"}, "leaves the dataset or is no template"),
        ({"data_path": "data/{file_index:0999999999d}.parquet"}, "leaves the dataset or is no template"),
        ({"data_path": "data/{episode_index:06d}.parquet"}, "names {episode_index}, expected chunk_index, file_index"),
        ({"data_path": "data/file-{file_index}.parquet"}, "is missing, episode 0 should be in it"),
    ],
)
def test_metadata_that_is_wrong_is_named(changes, told, damaged):
    change_info(damaged, **changes)
    assert told in refused(damaged)


def rewrite(path: Path, change) -> None:
    table = change(pq.read_table(path))
    pq.write_table(table, path)


@pytest.mark.parametrize(
    ("file", "change", "told"),
    [
        ("data", lambda t: t.drop_columns(["action"]), "has no column action"),
        ("data", lambda t: t.slice(0, 30), "has 30 rows, but episode 2 should end at row 32"),
        (
            "data",
            lambda t: t.set_column(t.schema.get_field_index("episode_index"), "episode_index", t["index"]),
            "are not episode 0 alone",
        ),
        (
            "data",
            lambda t: t.set_column(t.schema.get_field_index("action"), "action", t["index"]),
            "episode 0: action is int64, expected 7 numbers a frame",
        ),
        ("episodes", lambda t: t.drop_columns(["dataset_from_index"]), "has no column dataset_from_index"),
        (
            "episodes",
            lambda t: t.set_column(t.schema.get_field_index("length"), "length", pa.array([11, 0, 11, 11])),
            "episode 1 has 0 frames, expected 1 to",
        ),
        (
            "episodes",
            lambda t: t.set_column(t.schema.get_field_index("length"), "length", pa.array([11, 1, 11, 11])),
            "episode 1 has 1 frame, expected at least 2",
        ),
        ("episodes", lambda t: t.slice(0, 0), "has no episodes"),
    ],
)
def test_tables_that_are_wrong_are_named(file, change, told, damaged):
    path = damaged / ("data" if file == "data" else "meta/episodes") / "chunk-000/file-000.parquet"
    rewrite(path, change)
    assert told in refused(damaged)


def test_a_truncated_table_is_named(damaged):
    path = damaged / "data/chunk-000/file-000.parquet"
    path.write_bytes(path.read_bytes()[:-500])
    sentence = refused(damaged)
    assert str(path) in sentence and "cannot be read as parquet" in sentence


def test_a_broken_picture_and_one_of_another_size_are_named_by_episode_and_frame(damaged):
    path = damaged / "data/chunk-000/file-000.parquet"
    table = pq.read_table(path)
    feature, place = "observation.images.image", table.schema.get_field_index("observation.images.image")
    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, "PNG")
    for content, told in (
        (b"no picture", "frame 2 is no readable PNG"),
        (stream.getvalue(), "frame 2 is (8, 8, 3)"),
        (None, "frame 2 has no bytes"),
    ):
        cells = table[feature].to_pylist()
        cells[STEPS - 1 + 2]["bytes"] = content
        pq.write_table(table.set_column(place, feature, pa.array(cells, table[feature].type)), path)
        sentence = refused(damaged)
        assert "episode 1" in sentence and told in sentence


def test_a_film_that_is_missing_cut_or_too_short_is_named(tmp_path):
    write_v21(tmp_path / "set", OPENPI, 1, -1, INSTRUCTIONS[:1], videos=True)
    path = tmp_path / "set/videos/chunk-000/image/episode_000000.mp4"
    whole = path.read_bytes()
    with av.open(str(path)) as container:
        film = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    write_film(path, film[:30], 20)
    assert "ends after 30 of the 40 frames of episode 0" in refused(tmp_path / "set")
    write_film(path, film, 25)
    assert "episode 0 has no frame at 0.050 s, its frame 1" in refused(tmp_path / "set")
    for content in (whole[: len(whole) // 2], b"no film at all"):
        path.write_bytes(content)
        sentence = refused(tmp_path / "set")
        assert str(path) in sentence and "cannot be decoded" in sentence
    path.unlink()
    assert "is missing, episode 0 should be in it" in refused(tmp_path / "set")


def test_values_that_are_not_finite_or_too_large_are_named(tmp_path):
    write_v21(tmp_path / "set", OPENPI, 1, -1, INSTRUCTIONS[:1])
    path = tmp_path / "set/data/chunk-000/episode_000000.parquet"
    table = pq.read_table(path)
    for value, told in ((np.nan, "actions holds NaN or infinite values in frame 3"), (5.0, "a pose delta of size 5")):
        actions = np.array(table["actions"].to_pylist(), np.float32)
        actions[3, 0] = value
        column = pa.FixedSizeListArray.from_arrays(pa.array(actions.ravel()), 7)
        pq.write_table(table.set_column(table.schema.get_field_index("actions"), "actions", column), path)
        assert told in refused(tmp_path / "set")


def test_an_export_without_poses_names_what_is_missing(tmp_path):
    write_task_file(tmp_path, TASK, demos=1, steps=STEPS)
    with h5py.File(tmp_path / f"{TASK}_demo.hdf5", "a") as file:
        for name in {"ee_pos", "ee_ori"} & file["data/demo_0/obs"].keys():
            del file[f"data/demo_0/obs/{name}"]
    sentence = one_sentence(run("convert_lerobot.py", "export", tmp_path, tmp_path / "dataset", expect=2))
    assert "demo_0" in sentence and "ee_pos is missing" in sentence


def test_a_file_that_says_its_alignment_needs_no_states(tmp_path):
    path = write_task_file(tmp_path, TASK, demos=2, steps=STEPS)
    with h5py.File(path, "a") as file:
        for demo in file["data"].values():
            del demo["states"]
        file["data"].attrs["obs_alignment"] = "after"
    demos, description = load(tmp_path, min_actions=1)
    assert description["obs_alignment"] == "after" and demos[0].lag == 1
    _, description = load(tmp_path, "data.obs_alignment=before", min_actions=1)  # the setting has the last word
    assert description["obs_alignment"] == "before"
    with h5py.File(path, "a") as file:
        file["data"].attrs["obs_alignment"] = "during"
    with pytest.raises(BadInput, match="attribute obs_alignment is 'during', expected before or after"):
        load(tmp_path, min_actions=1)
