"""README.md and docs/*.md name what is there: the Python of README runs; commands, flags, settings, files and links
exist."""

import contextlib
import io
import re
import runpy
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from config import load_config

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SUFFIXES = ("py", "sh", "cpp", "yaml", "txt", "toml", "md", "png", "cff", "json")
MADE_BY_RUNS = (
    "results.json",
    "side_by_side.json",
    "settings.json",
    "config.json",
    "preview.png",
    "failures.png",
    "success_rates.png",
)  # names of files that are written, not kept
SECTIONS = "data|model|training|wandb"
FOLDERS = "conf|checkup|demos|jepa|rollouts|serving|simulator|collection|experiments|benchmarks|training|docs|tests"
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def code_of(page: Path) -> str:
    """All that a page shows as code, blocks and inline; a command that goes on in the next line is one line."""
    text = page.read_text().replace("\\\n", " ")
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    return "\n".join([*blocks, *inline])


def commands(code: str) -> list[tuple[str, list[str]]]:
    """The project's own scripts that the code calls, as paths, each with its flags."""
    found = re.findall(r"(?:python3?|torchrun(?: --\S+)*) (-m \S+|\S+\.py)(.*)", code)
    scripts = [name[3:].replace(".", "/") + ".py" if name.startswith("-m ") else name for name, _ in found]
    calls = [(script, re.findall(r"(?<!\S)--\w+", rest)) for script, (_, rest) in zip(scripts, found, strict=True)]
    return [(script, flags) for script, flags in calls if script != "venv.py"]  # python -m venv


@cache
def flags_of(script: str) -> frozenset[str]:
    """What the script's own --help lists."""
    sys_path, argv, output = sys.path[:], sys.argv, io.StringIO()
    sys.argv = [script, "--help"]
    sys.path.insert(0, str((ROOT / script).parent))
    try:
        with contextlib.redirect_stdout(output), pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / script), run_name="__main__")
    finally:
        sys.path[:], sys.argv = sys_path, argv
    assert not end.value.code, f"{script} --help ends with {end.value.code}"
    return frozenset(re.findall(r"^  (?:-\w, )?(--\w+)", output.getvalue(), re.M))


@pytest.mark.simulator
def test_the_python_of_readme_runs_and_gives_a_chunk_of_actions(monkeypatch):
    (block,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    monkeypatch.chdir(ROOT)
    names: dict = {}
    exec(block, names)
    actions, env = names["actions"], names["env"]
    assert actions.shape == (10, 7) and np.isfinite(actions).all()
    assert set(actions[:, 6]) <= {-1, 1}
    before = names["obs"]["joint_states"]
    for action in actions:
        env.step(action)
    moved = env.observe()["robot0_joint_pos"] - before
    env.close()
    assert np.abs(moved).max() > 0.01  # rad; README says that these lines move the arm


@each_page
def test_every_script_and_flag_that_a_page_calls_exists(page):
    for script, flags in commands(code_of(page)):
        assert (ROOT / script).is_file(), f"{page.name} calls {script}, which is not there"
        if flags:
            assert set(flags) <= flags_of(script), f"{page.name}: {script} has no {set(flags) - flags_of(script)}"


@each_page
def test_every_flag_that_a_page_names_alone_belongs_to_a_script(page):
    known = frozenset().union(*(flags_of(script) for script, _ in commands(code_of(ROOT / "README.md"))))
    alone = re.findall(r"`(?:run_libero_eval\.py |collect_demos\.py |embed_language\.py )?(--\w+)", page.read_text())
    assert set(alone) <= known, f"{page.name} names {set(alone) - known}, which no script of README has"


@each_page
def test_every_setting_that_a_page_names_exists(page):
    code = code_of(page)
    for key in re.findall(rf"(?<![\w./])((?:{SECTIONS})(?:\.(?!safetensors)[a-z]\w*)+)", code):
        part = load_config()
        for name in key.split("."):
            assert hasattr(part, name), f"{page.name} names the setting {key}, which conf/config.yaml has not"
            part = getattr(part, name)
    for change in re.findall(r"--set (\S+=\S+)", code):
        if not change.startswith("section.key"):
            load_config(overrides=[change])


@each_page
def test_every_file_that_a_page_names_is_in_the_tree(page):
    code = re.sub(r"[<>{}*$]\S*|\S*[<>{}*$]\S*", " ", code_of(page))  # patterns name no file
    for path in re.findall(rf"(?<![\w./-])([\w.][\w./-]*\.(?:{'|'.join(SUFFIXES)}))(?![\w/])", code):
        top = path.split("/")[0]
        if path in MADE_BY_RUNS or (top != path and not (ROOT / top).exists()):
            continue
        there = (ROOT / path).exists() or (page.parent / path).exists()
        assert there, f"{page.name} names {path}, which is not there"
    for folder in re.findall(rf"(?<![\w./-])((?:{FOLDERS})/)", code):
        assert (ROOT / folder).is_dir(), f"{page.name} names {folder}, which is not there"


@each_page
def test_every_make_target_that_a_page_names_exists(page):
    targets = set(re.findall(r"^([a-z][\w -]*):", (ROOT / "Makefile").read_text(), re.M))
    targets = {name for line in targets for name in line.split()}
    named = set(re.findall(r"^make ([a-z][\w-]*)", code_of(page), re.M))
    assert named <= targets, f"{page.name} names make {named - targets}"


@each_page
def test_every_relative_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target.partition("#")[0]).exists(), f"{page.name} links to {target}"


def test_the_map_of_the_tree_names_every_module_and_folder():
    tree = (ROOT / "README.md").read_text().partition("## The tree")[2]
    words = set(re.findall(r"[\w.]+/?", tree.partition("```\n")[2].partition("```")[0]))
    modules = {path.name for path in ROOT.glob("*.py")}
    folders = {f"{path.parent.name}/" for path in ROOT.glob("*/*.py")}
    assert modules | folders <= words, f"README's tree lacks {(modules | folders) - words}"


def test_readme_is_read_within_five_minutes():
    words = re.sub(r"```.*?```", "", (ROOT / "README.md").read_text(), flags=re.S).split()
    assert len(words) <= 5 * 230, f"README has {len(words)} words beside its code; the reference belongs to docs/"
