"""Draws docs/speed.png from benchmarks/results/*.json: how many times as fast, one bar a comparison.

python benchmarks/picture.py [--output docs/speed.png]
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from measure import REPO

RESULTS = REPO / "benchmarks/results"
COLOURS = {"encoder": "#2f6db3", "policy": "#2a9d8f", "loader": "#c8782a", "phase 2": "#7a5195"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results (benchmarks/results)")
    parser.add_argument("--output", type=Path, default=REPO / "docs/speed.png", help="default: docs/speed.png")
    settings = parser.parse_args()
    bars = speed_ups(settings.results)
    if not bars:
        raise SystemExit(f"{settings.results} has no results to draw; run benchmarks/run_all.py")
    draw(bars, settings.output)
    print(f"{settings.output}: {len(bars)} bars")


def speed_ups(folder: Path) -> list[dict]:
    """label, group, and how many times as fast: median and quartiles."""
    bars = []
    for row in rows_of(folder, "encoder"):
        is_peer = "ratio" in row and not row["side"].startswith("ours")
        if is_peer and (row["stack"] == "policy" or row["batch"] == 4):
            what = f"{row['stack']}, {row['what']}: against {row['side']}"
            bars.append({"label": what, "group": row["stack"], **row["ratio"]})
    for row in rows_of(folder, "loader"):
        if row.get("side") == "ours, disk":
            for stored in ("gzip", "uncompressed"):
                label = f"loader, {row['pixels']} px: against DataLoader, {stored} HDF5"
                bars.append({"label": label, "group": "loader", **row[f"ratio_to_best_{stored}"]})
    for row in rows_of(folder, "phase2"):
        if "gain" in row:
            label = "phase 2, 1,000 epochs*: against encoding in every epoch"
            bars.append(
                {"label": label, "group": "phase 2", "median": row["gain"], "q1": row["gain"], "q3": row["gain"]}
            )
    return bars


def rows_of(folder: Path, name: str) -> list[dict]:
    path = folder / f"{name}.json"
    return json.loads(path.read_text())["rows"] if path.is_file() else []


def draw(bars: list[dict], output: Path) -> None:
    figure, axes = plt.subplots(figsize=(9, 0.9 + 0.36 * len(bars)), dpi=150)
    for place, bar in enumerate(reversed(bars)):
        low, high = bar["median"] - bar["q1"], bar["q3"] - bar["median"]
        axes.barh(place, bar["median"], color=COLOURS[bar["group"]], height=0.68)
        axes.errorbar(bar["median"], place, xerr=[[low], [high]], color="black", lw=1, capsize=2)
        axes.annotate(f"{bar['median']:.3g}×", (bar["q3"], place), (6, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(bars)), [bar["label"] for bar in reversed(bars)])
    axes.set_xscale("log")
    axes.set_xlim(min(1, *(0.9 * bar["q1"] for bar in bars)), max(bar["q3"] for bar in bars) * 2.2)
    axes.axvline(1, color="black", lw=1)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}×")
    axes.set_xlabel(
        "times as fast (log scale), CPU; both sides on the same work in the same run, whiskers are quartiles\n"
        "* extrapolated from single steps"
    )
    axes.grid(axis="x", color="#dddddd", lw=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, bbox_inches="tight")


if __name__ == "__main__":
    main()
