"""What several test files share: scripts run as users run them, small models, samples of small files, report pages."""

import contextlib
import importlib
import io
import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch import nn

import jepa.mamba
import train
from config import Config, DataConfig, load_config
from dataloader import Batches, LowDimensional
from demos.frames import HDF5Frames
from demos.hdf5 import load_demos
from demos.language import LanguageTable
from statevla_model import StateVLA

ROOT = Path(__file__).parent.parent

# --------------------------------------------------------------------------------------------------------- scripts

SMALL = {
    "model.image_size": 32,
    "model.embed_dim": 32,
    "model.state_dim": 32,
    "model.encoder_depth": 2,
    "model.policy_layers": 1,
    "model.policy_embed_dim": 32,
    "training.phase1.temporal_predictor_hidden_dim": 32,
    "training.phase1.num_epochs": 3,
    "training.phase2.num_epochs": 3,
    "training.batch_size": 16,
    "training.log_interval": 1,
    "training.save_interval": 1,
    "training.learning_rate": 1e-3,
    "training.phase1.proprioception_masking": 0,  # who is masked is drawn by each rank for itself,
    "training.phase1.image_shift": 0,  # and how far pictures are shifted
    "training.phase1.learning_rate": "null",
    "training.phase2.learning_rate": "null",
    "training.device": "cpu",
}
HERE = {
    "check_demos.py", "collect_demos.py", "convert_lerobot.py", "embed_language.py", "eval.py", "plot_curves.py",
    "run_libero_eval.py", "train.py",
}  # fmt: skip


def run(*command: object, expect: int = 0, **variables: str) -> subprocess.CompletedProcess:
    """Runs a script of the repo: in this process, where there is no start to wait for, or, with variables of its own
    and for what stands not in HERE, as a process of one thread (two would only wait on models this small)."""
    command = [str(word) for word in command]
    if command[0] in HERE and not variables:
        done = run_here(command)
        assert done.returncode == expect, f"{command}\n{done.stdout}\n{done.stderr}"
        return done
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | variables
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == expect, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


def run_here(command: list[str]) -> subprocess.CompletedProcess:
    stdout, stderr, code = io.StringIO(), io.StringIO(), 0
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
    ):
        patch.setattr(sys, "argv", command)
        patch.setattr(jepa.mamba.backend, "name", "torch")  # as in a fresh process, and so again afterwards
        try:
            importlib.import_module(command[0].removesuffix(".py")).main()
        except SystemExit as end:
            code = end.code or 0
            if isinstance(code, str):  # as Python ends a process with it
                print(code, file=sys.stderr)
                code = 1
    return subprocess.CompletedProcess(command, code, stdout.getvalue(), stderr.getvalue())


def train_here(monkeypatch, *command: object) -> None:
    """train.py in this process: no start to wait for, and whatever is replaced by the test."""
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, command), "--set", "training.mamba_backend=torch"])
    train.main()


def refused(monkeypatch, capsys, *command: object) -> str:
    """What train.py says before it exits with code 2."""
    with pytest.raises(SystemExit, match="2"):
        train_here(monkeypatch, *command)
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: ")
    return said


def settings(**changes: object) -> list[str]:
    """SMALL and the changes to it as arguments of train.py; `data__cache="none"` stands for data.cache."""
    changes = {key.replace("__", "."): value for key, value in changes.items()}
    return [word for key, value in (SMALL | changes).items() for word in ("--set", f"{key}={value}")]


def one_sentence(done: subprocess.CompletedProcess) -> str:
    """The last line of stderr; there must be no traceback and one error."""
    assert "Traceback" not in done.stderr, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    return errors[0]


# --------------------------------------------------------------------------------------------------- demonstrations

INSTRUCTION = "pick up the milk and place it in the basket"
LANGUAGE = LanguageTable("test encoder", {INSTRUCTION: nn.functional.normalize(torch.ones(512), dim=0)})
CPU = torch.device("cpu")


def data_config(directory, *overrides) -> DataConfig:
    return load_config("conf/config.yaml", [f"data.data_directory={directory}", *overrides]).data


def load(directory, *overrides, min_actions=10):
    return load_demos(data_config(directory, *overrides), min_actions)


def batches_of(demos, rows, num_actions, batch_size=16, language=LANGUAGE, **options) -> Batches:
    if "states" not in options:
        options.setdefault("frames", HDF5Frames(demos, 32))
    return Batches(rows, LowDimensional(demos, language, CPU), num_actions, batch_size, **options)


def samples_of(batches: Batches) -> list[dict]:
    """The batches' rows one by one, copied: a batch's pictures live in a buffer that is filled again."""

    def row(batch, i):
        return {key: row(value, i) if isinstance(value, dict) else value[i].clone() for key, value in batch.items()}

    return [row(batch, i) for batch in batches for i in range(len(batch["actions"]))]


# ---------------------------------------------------------------------------------------------------------- models

SMALL_MODEL = [
    "model.image_size=32", "model.embed_dim=32", "model.state_dim=32", "model.encoder_depth=2",
    "model.policy_embed_dim=32", "training.phase1.temporal_predictor_hidden_dim=48",
    "training.phase1.inverse_dynamics_weight=1.0", "training.phase1.foresight_weight=0.0",
    "training.phase1.proprioception_masking=0.0", "model.prediction_gap=2",
]  # fmt: skip


def small_config(*overrides) -> Config:
    return load_config("conf/config.yaml", [*SMALL_MODEL, *overrides])


def random_observation(batch: int, image_size: int = 32) -> dict:
    return {
        "agentview_rgb": torch.randint(0, 256, (batch, image_size, image_size, 3), dtype=torch.uint8),
        "eye_in_hand_rgb": torch.randint(0, 256, (batch, image_size, image_size, 3), dtype=torch.uint8),
        "joint_states": torch.randn(batch, 7),
        "gripper_states": torch.rand(batch, 2) * 0.04,
        "language": nn.functional.normalize(torch.randn(batch, 512), dim=-1),
    }


def phase1_batch(batch: int = 4) -> dict:
    return {
        "obs": random_observation(batch),
        "next_obs": random_observation(batch),
        "actions": torch.randn(batch, 2, 7),
    }


def fitted(model: StateVLA) -> StateVLA:
    """The model with the statistics of random states and actions."""
    model.state_scaling.fit(torch.randn(100, model.config.state_dim))
    model.policy.normalizer.fit(torch.rand(100, 6) - 0.5)
    return model


# --------------------------------------------------------------------------------------------------------- reports


class Page(HTMLParser):
    """Checks that every element is closed in order and every place within the page is there, and collects the files
    that the page refers to."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.links, self.text = [], [], ""
        self.places, self.jumps = set(), set()
        self.feed(text)
        assert self.open == [] and self.jumps <= self.places

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name == "id":
                self.places.add(value)
            elif name in ("href", "src", "poster") and value.startswith("#"):
                self.jumps.add(value[1:])
            elif name in ("href", "src", "poster") and not value.startswith("data:"):
                self.links.append(value)
        if tag not in ("meta", "img", "link", "br", "wbr"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
