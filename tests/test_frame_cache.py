"""The flat files of frames, and the states z that phase 2 keeps: never stale, never half, written once."""

import errno
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers import CPU, LANGUAGE, batches_of, data_config, fitted, load, samples_of, small_config
from libero_files import write_task_file
from small_trainings import ranks_of

from dataloader import LowDimensional, every_frame, transition_rows
from demos.frames import DeviceFrames, FlatFrames, HDF5Frames, open_frames
from demos.hdf5 import drawn_rows
from demos.states import by_row, encode_drawn, frozen_states, states_key
from errors import BadInput
from jepa.tokenizer import resize_images
from statevla_model import build_trainer


def frames_of(directory, *overrides, image_size=32):
    demos, _ = load(directory, *overrides)
    return demos, open_frames(demos, data_config(directory, *overrides), image_size, CPU)


def all_frames(demos, frames) -> np.ndarray:
    out = np.empty((sum(len(demo) for demo in demos), *frames.frame_shape), np.uint8)
    frames.read(drawn_rows(demos).numpy(), out)
    return out


def cached(directory, suffix=".frames"):
    return sorted((directory / "frame_cache").glob(f"*{suffix}"))


@pytest.mark.parametrize("cache", ["disk", "ram"])
def test_cached_frames_are_those_of_the_hdf5_files(tmp_path, cache):
    write_task_file(tmp_path)
    write_task_file(tmp_path, task="pick_up_the_butter_and_place_it_in_the_basket", steps=21, seed=1)
    demos, frames = frames_of(tmp_path, f"data.cache={cache}")
    assert isinstance(frames, FlatFrames)
    np.testing.assert_array_equal(all_frames(demos, frames), all_frames(demos, HDF5Frames(demos, 32)))


def test_larger_pictures_are_stored_at_the_models_size_by_the_one_resize(tmp_path):
    write_task_file(tmp_path, image_size=48)
    demos, frames = frames_of(tmp_path)
    assert frames.frame_shape == (2, 32, 32, 3)
    source = torch.from_numpy(all_frames(demos, HDF5Frames(demos, 32))[:, 1])
    expected = resize_images(source, 32).permute(0, 2, 3, 1)
    np.testing.assert_array_equal(all_frames(demos, frames)[:, 1], expected)


def test_smaller_pictures_are_stored_as_they_are(tmp_path):
    write_task_file(tmp_path, image_size=16)
    assert frames_of(tmp_path)[1].frame_shape == (2, 16, 16, 3)
    assert cached(tmp_path)[0].stat().st_size == 90 * 2 * 16 * 16 * 3


def test_a_file_is_converted_once(tmp_path):
    write_task_file(tmp_path)
    frames_of(tmp_path)
    (flat,) = cached(tmp_path)
    written = flat.stat().st_mtime_ns
    frames_of(tmp_path)
    assert [path.stat().st_mtime_ns for path in cached(tmp_path)] == [written]


def test_a_changed_file_is_converted_anew_and_its_old_frames_are_deleted(tmp_path):
    path = write_task_file(tmp_path)
    frames_of(tmp_path)
    (before,) = cached(tmp_path)
    with h5py.File(path, "a") as file:
        file["data/demo_0/obs/agentview_rgb"][3, :, 1:] = 7
    os.utime(path, ns=(1, 1))  # even a time that lies further back is another time
    demos, frames = frames_of(tmp_path)
    (after,) = cached(tmp_path)
    assert after != before
    assert (all_frames(demos, frames)[3, 0, :, 1:] == 7).all()


def test_frames_that_another_user_made_of_a_file_are_left_to_them(tmp_path):
    path = write_task_file(tmp_path)
    frames_of(tmp_path)
    for made in (tmp_path / "frame_cache").iterdir():
        os.chown(made, 65534, -1) if os.geteuid() == 0 else pytest.skip("only root may give files away")
    os.utime(path, ns=(1, 1))
    frames_of(tmp_path)
    assert len(cached(tmp_path)) == 2


def put_into_parts(path) -> list:
    """Moves each demo of a file into a file of its own, which the first then links to: as a group, as a dataset, and as
    the part of a virtual dataset."""
    parts = [path.with_name(f"part_{number}.h5") for number in range(3)]
    with h5py.File(path, "a") as file:
        for number, part in enumerate(parts):
            with h5py.File(part, "w") as target:
                file.copy(f"data/demo_{number}", target, name="demo")
        del file["data/demo_0"]
        file["data/demo_0"] = h5py.ExternalLink(parts[0].name, "/demo")
        obs = file["data/demo_1/obs"]
        del obs["agentview_rgb"]
        obs["agentview_rgb"] = h5py.ExternalLink(parts[1].name, "/demo/obs/agentview_rgb")
        obs = file["data/demo_2/obs"]
        layout = h5py.VirtualLayout(obs["agentview_rgb"].shape, "u1")
        layout[:] = h5py.VirtualSource(parts[2].name, "/demo/obs/agentview_rgb", layout.shape)
        del obs["agentview_rgb"]
        obs.create_virtual_dataset("agentview_rgb", layout)
    return parts


@pytest.mark.parametrize("number", range(3))
def test_a_file_that_is_linked_to_is_noticed_when_it_changes(tmp_path, number):
    part = put_into_parts(write_task_file(tmp_path))[number]
    demos, before = frames_of(tmp_path)
    model, table = a_model(), LowDimensional(demos, LANGUAGE, CPU)
    key, (flat,) = states_key(model, demos, table.language), cached(tmp_path)
    with h5py.File(part, "a") as file:
        pictures = file["demo/obs/agentview_rgb"]
        pictures[...] = 255 - pictures[...]
    os.utime(part, ns=(1, 1))
    old = all_frames(demos, before)
    demos, after = frames_of(tmp_path)
    assert cached(tmp_path) != [flat] and len(cached(tmp_path)) == 1
    new = all_frames(demos, after)
    np.testing.assert_array_equal(new, all_frames(demos, HDF5Frames(demos, 32)))
    np.testing.assert_array_equal(new[30 * number : 30 * number + 30, 0], 255 - old[30 * number : 30 * number + 30, 0])
    assert states_key(model, demos, table.language) != key


def test_a_link_to_the_file_itself_has_the_same_frames(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    path = write_task_file(tmp_path / "elsewhere")
    (tmp_path / path.name).symlink_to(path)
    frames_of(tmp_path)
    os.utime(path, ns=(1, 1))
    frames_of(tmp_path)
    assert len(cached(tmp_path)) == 1


@pytest.mark.parametrize(
    "damage, sentence",
    [
        (lambda film: film.__setitem__(7, 0), "step 7 is all black"),
        (lambda film: film.__setitem__(slice(3, 12), film[3]), "steps 3 and 11 are the same although the arm moved"),
        (lambda film: film.__setitem__(7, np.array([9, 9, 0], np.uint8)), r"step 7 is all of one colour, \[9, 9, 0\]"),
    ],
)
def test_every_frame_is_looked_at_while_it_is_converted(tmp_path, damage, sentence):
    path = write_task_file(tmp_path)
    with h5py.File(path, "a") as file:
        damage(file["data/demo_1/obs/eye_in_hand_rgb"])
    demos, _ = load(tmp_path)  # which looks at the first, the middle and the last
    with pytest.raises(BadInput, match=f"{path}: demo_1: key obs/eye_in_hand_rgb: the pictures? of {sentence}"):
        open_frames(demos, data_config(tmp_path), 32, CPU)
    assert not cached(tmp_path) and not cached(tmp_path, ".part")


def test_a_camera_may_show_the_same_while_the_arm_stands_still(tmp_path):
    path = write_task_file(tmp_path)
    with h5py.File(path, "a") as file:
        demo = file["data/demo_1"]
        demo["states"][:, 1:8] = demo["states"][0, 1:8] + np.linspace(0, 0.05, 30)[:, None]
        demo["obs/joint_states"][:-1] = demo["states"][1:, 1:8]
        demo["obs/joint_states"][-1] = demo["states"][-1, 1:8]
        demo["obs/agentview_rgb"][...] = demo["obs/agentview_rgb"][0]
    frames_of(tmp_path)


def test_fewer_demos_and_another_size_have_files_of_their_own(tmp_path):
    write_task_file(tmp_path)
    frames_of(tmp_path)
    frames_of(tmp_path, "data.demos_per_task=2")
    frames_of(tmp_path, image_size=16)
    assert len(cached(tmp_path)) == 3
    index = json.loads(cached(tmp_path, ".json")[0].read_text())
    assert {"path", "bytes", "mtime_ns", "layout", "pixels", "demos"} <= index.keys()


def test_a_conversion_that_is_interrupted_leaves_nothing_that_could_be_taken_for_whole(tmp_path):
    path = write_task_file(tmp_path)
    demos, _ = load(tmp_path)
    with h5py.File(path, "a") as file:
        del file["data/demo_2/obs/eye_in_hand_rgb"]
    with pytest.raises(BadInput, match=f"{path}: demo_2: .*eye_in_hand_rgb"):
        open_frames(demos, data_config(tmp_path), 32, CPU)
    assert not cached(tmp_path) and not cached(tmp_path, ".part")


def test_a_truncated_flat_file_is_named(tmp_path):
    write_task_file(tmp_path)
    frames_of(tmp_path)
    (flat,) = cached(tmp_path)
    flat.write_bytes(flat.read_bytes()[:-100])
    with pytest.raises(BadInput, match=f"{flat}: has 552,860 bytes, expected 552,960; delete it"):
        frames_of(tmp_path)


def test_a_cache_directory_that_cannot_be_made_is_named(tmp_path):
    write_task_file(tmp_path)
    (tmp_path / "taken").write_text("a file, no folder")
    with pytest.raises(BadInput, match=r"taken: the frames of .* cannot be converted .*set data\.cache_directory"):
        frames_of(tmp_path, f"data.cache_directory={tmp_path / 'taken'}")


def test_a_disk_that_is_too_small_is_named_before_anything_is_written(tmp_path, monkeypatch):
    write_task_file(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(BadInput, match=r"take 0\.0 GB, but 0\.0 GB are free; set data\.cache_directory"):
        frames_of(tmp_path)
    assert not cached(tmp_path)


def test_frames_that_do_not_fit_into_memory_are_not_read_into_it(tmp_path, monkeypatch):
    write_task_file(tmp_path)
    monkeypatch.setattr("demos.frames.available_gigabytes", lambda: 1e-6)
    with pytest.raises(BadInput, match=r"data\.cache is ram, but the frames take 0\.0 GB .* use disk"):
        frames_of(tmp_path, "data.cache=ram")
    frames_of(tmp_path)


def test_the_gpu_cache_needs_a_gpu(tmp_path):
    write_task_file(tmp_path)
    with pytest.raises(BadInput, match=r"data\.cache is gpu, but the device is cpu"):
        frames_of(tmp_path, "data.cache=gpu")


def convert_and_report(rank: int, directory: Path, results: Path) -> None:
    demos, frames = frames_of(directory)
    (results / str(rank)).write_text(str(int(all_frames(demos, frames).sum(dtype=np.int64))))


@pytest.mark.slow
def test_processes_that_convert_at_once_agree_and_write_one_file(tmp_path):
    data, results = tmp_path / "data", tmp_path / "results"
    data.mkdir()
    results.mkdir()
    write_task_file(data, demos=6)
    ends = ranks_of(3, tmp_path / "said", convert_and_report, data, results)
    assert [code for code, _ in ends] == [0, 0, 0], ends
    demos, _ = load(data)
    expected = str(int(all_frames(demos, HDF5Frames(demos, 32)).sum(dtype=np.int64)))
    assert [path.read_text() for path in results.iterdir()] == [expected] * 3
    assert len(cached(data)) == 1


def test_where_files_cannot_be_locked_nobody_reads_half_a_conversion(tmp_path, monkeypatch, capsys):
    def cannot_lock(*arguments):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", cannot_lock)
    write_task_file(tmp_path, demos=6)
    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(lambda _: frames_of(tmp_path), range(3)))
    for demos, frames in results:
        np.testing.assert_array_equal(all_frames(demos, frames), all_frames(demos, HDF5Frames(demos, 32)))
    assert len(cached(tmp_path)) == 1 and not cached(tmp_path, ".part")
    assert "cannot lock files" in capsys.readouterr().out


def test_batches_from_cached_frames_equal_those_from_hdf5(tmp_path):
    write_task_file(tmp_path)
    demos, frames = frames_of(tmp_path)
    rows = transition_rows(demos, 5)
    for flat, direct in zip(
        samples_of(batches_of(demos, rows, 5, gap=5, seed=1, frames=frames)),
        samples_of(batches_of(demos, rows, 5, gap=5, seed=1)),
        strict=True,
    ):
        assert torch.equal(flat["next_obs"]["agentview_rgb"], direct["next_obs"]["agentview_rgb"])


def test_batches_from_frames_held_on_the_device_equal_those_that_are_read(tmp_path):
    write_task_file(tmp_path)
    demos, frames = frames_of(tmp_path)
    rows, held = transition_rows(demos, 5), DeviceFrames(frames, CPU)
    for there, read in zip(
        samples_of(batches_of(demos, rows, 5, gap=5, seed=1, frames=held)),
        samples_of(batches_of(demos, rows, 5, gap=5, seed=1, frames=frames)),
        strict=True,
    ):
        for name in ("obs", "next_obs"):
            assert there[name].keys() == read[name].keys()
            assert all(torch.equal(there[name][key], read[name][key]) for key in read[name])
        assert torch.equal(there["actions"], read["actions"])


# ---------------------------------------------------------------------------------------------------- states z


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def a_model(seed=0):
    torch.manual_seed(seed)
    return fitted(build_trainer(small_config(), 2).model).eval()


def states_of(model, directory, batch_size=16):
    """The states and whether the pictures were opened for them."""
    demos, _ = load(directory)
    opened = []

    def batches():
        opened.append(True)
        return every_frame(demos, table, HDF5Frames(demos, 32), batch_size)

    table = LowDimensional(demos, LANGUAGE, CPU)
    return frozen_states(model, demos, table.language, batches, directory / "frozen_states"), bool(opened)


def test_states_are_the_encoders_answers_and_are_computed_once(tmp_path, one_process):
    write_task_file(tmp_path)
    model = a_model()
    first, encoded = states_of(model, tmp_path)
    again, encoded_again = states_of(model, tmp_path)
    assert (encoded, encoded_again) == (True, False)
    assert torch.equal(first, again)
    demos, _ = load(tmp_path)
    for batch, stored in zip(batches_of(demos, drawn_rows(demos), 0), first.split(16), strict=True):
        torch.testing.assert_close(model.encode(batch["obs"]), stored)


def test_states_of_another_encoder_or_other_data_are_never_used(tmp_path, one_process):
    path = write_task_file(tmp_path)
    states_of(a_model(), tmp_path)
    changed = a_model()
    with torch.no_grad():
        changed.state_encoder.tokenizer.cls[0, 0, 0] += 1e-3
    assert states_of(changed, tmp_path)[1]
    policy_alone = a_model()
    with torch.no_grad():
        policy_alone.policy.positions += 1
    assert not states_of(policy_alone, tmp_path)[1]
    os.utime(path, ns=(1, 1))
    assert states_of(a_model(), tmp_path)[1]


def test_a_state_that_is_not_finite_is_named_and_not_kept(tmp_path, one_process):
    write_task_file(tmp_path)
    model = a_model()
    with torch.no_grad():
        model.state_encoder.tokenizer.cls.fill_(torch.nan)
    with pytest.raises(BadInput, match=r"not finite for 90 of 90 frames, the first .*demo_0 step 0"):
        states_of(model, tmp_path)
    assert not (tmp_path / "frozen_states").exists()


def test_a_damaged_file_of_states_is_computed_anew(tmp_path, one_process):
    write_task_file(tmp_path)
    states, _ = states_of(a_model(), tmp_path)
    (path,) = (tmp_path / "frozen_states").iterdir()
    path.write_bytes(path.read_bytes()[:-50])
    again, encoded = states_of(a_model(), tmp_path)
    assert encoded and torch.equal(states, again)


def test_the_key_of_states_depends_on_the_language(tmp_path):
    write_task_file(tmp_path)
    demos, _ = load(tmp_path)
    model, table = a_model(), LowDimensional(demos, LANGUAGE, CPU)
    before = states_key(model, demos, table.language)
    table.language[0, 0] += 0.01
    assert states_key(model, demos, table.language) != before


def test_losses_on_stored_states_are_those_of_encoding_anew(tmp_path):
    write_task_file(tmp_path)
    demos, _ = load(tmp_path)
    trainer = build_trainer(small_config(), 2)
    fitted(trainer.model)
    table = LowDimensional(demos, LANGUAGE, CPU)
    batches = every_frame(demos, table, HDF5Frames(demos, 32), 32)
    states = by_row(encode_drawn(trainer.model, demos, batches), demos)
    rows = transition_rows(demos, 10)
    losses = []
    for options in ({}, {"states": states}):
        torch.manual_seed(0)
        batches = batches_of(demos, rows, 10, seed=0, **options)
        losses.append(torch.stack([trainer(batch)["loss"].detach() for batch in batches]))
    torch.testing.assert_close(losses[0], losses[1])
