"""Rolls a policy out in the LIBERO simulator, from the suite's own fixed init states.

    python run_libero_eval.py --checkpoint checkpoints/phase2_flow_matching/checkpoint_best.pt \\
        --task_suite libero_object --num_trials 50

The checkpoint alone says which cameras, picture size, robot state and language embeddings the policy was trained on.
Each finished episode is on disk at once; the same command with the same --output_dir continues one that was stopped.
An episode is a function of checkpoint, suite, task, init state and --seed, whatever the number of workers. One that
the policy's own actions break has failed. One that the machine could not finish has crashed and is in no success rate;
where one is left, the exit code is 1, and the same command tries it again.

    --side_by_side 0.05                              policy and baselines, on init states and shifted targets
    --policy replay | zero                           what a policy that doesn't look gets
    --compare A/results.json B/results.json          is A better than B? paired by episode
    --shard 3/16 ... --merge PART PART ...           on many machines, then joined
"""

import argparse
import contextlib
import copy
import dataclasses
import hashlib
import importlib.metadata
import itertools
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from config import add_set_flag, parse_config
from demos.instructions import canonical_instruction
from demos.language import LanguageTable
from errors import BadInput, exits_on_bad_input, out_of_memory_named
from files import expanded
from jepa.mamba import choose_mamba_backend
from machine import affordable_processes
from observation import CAMERAS, STATE_WIDTHS
from provenance import code_version
from rollouts.folder import EvaluationFolder, merge, read_settings, write_whole
from rollouts.policies import (
    CheckpointPolicy,
    ReplayPolicy,
    Task,
    ZeroPolicy,
    demo_of,
    read_demo,
    training_demo,
    with_embeddings_of,
)
from rollouts.pool import GB_PER_ENVIRONMENT, play_all
from rollouts.report import write_report
from rollouts.side_by_side import conditions, side_by_side, table_text
from rollouts.statistics import ORIGINS, comparison_text, distinct, figures_text, summarise, summarise_tasks
from rollouts.worker import Episode, Rollouts
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
from statevla_model import model_from_checkpoint
from training.checkpoint import read_checkpoint
from training.processes import choose_device

STEP_LIMITS = {  # somewhat more than the longest demonstration of the suite takes; its variants have the same
    "libero_spatial": 220,
    "libero_object": 280,
    "libero_goal": 300,
    "libero_90": 400,
    "libero_10": 520,
}
LARGEST_SHIFT = 0.2  # metres
LONGEST_EPISODE = 100_000  # steps, more than an hour


@exits_on_bad_input
def main() -> None:
    arguments = parse_arguments()
    if arguments.compare:
        print(comparison_text(*map(Path, arguments.compare)))
        return
    if arguments.merge:
        with merge([Path(part) for part in arguments.merge], Path(arguments.output_dir)) as folder:
            settings = read_settings(folder.directory)
            asked = len(settings["instructions"]) * settings["num_trials"]
            finish(folder, checkpoint_path=None, checkpoint=None)
        exit_unless_complete([(folder, asked)], "the commands of the shards play them, then merge into a new folder")
        return
    if arguments.side_by_side is None:
        played = [evaluate(arguments)]
        directory = played[0][0].directory
    else:
        check_all_sides(arguments)
        directory, played = choose_output_dir(arguments), []
        for name, flags in conditions(arguments.side_by_side):
            print(f"== {name}")
            condition = copy.copy(arguments)
            vars(condition).update(flags, output_dir=str(directory / name))
            played.append(evaluate(condition, directory))
    exit_unless_complete(played, f"the same command with --output_dir {directory} tries them again")


def exit_unless_complete(evaluations: Sequence[tuple[EvaluationFolder, int]], advice: str) -> None:
    """Ends the program with code 1 and one sentence where episodes that were asked for are in no figure.

    evaluations: each folder and how many episodes were asked of it.
    """
    incomplete, left, crashed = [], 0, 0
    for folder, asked in evaluations:
        crashes = sum(episode["crashed"] for episode in folder.episodes)
        missing = asked - (len(folder.episodes) - crashes)
        if missing:
            incomplete.append(str(folder.directory))
            left, crashed = left + missing, crashed + crashes
    if left:
        where, asked = ", ".join(incomplete), sum(asked for _, asked in evaluations)
        sys.exit(f"error: {where}: {left} of {asked} episodes are in no figure, {crashed} of them crashed; {advice}")


def check_all_sides(arguments: argparse.Namespace) -> None:
    """Raises BadInput for what would stop a later one of the eight evaluations, before the first is played."""
    replay = copy.copy(arguments)
    vars(replay).update(policy="replay", shift_target=arguments.side_by_side)
    _, tasks = asked_for(replay)
    make_policy(replay, read_checkpoint(arguments.checkpoint, phase=2), tasks)


def asked_for(arguments: argparse.Namespace) -> tuple:
    """The suite and its tasks by id. Raises BadInput for what can't be had."""
    suite = make_suite(arguments.task_suite)
    task_ids = parse_task_ids(
        f"0-{suite.n_tasks - 1}" if arguments.tasks is None else arguments.tasks, suite, arguments.task_suite
    )
    tasks = {}
    for task_id in task_ids:
        bddl_path(suite, task_id)  # raises here and now where a task's file is missing
        if arguments.shift_target and not target_is_an_object(suite, task_id):
            raise BadInput(f"--shift_target: the target of task {task_id} is fixed; choose other --tasks")
    for task_id in task_ids:
        named, told = suite.get_task(task_id), instruction_of(suite, arguments.task_suite, task_id)
        name_tells = canonical_instruction(named.language) == canonical_instruction(told)
        init_states = task_init_states(suite, task_id)
        tasks[task_id] = Task(named.name, canonical_instruction(told), name_tells, init_states)
    check_numbers(arguments, min(len(task.init_states) for task in tasks.values()))
    return suite, tasks


def evaluate(arguments: argparse.Namespace, all_sides: Path | None = None) -> tuple[EvaluationFolder, int]:
    """Plays what is missing of one evaluation, and reports it. Returns its folder, closed, and how many episodes were
    asked for.

    all_sides: the --output_dir of the command that this evaluation is a part of, where it is only a part.
    """
    # What is asked for: tasks, their init states and instructions, and who acts.
    suite, tasks = asked_for(arguments)
    checkpoint = read_checkpoint(arguments.checkpoint, phase=2) if arguments.checkpoint else None
    policy, settings = make_policy(arguments, checkpoint, tasks)
    settings |= {
        "task_suite": arguments.task_suite,
        "instructions": {str(task_id): task.instruction for task_id, task in tasks.items()},
        "tasks_of_suite": suite.n_tasks,
        "num_trials": arguments.num_trials,
        "init_states": min(len(task.init_states) for task in tasks.values()),
        "max_steps": arguments.max_steps,
        "shift_target": arguments.shift_target,
        "seed": arguments.seed,
        "shard": arguments.shard,
        "simulator": simulator_difference(),
        **versions(),
    }
    episodes = [
        Episode(
            arguments.task_suite, task_id, trial, episode_seed(arguments.task_suite, task_id, trial, arguments.seed)
        )
        for task_id in tasks
        for trial in range(arguments.num_trials)
    ]
    episodes = shard_of(episodes, arguments.shard)

    with EvaluationFolder(choose_output_dir(arguments), settings) as folder:
        # What is there already, and the rest.
        identity = [field.name for field in dataclasses.fields(Episode)]
        done = {Episode(*(one[name] for name in identity)) for one in folder.episodes if not one["crashed"]}
        missing = [episode for episode in episodes if episode not in done]
        print(describe(settings, len(episodes)))
        if done:
            print(f"{folder.directory}: {len(done)} episodes are there already, {len(missing)} are missing")
        rollouts = Rollouts(
            arguments.task_suite, settings["image_size"], settings["visual_mesh_ratio"], arguments.max_steps,
            arguments.shift_target, policy.looks, arguments.save_video, folder.pictures.absolute(),
        )  # fmt: skip
        rollout = play_all(
            missing,
            lambda episode: tasks[episode.task_id].init_states[episode.trial],
            policy,
            rollouts,
            arguments.num_workers or affordable_processes(GB_PER_ENVIRONMENT),
            arguments.episode_timeout,
        )
        try:
            keep_all(rollout, folder, tqdm(total=len(episodes), initial=len(done), unit="episode", smoothing=0))
        except KeyboardInterrupt:
            kept = f"{len(folder.episodes)} of {len(episodes)} episodes are kept"
            print(f"\nStopped. {kept}; the same command with --output_dir {all_sides or folder.directory} continues.")
            sys.exit(130)
        finish(folder, arguments.checkpoint, checkpoint)
    return folder, len(episodes)


def keep_all(rollout: Iterator[dict], folder: EvaluationFolder, progress: tqdm) -> None:
    """Writes every episode down as soon as it is over, with the code that played it and the way it was drawn."""
    origins = {"code": code_version(), "renderer": renderer_name()}
    with progress, contextlib.closing(rollout):
        for episode in rollout:
            folder.append(episode | origins)
            if trouble := trouble_of(episode):
                progress.write(f"task {episode['task_id']}, init state {episode['trial']}: {trouble}")
            progress.set_postfix(successes=sum(one["success"] for one in folder.episodes), refresh=False)
            progress.update()


def trouble_of(episode: dict) -> str | None:
    """Why an episode crashed, or how the policy broke it, in one line."""
    if episode["crashed"]:
        return f"crashed: {episode['error'].partition(chr(10))[0]}"
    broken = episode.get("broken_by_policy")
    return broken and f"broken off by the policy's own actions {broken}"


def finish(folder: EvaluationFolder, checkpoint_path: str | None, checkpoint: dict | None) -> None:
    """results.json, pictures and report, and the figures on the terminal."""
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
    results["side_by_side"] = side_by_side(folder.directory, results)
    write_whole(folder.directory / "results.json", json.dumps(results, indent=1) + "\n")
    report = write_report(folder.directory, results)
    for row in results["tasks"]:
        print(f"task {row['task_id']}: {figures_text(row)}  ({row['task']})")
    if overall["decision_ms_mean"]:
        mean, median = overall["decision_ms_mean"], overall["decision_ms_median"]
        print(f"decisions: {mean:.1f} ms on average, median {median:.1f} ms")
    for trouble, times in Counter(filter(None, map(trouble_of, episodes))).most_common():
        print(f"{times} x {trouble}")
    print(f"overall: {figures_text(overall)}\n\n{table_text(results['side_by_side'])}\n")
    print(f"results: {folder.directory / 'results.json'}, to look at: {report}")


# ------------------------------------------------------------------------------------------------------- settings


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Success rate of a phase-2 checkpoint in the LIBERO simulator.",
        epilog="A stopped evaluation continues when called again with the same flags and --output_dir.",
    )
    add = parser.add_argument
    # fmt: off
    add("--checkpoint", type=expanded,
        help="phase-2 checkpoint; a baseline takes its picture settings and training demos from it")
    add("--task_suite", default="libero_object", help="LIBERO or LIBERO-PRO suite (default: %(default)s)")
    add("--tasks", help="task ids such as 0,3 or 2-5 (default: all tasks of the suite)")
    add("--num_trials", type=int, help="episodes a task, each from its own init state (default: all, at most 50)")
    add("--policy", choices=("checkpoint", "replay", "zero"), default="checkpoint",
        help="who acts: the checkpoint, a training demo of the task replayed blindly, or nobody (default: %(default)s)")
    add("--demo", type=expanded, metavar="FILE[:demo_i]",
        help="for --policy replay: this demonstration, without a number the first, of the one task in --tasks")
    add("--execute_steps", type=int, help="actions executed of each chunk (default: the whole chunk)")
    add("--sample_steps", type=int, default=4, help="Euler steps of the flow (default: %(default)s)")
    add("--flow_start", choices=("noise", "zero"),
        help="integrate the flow from Gaussian noise or from its mean (default: the checkpoint's phase2.flow_start)")
    add("--max_steps", type=int, help="step limit of an episode (default: the suite's, object 280)")
    add("--shift_target", type=float, default=0.0, metavar="METRES",
        help="move the target object by up to this in x and y: who solves these has to look (default: %(default)s)")
    add("--visual_mesh_ratio", type=float, metavar="SHARE",
        help="share of the visual meshes' triangles that is drawn, 1 being LIBERO's own pictures (default: as the "
        "checkpoint's demonstrations were drawn)")
    add("--side_by_side", type=float, metavar="METRES",
        help="the policy (flow from noise, from zero), replay and standing still, from the init states and with the "
        "target shifted by up to this: eight evaluations in --output_dir and one table")
    add("--seed", type=int, default=0, help="seed of the flow's noise and of the scene (default: %(default)s)")
    add("--output_dir", type=expanded,
        help="folder of the results, continued if started (default: a new results/<suite>_<number>)")
    add("--save_video", choices=("all", "failures", "none"), nargs="?", const="all", default="none",
        help="episodes to keep as mp4, with a grid of each task; without a value all (default: %(default)s)")
    add("--num_workers", type=int, help="simulators side by side, 1.6 GB each (default: one a core, as memory allows)")
    add("--episode_timeout", type=float, default=900,
        help="seconds after which an episode counts as hung and is tried once more; the policy's time is not counted "
        "(default: %(default)s)")
    add("--shard", metavar="I/N", help="play only the I-th of N parts of the episodes, 1/N to N/N")
    add("--merge", type=expanded, nargs="+", metavar="DIR",
        help="join the folders of shards into --output_dir; nothing is played")
    add("--compare", type=expanded, nargs=2, metavar="RESULTS",
        help="pair two results.json by episode; nothing is played")
    add_set_flag(parser)
    # fmt: on
    arguments = parser.parse_args()
    arguments.task_suite = arguments.task_suite.lower()
    if arguments.merge and not arguments.output_dir:
        raise BadInput("--merge needs --output_dir, the folder of the joined results")
    if arguments.compare or arguments.merge:
        return arguments
    if arguments.policy == "checkpoint" and not arguments.checkpoint:
        raise BadInput("--checkpoint is missing; `python train.py --phase 2` writes checkpoint_best.pt")
    if arguments.policy == "replay" and not (arguments.checkpoint or arguments.demo):
        raise BadInput("--policy replay needs --demo FILE, or --checkpoint, whose training demos it then replays")
    if arguments.side_by_side is not None:
        if not 0 < arguments.side_by_side <= LARGEST_SHIFT:
            raise BadInput(f"--side_by_side {arguments.side_by_side:g}: expected 0 to {LARGEST_SHIFT} metres, not 0")
        chosen = arguments.policy != "checkpoint" or arguments.shift_target or arguments.flow_start or arguments.demo
        if not arguments.checkpoint or chosen:
            raise BadInput("--side_by_side needs --checkpoint, and chooses policy, flow start and shift itself")
    if arguments.demo and arguments.policy != "replay":
        raise BadInput("--demo belongs to --policy replay")
    return arguments


def check_numbers(arguments: argparse.Namespace, num_init_states: int) -> None:
    """Fills in the defaults that depend on the suite; raises BadInput for numbers that make no sense."""
    if arguments.num_trials is None:
        arguments.num_trials = min(num_init_states, 50)
    if arguments.max_steps is None:
        family = [limit for name, limit in STEP_LIMITS.items() if arguments.task_suite.startswith(name)]
        arguments.max_steps = max(family, default=max(STEP_LIMITS.values()))
    if arguments.seed < 0:
        raise BadInput(f"--seed {arguments.seed}: expected 0 or more")
    if not 0 <= arguments.shift_target <= LARGEST_SHIFT:
        raise BadInput(f"--shift_target {arguments.shift_target:g}: expected 0 to {LARGEST_SHIFT} metres")
    if arguments.visual_mesh_ratio is not None and not 0 < arguments.visual_mesh_ratio <= 1:
        raise BadInput(f"--visual_mesh_ratio {arguments.visual_mesh_ratio:g}: expected more than 0 and at most 1")
    if not arguments.episode_timeout > 0:
        raise BadInput(f"--episode_timeout {arguments.episode_timeout:g}: expected more than 0 seconds")
    check_range("num_trials", arguments.num_trials, num_init_states)
    check_range("max_steps", arguments.max_steps, LONGEST_EPISODE)
    for name in ("sample_steps", "num_workers"):
        if getattr(arguments, name) is not None:
            check_range(name, getattr(arguments, name))


def check_range(name: str, value: int, limit: int | None = None) -> None:
    if value < 1 or (limit is not None and value > limit):
        bounds = f"between 1 and {limit}" if limit is not None else "at least 1"
        raise BadInput(f"--{name} {value}: expected {bounds}")


def make_policy(arguments: argparse.Namespace, checkpoint: dict | None, tasks: dict[int, Task]) -> tuple:
    """Who acts, and the settings that say so."""
    settings = {"policy": arguments.policy, "image_size": 128, "visual_mesh_ratio": 1.0}
    if checkpoint:
        observation = checkpoint["observation"]
        check_observation(observation, arguments.checkpoint)
        settings |= {name: observation[name] for name in ("image_size", "visual_mesh_ratio")}
        overrides = ["training.device=auto", "training.mamba_backend=auto", *arguments.set]  # not the trainer's machine
        config = parse_config(checkpoint["config"], arguments.checkpoint, overrides)
    if arguments.visual_mesh_ratio is not None:
        settings["visual_mesh_ratio"] = arguments.visual_mesh_ratio
    if arguments.policy == "zero":
        return ZeroPolicy(arguments.max_steps), settings
    if arguments.policy == "replay":
        if arguments.demo:
            if len(tasks) > 1:
                raise BadInput(f"--demo {arguments.demo}: is of one task; choose that task with --tasks")
            chosen = dict.fromkeys(tasks, demo_of(arguments.demo))
        else:
            data, held_out = config.data, checkpoint["held_out_demos"]
            chosen = {
                task_id: training_demo(task, data.data_directory, data.demos_per_task, held_out)
                for task_id, task in tasks.items()
            }
        demos = {task_id: (path, *read_demo(path, key)) for task_id, (path, key) in chosen.items()}
        settings["demos"] = {str(task_id): f"{path.name}:{key}" for task_id, (path, key, _) in demos.items()}
        settings["actions_sha256"] = {  # files of one name can hold other demonstrations
            str(task_id): hashlib.sha256(actions.tobytes()).hexdigest() for task_id, (*_, actions) in demos.items()
        }
        return ReplayPolicy(
            {task_id: actions for task_id, (*_, actions) in demos.items()}, arguments.max_steps
        ), settings

    trained_language = LanguageTable(**checkpoint["language"])
    instructions = [task.instruction for task in tasks.values()]
    language = with_embeddings_of(instructions, trained_language)
    chunk_length = config.model.action_seq_len
    execute_steps = chunk_length if arguments.execute_steps is None else arguments.execute_steps
    check_range("execute_steps", execute_steps, chunk_length)
    flow_start = arguments.flow_start or config.training.phase2.flow_start
    device = choose_device(config.training.device)
    settings |= {
        "weights_sha256": weights_sha256(checkpoint["model_state_dict"]),
        "new_instructions": sorted(set(instructions) - trained_language.embeddings.keys()),
        "execute_steps": execute_steps,
        "sample_steps": arguments.sample_steps,
        "flow_start": flow_start,
        "device": device.type,
        "mamba_backend": choose_mamba_backend(config.training.mamba_backend, device),
    }
    with out_of_memory_named(
        f"{arguments.checkpoint}: out of memory while loading it on {device.type}; other programs may hold it"
        + (", and --set training.device=cpu needs none of the GPU's" if device.type != "cpu" else "")
    ):
        model = model_from_checkpoint(checkpoint, arguments.checkpoint)
        told = {task_id: language[task.instruction] for task_id, task in tasks.items()}
        policy = CheckpointPolicy(model, told, device, execute_steps, arguments.sample_steps, flow_start)
    return policy, settings


def check_observation(observation: dict, source: str) -> None:
    """The simulator here gives these cameras, this orientation, this state; a policy trained on others is refused."""
    provided = {"cameras": list(CAMERAS), "robot_state": list(STATE_WIDTHS), "image_orientation": "opengl"}
    for key, value in provided.items():
        if observation.get(key) != value:
            raise BadInput(f"{source}: was trained with {key} {observation.get(key)}, the simulator provides {value}")


def weights_sha256(weights: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Another simulator or another arithmetic is another evaluation."""
    packages = {"torch": importlib.metadata.version("torch")} | simulator_versions()
    return {f"version of {package}": version for package, version in packages.items()}


def episode_seed(suite: str, task_id: int, trial: int, seed: int) -> int:
    """Independent of the checkpoint: two checkpoints meet the same scene and the same noise, and can be paired."""
    return int.from_bytes(hashlib.sha256(f"{suite} {task_id} {trial} {seed}".encode()).digest()[:4], "big")


def shard_of(episodes: Sequence[Episode], shard: str | None) -> Sequence[Episode]:
    """The I-th of N parts, in one piece, so that a machine builds few tasks' environments."""
    if shard is None:
        return episodes
    part, _, parts = shard.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts) <= len(episodes)):
        raise BadInput(f"--shard {shard}: expected I/N such as 3/16, with 1 <= I <= N <= {len(episodes)} episodes")
    first, last = ((int(part) + k) * len(episodes) // int(parts) for k in (-1, 0))
    return episodes[first:last]


def choose_output_dir(arguments: argparse.Namespace) -> Path:
    """The folder that is asked for, or a new one that no evaluation started at the same time gets, too."""
    if arguments.output_dir:
        return Path(arguments.output_dir)
    results = Path("results")
    try:
        results.mkdir(exist_ok=True)
        for number in itertools.count(1):
            with contextlib.suppress(FileExistsError):
                (directory := results / f"{arguments.task_suite}_{number}").mkdir()
                return directory
    except OSError as problem:
        raise BadInput(f"{results}: not writable ({problem.strerror}); choose a folder with --output_dir") from None


def describe(settings: dict, num_episodes: int) -> str:
    """What this figure is a figure of; a subset or thinned meshes must not pass for the benchmark's own."""
    tasks, trials = len(settings["instructions"]), settings["num_trials"]
    who = {"replay": "one demonstration replayed blindly, ", "zero": "standing still, "}.get(settings["policy"], "")
    which_tasks = f"all {tasks}" if tasks == settings["tasks_of_suite"] else f"{tasks} of {settings['tasks_of_suite']}"
    which_states = f"all {trials}" if trials == settings["init_states"] else f"{trials} of {settings['init_states']}"
    title = f"{who}{settings['task_suite']}, {which_tasks} tasks x {which_states} init states"
    if settings["shift_target"]:
        title += f", target shifted by up to {1000 * settings['shift_target']:g} mm"
    if settings["shard"]:
        title += f", shard {settings['shard']}"
    if num_episodes < tasks * trials:
        title += f", only {num_episodes} of {tasks * trials} episodes"
    if settings["visual_mesh_ratio"] < 1:
        title += f", visual meshes thinned to {settings['visual_mesh_ratio']:g} (not LIBERO's own pictures)"
    if settings.get("simulator"):
        title += f", {settings['simulator']}"
    if new := settings.get("new_instructions"):
        title += f", instructions that the checkpoint was not trained on: {len(new)}"
    return title + (f", flow started from {settings['flow_start']}" if "flow_start" in settings else "")


if __name__ == "__main__":
    main()
