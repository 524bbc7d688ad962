"""The eye that looks for what the words ask for: its labels, what teaches it, and that words choose."""

import signal
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from helpers import CPU, LANGUAGE, batches_of, load, one_sentence, phase1_batch, random_observation, run, small_config
from small_trainings import assert_same_run, lines_of, ranks_of, send, small, trained
from torch import Tensor
from torch.nn.functional import normalize

from dataloader import shift_pictures, transition_rows
from demos.language import LanguageTable
from demos.scenes import load_scenes
from demos.simulator_truth import simulator_truth, target_on_pictures
from errors import BadInput
from jepa.gaze import FOUND_WITHIN, Gaze, cell_middles, found, gaze_loss, grid_of
from observation import CAMERAS, SIMULATOR_KEYS, STATE_WIDTHS
from simulator.env import make_env
from simulator.suites import make_suite
from statevla_model import StateVLATrainer, build_trainer, component_table, load_encoder
from training.data import labels_of
from training.run_log import PHASE_DIRECTORIES

NEEDED = "gaze needs it"


# ------------------------------------------------------------------------------------------------------------ labels


def test_a_label_is_where_the_object_appears_on_the_picture(collected_demos):
    """Without the object the picture changes where it was, and there is the label."""
    demo = load(collected_demos)[0][1]
    labels = target_on_pictures(demo, NEEDED)
    with h5py.File(demo.path) as file:
        states = file["data"][demo.key]["states"][()]
    env = make_env(make_suite("libero_object"), 6, 128, 0.2)
    joint = env.domain.objects_dict["butter_1"].joints[-1]
    seen = 0
    for t in (0, 15, 30):  # before the fingers hide it
        pictures = []
        for height in (0, 50):
            env.sim.set_state_from_flattened(states[t + 1])  # obs[t] was recorded after actions[t]
            pose = env.sim.data.get_joint_qpos(joint)
            env.sim.data.set_joint_qpos(joint, np.append(pose[:2], [pose[2] + height, *pose[3:]]))
            env.sim.forward()
            env._read_sensors_anew()
            pictures.append(env.observe())
        for camera, (right, up) in zip(CAMERAS, labels[t].tolist(), strict=True):
            with_it, without = (picture[SIMULATOR_KEYS[camera]].astype(int) for picture in pictures)
            rows, columns = np.nonzero(np.abs(with_it - without).sum(axis=2) > 30)
            if abs(right) < 0.9 and abs(up) < 0.9 and len(rows) > 20:
                middle = (np.array([columns.mean(), rows.mean()]) + 0.5) / 64 - 1
                np.testing.assert_allclose([right, up], middle, atol=0.12)  # what hides it and its shape shift it
                seen += 1
    env.close()
    assert seen >= 4
    assert labels[-1].isnan().all()  # it would show a state after the last one


def test_files_without_labels_are_named_and_can_do_without(collected_demos, tmp_path):
    source = load(collected_demos)[0][0]
    broken = tmp_path / source.path.name
    broken.write_bytes(source.path.read_bytes())
    demo = replace(source, path=broken)
    with h5py.File(broken, "a") as file:
        model = file["data/demo_0"].attrs["model_file"]
        file["data/demo_0"].attrs["model_file"] = model.replace('"agentview"', '"another"')
    with pytest.raises(BadInput, match=f"{broken}: demo_0: attribute model_file has no camera agentview, {NEEDED}"):
        target_on_pictures(demo, NEEDED)
    with h5py.File(broken, "a") as file:
        del file["data/demo_0/states"]
    with pytest.raises(BadInput, match=f"{broken}: demo_0: key states is missing, {NEEDED}"):
        target_on_pictures(demo, NEEDED)


@pytest.mark.parametrize("pixels", [32, 64])
def test_a_label_moves_with_its_picture(pixels):
    torch.manual_seed(0)
    rows, columns = torch.randint(pixels // 4, 3 * pixels // 4, (2, 40))
    pictures = torch.zeros(40, pixels, pixels, 3, dtype=torch.uint8)
    pictures[torch.arange(40), rows, columns] = 255
    at = (torch.stack([columns, rows], dim=1) + 0.5) / pixels * 2 - 1
    scenes = dict.fromkeys(CAMERAS, pictures) | {"language": torch.zeros(40, 1)}
    batch = {"obs": dict.fromkeys(CAMERAS, pictures), "actions": torch.zeros(40, 1, 7)}
    at = at[:, None].expand(-1, 2, -1)
    batch |= {"target_at": at, "scenes": scenes | {"target_at": at}}
    moved = shift_pictures(batch, 4, image_size=32)
    assert (moved["target_at"] != at).any() and (moved["target_at"] != moved["scenes"]["target_at"]).any()
    for obs, labels in ((moved["obs"], moved["target_at"]), (moved["scenes"], moved["scenes"]["target_at"])):
        for k, camera in enumerate(CAMERAS):
            sample, row, column = obs[camera].sum(dim=-1).nonzero().unbind(dim=1)
            assert sample.tolist() == list(range(40))
            shown = (torch.stack([column, row], dim=1) + 0.5) / pixels * 2 - 1
            torch.testing.assert_close(labels[:, k], shown)


# ------------------------------------------------------------------------------------------------------------ the eye


@pytest.mark.parametrize(("pixels", "cells"), [(16, 16), (32, 16), (64, 16), (96, 24), (128, 16), (224, 14)])
def test_the_grid_is_as_coarse_as_the_guides_patches_or_finer(pixels, cells):
    halvings, side = grid_of(pixels)
    assert side == cells == pixels >> halvings
    eye = Gaze(pixels, embed_dim=8, lang_emb_dim=16)
    look = eye(torch.zeros(2, 3, pixels, pixels, dtype=torch.uint8), torch.ones(2, 16))
    assert look.token.shape == (2, 1, 8) and look.scores.shape == (2, cells**2)


def test_the_loss_is_the_divergence_from_a_bump_where_the_object_is():
    cells = cell_middles(16)
    at = torch.tensor([[0.3, -0.5], [-0.9, 0.1], [1.2, 0.0], [torch.nan, 0.0]])
    bumps = (-(at[:, None] - cells).square().sum(dim=2) / (2 * 0.07**2)).nan_to_num()
    assert gaze_loss(bumps, at, cells).abs().max() < 1e-5
    scores = torch.randn(4, 256, requires_grad=True)
    losses = gaze_loss(scores, at, cells)
    p, q = bumps.double().softmax(dim=1), scores.double().softmax(dim=1)
    expected = torch.special.xlogy(p, p).sub(torch.special.xlogy(p, q)).sum(dim=1)
    torch.testing.assert_close(losses[:2].double(), expected[:2])
    assert losses[2:].tolist() == [0, 0]  # not on the picture, not known
    losses.sum().backward()
    assert scores.grad.isfinite().all() and scores.grad[2:].abs().sum() == 0
    assert found(bumps, at, cells)[:2].tolist() == [1, 1]
    beside = at + torch.tensor([0.0, FOUND_WITHIN + 0.1])
    assert found(bumps, beside, cells)[:2].tolist() == [0, 0]


def scenes_of_squares(count: int) -> tuple[Tensor, Tensor]:
    """Pictures (n, 3, 32, 32) of a red and a green square at random, and where each is, (n, 2, 2)."""
    pictures = torch.randint(0, 60, (count, 3, 32, 32), dtype=torch.uint8)
    corners = torch.randint(0, 28, (count, 2, 2))  # column and row of each
    for n in range(count):
        for colour, (column, row) in enumerate(corners[n].tolist()):
            pictures[n, :, row : row + 4, column : column + 4] = 0
            pictures[n, colour, row : row + 4, column : column + 4] = 255
    return pictures, (corners + 2) / 16 - 1


def test_words_choose_what_the_eye_finds_on_pictures_that_it_never_saw():
    torch.manual_seed(0)
    words = normalize(torch.randn(2, 512), dim=1)
    eye = Gaze(32, embed_dim=32, lang_emb_dim=512)
    optimizer = torch.optim.AdamW(eye.parameters(), lr=4e-3)
    for _ in range(50):
        pictures, places = scenes_of_squares(24)
        asked = torch.randint(0, 2, (24,))
        look = eye(pictures, words[asked])
        gaze_loss(look.scores, places[torch.arange(24), asked], eye.cells).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    pictures, places = scenes_of_squares(200)
    apart = (places[:, 0] - places[:, 1]).norm(dim=1) > 2 * FOUND_WITHIN
    for asked in (0, 1):
        scores = eye(pictures, words[asked].expand(200, -1)).scores
        assert found(scores, places[:, asked], eye.cells)[apart].mean() > 0.9
        assert found(scores, places[:, 1 - asked], eye.cells)[apart].mean() < 0.1


# ------------------------------------------------------------------------------------------------------- in the model


def taught_batch(rows: int = 4) -> dict:
    def labels() -> dict:
        return {
            "target_at": torch.rand(rows, 2, 2) * 2.4 - 1.2,
            "target_place": torch.randn(rows, 3),
            "goal_place": torch.randn(rows, 3),
            "end_effector_place": torch.randn(rows, 3),
        }

    return phase1_batch(rows) | labels() | {"scenes": random_observation(rows) | labels()}


@pytest.mark.parametrize(
    ("place_of", "others"), [("target_and_goal", ["goal"]), ("target_goal_and_hand", ["goal", "end_effector"])]
)
def test_goal_and_hand_are_told_beside_the_target_and_nothing_is_learnt_where_one_is_not_known(place_of, others):
    torch.manual_seed(0)
    weights = ("training.phase1.place_weight=1", f"training.phase1.place_of={place_of}")
    trainer = build_trainer(small_config(*weights), phase=1)
    batch = taught_batch(6)
    del batch["scenes"]
    batch["goal_place"][4] = torch.nan
    truth = torch.cat([batch[f"{name}_place"] for name in ("target", *others)], dim=1)
    trainer.place_normalizer.fit(truth[truth.isfinite().all(dim=1)])
    loss = trainer(batch)["place"]
    errors = trainer.place(trainer.model.encode(batch["obs"])) - trainer.place_normalizer.normalize(truth)
    torch.testing.assert_close(loss, errors.square()[truth.isfinite()].mean())
    loss.backward()
    assert all(weight.grad.isfinite().all() for weight in trainer.place.parameters())
    assert (trainer.place.bias.grad[3:] != 0).all()


def test_place_is_told_linearly_from_z_on_demonstrations_and_scenes():
    torch.manual_seed(0)
    weights = ("training.phase1.place_weight=2", "training.phase1.place_scenes_weight=3")
    trainer = build_trainer(small_config("model.gaze=true", *weights), phase=1)
    trainer.place_normalizer.fit(torch.tensor([[0.0, 1.0, 2.0], [2.0, 3.0, 6.0]]))  # means 1, 2, 4 and stds 1, 1, 2
    batch = taught_batch(6)
    batch["target_place"][2] = torch.nan  # a frame that no state belongs to
    losses = trainer(batch)
    encoder = trainer.model.state_encoder
    truth = (batch["target_place"] - torch.tensor([1.0, 2, 4])) / torch.tensor([1.0, 1, 2])
    errors = (trainer.place(encoder(batch["obs"])) - truth).square()
    torch.testing.assert_close(losses["place"], errors[[0, 1, 3, 4, 5]].mean())
    hidden = torch.ones(6, dtype=torch.bool)  # of a scene the arm is not told
    truth = (batch["scenes"]["target_place"] - torch.tensor([1.0, 2, 4])) / torch.tensor([1.0, 1, 2])
    errors = (trainer.place(encoder(batch["scenes"], hidden)) - truth).square()
    torch.testing.assert_close(losses["place_scenes"], errors.mean())
    without = build_trainer(small_config("model.gaze=true"), phase=1)
    without.load_state_dict(trainer.state_dict(), strict=False)
    with torch.no_grad():
        expected = without(batch)["loss"] + 2 * losses["place"] + 3 * losses["place_scenes"]
    torch.testing.assert_close(losses["loss"].detach(), expected.detach())


def test_gaze_is_two_tokens_before_cls_and_is_off_in_the_guides_model():
    plain = build_trainer(small_config(), phase=1).model
    with_gaze = build_trainer(small_config("model.gaze=true"), phase=1).model
    obs = random_observation(3)
    plain_tokens, tokens = (model.state_encoder.tokenizer(obs) for model in (plain, with_gaze))
    assert tokens.shape[1] == plain_tokens.shape[1] + 2
    tokenizer = with_gaze.state_encoder.tokenizer
    for place, look in zip((-3, -2), tokenizer.looks(obs), strict=True):
        torch.testing.assert_close(tokens[:, place], look.token.squeeze(1))
    torch.testing.assert_close(tokens[:, -1], tokenizer.cls.expand(3, 1, -1).squeeze(1))
    assert "Gaze" in component_table(with_gaze) and "Gaze" not in component_table(plain)


def test_both_losses_of_gaze_teach_its_eyes_and_a_weight_of_zero_needs_no_label():
    torch.manual_seed(0)
    trainer = build_trainer(small_config("model.gaze=true"), phase=1)
    batch = taught_batch()
    losses = trainer(batch)
    only_gaze = 0.3 * losses["gaze"] + 0.3 * losses["gaze_scenes"]
    others = (
        losses["jepa_mse"] + losses["jepa_variance"] + 0.04 * losses["jepa_covariance"] + losses["inverse_dynamics"]
    )
    torch.testing.assert_close(losses["loss"], only_gaze + others)
    eyes = trainer.model.state_encoder.tokenizer.eyes
    for name in ("gaze", "gaze_scenes"):
        trainer.zero_grad()
        losses[name].backward(retain_graph=True)
        assert all(eye.stem[0].weight.grad.abs().sum() > 0 for eye in eyes)
    unlabelled = build_trainer(
        small_config("model.gaze=true", "training.phase1.gaze_weight=0", "training.phase1.gaze_scenes_weight=0"), 1
    )
    losses = unlabelled(phase1_batch())
    assert not {"gaze", "gaze_scenes"} & losses.keys()
    losses["loss"].backward()  # prediction teaches them alone
    assert all(eye.score.weight.grad.abs().sum() > 0 for eye in unlabelled.model.state_encoder.tokenizer.eyes)


def test_a_step_over_two_batches_has_the_losses_of_their_joint_batch():
    torch.manual_seed(0)
    places = ("training.phase1.place_weight=1", "training.phase1.place_scenes_weight=1")
    trainer = build_trainer(small_config("model.gaze=true", *places), phase=1)
    trainer.place_normalizer.fit(torch.randn(10, 3))
    joint = taught_batch(8)

    def half(values, rows):
        return {k: half(v, rows) for k, v in values.items()} if isinstance(values, dict) else values[rows]

    expected = trainer(joint)
    got = trainer(half(joint, slice(0, 3)), half(joint, slice(3, 8)))
    for name in ("gaze", "gaze_scenes", "place", "place_scenes", "loss"):
        torch.testing.assert_close(got[name], expected[name])


def test_phase2_takes_over_the_eyes():
    phase1 = build_trainer(small_config("model.gaze=true"), phase=1)
    phase2 = build_trainer(small_config("model.gaze=true"), phase=2)
    load_encoder(phase2.model, {"model_state_dict": phase1.state_dict()}, "a checkpoint")
    obs = random_observation(2)
    torch.testing.assert_close(phase2.model.encode(obs), phase1.model.encode(obs))
    assert not any(parameter.requires_grad for parameter in phase2.model.state_encoder.tokenizer.eyes.parameters())


# ------------------------------------------------------------------------------------------------------------- scenes


@pytest.fixture
def scenes_file(collected_demos, tmp_path) -> Path:
    """A file as collect_demos.py --scenes writes it, of the frames of a demonstration."""
    demo = load(collected_demos)[0][0]
    path = tmp_path / "OBJECT_SCENE7_scenes.hdf5"
    with h5py.File(demo.path) as source, h5py.File(path, "w") as file:
        group = source["data"][demo.key]
        file["states"] = group["states"][1:]
        for camera in CAMERAS:
            file[camera] = group["obs"][camera][:-1]
        file.attrs["model_file"] = group.attrs["model_file"]
        file.attrs["bddl_file_content"] = "(:obj_of_interest butter_1 basket_1)"
        words = "pick up the {} and place it in the basket"
        file.attrs["instructions"] = (
            f'{{"butter_1": "{words.format("butter")}", "tomato_sauce_1": "{words.format("tomato sauce")}"}}'
        )
    return path


def two_instructions() -> LanguageTable:
    words = [f"pick up the {name} and place it in the basket" for name in ("butter", "tomato sauce")]
    return LanguageTable("test encoder", dict(zip(words, normalize(torch.randn(2, 512), dim=1), strict=True)))


def test_a_scene_asks_for_one_of_its_objects_and_says_where_it_is(collected_demos, scenes_file):
    language = two_instructions()
    scenes = load_scenes(scenes_file.parent, 32, language)
    demo = load(collected_demos)[0][0]
    assert len(scenes) == len(demo) - 1
    torch.testing.assert_close(scenes.at[:, :, 0], target_on_pictures(demo, NEEDED)[:-1], equal_nan=True)
    torch.testing.assert_close(scenes.goals, simulator_truth(demo, NEEDED)["goal"][:-1], equal_nan=True)
    torch.manual_seed(0)
    drawn = scenes.draw(64, CPU)
    torch.testing.assert_close(drawn["end_effector_place"], drawn["ee_pos"])
    assert drawn["agentview_rgb"].shape == (64, 32, 32, 3)
    asked = (drawn["language"] @ torch.stack(list(language.embeddings.values())).T).argmax(dim=1)
    assert {*asked.tolist()} == {0, 1}  # its own task's and another
    for n in range(64):
        same = (scenes.pictures["agentview_rgb"] == drawn["agentview_rgb"][n]).all(dim=(1, 2, 3)).nonzero().squeeze(1)
        torch.testing.assert_close(scenes.at[same[0], :, asked[n]], drawn["target_at"][n], equal_nan=True)


def test_the_hand_of_a_demonstration_is_where_its_file_has_it(collected_demos):
    trainer = build_trainer(
        small_config("training.phase1.place_weight=1", "training.phase1.place_of=target_goal_and_hand"), phase=1
    )
    demos = load(collected_demos)[0]
    labels = labels_of(trainer, demos)
    assert list(labels) == ["target_place", "goal_place", "end_effector_place"]
    for demo in demos:
        with h5py.File(demo.path) as file:
            hand = torch.from_numpy(file["data"][demo.key]["obs/ee_pos"][()]).float()
        rows = slice(demo.first_row, demo.first_row + len(demo))
        torch.testing.assert_close(labels["end_effector_place"][rows], hand)


def test_the_arm_of_a_scene_stands_as_the_simulator_said(collected_demos, scenes_file):
    """The arm of these frames moves, and LIBERO says where its hand is 2 ms late. test_scenes.py has some at rest."""
    within = {"ee_pos": 0.003, "ee_ori": 0.02}  # metres and rad
    scenes, demo = load_scenes(scenes_file.parent, 32, two_instructions()), load(collected_demos)[0][0]
    with h5py.File(demo.path) as file:
        seen = {part: torch.from_numpy(file["data"][demo.key]["obs"][part][:-1]).float() for part in STATE_WIDTHS}
    assert scenes.robot_state.keys() == seen.keys()
    for part, values in seen.items():
        torch.testing.assert_close(scenes.robot_state[part], values, atol=within.get(part, 1e-5), rtol=0, msg=part)


def test_scenes_that_cannot_be_used_are_named(scenes_file):
    folder = scenes_file.parent
    with pytest.raises(BadInput, match=f"no .* in {folder}/none; `python collect_demos.py --scenes`"):
        load_scenes(folder / "none", 32, two_instructions())
    with pytest.raises(BadInput, match=r"asks to 'pick up the butter .*', which has no embedding"):
        load_scenes(folder, 32, LANGUAGE)
    with h5py.File(scenes_file, "a") as file:
        file.attrs["instructions"] = "[]"
    with pytest.raises(BadInput, match=f"{scenes_file}: attribute instructions is no JSON"):
        load_scenes(folder, 32, two_instructions())
    with h5py.File(scenes_file, "a") as file:
        del file["states"]
    with pytest.raises(BadInput, match=f"{scenes_file}: key states is missing"):
        load_scenes(folder, 32, two_instructions())


def test_a_batch_brings_labels_of_its_own_rows_and_half_as_many_scenes(collected_demos, scenes_file):
    demos = load(collected_demos)[0]
    targets = torch.cat([target_on_pictures(demo, NEEDED) for demo in demos])
    language = two_instructions()
    rows = transition_rows(demos, 5)
    scenes = load_scenes(scenes_file.parent, 32, language)
    batches = batches_of(demos, rows, 5, language=language, labels={"target_at": targets}, scenes=scenes, gap=5)
    for batch, own in zip(batches, rows.split(16), strict=True):
        torch.testing.assert_close(batch["target_at"], targets[own], equal_nan=True)
        assert len(batch["scenes"]["language"]) == -(-len(own) // 2)


@pytest.mark.slow
def test_a_training_on_scenes_that_was_stopped_goes_on_as_if_it_had_not_been(collected_demos, scenes_file, tmp_path):
    embeddings, words = tmp_path / "language.npz", two_instructions().embeddings
    vectors = torch.stack(list(words.values())).numpy()
    np.savez(embeddings, texts=list(words), embeddings=vectors, encoder="test encoder")
    changes = {
        "data__language_embeddings": embeddings, "data__cache_directory": tmp_path / "cache",
        "data__scenes": scenes_file.parent, "model__gaze": True, "training__phase1__place_weight": 1,
        "training__phase1__place_scenes_weight": 1, "training__phase1__place_of": "target_and_goal",
    }  # fmt: skip
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder, stops in ((whole, [{}]), (parts, [{0: (2, send(signal.SIGTERM))}, {0: (6, send(signal.SIGTERM))}, {}])):
        command = ["--phase", "1", "--resume", *small(1, collected_demos, folder, **changes)]
        ends = [ranks_of(1, tmp_path / "said", trained, command, stop)[0] for stop in stops]
        assert [code for code, _ in ends] == [143 if stop else 0 for stop in stops], ends
    assert_same_run(parts / PHASE_DIRECTORIES[1], whole / PHASE_DIRECTORIES[1])
    assert lines_of(parts / PHASE_DIRECTORIES[1])[("train", 6)]["gaze_scenes"] > 0
    with h5py.File(scenes_file, "a") as file:
        del file.attrs["bddl_file_content"]
    done = run("train.py", "--phase", 1, *small(1, collected_demos, tmp_path / "refused", **changes), expect=2)
    assert "do not say where the target is to be brought" in one_sentence(done)


def test_scenes_without_gaze_are_refused():
    done = run("train.py", "--phase", 1, "--set", "data.scenes=somewhere", expect=2)
    assert "data.scenes is somewhere, but nothing is taught on them; set model.gaze to true, or" in one_sentence(done)


def test_the_trainers_signs_say_how_often_the_object_is_found():
    torch.manual_seed(0)
    trainer: StateVLATrainer = build_trainer(small_config("model.gaze=true"), phase=1).eval()
    batch = taught_batch(16)
    looks = trainer.model.state_encoder.tokenizer.looks(batch["obs"])
    best = cell_middles(16)[torch.stack([look.scores.argmax(dim=1) for look in looks], dim=1)]  # (B, 2, 2)
    batch["target_at"] = best + torch.where(torch.arange(16)[:, None, None] < 4, 0.0, 1e-3) * torch.ones(2)
    batch["target_at"][4:8, 0, 0] += 10.0  # not in view
    batch["target_at"][8:12, 0] *= -0.5  # elsewhere, unless it is in the middle
    losses = trainer(batch)
    elsewhere = (best[8:12, 0] * 1.5).norm(dim=1) > FOUND_WITHIN
    assert losses["gaze_found"] == pytest.approx((12 - int(elsewhere.sum())) / 12)
    assert losses["gaze_found_in_hand"] == 1
