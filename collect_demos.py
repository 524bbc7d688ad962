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

With --scenes N nothing is demonstrated: of each task N scenes are drawn, shuffled, with the arm in poses of the
demonstrations that lie in the data directory. They are files of their own in its folder scenes.
"""

import argparse
import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from collection import scenes
from collection.demonstrator import SHORTEST_DEMO
from collection.files import CONTINUES, DemoSettings, SceneSettings, claimed
from collection.pool import GB_PER_WORKER, collect
from collection.task_demos import START_NOISE, TaskDemos, broken_attempts
from collection.worker import TASK_SUITE
from config import add_config_flags, load_config
from demos.hdf5_writing import SCENES_FOLDER
from errors import BadInput, exit_code, exits_on_bad_input, out_of_memory_named
from files import expanded
from machine import affordable_processes
from simulator.layouts import MOVED_BY, ShuffledTask, shuffled_tasks
from simulator.self_check import simulator_difference
from simulator.suites import make_suite, parse_task_ids

# Flags that say what a demonstration is like.
DEMOS_ALONE = "demos_per_task", "obs_alignment", "start_noise", "shift_target", "missed_grasps", "layouts", "draw_every"


def report(tasks: Sequence[TaskDemos]) -> None:
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


def discarded_layouts(tasks: Sequence[TaskDemos]) -> list[str]:
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
    add("--draw_every", type=int, default=1, metavar="STEPS",
        help="draw every so many-th step alone, beginning with the first: pictures are what a demonstration costs "
        "without a GPU; samples are then those steps, model.prediction_gap has to be a multiple, and other programs "
        "cannot read such files (default: %(default)s)")
    add("--scenes", type=int, metavar="N",
        help="instead of demonstrations draw N scenes of each task, in shuffled layouts and with the arm as in a frame "
        "of the demonstrations in the data directory; more N add to them")
    # fmt: on
    args = parser.parse_args(arguments)
    as_given = vars(parser.parse_args(arguments, argparse.Namespace(**dict.fromkeys(DEMOS_ALONE))))
    args.of_demos_alone = [f"--{name}" for name in DEMOS_ALONE if as_given[name] is not None]
    return args


def check_arguments(args: argparse.Namespace, folder: Path, wanted: int) -> None:
    if args.scenes is not None and args.of_demos_alone:
        raise BadInput(
            f"--scenes {args.scenes}: goes without {' and '.join(args.of_demos_alone)}, which say what a demonstration"
            " is like"
        )
    if wanted < 1:
        raise BadInput(f"{'--demos_per_task' if args.scenes is None else '--scenes'} {wanted}: expected at least 1")
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
    if not 1 <= args.draw_every <= SHORTEST_DEMO // 2:  # the shortest demo then has two pictures
        raise BadInput(f"--draw_every {args.draw_every}: expected 1 to {SHORTEST_DEMO // 2} steps")
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


def demos_of(
    args: argparse.Namespace, suite, task_ids: Sequence[int], folder: Path, wanted: int
) -> tuple[list[str], Callable[[], list[TaskDemos]]]:
    """The names of the files to be collected, and what reads how far they are, once this process alone writes them."""
    settings = DemoSettings(
        args.image_size, args.visual_mesh_ratio, args.obs_alignment, args.start_noise, args.seed, args.shift_target,
        args.missed_grasps, args.layouts, args.draw_every,
    )  # fmt: skip
    orders: list[tuple[int, int, ShuffledTask | None]] = [(task_id, wanted, None) for task_id in task_ids]
    if args.layouts == "shuffled":
        shuffled = [(task, task.share_of(wanted)) for task in shuffled_tasks(suite, task_ids)]
        orders = [(task.scene, share, task) for task, share in shuffled if share]
    names = [asked.name if asked else suite.get_task(task_id).name for task_id, _, asked in orders]
    return names, lambda: [
        TaskDemos(suite, task_id, folder, share, settings, asked) for task_id, share, asked in orders
    ]


def scenes_of(
    args: argparse.Namespace, suite, task_ids: Sequence[int], folder: Path, wanted: int
) -> tuple[list[str], Callable[[], list[scenes.SceneBlocks]]]:
    """The same of scenes."""
    poses = scenes.arm_poses_in(folder)
    settings = SceneSettings(args.image_size, args.visual_mesh_ratio, args.seed, scenes.fingerprint(poses))
    return [scenes.name_of(task_id) for task_id in task_ids], lambda: [
        scenes.SceneBlocks(suite, task_id, folder, wanted, settings, poses) for task_id in task_ids
    ]


@exits_on_bad_input
def main() -> None:
    args = parse_arguments()
    data = load_config(args.config, args.set).data
    if len(data.folders) > 1 and "data_directory" not in args:
        raise BadInput(
            f"data.data_directory lists {len(data.folders)} folders; say with --data_directory which of them to fill"
        )
    folder = Path(expanded(args.data_directory)) if "data_directory" in args else data.folders[0]
    of_scenes = args.scenes is not None
    wanted = args.scenes if of_scenes else getattr(args, "demos_per_task", data.demos_per_task)
    check_arguments(args, folder, wanted)

    suite = make_suite(TASK_SUITE)
    task_ids = parse_task_ids(args.tasks, suite, TASK_SUITE)
    names, read = (scenes_of if of_scenes else demos_of)(args, suite, task_ids, folder, wanted)
    with claimed(names, folder / SCENES_FOLDER if of_scenes else folder):
        collections = read()
        if args.visual_mesh_ratio < 1:
            print(f"Not LIBERO's own pictures: drawn with {args.visual_mesh_ratio:g} of the visual meshes' triangles.")
        if simulator := simulator_difference():
            print(f"warning: {simulator}")

        def finish(collection) -> None:
            collection.assemble(collection.attributes() | {"simulator": simulator or "as LIBERO's own"})

        no_memory = (
            f"out of memory with --num_workers {args.num_workers} ({GB_PER_WORKER} GB each); use fewer; {CONTINUES}"
        )
        try:
            with out_of_memory_named(no_memory):
                collect(collections, args.num_workers, finish)
        except KeyboardInterrupt as stop:
            print(f"\nStopped. What is finished is kept in {folder}; the same command continues.")
            raise SystemExit(exit_code(stop)) from None
    print_report: Callable = scenes.report if of_scenes else report
    print_report(collections)


if __name__ == "__main__":
    main()
