"""What demonstrations look like to a person: one picture of all tasks."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no screen needed
import matplotlib.pyplot as plt
import numpy as np

from checkup.folder import FileReport
from files import replaced_whole, unwritable_named
from observation import ORIENTATION
from rollouts.video import upright

GAP = 4  # pixels between pictures
WIDTH, TITLE = 9.0, 0.28  # inches
DPI, LARGEST = 110, 60_000  # dots an inch, and pixels that matplotlib can draw


def draw_preview(reports: Sequence[FileReport], target: Path) -> int:
    """One row a file: its instruction, and of one of its demos the first, the middle and the last picture of both
    cameras, upright. Returns the number of rows; without any no file is written. Raises BadInput where it cannot be."""
    shown = [report for report in reports if report.films]
    if not shown:
        return 0
    strips = [_strip(report) for report in shown]
    heights = [WIDTH * strip.shape[0] / strip.shape[1] + TITLE for strip in strips]
    figure, axes = plt.subplots(
        len(shown), 1, figsize=(WIDTH, sum(heights)), squeeze=False, height_ratios=heights, layout="constrained"
    )
    for axis, report, strip in zip(axes[:, 0], shown, strips, strict=True):
        axis.imshow(strip, interpolation="nearest")
        axis.set_title(f"{report.task or report.path.name}", fontsize=9, loc="left")
        axis.axis("off")
    try:
        with unwritable_named(f"--preview {target}"), replaced_whole(target) as part:
            figure.savefig(part, dpi=min(DPI, LARGEST / sum(heights)), format="png")
    finally:
        plt.close(figure)
    return len(shown)


def _strip(report: FileReport) -> np.ndarray:
    """Six pictures beside each other, (h, w, 3) uint8."""
    pictures = [
        upright(picture) if report.orientation == ORIENTATION else picture
        for samples in report.films.values()
        for picture in samples
    ]
    height = pictures[0].shape[0]
    gap = np.full((height, GAP, 3), 255, np.uint8)
    return np.concatenate([part for picture in pictures for part in (picture, gap)][:-1], axis=1)
