"""An evaluation to be looked at: success bars, a grid of videos for each task, the failures' last frames, the page."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from errors import BadInput
from files import replaced_whole, unwritable_named
from rollouts.episodes import start_name
from rollouts.folder import last_frame_of, video_of, write_whole
from rollouts.page import page, side_by_side_page
from rollouts.video import CONTROL_HZ, SUCCESS, VIDEO_EVERY, VIDEO_SIZE, grid, halved, read_mp4, write_mp4

MANY = 10  # videos; a grid of more shows them at half size
SHEET_COLUMNS = 8  # pictures in a row of the failure sheet
GREEN = "#{:02x}{:02x}{:02x}".format(*SUCCESS)


def write_report(directory: Path, results: dict) -> Path:
    """results as run_libero_eval.py writes them -> the path of report.html."""
    tasks, episodes = results["tasks"], results["episodes"]
    draw_success_bars(tasks, results["overall"], directory / "success_rates.png")
    failed = [episode for episode in episodes if not episode["success"] and not episode["crashed"]]
    draw_failure_sheet(directory, failed, start_name(results["settings"]))
    grids = {}
    for task in tasks:
        own = [episode for episode in episodes if episode["task_id"] == task["task_id"]]
        if size := write_grid(directory, own):
            grids[task["task_id"]] = size
    write_whole(directory / "report.html", page(directory, results, grids))
    return directory / "report.html"


def write_side_by_side_report(directory: Path, results: dict) -> Path:
    """results as side_by_side.json has them -> the path of report.html, which leads to each evaluation's own."""
    write_whole(directory / "report.html", side_by_side_page(results))
    return directory / "report.html"


# ------------------------------------------------------------------------------------------------------- pictures


def draw_success_bars(tasks: Sequence[dict], overall: dict, path: Path) -> None:
    """One bar a task and one for all, each with its 95% interval."""
    bars = [(f"{task['task_id']}: {task['task']}", task) for task in tasks]
    if len(tasks) > 1:
        bars.append(("all tasks", overall))
    figure, axes = plt.subplots(figsize=(9, 0.9 + 0.42 * len(bars)), layout="constrained")
    for y, (_, row) in enumerate(bars):
        if not row["trials"]:
            axes.text(1, y, "no finished episode", va="center", color="0.4")
            continue
        rate, (low, high) = 100 * row["success_rate"], (100 * bound for bound in row["interval"])
        axes.barh(y, rate, height=0.62, color=GREEN, alpha=0.75 if row is not overall else 1.0)
        axes.plot([low, high], [y, y], color="0.15", linewidth=1.6, solid_capstyle="butt")
        axes.text(102, y, f"{row['successes']}/{row['trials']}", va="center", fontsize=9)
    axes.set_yticks(range(len(bars)), [_shortened(name, 62) for name, _ in bars], fontsize=9)
    axes.invert_yaxis()
    axes.set(xlim=(0, 116), xlabel="success rate in %, line: 95% Wilson interval", xticks=range(0, 101, 20))
    axes.spines[["top", "right"]].set_visible(False)
    with unwritable_named(path), replaced_whole(path) as part:
        figure.savefig(part, format="png", dpi=130)
    plt.close(figure)


def draw_failure_sheet(directory: Path, failed: Sequence[dict], start: str) -> None:
    """failures.png: the last frame of each failed episode, at half size. Without one there is no sheet. `start` is what
    the episodes began from."""
    path = directory / "failures.png"
    pictures = [(episode, picture) for episode in failed if (picture := last_frame_of(directory, episode))]
    if not pictures:
        with unwritable_named(path):
            path.unlink(missing_ok=True)
        return
    columns = min(SHEET_COLUMNS, len(pictures))
    tile, label = VIDEO_SIZE // 2, 16  # pixels
    height, width = -(-len(pictures) // columns) * (tile + label), columns * tile
    sheet = np.full((height, width, 3), 255, np.uint8)
    figure = plt.figure(figsize=(width / 100, height / 100), dpi=100)
    axes = figure.add_axes((0, 0, 1, 1))
    for i, (episode, picture) in enumerate(pictures):
        y, x = i // columns * (tile + label), i % columns * tile
        sheet[y + label : y + label + tile, x : x + tile] = halved(_read_png(picture))
        axes.text(
            x + 3, y + label / 2, f"task {episode['task_id']}, {start} {episode['trial']}", va="center", fontsize=6.5
        )
    axes.imshow(sheet, interpolation="nearest")
    axes.axis("off")
    with unwritable_named(path), replaced_whole(path) as part:
        figure.savefig(part, format="png")
    plt.close(figure)


def _read_png(path: Path) -> np.ndarray:
    try:
        return (255 * plt.imread(path)[..., :3]).astype(np.uint8)
    except (OSError, SyntaxError, ValueError) as problem:  # SyntaxError is Pillow's word for a damaged PNG
        raise BadInput(
            f"{path}: not readable as a picture ({problem}); delete it, and the report goes without"
        ) from None


def write_grid(directory: Path, episodes: Sequence[dict]) -> tuple[int, int] | None:
    """task<id>.mp4 from the episodes' own videos, in the order of the init states, and its last frame, which shows how
    each has ended, as task<id>.jpg. Returns width and height in pixels, or None where no video was kept."""
    videos = [
        video for episode in sorted(episodes, key=lambda one: one["trial"]) if (video := video_of(directory, episode))
    ]
    if not videos:
        return None
    decoded = []
    for video in videos:
        frames = read_mp4(video)
        decoded.append([halved(frame) for frame in frames] if len(videos) > MANY else frames)
    frames = grid(decoded)
    path = directory / f"task{episodes[0]['task_id']}.mp4"
    write_mp4(frames, path, CONTROL_HZ // VIDEO_EVERY)
    poster = path.with_suffix(".jpg")
    with unwritable_named(poster), replaced_whole(poster) as part:
        plt.imsave(part, frames[-1], format="jpg", pil_kwargs={"quality": 85})
    height, width = frames[0].shape[:2]
    return width, height


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
