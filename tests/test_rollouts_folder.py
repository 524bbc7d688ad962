"""What an evaluation keeps on disk, what it says about it, and how parts are joined. No simulator is needed."""

import itertools
import json
import re
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, Page, run

from errors import BadInput
from rollouts.episodes import Episode, episode_seed, reset_seed, shard_of
from rollouts.evaluation import Evaluation
from rollouts.folder import EvaluationFolder, merge, read_episodes
from rollouts.report import write_report, write_side_by_side_report
from rollouts.side_by_side import (
    OWN,
    cell_of,
    check_comparable,
    conditions,
    read_beside,
    results_of_all,
    side_by_side,
    table_text,
)
from rollouts.statistics import (
    causes_text,
    comparison_text,
    describe,
    exact_mcnemar,
    exact_sign_flips,
    figures_text,
    interval_over_tasks,
    summarise,
    wilson_interval,
)
from rollouts.video import write_mp4, write_png
from run_libero_eval import main

SETTINGS = {
    "policy": "checkpoint", "image_size": 64, "visual_mesh_ratio": 1.0, "weights_sha256": "abc", "flow_start": "noise",
    "precision": "fp32",
    "task_suite": "libero_object", "instructions": {"3": "take <this> & that", "6": "pick up the butter"},
    "tasks_of_suite": 2, "num_trials": 3, "init_states": 3, "max_steps": 280, "shift_target": 0.0, "seed": 0,
    "shard": None,
}  # fmt: skip


def episode(task_id: int, trial: int, success: bool = True, error: str | None = None) -> dict:
    return {
        "suite": "libero_object", "task_id": task_id, "trial": trial, "seed": 1, "crashed": error is not None,
        "success": success and error is None, "steps": None if error else 100,
        "decision_ms": [] if error else [5.0, 7.0], "tries": 2 if error else 1, "error": error, "earlier_crash": None,
        "broken_by_policy": None, "renderer": "egl", "code": "c0ffee",
    }  # fmt: skip


def folder_with(path: Path, *episodes: dict, **changes) -> EvaluationFolder:
    folder = EvaluationFolder(path, SETTINGS | changes)
    for one in episodes:
        folder.append(one)
    return folder


def broken(task_id: int, trial: int) -> dict:
    """A failure of an episode that the policy's own actions broke."""
    return episode(task_id, trial, success=False) | {"broken_by_policy": "after 3 steps: the action [nan] is <wrong>"}


# ---------------------------------------------------------------------------------------------------------- folder


def test_a_torn_last_line_is_dropped_and_the_rest_kept(tmp_path):
    folder_with(tmp_path, episode(6, 0), episode(6, 1)).close()
    with (tmp_path / "episodes.jsonl").open("a") as file:
        file.write('{"task_id": 6, "tri')
    folder = EvaluationFolder(tmp_path, SETTINGS)
    assert [one["trial"] for one in folder.episodes] == [0, 1]
    folder.append(episode(6, 2))
    assert [one["trial"] for one in read_episodes(tmp_path)] == [0, 1, 2]


def test_an_episode_that_crashed_and_was_played_again_counts_once_as_what_it_was_the_last_time(tmp_path):
    folder = folder_with(tmp_path, episode(6, 0, error="killed by SIGKILL"), episode(6, 1))
    folder.append(episode(6, 0))
    folder.close()
    for episodes in (folder.episodes, read_episodes(tmp_path)):
        assert sorted((one["trial"], one["crashed"]) for one in episodes) == [(0, False), (1, False)]
    assert (tmp_path / "episodes.jsonl").read_text().count("\n") == 3  # what happened stays written down


def test_a_folder_of_other_settings_is_refused_by_name_and_left_alone(tmp_path):
    folder_with(tmp_path, episode(6, 0)).close()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    with pytest.raises(BadInput, match="was evaluated with weights_sha256 abc, not def"):
        EvaluationFolder(tmp_path, SETTINGS | {"weights_sha256": "def"})
    with pytest.raises(BadInput, match="was evaluated with max_steps 280, not 100"):
        EvaluationFolder(tmp_path, SETTINGS | {"max_steps": 100})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_two_evaluations_never_write_into_one_folder(tmp_path):
    first = EvaluationFolder(tmp_path, SETTINGS)
    with pytest.raises(BadInput, match=r"another evaluation is writing into this folder \(process \d+ on"):
        EvaluationFolder(tmp_path, SETTINGS)
    first.close()
    assert not (tmp_path / ".lock").exists()
    EvaluationFolder(tmp_path, SETTINGS).close()


@pytest.mark.slow
def test_a_full_disk_is_one_sentence_and_keeps_what_is_there(tmp_path):
    code = f"""
import resource
from pathlib import Path
from errors import exits_on_bad_input
from rollouts.folder import EvaluationFolder

@exits_on_bad_input
def main():
    folder = EvaluationFolder(Path({str(tmp_path)!r}), {SETTINGS!r})
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))  # from here on no file grows beyond 2 kB
    for trial in range(40):
        folder.append({episode(6, 0)!r} | {{"trial": trial}})

main()"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "episodes.jsonl: cannot be written (File too large)" in done.stderr
    kept = read_episodes(tmp_path)
    assert 2 < len(kept) < 20 and f"{len(kept)} finished episodes are kept" in done.stderr


def test_a_folder_that_cannot_be_written_or_read_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match=r"--output_dir .*file: not writable \(File exists|Not a directory"):
        EvaluationFolder(tmp_path / "file", SETTINGS)
    EvaluationFolder(tmp_path / "own", SETTINGS).close()
    for name, content, sentence in (
        ("episodes.jsonl", '{"task_id": 6, "trial": 0}\n', "line 1 is no episode; expected the keys crashed, "),
        ("episodes.jsonl", "[]\n", "line 1 is no episode"),
        ("episodes.jsonl", "{\n", "line 1 is not readable as JSON"),
        ("settings.json", "[]", "is not of run_libero_eval.py; expected the keys instructions, "),
        ("settings.json", "{}", "is not of run_libero_eval.py"),
        ("settings.json", "{", "not readable as JSON"),
    ):
        (tmp_path / "own" / name).write_text(content)
        with pytest.raises(BadInput, match=sentence):
            EvaluationFolder(tmp_path / "own", SETTINGS)
        with pytest.raises(BadInput, match=sentence):
            merge([tmp_path / "own"], tmp_path / "all")
    assert not (tmp_path / "own/.lock").exists()  # who is refused leaves the folder free


# ------------------------------------------------------------------------------------------------ shards and merging


def test_shards_are_a_partition_in_one_piece_each():
    episodes = [Episode("suite", task, trial, 0) for task in range(3) for trial in range(5)]
    parts = [shard_of(episodes, f"{i}/4") for i in range(1, 5)]
    assert [one for part in parts for one in part] == episodes
    assert all(3 <= len(part) <= 4 for part in parts)
    for wrong in ("0/4", "5/4", "1/16", "one/4", "3", "²/4"):
        with pytest.raises(BadInput, match=f"--shard {wrong}: expected I/N"):
            shard_of(episodes, wrong)


@pytest.mark.slow
def test_merged_shards_give_the_figures_of_the_whole(tmp_path):
    whole = [episode(task, trial, success=trial != 1) for task in (3, 6) for trial in range(3)]
    for number, share in ((2, whole[3:]), (1, whole[:3])):
        folder = folder_with(tmp_path / str(number), *share, shard=f"{number}/2")
        write_png(np.zeros((256, 256, 3), np.uint8), folder.pictures / f"task{3 * number}_trial1_last.png")
        folder.close()
    said = run("run_libero_eval.py", "--merge", tmp_path / "2", tmp_path / "1", "--output_dir", tmp_path / "all").stdout
    results = json.loads((tmp_path / "all/results.json").read_text())
    assert results["episodes"] == whole
    assert results["overall"] == json.loads(json.dumps(summarise(whole)))
    assert results["title"] == "libero_object, all 2 tasks x all 3 init states, flow started from noise"
    assert "overall: 4/6 successes = 66.7%, 95% interval 30.0 to 90.3%" in said
    own, *others = [line for line in said.splitlines() if re.match("policy, flow|one demo|standing still", line)]
    assert own.startswith("policy, flow from noise") and " of " in own
    assert all(re.split("  +", line)[1:] == ["-", "-"] for line in others)  # nothing else has been played beside it
    assert results["side_by_side"]["policy, flow from noise"]["init states"]["trials"] == 6
    assert (tmp_path / "all/failures.png").exists()


def test_merged_shards_stand_beside_what_the_command_names(tmp_path):
    for number in (1, 2):
        folder_with(tmp_path / str(number), episode(3 * number, 0), num_trials=1, shard=f"{number}/2").close()
    results_in(tmp_path / "replay", 1, policy="replay", num_trials=1, **BLIND)
    results_in(tmp_path / "other", 1, policy="replay", num_trials=2, **BLIND)
    parts = ("--merge", tmp_path / "1", tmp_path / "2", "--output_dir", tmp_path / "all", "--beside")
    said = run("run_libero_eval.py", *parts, tmp_path / "other", expect=2).stderr
    assert said == (
        f"error: {tmp_path / 'other'} and this evaluation cannot stand side by side: {tmp_path / 'other'}:"
        " was evaluated with num_trials 2, not 1\n"
    )
    assert not (tmp_path / "all").exists()
    said = run("run_libero_eval.py", *parts, tmp_path / "replay").stdout
    assert re.search(r"^policy, flow from noise +2 of 2 \(34 to 100%\) +-$", said, re.MULTILINE)
    assert re.search(r"^one demo, replayed blindly +1 of 4 \(5 to 70%\) +-$", said, re.MULTILINE)
    table = json.loads((tmp_path / "all/results.json").read_text())["side_by_side"]
    assert table["one demo, replayed blindly"]["init states"]["trials"] == 4
    assert "one demo, replayed blindly" in Page((tmp_path / "all/report.html").read_text()).text


def test_a_figure_that_lacks_episodes_ends_with_code_1_and_says_why_they_crashed(tmp_path, monkeypatch, capsys):
    said = "ended with exit code 1: MemoryError: 3 GiB\nTraceback (most recent call last):\nMemoryError: 3 GiB\nthe end"
    whole = [episode(3, trial) for trial in range(3)] + [episode(6, 0), episode(6, 1, error=said), broken(6, 2)]
    folder_with(tmp_path / "a", *whole[:3], shard="1/2").close()
    folder_with(tmp_path / "b", *whole[3:], shard="2/2").close()

    def ends_with(parts: str, name: str) -> str:
        command = ["--merge", *(str(tmp_path / part) for part in parts), "--output_dir", str(tmp_path / name)]
        monkeypatch.setattr(sys, "argv", ["run_libero_eval.py", *command])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code  # a text is printed on stderr, and the exit code is 1

    assert ends_with("ab", "all") == (
        f"error: {tmp_path / 'all'}: 1 of 6 episodes are in no figure, 1 of them crashed;"
        " the commands of the shards play them, then merge into a new folder"
    )
    printed = capsys.readouterr().out
    assert "overall: 4/5 successes = 80.0%" in printed
    assert "1 of the failures broken off by the policy's own actions, 1 crashed" in printed
    assert "1 x crashed: ended with exit code 1: MemoryError: 3 GiB\n" in printed
    assert "1 x broken off by the policy's own actions after 3 steps: the action [nan] is <wrong>\n" in printed
    assert "half: 3 of 6 episodes are in no figure, 0 of them crashed" in ends_with("a", "half")


def test_shards_that_do_not_belong_together_are_refused(tmp_path):
    folder_with(tmp_path / "a", episode(6, 0), shard="1/2").close()
    folder_with(tmp_path / "again", episode(6, 0), shard="2/2").close()
    folder_with(tmp_path / "other", episode(6, 1), shard="2/2", seed=1).close()
    with pytest.raises(BadInput, match=r"task 6, init state 0 is in both .*a and .*again"):
        merge([tmp_path / "a", tmp_path / "again"], tmp_path / "all")
    with pytest.raises(BadInput, match=r"cannot be merged: .*other: was evaluated with seed 1, not 0"):
        merge([tmp_path / "a", tmp_path / "other"], tmp_path / "all")
    assert not (tmp_path / "all").exists()


# --------------------------------------------------------------------------------------------------------- figures


def test_wilson_interval_has_its_published_values():
    assert wilson_interval(17, 20) == pytest.approx((0.6396, 0.9476), abs=1e-4)
    assert wilson_interval(0, 10) == pytest.approx((0, 0.2775), abs=1e-4)
    assert wilson_interval(500, 500) == pytest.approx((0.9924, 1), abs=1e-4)


def test_where_tasks_are_solved_whole_or_not_at_all_they_are_the_sample():
    """Five of ten tasks solved is then Binomial(10, 1/2) / 10, whose 2.5 and 97.5% quantiles are 0.2 and 0.8."""

    def played(solved_of_ten: list[int]) -> list[dict]:
        return [
            episode(task, trial, trial < solved) for task, solved in enumerate(solved_of_ten) for trial in range(10)
        ]

    assert interval_over_tasks(played([0, 10] * 5)) == pytest.approx((0.2, 0.8))
    low, high = interval_over_tasks(played([0, 2, 4, 5, 5, 5, 5, 6, 8, 10]))
    assert (low, high) == pytest.approx((0.33, 0.67), abs=0.015)  # 0.5 +- 1.96 * 0.268 / sqrt(10)
    for alike in ([9] * 10, [0] * 10, [10] * 10):  # by chance: such tasks say no more than their episodes
        assert interval_over_tasks(played(alike)) == wilson_interval(sum(alike), 100)
    assert interval_over_tasks(played([0, 10, 0, 10])) is None
    said = figures_text(summarise([*played([0, 10] * 5), episode(0, 10, error="died")]))
    assert "50/100 successes = 50.0%, 95% interval 40.4 to 59.6% (over tasks 20.0 to 80.0%)" in said


def test_mcnemar_is_the_exact_binomial_test():
    assert exact_mcnemar(1, 8) == exact_mcnemar(8, 1) == pytest.approx(2 * (1 + 9) / 2**9)
    assert exact_mcnemar(0, 5) == pytest.approx(0.0625)
    assert exact_mcnemar(4, 4) == exact_mcnemar(0, 0) == 1


def test_the_test_over_tasks_counts_every_way_to_set_the_signs():
    rng = np.random.default_rng(0)
    for _ in range(20):
        differences = rng.integers(-10, 11, rng.integers(1, 9)).tolist()
        signs = itertools.product((1, -1), repeat=len(differences))
        totals = [sum(sign * d for sign, d in zip(one, differences, strict=True)) for one in signs]
        as_far = sum(abs(total) >= abs(sum(differences)) for total in totals)
        assert exact_sign_flips(differences) == as_far / len(totals)
    assert exact_sign_flips([3] * 10) == 2 / 2**10
    assert exact_sign_flips([0, 0, 10, 0]) == 1  # one task says nothing, however often it was played
    assert exact_sign_flips([1] * 90) == pytest.approx(2 / 2**90)  # libero_90's, without 2 ** 90 ways


def test_crashed_episodes_count_neither_way():
    row = summarise([episode(6, 0), episode(6, 1, success=False), episode(6, 2, error="died")])
    assert (row["successes"], row["trials"], row["crashed"], row["success_rate"]) == (1, 2, 1, 0.5)
    assert row["decision_ms_mean"] == 6 and row["mean_steps_to_success"] == 100
    assert figures_text(summarise([episode(6, 0, error="died")])) == "0/0 successes, 1 crashed"


def test_an_episode_that_the_policy_broke_is_a_failed_trial():
    row = summarise([episode(6, 0), broken(6, 1), episode(6, 2, error="died")])
    assert (row["successes"], row["trials"], row["crashed"], row["broken_by_policy"]) == (1, 2, 1, 1)
    before_there_was_the_key = {key: value for key, value in episode(6, 0).items() if key != "broken_by_policy"}
    assert summarise([before_there_was_the_key])["broken_by_policy"] == 0


def test_a_subset_says_so_in_the_title():
    assert describe(SETTINGS, 6) == "libero_object, all 2 tasks x all 3 init states, flow started from noise"
    assert "2 of 10 tasks x 3 of 50 init states" in describe(SETTINGS | {"tasks_of_suite": 10, "init_states": 50}, 6)
    assert "shard 1/2, only 3 of 6 episodes" in describe(SETTINGS | {"shard": "1/2"}, 3)
    assert "thinned to 0.2 (not LIBERO's own pictures)" in describe(SETTINGS | {"visual_mesh_ratio": 0.2}, 6)
    assert "instructions that the checkpoint was not trained on: 1" in describe(
        SETTINGS | {"new_instructions": ["x"]}, 6
    )
    assert describe(SETTINGS | {"policy": "zero"}, 6).startswith("standing still, ")


def test_every_episode_has_a_seed_of_its_own():
    seeds = {
        episode_seed(suite, task, trial, seed)
        for suite in ("libero_object", "libero_goal")
        for task in range(10)
        for trial in range(50)
        for seed in (0, 1)
    }
    assert len(seeds) == 2000 and max(seeds) < 2**32
    assert episode_seed("libero_object", 6, 0, 0) == episode_seed("libero_object", 6, 0, 0)


def write_results(path: Path, episodes: list[dict], **changes) -> Path:
    path.write_text(json.dumps({"title": path.stem, "settings": SETTINGS | changes, "episodes": episodes}))
    return path


@pytest.mark.slow
def test_two_evaluations_are_compared_episode_by_episode(tmp_path):
    paths = []
    for name, solved in {"a": "110111", "b": "100001"}.items():
        episodes = [episode(6, trial, success=one == "1") for trial, one in enumerate(solved)]
        extra = [episode(3, 0), episode(3, 1, error="died")] if name == "a" else []
        paths.append(write_results(tmp_path / f"{name}.json", episodes + extra))
    said = run("run_libero_eval.py", "--compare", *paths).stdout
    assert "both 2, only A 3, only B 0, neither 1" in said
    assert "A - B: +50.0 percentage points over 6 paired episodes, exact McNemar p = 0.25" in said
    assert "note: 1 finished episodes have no partner" in said
    assert [line for line in said.splitlines() if line.startswith("note: ") and " B" in line] == []
    assert "note: 1 crashed episodes of A are left out" in said
    for wrong in ("[]", '{"title": "x", "settings": {"policy": "zero"}, "episodes": [{"crashed": false}]}'):
        paths[1].write_text(wrong)
        with pytest.raises(BadInput, match=r"not a results.json of run_libero_eval.py"):
            comparison_text(*paths)


def test_a_comparison_of_many_tasks_has_a_second_test_over_them(tmp_path):
    """One layout that changes sides, ten episodes of it, is no evidence about others."""
    a = write_results(tmp_path / "a.json", [episode(task, trial) for task in range(5) for trial in range(10)])
    b = write_results(
        tmp_path / "b.json", [episode(task, trial, success=task > 0) for task in range(5) for trial in range(10)]
    )
    said = comparison_text(a, b)
    assert said.endswith("exact McNemar p = 0.00195, over 5 tasks 1 (sign flips)")


def notes(a: Path, b: Path) -> list[str]:
    return [line for line in comparison_text(a, b).splitlines() if line.startswith("note: ")]


def test_a_comparison_names_every_version_and_setting_in_which_two_results_differ(tmp_path):
    a = write_results(tmp_path / "a.json", [episode(6, 0)], **{"version of mujoco": "2.3.7", "device": "cpu"})
    older = {key: value for key, value in episode(6, 1).items() if key != "code"}
    changes = {
        "version of mujoco": "3.3.2",
        "device": "cuda",
        "mamba_backend": "cuda",
        "max_steps": 100,
        "weights_sha256": "def",  # what is compared
        "instructions": {"6": "grab the butter"},
    }
    episodes = [episode(6, 0) | {"code": "decade", "renderer": "osmesa"}, older | {"renderer": "osmesa"}]
    b = write_results(tmp_path / "b.json", episodes, **changes)
    assert sorted(notes(a, b)) == [
        "note: 1 finished episodes have no partner and are left out",
        "note: code is c0ffee in A and decade, not recorded in B",
        "note: device is cpu in A and cuda in B",
        "note: instructions of 6 is pick up the butter in A and grab the butter in B",
        "note: mamba_backend is not recorded in A and cuda in B",
        "note: max_steps is 280 in A and 100 in B",
        "note: renderer is egl in A and osmesa in B",
        "note: version of mujoco is 2.3.7 in A and 3.3.2 in B",
    ]
    same = write_results(tmp_path / "c.json", [episode(6, 0)], **{"version of mujoco": "2.3.7", "device": "cpu"})
    assert notes(a, same) == []
    standing = {key: value for key, value in SETTINGS.items() if key not in ("flow_start", "weights_sha256")}
    standing |= {"version of mujoco": "2.3.7", "policy": "zero"}  # nothing that only a model has is missed
    same.write_text(json.dumps({"title": "c", "settings": standing, "episodes": [episode(6, 0)]}))
    assert notes(a, same) == ["note: policy is checkpoint in A and zero in B"]


def test_a_comparison_tells_a_simulator_that_was_never_checked_from_one_that_was_found_right(tmp_path):
    a = write_results(tmp_path / "a.json", [episode(6, 0)], simulator=None)
    b = write_results(tmp_path / "b.json", [episode(6, 0)], simulator="another simulator", shard="1/2")
    assert notes(a, b) == [
        "note: shard is the whole in A and 1/2 in B",
        "note: simulator is LIBERO's own in A and another simulator in B",
    ]
    older = write_results(tmp_path / "older.json", [episode(6, 0)])
    assert notes(a, older) == ["note: simulator is LIBERO's own in A and not recorded in B"]


# ---------------------------------------------------------------------------------------------------- side by side


POLICY = {"execute_steps": 10, "sample_steps": 4}
INIT, SHIFTED = "init states", "target shifted by up to 50 mm"


def results_in(directory: Path, successes: int, trials: int = 4, **changes) -> dict:
    """A finished evaluation as --beside finds it. `flow_start=None` and such: the setting is not there."""
    settings = {
        name: value for name, value in (SETTINGS | POLICY | changes).items() if value is not None or name == "shard"
    }
    episodes = [episode(6, trial, success=trial < successes) for trial in range(trials)]
    results = {
        "title": describe(settings, trials),
        "checkpoint": "best.pt",
        "settings": settings,
        "overall": summarise(episodes),
        "episodes": episodes,
    }
    directory.mkdir(parents=True)
    (directory / "results.json").write_text(json.dumps(results))
    return results


BLIND = {"flow_start": None, "precision": None, "weights_sha256": None, "execute_steps": None, "sample_steps": None}


def table_beside(own: dict, *directories: Path) -> dict:
    """What run_libero_eval.py does with --beside."""
    return side_by_side({OWN: own} | read_beside(directories, own["settings"]))


def played(table: dict) -> dict[str, dict[str, tuple[int, int]]]:
    return {
        row: {column: (cell["successes"], cell["trials"]) for column, cell in cells.items()}
        for row, cells in table.items()
    }


def test_the_evaluations_that_were_told_stand_side_by_side_and_no_neighbour(tmp_path):
    own = results_in(tmp_path / "own", 3)
    results_in(tmp_path / "own_shifted", 2, shift_target=0.05)
    results_in(tmp_path / "from_zero", 4, flow_start="zero")
    results_in(tmp_path / "replay_shifted", 1, policy="replay", shift_target=0.05, **BLIND)
    standing = results_in(tmp_path / "standing", 0, policy="zero", **BLIND)
    expected = {
        "policy, flow from noise": {INIT: (3, 4), SHIFTED: (2, 4)},
        "policy, flow from zero": {INIT: (4, 4)},
        "one demo, replayed blindly": {SHIFTED: (1, 4)},
        "standing still": {INIT: (0, 4)},
    }
    others = [tmp_path / name for name in ("own_shifted", "from_zero", "replay_shifted")]
    table = table_beside(own, *others, tmp_path / "standing")
    assert played(table) == expected
    assert table["policy, flow from noise"][SHIFTED]["interval"] == pytest.approx(wilson_interval(2, 4))
    assert played(table_beside(standing, *others, tmp_path / "own")) == expected  # whoever looks
    assert played(table_beside(own)) == {"policy, flow from noise": {INIT: (3, 4)}}
    assert played(table_beside(own, tmp_path / "standing")) == {
        "policy, flow from noise": {INIT: (3, 4)},
        "standing still": {INIT: (0, 4)},
    }


@pytest.mark.parametrize(
    "change, difference",
    [
        ({"task_suite": "libero_goal"}, "task_suite libero_goal, not libero_object"),
        ({"instructions": {"6": "pick up the butter"}}, 'instructions {"6": "pick up the butter"}, not {"3": '),
        ({"num_trials": 2}, "num_trials 2, not 3"), ({"max_steps": 100}, "max_steps 100, not 280"),
        ({"seed": 1}, "seed 1, not 0"), ({"shard": "1/2"}, "shard 1/2, not null"),
        ({"version of mujoco": "3.17.0"}, "version of mujoco 3.17.0, not null"),
        ({"simulator": "not LIBERO's"}, "simulator not LIBERO's, not null"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("policy", ["checkpoint", "replay"])
def test_an_evaluation_of_other_scenes_is_refused_by_the_name_of_the_setting(tmp_path, change, difference, policy):
    own = results_in(tmp_path / "own", 3)
    what = {"flow_start": "zero"} if policy == "checkpoint" else BLIND
    results_in(tmp_path / "other", 1, policy=policy, **what, **change)
    with pytest.raises(BadInput) as refused:
        table_beside(own, tmp_path / "other")
    other = tmp_path / "other"
    said = f"{other} and this evaluation cannot stand side by side: {other}: was evaluated with {difference}"
    assert str(refused.value).startswith(said)


@pytest.mark.parametrize(
    "change, difference",
    [
        ({"weights_sha256": "def"}, "weights_sha256 def, not abc"), ({"execute_steps": 5}, "execute_steps 5, not 10"),
        ({"sample_steps": 8}, "sample_steps 8, not 4"), ({"image_size": 128}, "image_size 128, not 64"),
        ({"visual_mesh_ratio": 0.2}, "visual_mesh_ratio 0.2, not 1.0"),
    ],
)  # fmt: skip
def test_an_evaluation_of_another_policy_is_refused_and_a_blind_one_is_not(tmp_path, change, difference):
    own = results_in(tmp_path / "own", 3)
    results_in(tmp_path / "other", 1, flow_start="zero", **change)
    results_in(tmp_path / "replay", 2, policy="replay", **(BLIND | change))
    with pytest.raises(BadInput, match=f"other: was evaluated with {difference}$"):
        table_beside(own, tmp_path / "replay", tmp_path / "other")
    assert played(table_beside(own, tmp_path / "replay")) == {
        "policy, flow from noise": {INIT: (3, 4)},
        "one demo, replayed blindly": {INIT: (2, 4)},
    }


def test_beside_a_baseline_stand_the_evaluations_of_one_policy(tmp_path):
    own = results_in(tmp_path / "own", 0, policy="zero", **BLIND)
    a, b, c = tmp_path / "a", tmp_path / "b", tmp_path / "c"
    results_in(a, 1, flow_start="zero")
    results_in(b, 2, weights_sha256="def")
    results_in(c, 3, shift_target=0.05)
    assert played(table_beside(own, a, c)) == {
        "policy, flow from zero": {INIT: (1, 4)},
        "policy, flow from noise": {SHIFTED: (3, 4)},
        "standing still": {INIT: (0, 4)},
    }
    with pytest.raises(BadInput, match=rf"{b} and {a} cannot stand side by side: .*weights_sha256 def, not abc"):
        table_beside(own, a, b, c)


def test_two_evaluations_of_one_cell_are_refused(tmp_path):
    own = results_in(tmp_path / "own", 1)
    results_in(tmp_path / "a", 4)
    with pytest.raises(BadInput, match=f"this evaluation cannot stand.*: both are 'policy, flow from noise', {INIT}$"):
        table_beside(own, tmp_path / "a")


def test_an_evaluation_without_a_trial_has_no_figures_to_stand_beside_others(tmp_path):
    own = results_in(tmp_path / "own", 1)
    none = results_in(tmp_path / "none", 0, trials=0, flow_start="zero")
    with pytest.raises(BadInput, match=r"none/results.json: has no finished episode"):
        table_beside(own, tmp_path / "none")
    assert played(side_by_side({"own": own, "none": none})) == {"policy, flow from noise": {INIT: (1, 4)}}


@pytest.mark.parametrize(
    "content",
    [
        "",
        '{"settings": {',
        "[]",
        "{}",
        "3",
        '{"settings": {}, "overall": {}}',
        '{"settings": [], "overall": {}}',
        '{"settings": null, "overall": {}}',
        json.dumps({"settings": {key: SETTINGS[key] for key in SETTINGS if key != "policy"}, "overall": {}}),
        json.dumps({"settings": SETTINGS | BLIND | {"policy": "zero"}, "overall": {}}),
        json.dumps({"title": "", "settings": SETTINGS | {"policy": "zero"}, "episodes": [], "overall": []}),
        json.dumps({"title": "", "settings": {"policy": "zero"}, "episodes": [], "overall": summarise([])}),
        b"\xff",
    ],
)
def test_a_folder_beside_that_holds_no_finished_evaluation_is_one_sentence(tmp_path, content):
    own = results_in(tmp_path / "own", 3)
    path = tmp_path / "a/results.json"
    path.parent.mkdir()
    with pytest.raises(BadInput, match=rf"{path}: cannot be read \(No such file or directory\)"):
        table_beside(own, tmp_path / "a")
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(BadInput, match=f"{path}: not a results.json of run_libero_eval.py"):
        table_beside(own, tmp_path / "a")


def test_what_nobody_has_played_is_a_dash(tmp_path):
    own = results_in(tmp_path / "own", 3)
    head, *rows = table_text(table_beside(own)).splitlines()
    assert re.split("  +", head) == ["successes (95% interval)", "init states", "target shifted"]
    assert [re.split("  +", row) for row in rows] == [
        ["policy, flow from noise", "3 of 4 (30 to 95%)", "-"],
        ["policy, flow from zero", "-", "-"],
        ["one demo, replayed blindly", "-", "-"],
        ["standing still", "-", "-"],
    ]
    results_in(tmp_path / "shifted", 0, shift_target=0.05, policy="zero", **BLIND)
    head, *rows = table_text(table_beside(own, tmp_path / "shifted")).splitlines()
    assert re.split("  +", head) == ["successes (95% interval)", INIT, SHIFTED]
    assert re.split("  +", rows[-1]) == ["standing still", "-", "0 of 4 (0 to 49%)"]
    assert len({len(line) for line in (head, *rows)}) == 1  # columns are aligned


def test_crashes_stand_in_the_cell(tmp_path):
    own = results_in(tmp_path / "own", 3)
    own["overall"] = summarise([episode(6, 0), episode(6, 1, error="died")])
    assert re.search(r"^policy, flow from noise +1 of 1 \(21 to 100%\), 1 crashed", table_text(table_beside(own)), re.M)


ASKED = Evaluation(
    policy="checkpoint", checkpoint="best.pt", overrides=(), task_suite="libero_object", tasks=None, num_trials=None,
    init_states=None, random_resets=None,
    max_steps=280, demo=None, execute_steps=None, sample_steps=4, flow_start=None, precision="fp32", shift_target=0.0,
    visual_mesh_ratio=None, seed=0, shard=None, output_dir=None, beside=(), save_video="none", num_workers=None,
    episode_timeout=900.0,
)  # fmt: skip


def eight(directory: Path) -> dict[str, dict]:
    """Folder -> results of the eight evaluations of --side_by_side, the k-th of which solves k of 8."""
    cells = {}
    for k, (name, asked) in enumerate(conditions(ASKED, 0.05).items()):
        own = {"flow_start": asked.flow_start} if asked.policy == "checkpoint" else BLIND
        settings = {"policy": asked.policy, "shift_target": asked.shift_target} | own
        cells[name] = results_in(directory / name, k, trials=8, **settings)
    return cells


def test_success_against_delay_is_a_row_for_each_delay_and_a_server_has_rows_of_its_own(tmp_path):
    server = {"policy": "server", "server": {"name": "ACT", "weights": "abc"}, "weights_sha256": None}
    cells = {
        f"{policy}_{delay}": results_in(tmp_path / f"{policy}_{delay}", 4 - delay, decision_delay_steps=delay, **who)
        for policy, who in (("own", {}), ("server", server))
        for delay in (0, 2, 1)
    }
    table = side_by_side(cells)
    rows = [line.split("  ")[0] for line in table_text(table).splitlines()[1:]]
    assert rows == [
        "policy, flow from noise", "policy, flow from noise, steps of delay: 1",
        "policy, flow from noise, steps of delay: 2", "policy, flow from zero", "one demo, replayed blindly",
        "standing still", "server (ACT)", "server (ACT), steps of delay: 1", "server (ACT), steps of delay: 2",
    ]  # fmt: skip
    assert [played(table)[row][INIT][0] for row in (rows[0], rows[1], rows[2], rows[-1])] == [4, 3, 2, 2]
    other = results_in(tmp_path / "other", 1, **server | {"server": {"name": "ACT", "weights": "def"}})
    with pytest.raises(BadInput, match="server_1 cannot stand side by side: other: was evaluated with server"):
        side_by_side({"server_1": cells["server_1"], "other": other})
    late = replace(ASKED, decision_delay_steps=2)
    assert {one.policy: one.decision_delay_steps for one in conditions(late, 0.05).values()} == {
        "checkpoint": 2, "replay": 0, "zero": 0
    }  # fmt: skip
    with pytest.raises(BadInput, match="--side_by_side needs a number for --decision_delay_steps"):
        conditions(replace(ASKED, decision_delay_steps="auto"), 0.05)


def test_the_conditions_side_by_side_are_the_cells_of_the_table(tmp_path):
    cells = eight(tmp_path)
    table = side_by_side(cells)
    assert len(cells) == 8 and len(table) == 4 and all(row.keys() == {INIT, SHIFTED} for row in table.values())
    assert played(table)["policy, flow from noise"] == {INIT: (0, 8), SHIFTED: (1, 8)}
    assert played(table)["standing still"] == {INIT: (6, 8), SHIFTED: (7, 8)}


def test_conditions_differ_in_who_acts_the_flows_start_and_the_shift_alone():
    changed = {"policy", "flow_start", "shift_target"}
    cells = [asdict(cell) for cell in conditions(replace(ASKED, seed=3, num_workers=2), 0.05).values()]
    assert all(cell.keys() - changed == {key for key in cell if cell[key] == cells[0][key]} - changed for cell in cells)
    assert len({tuple(cell[key] for key in sorted(changed)) for cell in cells}) == 8
    assert {cell["seed"] for cell in cells} == {3}
    with pytest.raises(BadInput, match="--beside belongs to a single one"):
        conditions(replace(ASKED, beside=(Path("x"),)), 0.05)


def test_the_report_of_all_eight_has_their_figures_and_leads_to_each_ones_own(tmp_path):
    cells = eight(tmp_path)
    crashed = cells["zero_shifted"]
    crashed["overall"] = summarise([episode(6, 0, error="died")])
    page = Page(write_side_by_side_report(tmp_path, results_of_all(cells)).read_text())
    assert page.links == [f"{name}/report.html" for name in cells]  # the crashed one's, too: it says why
    for k in range(7):
        assert f"{k} of 8 (" in page.text
    assert "7 of 8" not in page.text
    title = results_of_all(cells)["title"]
    assert title == "libero_object, all 2 tasks x all 3 init states, beside blind policies and shifted targets"
    assert title in page.text and "weights_sha256" in page.text and INIT in page.text and SHIFTED in page.text


# ------------------------------------------------------------------------------------------------------- which starts


def test_episodes_begin_at_the_init_states_that_are_asked_for():
    assert [*ASKED.trials(50)] == [*range(50)] and [*ASKED.trials(90)] == [*range(50)]
    assert [*replace(ASKED, num_trials=3).trials(50)] == [0, 1, 2]
    chosen = replace(ASKED, init_states="10-12,49")
    assert [*chosen.trials(50)] == [10, 11, 12, 49]
    episodes = chosen.episodes([3, 6], chosen.trials(50))
    assert [(one.task_id, one.trial) for one in episodes[::4]] == [(3, 10), (6, 10)]
    assert episodes[0].seed == episode_seed(
        "libero_object", 3, 10, 0
    )  # that of the same state played with --num_trials
    with pytest.raises(
        BadInput, match="--init_states 10-50: there are the init states 0 to 49, there is no init state 50"
    ):
        replace(ASKED, init_states="10-50").trials(50)
    assert replace(ASKED, init_states="10-30, 31-49").init_states_played(50) == "10-49"  # one spelling
    assert replace(ASKED, init_states="0-4").init_states_played(50) is None  # those of --num_trials 5
    with pytest.raises(BadInput, match="--init_states 10-: expected init state ids"):
        replace(ASKED, init_states="10-").trials(50)
    with pytest.raises(BadInput, match="--num_trials and --init_states: each says which episodes are played"):
        replace(ASKED, num_trials=3, init_states="1")


def test_random_resets_share_no_scene_with_the_init_states_and_are_never_paired_with_them(tmp_path):
    resets = replace(ASKED, random_resets=40)
    episodes = resets.episodes([6], resets.trials(50))
    assert len({one.seed for one in episodes} | {one.seed for one in ASKED.episodes([6], range(40))}) == 80
    assert episodes[0].seed != reset_seed("while training", "libero_object", 6, 0, 0)
    assert cell_of(SETTINGS | {"random_resets": 40}, "x")[1] == "random resets"
    title = describe(SETTINGS | {"num_trials": 40, "random_resets": 40}, 80)
    assert "all 2 tasks x 40 random resets (not the suite's init states)" in title
    assert "x 3 of 50 init states (10-12)" in describe(
        SETTINGS | {"num_trials": 3, "init_states": 50, "init_states_played": "10-12"}, 6
    )
    for name, changes in (("A", {}), ("B", {"random_resets": 3})):
        results_in(tmp_path / name, 1, **changes)
    with pytest.raises(BadInput, match="no finished episode of the same suite"):
        comparison_text(tmp_path / "A/results.json", tmp_path / "B/results.json")


def test_layouts_are_of_random_resets_and_have_episodes_and_a_title_of_their_own():
    shuffled = replace(ASKED, random_resets=5, layouts="shuffled")
    resets = [replace(shuffled, layouts=name) for name in ("libero", "shuffled", "withheld_exchange")]
    assert len({one.seed for asked in resets for one in asked.episodes([6], range(5))}) == 15
    settings = SETTINGS | {"num_trials": 5, "random_resets": 5, "layouts": "withheld_exchange"}
    assert "5 random resets (the object asked for at the place of another" in describe(settings, 10)
    with pytest.raises(BadInput, match=r"cannot stand side by side: .* layouts"):
        check_comparable({"A": settings, "B": settings | {"layouts": "shuffled", "policy": "zero"}})
    for changes, problem in (
        ({"random_resets": None}, "--layouts shuffled needs --random_resets"),
        ({"shift_target": 0.05}, "--shift_target: --layouts shuffled moves every object already"),
        ({"task_suite": "libero_goal"}, "--layouts shuffled: only the scenes of libero_object, not of libero_goal"),
    ):
        with pytest.raises(BadInput, match=problem):
            replace(shuffled, **changes)


def test_a_failure_is_told_by_what_it_lifted_and_knocked_over(tmp_path):
    def failure(trial: int, *lifted: str, **outcome) -> dict:
        return episode(6, trial, success=False) | {"asked_for": ["butter_1"], "lifted": [*lifted]} | outcome

    solved = episode(6, 0) | {"asked_for": ["butter_1"], "lifted": ["butter_1"]}
    failures = [failure(1), failure(2, "milk_1", "butter_1"), failure(3, "milk_1"), failure(4, "ketchup_1"), failure(5)]
    row = summarise([solved, *failures, episode(6, 6, success=False), episode(6, 7, error="died")])
    found = row["lifted_in_failures"]
    assert found == {"nothing": 2, "the object asked for": 1, "milk_1": 1, "ketchup_1": 1}  # 6 was not recorded yet
    text = "2 nothing, 1 the object asked for, 2 another (milk_1, ketchup_1)"
    assert causes_text(row) == text and row["fallen_in_failures"] is None
    assert causes_text({"lifted_in_failures": {"milk_1": 2, "butter_1": 1}}) == "3 another (2 x milk_1, butter_1)"
    failures[0]["fallen"], failures[2]["fallen"] = ["butter_1", "milk_1"], ["ketchup_1"]
    row, text = summarise([solved, *failures]), f"{text}; the object asked for fell over in 1"
    assert causes_text(row) == text
    folder = folder_with(tmp_path, solved, *failures)
    results = {
        "title": "t", "overall": row, "tasks": [{"task_id": 6, "task": "pick"} | row], "episodes": folder.episodes,
        "settings": SETTINGS, "checkpoint": None, "checkpoint_epoch": None, "code": [], "renderer": [],
        "side_by_side": {},
    }  # fmt: skip
    page = Page(write_report(tmp_path, results).read_text()).text
    assert text in page and "lifted nothing; butter_1 (asked for), milk_1 fell over; 100 steps" in page


# ---------------------------------------------------------------------------------------------------------- report


def test_the_report_opens_from_disk_with_all_its_pictures(tmp_path):
    said = "killed by SIGSEGV\nFatal Python error: <Segmentation fault>"
    episodes = [episode(3, 0), broken(3, 1), episode(6, 0, error=said), episode(6, 1) | {"tries": 2}]
    episodes[3]["earlier_crash"] = "killed by SIGKILL"
    folder = folder_with(tmp_path, *episodes)
    grey = np.full((256, 256, 3), 120, np.uint8)
    write_png(grey, folder.pictures / "task3_trial1_last.png")
    write_mp4([grey] * 3, folder.pictures / "task3_trial0_success.mp4", 10)
    write_mp4([grey] * 5, folder.pictures / "task3_trial1_failure.mp4", 10)
    tasks = [
        {"task_id": task, "task": SETTINGS["instructions"][str(task)]}
        | summarise([one for one in episodes if one["task_id"] == task])
        for task in (3, 6)
    ]
    results = {
        "title": describe(SETTINGS, 4), "overall": summarise(episodes), "tasks": tasks, "episodes": episodes,
        "settings": SETTINGS, "checkpoint": "<best>.pt", "checkpoint_epoch": 3, "code": ["c0ffee"], "renderer": ["egl"],
    }  # fmt: skip
    elsewhere = {"settings": SETTINGS | {"shift_target": 0.05}, "overall": summarise([episode(3, 0)])}
    results["side_by_side"] = side_by_side({OWN: results, "elsewhere": elsewhere})
    page = Page(write_report(tmp_path, results).read_text())
    assert set(page.links) == {
        "success_rates.png", "task3.mp4", "task3.jpg", "failures.png", "episodes/task3_trial0_success.mp4",
        "episodes/task3_trial1_failure.mp4", "episodes/task3_trial1_last.png",
    }  # fmt: skip
    assert all((tmp_path / link).stat().st_size > 0 for link in page.links)
    assert said in page.text and "killed by SIGKILL" in page.text and "take <this> & that" in page.text
    assert "2/3 successes = 66.7%" in page.text and "c0ffee" in page.text
    assert "Task 3, init state 1" in page.text
    assert "broken off by the policy's own actions after 3 steps: the action [nan] is <wrong>" in page.text
    assert "1 of the failures broken off by the policy's own actions · 1 crashed" in page.text
    (folder.pictures / "task3_trial0_success.mp4").write_bytes(b"half a video")
    with pytest.raises(BadInput, match=r"task3_trial0_success.mp4: not readable as a video"):
        write_report(tmp_path, results)
    (folder.pictures / "task3_trial1_last.png").write_bytes(b"half a picture")
    with pytest.raises(BadInput, match=r"task3_trial1_last.png: not readable as a picture"):
        write_report(tmp_path, results)
    assert "2 of 3 (21 to 94%)" in page.text
    assert "Side by side" in page.text and "1 of 1 (21 to 100%)" in page.text


def test_a_report_without_an_evaluation_beside_it_has_no_table(tmp_path):
    folder = folder_with(tmp_path, episode(3, 0))
    tasks = [{"task_id": 3, "task": "x"} | summarise(folder.episodes)]
    results = {
        "title": "", "overall": summarise(folder.episodes), "tasks": tasks, "episodes": folder.episodes,
        "settings": SETTINGS, "checkpoint": None, "checkpoint_epoch": None, "code": [], "renderer": [],
    }  # fmt: skip
    results["side_by_side"] = side_by_side({OWN: results})
    page = Page(write_report(tmp_path, results).read_text())
    assert "1/1 successes" in page.text and "Side by side" not in page.text
