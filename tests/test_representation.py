"""What z knows: the truth is the simulator's, the probes find what is there and nothing else."""

from dataclasses import replace

import h5py
import numpy as np
import pytest
import torch
from helpers import load, one_sentence, run, settings, small_config
from libero_files import write_task_file

from demos.simulator_truth import simulator_truth
from errors import BadInput
from representation import all_probes, prediction_errors, probe, spread_within
from simulator.env import make_env
from simulator.suites import make_suite
from statevla_model import build_trainer


def test_the_truth_of_a_frame_is_what_the_simulator_shows_there(collected_demos):
    demo = load(collected_demos)[0][1]
    truth = simulator_truth(demo)
    env = make_env(make_suite("libero_object"), 6, 64, 0.2)
    with h5py.File(demo.path) as file:
        states = file["data"][demo.key]["states"][()]
    for t in (0, 40, len(demo) - 2):
        env.sim.set_state_from_flattened(states[t + 1])  # obs[t] was recorded after actions[t]
        env.sim.forward()
        for name, body in (("target", "butter_1_main"), ("goal", "basket_1_main")):
            np.testing.assert_allclose(truth[name][t], env.sim.data.get_body_xpos(body), atol=1e-6)
        hand = env.sim.data.site_xpos[env.sim.model.site_name2id("gripper0_grip_site")]
        np.testing.assert_allclose(truth["end_effector"][t], hand, atol=0.01)  # read 2 ms before the end of the step
    env.close()
    assert truth["target"][-1].isnan().all()
    lifted = truth["target"][:-1, 2].max() - truth["target"][0, 2]
    assert lifted > 0.1


def test_probes_find_a_planted_position_and_nothing_in_noise():
    torch.manual_seed(0)
    position = torch.randn(2000, 3) * 0.05
    noise = torch.randn(2000, 32)
    linear = noise + torch.nn.functional.pad(position, (0, 29)) @ torch.randn(32, 32) * 400
    bent = torch.cat([(position * 15).sin(), (position * 15).cos(), noise[:, :4] * 0.01], dim=1)
    one_task = torch.zeros(2000)
    found = probe(linear, position, one_task, split=1500)
    assert found["linear"]["mm"] < 8 and min(found["linear"]["r2"]) > 0.98
    assert found["mm_of_mean"] == pytest.approx(1000 * position[1500:].norm(dim=1).mean().item(), rel=0.02)
    curved = probe(bent, position, one_task, split=1500)
    assert curved["mlp"]["mm"] < 0.3 * curved["linear"]["mm"]
    nothing = probe(noise, position, one_task, split=1500)
    assert max(nothing["linear"]["r2"]) < 0.05


def test_telling_the_tasks_apart_earns_nothing():
    torch.manual_seed(0)
    task = torch.arange(2000) % 4
    position = task[:, None] * 0.2 + torch.randn(2000, 2) * 0.01  # tasks lie 20 cm apart, their targets move by 1 cm
    z = torch.nn.functional.one_hot(task, 4) + torch.randn(2000, 4) * 0.001
    found = probe(z, position, task, split=1500)
    assert max(found["linear"]["r2"]) < 0.05
    assert found["linear"]["mm"] == pytest.approx(found["mm_of_mean"], rel=0.05) and 10 < found["mm_of_mean"] < 15


def test_probes_ignore_frames_without_truth_and_frames_left_out():
    torch.manual_seed(0)
    z = torch.randn(400, 8)
    truth = z[:, :2].clone()
    truth[50] = torch.nan
    among = torch.ones(400, dtype=torch.bool)
    truth[320:], among[320:] = 1e6, False
    assert probe(z, truth, torch.zeros(400), 300, among)["linear"]["mm"] < 20  # of a spread of 1,250


def test_a_z_whose_errors_of_hand_and_target_cancel_knows_the_way_alone():
    torch.manual_seed(0)
    episodes, frames, lifted = 60, 20, 5
    target = (0.1 * torch.randn(episodes, 1, 3)).repeat(1, frames, 1)
    target[:, -lifted:] += 0.1  # where it is in the hand, and nothing is aimed at any more
    hand, error = 0.1 * torch.randn(episodes, frames, 3), 0.02 * torch.randn(episodes, frames, 3)
    z = torch.cat([target + error, hand + error], dim=2).flatten(0, 1)
    truths = [{"target": one, "end_effector": other} for one, other in zip(target, hand, strict=True)]
    found = all_probes({"z": z}, truths, torch.zeros(len(z)), split=50 * frames)["z"]
    assert found["way to the target before the grasp"]["linear"]["mm"] < 2
    assert found["target before the grasp"]["linear"]["mm"] > 15 < found["end_effector"]["linear"]["mm"]


def test_a_coordinate_that_does_not_vary_has_no_r2():
    z = torch.randn(100, 4)
    assert probe(z, torch.zeros(100, 1), torch.zeros(100), split=80)["linear"]["r2"] == [None]


def test_predicting_no_change_has_exactly_the_error_of_copying(collected_demos):
    demos = [replace(demo, lag=1) for demo in load(collected_demos)[0]]
    z = torch.randn(sum(len(demo) for demo in demos), 32)
    for gap, horizons in ((1, ["1", "2", "3", "5", "10", "15", "20"]), (5, ["5", "10", "15", "20"])):
        model = build_trainer(small_config(f"model.prediction_gap={gap}"), 1).model  # its last layer starts at zero
        errors = prediction_errors(model, z, demos)
        assert list(errors) == horizons
        assert list(errors.values()) == pytest.approx([1.0] * len(horizons))


def test_the_right_predictor_has_no_error_at_any_horizon(collected_demos):
    """z adds up the actions' first coordinate, and so does the predictor."""
    demos, _ = load(collected_demos)
    z = []
    for demo in demos:
        following = torch.roll(demo.actions[:, 0], -demo.lag)
        z.append(torch.cat([torch.zeros(1), following.cumsum(0)[:-1]])[:, None].expand(-1, 32))
    model = build_trainer(small_config("model.prediction_gap=5"), 1).model
    model.state_encoder.predictor.forward = lambda z_t, actions: z_t + actions[:, :, 0].sum(1, keepdim=True)
    assert max(prediction_errors(model, torch.cat(z), demos).values()) < 1e-9


def test_variance_within_episodes_is_what_happens_in_them(collected_demos):
    demos, _ = load(collected_demos)
    identity = torch.cat([torch.full((len(demo), 4), float(i)) for i, demo in enumerate(demos)])
    shares = spread_within(identity, demos)
    assert shares["variance_within_episode"] == pytest.approx(0, abs=1e-6)
    assert shares["variance_within_task"] == pytest.approx(1, rel=1e-4)
    assert spread_within(torch.randn(len(identity), 4), demos)["variance_within_episode"] > 0.95


def test_a_z_that_never_varies_has_no_variance_within_anything(collected_demos):
    demos, _ = load(collected_demos)
    z = torch.ones(sum(len(demo) for demo in demos), 4)
    assert set(spread_within(z, demos).values()) == {0.0}


def test_variance_within_a_task_is_that_within_a_file_and_not_within_an_instruction(tmp_path):
    for scene in (3, 9):
        write_task_file(tmp_path, task=f"KITCHEN_SCENE{scene}_turn_on_the_stove", demos=2)
    demos, _ = load(tmp_path)
    scene = torch.cat([torch.full((len(demo), 2), float(demo.path == demos[0].path)) for demo in demos])
    assert spread_within(scene, demos)["variance_within_task"] == pytest.approx(0, abs=1e-6)


def test_probes_without_frames_to_fit_or_to_try_say_so():
    z, truth, among = torch.randn(20, 4), torch.randn(20, 2), torch.zeros(20, dtype=torch.bool)
    among[0] = among[15] = True
    with pytest.raises(
        BadInput, match="1 training frames and 1 held-out frames whose truth is known, expected at least"
    ):
        probe(z, truth, torch.zeros(20), 10, among)


def test_files_without_what_the_probes_need_are_named(collected_demos, tmp_path):
    source = load(collected_demos)[0][0]
    broken = tmp_path / source.path.name
    broken.write_bytes(source.path.read_bytes())
    for value, sentence in (
        (None, "attribute model_file is missing, the probes need it"),
        ("<mujoco", "attribute model_file is no MuJoCo model"),
        ("<mujoco/>", "its target butter_1 is no object that moves freely"),
        (
            "<mujoco><worldbody><body><joint type='x'/></body></worldbody></mujoco>",
            "attribute model_file is no MuJoCo model .*invalid keyword: 'x'",
        ),
    ):
        with h5py.File(broken, "a") as file:
            file["data/demo_0"].attrs.pop("model_file", None)
            if value:
                file["data/demo_0"].attrs["model_file"] = value
        with pytest.raises(BadInput, match=f"{broken}: demo_0: {sentence}"):
            simulator_truth(replace(source, path=broken))


def test_a_phase1_checkpoint_is_reported_from_the_command_line(collected_demos, tmp_path):
    run("embed_language.py", "--data_directory", collected_demos, "--encoder", "offline")
    both = settings(data__data_directory=collected_demos, training__checkpoint_directory=tmp_path)
    both += ["--set", "data.train_split=0.5", "--set", "training.phase1.num_epochs=1", "--set", "data.cache=none"]
    run("train.py", "--phase", 1, *both)
    checkpoint = tmp_path / "phase1_temporal_jepa/checkpoint_best.pt"
    said = run("eval.py", "--checkpoint", checkpoint, "--output", tmp_path / "report.json").stdout
    for words in (
        "effective rank",
        "target before the grasp, proprioception masked",
        "way to the target before the grasp ",
        "share of copying z",
    ):
        assert words in said
    picture = tmp_path / "phase1_temporal_jepa/representation.png"
    assert picture.stat().st_size > 50_000
    said = one_sentence(run("run_libero_eval.py", "--checkpoint", checkpoint, expect=2))
    assert "expected a checkpoint of phase 2" in said
