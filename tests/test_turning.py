"""eval.py --turning and --sight in the real simulator."""

import json

import numpy as np
import pytest
import torch
from helpers import ROOT, one_sentence, run

import eval as offline_evaluation
from demos.simulator_truth import Kinematics
from rollouts import turning as turning_module
from rollouts.sight import LAYOUTS_SEEN, Seen, Shown, figures, scenes_of_layout
from rollouts.turning import CHANGES, Turn, expert_chunk, slope, turns_of_scene
from simulator.env import make_env
from simulator.suites import make_suite
from statevla_model import StateVLA

pytestmark = pytest.mark.simulator
BUTTER, KETCHUP = (f"pick up the {name} and place it in the basket" for name in ("butter", "ketchup"))
PRETRAINED = ROOT / "checkpoints/pretrained/libero_object_cpu"


@pytest.fixture(scope="module")
def env():
    env = make_env(make_suite("libero_object"), 6, 64, visual_mesh_ratio=0.2)
    yield env
    env.close()


def turns(env, decide) -> list[Turn]:
    env.reset(seed=3)
    return list(turns_of_scene(env, decide, BUTTER, [BUTTER, KETCHUP], 10, np.random.default_rng(0)))


def test_the_expert_itself_turns_by_one_and_who_ignores_the_scene_by_none(env):
    found = turns(env, lambda obs, told: expert_chunk(env, 10))
    assert {turn.change for turn in found} == {*CHANGES} and len(found) == 6  # at two pauses
    for turn in found:  # a paused scene has its arm's state, but not what its controllers remember
        np.testing.assert_allclose(turn.policy, turn.expert, atol=0.3)
    assert slope(found)["turn"] == pytest.approx(1, abs=0.05) and slope(found)["changes"] >= 4
    assert env.target == "butter_1"
    assert slope(turns(env, lambda obs, told: np.ones((10, 7))))["turn"] == 0


def test_a_policy_that_ignores_the_scene_turns_by_nothing_whatever_its_noise(monkeypatch, tmp_path):
    def noise_alone(self, obs, instruction, generator, **sampling):
        return torch.randn(10, 7, generator=generator).numpy()

    monkeypatch.setattr(StateVLA, "decide", noise_alone)
    monkeypatch.setattr(turning_module, "tasks_of", lambda suite, known: {6: BUTTER})
    monkeypatch.setattr(offline_evaluation, "SCENES_TO_TURN_IN", 1)
    run("eval.py", "--checkpoint", PRETRAINED, "--turning", "--output", tmp_path / "turns.json")
    found = json.loads((tmp_path / "turns.json").read_text())["turning"]
    assert {one["turn"] for one in found.values()} == {0.0}


def test_a_policy_is_shown_the_change_and_told_of_it(env):
    seen = []
    turns(env, lambda obs, told: seen.append((obs, told)) or np.zeros((10, 7)))
    before, exchanged, moved, another = seen[:4]
    assert [told for _, told in seen[:4]] == [BUTTER, BUTTER, BUTTER, KETCHUP]
    for obs, _ in (exchanged, moved, another):
        np.testing.assert_allclose(obs["joint_states"], before[0]["joint_states"], atol=1e-6)  # the arm is where it was
    differs = [(obs["agentview_rgb"] != before[0]["agentview_rgb"]).mean() for obs, _ in (exchanged, moved, another)]
    assert differs[0] > 0.005 and differs[1] > 0.001 and differs[2] < 0.001


def test_the_slope_is_that_of_the_policys_change_along_the_experts():
    east, north = np.array([2.0, 0.0]), np.array([0.0, 1.0])
    assert slope([Turn("moved", 0.5 * east, east), Turn("moved", 0.5 * north, north)])["turn"] == pytest.approx(0.5)
    assert slope([Turn("moved", north, east)])["turn"] == 0  # across is not towards
    assert slope([Turn("moved", -east, east)])["turn"] == -1
    assert slope([Turn("moved", east, 0.1 * east)]) == {"turn": None, "changes": 0}


def test_eval_py_prints_the_turns_of_a_policy_and_writes_them_down(tmp_path, monkeypatch):
    monkeypatch.setattr(turning_module, "tasks_of", lambda suite, known: {6: BUTTER})
    monkeypatch.setattr(offline_evaluation, "SCENES_TO_TURN_IN", 1)
    said = run("eval.py", "--checkpoint", PRETRAINED, "--turning", "--output", tmp_path / "turns.json").stdout
    found = json.loads((tmp_path / "turns.json").read_text())["turning"]
    assert found.keys() == CHANGES.keys() and all(one["changes"] for one in found.values())
    assert f"{found['moved']['turn']:.2f}" in said


def test_words_that_the_policy_does_not_know_are_never_said(env):
    env.reset(seed=3)
    alone = turns_of_scene(env, lambda obs, told: np.zeros((10, 7)), BUTTER, [BUTTER], 10, np.random.default_rng(0))
    assert {turn.change for turn in alone} == {"exchanged", "moved"}


@pytest.mark.parametrize("hand", [(), (0.1, 0.2, 0.3)], ids=["target_and_goal", "target_goal_and_hand"])
def test_sight_knows_where_the_object_is_in_layouts_that_differ(env, hand):
    def all_knowing(obs: dict, told: str) -> Seen:
        assert told == BUTTER and obs["agentview_rgb"].shape == (64, 64, 3)
        place = env.sim.data.body_xpos[env.domain.obj_body_id["butter_1"]]
        basket = env.sim.data.body_xpos[env.domain.obj_body_id["basket_1"]]
        told = np.concatenate([place + off, basket + np.array([0.006, 0.008, 1.0]), hand])
        return Seen(kinematics.on_pictures(env.state()[None], ["butter_1"])[0, :, 0], told)

    kinematics, off = Kinematics(env.model_xml, "the scene", "the test needs it"), np.array([0.003, -0.004, 1.0])
    places = []
    for layout in LAYOUTS_SEEN:
        shown = list(scenes_of_layout(env, all_knowing, BUTTER, layout, seeds=[3, 4]))
        found = figures(shown)
        assert found["scenes"] == 2 and found["found"] == found["in_view"] and found["in_view"][0] == 2
        assert found["mm_mean"] == pytest.approx(5) == found["mm_median"]
        assert found["goal_mm_mean"] == pytest.approx(10) == found["goal_mm_median"]
        places += [scene.place[:2] for scene in shown]
    apart = np.linalg.norm(np.array(places)[:, None] - np.array(places), axis=2)
    assert np.median(apart[np.triu_indices(6, 1)]) > 0.05


def test_what_was_seen_elsewhere_or_is_not_in_view_is_not_found():
    at = np.array([[0.5, 0.5], [np.nan, np.nan]])
    scenes = [Shown(Seen(at + shift, None), at, np.zeros(3), None) for shift in (0.0, 0.08, 0.09, -0.5)]
    assert figures(scenes) == {"scenes": 4, "in_view": [4, 0], "found": [2, 0]}
    scenes = [Shown(Seen(None, np.array([x, 0.0, 9.0])), at, np.zeros(3), None) for x in (0.001, -0.002, 0.009)]
    assert figures(scenes) == {"scenes": 3, "mm_mean": pytest.approx(4), "mm_median": pytest.approx(2)}


def test_a_model_that_cannot_tell_what_it_sees_is_refused():
    done = run("eval.py", "--checkpoint", PRETRAINED, "--sight", expect=2)
    assert "has neither model.gaze nor a head of place" in one_sentence(done)
