"""Trains StateVLA: phase 1 learns the state z_t (temporal JEPA), phase 2 the policy on top of it (flow matching).

    python train.py --config conf/config.yaml --phase 1
    python train.py --config conf/config.yaml --phase 2 \\
        --phase1_checkpoint checkpoints/phase1_temporal_jepa/checkpoint_best.pt

    resume:        --checkpoint checkpoints/phase1_temporal_jepa/checkpoint_latest.pt
    several GPUs:  torchrun --nproc_per_node=4 train.py --config conf/config.yaml --phase 1
    out of memory: --batch_size 32
    one setting:   --set training.phase1.num_epochs=5

An epoch is a function of (config, number of the epoch, rank): sampler, noise and schedules are derived from them, so a
resumed run continues exactly where the interrupted one was.
"""

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

# OpenMP's threads wait for each other many hundred times a step, and GCC's spin for up to 20 ms before they sleep.
# Beside other programs on the same cores the thread that they wait for does not run meanwhile, and a step takes several
# times as long. A thousand turns, some 50 us, span the gaps of a step where the cores are free. OpenMP reads it when
# torch is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from config import Config, add_config_flags, load_config
from dataloader import Batches, LowDimensional, chunk_rows, every_frame, frame_rows, shift_pictures, transition_rows
from demos.frames import DeviceFrames, Frames, open_frames
from demos.hdf5 import SPLIT_RULE, Demo, load_demos, split_demos
from demos.language import LanguageTable, embeddings_files, load_languages, same_language
from demos.states import encode_all, frozen_states
from errors import BadInput, exits_on_bad_input, out_of_memory_named
from files import expanded
from jepa.mamba import choose_mamba_backend
from jepa.precision import choose_precision, in_precision
from jepa.temporal_predictor import FORESIGHT
from provenance import code_version
from rollouts.evaluation import tasks_of
from statevla_model import StateVLATrainer, build_trainer, count_parameters, load_encoder, load_weights
from training.checkpoint import NO_SCORE, Score, check_same_run, read_checkpoint, save_checkpoint
from training.optimizer import (
    ema_momentum,
    learning_rate_factor,
    make_optimizer,
    restore_optimizer,
    trained_by,
)
from training.processes import is_first_rank, join_processes, report, seed_noise
from training.run_log import RunLog, broken, check_finite, only_training_in, run_directory, take_over_best
from training.validation import play_rollouts, validate


@exits_on_bad_input
def main() -> None:
    # Settings.
    arguments = parse_arguments()
    config, phase = load_config(arguments.config, arguments.set), arguments.phase
    resumed_from, encoder_from = arguments.checkpoint, arguments.phase1_checkpoint
    recipe = config.training.phase1 if phase == 1 else config.training.phase2
    resumed = read_checkpoint(resumed_from, phase) if resumed_from else None
    if resumed and not resumed["optimizer_state_dict"]:
        raise BadInput(f"{resumed_from}: holds weights alone, training cannot be resumed from it")
    source = resumed or (read_checkpoint(encoder_from, 1) if phase == 2 else None)
    source_path = resumed_from or encoder_from

    with a_run(config, phase) as device:
        choose_mamba_backend(config.training.mamba_backend, device)
        precision = choose_precision(config.training.precision, device)

        # Data: whole demos of each task train or are held out, and stay held out in what goes on from a checkpoint.
        data = load_data(config, phase, device, source["held_out_demos"] if source else ())
        rollout_interval = config.training.phase2.rollout_interval if phase == 2 else 0
        if rollout_interval and is_first_rank():  # what would stop the rollouts stops the run here and now
            tasks_of(config.training.phase2.rollout_suite, list(data.language.embeddings))

        # Model and what of it this phase trains. Weights come from the checkpoint: strictly, or not at all.
        torch.manual_seed(config.training.seed)
        trainer = build_trainer(config, phase)
        if source:
            held_out = {demo.name for demo in data.held_out_demos}
            for note in check_same_run(
                source, source_path, config.to_dict(), data.observation, held_out, bool(resumed)
            ):
                report(f"note: {note}")
            if resumed and resumed.get("precision", precision) != precision:
                report(f"note: it was trained in {resumed['precision']} so far, and goes on in {precision}")
            where = ", ".join(map(str, embeddings_files(config.data)))
            same_language(data.language, LanguageTable(**source["language"]), where)
        if resumed:
            load_weights(trainer, resumed["model_state_dict"], source_path)
        elif source:
            load_encoder(trainer.model, source, source_path)
        trainer.to(device)
        trained = trained_by(trainer)
        num_trained = sum(parameter.numel() for parameter in trained)
        report(
            f"phase {phase}: {num_trained:,} parameters train, {count_parameters(trainer) - num_trained:,} are frozen"
        )

        optimizer = make_optimizer(
            trainer, recipe.learning_rate or config.training.learning_rate, config.training.weight_decay
        )
        if resumed:
            restore_optimizer(optimizer, resumed["optimizer_state_dict"])

        # Samples of training demos in an order that changes with the epoch, held-out ones as they are.
        samples = {1: phase1_samples, 2: phase2_samples}[phase](trainer, data, config)
        batches, held_out_batches = both_batches(phase, data, config, samples)

        # Statistics that robot state, z and actions are normalised with: measured once, kept in the checkpoint.
        if not resumed:
            fit_statistics(trainer, data, config, samples)

        total_steps = recipe.num_epochs * len(batches)
        report(
            f"phase {phase}: {len(batches.order.rows):,} training samples, {len(batches):,} steps an epoch "
            f"on {dist.get_world_size()} process(es)"
        )

        ddp_trainer: nn.Module = trainer
        if device.type != "mps":  # Apple's GPUs have no process group, hence one process and nothing to synchronise
            ddp_trainer = DistributedDataParallel(
                trainer, device_ids=[device.index] if device.type == "cuda" else None, gradient_as_bucket_view=True
            )
        first_epoch = resumed["epoch"] if resumed else 0
        step = first_epoch * len(batches)
        log = RunLog(config, phase, resumed_from)
        # Best is the lowest validation loss or, where rollouts are played, the highest success, then the lowest loss.
        best = take_over_best(resumed, resumed_from, log.directory) if resumed else NO_SCORE
        if not rollout_interval:  # where none are played any more, success decides nothing
            best = Score(NO_SCORE.success, best.loss)
        # What a checkpoint keeps beside the guide's six keys: an evaluation needs no other file.
        facts = {
            "config": config.to_dict(),
            "phase": phase,
            "code": code_version(),
            "precision": precision,
            "observation": data.observation,
            "language": {"encoder": data.language.encoder, "embeddings": data.language.embeddings},
            "held_out_demos": [demo.name for demo in data.held_out_demos],
            "split_rule": source.get("split_rule", 1) if source else SPLIT_RULE,  # by which they were first drawn
        }

        def validate_and_save(epoch: int) -> None:
            """After `epoch` epochs. Nothing is saved of a model that is no longer finite."""
            nonlocal best
            began = time.perf_counter()
            seed_noise(config.training.seed, "validation")  # the same noise after every epoch
            with in_precision(precision, device):
                metrics = validate(trainer, held_out_batches)
            success = NO_SCORE.success
            if rollout_interval and epoch % rollout_interval == 0 and is_first_rank() and not broken(metrics):
                pictures = log.directory / f"rollouts_{epoch}"
                success = play_rollouts(trainer, data.language, data.observation, config, pictures)
                metrics |= {"success_rate": success} if success >= 0 else {}
            log.write_validation(epoch, step, metrics, config.model.state_dim)
            check_finite(metrics, step, optimizer.defaults["lr"], precision == "bf16", untouched=step == 0)
            score = Score(success, metrics["loss"])
            is_best = score.beats(best)
            best = score if is_best else best
            if is_first_rank():
                checkpoint = facts | {
                    "epoch": epoch,
                    "step": step,
                    "loss": metrics["loss"],
                    "success": score.success,
                    "best_loss": best.loss,  # of the best checkpoint, as best_success
                    "best_success": best.success,
                    "model_state_dict": trainer.state_dict(),
                    "optimizer_state_dict": optimizer.state_dict(),
                }
                if epoch and epoch % config.training.save_interval == 0:
                    save_checkpoint(checkpoint, log.directory / f"checkpoint_epoch_{epoch}.pt")
                if is_best:
                    save_checkpoint(checkpoint, log.directory / "checkpoint_best.pt")
                # The last one: a run that is resumed from it has everything that it says there is.
                save_checkpoint(checkpoint, log.directory / "checkpoint_latest.pt")
            dist.barrier()
            log.leave_out(time.perf_counter() - began)

        try:
            if recipe.num_epochs == 0 and not resumed:  # the untrained model, validated and kept like any other
                validate_and_save(0)
            for epoch in range(first_epoch, recipe.num_epochs):
                batches.set_epoch(epoch)
                seed_noise(config.training.seed, epoch)
                title = f"phase {phase} epoch {epoch + 1}/{recipe.num_epochs}"
                progress = tqdm(batches, desc=title, disable=not is_first_rank())
                for batch in progress:
                    learning_rate = optimizer.defaults["lr"] * learning_rate_factor(step, total_steps, config)
                    for group in optimizer.param_groups:
                        group["lr"] = learning_rate
                    if recipe.image_shift:
                        batch = shift_pictures(batch, recipe.image_shift, config.model.image_size)
                    with in_precision(precision, device):
                        losses = ddp_trainer(batch)  # always through DDP: .module(...) skips the gradient sync
                    losses["loss"].backward()
                    gradient_norm = clip_grad_norm_(trained, config.training.gradient_clip)
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                    if phase == 1:
                        trainer.update_target(ema_momentum(step, total_steps, config))
                    step += 1

                    log.add(losses | {"gradient_norm": gradient_norm})
                    if step % config.training.log_interval == 0 or step == total_steps:
                        means = log.write_training(epoch + 1, step, learning_rate, batches.waited)
                        check_finite(means, step, learning_rate, precision == "bf16", untouched=step == 1)
                        progress.set_postfix({name: f"{value:.3g}" for name, value in means.items()})
                validate_and_save(epoch + 1)
        except KeyboardInterrupt:
            latest = log.directory / "checkpoint_latest.pt"
            goes_on_from = latest if latest.exists() else resumed_from
            instead = " in place of --phase1_checkpoint" if phase == 2 and not resumed_from else ""
            same = f"the same command with --checkpoint {goes_on_from}{instead} goes on"
            report(f"\nstopped at step {step:,}; {same if goes_on_from else 'no epoch was finished'}")
            sys.exit(130)
        finally:
            log.close()
        report(f"phase {phase}: done after {step:,} steps, best {best}, see {log.directory}")


@contextlib.contextmanager
def a_run(config: Config, phase: int) -> Iterator[torch.device]:
    """This process's device, while it is one of the run's processes and no other training is in the run's folder."""
    batch_size = config.training.batch_size
    smaller = f"try --batch_size {batch_size // 2}" if batch_size > 1 else "there is no smaller batch"
    if phase == 1 or not config.training.phase2.freeze_encoder:
        smaller += ", or --set training.activation_checkpointing=true"
    with out_of_memory_named(f"out of memory with batch_size {batch_size}; {smaller}"):
        device = join_processes(config.training.device)
        try:
            with only_training_in(run_directory(config, phase)):
                yield device
        finally:
            dist.destroy_process_group()


# ----------------------------------------------------------------------------------------------------------- data


@dataclass(frozen=True)
class Data:
    """The demonstrations of a run, how they are split, what they were recorded with, and what of them is in memory."""

    demos: list[Demo]  # in the order of their rows
    train_demos: list[Demo]
    held_out_demos: list[Demo]
    observation: dict
    language: LanguageTable
    low_dimensional: LowDimensional


def load_data(config: Config, phase: int, device: torch.device, held_out: Sequence[str]) -> Data:
    """`held_out` are the demos that the checkpoint which this run goes on from has held out."""
    min_actions = config.model.prediction_gap if phase == 1 else config.model.action_seq_len
    demos, observation = load_demos(config.data, min_actions)
    train_demos, held_out_demos = split_demos(demos, config.data.train_split, config.data.split_seed, held_out)
    of_folders = {folder: [demo for demo in demos if demo.path.parent == folder] for folder in config.data.folders}
    language = load_languages(config.data, demos, config.model.lang_emb_dim)
    tasks = {demo.task for demo in demos}
    report(f"data: {len(tasks)} task(s), {len(train_demos)} demos train, {len(held_out_demos)} are held out")
    forced = "" if config.data.obs_alignment == "auto" else ", as data.obs_alignment says"
    for folder, found in of_folders.items():
        which = f"{folder}: {len(found)} demos, {found[0].image_size} px, " if len(of_folders) > 1 else ""
        report(f"data: {which}obs[t] was recorded {('before', 'after')[found[0].lag]} actions[t]{forced}")
    low_dimensional = LowDimensional(demos, language, device)
    return Data(demos, train_demos, held_out_demos, observation, language, low_dimensional)


def phase1_samples(trainer: StateVLATrainer, data: Data, config: Config) -> dict:
    """What Batches makes a sample of: a frame, the one K later, the actions between them, the robot's state ahead."""
    gap, device = config.model.prediction_gap, data.low_dimensional.device
    return {
        "num_actions": gap,
        "gap": gap,
        "ahead": FORESIGHT if trainer.foresight else (),
        "frames": open_frames(data.demos, config.data, config.model.image_size, device),
    }


def phase2_samples(trainer: StateVLATrainer, data: Data, config: Config) -> dict:
    """What Batches makes a sample of: a state z_t, or the frame to make it from, and the actions to come.

    A frozen encoder sees every frame once and epochs run on its states. Where the pictures or the encoder change from
    step to step, no state can be kept."""
    recipe, batch_size, device = config.training.phase2, config.training.batch_size, data.low_dimensional.device
    samples = {"num_actions": config.model.action_seq_len}

    def frames() -> Frames | DeviceFrames:
        return open_frames(data.demos, config.data, config.model.image_size, device)

    if not (recipe.store_states and recipe.freeze_encoder and not recipe.image_shift):
        return samples | {"frames": frames()}
    directory = Path(config.training.checkpoint_directory) / "frozen_states"
    states = frozen_states(
        trainer.model, data.demos, data.low_dimensional.language,
        lambda: every_frame(data.demos, data.low_dimensional, frames(), batch_size), directory,
    )  # fmt: skip
    return samples | {"states": states}


def both_batches(phase: int, data: Data, config: Config, samples: dict) -> tuple[Batches, Batches]:
    """Training and held-out batches. Raises BadInput where VICReg would take the variance of a single row, or a process
    has nothing to validate."""
    batch_size, gap, chunk_length = config.training.batch_size, config.model.prediction_gap, config.model.action_seq_len
    train_rows, held_out_rows = (
        transition_rows(demos, gap) if phase == 1 else chunk_rows(demos, chunk_length)
        for demos in (data.train_demos, data.held_out_demos)
    )
    batches = Batches(train_rows, data.low_dimensional, batch_size=batch_size, seed=config.training.seed, **samples)
    held_out_batches = Batches(held_out_rows, data.low_dimensional, batch_size=batch_size, **samples)
    ranks = batches.order.ranks
    least = max(2, ranks) if phase == 1 else ranks
    if phase == 1 and batch_size * ranks < 2:
        raise BadInput(
            f"training.batch_size is {batch_size}: phase 1 takes the variance of z over the batch and needs at least 2 "
            "samples; use --batch_size 2 or more"
        )
    if len(held_out_rows) < least:
        raise BadInput(
            f"the held-out demos give {len(held_out_rows)} sample(s), phase {phase} on {ranks} process(es) needs at "
            f"least {least}; lower data.train_split or use longer demos"
        )
    return batches, held_out_batches


def fit_statistics(trainer: StateVLATrainer, data: Data, config: Config, samples: dict) -> None:
    """Of the training demos: phase 1's of the robot state that foresight foretells, phase 2's of z and of actions."""
    if trainer.phase == 1:
        if trainer.foresight:
            rows = frame_rows(data.train_demos).to(data.low_dimensional.device)
            trainer.robot_normalizer.fit(data.low_dimensional.robot_ahead(rows, frames=[0]).squeeze(1))
        return
    states = samples.get("states")
    if states is None:  # the encoder's at the start: it is trained on, or its pictures move
        batches = every_frame(data.demos, data.low_dimensional, samples["frames"], config.training.batch_size)
        states = encode_all(trainer.model, data.demos, batches)
    trainer.model.state_scaling.fit(states[frame_rows(data.train_demos)], config.training.phase2.state_scaling)
    trainer.model.policy.normalizer.fit(torch.cat([demo.actions[:, :6] for demo in data.train_demos]))


# ------------------------------------------------------------------------------------------------------- settings


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Trains phase 1 (temporal JEPA) or phase 2 (flow matching) of StateVLA.",
        epilog="Several GPUs: torchrun --nproc_per_node=N train.py ...",
    )
    parser.add_argument("--phase", type=int, required=True, help="1: encoder and predictor; 2: policy, encoder frozen")
    parser.add_argument(
        "--phase1_checkpoint",
        type=expanded,
        metavar="FILE",
        help="phase 2 starts from the encoder in this file (default: none)",
    )
    parser.add_argument(
        "--checkpoint",
        type=expanded,
        metavar="FILE",
        help="resume from this file of the same phase (default: start anew)",
    )
    parser.add_argument("--batch_size", type=int, help="samples a step and process (default: training.batch_size)")
    add_config_flags(parser)
    arguments = parser.parse_args()
    if arguments.phase not in (1, 2):
        raise BadInput(f"--phase {arguments.phase}: expected 1 (temporal JEPA) or 2 (flow matching)")
    if arguments.phase == 2 and not (arguments.phase1_checkpoint or arguments.checkpoint):
        raise BadInput(
            "phase 2 needs the encoder of phase 1: run `python train.py --phase 1`, then give "
            "--phase1_checkpoint checkpoints/phase1_temporal_jepa/checkpoint_best.pt"
        )
    if arguments.phase1_checkpoint and (arguments.phase == 1 or arguments.checkpoint):
        raise BadInput("--phase1_checkpoint starts phase 2 anew; it goes neither with --phase 1 nor with --checkpoint")
    if arguments.batch_size is not None:
        arguments.set.append(f"training.batch_size={arguments.batch_size}")
    return arguments


if __name__ == "__main__":
    main()
