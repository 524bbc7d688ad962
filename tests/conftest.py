"""Fixtures that several test files share."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock

pytest.register_assert_rewrite("helpers")  # before its first import: a failed assert there shows its values
from helpers import ROOT  # noqa: E402

torch.set_num_threads(1)  # models this small are faster so, and the tests run in two processes


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
