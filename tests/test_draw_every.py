"""Demonstrations with pictures of every few steps alone: they give the samples of the whole film at these steps."""

import re
import shutil
from dataclasses import replace

import h5py
import numpy as np
import pytest
import torch
from broken_demos import settings as config_of
from broken_demos import verdict, write_embeddings
from helpers import CPU, batches_of, data_config, load, one_sentence, run, samples_of, small_config
from libero_files import leave_frames, write_task_file
from small_trainings import small

from dataloader import chunk_rows, transition_rows
from demos.frames import DeviceFrames, open_frames
from demos.hdf5 import drawn_rows, numbered_alone
from demos.states import by_row
from representation import prediction_errors
from statevla_model import build_trainer

EVERY, STEPS = 5, 33


@pytest.fixture
def whole(tmp_path):
    """A folder whose demos were drawn at every step."""
    (tmp_path / "whole").mkdir()
    write_task_file(tmp_path / "whole", steps=STEPS)
    write_embeddings(tmp_path / "whole")
    return tmp_path / "whole"


@pytest.fixture
def few(whole, tmp_path):
    """The same with every fifth picture."""
    shutil.copytree(whole, tmp_path / "few")
    leave_frames(next((tmp_path / "few").glob("*.hdf5")), EVERY)
    return tmp_path / "few"


def found_in(few):
    """What check_demos.py finds, which agrees with what training does."""
    return verdict(config_of(few, "model.prediction_gap=5"))


def steps_of(rows, demos):
    return [[int(row) - demo.first_row for row in rows if 0 <= row - demo.first_row < len(demo)] for demo in demos]


def test_samples_are_steps_that_were_drawn(few):
    demos, _ = load(few)
    assert [len(demo) for demo in demos] == [STEPS] * 3
    assert steps_of(drawn_rows(demos), demos) == [[0, 5, 10, 15, 20, 25, 30]] * 3
    assert steps_of(transition_rows(demos, EVERY), demos) == [[0, 5, 10, 15, 20, 25]] * 3
    assert steps_of(chunk_rows(demos, 10), demos) == [[0, 5, 10, 15, 20]] * 3  # actions 23 to 32 follow the step 22


@pytest.mark.parametrize("cache", ["none", "disk", "ram", "on the device"])
def test_a_sample_is_that_of_the_whole_film_at_its_step(whole, few, cache):
    films, _ = load(whole)
    demos, _ = load(few)
    config = data_config(few, f"data.cache={'ram' if cache == 'on the device' else cache}")
    frames = open_frames(demos, config, 32, CPU)
    frames = DeviceFrames(frames, CPU) if cache == "on the device" else frames
    for gap, rows in ((EVERY, transition_rows(demos, EVERY)), (0, chunk_rows(demos, 10))):
        options = {"gap": gap, "ahead": (1, 3)}
        expected = samples_of(batches_of(films, rows, 10 - gap, **options))
        found = samples_of(batches_of(demos, rows, 10 - gap, frames=frames, **options))
        assert len(found) == len(rows)
        for one, other in zip(found, expected, strict=True):
            assert_equal(one, other)


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if isinstance(value, dict):
            assert_equal(found[key], value)
        else:
            torch.testing.assert_close(found[key], value, rtol=0, atol=0, msg=key)


@pytest.mark.parametrize("cache", ["none", "disk"])
def test_a_step_without_a_picture_is_never_answered_with_another(few, cache):
    demos, _ = load(few)
    frames = open_frames(demos, data_config(few, f"data.cache={cache}"), 32, CPU)
    with pytest.raises(ValueError, match="not in range"):
        frames.read(np.array([7]), np.empty((1, *frames.frame_shape), np.uint8))
    if cache == "disk":
        with pytest.raises(IndexError):
            DeviceFrames(frames, CPU).at(torch.tensor([7]))


def test_states_are_known_where_there_was_something_to_see(few):
    demos, _ = load(few)
    seen = torch.arange(21.0)[:, None].expand(-1, 4)  # 7 frames of each demo
    z = by_row(seen, demos)
    assert z.shape == (3 * STEPS, 4)
    assert torch.equal(z[drawn_rows(demos)], seen)
    assert torch.equal(z.isfinite().all(dim=1).nonzero().flatten(), drawn_rows(demos))


def test_a_prediction_is_measured_from_the_steps_that_were_drawn(whole, few):
    """z adds up the actions' first coordinate, and so does the predictor, too far by a tenth."""
    model = build_trainer(small_config(f"model.prediction_gap={EVERY}"), 1).model
    model.state_encoder.predictor.forward = lambda z_t, actions: z_t + 1.1 * actions[:, :, 0].sum(1, keepdim=True)
    films, demos = (numbered_alone(load(folder)[0]) for folder in (whole, few))
    z = torch.cat([torch.cat([torch.zeros(1), demo.actions[demo.lag :, 0].cumsum(0)])[:STEPS] for demo in films])
    z = z[:, None].expand(-1, 32)
    errors = prediction_errors(model, z[drawn_rows(demos)], demos)
    assert errors.keys() == {"5", "10", "15", "20"}
    assert list(errors.values()) == pytest.approx([0.01] * 4, rel=1e-4)
    assert prediction_errors(model, z[:27], [replace(demo, draw_every=4) for demo in demos]) == {}  # 9 frames each


@pytest.mark.parametrize("phase, more", [(1, ()), (2, ()), (2, ("--set", "training.phase2.image_shift=2"))])
def test_both_phases_train_on_them(few, tmp_path, phase, more):
    changes = {f"training__phase{one}__num_epochs": 1 for one in (1, 2)}
    changes |= {"model__prediction_gap": EVERY, "training__batch_size": 5}
    start = ()
    for one in range(1, phase + 1):
        command = ("train.py", "--phase", one, *small(one, few, tmp_path / "run", **changes), *start)
        done = run(*command, *(more if one == phase else ()))
        start = ("--phase1_checkpoint", tmp_path / "run/phase1_temporal_jepa/checkpoint_latest.pt")
    assert "a picture every 5 steps" in done.stdout
    samples = {1: 12, 2: 10}[phase]  # of the two demos that are trained on: 6 each, 5 each
    assert f"phase {phase}: {samples} training samples" in done.stdout


def test_a_gap_that_ends_between_two_pictures_is_refused(few, tmp_path):
    command = ("train.py", "--phase", 1, *small(1, few, tmp_path / "run", model__prediction_gap=4))
    sentence = one_sentence(run(*command, expect=2))
    assert "demo_0: has a picture every 5 steps, and model.prediction_gap is 4; expected a multiple of 5" in sentence
    (told,) = verdict(config_of(few, "model.prediction_gap=4")).all_errors()
    assert told in sentence


@pytest.mark.parametrize(
    "said, sentence",
    [
        (4, r"key obs/agentview_rgb is uint8 \(7, 32, 32, 3\), expected uint8 \(9, h, w, 3\)"),
        (0, "attribute draw_every is 0, expected a whole number of steps, 1 to 33"),
        (34, "attribute draw_every is 34, expected a whole number of steps, 1 to 33"),
        (2.5, "attribute draw_every is 2.5, expected a whole number"),
        ("often", "attribute draw_every is 'often', expected a number"),
    ],
)
def test_what_a_file_says_wrongly_of_its_pictures_is_named(few, said, sentence):
    with h5py.File(next(few.glob("*.hdf5")), "a") as file:
        file["data/demo_1"].attrs["draw_every"] = said
    errors = found_in(few).all_errors()
    assert len(errors) == (2 if said == 4 else 1)  # a sentence for each camera
    assert re.search(f"demo_1: {sentence}", errors[0]), errors


def test_a_black_picture_is_named_by_its_step(few):
    path = next(few.glob("*.hdf5"))
    with h5py.File(path, "a") as file:
        file["data/demo_1/obs/eye_in_hand_rgb"][3] = 0
    (error,) = found_in(few).all_errors()
    assert "demo_1: key obs/eye_in_hand_rgb: the picture of step 15 is all black" in error


def test_they_are_no_episodes_of_lerobot(few, tmp_path):
    sentence = one_sentence(run("convert_lerobot.py", "export", few, tmp_path / "dataset", expect=2))
    assert "demo_0: has a picture every 5 steps, expected one of each" in sentence
