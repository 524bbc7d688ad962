"""Learning curves of one or both phases as PNG: reads metrics.jsonl, writes curves.png beside it.

python plot_curves.py checkpoints/phase1_temporal_jepa checkpoints/phase2_flow_matching
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no screen needed
import matplotlib.pyplot as plt

from errors import BadInput, exits_on_bad_input
from files import expanded, replaced_whole

PANELS = {  # title -> the metrics of one panel, by their names in metrics.jsonl
    "prediction (MSE)": ("jepa_mse", "jepa_copy_mse"),
    "VICReg": ("jepa_variance", "jepa_covariance"),
    "actions and arm from z (MSE)": ("inverse_dynamics", "foresight"),
    "place from z (MSE)": ("place", "place_scenes"),
    "gaze (divergence)": ("gaze", "gaze_scenes"),
    "gaze finds the object (share)": ("gaze_found", "gaze_found_in_hand"),
    "mean std of z": ("z_std",),
    "effective rank of z": ("effective_rank",),
    "flow matching (MSE)": ("pos_rot_loss",),
    "gripper (BCE)": ("gripper_loss",),
    "total loss": ("loss",),
    "share of episodes solved": ("success_rate",),
}
STYLES: dict[str, dict[str, Any]] = {  # by split
    "train": {"alpha": 0.6, "linewidth": 1},
    "validation": {"marker": "o", "markersize": 3},
}


def read_metrics(directory: Path) -> dict[str, dict[str, dict[int, float]]]:
    """-> metric -> split -> step -> value. What a resumed run did again is there as it did it last."""
    path = directory / "metrics.jsonl"
    if not path.is_file():
        raise BadInput(f"{path}: no such file; train.py writes it into its checkpoint folder")
    curves: dict[str, dict[str, dict[int, float]]] = {}
    latest: dict[str, int] = {}  # step of each split
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        try:
            record = json.loads(line)
        except ValueError:  # a run that was killed left half a line
            continue
        if not isinstance(record, dict) or type(record.get("step")) is not int or record.get("split") not in STYLES:
            raise BadInput(
                f"{path}: line {number} is {line[:60]}, expected what train.py writes: a whole number as step and"
                f" {' or '.join(STYLES)} as split, then figures"
            )
        step, split = record["step"], record["split"]
        if step <= latest.get(split, -1):
            for splits in curves.values():
                splits[split] = {before: value for before, value in splits.get(split, {}).items() if before < step}
        latest[split] = step
        for name, value in record.items():
            if type(value) in (int, float) and name != "step":
                curves.setdefault(name, {}).setdefault(record["split"], {})[record["step"]] = float(value)
    if not any(metric in curves for metrics in PANELS.values() for metric in metrics):
        raise BadInput(f"{path}: holds no figures yet; train.py writes a line every training.log_interval steps")
    return curves


def not_finite(curves: dict) -> list[str]:
    """A sentence about every curve that has a hole because its value is NaN or infinite."""
    holes = {
        (name, split): [step for step, value in points.items() if not math.isfinite(value)]
        for name, splits in curves.items()
        for split, points in splits.items()
    }
    return [
        f"{name} ({split}) is not finite at {len(steps)} steps, the first is {min(steps)}"
        for (name, split), steps in holes.items()
        if steps
    ]


def plot(curves: dict, title: str, target: Path) -> None:
    panels = [(name, metrics) for name, metrics in PANELS.items() if any(metric in curves for metric in metrics)]
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.2 * columns, 3 * rows), squeeze=False, layout="constrained")
    for axis, (name, metrics) in zip(axes.flat, panels, strict=False):
        for metric in metrics:
            for split, points in sorted(curves.get(metric, {}).items()):
                label = f"{metric}, {'held-out demos' if split == 'validation' else 'training'}"
                values = [value if math.isfinite(value) else math.nan for value in points.values()]
                axis.plot(list(points), values, label=label, **STYLES[split])
        axis.set(title=name, xlabel="step", ylim=(0, None))
        legend = 0.03 + 0.08 * len(axis.get_lines())  # of the panel's height, above the curves rather than on them
        axis.set_ylim(top=axis.get_ylim()[1] / (1 - legend))
        axis.legend(fontsize=7, frameon=False, loc="upper right")
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    figure.suptitle(title)
    with replaced_whole(target) as part:
        figure.savefig(part, dpi=130, format="png")
    plt.close(figure)


@exits_on_bad_input
def main() -> None:
    parser = argparse.ArgumentParser(description="Plots the learning curves of training runs.")
    parser.add_argument("directories", nargs="+", help="folders that hold a metrics.jsonl of train.py")
    for directory in map(Path, map(expanded, parser.parse_args().directories)):
        curves = read_metrics(directory)
        for sentence in not_finite(curves):
            print(f"note: {sentence}")
        plot(curves, directory.resolve().name, directory / "curves.png")
        print(f"learning curves: {directory / 'curves.png'}")


if __name__ == "__main__":
    main()
