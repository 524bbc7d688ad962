"""train.py and eval.py: checkpoints, resume, two processes with gloo, and bad input."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers import ROOT, fitted, one_sentence, phase1_batch, refused, run, settings, small_config, train_here
from libero_files import write_task_file
from small_trainings import ranks_of, trained
from torch.nn.parallel import DistributedDataParallel

import train
from config import parse_config
from errors import BadInput
from jepa.all_ranks import gather_rows
from jepa.temporal_predictor import FORESIGHT
from provenance import code_version
from published.card import card_of
from statevla_model import StateVLATrainer, build_trainer, load_checkpoint
from training.checkpoint import SCHEMA, instructions_of, read_checkpoint, save_checkpoint
from training.processes import join_processes, seed_noise
from training.run_log import PHASE_DIRECTORIES, against_divergence, check_finite, is_collapsing


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("demos")
    write_task_file(directory, demos=4)
    write_task_file(directory, task="pick_up_the_butter_and_place_it_in_the_basket", demos=4, seed=1)
    run("embed_language.py", "--data_directory", directory, "--encoder", "offline")
    return directory


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory) -> Path:
    """The guide's two commands, phase 1 then phase 2."""
    directory = tmp_path_factory.mktemp("checkpoints")
    both = settings(data__data_directory=data, training__checkpoint_directory=directory)
    run("train.py", "--config", "conf/config.yaml", "--phase", 1, *both)
    encoder = directory / "phase1_temporal_jepa/checkpoint_best.pt"
    run("train.py", "--config", "conf/config.yaml", "--phase", 2, "--phase1_checkpoint", encoder, *both)
    return directory


def metrics(directory: Path, split: str) -> list[dict]:
    lines = (json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["split"] == split]


# ----------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("phase, folder", [(1, "phase1_temporal_jepa"), (2, "phase2_flow_matching")])
def test_checkpoints_have_the_guides_files_and_keys(runs, phase, folder):
    names = {path.name for path in (runs / folder).glob("*.pt")}
    epochs = {f"checkpoint_epoch_{epoch}.pt" for epoch in (1, 2, 3)}
    assert names == {"checkpoint_latest.pt", "checkpoint_best.pt"} | epochs
    checkpoint = torch.load(runs / folder / "checkpoint_latest.pt", weights_only=True)
    assert {"epoch", "model_state_dict", "optimizer_state_dict", "loss", "config", "phase"} <= checkpoint.keys()
    assert (checkpoint["epoch"], checkpoint["phase"]) == (3, phase)
    assert isinstance(checkpoint["loss"], float)
    assert checkpoint["config"]["model"]["embed_dim"] == 32
    assert set(checkpoint["language"]["embeddings"]) == {
        f"pick up the {thing} and place it in the basket" for thing in ("milk", "butter")
    }


@pytest.mark.parametrize("folder", ["phase1_temporal_jepa", "phase2_flow_matching"])
def test_best_checkpoint_is_that_of_the_lowest_validation_loss(runs, folder):
    losses = {line["epoch"]: line["loss"] for line in metrics(runs / folder, "validation")}
    best = read_checkpoint(runs / folder / "checkpoint_best.pt")
    assert best["epoch"] == min(losses, key=losses.get)
    assert best["loss"] == pytest.approx(min(losses.values()))


def test_logs_have_the_guides_names(runs):
    phase1 = metrics(runs / "phase1_temporal_jepa", "train")[0]
    phase2 = metrics(runs / "phase2_flow_matching", "train")[0]
    assert {"jepa_mse", "jepa_variance", "jepa_covariance", "learning_rate", "waiting_for_data"} <= phase1.keys()
    assert {"pos_rot_loss", "gripper_loss", "action_loss"} <= phase2.keys()
    assert phase2["action_loss"] == pytest.approx(phase2["pos_rot_loss"] + phase2["gripper_loss"], rel=1e-5)


def test_phase2_leaves_the_encoder_bit_identical(runs):
    before = read_checkpoint(runs / "phase1_temporal_jepa/checkpoint_best.pt")["model_state_dict"]
    after = read_checkpoint(runs / "phase2_flow_matching/checkpoint_latest.pt")["model_state_dict"]
    encoder = [name for name in before if name.startswith("model.state_encoder.")]
    assert len(encoder) > 50
    assert all(torch.equal(before[name], after[name]) for name in encoder)
    policy = [name for name in before if name.startswith(("model.policy.", "model.gripper."))]
    assert all(not torch.equal(before[name], after[name]) for name in policy if name.endswith("weight"))


def test_action_statistics_are_those_of_the_training_demos(runs, data):
    checkpoint = read_checkpoint(runs / "phase2_flow_matching/checkpoint_best.pt")
    actions = []
    for path in sorted(data.glob("*.hdf5")):
        with h5py.File(path) as file:
            demos = [key for key in file["data"] if f"{path.name}/{key}" not in checkpoint["held_out_demos"]]
            actions += [torch.from_numpy(file["data"][key]["actions"][:, :6]) for key in demos]
    assert len(actions) == 6
    actions = torch.cat(actions)
    state = checkpoint["model_state_dict"]
    torch.testing.assert_close(state["model.policy.normalizer.mean"].double(), actions.mean(dim=0))
    torch.testing.assert_close(state["model.policy.normalizer.std"].double(), actions.std(dim=0, correction=0))


def test_a_checkpoint_rebuilds_its_model_alone(runs, tmp_path):
    copy = tmp_path / "elsewhere.pt"
    copy.write_bytes((runs / "phase2_flow_matching/checkpoint_best.pt").read_bytes())
    model = load_checkpoint(copy)
    weights = read_checkpoint(copy)["model_state_dict"]
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[f"model.{name}"]), name
    assert not model.training


def test_an_interrupted_save_leaves_the_previous_checkpoint(tmp_path):
    path = tmp_path / "checkpoint_latest.pt"
    save_checkpoint({"epoch": 1}, path)
    with pytest.raises(AttributeError):
        save_checkpoint({"epoch": 2, "cannot be saved": lambda: None}, path)
    assert torch.load(path, weights_only=True)["epoch"] == 1
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("setting, precision", [("data.cache=none", 0), ("training.phase2.store_states=false", 1e-4)])
def test_losses_do_not_depend_on_what_is_stored(runs, data, tmp_path, setting, precision):
    """Neither on where frames are read from (exactly), nor on whether phase 2 encodes them once or in every epoch."""
    both = settings(data__data_directory=data, training__checkpoint_directory=tmp_path)
    phase = 1 if setting.startswith("data") else 2
    encoder = ["--phase1_checkpoint", runs / "phase1_temporal_jepa/checkpoint_best.pt"]
    run("train.py", "--phase", phase, *(encoder if phase == 2 else ()), *both, "--set", setting)
    folder = PHASE_DIRECTORIES[phase]
    for split in ("train", "validation"):
        expected, found = ([line["loss"] for line in metrics(root / folder, split)] for root in (runs, tmp_path))
        assert len(expected) >= 3
        assert found == pytest.approx(expected, rel=precision, abs=0)


def test_phase2_reads_no_picture_once_the_states_are_stored(runs, data, tmp_path):
    for path in data.glob("*"):
        if path.is_file():
            (tmp_path / path.name).symlink_to(path)
    states = next((runs / "frozen_states").glob("*.npy"))
    (tmp_path / "runs/frozen_states").mkdir(parents=True)
    (tmp_path / "runs/frozen_states" / states.name).write_bytes(states.read_bytes())
    both = settings(data__data_directory=tmp_path, training__checkpoint_directory=tmp_path / "runs")
    encoder = runs / "phase1_temporal_jepa/checkpoint_best.pt"
    phase1_shifts = ("--set", "training.phase1.image_shift=2")  # no matter here
    said = run("train.py", "--phase", 2, "--phase1_checkpoint", encoder, *both, *phase1_shifts).stdout
    assert "read from" in said
    assert not (tmp_path / "frame_cache").exists()
    run("train.py", "--phase", 2, "--phase1_checkpoint", encoder, *both, "--set", "training.phase2.image_shift=2")
    assert (tmp_path / "frame_cache").exists()  # shifted pictures are encoded anew: the stored states do not fit them


def test_bfloat16_and_recomputed_activations_train_to_nearly_the_same_losses(data, tmp_path):
    both = settings(data__data_directory=data, training__checkpoint_directory=tmp_path)
    folder = "phase1_temporal_jepa"
    run("train.py", "--phase", 1, *both, "--set", "training.precision=fp32")
    expected = metrics(tmp_path / folder, "train")
    changes = ("--set", "training.precision=bf16", "--set", "training.activation_checkpointing=true")
    run("train.py", "--phase", 1, *both, *changes)
    found = metrics(tmp_path / folder, "train")
    assert [line["loss"] for line in found] == pytest.approx([line["loss"] for line in expected], rel=0.05)
    assert [line["loss"] for line in found] != [line["loss"] for line in expected]
    weights = read_checkpoint(tmp_path / folder / "checkpoint_latest.pt")["model_state_dict"]
    assert {value.dtype for value in weights.values()} == {torch.float32}


def test_phase1_trains_on_shifted_pictures_and_validates_on_whole_ones(runs, data, tmp_path):
    both = settings(data__data_directory=data, training__checkpoint_directory=tmp_path)
    still = ("--set", "training.learning_rate=1e-12", "--set", "training.phase1.num_epochs=1")  # weights hardly move
    validation, training = {}, {}
    for shift in (0, 8):
        run("train.py", "--phase", 1, *both, *still, "--set", f"training.phase1.image_shift={shift}")
        folder = tmp_path / "phase1_temporal_jepa"
        validation[shift] = [line["jepa_mse"] for line in metrics(folder, "validation")]
        training[shift] = [line["jepa_mse"] for line in metrics(folder, "train")]
    assert validation[8] == pytest.approx(validation[0], rel=1e-3)
    assert training[8] != pytest.approx(training[0], rel=1e-2)


def test_the_latest_checkpoint_is_written_after_all_that_it_says_there_is(data, tmp_path, monkeypatch):
    written = []

    def note(checkpoint, path):
        written.append(path.name)
        save_checkpoint(checkpoint, path)

    monkeypatch.setattr("training.saving.save_checkpoint", note)
    every_epoch = {"training__save_interval": 2, "training__save_minutes": 0}
    both = settings(data__data_directory=data, training__checkpoint_directory=tmp_path, **every_epoch)
    train_here(monkeypatch, "--phase", 1, *both, "--set", "training.phase1.num_epochs=2")
    best, latest = "checkpoint_best.pt", "checkpoint_latest.pt"
    assert written[:2] == [best, latest]  # the first epoch is the best so far
    assert written[2:] in (["checkpoint_epoch_2.pt", best, latest], ["checkpoint_epoch_2.pt", latest])


def test_checkpoints_name_the_schema_and_the_commit_of_their_code(runs):
    checkpoint = torch.load(runs / "phase1_temporal_jepa/checkpoint_latest.pt", weights_only=True)
    assert (checkpoint["schema"], checkpoint["split_rule"]) == (SCHEMA, 2)
    assert checkpoint["code"] == code_version()


def test_a_model_that_is_no_longer_finite_is_never_saved(runs, data, tmp_path):
    """Between two log lines, too: of a run without any, the checkpoint before it stays."""
    folder = tmp_path / "phase1_temporal_jepa"
    folder.mkdir()
    latest = folder / "checkpoint_latest.pt"
    latest.write_bytes((runs / "phase1_temporal_jepa/checkpoint_epoch_1.pt").read_bytes())
    before = latest.read_bytes()
    both = settings(data__data_directory=data, training__checkpoint_directory=tmp_path, training__log_interval=1000)
    broken = ("--set", "training.learning_rate=1e30")
    said = one_sentence(run("train.py", "--phase", 1, "--checkpoint", latest, *both, *broken, expect=2))
    assert "training diverged: " in said and "jepa_mse" in said and "lower the learning rate (1e+30)" in said
    assert latest.read_bytes() == before
    assert {path.name for path in folder.iterdir()} == {"checkpoint_latest.pt", "checkpoint_best.pt", "metrics.jsonl"}


def test_phase2_holds_out_what_phase1_has_held_out_by_whatever_rule(runs, data, tmp_path, monkeypatch):
    encoder = read_checkpoint(runs / "phase1_temporal_jepa/checkpoint_best.pt")
    names = [f"{path.name}/demo_{number}" for path in sorted(data.glob("*.hdf5")) for number in range(4)]
    others = [name for name in names if name not in encoder["held_out_demos"]]
    del encoder["split_rule"]  # as in a checkpoint of the first rule
    listed = [next(name for name in others if name.startswith(path.name)) for path in sorted(data.glob("*.hdf5"))]
    save_checkpoint(encoder | {"held_out_demos": listed}, tmp_path / "phase1.pt")
    both = settings(data__data_directory=data, training__checkpoint_directory=tmp_path, training__phase2__num_epochs=1)
    train_here(monkeypatch, "--phase", 2, "--phase1_checkpoint", tmp_path / "phase1.pt", *both)
    found = read_checkpoint(tmp_path / "phase2_flow_matching/checkpoint_latest.pt")
    assert (found["held_out_demos"], found["split_rule"]) == (listed, 1)


# ------------------------------------------------------------------------------------- two writers, kills, Ctrl-C


@pytest.fixture
def long_training(data, tmp_path):
    """A training that would go on for minutes, after its first epoch."""
    often = {"training__save_interval": 100_000, "training__save_minutes": 0}  # the latest alone, after every epoch
    changes = {"training__phase1__num_epochs": 100_000, "training__checkpoint_directory": tmp_path}
    both = settings(data__data_directory=data, **changes, **often)
    command = [sys.executable, "train.py", "--phase", "1", *map(str, both)]
    started = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore Ctrl-C
    )  # fmt: skip
    latest = tmp_path / "phase1_temporal_jepa/checkpoint_latest.pt"
    while not latest.exists():
        assert started.poll() is None, started.stdout.read().decode()
        time.sleep(0.05)
    yield started, latest, both
    started.kill()
    started.wait()


def test_a_second_training_in_the_same_folder_is_refused_and_ctrl_c_says_how_the_first_goes_on(
    long_training, monkeypatch, capsys
):
    started, latest, both = long_training
    with pytest.raises(SystemExit, match="2"):
        train_here(monkeypatch, "--phase", 1, *both)
    said = capsys.readouterr().err
    assert f"{latest.parent}: another training writes into it (process {started.pid} on " in said
    started.send_signal(signal.SIGINT)
    output = started.communicate()[0].decode()
    assert started.returncode == 130 and "Traceback" not in output
    assert f"the same command with --checkpoint {latest} goes on" in output
    assert not list(latest.parent.parent.glob(".*.lock")) and not list(latest.parent.glob("*.part"))
    epoch = read_checkpoint(latest)["epoch"]
    train_here(
        monkeypatch, "--phase", 1, "--checkpoint", latest, *both, "--set", f"training.phase1.num_epochs={epoch + 1}"
    )
    assert read_checkpoint(latest)["epoch"] == epoch + 1


# ---------------------------------------------------------------------------------------------------------- resume


def test_a_run_that_goes_on_elsewhere_takes_its_best_checkpoint_with_it(runs, data, tmp_path, monkeypatch):
    folder, before = "phase2_flow_matching", tmp_path / "before"
    before.mkdir()
    for name in ("checkpoint_best.pt", "checkpoint_latest.pt"):
        (before / name).write_bytes((runs / folder / name).read_bytes())
    best = read_checkpoint(before / "checkpoint_best.pt") | {"loss": -1.0}
    save_checkpoint(best, before / "checkpoint_best.pt")  # never to be beaten
    save_checkpoint(
        read_checkpoint(before / "checkpoint_latest.pt") | {"best_loss": -1.0}, before / "checkpoint_latest.pt"
    )
    both = settings(data__data_directory=data, training__phase2__num_epochs=4)
    for alone in (False, True):
        elsewhere = tmp_path / f"elsewhere_{alone}"
        if alone:  # the best one is gone: the best of what follows is kept
            (before / "checkpoint_best.pt").unlink()
        train_here(
            monkeypatch, "--phase", 2, "--checkpoint", before / "checkpoint_latest.pt", *both,
            "--set", f"training.checkpoint_directory={elsewhere}",
        )  # fmt: skip
        found = read_checkpoint(elsewhere / folder / "checkpoint_best.pt")
        latest = read_checkpoint(elsewhere / folder / "checkpoint_latest.pt")
        assert found["loss"] == latest["best_loss"] == (latest["loss"] if alone else -1.0)
        assert found["epoch"] == (4 if alone else best["epoch"])


def test_best_is_by_success_where_rollouts_are_played_and_a_resumed_run_keeps_it(runs, data, tmp_path, monkeypatch):
    shares = iter([0.5, 0.5, 0.25, 0.25, 0.75])
    monkeypatch.setattr("training.validation.success_rate", lambda *_: next(shares))
    monkeypatch.setattr(train, "tasks_of", lambda *_: {6: "pick up the butter"})
    folder = tmp_path / "phase2_flow_matching"
    both = settings(
        data__data_directory=data, training__checkpoint_directory=tmp_path, training__phase2__rollout_interval=2,
        training__phase2__num_epochs=8,
    )  # fmt: skip
    encoder = runs / "phase1_temporal_jepa/checkpoint_best.pt"
    train_here(monkeypatch, "--phase", 2, "--phase1_checkpoint", encoder, *both)
    lines = {line["epoch"]: line for line in metrics(folder, "validation")}
    assert {epoch: line.get("success_rate") for epoch, line in lines.items() if epoch > 1} == {
        2: 0.5, 3: None, 4: 0.5, 5: None, 6: 0.25, 7: None, 8: 0.25,
    }  # fmt: skip
    first = 4 if lines[4]["loss"] < lines[2]["loss"] else 2
    best, latest = (read_checkpoint(folder / f"checkpoint_{name}.pt") for name in ("best", "latest"))
    assert (best["epoch"], best["success"]) == (first, 0.5)
    assert (latest["best_success"], latest["best_loss"]) == (0.5, lines[first]["loss"])

    resumed = [*both, "--set", "training.phase2.num_epochs=10"]
    (folder / "checkpoint_best.pt").unlink()  # it is found among the epochs
    train_here(monkeypatch, "--phase", 2, "--checkpoint", folder / "checkpoint_epoch_8.pt", *resumed)
    assert read_checkpoint(folder / "checkpoint_best.pt")["epoch"] == 10
    assert read_checkpoint(folder / "checkpoint_epoch_9.pt")["best_success"] == 0.5
    # Where none are played any more, the loss alone decides.
    without = [*both, "--set", "training.phase2.num_epochs=11", "--set", "training.phase2.rollout_interval=0"]
    train_here(monkeypatch, "--phase", 2, "--checkpoint", folder / "checkpoint_epoch_10.pt", *without)
    before, after = (read_checkpoint(folder / f"checkpoint_{name}.pt") for name in ("epoch_10", "latest"))
    is_better = after["loss"] < before["best_loss"]
    assert read_checkpoint(folder / "checkpoint_best.pt")["epoch"] == (11 if is_better else 10)
    assert after["best_success"] == -1.0


@pytest.mark.parametrize("phase, folder", [(1, "phase1_temporal_jepa"), (2, "phase2_flow_matching")])
def test_resume_continues_the_same_loss_curve(runs, data, tmp_path, phase, folder):
    both = settings(data__data_directory=data, training__checkpoint_directory=tmp_path)
    run("train.py", "--phase", phase, "--checkpoint", runs / folder / "checkpoint_epoch_2.pt", *both)
    assert_same_last_epoch(runs / folder, tmp_path / folder)


def assert_same_last_epoch(whole_run: Path, resumed_run: Path) -> None:
    """Bit for bit, of a run and of one that was resumed for its last epoch."""
    whole, resumed = (read_checkpoint(folder / "checkpoint_latest.pt") for folder in (whole_run, resumed_run))
    for name, value in whole["model_state_dict"].items():
        torch.testing.assert_close(value, resumed["model_state_dict"][name], rtol=0, atol=0, equal_nan=True, msg=name)
    assert whole["best_loss"] == resumed["best_loss"]
    for split in ("train", "validation"):
        lines = [line for line in metrics(whole_run, split) if line["epoch"] == whole["epoch"]]
        again = metrics(resumed_run, split)
        assert len(lines) > 0
        assert [line["loss"] for line in lines] == [line["loss"] for line in again]
        assert [line["step"] for line in lines] == [line["step"] for line in again]


def test_foresight_and_masking_train_and_resume(data, tmp_path):
    changes = {"foresight_weight": 1, "proprioception_masking": 0.5, "num_epochs": 2}
    both = settings(data__data_directory=data, **{f"training__phase1__{key}": value for key, value in changes.items()})
    whole, resumed = (("--set", f"training.checkpoint_directory={tmp_path / name}") for name in ("whole", "resumed"))
    folder = PHASE_DIRECTORIES[1]
    run("train.py", "--phase", 1, *both, *whole)
    for split in ("train", "validation"):
        lines = metrics(tmp_path / "whole" / folder, split)
        assert {"foresight", "jepa_mse", "jepa_variance", "jepa_covariance"} <= lines[0].keys()
        assert all(math.isfinite(value) for line in lines for value in line.values() if isinstance(value, float))
    losses = [line["loss"] for line in metrics(tmp_path / "whole" / folder, "train")]
    assert sum(losses[-4:]) < sum(losses[:4])
    run(
        "train.py", "--phase", 1, "--checkpoint", tmp_path / "whole" / folder / "checkpoint_epoch_1.pt", *both, *resumed
    )
    assert_same_last_epoch(tmp_path / "whole" / folder, tmp_path / "resumed" / folder)


def test_a_run_that_kept_an_average_of_its_weights_is_evaluated_and_not_resumed(
    runs, data, tmp_path, monkeypatch, capsys
):
    """As versions up to this one could."""
    saved = read_checkpoint(runs / "phase2_flow_matching/checkpoint_epoch_2.pt")
    saved["config"]["training"]["phase2"]["weight_average"] = 0.999
    saved["last_weights"] = [torch.zeros(3)]
    save_checkpoint(saved, tmp_path / "average.pt")
    both = settings(data__data_directory=data, training__checkpoint_directory=tmp_path / "more")
    said = refused(monkeypatch, capsys, "--phase", 2, "--checkpoint", tmp_path / "average.pt", *both)
    assert "average.pt: holds an average of its last weights (training.phase2.weight_average), which this" in said
    weights = load_checkpoint(tmp_path / "average.pt").state_dict()
    for name, value in load_checkpoint(runs / "phase2_flow_matching/checkpoint_epoch_2.pt").state_dict().items():
        torch.testing.assert_close(weights[name], value, rtol=0, atol=0, equal_nan=True)


@pytest.fixture(scope="module")
def joint(data, tmp_path_factory) -> Path:
    """No phase 1, and a phase 2 that trains the encoder on."""
    directory = tmp_path_factory.mktemp("joint")
    both = settings(**JOINT, data__data_directory=data, training__checkpoint_directory=directory)
    run("train.py", "--phase", 1, *both)
    encoder = directory / "phase1_temporal_jepa/checkpoint_best.pt"
    run("train.py", "--phase", 2, "--phase1_checkpoint", encoder, *both)
    return directory


JOINT = {
    "training__phase1__num_epochs": 0, "training__phase2__num_epochs": 2, "training__phase2__freeze_encoder": "false",
}  # fmt: skip


def test_a_phase_of_no_epochs_keeps_the_untrained_model(joint):
    best, latest = (
        read_checkpoint(joint / f"phase1_temporal_jepa/checkpoint_{name}.pt") for name in ("best", "latest")
    )
    assert (best["epoch"], best["step"], best["phase"]) == (0, 0, 1)
    config = parse_config(best["config"], "checkpoint")
    torch.manual_seed(config.training.seed)
    untrained = build_trainer(config, 1).state_dict()
    assert untrained.keys() == best["model_state_dict"].keys() == latest["model_state_dict"].keys()
    for name, value in untrained.items():
        if name.startswith("robot_normalizer."):  # fitted to the demonstrations, as in any run
            continue
        for found in (best, latest):
            torch.testing.assert_close(found["model_state_dict"][name], value, rtol=0, atol=0, equal_nan=True, msg=name)
    [line] = metrics(joint / "phase1_temporal_jepa", "validation")
    assert best["loss"] == latest["best_loss"] == line["loss"]
    assert not metrics(joint / "phase1_temporal_jepa", "train")


def test_phase2_trains_the_encoder_on_where_it_is_not_frozen_and_resumes(joint, data, tmp_path):
    before = read_checkpoint(joint / "phase1_temporal_jepa/checkpoint_best.pt")["model_state_dict"]
    after = read_checkpoint(joint / "phase2_flow_matching/checkpoint_latest.pt")["model_state_dict"]
    state_encoder = "model.state_encoder."
    trained = tuple(f"{state_encoder}{part}." for part in ("tokenizer", "encoder"))
    names = [name for name in before if name.startswith(state_encoder)]
    assert any(name.startswith(trained) for name in names) and not all(name.startswith(trained) for name in names)
    for name in names:
        assert torch.equal(before[name], after[name]) != name.startswith(trained), name
    assert not (joint / "frozen_states").exists()
    losses = [line["loss"] for line in metrics(joint / "phase2_flow_matching", "train")]
    assert all(map(math.isfinite, losses)) and sum(losses[-4:]) < sum(losses[:4])

    both = settings(**JOINT, data__data_directory=data, training__checkpoint_directory=tmp_path)
    run("train.py", "--phase", 2, "--checkpoint", joint / "phase2_flow_matching/checkpoint_epoch_1.pt", *both)
    assert_same_last_epoch(joint / "phase2_flow_matching", tmp_path / "phase2_flow_matching")


def test_a_resumed_run_takes_its_own_weight_decay_and_says_so(runs, data, tmp_path):
    both = settings(data__data_directory=data, training__checkpoint_directory=tmp_path, training__weight_decay=0.5)
    said = run("train.py", "--phase", 1, "--checkpoint", runs / "phase1_temporal_jepa/checkpoint_epoch_2.pt", *both)
    assert "note: training.weight_decay was 0.05 and is now 0.5" in said.stdout
    groups = read_checkpoint(tmp_path / "phase1_temporal_jepa/checkpoint_latest.pt")["optimizer_state_dict"]
    assert [group["weight_decay"] for group in groups["param_groups"]] == [0.5, 0.0]


def test_starting_anew_keeps_the_earlier_run(runs, data, tmp_path):
    both = settings(data__data_directory=data, training__checkpoint_directory=tmp_path, training__phase1__num_epochs=1)
    run("train.py", "--phase", 1, *both)
    first = (tmp_path / "phase1_temporal_jepa/checkpoint_latest.pt").read_bytes()
    said = run("train.py", "--phase", 1, *both).stdout
    earlier = tmp_path / "phase1_temporal_jepa_earlier_1/checkpoint_latest.pt"
    assert earlier.read_bytes() == first
    assert "is kept as" in said

    second = (tmp_path / "phase1_temporal_jepa/checkpoint_latest.pt").read_bytes()  # resuming the first keeps it, too
    run("train.py", "--phase", 1, "--checkpoint", earlier, *both, "--set", "training.phase1.num_epochs=2")
    assert (tmp_path / "phase1_temporal_jepa_earlier_2/checkpoint_latest.pt").read_bytes() == second
    assert read_checkpoint(tmp_path / "phase1_temporal_jepa/checkpoint_latest.pt")["epoch"] == 2
    assert earlier.read_bytes() == first


def trained_by_nobody(_rank: int, command: list[object], home: Path) -> None:
    """In a home without an account of wandb's."""
    os.environ |= {"HOME": str(home), "NETRC": str(home / "netrc"), "WANDB_API_KEY": ""}
    trained(0, list(map(str, command)), {})


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["offline", "online"])
def test_a_wandb_run_is_written_beside_the_checkpoints_or_needs_an_account_in_one_sentence(data, tmp_path, mode):
    changes = {"wandb__mode": mode, "training__phase1__num_epochs": 1}
    both = settings(data__data_directory=data, training__checkpoint_directory=tmp_path, **changes)
    [(code, said)] = ranks_of(1, tmp_path / "said", trained_by_nobody, ["--phase", 1, *both], tmp_path)
    if mode == "offline":
        assert code == 0, said
        assert list((tmp_path / "phase1_temporal_jepa/wandb").glob("offline-run-*/*.wandb"))
    else:
        said = one_sentence(subprocess.CompletedProcess([], code, "", said))
        assert code == 2 and "wandb.mode is online, but wandb says: " in said and "wandb login" in said


# --------------------------------------------------------------------------------------------------- two processes


def gradients_of_one_rank(rank: int, ranks: int, results: Path) -> None:
    join_processes("cpu", 1)
    torch.manual_seed(0)
    trainer = build_trainer(small_config("training.phase1.foresight_weight=1.0"), 1).double()
    batch = phase1_batch(8)
    own = torch.arange(8).chunk(ranks)[rank]
    share = {
        "obs": {name: value[own] for name, value in batch["obs"].items()},
        "next_obs": {name: value[own] for name, value in batch["next_obs"].items()},
        "actions": batch["actions"][own].double(),
        "robot_ahead": torch.randn(8, len(FORESIGHT), 9)[own],
    }
    trainer.robot_normalizer.fit(torch.randn(100, 9))
    ddp_trainer = DistributedDataParallel(trainer)
    ddp_trainer(share)["loss"].backward()
    gradients = {name: p.grad for name, p in trainer.named_parameters() if p.requires_grad}
    rows = gather_rows(torch.arange(rank + 1)[:, None])  # rank 0 has one row, rank 1 two
    torch.save({"gradients": gradients, "rows": rows}, results / f"{ranks}_{rank}.pt")


@pytest.mark.slow
def test_two_ranks_equal_one_process_with_the_joint_batch(tmp_path):
    for ranks in (1, 2):
        ends = ranks_of(ranks, tmp_path / "said", gradients_of_one_rank, ranks, tmp_path)
        assert [code for code, _ in ends] == [0] * ranks, ends
    alone, first, second = (torch.load(tmp_path / f"{name}.pt") for name in ("1_0", "2_0", "2_1"))
    assert len(alone["gradients"]) > 40
    for name, gradient in alone["gradients"].items():
        assert torch.equal(first["gradients"][name], second["gradients"][name]), name
        torch.testing.assert_close(first["gradients"][name], gradient, rtol=1e-6, atol=1e-10, msg=name)
    assert first["rows"].flatten().tolist() == second["rows"].flatten().tolist() == [0, 0, 1]


@pytest.mark.slow
def test_torchrun_trains_both_phases_as_one_process_with_the_joint_batch(runs, data, tmp_path):
    exact = {"data__data_directory": data, "training__precision": "fp32"}  # in bf16 rounding alone is 2e-3 on one CPU
    half = settings(training__checkpoint_directory=tmp_path / "two", training__batch_size=8, **exact)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py"]
    run(*torchrun, "--config", "conf/config.yaml", "--phase", 1, *half)
    whole = settings(training__checkpoint_directory=tmp_path / "one", **exact)
    run("train.py", "--config", "conf/config.yaml", "--phase", 1, *whole)
    encoder = runs / "phase1_temporal_jepa/checkpoint_best.pt"
    other_policy = ("--set", "model.policy_layers=2")  # phase 2 takes the encoder alone
    command = ["--phase", "2", "--phase1_checkpoint", str(encoder), *map(str, half), *other_policy]
    ends = ranks_of(2, tmp_path / "said", trained, command, {})  # forked: what torchrun starts imports torch anew
    assert [code for code, _ in ends] == [0, 0], ends
    roots = (tmp_path / "one", tmp_path / "two")
    alone, together = (
        read_checkpoint(root / "phase1_temporal_jepa/checkpoint_latest.pt")["model_state_dict"] for root in roots
    )
    for name, value in alone.items():  # 30-odd AdamW steps amplify rounding, unsynchronised ranks would be far off
        torch.testing.assert_close(together[name], value, rtol=0, atol=2e-3, equal_nan=True, msg=name)
    validation = [metrics(root / "phase1_temporal_jepa", "validation")[-1]["loss"] for root in roots]
    assert validation[0] == pytest.approx(validation[1], rel=1e-3)

    state = [
        read_checkpoint(root / "phase2_flow_matching/checkpoint_latest.pt")["model_state_dict"]
        for root in (runs, tmp_path / "two")
    ]
    for name in ("model.state_scaling.mean", "model.state_scaling.transform", "model.policy.normalizer.mean"):
        torch.testing.assert_close(state[0][name], state[1][name], rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------------------ evaluation


def test_offline_evaluation_compares_in_robot_units_on_held_out_demos(runs, tmp_path):
    output = tmp_path / "offline.json"
    said = run(
        "eval.py", "--checkpoint", runs / "phase2_flow_matching/checkpoint_best.pt", "--output", output,
        "--flow_start", "zero", "--sample_steps", 2,
    ).stdout  # fmt: skip
    result = json.loads(output.read_text())
    assert list(result["mse"]) == ["x", "y", "z", "rx", "ry", "rz", "gripper"]
    assert all(name in said for name in result["mse"])

    checkpoint = read_checkpoint(runs / "phase2_flow_matching/checkpoint_best.pt")
    model = load_checkpoint(runs / "phase2_flow_matching/checkpoint_best.pt")
    predicted, demonstrated = [], []
    for name in checkpoint["held_out_demos"]:
        file_name, key = name.split("/")
        task = " ".join(file_name.removesuffix("_demo.hdf5").split("_"))
        with h5py.File(Path(checkpoint["config"]["data"]["data_directory"]) / file_name) as file:
            demo = file["data"][key]
            for t in range(30 - 1 - 10 + 1):
                obs = {k: torch.from_numpy(demo["obs"][k][t])[None] for k in demo["obs"]}
                obs["language"] = checkpoint["language"]["embeddings"][task][None]
                predicted.append(model.predict(obs, sample_steps=2, flow_start="zero")[0])
                demonstrated.append(torch.from_numpy(demo["actions"][t + 1 : t + 11]))
    predicted, demonstrated = torch.stack(predicted), torch.stack(demonstrated)
    mse = (predicted - demonstrated).square().mean(dim=(0, 1))
    assert list(result["mse"].values()) == pytest.approx(mse.tolist(), rel=1e-4)
    accuracy = (predicted[..., 6] == demonstrated[..., 6]).float().mean().item()
    assert result["gripper_accuracy"] == pytest.approx(accuracy)


def test_learning_curves_are_drawn(runs):
    run("plot_curves.py", runs / "phase1_temporal_jepa", runs / "phase2_flow_matching")
    assert (runs / "phase1_temporal_jepa/curves.png").stat().st_size > 10_000


# ------------------------------------------------------------------------------------------------------- bad input


def test_phase2_refuses_to_start_without_an_encoder():
    assert "train.py --phase 1" in one_sentence(run("train.py", "--phase", 2, expect=2))


def test_there_is_no_phase_3():
    assert "--phase 3: expected 1" in one_sentence(run("train.py", "--phase", 3, expect=2))


def test_the_guides_untouched_config_asks_for_the_data_directory():
    said = one_sentence(run("train.py", "--config", "conf/config.yaml", "--phase", 1, expect=2))
    assert "data.data_directory" in said and "/path/to/libero_object" in said


def test_a_resumed_run_finds_the_data_that_it_began_with(runs, data, tmp_path, monkeypatch, capsys):
    latest = runs / "phase1_temporal_jepa/checkpoint_latest.pt"
    fewer = settings(
        data__data_directory=data, data__demos_per_task=3, training__checkpoint_directory=tmp_path,
        training__phase1__num_epochs=4,
    )  # fmt: skip
    said = refused(monkeypatch, capsys, "--phase", 1, "--checkpoint", latest, *fewer)
    assert f"{latest}: an epoch of it has 174 samples, of this run 116; a resumed run needs the same data" in said
    moved = tmp_path / "moved"
    shutil.copytree(data, moved, ignore=shutil.ignore_patterns("frame_cache"))
    both = settings(data__data_directory=moved, training__checkpoint_directory=tmp_path, training__phase1__num_epochs=4)
    train_here(monkeypatch, "--phase", 1, "--checkpoint", latest, *both)
    assert f"note: data.data_directory was {data} and is now {moved}" in capsys.readouterr().out


def test_a_checkpoint_tells_the_instructions_that_it_was_trained_on_from_those_that_it_knows(
    runs, data, tmp_path, monkeypatch
):
    known = read_checkpoint(runs / "phase1_temporal_jepa/checkpoint_best.pt")["language"]
    texts = [*known["embeddings"], "open the drawer"]
    vectors = torch.stack([*known["embeddings"].values(), torch.nn.functional.normalize(torch.ones(512), dim=0)])
    more = tmp_path / "more.npz"
    np.savez(more, texts=texts, embeddings=vectors.numpy(), encoder=known["encoder"])
    only_milk = tmp_path / "milk"
    only_milk.mkdir()
    shutil.copy(next(data.glob("*milk*.hdf5")), only_milk)
    for phase, folder in PHASE_DIRECTORIES.items():
        start = ("--phase1_checkpoint", tmp_path / PHASE_DIRECTORIES[1] / "checkpoint_latest.pt") if phase == 2 else ()
        changes = {"data__language_embeddings": more, "training__phase1__num_epochs": 1,
                   "training__phase2__num_epochs": 1}  # fmt: skip
        both = settings(data__data_directory=only_milk, training__checkpoint_directory=tmp_path, **changes)
        train_here(monkeypatch, "--phase", phase, *start, *both)
        checkpoint = read_checkpoint(tmp_path / folder / "checkpoint_latest.pt")
        assert {*checkpoint["language"]["embeddings"]} == {*texts}
        assert instructions_of(checkpoint) == ["pick up the milk and place it in the basket"]
    card = card_of(checkpoint, "policy", {})
    assert "a policy for one instruction" in card and "open the drawer" not in card and "Labels" not in card
    assert "| `training.phase1.foresight_weight` |" in card and "| `training.phase2.num_epochs` | 1 |" in card
    checkpoint["config"]["training"]["phase1"]["place_weight"] = 8.0
    assert "- Labels: the encoder's place learnt where things are from the" in card_of(checkpoint, "policy", {})
    both = settings(data__data_directory=only_milk, training__checkpoint_directory=tmp_path / "fewer", **changes)
    fewer = tmp_path / "fewer.npz"  # than the encoder was trained with
    np.savez(fewer, texts=texts[:2], embeddings=vectors[:2].numpy(), encoder=known["encoder"])
    both += ["--set", f"data.language_embeddings={fewer}"]
    train_here(monkeypatch, "--phase", 2, *start, *both)
    fewer_known = read_checkpoint(tmp_path / "fewer/phase2_flow_matching/checkpoint_latest.pt")
    assert instructions_of(fewer_known) == ["pick up the milk and place it in the basket"]
    del checkpoint["instructions"]  # as the first versions
    assert instructions_of(checkpoint) == sorted(texts)


def test_phase_2_keeps_the_settings_that_its_encoder_was_trained_with(runs, data, tmp_path, monkeypatch):
    """Not those of a config that teaches on scenes, for which this encoder has no head."""
    both = settings(
        data__data_directory=data, training__checkpoint_directory=tmp_path, data__scenes=tmp_path / "scenes",
        training__phase1__foresight_weight=7.5, training__phase1__place_weight=1,
        training__phase1__place_scenes_weight=1,
    )  # fmt: skip
    encoder = runs / "phase1_temporal_jepa/checkpoint_best.pt"
    latest = tmp_path / "phase2_flow_matching/checkpoint_latest.pt"
    before = read_checkpoint(encoder)["config"]
    for epochs, start in ((1, ("--phase1_checkpoint", encoder)), (2, ("--checkpoint", latest))):
        train_here(monkeypatch, "--phase", 2, *start, *both, "--set", f"training.phase2.num_epochs={epochs}")
        found = read_checkpoint(latest)["config"]
        assert found["training"]["phase2"]["num_epochs"] == epochs
        assert found["training"]["phase1"] == before["training"]["phase1"]
        assert found["training"]["phase1"]["foresight_weight"] != 7.5 and found["data"]["scenes"] is None
        load_checkpoint(latest)


def test_rollouts_while_training_are_of_the_tasks_that_demonstrations_show(runs, data, tmp_path, monkeypatch):
    """Whatever else the file of embeddings knows."""
    known = read_checkpoint(runs / "phase1_temporal_jepa/checkpoint_best.pt")["language"]
    demonstrated = sorted(known["embeddings"])
    vectors = torch.stack([*known["embeddings"].values(), torch.nn.functional.normalize(torch.ones(512), dim=0)])
    texts = [*known["embeddings"], "open the drawer"]
    np.savez(tmp_path / "more.npz", texts=texts, embeddings=vectors.numpy(), encoder=known["encoder"])
    asked = []
    monkeypatch.setattr(train, "tasks_of", lambda _, instructions: asked.append(instructions))
    monkeypatch.setattr("training.validation.success_rate", lambda _, __, told, *more: asked.append(told) or 0.0)
    both = settings(
        data__data_directory=data, training__checkpoint_directory=tmp_path, training__phase2__num_epochs=1,
        training__phase2__rollout_interval=1, data__language_embeddings=tmp_path / "more.npz",
    )  # fmt: skip
    train_here(
        monkeypatch, "--phase", 2, "--phase1_checkpoint", runs / "phase1_temporal_jepa/checkpoint_best.pt", *both
    )
    assert asked == [demonstrated, demonstrated]


def test_a_batch_larger_than_the_data_is_named(data, tmp_path):
    both = settings(data__data_directory=data, training__checkpoint_directory=tmp_path)
    said = one_sentence(run("train.py", "--phase", 1, "--batch_size", 5000, *both, expect=2))
    assert "training.batch_size is 5000" in said and "174 training samples" in said
    assert not list(tmp_path.iterdir())


def test_a_diverging_run_stops_with_one_sentence(data, tmp_path):
    changes = {"training__learning_rate": 1e30, "training__checkpoint_directory": tmp_path}
    said = one_sentence(run("train.py", "--phase", 1, *settings(data__data_directory=data, **changes), expect=2))
    assert "training diverged: " in said and "lower the learning rate" in said


def test_a_batch_of_one_has_no_variance(data, tmp_path, monkeypatch, capsys):
    both = settings(data__data_directory=data, training__checkpoint_directory=tmp_path)
    assert "use --batch_size 2 or more" in refused(monkeypatch, capsys, "--phase", 1, "--batch_size", 1, *both)
    assert not list(tmp_path.glob("phase1*"))


def test_held_out_demos_of_one_sample_are_refused(tmp_path, monkeypatch, capsys):
    write_task_file(tmp_path, demos=3, steps=12)
    run("embed_language.py", "--data_directory", tmp_path, "--encoder", "offline")
    changes = {"data__data_directory": tmp_path, "training__checkpoint_directory": tmp_path / "runs"}
    both = settings(**changes, training__batch_size=2, model__prediction_gap=11)
    said = refused(monkeypatch, capsys, "--phase", 1, *both)
    assert "the held-out demos give 1 sample(s), phase 1 needs at least 2; lower data.train_split" in said


def test_half_a_line_of_a_killed_run_costs_no_line_of_the_one_that_goes_on(data, tmp_path, monkeypatch):
    both = settings(data__data_directory=data, training__checkpoint_directory=tmp_path)
    both += ["--set", "training.phase1.num_epochs=1"]
    train_here(monkeypatch, "--phase", 1, *both)
    log = tmp_path / PHASE_DIRECTORIES[1] / "metrics.jsonl"
    whole = log.read_text()
    log.write_text(whole + '{"split": "train", "ep')
    latest = log.with_name("checkpoint_latest.pt")
    train_here(monkeypatch, "--phase", 1, "--checkpoint", latest, *both, "--set", "training.phase1.num_epochs=2")
    half, *later = log.read_text().removeprefix(whole).splitlines()
    assert half == '{"split": "train", "ep'
    assert [json.loads(line)["epoch"] for line in later] == [2] * whole.count("\n")


def test_no_thread_to_be_had_is_one_sentence(data, tmp_path, monkeypatch, capsys):
    both = settings(data__data_directory=data, training__checkpoint_directory=tmp_path)

    def at_the_limit(*_):  # what Python says under `ulimit -v` or `ulimit -u`
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", at_the_limit)
    assert "can't start new thread: a limit on memory" in refused(monkeypatch, capsys, "--phase", 1, *both)


@pytest.mark.parametrize("seed", [20250101123045, 2**63 - 1])
def test_a_large_seed_trains(data, tmp_path, monkeypatch, seed):
    both = settings(data__data_directory=data, training__checkpoint_directory=tmp_path)
    train_here(
        monkeypatch, "--phase", 1, *both, "--set", f"training.seed={seed}", "--set", "training.phase1.num_epochs=1"
    )
    assert (tmp_path / "phase1_temporal_jepa/checkpoint_best.pt").exists()


def test_two_seeds_meet_no_noise_and_no_order_of_each_others(data, monkeypatch):
    """Epoch 1 of seed 0 was epoch 0 of seed 1."""
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    noise = set()
    for seed in range(3):
        for epoch in range(3):
            seed_noise(seed, epoch)
            noise.add(torch.rand(1).item())
    assert len(noise) == 9


def test_a_rank_left_in_the_environment_is_one_process(data, tmp_path, monkeypatch, capsys):
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "1")
    both = settings(data__data_directory=data, training__checkpoint_directory=tmp_path)
    train_here(monkeypatch, "--phase", 1, *both, "--set", "training.phase1.num_epochs=1")
    assert (tmp_path / "phase1_temporal_jepa/checkpoint_latest.pt").exists()
    monkeypatch.setenv("WORLD_SIZE", "4")
    said = refused(monkeypatch, capsys, "--phase", 1, *both)
    assert "WORLD_SIZE is 4, but RANK or MASTER_ADDR is not set; start several processes with `torchrun" in said
    for name, value in {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "1", "RANK": "1"}.items():  # it would wait for ever
        monkeypatch.setenv(name, value)
    assert "RANK is 1 and WORLD_SIZE 1, expected 0 <= RANK < WORLD_SIZE" in refused(
        monkeypatch, capsys, "--phase", 1, *both
    )


def test_running_out_of_memory_names_the_batch_and_a_smaller_one(monkeypatch, capsys):
    monkeypatch.setattr(train, "load_data", lambda *arguments: torch.empty(2**60))
    for batch_size, sentence in ((64, "batch_size 64; try --batch_size 32"), (1, "batch_size 1; there is no smaller")):
        said = refused(monkeypatch, capsys, "--phase", 1, "--batch_size", batch_size, "--set", "training.device=cpu")
        assert f"out of memory with {sentence}" in said


@pytest.mark.parametrize(
    "metrics, before, expected",
    [
        ({"z_std": 0.02, "effective_rank": 3.0}, None, False),  # where every run starts
        ({"z_std": 0.04, "effective_rank": 5.0}, {"z_std": 0.02, "effective_rank": 3.0}, False),
        ({"z_std": 0.02, "effective_rank": 90.0}, {"z_std": 0.04, "effective_rank": 90.0}, True),
        ({"z_std": 1.0, "effective_rank": 3.0}, {"z_std": 1.0, "effective_rank": 3.0}, True),
        ({"z_std": 1.0, "effective_rank": 90.0}, {"z_std": 1.1, "effective_rank": 99.0}, False),
        ({"action_loss": 1.0}, {"action_loss": 1.0}, False),
    ],
)
def test_a_representation_collapses_where_it_is_low_and_does_not_rise(metrics, before, expected):
    assert is_collapsing(metrics, before, state_dim=256) == expected


def test_a_loss_that_is_not_finite_gets_the_advice_that_can_help():
    check_finite({"loss": 1.0}, step=5, advice="", untouched=False)
    for step, bfloat16, advice in (
        (1, False, "before any weight was changed; are the weights that it started from finite"),
        (50, False, r"lower the learning rate \(0.001\) or raise training.warmup_steps$"),
        (50, True, "or set training.precision to fp32"),
    ):
        values = {"loss": 1.0, "jepa_mse": math.nan}
        with pytest.raises(BadInput, match=rf"jepa_mse at step {step} not finite.*{advice}"):
            check_finite(values, step, against_divergence(1e-3, bfloat16), untouched=step == 1)


def test_cuda_where_there_is_none_is_named(data):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    both = settings(data__data_directory=data, training__device="cuda")
    assert "device cuda was asked for" in one_sentence(run("train.py", "--phase", 1, *both, expect=2))


def test_failing_to_start_touches_nothing_of_an_earlier_run(runs, data):
    before = {path: path.stat().st_mtime_ns for path in runs.rglob("*")}
    both = settings(data__data_directory=data, training__checkpoint_directory=runs, model__d_state=8)
    folder = runs / "phase1_temporal_jepa"
    said = one_sentence(run("train.py", "--phase", 1, "--checkpoint", folder / "checkpoint_latest.pt", *both, expect=2))
    assert "model.d_state is 16, but this run has 8" in said
    said = one_sentence(run("train.py", "--phase", 2, "--checkpoint", folder / "checkpoint_latest.pt", *both, expect=2))
    assert "key phase is 1, expected a checkpoint of phase 2" in said
    assert {path: path.stat().st_mtime_ns for path in runs.rglob("*")} == before


def test_embeddings_of_another_encoder_are_refused(runs, data, tmp_path):
    import numpy as np

    for path in data.iterdir():
        (tmp_path / path.name).symlink_to(path)
    with np.load(data / "language_embeddings.npz") as archive:
        arrays = dict(archive)
    (tmp_path / "language_embeddings.npz").unlink()
    np.savez(tmp_path / "language_embeddings.npz", **(arrays | {"encoder": np.array("another encoder")}))
    both = settings(data__data_directory=tmp_path, training__checkpoint_directory=tmp_path / "runs")
    encoder = runs / "phase1_temporal_jepa/checkpoint_best.pt"
    said = one_sentence(run("train.py", "--phase", 2, "--phase1_checkpoint", encoder, *both, expect=2))
    assert "language encoder is 'another encoder', but that of the checkpoint is" in said


def test_the_report_on_phase_1_does_without_probes_where_files_have_no_truth_and_says_why(runs, tmp_path):
    """And without its picture where that cannot be written: the checkpoint may be somebody else's."""
    checkpoint, output = tmp_path / "checkpoint_best.pt", tmp_path / "report.json"
    checkpoint.write_bytes((runs / "phase1_temporal_jepa/checkpoint_best.pt").read_bytes())
    (tmp_path / "representation.png").mkdir()
    said = run("eval.py", "--checkpoint", checkpoint, "--output", output).stdout
    assert "representation.png cannot be written" in said
    assert json.loads(output.read_text())["code_of_checkpoint"] == code_version()
    assert "no probes: " in said and "attribute model_file is missing" in said
    assert "effective rank" in said and "share of copying z, by frames ahead: 1: " in said


def test_damaged_missing_and_foreign_checkpoints_are_named(runs, tmp_path):
    whole = (runs / "phase1_temporal_jepa/checkpoint_best.pt").read_bytes()
    for name, content in {"cut.pt": whole[: len(whole) // 2], "text.pt": b"hello", "empty.pt": b""}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BadInput, match=f"{name}: not readable as a checkpoint"):
            read_checkpoint(tmp_path / name)
    torch.save({"state_dict": {}}, tmp_path / "foreign.pt")
    with pytest.raises(BadInput, match=r"not a checkpoint of train\.py, it lacks epoch, model_state_dict"):
        read_checkpoint(tmp_path / "foreign.pt")
    with pytest.raises(BadInput, match="no such checkpoint"):
        read_checkpoint(tmp_path / "nowhere.pt")


def test_a_weight_of_another_shape_is_named(runs, tmp_path):
    checkpoint = read_checkpoint(runs / "phase2_flow_matching/checkpoint_best.pt")
    checkpoint["model_state_dict"]["model.gripper.mlp.0.weight"] = torch.zeros(3, 3)
    save_checkpoint(checkpoint, tmp_path / "odd.pt")
    with pytest.raises(BadInput, match=r"weight model\.gripper\.mlp\.0\.weight has shape \(3, 3\), the config expects"):
        load_checkpoint(tmp_path / "odd.pt")
    del checkpoint["model_state_dict"]["model.gripper.mlp.0.weight"]
    save_checkpoint(checkpoint, tmp_path / "odd.pt")
    with pytest.raises(BadInput, match=r"lacks weight model\.gripper\.mlp\.0\.weight"):
        load_checkpoint(tmp_path / "odd.pt")


def test_trainer_knows_only_two_phases():
    with pytest.raises(ValueError, match="phase is 3"):
        StateVLATrainer(fitted(build_trainer(small_config(), 2).model), 3)
