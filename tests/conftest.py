"""Fixtures that several test files share."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from filelock import FileLock

# Before their first import: a failed assert there shows its values.
pytest.register_assert_rewrite("helpers", "small_trainings", "browser")
from browser import Tab, installed_browser, tab_of  # noqa: E402
from helpers import ROOT  # noqa: E402

SIMULATOR_FILES = {
    "test_collect_demos.py", "test_libero_eval.py", "test_rollouts_pool.py", "test_shuffled_layouts.py",
    "test_simulator.py", "test_simulator_check.py",
}  # fmt: skip
LONGEST_FIRST = (  # files that take a minute or more: one that begins last would keep one process alone at work
    "test_training.py", "test_collect_demos.py", "test_libero_eval.py", "test_simulator.py", "test_shuffled_layouts.py",
    "test_rollouts_pool.py", "test_benchmarks.py", "test_mamba.py", "test_turning.py", "test_precision.py",
)  # fmt: skip
SLOW_FILES = {"test_benchmarks.py", "test_supported_pythons.py"}
SLOW_FIXTURES = {"runs", "joint", "long_training", "empty_cache", "built", "repository", "clone", "tab"}

torch.set_num_threads(1)  # models this small are faster so, and the tests run in two processes


@pytest.hookimpl(tryfirst=True)  # before pytest looks which tests -m leaves out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks whole files and the users of a fixture; single tests say `@pytest.mark.simulator` or `slow` themselves."""
    for item in items:
        fixtures = set(getattr(item, "fixturenames", ()))
        if item.path.name in SIMULATOR_FILES or "collected_demos" in fixtures:
            item.add_marker("simulator")
        if item.path.name in SLOW_FILES or fixtures & SLOW_FIXTURES:
            item.add_marker("slow")
    rank = {name: place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))  # keeps the order within a file


@pytest.fixture(scope="session")
def collected_demos(tmp_path_factory) -> Path:
    """A folder with one real file: two demos of task 6 (butter) in 64 x 64 pixels, drawn with thinned meshes."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "collected_demos"  # shared by processes
    command = [
        sys.executable, ROOT / "collect_demos.py", "--config", ROOT / "conf/config.yaml", "--data_directory", folder,
        "--tasks", "6", "--demos_per_task", "2", "--num_workers", "2", "--image_size", "64",
        "--visual_mesh_ratio", "0.2",
    ]  # fmt: skip
    with FileLock(f"{folder}.lock"):
        subprocess.run(command, check=True, cwd=ROOT)  # the second time there is nothing left to collect
    return folder


@pytest.fixture(scope="session")
def tab(tmp_path_factory) -> Iterator[Tab]:
    """A tab of a real browser, which all tests of a process share."""
    program = installed_browser()
    if program is None:
        pytest.skip("no Chromium or Chrome is here that could open the page; Debian's package is chromium")
    with tab_of(program, tmp_path_factory.mktemp("browser") / "profile") as tab:
        yield tab
