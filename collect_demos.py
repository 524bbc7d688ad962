"""Collects demonstrations of the ten libero_object tasks from a scripted expert, as LIBERO HDF5 files.

    python collect_demos.py --config conf/quickstart.yaml

Objects are placed at random, never as in the suite's fixed init states: those are for evaluation. Only episodes that
end in success are kept. A run that was stopped, however hard, continues where it was: each demo lies on disk as soon as
it is finished. Demo i of a task depends on --seed and the settings alone, not on --num_workers or on interruptions.

A file that has fewer than --demos_per_task demos gets more, with the numbers that follow its highest. A demo that was
deleted from it on purpose does not come back, and its number is not given again.
"""

import argparse
import contextlib
import io
import itertools
import json
import multiprocessing
import multiprocessing.connection
import operator
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path

import h5py
import numpy as np
from tqdm import tqdm

from config import add_config_flags, load_config
from errors import BadInput, exits_on_bad_input, is_out_of_memory, out_of_memory_named
from files import Lock, expanded, replaced_whole
from hdf5_files import open_hdf5
from libero_sim import SIM_KEYS, LiberoEnv, SimulatorError, import_libero, make_env, make_suite, parse_task_ids
from machine import affordable_processes
from provenance import code_version
from scripted_expert import ScriptedExpert
from simulator_check import simulator_difference

TASK_SUITE = "libero_object"
LONGEST_DEMO = 245  # steps; LIBERO's own longest of this suite has 254
SUCCESS_STEPS = 10  # a demo ends after so many solved steps in a row, as LIBERO's do
UNFINISHED = ".unfinished"  # folder of the demos whose task is not complete yet
START_NOISE = 0.02  # rad
GB_PER_WORKER = 1.5
CONTINUES = "finished demos are kept, and the same command continues"


@dataclass(frozen=True)
class Settings:
    """All that decides what a demo looks like. Every file carries it; files of other settings are never added to."""

    image_size: int
    visual_mesh_ratio: float
    obs_alignment: str
    start_noise: float
    seed: int
    shift_target: float = 0.0
    missed_grasps: float = 0.0


@dataclass
class Episode:
    """A solved episode, as far as it is recorded. Frame t is what the robot saw before actions[t]; there is one frame
    more than actions."""

    actions: np.ndarray  # (T, 7)
    states: np.ndarray  # (T, S) before each action
    proprioception: list  # T + 1 dicts of the simulator's observations without pictures
    poses: list  # T + 1 arguments for LiberoEnv.draw


# ---- one attempt, in a worker process ----------------------------------------------------------------------------


def play_episode(env: LiberoEnv, task_id: int, attempt: int, settings: Settings) -> Episode | None:
    """Lets the expert try once, without drawing. None when it failed."""
    rng = np.random.default_rng([settings.seed, task_id, attempt])
    env.reset(seed=int(rng.integers(2**31)))
    env.add_start_noise(rng, settings.start_noise)
    if settings.shift_target:
        env.shift_target(rng, settings.shift_target)
    expert = ScriptedExpert(env, rng)
    for action in expert.settle():
        env.step(action)
    if begins_after_a_miss(attempt, settings.missed_grasps):
        for action in expert.missed_grasp():
            env.step(action)
    actions, states, proprioception, poses = [], [], [env.proprioception()], [env.poses()]
    solved_steps = 0
    for action in itertools.islice(expert.actions(), LONGEST_DEMO):
        states.append(env.state())
        solved = env.step(action)
        actions.append(action)
        proprioception.append(env.proprioception())
        poses.append(env.poses())
        solved_steps = solved_steps + 1 if solved else 0
        if solved_steps == SUCCESS_STEPS:
            return Episode(np.array(actions), np.array(states), proprioception, poses)
    return None


def begins_after_a_miss(attempt: int, share: float) -> bool:
    """Which attempts are recorded from a missed grasp on: `share` of them, spread evenly."""
    return int((attempt + 1) * share) > int(attempt * share)


def write_demo(demo: h5py.Group, env: LiberoEnv, episode: Episode, obs_alignment: str) -> None:
    """Draws an episode and writes it in LIBERO's layout."""
    from robosuite.utils.transform_utils import quat2axisangle

    steps = range(len(episode.actions))
    frames = [t + 1 if obs_alignment == "after" else t for t in steps]
    env_obs = [episode.proprioception[t] for t in frames]
    ee_pos = np.stack([o["robot0_eef_pos"] for o in env_obs])
    ee_ori = np.stack([quat2axisangle(o["robot0_eef_quat"].copy()) for o in env_obs])
    joints, fingers = (np.stack([o[SIM_KEYS[name]] for o in env_obs]) for name in ("joint_states", "gripper_states"))
    robot_states = np.hstack([fingers, ee_pos, np.stack([o["robot0_eef_quat"] for o in env_obs])])
    only_the_last = np.zeros(len(steps), dtype=np.uint8)
    only_the_last[-1] = 1

    demo["actions"], demo["states"] = episode.actions, episode.states
    demo["robot_states"], demo["rewards"], demo["dones"] = robot_states, only_the_last, only_the_last
    demo["obs/joint_states"], demo["obs/gripper_states"] = joints, fingers
    demo["obs/ee_pos"], demo["obs/ee_ori"], demo["obs/ee_states"] = ee_pos, ee_ori, np.hstack([ee_pos, ee_ori])
    picture = (env.image_size, env.image_size, 3)
    cameras = {
        name: demo["obs"].create_dataset(
            name, (len(frames), *picture), np.uint8, chunks=(1, *picture), compression="gzip", compression_opts=1
        )
        for name in ("agentview_rgb", "eye_in_hand_rgb")
    }
    for i, t in enumerate(frames):
        pictures = env.draw(episode.poses[t])
        for name, dataset in cameras.items():
            dataset[i] = pictures[SIM_KEYS[name]]
    demo.attrs["num_samples"] = len(steps)
    demo.attrs["model_file"] = env.model_xml
    demo.attrs["init_state"] = episode.states[0]


class Worker:
    """What a worker process keeps between attempts: the environment of the task that it worked on last."""

    task_id: int | None = None
    env: LiberoEnv | None = None

    @classmethod
    def attempt(cls, task_id: int, attempt: int, settings: Settings, demo_file: Path) -> tuple[int, str]:
        """Plays one attempt and writes it to `demo_file` if it succeeds. Returns the demo's length, 0 for a failure,
        and why the simulation broke down where it did: that is a failure, too, and the next time again."""
        if cls.task_id != task_id:
            cls.close()
            cls.env = make_env(make_suite(TASK_SUITE), task_id, settings.image_size, settings.visual_mesh_ratio)
            cls.task_id = task_id
        try:
            episode = play_episode(cls.env, task_id, attempt, settings)
        except SimulatorError as problem:
            cls.close()  # not to be trusted any more
            if is_out_of_memory(problem):  # the machine's failure, not the attempt's
                raise MemoryError(str(problem)) from None
            return 0, str(problem)
        if episode is None:
            return 0, ""
        demo_file.parent.mkdir(parents=True, exist_ok=True)
        try:
            with written_hdf5(demo_file, demo_file.parent) as file:
                demo = file.create_group("demo")
                write_demo(demo, cls.env, episode, settings.obs_alignment)
                demo.attrs["attempt"], demo.attrs["code"] = attempt, code_version()
                file.attrs["collector"] = collector_text(settings)
        except SimulatorError as problem:  # only the renderer works here
            raise BadInput(f"task {task_id}: drawing a demo failed ({problem}); {CONTINUES}") from None
        return len(episode.actions), ""

    @classmethod
    def close(cls) -> None:
        if cls.env is not None:
            cls.env.close()
        cls.env = cls.task_id = None


def prepare_worker() -> None:
    """However the main process dies, its workers end, too."""

    def end_with_parent():
        multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


# ---- files -------------------------------------------------------------------------------------------------------


class HDF5Target(io.FileIO):
    """The file that HDF5 writes to. HDF5 cannot close a file that the disk has no room for, prints tracebacks and ends
    the process with a segmentation fault: so it never hears of a failed write, which is kept as `problem` instead."""

    problem: OSError | None = None

    def write(self, content) -> int:
        rest = memoryview(content).cast("B")
        size = len(rest)
        try:
            while self.problem is None and len(rest):
                rest = rest[super().write(rest) :]
        except OSError as problem:
            self.problem = problem
        return size

    def truncate(self, size: int | None = None) -> int:
        try:
            if self.problem is None:
                super().truncate(size)
        except OSError as problem:
            self.problem = problem
        return size


@contextlib.contextmanager
def written_hdf5(path: Path, scratch: Path) -> Iterator[h5py.File]:
    """An HDF5 file in folder `scratch`, open for writing, that takes the place of `path` in one step when complete."""
    try:
        with replaced_whole(path, scratch) as part, HDF5Target(part, "w+") as target:
            try:
                with h5py.File(target, "w") as file:
                    yield file
            finally:
                if target.problem:  # whatever else came of it
                    raise target.problem
    except OSError as problem:
        raise BadInput(f"{path}: cannot be written ({problem.strerror or problem}); {CONTINUES}") from None


@contextlib.contextmanager
def claimed(names: Sequence[str], folder: Path) -> Iterator[None]:
    """Within the block no other collector works on these tasks in this folder. Raises BadInput where one does."""
    unfinished = folder / UNFINISHED
    with contextlib.ExitStack() as claims:
        claims.callback(remove_if_empty, unfinished)
        for name in names:
            claims.enter_context(task_lock(unfinished, name))
        yield


def task_lock(unfinished: Path, name: str) -> Lock:
    busy = f"another collect_demos.py is collecting {name} in {unfinished.parent}"
    while True:
        unfinished.mkdir(exist_ok=True)
        try:
            return Lock(unfinished / f"{name}.lock", busy)
        except FileNotFoundError:  # a collector of other tasks has just ended and removed the folder
            continue


def remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):  # another run may still have unfinished demos in it
        folder.rmdir()


def collector_text(settings: Settings) -> str:
    return json.dumps({"program": "collect_demos.py", **asdict(settings)})


def check_settings(path: Path, group, settings: Settings) -> None:
    """Raises BadInput when the group of a file does not say that it was collected with these very settings."""
    try:
        found = json.loads(group.attrs["collector"])
        if not isinstance(found, dict):
            raise ValueError
    except (AttributeError, KeyError, TypeError, ValueError):
        raise BadInput(f"{path}: not a file of collect_demos.py; choose another --data_directory") from None
    for name, value in asdict(settings).items():
        before = found.get(name, getattr(Settings, name, None))  # those with a default came later
        if before != value:
            raise BadInput(
                f"{path}: was collected with {name} {before}, not {value};"
                f" choose another --data_directory or delete the file"
            )


def attempt_and_length(path: Path, demo: h5py.Group) -> tuple[int, int]:
    try:
        return operator.index(demo.attrs["attempt"]), operator.index(demo.attrs["num_samples"])
    except (KeyError, TypeError):
        raise BadInput(
            f"{path}: {demo.name} is no demo of collect_demos.py: expected whole numbers as its attributes attempt and"
            f" num_samples, found only {sorted(demo.attrs)}"
        ) from None


class TaskDemos:
    """The demos of one task on disk, and which attempt comes next."""

    def __init__(self, suite, task_id: int, folder: Path, wanted: int, settings: Settings):
        self.task_id, self.wanted, self.settings = task_id, wanted, settings
        self.name = suite.get_task(task_id).name
        self.path = folder / f"{self.name}_demo.hdf5"
        self.unfinished = folder / UNFINISHED / self.name
        self.lengths: dict[int, int | None] = {}  # by attempt; 0 for a failure, None while it is going on
        self.broken: list[str] = []  # why the simulation broke down in attempts of this run
        self.seconds = 0.0
        self.kept: list[int] = []  # attempts whose demos the file has or had before somebody deleted them
        self.in_file = 0
        self.next_number = 0  # of a demo in the file
        self._read_what_is_there()

    @property
    def deleted(self) -> int:
        """Demos that somebody deleted from the file."""
        return self.next_number - self.in_file

    def next_attempt(self) -> int | None:
        """The first attempt not begun, unless the ones before it may already give the wanted number of demos.

        The demos are thus the first successes in the order of attempts, whoever works on them and how fast.
        """
        promising = 0
        for attempt in itertools.count():
            if promising >= self.wanted:
                return None
            if attempt not in self.lengths:
                return attempt
            promising += self.lengths[attempt] != 0

    def demo_file(self, attempt: int) -> Path:
        return self.unfinished / f"attempt_{attempt:05d}.hdf5"

    def successes(self) -> list[int]:
        return [attempt for attempt, length in sorted(self.lengths.items()) if length]

    def is_complete(self) -> bool:
        return self.next_attempt() is None and None not in self.lengths.values()

    def assemble(self, attributes: dict) -> None:
        """Puts the demos of the finished attempts into the task's file, after those that it has already."""
        demos = self.successes()[: max(self.wanted, self.in_file)]
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
                data.attrs.update(attributes)
                data.attrs["num_demos"] = len(demos)
                data.attrs["total"] = sum(self.lengths[attempt] for attempt in demos)
                data.attrs["collector"] = collector_text(self.settings)
                data.attrs["visual_mesh_ratio"] = self.settings.visual_mesh_ratio
                data.attrs["attempts"] = json.dumps([*self.kept, *new])
                code = [data[name].attrs.get("code", "unknown") for name in demo_names(data)]
                data.attrs["code"] = list(dict.fromkeys(code))  # commits that made the demos, the earliest first
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


def demo_names(data: h5py.Group) -> list[str]:
    """demo_0, demo_1, ... in the order of their numbers; anything else in the group is the user's own."""
    return sorted(filter(re.compile(r"demo_\d+").fullmatch, data), key=lambda name: int(name.removeprefix("demo_")))


def libero_attributes(suite, task_id: int, image_size: int) -> dict:
    """The attributes of `data` in LIBERO's own files, as its create_dataset.py writes them.

    Paths are those inside the LIBERO repository, whatever the place where LIBERO is installed here.
    """
    import robosuite
    from libero.libero.envs import TASK_MAPPING
    from libero.libero.envs.bddl_utils import get_problem_info

    task = suite.get_task(task_id)
    bddl_file = Path(import_libero().get_libero_path("bddl_files")) / task.problem_folder / task.bddl_file
    bddl_name = f"libero/libero/bddl_files/{task.problem_folder}/{task.bddl_file}"
    problem_info = get_problem_info(str(bddl_file))
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
        "macros_image_convention": "opengl",
        "bddl_file_name": bddl_name,
        "bddl_file_content": bddl_file.read_text(),
        "env_args": json.dumps(env_args),
    }


# ---- the main process --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def ctrl_c_waits() -> Iterator[None]:
    """Until the block is over. A process that is started in it inherits the blocked signal, so Ctrl-C, which a terminal
    sends to all, is the main process's alone, which ends its workers; half-started ones would print tracebacks."""
    came, handler = [], signal.getsignal(signal.SIGINT)
    if handler is signal.default_int_handler:  # another thread, such as tqdm's, may take a signal that is blocked here
        signal.signal(signal.SIGINT, lambda *_: came.append(True))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        signal.signal(signal.SIGINT, handler)
    if came:
        raise KeyboardInterrupt


def collect(tasks: list[TaskDemos], num_workers: int, finish) -> None:
    """Runs attempts on all workers until every task has its demos; calls finish(task) when one has them."""
    missing = sum(max(task.wanted - len(task.successes()), 0) for task in tasks)
    running = {}  # future -> (task, attempt, time when it was handed out)
    processes: set[multiprocessing.Process] = set()
    open_tasks = list(tasks)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "LP_NUM_THREADS"):  # LP: Mesa's software renderer
        os.environ[name] = "1"  # inherited by the workers, one of which keeps one core busy by itself
    pool = ProcessPoolExecutor(num_workers, multiprocessing.get_context("spawn"), prepare_worker)
    progress = tqdm(total=missing, unit="demo", desc="collecting", smoothing=0, disable=not missing)
    try:
        while True:
            for task in [task for task in open_tasks if task.is_complete()]:
                finish(task)
                open_tasks.remove(task)
            if not open_tasks:
                break
            for task in open_tasks:  # the first tasks first: changing the task costs a worker some seconds
                while len(running) < num_workers and (attempt := task.next_attempt()) is not None:
                    check_expert(task)
                    task.lengths[attempt] = None
                    order = task.task_id, attempt, task.settings, task.demo_file(attempt)
                    with ctrl_c_waits():
                        running[pool.submit(Worker.attempt, *order)] = task, attempt, time.monotonic()
                        processes.update(multiprocessing.active_children())
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                task, attempt, begun = running.pop(future)
                task.lengths[attempt], why_broken = future.result()
                if why_broken:
                    task.broken.append(why_broken)
                task.seconds += time.monotonic() - begun
                progress.update(task.lengths[attempt] > 0)
    except BrokenProcessPool:
        pool.shutdown()  # waits for the other workers, which it ends with SIGTERM
        raise BadInput(f"{how_it_ended([process.exitcode for process in processes])}; {CONTINUES}") from None
    finally:
        progress.close()
        if running:  # stopped: nobody waits for what the workers are still at
            for process in multiprocessing.active_children():
                process.terminate()
        pool.shutdown(cancel_futures=True)


def how_it_ended(exit_codes: Sequence[int | None]) -> str:
    """What the exit codes of all workers say about the one that was the first to end."""
    codes = [code for code in exit_codes if code not in (0, None, -signal.SIGTERM)] or [-signal.SIGTERM]
    if codes[0] >= 0:
        return f"a worker ended with exit code {codes[0]}, it may have said above why"
    if codes[0] == -signal.SIGKILL:
        return (
            f"a worker was killed (SIGKILL), most likely for want of memory ({GB_PER_WORKER} GB each);"
            " use fewer --num_workers"
        )
    return f"a worker was ended by {signal.Signals(-codes[0]).name}"


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


def broken_attempts(tasks: list[TaskDemos]) -> list[str]:
    """One sentence about those that ended in the middle, if there were any in this run."""
    broken = [why for task in tasks for why in task.broken]
    return [f"in {len(broken)} attempts the simulation broke down, the last time with {broken[-1]}"] if broken else []


def report(tasks: list[TaskDemos]) -> None:
    """All attempts of these files, also those of earlier runs; a demo that was deleted later was a success."""
    print("\ntask  successes/attempts  percent  mean length  worker seconds")
    successes = attempts = 0
    for task in tasks:
        lengths = [task.lengths[attempt] for attempt in task.successes()]
        solved, tried = len(lengths) + task.deleted, len(task.lengths)
        rate, percent = f"{solved}/{tried}", 100 * solved / tried
        mean = sum(lengths) / len(lengths)
        print(f"{task.task_id:4}  {rate:>18}  {percent:6.1f}%  {mean:11.0f}  {task.seconds:14.0f}  {task.name}")
        successes, attempts = successes + solved, attempts + tried
    print(f"expert success over all tasks: {successes}/{attempts} = {100 * successes / attempts:.1f}%")
    for sentence in broken_attempts(tasks):
        print(sentence)


def parse_arguments(arguments=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    # fmt: off
    add = parser.add_argument
    of_config = argparse.SUPPRESS  # absent unless given; the config's value then holds
    add_config_flags(parser)  # only the section data matters here
    add("--data_directory", default=of_config, help="folder of the files (default: data.data_directory of the config)")
    add("--demos_per_task", type=int, default=of_config, help="(default: data.demos_per_task of the config)")
    add("--tasks", default="0-9", help="task numbers, such as 0-9 or 0,3,6 (default: %(default)s)")
    add("--image_size", type=int, default=128, help="height and width of the pictures in pixels (default: %(default)s)")
    add("--num_workers", type=int, default=affordable_processes(GB_PER_WORKER),
        help=f"processes of {GB_PER_WORKER} GB each; by default one for every core that this job may use, as far as "
        "its memory goes")
    add("--seed", type=int, default=0, help="decides every demo (default: %(default)s)")
    add("--visual_mesh_ratio", type=float, default=1.0,
        help="below 1 draws with that share of the visual meshes' triangles: faster, but not LIBERO's own pictures "
        "(default: %(default)s)")
    add("--obs_alignment", choices=("after", "before"), default="after",
        help="whether obs[t] is recorded after actions[t], as in LIBERO's own files, or before (default: %(default)s)")
    add("--start_noise", type=float, default=START_NOISE,
        help="standard deviation of the arm's start joints in rad (default: %(default)s)")
    add("--shift_target", type=float, default=0.0, metavar="METRES",
        help="move the target object by up to this in x and y, so that it stands elsewhere in every demo "
        "(default: %(default)s)")
    add("--missed_grasps", type=float, default=0.0, metavar="SHARE",
        help="share of the demos that begin after a grasp that missed, where the expert notices and tries again; the "
        "miss itself is not recorded (default: %(default)s)")
    # fmt: on
    return parser.parse_args(arguments)


def check_arguments(args: argparse.Namespace, folder: Path, wanted: int) -> None:
    if wanted < 1:
        raise BadInput(f"--demos_per_task {wanted}: expected at least 1")
    if args.num_workers < 1:
        raise BadInput(f"--num_workers {args.num_workers}: expected at least 1")
    if not 16 <= args.image_size <= 1024:
        raise BadInput(f"--image_size {args.image_size}: expected 16 to 1024 pixels")
    if not 0 < args.visual_mesh_ratio <= 1:
        raise BadInput(f"--visual_mesh_ratio {args.visual_mesh_ratio}: expected above 0 and at most 1")
    if not 0 <= args.start_noise < 1:
        raise BadInput(f"--start_noise {args.start_noise}: expected 0 to 1 rad")
    if not 0 <= args.shift_target <= 0.2:
        raise BadInput(f"--shift_target {args.shift_target}: expected 0 to 0.2 metres")
    if not 0 <= args.missed_grasps <= 1:
        raise BadInput(f"--missed_grasps {args.missed_grasps}: expected a share of the demos, 0 to 1")
    if args.seed < 0:
        raise BadInput(f"--seed {args.seed}: expected 0 or more")
    if str(folder).startswith("/path/to"):
        raise BadInput(f"data.data_directory is still {folder}; set it in conf/config.yaml or give --data_directory")
    if folder.exists() and not folder.is_dir():
        raise BadInput(f"{folder}: the data directory is a file")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise BadInput(f"{folder}: the data directory cannot be made ({problem.strerror})") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise BadInput(f"{folder}: the data directory is not writable")


@exits_on_bad_input
def main() -> None:
    args = parse_arguments()
    data = load_config(args.config, args.set).data
    folder = Path(expanded(getattr(args, "data_directory", data.data_directory)))
    wanted = getattr(args, "demos_per_task", data.demos_per_task)
    check_arguments(args, folder, wanted)
    settings = Settings(
        args.image_size, args.visual_mesh_ratio, args.obs_alignment, args.start_noise, args.seed, args.shift_target,
        args.missed_grasps,
    )  # fmt: skip

    suite = make_suite(TASK_SUITE)
    task_ids = parse_task_ids(args.tasks, suite, TASK_SUITE)
    with claimed([suite.get_task(task_id).name for task_id in task_ids], folder):
        tasks = [TaskDemos(suite, task_id, folder, wanted, settings) for task_id in task_ids]
        if args.visual_mesh_ratio < 1:
            print(f"Not LIBERO's own pictures: drawn with {args.visual_mesh_ratio:g} of the visual meshes' triangles.")
        if simulator := simulator_difference():
            print(f"warning: {simulator}")

        def finish(task: TaskDemos) -> None:
            attributes = libero_attributes(suite, task.task_id, settings.image_size)
            task.assemble(attributes | {"simulator": simulator or "as LIBERO's own"})

        no_memory = (
            f"out of memory with --num_workers {args.num_workers} ({GB_PER_WORKER} GB each); use fewer; {CONTINUES}"
        )
        try:
            with out_of_memory_named(no_memory):
                collect(tasks, args.num_workers, finish)
        except KeyboardInterrupt:
            print(f"\nStopped. Finished demos are kept in {folder}; the same command continues.")
            raise SystemExit(130) from None
    report(tasks)


if __name__ == "__main__":
    main()
