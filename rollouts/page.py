"""report.html: plain HTML and CSS in one file, without scripts, for phones and desks, in light and in dark.

All that it shows lies in the evaluation's folder and is linked relatively: nothing is asked of any other place.
"""

import html
from collections.abc import Mapping, Sequence
from pathlib import Path

from rollouts.episodes import start_name
from rollouts.folder import PICTURES, last_frame_of, video_of
from rollouts.side_by_side import Table, cell_text, columns_of, num_cells, rows_of
from rollouts.statistics import ORIGINS, causes_text, over_tasks, troubles
from rollouts.video import VIDEO_SIZE

STYLE = Path(__file__).with_name("page.css")
# The icon is empty, or a browser would ask a server for one.
HEAD = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">"""


def page(directory: Path, results: dict, grids: Mapping[int, tuple[int, int]]) -> str:
    """report.html of one evaluation. grids: task id -> width and height of its grid of videos, where there is one."""
    overall, episodes = results["overall"], results["episodes"]
    start = start_name(results["settings"])
    instructions = {task["task_id"]: task["task"] for task in results["tasks"]}
    of_checkpoint = {"checkpoint": results["checkpoint"], "epoch": results["checkpoint_epoch"]}
    origins = {name: ", ".join(results[name]) for name in ORIGINS}
    sections = {  # heading -> what stands below it; what went wrong comes first
        "Failures": failures_section(directory, episodes, instructions, overall, start),
        "Crashes": crash_section(episodes, start),
        "Side by side": [table_of(results["side_by_side"])] if num_cells(results["side_by_side"]) > 1 else [],
        "Tasks": [
            figures_table(results["tasks"], overall),
            '<p class="soft">A bar is the success rate, the line on it the 95% interval. '
            '<a href="success_rates.png">As a picture</a></p>',
        ],
        "Episodes": episodes_section(directory, results["tasks"], episodes, start, grids),
        "Settings": [settings_table(of_checkpoint | results["settings"] | origins)],
    }
    top = [
        f'<p class="figure">{overall["successes"]}/{overall["trials"]} successes{_percent(overall)}</p>',
        bar(overall),
        f'<p class="soft">{_details(overall)}</p>',
    ]
    return document(html.escape(results["title"]), top, sections)


def side_by_side_page(results: dict) -> str:
    """report.html of several evaluations, which leads to each one's own."""
    explained = "Successes with their 95% interval (Wilson). A cell opens the report of its episodes."
    sections = {
        "Side by side": [f'<p class="soft">{explained}</p>', table_of(results["side_by_side"], results["folders"])],
        "Settings": [settings_table({"checkpoint": results["checkpoint"]} | results["settings"])],
    }
    return document(html.escape(results["title"]), [], sections)


def document(title: str, top: Sequence[str], sections: Mapping[str, Sequence[str]]) -> str:
    """title, top and sections are HTML. A section without content is left out, its heading too."""
    ids = {name: name.lower().replace(" ", "-") for name, content in sections.items() if content}
    links = "\n".join(f'<a href="#{ids[name]}">{name}</a>' for name in ids)
    lines = [
        f"{HEAD}\n<title>{title}</title>\n<style>\n{STYLE.read_text()}</style>\n</head>\n<body>",
        f"<header>\n<h1>{title}</h1>",
        *top,
        f'<nav aria-label="on this page">\n{links}\n</nav>\n</header>\n<main>',
    ]
    for name in ids:
        lines += [f'<section aria-labelledby="{ids[name]}">\n<h2 id="{ids[name]}">{name}</h2>', *sections[name]]
        lines.append("</section>")
    return "\n".join([*lines, "</main>\n</body>\n</html>\n"])


# ------------------------------------------------------------------------------------------------ what went wrong


def failures_section(
    directory: Path, episodes: Sequence[dict], instructions: Mapping[int, str], overall: dict, start: str
) -> list[str]:
    """A card for each failure: its last frame, what was asked for, and what became of it."""
    failed = [episode for episode in episodes if not episode["success"] and not episode["crashed"]]
    if not failed:
        return []
    cards = []
    for episode in failed:
        where = f"task {episode['task_id']}, {start} {episode['trial']}"
        cards.append(
            f'<li id="{_name(episode)}">\n{_seen(directory, episode, where)}\n<h3>{where.capitalize()}</h3>\n'
            f'<p>{html.escape(instructions[episode["task_id"]])}</p>\n<p class="soft">{_became(episode)}</p></li>'
        )
    causes = causes_text(overall)
    lifted = f" They lifted: {html.escape(causes)}." if causes else ""
    section = [f'<p class="soft">{len(failed)} of {overall["trials"]} episodes failed.{lifted}</p>']
    section.append('<ul class="cards">\n' + "\n".join(cards) + "\n</ul>")
    if (directory / "failures.png").exists():
        section.append('<p class="soft"><a href="failures.png">All last frames in one picture</a></p>')
    return section


def _seen(directory: Path, episode: dict, where: str) -> str:
    """Its last frame, which opens its video where one was kept. A page of hundreds of players would open slowly."""
    video, frame = video_of(directory, episode), last_frame_of(directory, episode)
    seen = '<span class="none">no picture was kept</span>'
    if frame:
        size = f'width="{VIDEO_SIZE}" height="{VIDEO_SIZE}"'
        address = f"{PICTURES}/{frame.name}"
        seen = f'<img src="{address}" {size} loading="lazy" decoding="async" alt="Last frame of {where}">'
    if video:
        seen = f'<a href="{PICTURES}/{video.name}">{seen}<span class="play">▶ video</span></a>'
    return seen


def _became(episode: dict) -> str:
    """Such as "lifted milk_1; butter_1 (asked for) fell over; 280 steps"."""
    if episode.get("broken_by_policy") is not None:
        return f"broken off by the policy's own actions {html.escape(episode['broken_by_policy'])}"
    parts = [f"{episode['steps']} steps"]
    if "lifted" in episode:  # it was not always recorded
        said = {name: f"{name} (asked for)" for name in episode["asked_for"]}
        lifted, fallen = (
            ", ".join(said.get(name, name) for name in episode.get(key, ())) for key in ("lifted", "fallen")
        )
        parts = [f"lifted {lifted or 'nothing'}", *([f"{fallen} fell over"] if fallen else []), *parts]
    return html.escape("; ".join(parts))


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
        said = f'<pre tabindex="0">{error}</pre>'
        section.append(f"<details><summary>{where}: {what}; {why}</summary>{said}</details>")
    return section


# --------------------------------------------------------------------------------------------------------- tables


def table_of(table: Table, folders: Mapping[str, Mapping[str, str]] | None = None) -> str:
    """folders: row -> column -> the evaluation's folder, relative to the page; its report explains a dash, too."""
    columns, body = columns_of(table), []
    for row in rows_of(table):
        cells = [f'<th scope="row">{html.escape(row)}</th>']
        for column in columns:
            text = html.escape(cell_text(table.get(row, {}).get(column)))
            folder = (folders or {}).get(row, {}).get(column)
            link = f'<a href="{html.escape(folder)}/report.html">{text}</a>' if folder else text
            cells.append(f"<td>{link}</td>")
        body.append(f"<tr>{''.join(cells)}</tr>")
    return _scrolling("words", ["", *map(html.escape, columns)], body, "side by side")


def figures_table(tasks: Sequence[dict], overall: dict) -> str:
    head = ["task", "instruction", "solved", "rate", "95% interval", "steps to success", "decision, ms"]
    has_crashed = overall["crashed"] > 0
    head += ["crashed"] * has_crashed
    rows = [(task["task_id"], task["task"], task, "") for task in tasks]
    if len(tasks) > 1:
        rows.append(("all", "", overall, ' class="overall"'))
    body = []
    for name, instruction, row, style in rows:
        low, high = row["interval"]
        cells = [
            html.escape(instruction) + bar(row),
            f"{row['successes']}/{row['trials']}",
            f"{row['success_rate']:.1%}" if row["trials"] else "–",
            f"{100 * low:.1f} to {high:.1%}" if row["trials"] else "–",
            _number(row["mean_steps_to_success"], ".0f"),
            _number(row["decision_ms_median"], ".1f"),
            *([row["crashed"]] * has_crashed),
        ]
        columns = "".join(f"<td>{cell}</td>" for cell in cells)
        body.append(f'<tr{style}><th scope="row">{name}</th>{columns}</tr>')
    return _scrolling("tasks", head, body, "figures of each task")


def settings_table(rows: Mapping[str, object]) -> str:
    body = [
        f'<tr><th scope="row">{_breakable(name)}</th><td>{_value(value)}</td></tr>'
        for name, value in rows.items()
        if value not in (None, [])
    ]
    return _scrolling("words settings", [], body, "settings")


def _breakable(name: str) -> str:
    """As HTML: a narrow screen may begin a line after an underscore, rather than within a word."""
    return html.escape(name).replace("_", "_<wbr>")


def _value(value: object) -> str:
    if isinstance(value, dict):
        return "<br>".join(f"{html.escape(str(name))}: {html.escape(str(one))}" for name, one in value.items())
    return html.escape(str(value))


def _scrolling(kind: str, head: Sequence[str], body: Sequence[str], label: str) -> str:
    """A table in a box that the keyboard can scroll as well. head are its columns' names, none is no head."""
    names = "".join(f'<th scope="col">{name}</th>' if name else "<td></td>" for name in head)
    headings = f"<thead><tr>{names}</tr></thead>\n" if head else ""
    rows = "\n".join(body)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{label}">\n'
        f'<table class="{kind}">\n{headings}<tbody>\n{rows}\n</tbody></table></div>'
    )


def bar(row: dict) -> str:
    """A success rate to be seen; its figures stand beside it."""
    if not row["trials"]:
        return ""
    rate, low, high = (f"{100 * share:.1f}%" for share in (row["success_rate"], *row["interval"]))
    line = f'<b style="left:{low};right:calc(100% - {high})"></b>'
    return f'<div class="bar" aria-hidden="true"><i style="width:{rate}"></i>{line}</div>'


# ------------------------------------------------------------------------------------------------------- episodes


def episodes_section(
    directory: Path,
    tasks: Sequence[dict],
    episodes: Sequence[dict],
    start: str,
    grids: Mapping[int, tuple[int, int]],
) -> list[str]:
    section = [
        f'<p class="soft">Numbers are {start}s. An underlined one opens its video, a failed one its picture above.</p>',
        '<ul class="chips"><li><span class="success">solved</span></li>'
        '<li><span class="failure">✗ failed</span></li><li><span class="crashed">! crashed</span></li></ul>',
    ]
    for task in tasks:
        task_id = task["task_id"]
        own = sorted((one for one in episodes if one["task_id"] == task_id), key=lambda one: one["trial"])
        section += [
            f"<h3>Task {task_id}: {html.escape(task['task'])}</h3>",
            f'<ul class="chips">{"".join(f"<li>{_chip(directory, episode)}</li>" for episode in own)}</ul>',
        ]
        if causes := causes_text(task):
            section.append(f'<p class="soft">The failures lifted: {html.escape(causes)}.</p>')
        if task_id in grids:
            width, height = grids[task_id]
            section.append(
                f'<video class="grid" controls muted loop playsinline preload="none" loading="lazy" width="{width}" '
                f'height="{height}" poster="task{task_id}.jpg" src="task{task_id}.mp4" '
                f'aria-label="Videos of task {task_id}, side by side"></video>'
            )
    return section


def _chip(directory: Path, episode: dict) -> str:
    trial = episode["trial"]
    if episode["crashed"]:
        return f'<span class="crashed">! {trial}</span>'
    if not episode["success"]:
        return f'<a class="failure" href="#{_name(episode)}">✗ {trial}</a>'
    video = video_of(directory, episode)
    if video:
        return f'<a class="success" href="{PICTURES}/{video.name}">{trial}</a>'
    return f'<span class="success">{trial}</span>'


def _name(episode: dict) -> str:
    return f"task{episode['task_id']}-{episode['trial']}"


# ---------------------------------------------------------------------------------------------------------- words


def _percent(row: dict) -> str:
    return f" = {row['success_rate']:.1%}" if row["trials"] else ""


def _details(overall: dict) -> str:
    low, high = overall["interval"]
    parts = [f"95% interval {100 * low:.1f} to {high:.1%}{over_tasks(overall)}"] if overall["trials"] else []
    if overall["mean_steps_to_success"] is not None:
        parts.append(f"{overall['mean_steps_to_success']:.0f} steps to success on average")
    if overall["decision_ms_mean"] is not None:
        parts.append(f"{overall['decision_ms_mean']:.1f} ms a decision (median {overall['decision_ms_median']:.1f})")
    return " · ".join([*parts, *troubles(overall)])


def _number(value: float | None, spec: str) -> str:
    return "–" if value is None else format(value, spec)
