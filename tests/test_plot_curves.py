"""Learning curves from the lines that train.py writes, and from lines that it never wrote."""

import json
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

import plot_curves

LINES = [
    {"step": 10, "split": "train", "epoch": 0, "loss": 3.0, "z_std": 0.5},
    {"step": 20, "split": "train", "epoch": 0, "loss": 2.0, "z_std": 0.6},
    {"step": 20, "split": "validation", "epoch": 0, "loss": 2.5},
]


@pytest.fixture
def run_folder(tmp_path):
    """write(lines) -> a run's folder with these lines, dictionaries or text."""

    def write(*lines):
        folder = tmp_path / "phase1"
        folder.mkdir(exist_ok=True)
        text = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        (folder / "metrics.jsonl").write_text("\n".join(text))
        return folder

    return write


@pytest.fixture
def draw(monkeypatch, capsys):
    """The command on these folders -> its exit code and what it prints."""

    def call(*folders):
        monkeypatch.setattr(sys, "argv", ["plot_curves.py", *map(str, folders)])
        try:
            plot_curves.main()
        except SystemExit as ended:
            printed = capsys.readouterr()
            assert printed.out == "" and printed.err.count("\n") == 1
            return ended.code, printed.err
        return 0, capsys.readouterr().out

    return call


def test_curves_are_drawn_beside_their_figures(run_folder, draw):
    folder = run_folder(*LINES, '{"step": 30, "split": "tr')  # a run that was killed left half a line
    assert draw(folder) == (0, f"learning curves: {folder / 'curves.png'}\n")
    assert np.ptp(matplotlib.image.imread(folder / "curves.png")) > 0
    assert sorted(path.name for path in folder.iterdir()) == ["curves.png", "metrics.jsonl"]


def test_a_step_that_a_resumed_run_repeated_keeps_its_last_value(run_folder):
    folder = run_folder(*LINES, {"step": 20, "split": "train", "loss": 1.5})
    assert plot_curves.read_metrics(folder)["loss"]["train"] == {10: 3.0, 20: 1.5}


@pytest.mark.filterwarnings("error")
def test_what_a_resumed_run_did_again_at_other_steps_is_there_once_and_in_order(run_folder):
    first = [{"step": step, "split": "train", "loss": 9.0, "z_std": 1.0} for step in (50, 100, 150)]
    between = [{"step": 100, "split": "validation", "loss": 8.0}]
    again = [{"step": step, "split": "train", "loss": 1.0} for step in (80, 120, 160)]  # from a checkpoint at 60
    found = plot_curves.read_metrics(run_folder(*first, *between, *again, *between))
    assert list(found["loss"]["train"].items()) == [(50, 9.0), (80, 1.0), (120, 1.0), (160, 1.0)]
    assert found["z_std"]["train"] == {50: 1.0} and found["loss"]["validation"] == {100: 8.0}


def test_a_value_that_is_not_finite_is_a_hole_and_is_named(run_folder, draw):
    folder = run_folder(
        *LINES,
        {"step": 30, "split": "train", "loss": float("nan"), "z_std": float("inf")},
        {"step": 40, "split": "train", "loss": float("nan"), "z_std": 0.7},
    )
    code, printed = draw(folder)
    assert code == 0
    assert "note: loss (train) is not finite at 2 steps, the first is 30\n" in printed
    assert "note: z_std (train) is not finite at 1 steps, the first is 30\n" in printed


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        ([], "metrics.jsonl: holds no figures yet"),
        ([{"step": 10, "split": "train", "other": 1.0}], "metrics.jsonl: holds no figures yet"),
        ([LINES[0], {"split": "train", "loss": 1.0}], "metrics.jsonl: line 2 is {"),
        ([{"step": 10, "loss": 1.0}], "a whole number as step and train or validation as split"),
        ([{"step": 10, "split": "test", "loss": 1.0}], "metrics.jsonl: line 1 is {"),
        ([{"step": "10", "split": "train", "loss": 1.0}], "metrics.jsonl: line 1 is {"),
        (["[1, 2]"], "metrics.jsonl: line 1 is [1, 2], expected what train.py writes"),
    ],
)
def test_lines_that_train_py_never_writes_are_one_sentence(run_folder, draw, lines, sentence):
    folder = run_folder(*lines)
    code, printed = draw(folder)
    assert code == 2 and f"error: {folder}" in printed and sentence in printed
    assert not (folder / "curves.png").exists()


def test_a_folder_without_figures_is_one_sentence(tmp_path, draw):
    assert draw(tmp_path / "none") == (
        2, f"error: {tmp_path}/none/metrics.jsonl: no such file; train.py writes it into its checkpoint folder\n"
    )  # fmt: skip


def test_a_home_folder_is_found(run_folder, draw, monkeypatch):
    folder = run_folder(*LINES)
    monkeypatch.setenv("HOME", str(folder.parent))
    assert draw("~/phase1") == (0, f"learning curves: {folder / 'curves.png'}\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux's device that is always full")
def test_a_picture_that_cannot_be_written_leaves_the_old_one(run_folder, draw, monkeypatch):
    folder = run_folder(*LINES)
    draw(folder)
    before = (folder / "curves.png").read_bytes()
    monkeypatch.setattr(plot_curves.plt.Figure, "savefig", lambda figure, part, **options: half_written(part))
    assert draw(folder) == (2, "error: No space left on device\n")
    assert (folder / "curves.png").read_bytes() == before


def half_written(part):
    part.symlink_to("/dev/full")
    part.write_bytes(b"half")
