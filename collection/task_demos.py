"""The demonstrations of one task: which are on disk, which attempt comes next, and the file that they end up in."""

import json
import operator
import re
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import h5py

from collection.demonstrator import Demonstrator, Outcome
from collection.files import (
    UNFINISHED,
    DemoSettings,
    check_settings,
    settings_text,
    told_once,
    with_simulators_of,
    written_hdf5,
)
from collection.pool import Order
from demos.hdf5_errors import open_hdf5
from errors import BadInput
from observation import ORIENTATION
from simulator.layouts import ShuffledTask, problem_text
from simulator.libero import import_libero
from simulator.suites import instruction_in

START_NOISE = 0.02  # rad, of the start joints where nothing else is asked for


class TaskDemos:
    """The demos of one task on disk, and which attempt comes next. With `asked` the task is a scene, that of `task_id`,
    in shuffled layouts, and an object that is asked for in it."""

    unit = "demo"

    def __init__(
        self,
        suite,
        task_id: int,
        folder: Path,
        wanted: int,
        settings: DemoSettings,
        asked: ShuffledTask | None = None,
    ):
        self.suite, self.task_id, self.wanted, self.settings, self.asked = suite, task_id, wanted, settings, asked
        self.name = asked.name if asked else suite.get_task(task_id).name
        self.path = folder / f"{self.name}_demo.hdf5"
        self.unfinished = folder / UNFINISHED / self.name
        self.lengths: dict[int, int | None] = {}  # by attempt; 0 for a failure, None while it is going on
        self.broken: list[str] = []  # why the simulation broke down in attempts of this run
        self.discarded: list[str] = []  # why layouts were drawn anew in attempts of this run
        self.seconds = 0.0
        self.kept: list[int] = []  # attempts whose demos the file has or had before somebody deleted them
        self.in_file = 0
        self.next_number = 0  # of a demo in the file
        self._read_what_is_there()

    @property
    def deleted(self) -> int:
        """Demos that somebody deleted from the file."""
        return self.next_number - self.in_file

    def missing(self) -> int:
        return max(self.wanted - len(self.successes()), 0)

    def next_order(self) -> Order | None:
        """Raises BadInput where the expert fails so often that collecting would never end."""
        attempt = self.next_attempt()
        if attempt is None:
            return None
        check_expert(self)
        self.lengths[attempt] = None
        arguments = self.task_id, attempt, self.settings, self.demo_file(attempt), self.asked
        return Order(Demonstrator.attempt, arguments, partial(self._finished, attempt))

    def _finished(self, attempt: int, outcome: Outcome, seconds: float) -> int:
        self.lengths[attempt] = outcome.length
        if outcome.why_broken:
            self.broken.append(outcome.why_broken)
        self.discarded += outcome.discarded
        self.seconds += seconds
        return int(outcome.length > 0)

    def next_attempt(self) -> int | None:
        """The first attempt not begun, unless the ones before it may already give the wanted number of demos.

        The demos are thus the first successes in the order of attempts, whoever works on them and how fast.
        """
        attempt = promising = 0
        while promising < self.wanted:
            if attempt not in self.lengths:
                return attempt
            promising += self.lengths[attempt] != 0
            attempt += 1
        return None

    def demo_file(self, attempt: int) -> Path:
        return self.unfinished / f"attempt_{attempt:05d}.hdf5"

    def successes(self) -> dict[int, int]:
        """The lengths of the demos by attempt, in the order of attempts."""
        return {attempt: length for attempt, length in sorted(self.lengths.items()) if length}

    def is_complete(self) -> bool:
        return self.next_attempt() is None and None not in self.lengths.values()

    def attributes(self) -> dict:
        """What LIBERO's own files say about the task."""
        return libero_attributes(self.suite, self.task_id, self.settings.image_size, self.asked)

    def assemble(self, attributes: dict) -> None:
        """Puts the demos of the finished attempts into the task's file, after those that it has already."""
        lengths = self.successes()
        demos = list(lengths)[: max(self.wanted, self.in_file)]
        new = demos[self.in_file :]
        if new:
            self.unfinished.mkdir(parents=True, exist_ok=True)
            with written_hdf5(self.path, self.unfinished) as file:
                if self.path.exists():
                    with open_hdf5(self.path) as before:
                        file.attrs.update(before.attrs)
                        for name in before:
                            before.copy(name, file)
                data = file.require_group("data")
                for number, attempt in enumerate(new, start=self.next_number):
                    with open_hdf5(self.demo_file(attempt)) as finished:
                        finished.copy("demo", data, name=f"demo_{number}")
                data.attrs.update(with_simulators_of(data.attrs, attributes))
                data.attrs["num_demos"] = len(demos)
                data.attrs["total"] = sum(lengths[attempt] for attempt in demos)
                data.attrs["collector"] = settings_text(self.settings)
                data.attrs["visual_mesh_ratio"] = self.settings.visual_mesh_ratio
                data.attrs["attempts"] = json.dumps([*self.kept, *new])
                code = [data[name].attrs.get("code", "unknown") for name in demo_names(data)]
                data.attrs["code"] = told_once(*code)  # commits that made the demos
        shutil.rmtree(self.unfinished, ignore_errors=True)  # what stays, as on NFS while it is open, is ignored later

    def _read_what_is_there(self) -> None:
        """Finds the demos of earlier runs: those in the task's file, then those of a run stopped before the file."""
        if self.path.exists():
            with open_hdf5(self.path) as file:
                self._read_file(file)
        for path in sorted(self.unfinished.glob("attempt_*.hdf5")):
            with open_hdf5(path) as file:
                check_settings(path, file, self.settings)
                if "demo" not in file:
                    raise BadInput(f"{path}: holds no demo; delete it")
                attempt, length = attempt_and_length(path, file["demo"])
            self.lengths.setdefault(attempt, length)

    def _read_file(self, file: h5py.File) -> None:
        data = file.get("data", {})
        check_settings(self.path, data, self.settings)
        names: dict[int, str] = {}
        for name in demo_names(data):
            attempt, length = attempt_and_length(self.path, data[name])
            if attempt in names:
                raise BadInput(
                    f"{self.path}: {names[attempt]} and {name} are the same demo, of attempt {attempt}; delete one"
                )
            names[attempt], self.lengths[attempt] = name, length
        try:
            listed = [operator.index(attempt) for attempt in json.loads(data.attrs.get("attempts", "[]"))]
        except (TypeError, ValueError):
            raise BadInput(f"{self.path}: its attribute attempts is no list of whole numbers") from None
        self.kept = sorted({*listed, *names})
        self.in_file = len(names)
        highest = max((int(name.removeprefix("demo_")) for name in names.values()), default=-1)
        self.next_number = max(len(self.kept), highest + 1)
        for attempt in range(max(self.kept, default=0)):
            self.lengths.setdefault(attempt, 0)  # it was tried before a later one was kept, or its demo was deleted
        for attempt in self.kept:
            self.lengths.setdefault(attempt, 0)


def check_expert(task: TaskDemos) -> None:
    """Raises BadInput where the expert fails so often that collecting would never end."""
    failures = sum(length == 0 for length in task.lengths.values()) - task.deleted
    if failures <= 10 + 2 * task.wanted:
        return
    settings = task.settings
    harder = [f"--start_noise {settings.start_noise}"] if settings.start_noise > START_NOISE else []
    harder += [f"--shift_target {settings.shift_target}"] if settings.shift_target else []
    advice = (
        f"less than {' and '.join(harder)} makes it easier"
        if harder
        else "it solves nine of ten and more in the simulator that requirements.txt names"
    )
    raise BadInput(
        f"task {task.task_id}: the expert failed {failures} times and succeeded {len(task.successes())} times;"
        f" {''.join(f'{text}; ' for text in broken_attempts([task]))}{advice}"
    )


def broken_attempts(tasks: Sequence[TaskDemos]) -> list[str]:
    """One sentence about those that ended in the middle, if there were any in this run."""
    broken = [why for task in tasks for why in task.broken]
    return [f"in {len(broken)} attempts the simulation broke down, the last time with {broken[-1]}"] if broken else []


def attempt_and_length(path: Path, demo: h5py.Group) -> tuple[int, int]:
    try:
        return operator.index(demo.attrs["attempt"]), operator.index(demo.attrs["num_samples"])
    except (KeyError, TypeError):
        raise BadInput(
            f"{path}: {demo.name} is no demo of collect_demos.py: expected whole numbers as its attributes attempt and"
            f" num_samples, found only {sorted(demo.attrs)}"
        ) from None


def demo_names(data: h5py.Group) -> list[str]:
    """demo_0, demo_1, ... in the order of their numbers; anything else in the group is the user's own."""
    return sorted(filter(re.compile(r"demo_\d+").fullmatch, data), key=lambda name: int(name.removeprefix("demo_")))


def libero_attributes(suite, task_id: int, image_size: int, asked: ShuffledTask | None = None) -> dict:
    """The attributes of `data` in LIBERO's own files, as its create_dataset.py writes them.

    Paths are those inside the LIBERO repository, whatever the place where LIBERO is installed here. It has no file of a
    shuffled task. Such a file is named as if there were a suite of them, so that the name is not that of another task.
    """
    import robosuite
    from libero.libero.envs import TASK_MAPPING
    from libero.libero.envs.bddl_utils import get_problem_info

    task = suite.get_task(task_id)
    bddl_file = Path(import_libero().get_libero_path("bddl_files")) / task.problem_folder / task.bddl_file
    bddl_name, text = f"{task.problem_folder}/{task.bddl_file}", bddl_file.read_text()
    problem_info = get_problem_info(str(bddl_file))
    if asked is not None:
        bddl_name, text = f"{task.problem_folder}_shuffled/{asked.name}.bddl", problem_text(text, asked.target)
        problem_info["language_instruction"] = instruction_in(text).lower()
    bddl_name = f"libero/libero/bddl_files/{bddl_name}"
    env_name = TASK_MAPPING[problem_info["problem_name"]].__name__
    env_kwargs = {
        "robots": ["Panda"],
        "controller_configs": robosuite.load_controller_config(default_controller="OSC_POSE"),
        "bddl_file_name": bddl_name,
        "has_renderer": False,
        "has_offscreen_renderer": True,
        "ignore_done": True,
        "use_camera_obs": True,
        "camera_depths": False,
        "camera_names": ["robot0_eye_in_hand", "agentview"],
        "reward_shaping": True,
        "control_freq": 20,
        "camera_heights": image_size,
        "camera_widths": image_size,
        "camera_segmentations": None,
    }
    env_args = {
        "type": 1,  # robomimic's number for robosuite
        "env_name": env_name,
        "problem_name": problem_info["problem_name"],
        "bddl_file": bddl_name,
        "env_kwargs": env_kwargs,
    }
    return {
        "tag": "libero-v1",
        "env_name": env_name,
        "problem_info": json.dumps(problem_info),
        "macros_image_convention": ORIENTATION,
        "bddl_file_name": bddl_name,
        "bddl_file_content": text,
        "env_args": json.dumps(env_args),
    }
