"""report.html as people see it: opened by a real Chromium, on a phone and on a desk, in light and in dark."""

import itertools
import json
import os
from pathlib import Path
from urllib.parse import unquote, urlsplit

import av
import numpy as np
import pytest
from browser import Tab, broken_pictures, faint_text, play_all_videos, too_wide

from rollouts.episodes import Episode
from rollouts.folder import PICTURES, EvaluationFolder
from rollouts.page import page
from rollouts.pool import Attempt, record
from rollouts.report import write_side_by_side_report
from rollouts.side_by_side import results_of_all
from rollouts.statistics import summarise, summarise_tasks
from rollouts.video import CONTROL_HZ, VIDEO_EVERY, VIDEO_SIZE, framed, write_mp4, write_png
from run_libero_eval import finish

INSTRUCTIONS = {
    0: "pick up the <butter> & place it in the basket",
    3: "open the middle drawer of the cabinet, put the black bowl that is nearest to the plate on the plate, "
    "turn on the stove and pick up the donaudampfschifffahrtsgesellschaftskapitänsmützenschachtel",
    12: "turn on the stove",
}
SETTINGS = {
    "policy": "checkpoint", "image_size": 128, "visual_mesh_ratio": 0.2, "weights_sha256": "44e887e8" * 8,
    "flow_start": "noise", "precision": "fp32", "execute_steps": 10, "sample_steps": 4, "task_suite": "libero_object",
    "instructions": {str(task_id): instruction for task_id, instruction in INSTRUCTIONS.items()},
    "tasks_of_suite": 10, "num_trials": 14, "init_states": 50, "max_steps": 280, "shift_target": 0.0, "seed": 0,
    "shard": None, "version of torch": "2.13.0+cpu",
}  # fmt: skip
STANDING_STILL = {"policy": "zero", "flow_start": None}
CRASH = "killed by SIGSEGV\nFatal Python error: <Segmentation fault>\n" + "  File /a/very/long/line" * 20
PHONE, NARROW_PHONE, DESK = (360, 740), (320, 568), (1280, 900)


def scene(t: int, colour: tuple[int, int, int]) -> np.ndarray:
    """A picture (256, 256, 3) uint8: a disc on a floor, at another place for each t."""
    y, x = np.mgrid[:VIDEO_SIZE, :VIDEO_SIZE]
    picture = np.stack([120 + y // 4, 110 + y // 4, 100 + y // 4], axis=2).astype(np.uint8)
    picture[(x - 60 - 20 * t) ** 2 + (y - 150 + 10 * t) ** 2 < 900] = colour
    return picture


def episode(task_id: int, trial: int, error: str | None = None, earlier: str | None = None, **outcome) -> dict:
    """As an evaluation writes it down; without an outcome it has been solved."""
    solved = {
        "success": error is None, "steps": None if error else 140, "fingerprint": "0", "broken_by_policy": None,
        "asked_for": ["butter_1"], "lifted": ["butter_1"],
    }  # fmt: skip
    attempt = Attempt(Episode("libero_object", task_id, trial, 1), 2 if error or earlier else 1, earlier)
    one = record(attempt, solved | outcome, [] if error else [20.0, 30.0], error)
    return one | {"code": "c0ffee" * 6, "renderer": "llvmpipe"}


def failure(task_id: int, trial: int, *lifted: str, **outcome) -> dict:
    return episode(task_id, trial, **{"success": False, "steps": 280, "lifted": [*lifted]} | outcome)


def keep_pictures(folder: EvaluationFolder, one: dict, with_video: bool = True) -> None:
    """As a worker writes them, but for what there is to see."""
    name = f"task{one['task_id']}_trial{one['trial']}"
    frames = [scene(t, (40, 80, 200) if one["success"] else (200, 90, 40)) for t in range(6)]
    write_png(frames[-1], folder.pictures / f"{name}_last.png")
    if with_video:
        outcome = "success" if one["success"] else "failure"
        write_mp4(
            framed(frames, one["success"]), folder.pictures / f"{name}_{outcome}.mp4", CONTROL_HZ // VIDEO_EVERY
        )  # fmt: skip


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> Path:
    """Two evaluations, one of them with all that can become of an episode, and the page that leads to both. The folder
    has a name as people give it."""
    folder = tmp_path_factory.mktemp("reports") / "für Zoë, 100% & #1?"
    with EvaluationFolder(folder / "still", SETTINGS | STANDING_STILL) as still:
        for task_id in INSTRUCTIONS:
            still.append(failure(task_id, 0))
        other = finish(still, None, None, {})
    broken = {"broken_by_policy": "after 3 steps: the action [nan, 0, 0, 0, 0, 0, -1] is not finite", "steps": 3}
    episodes = [
        *(episode(0, trial) for trial in range(11)), failure(0, 11, fallen=["butter_1"]),
        failure(0, 12, "milk_1", "butter_1"),
        episode(0, 13), episode(3, 0, earlier="killed by SIGKILL"), failure(3, 1, "butter_1"),
        failure(3, 2, **broken), failure(3, 3, "chocolate_pudding_1"), episode(3, 4, error=CRASH),
        *(episode(12, trial) for trial in range(3)),
    ]  # fmt: skip
    with EvaluationFolder(folder / "policy", SETTINGS) as policy:
        for one in episodes:
            policy.append(one)
            if not one["crashed"] and (one["task_id"], one["trial"]) != (3, 3):  # somebody has deleted these
                keep_pictures(policy, one, with_video=one["task_id"] != 12 and one["trial"] != 2)
        results = finish(policy, "best.pt", {"epoch": 20}, {"still": other})
    write_side_by_side_report(folder, results_of_all({"policy": results, "still": other}))
    return folder


PAGES = ("policy/report.html", "still/report.html", "report.html")


@pytest.fixture(params=PAGES)
def opened(request, tab, reports) -> Tab:
    tab.show(*DESK)
    tab.open(reports / request.param)
    return tab


def of_each(tab: Tab, selector: str, what: str) -> list:
    return tab.ask(f"[...document.querySelectorAll({json.dumps(selector)})].map(one => {what})")


def test_pages_open_without_a_complaint_and_ask_for_nothing_but_files_of_their_folder(opened, reports):
    assert broken_pictures(opened) == []
    play_all_videos(opened)
    assert opened.troubles == []
    own = f"{reports.as_uri()}/"
    assert opened.requests and [url for url in opened.requests if not url.startswith((own, "data:"))] == []
    assert opened.ask("document.scripts.length") == 0
    links = of_each(opened, "a[href]", "one.href.split('#')[0]")
    assert all(Path(unquote(urlsplit(url).path)).is_file() for url in links)


def test_every_video_plays_and_has_the_size_that_the_page_keeps_for_it(tab, reports):
    tab.show(*DESK)
    tab.open(reports / "policy/report.html")
    kept = "[one.getAttribute('src'), +one.getAttribute('width'), +one.getAttribute('height')]"
    shown = {source: (width, height) for source, width, height in of_each(tab, "video", kept)}
    assert shown == {"task0.mp4": (640, 384), "task3.mp4": (512, 256)}  # 13 at half size, and two
    assert play_all_videos(tab) == shown
    tab.ask(
        "document.querySelectorAll('a[href$=mp4]').forEach(one => document.body.append("
        "Object.assign(document.createElement('video'), {src: one.href, muted: true})))"
    )
    played = play_all_videos(tab)
    linked = {source: size for source, size in played.items() if source not in shown}
    assert {*linked.values()} == {(VIDEO_SIZE, VIDEO_SIZE)}
    assert {unquote(source).removeprefix("file://") for source in linked} == {
        str(path) for path in (reports / "policy" / PICTURES).glob("*.mp4")
    }


def test_videos_are_of_the_kind_that_every_browser_plays_and_begin_with_their_index(reports):
    """Chromium takes more kinds than Safari and Firefox do, which want 4:2:0 in even sizes."""
    videos = [*reports.rglob("*.mp4")]
    assert len(videos) > 10
    for path in videos:
        with av.open(str(path)) as video:
            codec = video.streams.video[0].codec_context
            assert (codec.name, codec.pix_fmt, codec.width % 2, codec.height % 2) == ("h264", "yuv420p", 0, 0)
        content = path.read_bytes()
        assert 0 < content.find(b"moov") < content.find(b"mdat")


# ------------------------------------------------------------------------------------------------ how it can be read


@pytest.mark.parametrize("size", [PHONE, NARROW_PHONE])
def test_nothing_is_wider_than_a_phone(opened, size):
    opened.show(*size)
    opened.ask("document.querySelectorAll('details').forEach(one => one.open = true)")
    assert too_wide(opened) == []


def test_a_page_that_is_too_wide_is_found(tab, tmp_path):
    (tmp_path / "page.html").write_text(
        '<meta name="viewport" content="width=device-width"><div id="a" style="width:500px">.</div>'
        '<div style="overflow-x:auto"><div id="b" style="width:500px">.</div></div>'
    )
    tab.show(*PHONE)
    tab.open(tmp_path / "page.html")
    assert any('id="a"' in one for one in too_wide(tab)) and 'id="b"' not in str(too_wide(tab))


def test_all_text_can_be_read_in_light_and_in_dark(opened):
    backgrounds = set()
    for scheme in ("light", "dark"):
        opened.prefer(scheme)
        assert faint_text(opened) == [], scheme
        backgrounds.add(opened.ask("getComputedStyle(document.body).backgroundColor"))
    assert len(backgrounds) == 2
    assert len(faint_text(opened, least=15)) > 2  # there is grey text, and it is measured


def test_what_is_read_aloud_has_names_and_headings_in_order(opened):
    title, language = opened.ask("[document.title, document.documentElement.lang]")
    assert "libero_object" in title and language == "en"
    levels = of_each(opened, "h1,h2,h3,h4,h5,h6", "+one.tagName[1]")
    assert levels.count(1) == 1 and levels[0] == 1
    assert all(b <= a + 1 for a, b in itertools.pairwise(levels))
    ids = of_each(opened, "[id]", "one.id")
    assert len(ids) == len({*ids})
    assert {*of_each(opened, "a[href^='#']", "one.hash.slice(1)")} <= {*ids}
    opened.call("Accessibility.enable")
    nodes = opened.call("Accessibility.getFullAXTree")["nodes"]
    named = {"image", "link", "Video", "region", "heading", "columnheader", "rowheader"}
    found = [(node["role"]["value"], node["name"]["value"]) for node in nodes if not node["ignored"] and "name" in node]
    assert {role for role, _ in found} >= {"link", "region", "heading", "rowheader"}
    assert [role for role, name in found if role in named and not name] == []


def test_the_keyboard_reaches_all_that_can_be_opened_played_and_scrolled(tab, reports):
    tab.show(*PHONE)
    tab.open(reports / "policy/report.html")
    wanted = tab.ask("document.querySelectorAll('a, video, summary, .scroll').length")
    tab.ask("window.reached = new Set(); addEventListener('focusin', event => reached.add(event.target))")
    for _ in range(10 * wanted):  # a video has stops of its own
        tab.call("Input.dispatchKeyEvent", type="keyDown", key="Tab", code="Tab", windowsVirtualKeyCode=9)
        if tab.ask("reached.size") >= wanted:
            break
    assert tab.ask("[...reached].filter(one => one.matches('a, video, summary, .scroll')).length") == wanted


# ------------------------------------------------------------------------------------------------ what stands where


def test_failures_come_first_each_with_its_last_frame_its_instruction_and_what_it_lifted(tab, reports):
    tab.show(*DESK)
    tab.open(reports / "policy/report.html")
    assert of_each(tab, "h2", "one.innerText") == [
        "Failures", "Crashes", "Side by side", "Tasks", "Episodes", "Settings",
    ]  # fmt: skip
    assert broken_pictures(tab) == []
    cards = dict(zip(of_each(tab, ".cards li", "one.id"), of_each(tab, ".cards li", "one.innerText"), strict=True))
    expected = {
        "task0-11": (0, 11, "lifted nothing; butter_1 (asked for) fell over; 280 steps"),
        "task0-12": (0, 12, "lifted milk_1, butter_1 (asked for); 280 steps"),
        "task3-1": (3, 1, "lifted butter_1 (asked for); 280 steps"),
        "task3-2": (3, 2, "broken off by the policy's own actions after 3 steps: the action [nan, 0, 0, "),
        "task3-3": (3, 3, "lifted chocolate_pudding_1; 280 steps"),
    }
    assert cards.keys() == expected.keys()
    for name, (task_id, trial, became) in expected.items():
        assert f"Task {task_id}, init state {trial}" in cards[name]
        assert INSTRUCTIONS[task_id] in cards[name] and became in cards[name]
    frames = dict(of_each(tab, ".cards li", "[one.id, one.querySelector('img')?.src]"))
    assert frames.pop("task3-3") is None and "no picture was kept" in cards["task3-3"]
    for name, frame in frames.items():
        task_id, trial = name.removeprefix("task").split("-")
        assert frame.endswith(f"{PICTURES}/task{task_id}_trial{trial}_last.png") and frame in tab.requests
    assert tab.ask("document.body.innerText").count("killed by") == 2


def test_a_failed_number_leads_to_its_picture(tab, reports):
    tab.show(*PHONE)
    tab.open(reports / "policy/report.html")
    tab.ask("document.querySelector('a.failure[href=\"#task3-1\"]').click()")
    top, height = tab.ask("[document.getElementById('task3-1').getBoundingClientRect().top, innerHeight]")
    assert 0 <= top < height
    assert tab.ask("getComputedStyle(document.querySelector('#task3-1')).outlineStyle") == "solid"


def test_the_page_of_all_leads_to_the_page_of_each(tab, reports):
    tab.open(reports / "report.html")
    links = of_each(tab, "td a", "one.getAttribute('href')")
    assert sorted(links) == ["policy/report.html", "still/report.html"]
    tab.ask("document.querySelector('td a').click()")
    tab.wait_until_loaded()
    assert "16/21 successes" in tab.ask("document.body.innerText")


def test_five_hundred_failures_open_at_once_and_their_pictures_come_as_they_are_scrolled_to(tab, tmp_path):
    """Its videos and pictures are 500 names of two files."""
    folder = EvaluationFolder(tmp_path, SETTINGS)
    keep_pictures(folder, failure(0, 0))
    folder.close()
    episodes = [failure(0, trial) for trial in range(500)]
    for trial in range(1, 500):
        for ending in ("last.png", "failure.mp4"):
            os.link(folder.pictures / f"task0_trial0_{ending}", folder.pictures / f"task0_trial{trial}_{ending}")
    results = {
        "title": "500 failures", "overall": summarise(episodes), "tasks": summarise_tasks({0: "pick"}, episodes),
        "episodes": episodes, "settings": SETTINGS, "checkpoint": None, "checkpoint_epoch": None, "code": [],
        "renderer": [], "side_by_side": {},
    }  # fmt: skip
    (tmp_path / "report.html").write_text(page(tmp_path, results, {}))
    for size in (PHONE, DESK):
        tab.show(*size)
        assert tab.open(tmp_path / "report.html") < 5
        assert len(of_each(tab, ".cards img", "1")) == 500
        assert len(tab.requests) < 100
    assert tab.troubles == []
