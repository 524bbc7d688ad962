"""run_libero_eval.py in the real simulator, with a policy trained for one epoch on real demonstrations."""

import json
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from test_training import SMALL, one_sentence, run

from libero_sim import make_env, make_suite, task_init_states
from rollout_video import SUCCESS, framed, grid, upright, write_mp4
from statevla_model import read_checkpoint, save_checkpoint


@pytest.fixture(scope="module")
def checkpoint(collected_demos, tmp_path_factory) -> Path:
    """The whole path on real demonstrations: embeddings, phase 1, phase 2."""
    runs = tmp_path_factory.mktemp("real")
    changes = {
        "model.image_size": 64,
        "data.data_directory": collected_demos,
        "training.checkpoint_directory": runs,
        "training.phase1.num_epochs": 1,
        "training.phase2.num_epochs": 1,
    }
    both = [word for key, value in (SMALL | changes).items() for word in ("--set", f"{key}={value}")]
    run("embed_language.py", "--data_directory", collected_demos, "--encoder", "offline")
    run("train.py", "--phase", 1, *both)
    encoder = runs / "phase1_temporal_jepa/checkpoint_best.pt"
    run("train.py", "--phase", 2, "--phase1_checkpoint", encoder, *both)
    return runs / "phase2_flow_matching/checkpoint_best.pt"


def evaluate(checkpoint: Path, *flags: object, expect: int = 0):
    return run("run_libero_eval.py", "--checkpoint", checkpoint, "--task_suite", "libero_object", *flags, expect=expect)


def test_checkpoint_describes_what_the_collector_recorded(checkpoint):
    assert read_checkpoint(checkpoint)["observation"] == {
        "cameras": ["agentview_rgb", "eye_in_hand_rgb"],
        "robot_state": ["joint_states", "gripper_states"],
        "image_orientation": "opengl",
        "image_size": 64,
        "visual_mesh_ratio": 0.2,
        "obs_alignment": "after",
    }


def test_rollouts_write_results_and_upright_videos(checkpoint, tmp_path):
    flags = ("--tasks", 6, "--num_trials", 2, "--max_steps", 25, "--execute_steps", 5, "--output_dir", tmp_path)
    said = evaluate(checkpoint, *flags, "--save_video").stdout
    results = json.loads((tmp_path / "results.json").read_text())
    assert [(e["task_id"], e["trial"], e["success"], e["crashed"]) for e in results["episodes"]] == [
        (6, 0, False, False),
        (6, 1, False, False),
    ]
    assert all(e["steps"] == 25 and e["seconds"] > 0 and isinstance(e["seed"], int) for e in results["episodes"])
    assert results["success_rate"] == 0 and results["tasks"][0]["success_rate"] == 0
    assert "thinned" in results["title"] and "0/2 successes" in said

    with av.open(str(tmp_path / "task6_trial0_failure.mp4")) as video:
        first = next(video.decode(video=0)).to_ndarray(format="rgb24")
    suite = make_suite("libero_object")
    env = make_env(suite, 6, 64, visual_mesh_ratio=0.2)
    env.reset()
    env.set_init_state(task_init_states(suite, 6)[0])
    raw = env.draw(env.poses(), 256, ("agentview",))["agentview_image"]
    env.close()
    difference = {name: abs(first.astype(int) - image).mean() for name, image in {"up": raw[::-1], "raw": raw}.items()}
    assert difference["up"] < 8 < difference["raw"]
    assert (tmp_path / "task6.mp4").exists()


def test_the_same_seed_gives_the_same_rollouts(checkpoint, tmp_path):
    steps = []
    for name in ("first", "second"):
        flags = ("--tasks", 6, "--num_trials", 1, "--max_steps", 15, "--output_dir", tmp_path / name)
        evaluate(checkpoint, *flags, "--save_video")
        steps.append((tmp_path / name / "task6.mp4").read_bytes())
    assert steps[0] == steps[1]


def test_a_crash_is_reported_as_a_crash_and_not_as_a_failure(checkpoint, tmp_path):
    broken = read_checkpoint(checkpoint)
    broken["model_state_dict"]["model.policy.normalizer.mean"][:] = torch.nan  # its actions are NaN
    save_checkpoint(broken, tmp_path / "nan.pt")
    flags = ("--tasks", 6, "--num_trials", 1, "--max_steps", 15, "--output_dir", tmp_path / "out")
    said = evaluate(tmp_path / "nan.pt", *flags).stdout
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["episodes"][0]["crashed"] and "Error" in results["episodes"][0]["error"]
    assert results["success_rate"] is None and results["crashed"] == 1
    assert "0/0 successes, 1 crashed" in said


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (("--task_suite", "libero_objects"), "unknown task suite 'libero_objects'"),
        (("--tasks", "10"), "libero_object has the tasks 0 to 9, there is no task 10"),
        (("--tasks", "six"), "expected task ids such as 0,3"),
        (("--tasks", "6", "--num_trials", "0"), "--num_trials 0: expected between 1 and 50"),
        (("--tasks", "6", "--num_trials", "51"), "--num_trials 51: expected between 1 and 50"),
        (("--tasks", "6", "--execute_steps", "11"), "--execute_steps 11: expected between 1 and 10"),
        (("--tasks", "0"), "no language embedding for the task 'pick up the alphabet soup"),
    ],
)
def test_wrong_flags_are_one_sentence(checkpoint, tmp_path, flags, sentence):
    said = one_sentence(evaluate(checkpoint, *flags, "--output_dir", tmp_path / "out", expect=2))
    assert sentence in said
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_another_world_is_refused(checkpoint, tmp_path):
    for key, value in {
        "image_orientation": "opencv",
        "cameras": ["agentview_rgb"],
        "robot_state": ["ee_states"],
    }.items():
        other = read_checkpoint(checkpoint)
        other["observation"][key] = value
        save_checkpoint(other, tmp_path / "other.pt")
        assert f"was trained with {key}" in one_sentence(evaluate(tmp_path / "other.pt", expect=2))
    phase1 = checkpoint.parent.parent / "phase1_temporal_jepa/checkpoint_best.pt"
    assert "expected a checkpoint of phase 2" in one_sentence(evaluate(phase1, expect=2))


def test_earlier_results_are_never_overwritten(checkpoint, tmp_path):
    (tmp_path / "results.json").write_text("{}")
    said = one_sentence(evaluate(checkpoint, "--tasks", 6, "--num_trials", 1, "--output_dir", tmp_path, expect=2))
    assert "already holds a results.json" in said
    assert (tmp_path / "results.json").read_text() == "{}"


def test_videos_are_framed_by_outcome_and_laid_out_in_a_grid(tmp_path):
    short = framed([np.zeros((32, 32, 3), np.uint8)] * 2, success=True)
    long = framed([np.full((32, 32, 3), 200, np.uint8)] * 4, success=False)
    frames = grid([short, long, long], columns=2)
    assert len(frames) == 4 and frames[0].shape == (64, 64, 3)
    assert tuple(frames[-1][0, 0]) == SUCCESS  # the short one waits on its last frame
    assert np.array_equal(upright(np.arange(12).reshape(2, 2, 3))[0], np.arange(6, 12).reshape(2, 3))
    write_mp4(frames, tmp_path / "grid.mp4", 10)
    with av.open(str(tmp_path / "grid.mp4")) as video:
        assert sum(1 for _ in video.decode(video=0)) == 4
