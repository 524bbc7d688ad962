"""Collects demonstrations of the ten libero_object tasks from a scripted expert, as LIBERO HDF5 files.

    python collect_demos.py --config conf/quickstart.yaml

Objects are placed at random, never as in the suite's fixed init states: those are for evaluation. Only episodes that
end in success are kept. A run that was stopped, however hard, continues where it was: each demo lies on disk as soon as
it is finished. Demo i of a task depends on --seed and the settings alone, not on --num_workers or on interruptions.

With --layouts shuffled the objects of a scene exchange their places, each is moved a little, and any of them can be
asked for. --tasks then names what is asked for, --demos_per_task counts over all scenes that hold it, and each scene
and object have a file of their own. simulator/layouts.py has the rules, and what is kept for evaluation.

A file that has fewer than --demos_per_task demos gets more, with the numbers that follow its highest. A demo that was
deleted from it on purpose does not come back, and its number is not given again.
"""

import argparse
import contextlib
import multiprocessing
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.process import BaseProcess
from pathlib import Path

from tqdm import tqdm

from collection.demonstrator import TASK_SUITE, Demonstrator, prepare_worker
from collection.files import CONTINUES, DemoSettings, claimed
from collection.task_demos import TaskDemos, libero_attributes
from config import add_config_flags, load_config
from errors import BadInput, exit_code, exits_on_bad_input, out_of_memory_named
from files import expanded
from machine import affordable_processes
from simulator.layouts import MOVED_BY, ShuffledTask, shuffled_tasks
from simulator.self_check import simulator_difference
from simulator.suites import make_suite, parse_task_ids

START_NOISE = 0.02  # rad
GB_PER_WORKER = 1.5


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
    running: dict[Future, tuple[TaskDemos, int, float]] = {}  # and the time when the attempt was handed out
    processes: set[BaseProcess] = set()
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
                    order = task.task_id, attempt, task.settings, task.demo_file(attempt), task.asked
                    with ctrl_c_waits():
                        running[pool.submit(Demonstrator.attempt, *order)] = task, attempt, time.monotonic()
                        processes.update(multiprocessing.active_children())
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                task, attempt, begun = running.pop(future)
                outcome = future.result()
                task.lengths[attempt] = outcome.length
                if outcome.why_broken:
                    task.broken.append(outcome.why_broken)
                task.discarded += outcome.discarded
                task.seconds += time.monotonic() - begun
                progress.update(outcome.length > 0)
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
        lengths = task.successes().values()
        solved, tried = len(lengths) + task.deleted, len(task.lengths)
        rate, percent = f"{solved}/{tried}", 100 * solved / tried
        mean = sum(lengths) / len(lengths)
        print(f"{task.task_id:4}  {rate:>18}  {percent:6.1f}%  {mean:11.0f}  {task.seconds:14.0f}  {task.name}")
        successes, attempts = successes + solved, attempts + tried
    print(f"expert success over all tasks: {successes}/{attempts} = {100 * successes / attempts:.1f}%")
    for sentence in [*broken_attempts(tasks), *discarded_layouts(tasks)]:
        print(sentence)


def discarded_layouts(tasks: list[TaskDemos]) -> list[str]:
    """One sentence about layouts that were no attempt of the expert, if there were any in this run."""
    why = Counter(why for task in tasks for why in task.discarded)
    told = ", ".join(f"{count} because {reason}" for reason, count in sorted(why.items()))
    return [f"no attempts, drawn anew before the expert began: {why.total()} layouts, {told}"] if why else []


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
    add("--layouts", choices=("libero", "shuffled"), default="libero",
        help="libero: every object at its own place; shuffled: objects exchange their places, are moved by up to "
        f"{MOVED_BY:g} m, and any of them is asked for (default: %(default)s)")
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
    if args.shift_target and args.layouts == "shuffled":
        raise BadInput(f"--shift_target {args.shift_target}: expected 0, shuffled layouts move every object already")
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
    if len(data.folders) > 1 and "data_directory" not in args:
        raise BadInput(
            f"data.data_directory lists {len(data.folders)} folders; say with --data_directory which of them to fill"
        )
    folder = Path(expanded(args.data_directory)) if "data_directory" in args else data.folders[0]
    wanted = getattr(args, "demos_per_task", data.demos_per_task)
    check_arguments(args, folder, wanted)
    settings = DemoSettings(
        args.image_size, args.visual_mesh_ratio, args.obs_alignment, args.start_noise, args.seed, args.shift_target,
        args.missed_grasps, args.layouts,
    )  # fmt: skip

    suite = make_suite(TASK_SUITE)
    task_ids = parse_task_ids(args.tasks, suite, TASK_SUITE)
    orders: list[tuple[int, int, ShuffledTask | None]] = [(task_id, wanted, None) for task_id in task_ids]
    if args.layouts == "shuffled":
        shuffled = [(task, task.share_of(wanted)) for task in shuffled_tasks(suite, task_ids)]
        orders = [(task.scene, share, task) for task, share in shuffled if share]
    with claimed([asked.name if asked else suite.get_task(task_id).name for task_id, _, asked in orders], folder):
        tasks = [TaskDemos(suite, task_id, folder, share, settings, asked) for task_id, share, asked in orders]
        if args.visual_mesh_ratio < 1:
            print(f"Not LIBERO's own pictures: drawn with {args.visual_mesh_ratio:g} of the visual meshes' triangles.")
        if simulator := simulator_difference():
            print(f"warning: {simulator}")

        def finish(task: TaskDemos) -> None:
            attributes = libero_attributes(suite, task.task_id, settings.image_size, task.asked)
            task.assemble(attributes | {"simulator": simulator or "as LIBERO's own"})

        no_memory = (
            f"out of memory with --num_workers {args.num_workers} ({GB_PER_WORKER} GB each); use fewer; {CONTINUES}"
        )
        try:
            with out_of_memory_named(no_memory):
                collect(tasks, args.num_workers, finish)
        except KeyboardInterrupt as stop:
            print(f"\nStopped. Finished demos are kept in {folder}; the same command continues.")
            raise SystemExit(exit_code(stop)) from None
    report(tasks)


if __name__ == "__main__":
    main()
