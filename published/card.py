"""The model card of an exported policy: what it is, how to load it, its figures with the commands that give them again,
what it was trained on, and its limits. All of it is taken from the checkpoint and from evaluations of these weights."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from errors import BadInput
from observation import ROBOT_STATES
from published import FACTS
from rollouts.episodes import step_limit
from rollouts.evaluation import SAMPLE_STEPS
from rollouts.statistics import over_tasks, read_results
from simulator.suites import numbers_text
from training.checkpoint import instructions_of

HEADER = """---
license: mit
library_name: statevla
pipeline_tag: robotics
tags:
- robotics
- imitation-learning
- vision-language-action
- libero
- flow-matching
- jepa
- mamba
---
"""
LOAD = """```python
from observation import from_simulator
from simulator.env import make_env
from simulator.suites import make_suite
from statevla_model import load_checkpoint

policy = load_checkpoint("{place}")  # this folder, or hf://owner/name
env = make_env(make_suite("libero_object"), task_id=0, image_size={image_size})
env.reset(seed=0)
obs = from_simulator(env.observe())
actions = policy.decide(obs, "{instruction}")  # ({chunk}, 7)
```"""
STATES = {"joints": "the robot's joints", "end_effector": "the end effector's pose with the fingers"}


def evaluations_of(paths: Sequence[Path], sha256: str) -> dict[Path, dict]:
    """The results of these results.json. Raises BadInput for one that other weights have played, or whose figures are
    not there. Blind policies, which stand beside, have no weights."""
    found = {}
    for path in paths:
        results = read_results(path)
        if not {"overall", "tasks"} <= results.keys():
            raise BadInput(f"{path}: not a results.json of run_libero_eval.py")
        played = results["settings"].get("weights_sha256")
        if results["settings"]["policy"] == "checkpoint" and played != sha256:
            raise BadInput(f"{path}: was played by the weights {str(played)[:12]}, this checkpoint's are {sha256[:12]}")
        if results["settings"]["policy"] not in ("checkpoint", "replay", "zero"):
            raise BadInput(f"{path}: was played by another policy, {results['settings']['policy']}")
        found[path] = results
    return found


def card_of(checkpoint: dict, place: str, evaluations: Mapping[Path, dict]) -> str:
    """place: what the commands call the folder."""
    config, observation = checkpoint["config"], checkpoint["observation"]
    instructions = instructions_of(checkpoint)
    is_policy = checkpoint["phase"] == 2
    several = f"{len(instructions)} instructions" if len(instructions) > 1 else "one instruction"
    code = checkpoint.get("code", "unknown")
    trained_by = f", whose commit {code} trained it" if code != "unknown" else ""
    lines = [f"{HEADER}\n# StateVLA: {'a policy' if is_policy else 'an encoder'} for {several}\n"]
    if is_policy:
        lines += [
            f"Two cameras' pictures, {STATES[observed_state(observation)]} and an instruction go in; a chunk of "
            f"{config['model']['action_seq_len']} actions (six pose deltas and the gripper) comes out. It runs with "
            f"the StateVLA repository{trained_by}.\n",
            "## Load it\n",
            "In the repository's root, for a task of LIBERO:\n",
            LOAD.format(
                place=place, image_size=observation["image_size"], instruction=instructions[0],
                chunk=config["model"]["action_seq_len"],
            ),
            "\n## Figures\n",
            *figures(checkpoint, place, evaluations),
        ]  # fmt: skip
    else:
        lines += [
            "What phase 1 learned, without a policy. Phase 2 starts from it:\n",
            f"    python train.py --phase 2 --phase1_checkpoint {place}",
        ]
    lines += ["\n## Data and training\n", *training(checkpoint)]
    lines += ["\n## Limits\n", *limits(checkpoint, bool(evaluations))]
    return "\n".join(lines) + "\n"


def figures(checkpoint: dict, place: str, evaluations: Mapping[Path, dict]) -> list[str]:
    if not evaluations:
        return ["No evaluation was given when it was exported: how well it acts is not known."]
    lines = ["| what was played | successes | 95% interval |", "|---|---|---|"]
    for results in evaluations.values():
        overall = results["overall"]
        crashed = f", {overall['crashed']} more crashed" if overall["crashed"] else ""
        title = results["title"].replace("|", "/")
        lines.append(f"| {title} | {overall['successes']} of {overall['trials']}{crashed} | {_interval(overall)} |")
    for results in evaluations.values():
        lines += ["", f"### {results['title']}", "", "| task | successes | 95% interval |", "|---|---|---|"]
        for row in results["tasks"]:
            task = str(row["task"]).replace("|", "/")
            lines.append(f"| {task} | {row['successes']} of {row['trials']} | {_interval(row)} |")
        settings = results["settings"]
        lines += ["", "Again with:", "", f"    {command_of(settings, checkpoint, place)}"]
        versions = [f"{name.removeprefix('version of ')} {settings[name]}" for name in settings if "version of" in name]
        origins = [f"code {', '.join(map(str, results.get('code', ['unknown'])))}", *versions]
        lines += ["", f"Played with {'; '.join(origins)}."]
    return lines


def _interval(row: dict) -> str:
    low, high = (100 * bound for bound in row["interval"])
    return f"{low:.0f} to {high:.0f}%{over_tasks(row, digits=0)}"


def command_of(settings: dict, checkpoint: dict, place: str) -> str:
    """The command that plays an evaluation's episodes again; what is a flag's own value is not in it."""
    tasks = sorted(map(int, settings["instructions"]))
    flags: dict[str, object] = {"checkpoint": place, "task_suite": settings["task_suite"]}
    if settings["policy"] != "checkpoint":
        flags["policy"] = settings["policy"]
    if settings.get("demo_was_named"):
        flags["demo"] = next(iter(settings["demos"].values()))
    if len(tasks) < settings["tasks_of_suite"]:
        flags["tasks"] = numbers_text(tasks)
    if settings["random_resets"]:
        flags["random_resets"] = settings["random_resets"]
    elif settings["init_states_played"]:
        flags["init_states"] = settings["init_states_played"]
    else:
        flags["num_trials"] = settings["num_trials"]
    usual = {
        "execute_steps": checkpoint["config"]["model"]["action_seq_len"],
        "sample_steps": SAMPLE_STEPS,
        "flow_start": checkpoint["config"]["training"]["phase2"]["flow_start"],
        "precision": "fp32",
        "max_steps": step_limit(settings["task_suite"]),
        "shift_target": 0.0,
        "layouts": None,
        "visual_mesh_ratio": checkpoint["observation"]["visual_mesh_ratio"],
        "decision_delay_steps": 0,
        "seed": 0,
    }
    flags |= {name: settings[name] for name, value in usual.items() if settings.get(name, value) not in (None, value)}
    return " ".join(["python run_libero_eval.py", *(f"--{name} {value}" for name, value in flags.items())])


def training(checkpoint: dict) -> list[str]:
    config, observation, phase = checkpoint["config"], checkpoint["observation"], checkpoint["phase"]
    files = {name.rpartition("/")[0] for name in checkpoint["held_out_demos"]}
    thinned = observation["visual_mesh_ratio"]
    held_out, folders = len(checkpoint["held_out_demos"]), config["data"]["data_directory"]
    data = ", ".join(f"`{Path(folder).name}`" for folder in ([folders] if isinstance(folders, str) else folders))
    lines = [
        f"- Demonstrations: {data}, at most {config['data']['demos_per_task']} of each of {len(files)} files. "
        f"{held_out} whole demos were held out; `{FACTS}` lists them.",
        f"- Pictures: {observation['image_size']} px, seen at {config['model']['image_size']} px"
        + (f", drawn with meshes thinned to {thinned:g}." if thinned < 1 else "."),
        *labels(config),
        f"- Validation loss {checkpoint['loss']:.4f} after epoch {checkpoint['epoch']} of phase {phase}."
        if math.isfinite(checkpoint["loss"])
        else f"- Saved within epoch {checkpoint['epoch'] + 1} of phase {phase}, and not validated.",
        f"- Instructions are vectors of the encoder {checkpoint['language']['encoder']}.",
        "",
        f"Settings (`{FACTS}` has all of them):",
        "",
        "| setting | value |",
        "|---|---|",
    ]
    sections = {"model": config["model"]} | {
        f"training.phase{n}": config["training"][f"phase{n}"] for n in (1, 2) if n <= phase
    }
    for section, values in sections.items():
        lines += [f"| `{section}.{key}` | {json.dumps(value)} |" for key, value in values.items()]
    return lines


def labels(config: dict) -> list[str]:
    """What a demonstration on a real robot would not have had."""
    phase1 = config["training"]["phase1"]
    is_told = {
        "gaze": config["model"]["gaze"] and (phase1["gaze_weight"] or phase1["gaze_scenes_weight"]),
        "place": phase1["place_weight"],
    }
    told = " and ".join(name for name, told in is_told.items() if told)
    return [f"- Labels: the encoder's {told} learnt where things are from the simulator's states."] if told else []


def observed_state(observation: dict) -> str:
    """As data.robot_state names it."""
    return next(name for name, parts in ROBOT_STATES.items() if list(parts) == observation["robot_state"])


def limits(checkpoint: dict, is_evaluated: bool) -> list[str]:
    instructions, observation = instructions_of(checkpoint), checkpoint["observation"]
    lines = [
        "- It was trained on demonstrations in the LIBERO simulator, and nothing is known of a real robot.",
        f"- It expects raw pictures ({observation['image_orientation']} orientation) of the cameras "
        f"{' and '.join(observation['cameras'])}, and {STATES[observed_state(observation)]}.",
        "- One training is one sample: another seed gives another policy.",
    ]
    if is_evaluated:
        lines.append("- The figures are of the simulator and the versions named with them, and of no others.")
    these = "these instructions" if len(instructions) > 1 else "this instruction"
    lines.append(f"- It was trained on {these} and no other:")
    return lines + [f"  - {instruction}" for instruction in instructions]
