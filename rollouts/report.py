"""An evaluation to be looked at: success bars, a grid of videos for each task, the failures' last frames, report.html.

Everything lies in the evaluation's folder and is linked relatively, so that the folder opens from disk wherever it is.
"""

import html
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from errors import BadInput
from files import replaced_whole, unwritable_named
from rollouts.episodes import start_name
from rollouts.folder import PICTURES, write_whole
from rollouts.side_by_side import Table, cell_text, columns_of, num_cells, rows_of, table_text
from rollouts.statistics import ORIGINS, causes_text, troubles
from rollouts.video import CONTROL_HZ, FAILURE, SUCCESS, VIDEO_EVERY, VIDEO_SIZE, grid, halved, read_mp4, write_mp4

MANY = 10  # videos; a grid of more shows them at half size
SHEET_COLUMNS = 8  # pictures in a row of the failure sheet
GREEN, RED = (f"#{r:02x}{g:02x}{b:02x}" for r, g, b in (SUCCESS, FAILURE))


def write_report(directory: Path, results: dict) -> Path:
    """results as run_libero_eval.py writes them -> the path of report.html."""
    tasks, episodes = results["tasks"], results["episodes"]
    draw_success_bars(tasks, results["overall"], directory / "success_rates.png")
    failed = [episode for episode in episodes if not episode["success"] and not episode["crashed"]]
    draw_failure_sheet(directory, failed)
    for task in tasks:
        write_grid(directory, [episode for episode in episodes if episode["task_id"] == task["task_id"]])
    write_whole(directory / "report.html", page(directory, results))
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


def draw_failure_sheet(directory: Path, failed: Sequence[dict]) -> None:
    """failures.png: the last frame of each failed episode, at half size. Without one there is no sheet."""
    path = directory / "failures.png"
    pictures = [(episode, picture) for episode in failed if (picture := _last_frame(directory, episode))]
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
        axes.text(x + 3, y + label / 2, f"task {episode['task_id']}, {episode['trial']}", va="center", fontsize=7)
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


def write_grid(directory: Path, episodes: Sequence[dict]) -> None:
    """task<id>.mp4 from the episodes' own videos, in the order of the init states."""
    videos = [
        video for episode in sorted(episodes, key=lambda one: one["trial"]) if (video := _video(directory, episode))
    ]
    if not videos:
        return
    decoded = []
    for video in videos:
        frames = read_mp4(video)
        decoded.append([halved(frame) for frame in frames] if len(videos) > MANY else frames)
    write_mp4(grid(decoded), directory / f"task{episodes[0]['task_id']}.mp4", CONTROL_HZ // VIDEO_EVERY)


def _video(directory: Path, episode: dict) -> Path | None:
    outcome = "success" if episode["success"] else "failure"
    path = directory / PICTURES / f"task{episode['task_id']}_trial{episode['trial']}_{outcome}.mp4"
    return path if path.exists() else None


def _last_frame(directory: Path, episode: dict) -> Path | None:
    path = directory / PICTURES / f"task{episode['task_id']}_trial{episode['trial']}_last.png"
    return path if path.exists() else None


# ----------------------------------------------------------------------------------------------------------- page

STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --soft: #59636e; --paper: #ffffff; --line: #d1d9e0; --card: #f6f8fa; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --soft: #9198a1; --paper: #0d1117; --line: #3d444d; --card: #161b22; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 68rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; } h3 { font-size: 1rem; }
.soft { color: var(--soft); } .figure { font-size: 2.2rem; font-weight: 650; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .35rem .6rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:nth-child(2), td:nth-child(2), .words td, .words th { text-align: left; white-space: normal; min-width: 14rem; }
tr.overall td { font-weight: 650; }
img, video { max-width: 100%; border-radius: 6px; border: 1px solid var(--line); background: #fff; }
.chips { display: flex; flex-wrap: wrap; gap: .3rem; }
.chips a, .chips span { min-width: 2rem; text-align: center; padding: .1rem .3rem; border-radius: 4px; color: #fff;
  text-decoration: none; font-size: .85rem; }
.success { background: GREEN; } .failure { background: RED; } .crashed { background: #6e7781; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: .8rem; overflow-x: auto;
  font-size: .8rem; } summary { cursor: pointer; }
""".replace("GREEN", GREEN).replace("RED", RED)


def page(directory: Path, results: dict) -> str:
    """report.html: plain HTML without scripts, nothing loaded from elsewhere."""
    title, overall = html.escape(results["title"]), results["overall"]
    start = start_name(results["settings"])
    sections = [
        f"<h1>{title}</h1>",
        f'<p class="figure">{overall["successes"]}/{overall["trials"]} successes{_percent(overall)}</p>',
        f'<p class="soft">{_details(overall)}</p>',
        *beside_section(results["side_by_side"]),
        "<h2>Tasks</h2>",
        figures_table(results["tasks"], overall),
        '<p><img src="success_rates.png" alt="Success rate of each task with its 95% interval"></p>',
        "<h2>Episodes</h2>",
        f'<p class="soft">Numbers are {start}s. <span class="chips" style="display:inline-flex">'
        '<span class="success">solved</span><span class="failure">failed</span><span class="crashed">crashed</span>'
        "</span> A number opens the episode's video or last frame where one was kept.</p>",
    ]
    for task in results["tasks"]:
        own = [episode for episode in results["episodes"] if episode["task_id"] == task["task_id"]]
        sections += task_section(directory, task, own)
    sections += lifted_section(results["tasks"])
    if (directory / "failures.png").exists():
        sections += [
            '<h2>Failures</h2><p class="soft">The last frame of each.</p>',
            '<p><a href="failures.png"><img src="failures.png" alt="Last frames of the failed episodes"></a></p>',
        ]
    sections += broken_section(results["episodes"], start)
    sections += crash_section(results["episodes"], start)
    of_checkpoint = {"checkpoint": results["checkpoint"], "epoch": results["checkpoint_epoch"]}
    origins = {name: ", ".join(results[name]) for name in ORIGINS}
    sections += ["<h2>Settings</h2>", settings_table(of_checkpoint | results["settings"] | origins)]
    return document(title, sections)


def write_side_by_side_report(directory: Path, results: dict) -> Path:
    """results as side_by_side.json has them -> the path of report.html, which leads to each evaluation's own."""
    title = html.escape(results["title"])
    sections = [
        f"<h1>{title}</h1>",
        '<p class="soft">Successes with their 95% interval (Wilson). A cell opens the report of its episodes.</p>',
        linked_table(results["side_by_side"], results["folders"]),
        "<h2>Settings</h2>",
        settings_table({"checkpoint": results["checkpoint"]} | results["settings"]),
    ]
    write_whole(directory / "report.html", document(title, sections))
    return directory / "report.html"


def document(title: str, sections: Sequence[str]) -> str:
    """title and sections are HTML."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(sections)
        + "\n</body>\n</html>\n"
    )


def beside_section(table: Table) -> list[str]:
    """The evaluations that this one was told to stand beside; without any there is nothing to compare."""
    if num_cells(table) < 2:
        return []
    return ["<h2>Side by side</h2>", f"<pre>{html.escape(table_text(table))}</pre>"]


def linked_table(table: Table, folders: dict[str, dict[str, str]]) -> str:
    """folders: row -> column -> the evaluation's folder, relative to the page; its report explains a dash, too."""
    columns = columns_of(table)
    body = []
    for row in rows_of(table):
        cells = [f"<td>{html.escape(row)}</td>"]
        for column in columns:
            text = html.escape(cell_text(table.get(row, {}).get(column)))
            folder = folders.get(row, {}).get(column)
            link = f'<a href="{html.escape(folder)}/report.html">{text}</a>' if folder else text
            cells.append(f"<td>{link}</td>")
        body.append(f"<tr>{''.join(cells)}</tr>")
    headings = "".join(f"<th>{html.escape(column)}</th>" for column in ["", *columns])
    head = f"<thead><tr>{headings}</tr></thead>"
    return f'<div class="scroll"><table class="words">{head}<tbody>{"".join(body)}</tbody></table></div>'


def figures_table(tasks: Sequence[dict], overall: dict) -> str:
    head = ("task", "instruction", "solved", "rate", "95% interval", "steps to success", "decision, ms", "crashed")
    rows = [(task["task_id"], task["task"], task, "") for task in tasks]
    if len(tasks) > 1:
        rows.append(("all", "", overall, ' class="overall"'))
    body = []
    for name, instruction, row, style in rows:
        low, high = row["interval"]
        cells = (
            name,
            html.escape(instruction),
            f"{row['successes']}/{row['trials']}",
            f"{row['success_rate']:.1%}" if row["trials"] else "–",
            f"{100 * low:.1f} to {high:.1%}" if row["trials"] else "–",
            _number(row["mean_steps_to_success"], ".0f"),
            _number(row["decision_ms_median"], ".1f"),
            row["crashed"],
        )
        body.append(f"<tr{style}>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    headings = "".join(f"<th>{name}</th>" for name in head)
    return f'<div class="scroll"><table><thead><tr>{headings}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'


def task_section(directory: Path, task: dict, episodes: Sequence[dict]) -> list[str]:
    chips = []
    for episode in sorted(episodes, key=lambda one: one["trial"]):
        outcome = "crashed" if episode["crashed"] else "success" if episode["success"] else "failure"
        seen = _video(directory, episode) or _last_frame(directory, episode)
        if seen and outcome != "crashed":
            chips.append(f'<a class="{outcome}" href="{PICTURES}/{seen.name}">{episode["trial"]}</a>')
        else:
            chips.append(f'<span class="{outcome}">{episode["trial"]}</span>')
    section = [
        f"<h3>Task {task['task_id']}: {html.escape(task['task'])}</h3>",
        f'<div class="chips">{"".join(chips)}</div>',
    ]
    grid_name = f"task{task['task_id']}.mp4"
    if (directory / grid_name).exists():
        section.append(f'<p><video controls muted loop preload="metadata" src="{grid_name}"></video></p>')
    return section


def lifted_section(tasks: Sequence[dict]) -> list[str]:
    """What the failures of each task lifted; nothing where no failure is known."""
    rows = [(task, causes_text(task["lifted_in_failures"])) for task in tasks]
    cells = [
        f"<tr><td>{task['task_id']}</td><td>{html.escape(task['task'])}</td><td>{html.escape(causes)}</td></tr>"
        for task, causes in rows
        if causes
    ]
    head = "<tr><th>task</th><th>instruction</th><th>episodes, and what was lifted in them</th></tr>"
    table = f'<div class="scroll"><table><thead>{head}</thead><tbody>{"".join(cells)}</tbody></table></div>'
    return ["<h2>What the failures lifted</h2>", table] if cells else []


def broken_section(episodes: Sequence[dict], start: str) -> list[str]:
    """Failures that the policy's own actions broke off."""
    items = [
        f"<li>task {episode['task_id']}, {start} {episode['trial']}: {html.escape(episode['broken_by_policy'])}</li>"
        for episode in episodes
        if episode.get("broken_by_policy") is not None
    ]
    return ["<h2>Broken off by the policy's own actions</h2>", f"<ul>{''.join(items)}</ul>"] if items else []


def crash_section(episodes: Sequence[dict], start: str) -> list[str]:
    """Crashes, and episodes that were finished only at the second try."""
    section = []
    for episode in episodes:
        where = f"task {episode['task_id']}, {start} {episode['trial']}"
        if episode["crashed"]:
            what, error = f"crashed {episode['tries']} times", html.escape(episode["error"])
        elif episode.get("earlier_crash"):
            what, error = "finished at the second try", html.escape(episode["earlier_crash"])
        else:
            continue
        why = error.partition("\n")[0]
        section.append(f"<details><summary>{where}: {what}; {why}</summary><pre>{error}</pre></details>")
    return ["<h2>Crashes</h2>", *section] if section else []


def settings_table(rows: dict) -> str:
    cells = "".join(
        f"<tr><td>{html.escape(str(name))}</td><td>{html.escape(str(value))}</td></tr>"
        for name, value in rows.items()
        if value not in (None, [])
    )
    return f'<div class="scroll"><table class="words"><tbody>{cells}</tbody></table></div>'


def _percent(row: dict) -> str:
    return f" = {row['success_rate']:.1%}" if row["trials"] else ""


def _details(row: dict) -> str:
    low, high = row["interval"]
    parts = [f"95% interval {100 * low:.1f} to {high:.1%} (Wilson)"] if row["trials"] else []
    if row["mean_steps_to_success"] is not None:
        parts.append(f"{row['mean_steps_to_success']:.0f} steps to success on average")
    if row["decision_ms_mean"] is not None:
        parts.append(f"{row['decision_ms_mean']:.1f} ms a decision (median {row['decision_ms_median']:.1f})")
    return " · ".join([*parts, *troubles(row)])


def _number(value: float | None, spec: str) -> str:
    return "–" if value is None else format(value, spec)


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
