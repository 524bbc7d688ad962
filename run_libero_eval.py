"""Rolls a policy out in the LIBERO simulator, from the suite's own fixed init states or from random resets.

    python run_libero_eval.py --checkpoint checkpoints/phase2_flow_matching/checkpoint_best.pt \\
        --task_suite libero_object --num_trials 50

The checkpoint alone says which cameras, picture size, robot state and language embeddings the policy was trained on.
Each finished episode is on disk at once; the same command with the same --output_dir continues one that was stopped.
An episode is a function of checkpoint, suite, task, init state and --seed, whatever the number of workers. One that
the policy's own actions break has failed. One that the machine could not finish has crashed and is in no success rate;
where one is left, the exit code is 1, and the same command tries it again.

    --side_by_side 0.05                              policy and baselines, on init states and shifted targets
    --policy replay | zero                           what a policy that doesn't look gets
    --policy ws://host:8000                          any policy behind a server of openpi's protocol
    --decision_delay_steps auto                      the robot goes on moving while the policy thinks
    --beside A B                                     finished evaluations that stand in the table of this one
    --compare A/results.json B/results.json          is A better than B? paired by episode
    --shard 3/16 ... --merge PART PART ...           on many machines, then joined
"""

import argparse
import contextlib
import importlib.metadata
import itertools
import json
import sys
from collections import Counter
from collections.abc import Generator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from config import add_set_flag
from demos.instructions import canonical_instruction
from errors import BadInput, exit_code, exits_on_bad_input
from files import expanded
from machine import affordable_processes
from provenance import code_version
from rollouts.delay import with_recorded_delay
from rollouts.episodes import Episode, Rollouts, Task, shard_of, start_name, step_limit
from rollouts.evaluation import AUTO, DECISION_TIMEOUT, EPISODE_TIMEOUT, SAMPLE_STEPS, Evaluation
from rollouts.folder import SIDE_BY_SIDE, EvaluationFolder, merge, read_settings, write_whole
from rollouts.policies import make_policy
from rollouts.pool import GB_PER_ENVIRONMENT, play_all
from rollouts.report import write_report, write_side_by_side_report
from rollouts.side_by_side import (
    OWN,
    conditions,
    read_beside,
    results_of_all,
    side_by_side,
    table_text,
)
from rollouts.statistics import (
    ORIGINS,
    causes_text,
    comparison_text,
    describe,
    distinct,
    figures_text,
    summarise,
    summarise_tasks,
)
from simulator.layouts import LAYOUTS
from simulator.self_check import renderer_name, simulator_difference
from simulator.self_check import versions as simulator_versions
from simulator.suites import (
    bddl_path,
    instruction_of,
    make_suite,
    parse_task_ids,
    target_is_an_object,
    task_init_states,
)
from training.checkpoint import read_checkpoint


class Played(NamedTuple):
    """What has become of one evaluation."""

    directory: Path
    asked: int  # episodes
    results: dict  # of results.json


@exits_on_bad_input
def main() -> None:
    arguments = parse_arguments()
    if arguments.compare:
        print(comparison_text(*map(Path, arguments.compare)))
    elif arguments.merge:
        merge_shards([Path(part) for part in arguments.merge], Path(arguments.output_dir), beside_of(arguments))
    elif arguments.side_by_side is not None:
        play_side_by_side(evaluation_of(arguments), arguments.side_by_side)
    else:
        played = evaluate(evaluation_of(arguments))
        exit_unless_complete([played], f"the same command with --output_dir {played.directory} tries them again")


def merge_shards(parts: Sequence[Path], directory: Path, beside: Sequence[Path]) -> None:
    beside_results = read_beside(beside, read_settings(parts[0]) | {"shard": None})
    with merge(parts, directory) as folder:
        settings = read_settings(directory)
        results = finish(folder, None, None, beside_results)
    asked = len(settings["instructions"]) * settings["num_trials"]
    advice = "the commands of the shards play them, then merge into a new folder"
    exit_unless_complete([Played(directory, asked, results)], advice)


def play_side_by_side(evaluation: Evaluation, shift: float) -> None:
    """Eight evaluations in folders of their own, and the table of exactly these."""
    cells = conditions(evaluation, shift)
    # What would stop a later one of the eight stops the command before the first is played.
    _, tasks, _ = asked_for(cells["replay_shifted"])
    make_policy(cells["replay_shifted"], read_checkpoint(evaluation.checkpoint or "", phase=2), tasks)
    directory = choose_output_dir(evaluation)
    for name in ("settings.json", "report.html"):
        if (directory / name).exists() and not (directory / SIDE_BY_SIDE).exists():
            raise BadInput(f"--output_dir {directory}: already holds the {name} of something else; choose another")

    played = []
    for name, condition in cells.items():
        print(f"== {name}")
        played.append(evaluate(replace(condition, output_dir=directory / name), directory))
    results = results_of_all({one.directory.name: one.results for one in played})
    write_whole(directory / SIDE_BY_SIDE, json.dumps(results, indent=1) + "\n")
    report = write_side_by_side_report(directory, results)
    print(f"\n{table_text(results['side_by_side'])}\n\nresults: {directory / SIDE_BY_SIDE}, to look at: {report}")
    exit_unless_complete(played, f"the same command with --output_dir {directory} tries them again")


def exit_unless_complete(played: Sequence[Played], advice: str) -> None:
    """Ends the program with code 1 and one sentence where episodes that were asked for are in no figure."""
    incomplete, left, crashed = [], 0, 0
    for directory, asked, results in played:
        missing = asked - results["overall"]["trials"]
        if missing:
            incomplete.append(str(directory))
            left, crashed = left + missing, crashed + results["crashed"]
    if left:
        where, asked = ", ".join(incomplete), sum(one.asked for one in played)
        sys.exit(f"error: {where}: {left} of {asked} episodes are in no figure, {crashed} of them crashed; {advice}")


def asked_for(evaluation: Evaluation) -> tuple:
    """The suite, its tasks by id, and the trials of each. Raises BadInput for what can't be had."""
    suite = make_suite(evaluation.task_suite)
    task_ids = parse_task_ids(
        f"0-{suite.n_tasks - 1}" if evaluation.tasks is None else evaluation.tasks, suite, evaluation.task_suite
    )
    for task_id in task_ids:
        bddl_path(suite, task_id)  # raises here and now where a task's file is missing
        if evaluation.shift_target and not target_is_an_object(suite, task_id):
            raise BadInput(f"--shift_target: the target of task {task_id} is fixed; choose other --tasks")
    tasks = {}
    for task_id in task_ids:
        named, told = suite.get_task(task_id), instruction_of(suite, evaluation.task_suite, task_id)
        name_tells = canonical_instruction(named.language) == canonical_instruction(told)
        is_used = evaluation.random_resets is None or evaluation.policy == "replay"  # which looks for a similar start
        init_states = task_init_states(suite, task_id) if is_used else np.empty((0, 0))
        tasks[task_id] = Task(named.name, canonical_instruction(told), name_tells, init_states)
    return suite, tasks, evaluation.trials(num_init_states(tasks))


def num_init_states(tasks: dict[int, Task]) -> int:
    return min(len(task.init_states) for task in tasks.values())


def evaluate(evaluation: Evaluation, all_sides: Path | None = None) -> Played:
    """Plays what is missing of one evaluation, and reports it.

    all_sides: the --output_dir of the command that this evaluation is a part of, where it is only a part.
    """
    # What is asked for: tasks, their init states and instructions, and who acts.
    suite, tasks, trials = asked_for(evaluation)
    evaluation = with_recorded_delay(evaluation)
    checkpoint = read_checkpoint(evaluation.checkpoint, phase=2) if evaluation.checkpoint else None
    policy, settings = make_policy(evaluation, checkpoint, tasks)
    settings |= {
        "task_suite": evaluation.task_suite,
        "instructions": {str(task_id): task.instruction for task_id, task in tasks.items()},
        "tasks_of_suite": suite.n_tasks,
        "num_trials": len(trials),
        "init_states": num_init_states(tasks),
        "init_states_played": evaluation.init_states_played(num_init_states(tasks)),
        "random_resets": evaluation.random_resets,
        "layouts": None if evaluation.layouts == "libero" else evaluation.layouts,
        "max_steps": evaluation.max_steps,
        "shift_target": evaluation.shift_target,
        "seed": evaluation.seed,
        "shard": evaluation.shard,
        "simulator": simulator_difference(),
        **versions(),
    }
    episodes = shard_of(evaluation.episodes(list(tasks), trials), evaluation.shard)
    beside = read_beside(evaluation.beside, settings)

    with EvaluationFolder(choose_output_dir(evaluation), settings) as folder:
        # What is there already, and the rest.
        identity = [field.name for field in fields(Episode)]
        done = {Episode(*(one[name] for name in identity)) for one in folder.episodes if not one["crashed"]}
        missing = [episode for episode in episodes if episode not in done]
        print(describe(settings, len(episodes)))
        if done:
            print(f"{folder.directory}: {len(done)} episodes are there already, {len(missing)} are missing")
        rollouts = Rollouts(
            evaluation.task_suite, settings["image_size"], settings["visual_mesh_ratio"], evaluation.max_steps,
            evaluation.shift_target, policy.looks, evaluation.save_video, folder.pictures.absolute(),
            evaluation.layouts, settings["decision_delay_steps"],
        )  # fmt: skip
        rollout = play_all(
            missing,
            lambda episode: None if evaluation.random_resets else tasks[episode.task_id].init_states[episode.trial],
            policy,
            rollouts,
            evaluation.num_workers or affordable_processes(GB_PER_ENVIRONMENT),
            evaluation.episode_timeout,
        )
        try:
            progress = tqdm(total=len(episodes), initial=len(done), unit="episode", smoothing=0)
            keep_all(rollout, folder, start_name(settings), progress, code_of(policy))
        except KeyboardInterrupt as stop:
            kept = f"{len(folder.episodes)} of {len(episodes)} episodes are kept"
            print(f"\nStopped. {kept}; the same command with --output_dir {all_sides or folder.directory} continues.")
            sys.exit(exit_code(stop))
        results = finish(folder, evaluation.checkpoint, checkpoint, beside)
    return Played(folder.directory, len(episodes), results)


def code_of(policy) -> dict:
    """The commit that decides where another program does, as it says itself."""
    return {"code_of_server": policy.metadata["code"]} if "code" in getattr(policy, "metadata", ()) else {}


def keep_all(
    rollout: Generator[dict], folder: EvaluationFolder, start: str, progress: tqdm, code_of_policy: dict
) -> None:
    """Writes every episode down as soon as it is over, with the code that played it and the way it was drawn. `start`
    is what it began from, for people."""
    origins = {"code": code_version(), "renderer": renderer_name()} | code_of_policy
    with progress, contextlib.closing(rollout):
        for episode in rollout:
            folder.append(episode | origins)
            if trouble := trouble_of(episode):
                progress.write(f"task {episode['task_id']}, {start} {episode['trial']}: {trouble}")
            progress.set_postfix(successes=sum(one["success"] for one in folder.episodes), refresh=False)
            progress.update()


def trouble_of(episode: dict) -> str | None:
    """Why an episode crashed, or how the policy broke it, in one line."""
    if episode["crashed"]:
        return f"crashed: {episode['error'].partition(chr(10))[0]}"
    broken = episode.get("broken_by_policy")
    return broken and f"broken off by the policy's own actions {broken}"


def finish(
    folder: EvaluationFolder, checkpoint_path: str | None, checkpoint: dict | None, beside: dict[str, dict]
) -> dict:
    """Writes results.json, pictures and report, and prints the figures. Returns what is in results.json.

    beside: folder -> results of the evaluations that stand in this one's table.
    """
    settings = read_settings(folder.directory)
    instructions = {int(task_id): instruction for task_id, instruction in settings["instructions"].items()}
    episodes = sorted(folder.episodes, key=lambda episode: (episode["task_id"], episode["trial"]))
    overall = summarise(episodes)
    results = {
        "title": describe(settings, len(episodes)),
        "success_rate": overall["success_rate"],
        "crashed": overall["crashed"],
        "overall": overall,
        "tasks": [row for row in summarise_tasks(instructions, episodes) if row["trials"] + row["crashed"]],
        "checkpoint": checkpoint_path,
        "checkpoint_epoch": checkpoint and checkpoint["epoch"],
        "code_of_checkpoint": checkpoint and checkpoint.get("code", "unknown"),
        "settings": settings,
        **{name: distinct(episodes, name) for name in ORIGINS},
        "episodes": episodes,
    }
    results["side_by_side"] = side_by_side({OWN: results} | beside)
    write_whole(folder.directory / "results.json", json.dumps(results, indent=1) + "\n")
    report = write_report(folder.directory, results)
    for row in results["tasks"]:
        print(f"task {row['task_id']}: {figures_text(row)}  ({row['task']})")
    if overall["decision_ms_mean"]:
        mean, median = overall["decision_ms_mean"], overall["decision_ms_median"]
        print(f"decisions: {mean:.1f} ms on average, median {median:.1f} ms")
    if causes := causes_text(overall):
        print(f"the failures lifted: {causes}")
    for trouble, times in Counter(filter(None, map(trouble_of, episodes))).most_common():
        print(f"{times} x {trouble}")
    print(f"overall: {figures_text(overall)}\n\n{table_text(results['side_by_side'])}\n")  # a dash: not played beside
    print(f"results: {folder.directory / 'results.json'}, to look at: {report}")
    return results


# ---------------------------------------------------------------------------------------------------------- flags


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Success rate of a phase-2 checkpoint in the LIBERO simulator.",
        epilog="A stopped evaluation continues when called again with the same flags and --output_dir.",
    )
    add = parser.add_argument
    # fmt: off
    add("--checkpoint", type=expanded, metavar="PLACE",
        help="phase-2 checkpoint: a file, a folder of export_policy.py, or hf://owner/name[@revision]; a baseline "
        "takes its picture settings and training demos from it")
    add("--task_suite", default="libero_object", help="LIBERO or LIBERO-PRO suite (default: %(default)s)")
    add("--tasks", help="task ids such as 0,3 or 2-5 (default: all tasks of the suite)")
    add("--num_trials", type=int, help="episodes a task, each from its own init state (default: all, at most 50)")
    add("--init_states", metavar="NUMBERS", help="init states such as 10-49, of every task (default: the first)")
    add("--random_resets", type=int, metavar="N",
        help="N episodes a task from objects placed at random, not from the suite's init states: for development")
    add("--layouts", choices=("libero", *LAYOUTS), default="libero",
        help="of the random resets, in libero_object: shuffled as in demonstrations, or with an exchange or a place "
        "that is kept out of them (default: %(default)s)")
    add("--policy", type=policy_named, default="checkpoint", metavar="WHO",
        help="who acts: checkpoint, replay (a training demo of the task, blindly), zero (nobody), or the ws:// or "
        "wss:// address of a policy server (default: %(default)s)")
    add("--demo", type=expanded, metavar="FILE[:demo_i]",
        help="for --policy replay: this demonstration, without a number the first, of the one task in --tasks")
    add("--execute_steps", type=int,
        help="actions executed of each chunk (default: the whole chunk but for the decision delay)")
    add("--decision_delay_steps", type=delay_steps, default=0, metavar="N",
        help="steps for which the robot goes on with its last chunk while the policy decides; auto measures it once, "
        "at the start (default: %(default)s)")
    add("--sample_steps", type=int, default=SAMPLE_STEPS, help="Euler steps of the flow (default: %(default)s)")
    add("--flow_start", choices=("noise", "zero"),
        help="integrate the flow from Gaussian noise or from its mean (default: the checkpoint's phase2.flow_start)")
    add("--precision", choices=("fp32", "bf16"), default="fp32",
        help="of the policy's matrix products; bf16 decides faster where the machine has it (default: %(default)s)")
    add("--max_steps", type=int, help="step limit of an episode (default: the suite's, object 280)")
    add("--shift_target", type=float, default=0.0, metavar="METRES",
        help="move the target object by up to this in x and y: who solves these has to look (default: %(default)s)")
    add("--visual_mesh_ratio", type=float, metavar="SHARE",
        help="share of the visual meshes' triangles that is drawn, 1 being LIBERO's own pictures (default: as the "
        "checkpoint's demonstrations were drawn)")
    add("--side_by_side", type=float, metavar="METRES",
        help="the policy (flow from noise, from zero), replay and standing still, from the init states and with the "
        "target shifted by up to this: eight evaluations in --output_dir and one table")
    add("--beside", type=expanded, nargs="+", action="extend", default=[], metavar="DIR",
        help="folders of finished evaluations of the same scenes that stand in this one's table, such as a replay's")
    add("--seed", type=int, default=0, help="seed of the flow's noise and of the scene (default: %(default)s)")
    add("--output_dir", type=expanded,
        help="folder of the results, continued if started (default: a new results/<suite>_<number>)")
    add("--save_video", choices=("all", "failures", "none"), nargs="?", const="all", default="none",
        help="episodes to keep as mp4, with a grid of each task; without a value all (default: %(default)s)")
    add("--num_workers", type=int, help="simulators side by side, 1.6 GB each (default: one a core, as memory allows)")
    add("--episode_timeout", type=float, default=EPISODE_TIMEOUT,
        help="seconds after which an episode counts as hung and is tried once more; the policy's time is not counted "
        "(default: %(default)s)")
    add("--decision_timeout", type=float, default=DECISION_TIMEOUT,
        help="seconds after which a policy server counts as hung and its episode is tried once more, five times as "
        "long for the first decision of all (default: %(default)s)")
    add("--shard", metavar="I/N", help="play only the I-th of N parts of the episodes, 1/N to N/N")
    add("--merge", type=expanded, nargs="+", action="extend", metavar="DIR",
        help="join the folders of shards into --output_dir; nothing is played")
    add("--compare", type=expanded, nargs=2, metavar="RESULTS",
        help="pair two results.json by episode; nothing is played")
    add_set_flag(parser)
    # fmt: on
    arguments = parser.parse_args()
    if arguments.merge and not arguments.output_dir:
        raise BadInput("--merge needs --output_dir, the folder of the joined results")
    return arguments


def evaluation_of(arguments: argparse.Namespace) -> Evaluation:
    """Raises BadInput for flags that contradict each other and for numbers that make no sense in any suite."""
    task_suite = arguments.task_suite.lower()
    is_server = "://" in arguments.policy
    return Evaluation(
        policy="server" if is_server else arguments.policy,
        server=arguments.policy if is_server else None,
        checkpoint=arguments.checkpoint,
        overrides=tuple(arguments.set),
        task_suite=task_suite,
        tasks=arguments.tasks,
        num_trials=arguments.num_trials,
        init_states=arguments.init_states,
        random_resets=arguments.random_resets,
        layouts=arguments.layouts,
        max_steps=step_limit(task_suite) if arguments.max_steps is None else arguments.max_steps,
        demo=arguments.demo,
        execute_steps=arguments.execute_steps,
        sample_steps=arguments.sample_steps,
        flow_start=arguments.flow_start,
        precision=arguments.precision,
        shift_target=arguments.shift_target,
        visual_mesh_ratio=arguments.visual_mesh_ratio,
        seed=arguments.seed,
        shard=arguments.shard,
        output_dir=Path(arguments.output_dir) if arguments.output_dir else None,
        beside=beside_of(arguments),
        save_video=arguments.save_video,
        num_workers=arguments.num_workers,
        episode_timeout=arguments.episode_timeout,
        decision_timeout=arguments.decision_timeout,
        decision_delay_steps=arguments.decision_delay_steps,
    )


def policy_named(text: str) -> str:
    if text not in ("checkpoint", "replay", "zero") and not text.startswith(("ws://", "wss://")):
        raise argparse.ArgumentTypeError(f"{text} is none of checkpoint, replay, zero and ws://host:port")
    return text


def delay_steps(text: str) -> int | str:
    if text == AUTO:
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is neither a number of steps nor {AUTO}") from None


def beside_of(arguments: argparse.Namespace) -> tuple[Path, ...]:
    return tuple(Path(directory) for directory in arguments.beside)


def versions() -> dict[str, str]:
    """Another simulator or another arithmetic is another evaluation."""
    packages = {"torch": importlib.metadata.version("torch")} | simulator_versions()
    return {f"version of {package}": version for package, version in packages.items()}


def choose_output_dir(evaluation: Evaluation) -> Path:
    """The folder that is asked for, or a new one that no evaluation started at the same time gets, too."""
    if evaluation.output_dir:
        return evaluation.output_dir
    results = Path("results")
    try:
        results.mkdir(exist_ok=True)
        for number in itertools.count(1):
            directory = results / f"{evaluation.task_suite}_{number}"
            try:
                directory.mkdir()
            except FileExistsError:
                continue
            break
    except OSError as problem:
        raise BadInput(f"{results}: not writable ({problem.strerror}); choose a folder with --output_dir") from None
    return directory


if __name__ == "__main__":
    main()
