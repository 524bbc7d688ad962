"""Fixtures that several test files share."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import h5py
import pytest
import torch
from filelock import FileLock

# Before their first import: a failed assert there shows its values.
pytest.register_assert_rewrite("helpers", "small_trainings", "browser")
from browser import Tab, installed_browser, tab_of  # noqa: E402
from helpers import ROOT  # noqa: E402

SIMULATOR_FILES = {
    "test_collect_demos.py", "test_libero_eval.py", "test_rollouts_pool.py", "test_scenes.py",
    "test_shuffled_layouts.py", "test_simulator.py", "test_simulator_check.py",
}  # fmt: skip
LONGEST_FIRST = (  # files that take half a minute or more: one that begins last would keep one process alone at work
    "test_collect_demos.py", "test_shuffled_layouts.py",  # the second of which does not wait for the first one's demos
    "test_libero_eval.py", "test_simulator.py", "test_rollouts_pool.py", "test_training.py", "test_mamba.py",
    "test_interruption.py", "test_benchmarks.py", "test_turning.py", "test_precision.py",
)  # fmt: skip
SLOW_FILES = {"test_benchmarks.py", "test_supported_pythons.py"}
SLOW_FIXTURES = {"runs", "joint", "long_training", "empty_cache", "built", "repository", "clone", "tab"}

# A shell that runs the tests in the background lets them ignore Ctrl-C, and with them all that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)
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
    """A folder with one real file: two demos of task 6 (butter) in 64 x 64 pixels, drawn with thinned meshes.

    The run that collected them was killed (SIGKILL) after its first demo, which then got the attribute `kept`, and
    started again."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "collected_demos"  # shared by processes
    command = [
        sys.executable, ROOT / "collect_demos.py", "--config", ROOT / "conf/config.yaml", "--data_directory", folder,
        "--tasks", "6", "--demos_per_task", "2", "--num_workers", "1", "--image_size", "64",
        "--visual_mesh_ratio", "0.2",
    ]  # fmt: skip
    with FileLock(f"{folder}.lock"):
        if not list(folder.glob("*.hdf5")):
            killed = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
            while not (first := list(folder.glob("*/*/attempt_00000.hdf5"))):
                assert killed.poll() is None, "the run ended before it wrote a demo"
                time.sleep(0.05)
            killed.kill()
            killed.wait()
            with h5py.File(first[0], "r+") as file:
                file["demo"].attrs["kept"] = True
            continued = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            assert continued.returncode == 0, continued.stderr
            assert "6                 2/2   100.0%" in continued.stdout
    return folder


@pytest.fixture(scope="session")
def tab(tmp_path_factory) -> Iterator[Tab]:
    """A tab of a real browser, which all tests of a process share."""
    program = installed_browser()
    if program is None:
        pytest.skip("no Chromium or Chrome is here that could open the page; Debian's package is chromium")
    with tab_of(program, tmp_path_factory.mktemp("browser") / "profile") as tab:
        yield tab
