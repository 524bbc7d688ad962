"""Offline evaluation, on the demos held out in training.

    python eval.py --checkpoint checkpoints/phase2_flow_matching/checkpoint_best.pt
    python eval.py --checkpoint checkpoints/phase1_temporal_jepa/checkpoint_best.pt
    python eval.py --checkpoint checkpoints/phase2_flow_matching/checkpoint_best.pt --turning
    python eval.py --checkpoint checkpoints/phase1_temporal_jepa/checkpoint_best.pt --sight

Phase 2: how far are the predicted actions from the demonstrated ones? Prints the mean squared error per dimension (x,
y, z, rx, ry, rz, gripper) in robot units, with the error of always predicting the mean training action beside it, and
the gripper's accuracy. With --turning: does a policy look (rollouts/turning.py)? Phase 1: what does z know? Prints the
report of representation.py and draws it beside the checkpoint. With --sight: does an encoder with gaze or place see
what the words ask for (rollouts/sight.py)? The checkpoint alone says which demos were held out, how observations are
aligned and which language embeddings it knows.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from config import LARGEST, Config, add_set_flag
from dataloader import Batches, LowDimensional, chunk_rows
from demos.frames import HDF5Frames
from demos.hdf5 import Demo, load_demos, numbered_alone
from demos.language import LanguageTable
from errors import BadInput, exits_on_bad_input, out_of_memory_named
from files import expanded, unwritable_named, written_whole
from jepa.mamba import choose_mamba_backend
from provenance import code_version
from representation import draw_report, print_report, representation_report
from rollouts.policies import check_observation
from rollouts.sight import LAYOUTS_SEEN, Seen, sight
from rollouts.turning import CHANGES, turning
from simulator.env import SimulatorError
from statevla_model import StateVLA, StateVLATrainer, trainer_from_checkpoint
from training.checkpoint import config_of, instructions_of, read_checkpoint
from training.processes import choose_device

SCENES_TO_TURN_IN = 2  # random resets of each task, for --turning
SCENES_TO_SEE = 5  # random resets of each task and layout, for --sight
DIMENSIONS = ("x", "y", "z", "rx", "ry", "rz", "gripper")


@exits_on_bad_input
def main() -> None:
    arguments = parse_arguments()
    checkpoint = read_checkpoint(arguments.checkpoint)
    overrides = list(arguments.set)
    if arguments.data_directory:
        overrides.append(f"data.data_directory={arguments.data_directory}")
    if arguments.batch_size is not None:
        overrides.append(f"training.batch_size={arguments.batch_size}")
    config = config_of(checkpoint, arguments.checkpoint, overrides)
    if arguments.output and not Path(arguments.output).parent.is_dir():
        raise BadInput(f"--output {arguments.output}: no such directory {Path(arguments.output).parent}")
    if arguments.sample_steps < 1:
        raise BadInput(f"--sample_steps {arguments.sample_steps}: expected at least 1")
    if not 0 <= arguments.seed <= LARGEST:
        raise BadInput(f"--seed {arguments.seed}: expected 0 to 2^63 - 1")
    arguments.flow_start = arguments.flow_start or config.training.phase2.flow_start
    device = choose_device(config.training.device)
    choose_mamba_backend(config.training.mamba_backend, device)
    trainer = trainer_from_checkpoint(checkpoint, arguments.checkpoint).to(device)
    model = trainer.model

    reports = [f"--{name}" for name in ("turning", "sight", "representation") if getattr(arguments, name)]
    if len(reports) > 1:
        raise BadInput(f"{' and '.join(reports)}: each is all that is reported; give one of them")
    if arguments.turning:
        write_result(evaluate_turning(model, checkpoint, arguments), checkpoint, arguments.output)
        return
    if arguments.sight:
        write_result(evaluate_sight(trainer, checkpoint, arguments), checkpoint, arguments.output)
        return
    demos, observation = load_demos(config.data, config.model.action_seq_len)
    folders = ", ".join(map(str, config.data.folders))
    for key, value in checkpoint["observation"].items():
        if observation.get(key) != value:
            raise BadInput(f"{folders}: {key} is {observation.get(key)}, the checkpoint expects {value}")
    held_out = held_out_demos(demos, checkpoint["held_out_demos"], folders)
    of_encoder = checkpoint["phase"] == 1 or arguments.representation
    batch_size = config.training.batch_size
    with out_of_memory_named(f"out of memory with batch_size {batch_size}; use a smaller --batch_size"):
        if of_encoder:
            result = evaluate_representation(model, checkpoint, config, demos, held_out, arguments, device)
        else:
            result = evaluate_actions(model, checkpoint, config, held_out, arguments, device)
    write_result(result, checkpoint, arguments.output)


def write_result(result: dict, checkpoint: dict, output: str | None) -> None:
    """The figures, and the commits that they come from, as JSON where --output says so."""
    if output:
        origins = {"code": code_version(), "code_of_checkpoint": checkpoint.get("code", "unknown")}
        with unwritable_named(f"--output {output}"), written_whole(Path(output)) as stream:
            stream.write((json.dumps(result | origins, indent=2) + "\n").encode())
        print(f"written to {output}")


def evaluate_turning(model: StateVLA, checkpoint: dict, arguments: argparse.Namespace) -> dict:
    """Phase 2: does the policy look?"""
    if checkpoint["phase"] != 2:
        raise BadInput(f"--turning: {arguments.checkpoint} is of phase {checkpoint['phase']}, a policy is of phase 2")
    observation, instructions = checkpoint["observation"], instructions_of(checkpoint)
    check_observation(observation, arguments.checkpoint)

    def decide(obs: dict, instruction: str) -> np.ndarray:
        """With the same noise every time, so that a chunk changes with the scene alone."""
        noise = torch.Generator().manual_seed(arguments.seed)
        return model.decide(
            obs, instruction, sample_steps=arguments.sample_steps, flow_start=arguments.flow_start, generator=noise
        )

    chunk_length, seed = model.config.action_seq_len, arguments.seed
    try:
        figures = turning(decide, instructions, chunk_length, observation, SCENES_TO_TURN_IN, seed)
    except SimulatorError as problem:
        raise BadInput(f"--turning: the simulation broke down ({problem}); another --seed has other scenes") from None
    print("how far the chunk turns where one thing changes in a paused scene: 0 it ignores that, 1 as the expert")
    for change, found in figures.items():
        turn = "-" if found["turn"] is None else f"{found['turn']:.2f}"
        print(f"{turn:>6}  of {found['changes']:3} changes: {CHANGES[change]}")
    return {"turning": figures, "checkpoint": arguments.checkpoint, "epoch": checkpoint["epoch"]}


def evaluate_sight(trainer: StateVLATrainer, checkpoint: dict, arguments: argparse.Namespace) -> dict:
    """Either phase with gaze, phase 1 with place: does the encoder see what the words ask for?"""
    if not trainer.model.config.gaze and trainer.place is None:
        raise BadInput(f"--sight: {arguments.checkpoint} has neither model.gaze nor a head of place")
    observation, instructions = checkpoint["observation"], instructions_of(checkpoint)
    check_observation(observation, arguments.checkpoint)
    found = sight(lambda *seen: Seen(*trainer.see(*seen)), instructions, observation, SCENES_TO_SEE, arguments.seed)
    print("what the words ask for, in scenes that were never seen: found on the pictures, and told from z")
    figures = {"mm_mean": "mean", "mm_median": "median"}
    if "goal_mm_mean" in next(iter(found.values())):
        figures |= {"goal_mm_mean": "goal mean", "goal_mm_median": "median"}
    headings = "".join(f"{heading:>11}" for heading in figures.values())
    print(f"{'agentview':>14}{'eye in hand':>14}{headings}")
    for layout, one in found.items():
        pairs = zip(one["found"], one["in_view"], strict=True) if "found" in one else [("-", "-")] * 2
        cells = "".join(f"{f'{share} of {whole}':>14}" for share, whole in pairs)
        errors = "".join(f"{one[key]:>8.0f} mm" if key in one else f"{'-':>11}" for key in figures)
        print(f"{cells}{errors}  {LAYOUTS_SEEN[layout]}")
    return {"sight": found, "checkpoint": arguments.checkpoint, "epoch": checkpoint["epoch"]}


def evaluate_actions(
    model: StateVLA, checkpoint: dict, config: Config, held_out: list[Demo], arguments: argparse.Namespace,
    device: torch.device,
) -> dict:  # fmt: skip
    """Phase 2: the error of the predicted actions."""
    held_out = numbered_alone(held_out)
    rows = chunk_rows(held_out, config.model.action_seq_len)
    batches = Batches(
        rows,
        LowDimensional(held_out, LanguageTable(**checkpoint["language"]), device),
        config.model.action_seq_len,
        config.training.batch_size,
        frames=HDF5Frames(held_out, config.model.image_size),  # each is read once
    )
    start = time.perf_counter()
    predicted, demonstrated = predict_all(model, batches, arguments)
    result = compare(predicted, demonstrated, model) | {
        "checkpoint": arguments.checkpoint,
        "epoch": checkpoint["epoch"],
        "held_out_demos": len(held_out),
        "chunks": len(rows),
        "sample_steps": arguments.sample_steps,
        "flow_start": arguments.flow_start,
        "seconds": time.perf_counter() - start,
    }
    print_table(result)
    return result


def evaluate_representation(
    model: StateVLA, checkpoint: dict, config: Config, demos: list[Demo], held_out: list[Demo],
    arguments: argparse.Namespace, device: torch.device,
) -> dict:  # fmt: skip
    """Phase 1: what z knows."""
    language, unseen = LanguageTable(**checkpoint["language"]), {demo.name for demo in held_out}
    train = [demo for demo in demos if demo.name not in unseen and demo.task in language.embeddings]
    numbered = numbered_alone([*train, *held_out])
    frames = HDF5Frames(numbered, config.model.image_size)
    figures, drawn = representation_report(
        model, numbered[: len(train)], numbered[len(train) :], language, frames, config.training.batch_size, device
    )
    place = Path(arguments.checkpoint)  # an exported folder stays as it is
    picture = (place.parent if place.is_file() else Path()) / "representation.png"
    print_report(figures)
    try:
        draw_report(figures, drawn, frames, picture)
        print(f"drawn in {picture}")
    except OSError as problem:  # the checkpoint may be somebody else's
        print(f"note: {picture} cannot be written ({problem.strerror}), so nothing is drawn")
    return figures | {"checkpoint": arguments.checkpoint, "epoch": checkpoint["epoch"]}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Phase 2: offline MSE on the held-out demos. Phase 1: what the representation z knows of them."
    )
    parser.add_argument(
        "--checkpoint", required=True, type=expanded, metavar="PLACE",
        help="checkpoint of either phase: a file, a folder of export_policy.py, or hf://owner/name[@revision]",
    )  # fmt: skip
    parser.add_argument(
        "--representation", action="store_true", help="report what z knows with a phase-2 checkpoint too"
    )
    parser.add_argument(
        "--turning", action="store_true",
        help="only ask whether a phase-2 policy looks: in the simulator, without demonstrations; some minutes",
    )  # fmt: skip
    parser.add_argument(
        "--sight", action="store_true",
        help="only ask whether an encoder with gaze or place sees what the words ask for: in the simulator; a minute",
    )  # fmt: skip
    parser.add_argument(
        "--data_directory", type=expanded, metavar="DIR", help="folder of *_demo.hdf5 files (default: the checkpoint's)"
    )
    parser.add_argument("--batch_size", type=int, help="samples a forward pass (default: the checkpoint's)")
    parser.add_argument("--sample_steps", type=int, default=4, help="Euler steps of the flow (default: %(default)s)")
    parser.add_argument(
        "--flow_start", choices=("noise", "zero"),
        help="integrate from Gaussian noise or from its mean (default: the checkpoint's phase2.flow_start)",
    )  # fmt: skip
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the flow's noise, drawn batch by batch (default: %(default)s)"
    )
    parser.add_argument(
        "--output", type=expanded, metavar="FILE", help="also write the figures to this JSON file (default: print only)"
    )
    add_set_flag(parser)
    return parser.parse_args()


def held_out_demos(demos: list[Demo], names: list[str], folders: str) -> list[Demo]:
    """Exactly the demos that training held out, by name."""
    by_name = {demo.name: demo for demo in demos}
    missing = [name for name in names if name not in by_name]
    if missing:
        raise BadInput(
            f"{folders}: lacks {len(missing)} of the checkpoint's {len(names)} held-out demos, e.g. {missing[0]}"
        )
    return [by_name[name] for name in names]


@torch.no_grad()
def predict_all(model: StateVLA, batches: Batches, arguments: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Predicted and demonstrated chunks, both (n, H, 7) in robot units."""
    generator = torch.Generator().manual_seed(arguments.seed)
    predicted, demonstrated = [], []
    for batch in tqdm(batches, desc="predicting"):
        predicted.append(model.predict(batch["obs"], arguments.sample_steps, arguments.flow_start, generator).cpu())
        demonstrated.append(batch["actions"].cpu())
    return torch.cat(predicted), torch.cat(demonstrated)


def compare(predicted: Tensor, demonstrated: Tensor, model: StateVLA) -> dict:
    """Mean squared errors in robot units, of the policy and of the mean action of the training demos."""
    mse = (predicted - demonstrated).square().mean(dim=(0, 1)).tolist()
    mean_action = model.policy.normalizer.mean.cpu()
    mean_mse = (mean_action - demonstrated[..., :6]).square().mean(dim=(0, 1)).tolist()
    closed = (demonstrated[..., 6] > 0).float().mean().item()
    return {
        "mse": dict(zip(DIMENSIONS, mse, strict=True)),
        "mse_pose_mean": sum(mse[:6]) / 6,
        "mse_of_mean_action": dict(zip(DIMENSIONS[:6], mean_mse, strict=True)),
        "gripper_accuracy": (predicted[..., 6] == demonstrated[..., 6]).float().mean().item(),
        "gripper_majority": max(closed, 1 - closed),
    }


def print_table(result: dict) -> None:
    print(
        f"{result['checkpoint']}, epoch {result['epoch']}: "
        f"{result['chunks']:,} chunks of {result['held_out_demos']} held-out demos"
    )
    print(f"{'dimension':<12}{'MSE':>12}{'mean action':>14}   (robot units)")
    for name, value in result["mse"].items():
        baseline = result["mse_of_mean_action"].get(name)
        print(f"{name:<12}{value:>12.6f}" + (f"{baseline:>14.6f}" if baseline is not None else ""))
    print(
        f"gripper accuracy {result['gripper_accuracy']:.3f} "
        f"(always the more frequent command: {result['gripper_majority']:.3f})"
    )


if __name__ == "__main__":
    main()
