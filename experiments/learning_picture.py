"""Draws docs/learning.png from experiments/results/learning.json: where z comes from, and what each ingredient does.

python -m experiments.learning_picture [--output docs/learning.png]
"""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.measure import REPO
from rollouts.statistics import wilson_interval

RESULTS = REPO / "experiments/results/learning.json"

FROZEN, TRAINED, CHANGED = "#4477aa", "#ee8866", "#999999"
TARGET = "target before the grasp"
FIGURES = {  # of an ingredient's run
    f"{TARGET}, from z, mm": lambda run: run["probes"]["z"][TARGET]["mlp"]["mm"],
    "the policy's pose MSE": lambda run: run["pose_mse"],
    "solved with shifted targets, %": lambda run: percent(run["rollouts"]["noise_shifted"]),
}


def percent(counts: list[int] | None) -> float | None:
    return 100 * counts[0] / counts[1] if counts else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=REPO / "docs/learning.png", help="default: docs/learning.png")
    settings = parser.parse_args()
    if not settings.results.is_file():
        raise SystemExit(f"error: {settings.results}: no such file; run python -m experiments.learning")
    results = json.loads(settings.results.read_text())
    claims = {name: row for name, row in results["rows"].items() if row["claim"] and row["seeds"]}
    ingredients = {name: row for name, row in results["rows"].items() if not row["claim"] and row["seeds"]}
    if not ingredients:
        raise SystemExit(f"error: {settings.results}: has no ingredients; this draws the table of one task")
    figure = plt.figure(figsize=(13, 3.9 + 0.27 * len(ingredients)), dpi=110, layout="constrained")
    heights = [2.6, 1.3 + 0.27 * len(ingredients)]
    (above,), (below,) = figure.subfigures(2, 1, squeeze=False, height_ratios=heights)
    above.suptitle("where z comes from: episodes solved with shifted targets, %; dots are seeds", fontsize=11)
    below.suptitle("the recipe without shifted pictures, one thing changed; the shade spans its own seeds", fontsize=11)
    draw_successes(above.subplots(), claims, results["baselines"]["replay"]["shifted"])
    panels = below.subplots(1, len(FIGURES), sharey=True)
    for axes, (title, figure_of) in zip(panels, FIGURES.items(), strict=True):
        draw_figures(
            axes, {name: results["rows"][name] for name in ("best", "unshifted")} | ingredients, figure_of, title
        )
    figure.savefig(settings.output)
    print(f"{settings.output}: {len(claims)} claims, {len(ingredients)} ingredients")


def draw_successes(axes: plt.Axes, claims: dict, replay: list[int] | None) -> None:
    """Episodes solved with shifted targets, all seeds together with their interval and each seed as a dot."""
    for place, row in enumerate(reversed(claims.values())):
        counts = [run["rollouts"]["noise_shifted"] for run in row["seeds"].values() if run["rollouts"]["noise_shifted"]]
        if not counts:
            continue
        successes, trials = (sum(column) for column in zip(*counts, strict=True))
        low, high = wilson_interval(successes, trials)
        rate = successes / trials
        axes.barh(place, 100 * rate, color=FROZEN if "frozen" in row["description"] else TRAINED, height=0.6)
        axes.errorbar(
            100 * rate, place, xerr=[[100 * (rate - low)], [100 * (high - rate)]], color="black", lw=1, capsize=2
        )
        axes.plot([100 * count[0] / count[1] for count in counts], [place] * len(counts), "o", ms=4, mfc="white", c="k")
    if replay:
        axes.axvline(100 * replay[0] / replay[1], color="black", ls=":", lw=1)
        axes.text(100 * replay[0] / replay[1] + 1, len(claims) - 0.55, "replay of a demonstration", fontsize=8)
    axes.set_yticks(range(len(claims)), [row["description"] for row in reversed(claims.values())])
    axes.set_xlim(0, 100)
    axes.set_ylim(-0.6, len(claims) - 0.25)
    tidy(axes)


def draw_figures(axes: plt.Axes, rows: dict, figure_of: Callable[[dict], float | None], title: str) -> None:
    """A figure of each row; the shade is the span of the best recipe's seeds."""
    recipe = [figure for run in rows["unshifted"]["seeds"].values() if (figure := figure_of(run)) is not None]
    axes.axvspan(min(recipe), max(recipe), color=FROZEN, alpha=0.15, lw=0)
    for place, row in enumerate(reversed(rows.values())):
        figures = [figure for run in row["seeds"].values() if (figure := figure_of(run)) is not None]
        if figures:
            axes.barh(place, statistics.fmean(figures), color=FROZEN if row["claim"] else CHANGED, height=0.6)
    axes.set_yticks(range(len(rows)), [row["description"] for row in reversed(rows.values())])
    axes.set_title(title, fontsize=10)
    tidy(axes)


def tidy(axes: plt.Axes) -> None:
    axes.grid(axis="x", color="#dddddd", lw=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)


if __name__ == "__main__":
    main()
