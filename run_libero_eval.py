"""Rolls a policy out in the LIBERO simulator, from the suite's own fixed init states.

    python run_libero_eval.py --checkpoint checkpoints/phase2_flow_matching/checkpoint_best.pt \\
        --task_suite libero_object --num_trials 50

The checkpoint alone says which cameras, picture size, robot state and language embeddings the policy was trained on.
results.json is written anew after every episode. An episode that the simulator could not finish counts as crashed, not
as failed: success rates are over the episodes that were finished.
"""

import argparse
import json
import os
import time
import traceback
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from config import parse_config
from dataloader import STATE_KEYS, LanguageTable, canonical_instruction, to_device
from errors import BadInput, exits_on_bad_input
from jepa.mamba import choose_mamba_backend
from jepa.tokenizer import CAMERAS
from libero_sim import (
    SIMULATOR_ERRORS,
    LiberoEnv,
    from_simulator,
    make_env,
    make_suite,
    parse_task_ids,
    task_init_states,
)
from rollout_video import framed, grid, upright, write_mp4
from statevla_model import StateVLA, choose_device, model_from_checkpoint, read_checkpoint

WAIT_STEPS = 10  # the objects fall into place before the policy starts
WAIT_ACTION = np.array([0.0, 0, 0, 0, 0, 0, -1])  # stand still, gripper open
STEP_LIMITS = {  # somewhat more than the longest demonstration of the suite takes
    "libero_spatial": 220,
    "libero_object": 280,
    "libero_goal": 300,
    "libero_90": 400,
    "libero_10": 520,
}
VIDEO_SIZE, VIDEO_EVERY, CONTROL_HZ = 256, 2, 20  # pixels; environment steps between video frames; steps a second


@exits_on_bad_input
def main() -> None:
    arguments = parse_arguments()
    checkpoint = read_checkpoint(arguments.checkpoint, phase=2)
    overrides = ["training.device=auto", "training.mamba_backend=auto", *arguments.set]  # not the trainer's machine
    config = parse_config(checkpoint["config"], arguments.checkpoint, overrides)
    check_observation(checkpoint["observation"], arguments.checkpoint)
    language = LanguageTable(**checkpoint["language"])
    suite = make_suite(arguments.task_suite)
    task_ids = parse_task_ids(arguments.tasks or f"0-{suite.n_tasks - 1}", suite, arguments.task_suite)
    instructions = {task_id: canonical_instruction(suite.get_task(task_id).language) for task_id in task_ids}
    for instruction in instructions.values():
        language[instruction]  # raises here and now for a task that the checkpoint has no embedding of
    init_states = {task_id: task_init_states(suite, task_id) for task_id in task_ids}
    check_numbers(arguments, config.model.action_seq_len, min(len(states) for states in init_states.values()))

    device = choose_device(config.training.device)
    choose_mamba_backend(config.training.mamba_backend, device)
    model = model_from_checkpoint(checkpoint, arguments.checkpoint).to(device)
    output_dir = make_output_dir(arguments.output_dir, arguments.task_suite)
    pictures = checkpoint["observation"]
    title = describe(arguments, task_ids, pictures["visual_mesh_ratio"])
    print(title)

    episodes = []
    progress = tqdm(total=len(task_ids) * arguments.num_trials, unit="episode")
    for task_id in task_ids:
        env, videos = None, []
        for trial in range(arguments.num_trials):
            recorder = Recorder() if arguments.save_video != "none" else None
            episode = {"task_id": task_id, "trial": trial, "seed": episode_seed(arguments.seed, task_id, trial)}
            start = time.perf_counter()
            try:
                if env is None:
                    env = make_env(suite, task_id, pictures["image_size"], pictures["visual_mesh_ratio"])
                policy = Policy(model, language[instructions[task_id]], arguments, episode["seed"], device)
                outcome = run_episode(env, policy, init_states[task_id][trial], arguments, recorder)
            except SIMULATOR_ERRORS as problem:
                outcome = {"success": False, "crashed": True, "steps": None, "error": traceback.format_exc()}
                progress.write(f"task {task_id}, trial {trial} crashed: {problem}")
                if env is not None:
                    env.close()
                env = None  # the next episode gets a simulator of its own
            episodes.append(episode | outcome | {"seconds": time.perf_counter() - start})
            wanted = arguments.save_video == "all" or not outcome["success"]
            if recorder and recorder.frames and wanted and not outcome["crashed"]:
                videos.append(recorder.save(output_dir, task_id, trial, outcome["success"]))
            write_results(output_dir, title, arguments, checkpoint, instructions, episodes)
            progress.set_postfix(successes=sum(one["success"] for one in episodes))
            progress.update()
        if env is not None:
            env.close()
        if videos:
            target = output_dir / f"task{task_id}.mp4"
            write_mp4(grid(videos), target, CONTROL_HZ // VIDEO_EVERY)
            progress.write(f"video of task {task_id}: {target}")
    progress.close()
    print_summary(instructions, episodes)
    print(f"results: {output_dir / 'results.json'}")


# ------------------------------------------------------------------------------------------------------- settings


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Success rate of a phase-2 checkpoint in the LIBERO simulator.")
    parser.add_argument("--checkpoint", required=True, help="phase-2 checkpoint to evaluate")
    parser.add_argument("--task_suite", default="libero_object", help="LIBERO benchmark suite (default: %(default)s)")
    parser.add_argument("--tasks", help="task ids such as 0,3 or 2-5 (default: all tasks of the suite)")
    parser.add_argument(
        "--num_trials",
        type=int,
        default=50,
        help="episodes a task, each from its own init state (default: %(default)s)",
    )
    parser.add_argument("--execute_steps", type=int, help="actions executed of each chunk (default: the whole chunk)")
    parser.add_argument("--sample_steps", type=int, default=4, help="Euler steps of the flow (default: %(default)s)")
    parser.add_argument(
        "--flow_start",
        choices=("noise", "zero"),
        default="noise",
        help="integrate the flow from Gaussian noise or from its mean (default: %(default)s)",
    )
    parser.add_argument("--max_steps", type=int, help="step limit of an episode (default: the suite's, object 280)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the flow's noise (default: %(default)s)")
    parser.add_argument("--output_dir", help="new folder for the results (default: results/<task_suite>_<number>)")
    parser.add_argument(
        "--save_video",
        choices=("all", "failures", "none"),
        nargs="?",
        const="all",
        default="none",
        help="episodes to keep as mp4, with a grid of each task; without a value all (default: %(default)s)",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override one setting of the checkpoint's config",
    )
    return parser.parse_args()


def check_numbers(arguments: argparse.Namespace, chunk_length: int, num_init_states: int) -> None:
    """Fills in the defaults that depend on checkpoint and suite; raises BadInput for numbers that make no sense."""
    if arguments.seed < 0:
        raise BadInput(f"--seed {arguments.seed}: expected 0 or more")
    if arguments.execute_steps is None:
        arguments.execute_steps = chunk_length
    if arguments.max_steps is None:
        family = [limit for name, limit in STEP_LIMITS.items() if arguments.task_suite.startswith(name)]
        arguments.max_steps = max(family, default=max(STEP_LIMITS.values()))
    for name, limit in (
        ("num_trials", num_init_states),
        ("execute_steps", chunk_length),
        ("sample_steps", None),
        ("max_steps", None),
    ):
        value = getattr(arguments, name)
        if value < 1 or (limit is not None and value > limit):
            bounds = f"between 1 and {limit}" if limit is not None else "at least 1"
            raise BadInput(f"--{name} {value}: expected {bounds}")


def check_observation(observation: dict, source: str) -> None:
    """The simulator here gives these cameras, this orientation, this state; a policy trained on others is refused."""
    provided = {"cameras": list(CAMERAS), "robot_state": list(STATE_KEYS), "image_orientation": "opengl"}
    for key, value in provided.items():
        if observation.get(key) != value:
            raise BadInput(f"{source}: was trained with {key} {observation.get(key)}, the simulator provides {value}")


def make_output_dir(chosen: str | None, suite: str) -> Path:
    if chosen is None:
        number = 1
        while (directory := Path("results") / f"{suite}_{number}").exists():
            number += 1
    else:
        directory = Path(chosen)
        if (directory / "results.json").exists():
            raise BadInput(f"--output_dir {directory}: already holds a results.json; choose another folder")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / ".writable").touch()
        (directory / ".writable").unlink()
    except OSError as problem:
        raise BadInput(f"--output_dir {directory}: not writable ({problem.strerror})") from None
    return directory


def describe(arguments: argparse.Namespace, task_ids: list[int], visual_mesh_ratio: float) -> str:
    """What this figure is a figure of; a subset or thinned meshes must not pass for the benchmark's own."""
    title = f"{arguments.task_suite}, {len(task_ids)} task(s) x {arguments.num_trials} trials"
    if visual_mesh_ratio < 1:
        title += f", visual meshes thinned to {visual_mesh_ratio:g} (not LIBERO's own pictures)"
    return title + f", flow started from {arguments.flow_start}"


# -------------------------------------------------------------------------------------------------------- episodes


def episode_seed(seed: int, task_id: int, trial: int) -> int:
    return int(np.random.SeedSequence([seed, task_id, trial]).generate_state(1)[0])


class Policy:
    """The model as seen from the simulator: one unbatched observation in, the actions to execute out."""

    def __init__(
        self, model: StateVLA, language: torch.Tensor, arguments: argparse.Namespace, seed: int, device: torch.device
    ):
        self.model, self.language, self.arguments, self.device = model, language, arguments, device
        self.generator = torch.Generator().manual_seed(seed)
        self.seconds: list[float] = []

    def __call__(self, obs: dict[str, np.ndarray]) -> np.ndarray:
        """obs as libero_sim.from_simulator gives it -> (execute_steps, 7) float64."""
        start = time.perf_counter()
        batch = {name: torch.from_numpy(np.ascontiguousarray(value))[None] for name, value in obs.items()}
        batch["language"] = self.language[None]
        chunk = self.model.predict(
            to_device(batch, self.device), self.arguments.sample_steps, self.arguments.flow_start, self.generator
        )
        actions = chunk[0, : self.arguments.execute_steps].cpu().double().numpy()
        self.seconds.append(time.perf_counter() - start)
        return actions


class Recorder:
    """Keeps the frames of one episode for people."""

    def __init__(self):
        self.frames: list[np.ndarray] = []

    def __call__(self, env: LiberoEnv, step: int) -> None:
        if step % VIDEO_EVERY == 0:
            self.frames.append(upright(env.draw(env.poses(), VIDEO_SIZE, ("agentview",))["agentview_image"]))

    def save(self, output_dir: Path, task_id: int, trial: int, success: bool) -> list[np.ndarray]:
        outcome = "success" if success else "failure"
        frames = framed(self.frames, success)
        write_mp4(frames, output_dir / f"task{task_id}_trial{trial}_{outcome}.mp4", CONTROL_HZ // VIDEO_EVERY)
        return frames


def run_episode(
    env: LiberoEnv, policy: Policy, init_state: np.ndarray, arguments: argparse.Namespace, recorder: Recorder | None
) -> dict:
    """One rollout. Pictures are drawn only when a new chunk is due, or for the video."""
    env.reset(seed=policy.generator.initial_seed())
    env.set_init_state(init_state)
    for _ in range(WAIT_STEPS):
        env.step(WAIT_ACTION)
    steps, success = 0, False
    while steps < arguments.max_steps and not success:
        for action in policy(from_simulator(env.observe())):
            if recorder:
                recorder(env, steps)
            success = env.step(action)
            steps += 1
            if success or steps >= arguments.max_steps:
                break
    if recorder:
        recorder(env, 0)  # the last state, always
    latency = 1000 * float(np.mean(policy.seconds))
    return {"success": success, "crashed": False, "steps": steps, "decision_ms": latency}


# --------------------------------------------------------------------------------------------------------- results


def summarise(instructions: dict[int, str], episodes: list[dict]) -> list[dict]:
    rows = []
    for task_id, instruction in instructions.items():
        own = [episode for episode in episodes if episode["task_id"] == task_id]
        finished = [episode for episode in own if not episode["crashed"]]
        successes = sum(episode["success"] for episode in finished)
        rows.append(
            {
                "task_id": task_id,
                "task": instruction,
                "successes": successes,
                "trials": len(finished),
                "crashed": len(own) - len(finished),
                "success_rate": successes / len(finished) if finished else None,
            }
        )
    return rows


def write_results(
    output_dir: Path, title: str, arguments: argparse.Namespace, checkpoint: dict, instructions: dict, episodes: list
) -> None:
    finished = [episode for episode in episodes if not episode["crashed"]]
    results = {
        "title": title,
        "checkpoint": arguments.checkpoint,
        "checkpoint_epoch": checkpoint["epoch"],
        "arguments": {name: value for name, value in vars(arguments).items() if name != "checkpoint"},
        "success_rate": sum(episode["success"] for episode in finished) / len(finished) if finished else None,
        "crashed": len(episodes) - len(finished),
        "tasks": summarise(instructions, episodes),
        "episodes": episodes,
    }
    part = output_dir / "results.json.part"
    part.write_text(json.dumps(results, indent=2) + "\n")
    os.replace(part, output_dir / "results.json")


def print_summary(instructions: dict[int, str], episodes: list[dict]) -> None:
    rows = summarise(instructions, episodes)
    for row in rows:
        crashes = f", {row['crashed']} crashed" if row["crashed"] else ""
        print(f"task {row['task_id']}: {row['successes']}/{row['trials']} successes{crashes}  ({row['task']})")
    successes, trials = sum(row["successes"] for row in rows), sum(row["trials"] for row in rows)
    crashed = sum(row["crashed"] for row in rows)
    rate = f" = {successes / trials:.1%}" if trials else ""
    print(f"overall: {successes}/{trials} successes{rate}" + (f", {crashed} crashed" if crashed else ""))


if __name__ == "__main__":
    main()
