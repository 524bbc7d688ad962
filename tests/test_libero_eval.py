"""run_libero_eval.py in the real simulator, with a policy trained for one epoch on real demonstrations."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import h5py
import numpy as np
import pytest
import torch
from browser import broken_pictures, play_all_videos, too_wide
from helpers import ROOT, SMALL, Page, one_sentence, run
from libero_files import write_task_file

import eval as offline_evaluation
from demos.language import LanguageTable
from errors import BadInput
from rollouts.episodes import Episode, Task
from rollouts.folder import read_episodes
from rollouts.policies import (
    CheckpointPolicy,
    ReplayPolicy,
    demo_of,
    make_policy,
    policy_of_checkpoint,
    read_demo,
    training_demo,
    with_embeddings_of,
)
from rollouts.pool import Attempt, record
from rollouts.side_by_side import table_text
from rollouts.video import HELD_FRAMES, SUCCESS, framed, grid, upright, write_mp4
from rollouts.while_training import success_rate
from run_libero_eval import choose_output_dir, evaluation_of, main, parse_arguments
from serving.policy_server import PolicyServer, in_background
from serving.served_checkpoint import begin, metadata_of, reader_of
from simulator.env import make_env
from simulator.suites import make_suite, task_init_states
from statevla_model import load_checkpoint
from training.checkpoint import config_of, read_checkpoint, save_checkpoint


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


EPISODE = Episode("libero_object", 6, 0, 0)
SHORT = ("--tasks", 6, "--max_steps", 25, "--execute_steps", 5)


@pytest.fixture(autouse=True)
def threads_as_before():
    """A policy on the CPU keeps to one thread; other tests need not."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def evaluated(checkpoint, tmp_path_factory) -> tuple[Path, str]:
    """Two episodes side by side, each in a simulator of its own: the folder and what was printed."""
    folder = tmp_path_factory.mktemp("evaluated")
    flags = ("--num_trials", 2, "--num_workers", 2, "--save_video", "--output_dir", folder)
    return folder, evaluate(checkpoint, *SHORT, *flags).stdout


def test_rollouts_write_results_and_upright_videos(evaluated):
    folder, said = evaluated
    results = json.loads((folder / "results.json").read_text())
    assert [(e["task_id"], e["trial"], e["success"], e["crashed"]) for e in results["episodes"]] == [
        (6, 0, False, False),
        (6, 1, False, False),
    ]
    assert all(e["steps"] == 25 and e["seconds"] > 0 and len(e["decision_ms"]) == 5 for e in results["episodes"])
    assert results["success_rate"] == 0 and results["tasks"][0]["success_rate"] == 0
    assert "thinned" in results["title"] and "1 of 10 tasks x 2 of 50 init states" in results["title"]
    assert re.search(r"^overall: 0/2 successes = 0.0%, 95% interval 0.0 to 65.8%", said, re.MULTILINE)

    with av.open(str(folder / "episodes/task6_trial0_failure.mp4")) as video:
        first = next(video.decode(video=0)).to_ndarray(format="rgb24")
    suite = make_suite("libero_object")
    env = make_env(suite, 6, 64, visual_mesh_ratio=0.2)
    env.reset()
    env.set_init_state(task_init_states(suite, 6)[0])
    raw = env.draw(env.poses(), 256, ("agentview",))["agentview_image"]
    env.close()
    difference = {name: abs(first.astype(int) - image).mean() for name, image in {"up": raw[::-1], "raw": raw}.items()}
    assert difference["up"] < 8 < difference["raw"]


def test_the_report_shows_every_episode(evaluated):
    folder, _ = evaluated
    page = Page((folder / "report.html").read_text())
    assert {"task6.mp4", "failures.png", "success_rates.png", "episodes/task6_trial1_failure.mp4"} <= set(page.links)
    assert all((folder / link).stat().st_size > 0 for link in page.links)


def test_the_report_opens_in_a_browser_and_its_videos_play(evaluated, tab):
    folder, _ = evaluated
    tab.show(360, 740)
    tab.open(folder / "report.html")
    assert broken_pictures(tab) == [] and too_wide(tab) == []
    assert play_all_videos(tab) == {"task6.mp4": (512, 256)}
    assert tab.ask("document.querySelectorAll('#failures, .cards li img').length") == 3
    assert tab.troubles == []


def test_an_evaluation_killed_and_continued_plays_the_same_episodes_in_one_simulator_after_the_other(
    checkpoint, evaluated, tmp_path
):
    """One worker: its second episode follows a soft reset, where `evaluated` played it in a fresh process."""
    flags = (*SHORT, "--num_trials", 2, "--num_workers", 1, "--output_dir", tmp_path)
    command = [sys.executable, "run_libero_eval.py", "--checkpoint", checkpoint, *flags]
    running = subprocess.Popen(list(map(str, command)), cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    wait_until(lambda: len(read_episodes(tmp_path)) == 1)
    [worker] = children(running.pid)
    running.send_signal(signal.SIGKILL)
    running.wait()
    wait_until(lambda: not Path(f"/proc/{worker}").exists())  # nobody is left behind
    first = (tmp_path / "episodes.jsonl").read_text()
    assert first.count("\n") == 1
    with (tmp_path / "episodes.jsonl").open("a") as file:
        file.write('{"suite": "libero_obj')

    evaluate(checkpoint, *flags)
    assert (tmp_path / "episodes.jsonl").read_text().startswith(first)
    found, expected = ({e["trial"]: e["fingerprint"] for e in read_episodes(each)} for each in (tmp_path, evaluated[0]))
    assert found == expected and len(set(found.values())) == 2

    other = one_sentence(evaluate(checkpoint, *flags, "--seed", 1, expect=2))
    assert "was evaluated with seed 0, not 1" in other
    assert "0/2 successes" in evaluate(checkpoint, *flags).stdout  # complete: only the report is written anew


def test_episodes_through_the_checkpoints_own_server_are_those_played_directly(
    checkpoint, evaluated, tmp_path, monkeypatch, capsys
):
    content = read_checkpoint(checkpoint)
    language = LanguageTable(**content["language"])
    config = config_of(content, checkpoint, ["training.device=cpu"])
    policy, of_policy = policy_of_checkpoint(content, str(checkpoint), config, {}, 4, None, "fp32")
    reader = reader_of(content, config.model.image_size, language)
    connections = []

    def begin_one():
        connections.append(begin(policy, language))
        return connections[-1]

    metadata = metadata_of(content, of_policy, policy.steps, reader)
    server = PolicyServer(begin_one, reader, metadata, "127.0.0.1", 0)
    flags = ("--num_trials", 2, "--num_workers", 2, "--output_dir", tmp_path)

    def evaluate_it(*more: object) -> str:
        command = ["run_libero_eval.py", "--policy", server.address, *SHORT, *flags, *more]
        monkeypatch.setattr(sys, "argv", [str(word) for word in command])
        main()
        return capsys.readouterr().out

    with in_background(server):
        said = evaluate_it()
        assert len(connections) >= 2  # an episode each
        assert "0/2 successes" in evaluate_it()  # complete: only the report is written anew
        with pytest.raises(SystemExit, match="2"):
            evaluate_it("--decision_delay_steps", 2)
        assert "was evaluated with decision_delay_steps 0, not 2" in capsys.readouterr().err
    found, expected = ({e["trial"]: e["fingerprint"] for e in read_episodes(each)} for each in (tmp_path, evaluated[0]))
    assert found == expected and len(set(found.values())) == 2
    assert re.search(r"^server \(StateVLA\) +0 of 2", said, re.MULTILINE)
    settings = json.loads((tmp_path / "settings.json").read_text())
    assert settings["server"]["weights_sha256"] == of_policy["weights_sha256"] and "code" not in settings["server"]
    assert all(e["code_of_server"] == e["code"] and len(e["decision_ms"]) == 5 for e in read_episodes(tmp_path))


def test_training_plays_a_few_episodes_of_the_tasks_it_knows(checkpoint, collected_demos, tmp_path, monkeypatch):
    monkeypatch.setattr("rollouts.while_training.step_limit", lambda suite: 20)
    encoder = checkpoint.parent.parent / "phase1_temporal_jepa/checkpoint_best.pt"
    changes = {
        "model.image_size": 64, "data.data_directory": collected_demos, "training.checkpoint_directory": tmp_path,
        "training.phase2.num_epochs": 2, "training.phase2.rollout_interval": 2,
    }  # fmt: skip
    flags = [word for key, value in (SMALL | changes).items() for word in ("--set", f"{key}={value}")]
    torch.set_num_threads(2)
    run("train.py", "--phase", 2, "--phase1_checkpoint", encoder, *flags)
    assert torch.get_num_threads() == 2
    folder = tmp_path / "phase2_flow_matching"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = [line.get("success_rate") for line in lines if line["split"] == "validation"]
    assert found == [None, 0.0]  # nothing is solved within a second
    assert sorted(path.name for path in (folder / "rollouts_2").iterdir()) == [
        "task6_trial0_last.png", "task6_trial1_last.png",
    ]  # fmt: skip
    wrong = [*flags, "--set", "training.phase2.rollout_suite=libero_goal"]
    said = one_sentence(run("train.py", "--phase", 2, "--phase1_checkpoint", encoder, *wrong, expect=2))
    assert "none of libero_goal's tasks is in the demonstrations, whose first is 'pick up the butter" in said


def test_no_checkpoint_is_the_best_by_its_crashes(checkpoint, tmp_path, monkeypatch, capsys):
    saved, model = read_checkpoint(checkpoint), load_checkpoint(checkpoint)
    known = list(saved["language"]["embeddings"])
    assert model.language is not None
    lost = {"crashed": True, "success": False, "error": "killed by SIGKILL\nmore of it"}
    for solved, crashed, expected in ((1, 3, 0.25), (4, 0, 1.0), (0, 4, -1.0)):
        records = [{"crashed": False, "success": True}] * solved + [lost] * crashed
        monkeypatch.setattr("rollouts.while_training.play_all", lambda *_, records=records: iter(records))
        found = success_rate(
            model, model.language, known, saved["observation"], "libero_object", 4, "noise", 0, tmp_path / "last"
        )
        assert found == expected
        said = capsys.readouterr().out
        assert said == (f"warning: {crashed} of 4 rollouts crashed, the first killed by SIGKILL\n" if crashed else "")


def test_a_shifted_target_is_another_episode_and_the_title_says_so(checkpoint, tmp_path):
    fingerprints = {}
    for shift in (0, 0.05):
        folder = tmp_path / str(shift)
        flags = ("--policy", "zero", "--tasks", 6, "--num_trials", 1, "--max_steps", 2, "--shift_target", shift)
        said = evaluate(checkpoint, *flags, "--output_dir", folder).stdout
        assert ("target shifted by up to 50 mm" in said) == (shift > 0)
        [episode] = read_episodes(folder)
        fingerprints[shift] = episode["fingerprint"]
    assert fingerprints[0] != fingerprints[0.05]


def test_pictures_are_thinned_as_the_flag_says_and_else_as_the_demonstrations_were(
    checkpoint, tmp_path, monkeypatch, capsys
):
    asked_of_workers = []

    def played_at_once(episodes, init_state_of, policy, rollouts, *_):
        asked_of_workers.append(rollouts.visual_mesh_ratio)
        yield from ()

    monkeypatch.setattr("run_libero_eval.play_all", played_at_once)
    for policy in ("checkpoint", "zero"):
        for flag, ratio in ((None, 0.2), (1, 1.0), (0.5, 0.5)):  # the demonstrations were drawn with 0.2
            folder = tmp_path / f"{policy}_{flag}"
            command = ["--checkpoint", checkpoint, "--policy", policy, "--tasks", 6, "--output_dir", folder]
            command += [] if flag is None else ["--visual_mesh_ratio", flag]
            monkeypatch.setattr(sys, "argv", ["run_libero_eval.py", *map(str, command)])
            with pytest.raises(SystemExit, match="50 of 50 episodes are in no figure"):
                main()
            assert asked_of_workers.pop() == ratio
            assert json.loads((folder / "settings.json").read_text())["visual_mesh_ratio"] == ratio
            title = json.loads((folder / "results.json").read_text())["title"]
            assert (f"visual meshes thinned to {ratio:g} (not LIBERO's own pictures)" in title) == (ratio < 1)
            capsys.readouterr()
    flags = ("--policy", "zero", "--tasks", 6, "--visual_mesh_ratio", 0.3, "--output_dir", tmp_path / "zero_1")
    said = refused(checkpoint, *flags, at=(monkeypatch, capsys))
    assert "was evaluated with visual_mesh_ratio 1.0, not 0.3" in said


def test_an_evaluation_that_could_not_play_everything_prints_its_figures_and_ends_with_code_1(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("HOME", str(tmp_path))
    flags = "--policy zero --tasks 6 --num_trials 1 --max_steps 2 --episode_timeout 0.3 --output_dir ~/out"
    command = ["run_libero_eval.py", *flags.split(), "--seed", str(2**63)]  # any number will do
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == (
        f"error: {tmp_path / 'out'}: 1 of 1 episodes are in no figure, 1 of them crashed;"
        f" the same command with --output_dir {tmp_path / 'out'} tries them again"
    )
    printed = capsys.readouterr().out
    assert "1 x crashed: not finished within --episode_timeout 0.3 seconds" in printed
    assert "overall: 0/0 successes, 1 crashed" in printed
    [episode] = read_episodes(tmp_path / "out")
    assert re.fullmatch(r"[0-9a-f]{40}( \+ changes)?|unknown", episode["code"])
    assert json.loads((tmp_path / "out/results.json").read_text())["code"] == [episode["code"]]


@pytest.mark.parametrize("flags, part", [((), ""), (("--side_by_side", "0.05"), "policy_from_noise_init_states")])
def test_ctrl_c_names_the_output_dir_of_the_command_and_not_of_a_part_of_it(
    checkpoint, tmp_path, flags, part, monkeypatch, capsys
):
    def interrupted(*_):
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr("run_libero_eval.play_all", interrupted)
    command = ["--checkpoint", str(checkpoint), "--tasks", "6", "--num_trials", "1", "--output_dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["run_libero_eval.py", *command, *flags])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 130
    said = f"Stopped. 0 of 1 episodes are kept; the same command with --output_dir {tmp_path} continues.\n"
    assert said in capsys.readouterr().out
    assert (tmp_path / part / "settings.json").exists()


def test_side_by_side_makes_its_table_of_its_own_eight_folders_alone(checkpoint, tmp_path, monkeypatch, capsys):
    def played_at_once(episodes, init_state_of, policy, *_):
        for one in episodes:
            outcome = {"success": policy.looks, "steps": 2, "fingerprint": "0", "broken_by_policy": None}
            yield record(Attempt(one), outcome, [1.0] if policy.looks else [], None)

    def evaluated(*flags: object) -> str:
        command = ["--checkpoint", checkpoint, "--tasks", 6, "--num_trials", 3, "--max_steps", 2, *flags]
        monkeypatch.setattr(sys, "argv", ["run_libero_eval.py", *map(str, command)])
        main()
        return capsys.readouterr().out

    monkeypatch.setattr("run_libero_eval.play_all", played_at_once)
    out = tmp_path / "out"
    alone = evaluated("--output_dir", out / "neighbour", "--shift_target", 0.01)
    assert "overall: 3/3 successes" in alone and re.search(r"^standing still +- +-$", alone, re.MULTILINE)
    printed = evaluated("--output_dir", out, "--side_by_side", 0.05)
    results = json.loads((out / "side_by_side.json").read_text())
    assert results["title"].startswith("libero_object, 1 of 10 tasks x 3 of 50 init states")
    counted = {row: [cell["successes"] for cell in cells.values()] for row, cells in results["side_by_side"].items()}
    assert counted == {
        "policy, flow from noise": [3, 3],
        "policy, flow from zero": [3, 3],
        "one demo, replayed blindly": [0, 0],
        "standing still": [0, 0],
    }
    assert {tuple(cells) for cells in results["side_by_side"].values()} == {
        ("init states", "target shifted by up to 50 mm")
    }
    assert table_text(results["side_by_side"]) in printed
    links = Page((out / "report.html").read_text()).links
    assert len(links) == 8 and all((out / link).is_file() for link in links) and "neighbour" not in str(links)
    for link in links:
        assert "Side by side" not in (out / link).read_text()
    assert evaluated("--output_dir", out, "--side_by_side", 0.05).endswith(printed[-200:])  # complete: read again

    beside = [out / name for name in ("zero_init_states", "replay_init_states")]
    printed = evaluated("--output_dir", tmp_path / "again", "--beside", *beside)
    assert re.search(r"^standing still +0 of 3 \(0 to 56%\) +-$", printed, re.MULTILINE)
    at = monkeypatch, capsys
    for flags, sentence in (
        (("--output_dir", out), "holds the table of --side_by_side; choose another"),
        (("--output_dir", out / "neighbour", "--side_by_side", 0.05), "already holds the settings.json of something"),
        (("--output_dir", tmp_path / "other", "--seed", 1, "--beside", *beside), "was evaluated with seed 0, not 1"),
    ):
        assert sentence in refused(checkpoint, "--tasks", 6, "--num_trials", 3, "--max_steps", 2, *flags, at=at)
    assert not (tmp_path / "other").exists()


def test_evaluations_started_at_once_get_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["run_libero_eval.py", "--policy", "zero"])
    chosen = [choose_output_dir(evaluation_of(parse_arguments())) for _ in range(2)]
    assert chosen == [Path("results/libero_object_1"), Path("results/libero_object_2")]
    shutil.rmtree("results")
    Path("results").symlink_to("nowhere")
    with pytest.raises(BadInput, match=r"results: not writable \(File exists\); choose a folder with --output_dir"):
        choose_output_dir(evaluation_of(parse_arguments()))


def wait_until(condition, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.parametrize("suite", ["libero_10", "libero_object_lan"])
def test_suites_of_other_families_run_without_a_checkpoint(suite, tmp_path):
    flags = ("--tasks", 0, "--num_trials", 1, "--max_steps", 2, "--output_dir", tmp_path)
    said = run("run_libero_eval.py", "--policy", "zero", "--task_suite", suite, *flags).stdout
    assert f"standing still, {suite}, 1 of 10 tasks x 1 of 50 init states" in said
    told = json.loads((tmp_path / "settings.json").read_text())["instructions"]["0"]
    assert (
        told
        == {
            "libero_10": "put both the alphabet soup and the tomato sauce in the basket",
            "libero_object_lan": "grab alphabet soup and put it into basket",  # LIBERO-PRO's words, not the file's name
        }[suite]
    )
    [episode] = read_episodes(tmp_path)
    assert episode["steps"] == 2 and not episode["crashed"]


def test_a_batch_is_answered_as_each_observation_by_itself(checkpoint):
    language = LanguageTable(**read_checkpoint(checkpoint)["language"])
    [task] = language.embeddings
    policy = CheckpointPolicy(load_checkpoint(checkpoint), {6: language[task]}, torch.device("cpu"), 10, 4, "noise")
    rng = np.random.default_rng(0)
    observations = [
        {
            "agentview_rgb": rng.integers(0, 256, (64, 64, 3), dtype=np.uint8),
            "eye_in_hand_rgb": rng.integers(0, 256, (64, 64, 3), dtype=np.uint8),
            "joint_states": rng.normal(size=7).astype(np.float32),
            "gripper_states": rng.uniform(0, 0.04, 2).astype(np.float32),
        }
        for _ in range(4)
    ]

    def act(rows):
        return policy.act([observations[i] for i in rows], [EPISODE] * len(rows), [seeded(i) for i in rows])

    def seeded(i):
        return torch.Generator().manual_seed(i)

    together = act([0, 1, 2, 3])
    for i in range(4):
        np.testing.assert_array_equal(act([i])[0], together[i])
    np.testing.assert_array_equal(act([3, 1])[0], together[3])
    batch = {name: torch.from_numpy(value)[None] for name, value in observations[2].items()}
    batch["language"] = language[task][None]
    expected = policy.model.predict(batch, 4, "noise", seeded(2))[0]  # the definition
    np.testing.assert_array_equal(together[2], expected.double().numpy())


def butter(init_states: np.ndarray) -> Task:
    words = "pick up the butter and place it in the basket"
    return Task(words.replace(" ", "_"), words, True, init_states)


def test_a_replay_is_one_training_demo_from_its_first_action(checkpoint, collected_demos):
    held_out = read_checkpoint(checkpoint)["held_out_demos"]
    init_states = task_init_states(make_suite("libero_object"), 6)
    path, key = training_demo(butter(init_states), [collected_demos], 50, held_out)
    assert f"{path.name}/{key}" not in held_out and path.parent == collected_demos
    with h5py.File(path) as file:
        last_start = file["data/demo_1/states"][0]
    assert training_demo(butter(last_start[None]), [collected_demos], 50, [])[1] == "demo_1"
    assert training_demo(butter(last_start[None]), [collected_demos], 1, [])[1] == "demo_0"  # data.demos_per_task
    elsewhere = last_start.copy()
    elsewhere[3] += 0.5  # rad: no demo's arm starts there, as it does in one that begins after a missed grasp
    with pytest.raises(BadInput, match="no training demo of 'pick up the butter and place it in the basket' to replay"):
        training_demo(butter(elsewhere[None]), [collected_demos], 50, [])
    with pytest.raises(BadInput, match="no training demo of 'open the drawer' to replay; name one with --demo"):
        training_demo(Task("open_the_drawer", "open the drawer", True, init_states), [collected_demos], 50, held_out)
    demo = np.random.default_rng(0).uniform(-1, 1, (5, 7))
    [chunk] = ReplayPolicy({6: demo}, max_steps=8).act([None], [EPISODE], [None])
    np.testing.assert_array_equal(chunk[:5], demo)
    np.testing.assert_array_equal(chunk[5:], [[0, 0, 0, 0, 0, 0, demo[-1, 6]]] * 3)


def still_file(directory: Path, name: str, width: int = 20, **options) -> Path:
    """A task's file whose demos all begin at rest, in a scene whose state has this width."""
    path = write_task_file(directory, name, **options)
    with h5py.File(path, "r+") as file:
        for demo in file["data"].values():
            del demo["states"]
            demo["states"] = np.zeros((30, width))
    return path


def test_a_demo_belongs_to_the_task_of_its_file_whatever_the_words(tmp_path):
    """In libero_90 the same words are said in several scenes."""
    words, scenes = "open the drawer", ("KITCHEN_SCENE1", "KITCHEN_SCENE2")
    first, second = (
        still_file(tmp_path, f"{scene}_open_the_drawer", width) for scene, width in zip(scenes, (20, 24), strict=True)
    )

    def found(scene: str, width: int, name_tells: bool = True) -> str:
        task = Task(f"{scene}_open_the_drawer", words, name_tells, np.zeros((2, width)))
        return training_demo(task, [tmp_path], 50, [])[0].name

    assert (found(scenes[0], 20), found(scenes[1], 24)) == (first.name, second.name)
    with pytest.raises(BadInput, match="no training demo of 'open the drawer'"):  # another scene's is none
        found("KITCHEN_SCENE3", 20)
    with pytest.raises(BadInput, match=r"KITCHEN_SCENE1_.*key states is of another scene than the suite's"):
        found(scenes[0], 24)
    assert found("KITCHEN_SCENE3", 24, name_tells=False) == second.name  # LIBERO-PRO, whose names don't tell
    own = first.rename(tmp_path / "drawer.hdf5")  # a name of one's own: problem_info tells
    with h5py.File(own, "r+") as file:
        file["data"].attrs["problem_info"] = json.dumps({"language_instruction": words})
    assert found("KITCHEN_SCENE3", 20) == own.name
    with pytest.raises(BadInput, match=r"drawer.hdf5: key states is of another scene"):
        found("KITCHEN_SCENE3", 24)
    shutil.copy(own, tmp_path / "drawer (1).hdf5")
    with pytest.raises(BadInput, match=r"drawer.hdf5: are both of 'open the drawer', and neither has the name"):
        found("KITCHEN_SCENE3", 20)


def test_demos_with_gaps_in_their_numbers_are_replayed(tmp_path):
    path = still_file(tmp_path, "open_the_drawer", demos=12, official=False)  # demo_1, demo_3, ... demo_23
    task = Task("open_the_drawer", "open the drawer", True, np.zeros((1, 20)))
    assert training_demo(task, [tmp_path], 2, [f"{path.name}/demo_1"]) == (path, "demo_3")  # 2 by number, not by name
    assert read_demo(path, None)[0] == "demo_1"
    with pytest.raises(BadInput, match="has no demonstration demo_0; it holds 12, demo_1 to demo_23"):
        read_demo(path, "demo_0")


def test_a_path_with_a_colon_names_a_demo(tmp_path):
    path = write_task_file(tmp_path).rename(tmp_path / "a:b.hdf5")
    assert demo_of(f"{path}:demo_2") == (path, "demo_2") and demo_of(str(path)) == (path, None)
    assert demo_of("C:x/a.hdf5") == (Path("C:x/a.hdf5"), None)
    for actions, sentence in (
        (None, "demo_1: key actions is missing"),
        (np.array([b"x"]), "demo_1: key actions holds no array of numbers"),
        (np.zeros((0, 7)), r"demo_1: key actions is \(0, 7\), expected finite \(T, 7\)"),
    ):
        with h5py.File(path, "r+") as file:
            demo = file["data/demo_1"]
            demo.pop("actions", None)
            if actions is not None:
                demo["actions"] = actions
        with pytest.raises(BadInput, match=sentence):
            read_demo(path, "demo_1")
    path.write_bytes(b"no HDF5")
    with pytest.raises(BadInput, match="is no HDF5 file"):
        read_demo(path, None)


def test_an_unknown_instruction_is_embedded_by_the_checkpoints_own_encoder(checkpoint):
    language = LanguageTable(**read_checkpoint(checkpoint)["language"])
    [known] = language.embeddings
    wider = with_embeddings_of([known, "Grab the butter."], language)
    assert torch.equal(wider[known], language[known])
    assert 0.5 < torch.dot(wider["grab the butter"], wider[known]) < 0.999
    for wrong, sentence in (
        (LanguageTable("word2vec 1.0", language.embeddings), "'word2vec 1.0' is none of embed_language.py's"),
        (LanguageTable(language.encoder, {known: -language[known]}), "another vector here than in training"),
    ):
        with pytest.raises(BadInput, match=sentence):
            with_embeddings_of(["open the drawer"], wrong)


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (("--task_suite", "libero_objects"), "unknown task suite 'libero_objects', did you mean libero_object?"),
        (("--task_suite", "libero_object_env"), "the installed LIBERO has no file of task 0"),
        (("--task_suite", "libero_object_with_trigger"), "the installed LIBERO has no init states of task 0"),
        (("--tasks", "10"), "libero_object has the tasks 0 to 9, there is no task 10"),
        (("--tasks", "six"), "expected task ids such as 0,3"),
        (("--tasks", "0,7-5"), "--tasks 0,7-5: 7-5 ends before it begins"),
        (("--tasks", "²"), "expected task ids such as 0,3"),
        (("--tasks", "0-99999999999"), "there is no task 99999999999"),
        (("--tasks", "6", "--num_trials", "0"), "--num_trials 0: expected between 1 and 50"),
        (("--tasks", "6", "--num_trials", "51"), "--num_trials 51: expected between 1 and 50"),
        (("--tasks", "6", "--max_steps", "1000000000000"), "--max_steps 1000000000000: expected between 1 and 100000"),
        (("--tasks", "6", "--shard", "3/2"), "--shard 3/2: expected I/N such as 3/16"),
        (("--visual_mesh_ratio", "0"), "--visual_mesh_ratio 0: expected more than 0 and at most 1"),
        (("--visual_mesh_ratio", "1.5"), "--visual_mesh_ratio 1.5: expected more than 0 and at most 1"),
        (("--side_by_side", "0.05", "--beside", "x"), "--beside belongs to a single one"),
        (("--tasks", "6", "--beside", "x"), "x/results.json: cannot be read (No such file or directory)"),
        (("--tasks", "6", "--execute_steps", "11"), "--execute_steps 11: expected between 1 and 10"),
        (("--policy", "replay", "--demo", "no.hdf5"), "--demo no.hdf5: is of one task; choose that task with --tasks"),
        (("--side_by_side", "0"), "--side_by_side 0: expected 0 to 0.2 metres, not 0"),
        (("--side_by_side", "0.5"), "--side_by_side 0.5: expected 0 to 0.2 metres, not 0"),
        (("--side_by_side", "0.05", "--shift_target", "0.05"), "--side_by_side needs --checkpoint, and chooses policy"),
        (("--side_by_side", "0.05", "--flow_start", "zero"), "--side_by_side needs --checkpoint, and chooses policy"),
        (("--side_by_side", "0.05", "--policy", "zero", "--checkpoint", ""), "--side_by_side needs --checkpoint"),
    ],
)
def test_wrong_flags_are_one_sentence(checkpoint, tmp_path, flags, sentence, monkeypatch, capsys):
    assert sentence in refused(checkpoint, *flags, "--output_dir", tmp_path / "out", at=(monkeypatch, capsys))
    assert not (tmp_path / "out").exists()


def test_the_flow_starts_where_the_checkpoint_says_unless_a_flag_says_otherwise(checkpoint, tmp_path, monkeypatch):
    """A flow from zero asks for no noise: whatever the seed, the answer is the same."""
    saved = read_checkpoint(checkpoint)
    saved["config"]["training"]["phase2"]["flow_start"] = "zero"
    save_checkpoint(saved, tmp_path / "from_zero.pt")
    [task] = saved["language"]["embeddings"]
    observation = {name: np.zeros((64, 64, 3), np.uint8) for name in saved["observation"]["cameras"]}
    observation |= {"joint_states": np.zeros(7, np.float32), "gripper_states": np.zeros(2, np.float32)}

    def answers(path, *flags):
        monkeypatch.setattr(sys, "argv", ["run_libero_eval.py", "--checkpoint", str(path), *flags])
        tasks = {6: Task("", task, True, np.zeros((1, 20)))}
        policy, settings = make_policy(evaluation_of(parse_arguments()), read_checkpoint(path), tasks)
        rollouts = [policy.act([observation], [EPISODE], [torch.Generator().manual_seed(seed)])[0] for seed in (0, 1)]
        offline = []
        for seed in ("0", "1"):
            output = tmp_path / "offline.json"
            command = ["eval.py", "--checkpoint", str(path), "--seed", seed, "--output", str(output), *flags]
            monkeypatch.setattr(sys, "argv", command)
            offline_evaluation.main()
            offline.append(json.loads(output.read_text()))
        assert settings["flow_start"] == offline[0]["flow_start"]
        same = np.array_equal(*rollouts)
        assert same == (offline[0]["mse"] == offline[1]["mse"])
        return settings["flow_start"], same

    assert answers(checkpoint) == answers(tmp_path / "from_zero.pt", "--flow_start", "noise") == ("noise", False)
    assert answers(tmp_path / "from_zero.pt") == answers(checkpoint, "--flow_start", "zero") == ("zero", True)


def refused(checkpoint: Path, *flags: object, at: tuple) -> str:
    """What main() says before it exits with code 2; in this process, since starting one takes seconds."""
    monkeypatch, capsys = at
    monkeypatch.setattr(sys, "argv", ["run_libero_eval.py", "--checkpoint", *map(str, (checkpoint, *flags))])
    with pytest.raises(SystemExit, match="2"):
        main()
    said = capsys.readouterr().err.strip()
    assert said.startswith("error: ") and "\n" not in said
    return said


def test_a_checkpoint_of_another_world_is_refused(checkpoint, tmp_path, monkeypatch, capsys):
    at = monkeypatch, capsys
    for key, value in {
        "image_orientation": "opencv",
        "cameras": ["agentview_rgb"],
        "robot_state": ["ee_states"],
    }.items():
        other = read_checkpoint(checkpoint)
        other["observation"][key] = value
        save_checkpoint(other, tmp_path / "other.pt")
        assert f"was trained with {key}" in refused(tmp_path / "other.pt", at=at)
    phase1 = checkpoint.parent.parent / "phase1_temporal_jepa/checkpoint_best.pt"
    assert "expected a checkpoint of phase 2" in refused(phase1, at=at)
    assert "no such checkpoint" in refused(tmp_path / "missing.pt", at=at)


def test_another_programs_results_are_never_overwritten(checkpoint, tmp_path, monkeypatch, capsys):
    (tmp_path / "results.json").write_text("{}")
    flags = ("--tasks", 6, "--num_trials", 1, "--output_dir", tmp_path)
    said = refused(checkpoint, *flags, at=(monkeypatch, capsys))
    assert "already holds another program's results.json" in said
    assert (tmp_path / "results.json").read_text() == "{}" and len(list(tmp_path.iterdir())) == 1


def test_videos_are_framed_by_outcome_and_laid_out_in_a_grid(tmp_path):
    short = framed([np.zeros((32, 32, 3), np.uint8)] * 2, success=True)
    long = framed([np.full((32, 32, 3), 200, np.uint8)] * 4, success=False)
    frames = grid([short, long, long], columns=2)
    assert len(frames) == 4 + HELD_FRAMES and frames[0].shape == (64, 64, 3)
    assert tuple(frames[-1][0, 0]) == SUCCESS  # the short one waits on its last frame
    assert np.array_equal(upright(np.arange(12).reshape(2, 2, 3))[0], np.arange(6, 12).reshape(2, 3))
    write_mp4(frames, tmp_path / "grid.mp4", 10)
    with av.open(str(tmp_path / "grid.mp4")) as video:
        assert sum(1 for _ in video.decode(video=0)) == len(frames)
