"""Learning curves of one or both phases as PNG: reads metrics.jsonl, writes curves.png beside it.

python plot_curves.py checkpoints/phase1_temporal_jepa checkpoints/phase2_flow_matching
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no screen needed
import matplotlib.pyplot as plt

from errors import BadInput, exits_on_bad_input

PANELS = {  # title -> the metrics of one panel, by their names in metrics.jsonl
    "prediction (MSE)": ("jepa_mse", "jepa_copy_mse"),
    "VICReg": ("jepa_variance", "jepa_covariance"),
    "actions and arm from z (MSE)": ("inverse_dynamics", "foresight"),
    "mean std of z": ("z_std",),
    "effective rank of z": ("effective_rank",),
    "flow matching (MSE)": ("pos_rot_loss",),
    "gripper (BCE)": ("gripper_loss",),
    "total loss": ("loss",),
}


def read_metrics(directory: Path) -> dict[str, dict[str, dict[int, float]]]:
    """-> metric -> split -> step -> value. A step that a resumed run repeated keeps its last value."""
    path = directory / "metrics.jsonl"
    if not path.is_file():
        raise BadInput(f"{path}: no such file; train.py writes it into its checkpoint folder")
    curves: dict[str, dict[str, dict[int, float]]] = {}
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:  # a run that was killed left half a line
            continue
        for name, value in record.items():
            if isinstance(value, int | float):
                curves.setdefault(name, {}).setdefault(record["split"], {})[record["step"]] = value
    if not curves:
        raise BadInput(f"{path}: holds no figures yet; train.py writes a line every training.log_interval steps")
    return curves


def plot(curves: dict, title: str, target: Path) -> None:
    panels = [(name, metrics) for name, metrics in PANELS.items() if any(metric in curves for metric in metrics)]
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.2 * columns, 3 * rows), squeeze=False, layout="constrained")
    for axis, (name, metrics) in zip(axes.flat, panels, strict=False):
        for metric in metrics:
            for split, points in sorted(curves.get(metric, {}).items()):
                style = {"train": {"alpha": 0.6, "linewidth": 1}, "validation": {"marker": "o", "markersize": 3}}[split]
                label = f"{metric}, {'held-out demos' if split == 'validation' else 'training'}"
                axis.plot(list(points), list(points.values()), label=label, **style)
        axis.set(title=name, xlabel="step", ylim=(0, None))
        axis.legend(fontsize=7, frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    figure.suptitle(title)
    figure.savefig(target, dpi=130)
    plt.close(figure)


@exits_on_bad_input
def main() -> None:
    parser = argparse.ArgumentParser(description="Plots the learning curves of training runs.")
    parser.add_argument("directories", nargs="+", help="folders that hold a metrics.jsonl of train.py")
    for directory in map(Path, parser.parse_args().directories):
        plot(read_metrics(directory), directory.name, directory / "curves.png")
        print(f"learning curves: {directory / 'curves.png'}")


if __name__ == "__main__":
    main()
