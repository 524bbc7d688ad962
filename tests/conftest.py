"""Fixtures that several test files share."""

import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def collected_demos(tmp_path_factory) -> Path:
    """A folder with one real file: two demos of task 6 (butter) in 64 x 64 pixels, drawn with thinned meshes."""
    folder = tmp_path_factory.mktemp("collected_demos")
    command = [
        sys.executable, REPO / "collect_demos.py", "--config", REPO / "conf/config.yaml", "--data_directory", folder,
        "--tasks", "6", "--demos_per_task", "2", "--num_workers", "2", "--image_size", "64",
        "--visual_mesh_ratio", "0.2",
    ]  # fmt: skip
    subprocess.run(command, check=True, cwd=REPO)
    return folder
