"""The rows of the tables in docs/learning.md are what their names say."""

import json
import re
from functools import cache

import pytest
from helpers import ROOT, one_sentence, run

from config import Config, load_config
from experiments.learning import training_minutes
from experiments.tables import TABLES
from training.run_log import PHASE_DIRECTORIES

TEN = TABLES["ten_tasks"]
EPOCHS = {"training.phase1.num_epochs", "training.phase2.num_epochs"}
OF_NO_WEIGHT = {"training.log_interval", "training.checkpoint_directory"}


@cache
def config_of(table: str, name: str, phase: int) -> Config:
    return load_config(*TABLES[table].settings(name, phase))


def flat(tree: dict, prefix: str = "") -> dict:
    found = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def difference(one: Config, other: Config) -> dict:
    """What the first has where it is another than the second's."""
    before = flat(other.to_dict())
    return {key: value for key, value in flat(one.to_dict()).items() if value != before[key]}


def differs_from_best(name: str, phase: int) -> dict:
    return difference(config_of("ten_tasks", name, phase), config_of("ten_tasks", "best", phase))


@pytest.mark.parametrize("table", TABLES)
def test_the_settings_of_every_row_are_accepted_and_no_other_row_has_them(table):
    rows, seen = TABLES[table].rows, {}
    for name in rows:
        of_row = [config_of(table, name, phase) for phase in PHASE_DIRECTORIES]
        assert of_row not in seen.values(), name
        seen[name] = of_row
    for name, row in rows.items():
        assert seen[name][0] == seen[row.encoder_of or name][0]  # so that its phase 1 can be taken over


@pytest.mark.parametrize("name", ["best", "random"])
def test_a_quick_row_trains_for_one_epoch_where_the_row_trains(name):
    quick = load_config(*TEN.quick().settings(name, 1)).training.phase1.num_epochs
    assert quick == {"best": 1, "random": 0}[name]


def test_the_best_of_ten_tasks_is_the_recipe_of_its_file_in_fewer_epochs():
    recipe = load_config("conf/libero_object_cpu.yaml")
    assert config_of("ten_tasks", "best", 1) == config_of("ten_tasks", "best", 2)
    fewer = difference(config_of("ten_tasks", "best", 1), recipe)
    assert fewer.keys() == EPOCHS and all(0 < count < flat(recipe.to_dict())[key] for key, count in fewer.items())
    assert recipe.data.data_directory == TEN.data_directory and recipe.data.demos_per_task == TEN.demos


def test_rows_that_train_the_encoder_in_phase_2_shift_its_pictures_as_phase_1_does():
    shift = config_of("ten_tasks", "best", 1).training.phase1.image_shift
    in_phase_2 = {"training.phase2.freeze_encoder": False, "training.phase2.image_shift": shift}
    assert shift > 0
    assert differs_from_best("fine_tuned", 1) == {}
    assert differs_from_best("fine_tuned", 2) == in_phase_2
    untrained = {"training.phase1.num_epochs": 0}
    assert differs_from_best("random", 1) == differs_from_best("random", 2) == untrained
    assert differs_from_best("end_to_end", 2) == untrained | in_phase_2


@pytest.mark.parametrize("file", [TEN.results, "experiments/results/learning_ten_tasks_619171a.json"])
def test_a_published_row_has_every_episode_that_it_counts(file):
    rows = json.loads((ROOT / file).read_text())["rows"]
    seeds = [seed for row in rows.values() for seed in row["seeds"].values()]
    assert seeds
    for of_seed in seeds:
        played = {cell: count for cell, count in of_seed["rollouts"].items() if count}
        assert played
        for cell, count in played.items():
            signs = "".join(of_seed["episodes"][cell].values())
            assert [signs.count("1"), len(signs)] == count
            assert sum(of_seed["lifted_in_failures"][cell].values()) == signs.count("0")


@pytest.mark.parametrize("phase", PHASE_DIRECTORIES)
def test_the_plain_row_is_its_config_file_and_nothing_else(phase):
    assert config_of("ten_tasks", "plain", phase) == load_config([*TEN.configs, "conf/plain.yaml"], TEN.changes)


@pytest.mark.parametrize("phase", PHASE_DIRECTORIES)
def test_the_guides_row_has_the_guides_values_in_all_but_size_data_and_steps(phase):
    row, guide = config_of("ten_tasks", "guide", phase), load_config("conf/plain.yaml")
    in_small = EPOCHS | OF_NO_WEIGHT
    left = difference(row, guide).keys()
    assert {key for key in left if not key.startswith(("data.", "model."))} == in_small
    assert {key for key in left if key.startswith("model.")} == {
        "model.image_size", "model.embed_dim", "model.encoder_depth", "model.policy_embed_dim",
    }  # fmt: skip
    best = config_of("ten_tasks", "best", phase)
    assert row.training.phase1.num_epochs == best.training.phase1.num_epochs
    assert row.training.phase2.num_epochs == best.training.phase2.num_epochs
    assert load_config("conf/guide.yaml") == load_config()


def test_ten_tasks_have_the_demonstrations_of_their_make_target():
    makefile = (ROOT / "Makefile").read_text()
    flags = re.findall(r"^(?:libero-object-cpu: )?DEMOS \+?:?= (.*)", makefile, re.M)
    asked = " ".join(flags).split()
    assert len(flags) == 2
    of_table = ["--tasks", f"{TEN.tasks[0]}-{TEN.tasks[-1]}", *map(str, TEN.collection)]
    assert sorted(zip(asked[::2], asked[1::2], strict=True)) == sorted(zip(of_table[::2], of_table[1::2], strict=True))


def test_minutes_of_a_training_leave_out_its_interruption_and_count_a_repeated_step_once(tmp_path):
    lines = [
        {"split": "train", "step": 10, "samples_per_s": 64},  # 10 steps of 64 samples: 10 s
        {"split": "train", "step": 20, "samples_per_s": 8},
        {"split": "validation", "step": 20, "loss": 1.0},
        {"split": "train", "step": 20, "samples_per_s": 32},  # 20 s, the step having been done again
        {"split": "train", "step": 25, "samples_per_s": 64},  # 5 s
    ]
    texts = [json.dumps(line) for line in lines]
    texts.insert(2, texts[0][:30])  # a run that was killed left half a line
    (tmp_path / "metrics.jsonl").write_text("\n".join(texts) + "\n")
    assert training_minutes(tmp_path / "metrics.jsonl", 64) == pytest.approx(35 / 60)
    (tmp_path / "none.jsonl").write_text(json.dumps(lines[2]) + "\n")  # of an untrained row
    assert training_minutes(tmp_path / "none.jsonl", 64) == 0


@pytest.mark.simulator
def test_a_policy_is_played_once_wherever_it_is_asked_for_and_every_episode_is_kept(tmp_path):
    command = (
        "-m", "experiments.everywhere", "--quick", "--checkpoint", "checkpoints/pretrained/libero_object_cpu",
        "--output_dir", tmp_path, "--num_workers", 1,
    )  # fmt: skip
    said = run(*command, "--scenes", "withheld_place").stdout
    (line,) = (line.strip() for line in said.splitlines() if line.startswith("  withheld_place"))
    assert " ".join(line.split()) == "withheld_place 0 of 1 0 to 79% - 1 0 0 0 - -"  # in 20 steps nothing is lifted
    kept = json.loads((tmp_path / "quick/everywhere.json").read_text())["scenes"]["withheld_place"]
    assert [episode["steps"] for episode in kept["episodes"]] == [20]
    assert kept["settings"]["visual_mesh_ratio"] == 1 and kept["settings"]["layouts"] == "withheld_place"
    again = run(*command, "--scenes", "withheld_place").stdout
    assert line in again and "1 episodes are there already, 0 are missing" in again
    blind = run(*command, "--scenes", "lan", "--blind").stdout  # whose words no demonstration has to be replayed
    assert re.search(r"lan +0 of 1 +0 to 79% +- +1 +0 +0 +0 +0 of 1 +-$", blind, re.M)
    stood = json.loads((tmp_path / "quick/everywhere.json").read_text())["blind"]["lan"]
    assert stood.keys() == {"zero"} and stood["zero"]["settings"]["policy"] == "zero"
    looks = [str(word).replace("object_cpu", "object_looks") for word in command]
    refused = run(*looks, "--scenes", "withheld_place", expect=1).stderr
    assert "weights_sha256" in refused
    sentence = one_sentence(run(*command, "--scenes", "moon", expect=1))
    assert sentence.startswith("error: --scenes moon: no such scenes; known are init_states, shifted_5cm")
