"""What `make` does with a Python that cannot be used: it says so before it installs anything."""

import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

SYSTEM_PACKAGES = ROOT / ".ci/system-packages"


def stand_in(path: Path, version: str) -> Path:
    """An interpreter that only knows its version."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\necho {version}\n")
    path.chmod(0o755)
    return path


def refused(python: Path, environment: Path) -> str:
    done = subprocess.run([SYSTEM_PACKAGES, python, environment], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    return done.stderr


@pytest.mark.parametrize(
    "version, sentence",
    [
        ("3.9", "Python 3.9 is too old, expected Python 3.10 to 3.13"),
        ("2.7", "Python 2.7 is too old, expected Python 3.10 to 3.13"),
        ("3.14", "for Python 3.14 there is no MuJoCo that draws LIBERO as LIBERO does"),
    ],
)
def test_pythons_without_the_right_simulator_are_refused(version, sentence, tmp_path):
    assert sentence in refused(stand_in(tmp_path / "python", version), tmp_path / "none/bin/python")


def test_an_environment_of_another_python_is_not_mixed(tmp_path):
    environment = stand_in(tmp_path / "venv/bin/python", "3.10" if sys.version_info[:2] != (3, 10) else "3.12")
    assert f"{tmp_path}/venv is an environment of Python 3.1" in refused(Path(sys.executable), environment)


def test_a_python_that_does_not_run_is_named(tmp_path):
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\nexit 127\n")
    broken.chmod(0o755)
    assert f"{broken} does not run; choose another with make PYTHON=" in refused(broken, tmp_path / "none/bin/python")
