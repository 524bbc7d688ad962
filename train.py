"""Trains StateVLA: phase 1 learns the state z_t (temporal JEPA), phase 2 the policy on top of it (flow matching).

    python train.py --config conf/config.yaml --phase 1
    python train.py --config conf/config.yaml --phase 2 \\
        --phase1_checkpoint checkpoints/phase1_temporal_jepa/checkpoint_best.pt

    resume:        --checkpoint checkpoints/phase1_temporal_jepa/checkpoint_latest.pt
                   or --resume, which starts anew where there is none, for jobs that are started again when they end
    several GPUs:  torchrun --nproc_per_node=4 train.py --config conf/config.yaml --phase 1
    out of memory: --batch_size 32
    one setting:   --set training.phase1.num_epochs=5

An epoch is a function of (config, number of the epoch, rank): sampler, noise and schedules are derived from them. A
checkpoint says how far its epoch has come and where the noise goes on, so that a resumed run is the one that it would
have been: bit for bit on a CPU where every process has one thread, for several add up in another order every time.
"""

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Iterator

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
from dataloader import grouped, shift_pictures
from demos.hdf5 import SPLIT_RULE
from demos.language import LanguageTable, embeddings_files, same_language
from errors import BadInput, exits_on_bad_input, out_of_memory_named
from files import expanded
from jepa.mamba import choose_mamba_backend
from jepa.precision import choose_precision, in_precision
from provenance import code_version
from rollouts.evaluation import tasks_of
from statevla_model import build_trainer, count_parameters, load_encoder, load_weights
from training.bad_steps import BadSteps, demos_of
from training.checkpoint import NO_SCORE, NOT_VALIDATED, Score, check_same_run, read_checkpoint
from training.data import both_batches, fit_statistics, load_data, phase1_samples, phase2_samples
from training.interruption import Interrupted, Interruption
from training.optimizer import (
    backpropagate,
    ema_momentum,
    learning_rate_factor,
    make_optimizer,
    restore_optimizer,
    trained_by,
)
from training.processes import Processes, is_first_rank, join_processes, report, seed_noise
from training.progress import Progress
from training.run_log import (
    RunLog,
    against_divergence,
    broken,
    check_finite,
    only_training_in,
    run_directory,
    take_over_best,
)
from training.saving import LATEST, Checkpoints, check_disk_space
from training.validation import play_rollouts, validate


@exits_on_bad_input
def main() -> None:
    # Settings.
    arguments = parse_arguments()
    config, phase = load_config(arguments.config, arguments.set), arguments.phase
    latest = run_directory(config, phase) / LATEST
    resumed_from = str(latest) if arguments.resume and latest.exists() else arguments.checkpoint
    encoder_from = arguments.phase1_checkpoint if not resumed_from else None
    recipe = config.training.phase1 if phase == 1 else config.training.phase2
    resumed = read_checkpoint(resumed_from, phase) if resumed_from else None
    if resumed and not resumed["optimizer_state_dict"]:
        raise BadInput(f"{resumed_from}: holds weights alone, training cannot be resumed from it")
    if resumed and resumed.get("last_weights"):
        raise BadInput(
            f"{resumed_from}: holds an average of its last weights (training.phase2.weight_average), which this "
            "version no longer has; it can be evaluated, and resumed with the commit that trained it"
        )
    source_path: str = resumed_from or encoder_from or ""
    source = resumed or (read_checkpoint(source_path, 1) if phase == 2 else None)

    with a_run(config, phase) as processes:
        device = processes.device
        choose_mamba_backend(config.training.mamba_backend, device)
        precision = choose_precision(config.training.precision, device)

        # Data: whole demos of each task train or are held out, and stay held out in what goes on from a checkpoint.
        data = load_data(config, phase, device, source["held_out_demos"] if source else ())
        rollout_interval = config.training.phase2.rollout_interval if phase == 2 else 0
        if rollout_interval and is_first_rank():  # what would stop the rollouts stops the run here and now
            tasks_of(config.training.phase2.rollout_suite, data.told_in_demos)

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
        before = resumed.get("progress", {}) if resumed else {}

        # Samples of training demos in an order that changes with the epoch, held-out ones as they are.
        of_sample = {1: phase1_samples, 2: phase2_samples}[phase](trainer, data, config)
        batches, held_out_batches = both_batches(phase, data, config, of_sample)

        # Statistics that robot state, z and actions are normalised with: measured once, kept in the checkpoint.
        if not resumed:
            fit_statistics(trainer, data, config, of_sample)

        # Where the run stands: after so many epochs, and so many samples of the next one.
        samples_per_step = batches.order.batch_size * config.training.accumulate * processes.number
        training_samples = len(batches.order.rows)
        steps_per_epoch = training_samples // samples_per_step
        total_steps = recipe.num_epochs * steps_per_epoch
        progress = Progress(processes, samples_per_step, batches.order.batch_size, before)
        first_epoch = resumed["epoch"] if resumed else 0
        progress.check_alike(first_epoch, training_samples, source_path)
        step = (first_epoch + 1) * steps_per_epoch - (training_samples - progress.samples) // samples_per_step
        report(
            f"phase {phase}: {training_samples:,} training samples, {steps_per_epoch:,} steps an epoch "
            f"on {processes.number} process(es)"
        )
        epochs = range(first_epoch, recipe.num_epochs)
        check_disk_space(latest.parent, trainer, trained, config.training, epochs)

        ddp_trainer: nn.Module = trainer
        if device.type != "mps":  # Apple's GPUs have no process group, hence one process and nothing to synchronise
            ddp_trainer = DistributedDataParallel(
                trainer, device_ids=[device.index] if device.type == "cuda" else None, gradient_as_bucket_view=True
            )
        log = RunLog(config, phase, resumed_from)
        progress.take_over_log(log)
        checkpoints = Checkpoints(log.directory, config.training)
        advice = against_divergence(optimizer.defaults["lr"], precision == "bf16")
        bad_steps = BadSteps(config.training.max_bad_steps, advice, before.get("bad_steps", {}))
        # Best is the lowest validation loss or, where rollouts are played, the highest success, then the lowest loss.
        best = take_over_best(resumed, resumed_from, log.directory) if resumed else NO_SCORE
        if not rollout_interval:  # where none are played any more, success decides nothing
            best = Score(NO_SCORE.success, best.loss)
        # What a checkpoint keeps beside the guide's six keys: an evaluation needs no other file.
        kept_config = config.to_dict()
        if phase == 2 and source:  # the encoder's are those that it was trained with
            kept_config["training"]["phase1"] = source["config"]["training"]["phase1"]
            kept_config["data"]["scenes"] = source["config"]["data"]["scenes"]
        facts = {
            "config": kept_config,
            "phase": phase,
            "code": code_version(),
            "precision": precision,
            "observation": data.observation,
            "language": {"encoder": data.language.encoder, "embeddings": data.language.embeddings},
            "instructions": data.instructions,
            "held_out_demos": [demo.name for demo in data.held_out_demos],
            "split_rule": source.get("split_rule", 1) if source else SPLIT_RULE,  # by which they were first drawn
        }

        def checkpoint(epoch: int, samples: int, score: Score) -> dict:
            """Of the model after `epoch` epochs and `samples` samples of the next. Every process comes here."""
            return facts | {
                "epoch": epoch,
                "step": step,
                "loss": score.loss,
                "success": score.success,
                "best_loss": best.loss,  # of the best checkpoint, as best_success
                "best_success": best.success,
                "model_state_dict": trainer.state_dict(),
                "optimizer_state_dict": optimizer.state_dict(),
                "progress": progress.to_dict(samples, training_samples, log, batches.waited, bad_steps),
            }

        def save_within(epoch: int, samples: int) -> None:
            """Between two steps: a model that has no score."""
            began = time.perf_counter()
            with processes.first_alone():
                between = checkpoint(epoch, samples, NOT_VALIDATED)
                if is_first_rank():
                    checkpoints.write(between)
            log.leave_out(time.perf_counter() - began)

        def validate_and_save(epoch: int) -> None:
            """After `epoch` epochs. Nothing is saved of a model that is no longer finite."""
            nonlocal best
            began = time.perf_counter()
            seed_noise(config.training.seed, "validation")  # the same noise after every epoch
            with in_precision(precision, device):
                metrics = validate(trainer, held_out_batches)
            success = NO_SCORE.success
            if rollout_interval and epoch % rollout_interval == 0 and not broken(metrics):
                with processes.first_alone():
                    if is_first_rank():
                        pictures = log.directory / f"rollouts_{epoch}"
                        success = play_rollouts(
                            trainer, data.language, data.told_in_demos, data.observation, config, pictures
                        )
                        metrics |= {"success_rate": success} if success >= 0 else {}
            log.write_validation(epoch, step, metrics, config.model.state_dim)
            check_finite(metrics, step, advice, untouched=step == 0)
            score = Score(success, metrics["loss"])
            is_best = score.beats(best)
            best = score if is_best else best
            is_due = checkpoints.due_after(epoch, last=epoch >= recipe.num_epochs)
            signalled, due = processes.largest(interruption.number, is_due)()
            log.leave_out(time.perf_counter() - began)  # before the checkpoint keeps the log's clocks
            began = time.perf_counter()
            with processes.first_alone():
                kept = checkpoint(epoch, 0, score)
                if is_first_rank() and is_best:
                    checkpoints.keep_best(kept, for_later=not (due or signalled))
                if is_first_rank() and (due or signalled):
                    checkpoints.write(kept, after_epoch=epoch)
            log.leave_out(time.perf_counter() - began)
            if signalled and epoch < recipe.num_epochs:
                raise Interrupted(int(signalled))

        try:
            with Interruption() as interruption:
                if recipe.num_epochs == 0 and not resumed:  # the untrained model, validated and kept like any other
                    validate_and_save(0)
                for epoch in epochs:
                    samples = progress.samples if epoch == first_epoch else 0
                    batches.set_epoch(epoch, samples)
                    seed_noise(config.training.seed, epoch)
                    if samples:
                        progress.take_over_noise()
                    bar = tqdm(
                        grouped(batches, config.training.accumulate), f"phase {phase} epoch {epoch + 1}/{epochs.stop}",
                        total=steps_per_epoch, initial=step - epoch * steps_per_epoch, disable=not is_first_rank(),
                    )  # fmt: skip
                    for group in bar:
                        told = processes.largest(interruption.number, checkpoints.due_within_epoch())
                        learning_rate = optimizer.defaults["lr"] * learning_rate_factor(step, total_steps, config)
                        for settings in optimizer.param_groups:
                            settings["lr"] = learning_rate
                        if recipe.image_shift:
                            group = [
                                shift_pictures(batch, recipe.image_shift, config.model.image_size) for batch in group
                            ]
                        with in_precision(precision, device):
                            losses = ddp_trainer(*group)  # always through DDP: .module(...) skips the gradient sync
                        backpropagate(losses["loss"])
                        gradient_norm = clip_grad_norm_(trained, config.training.gradient_clip)
                        values = losses | {"gradient_norm": gradient_norm}
                        # This look waits for a GPU's step to end. Without it optimizer, target and log would
                        # each need a condition on the device. On a CPU its cost is not measurable (docs/speed.md).
                        if gradient_norm.isfinite():
                            optimizer.step()
                            if phase == 1:
                                trainer.update_target(ema_momentum(step, total_steps, config))
                            log.add(values)
                            bad_steps.in_a_row = 0
                        else:  # on every process
                            rows = batches.order.joint_rows(samples, samples_per_step)
                            bad_steps.add(step + 1, values, demos_of(rows, data.demos))
                        optimizer.zero_grad(set_to_none=True)
                        step += 1
                        samples += samples_per_step

                        if step % config.training.log_interval == 0 or step == total_steps:
                            means = log.write_training(epoch + 1, step, learning_rate, batches.waited)
                            bar.set_postfix({name: f"{value:.3g}" for name, value in means.items()})
                        signalled, due = told()
                        if signalled or due:
                            save_within(epoch, samples)
                        if signalled:
                            raise Interrupted(int(signalled))
                    if rollout_interval and (epoch + 1) % rollout_interval == 0:  # which take minutes
                        save_within(epoch, samples)
                    validate_and_save(epoch + 1)
        except Interrupted as stop:
            flags = f" with --checkpoint {latest}{' in place of --phase1_checkpoint' if encoder_from else ''}"
            report(f"\n{stop}: saved after step {step:,}; the same command{'' if arguments.resume else flags} goes on")
            sys.exit(128 + stop.number)
        finally:
            log.close()
        report(f"phase {phase}: done after {step:,} steps, best {best}, see {log.directory}")


@contextlib.contextmanager
def a_run(config: Config, phase: int) -> Iterator[Processes]:
    """The run's processes, of which this is one, while no other training is in the run's folder."""
    batch_size = config.training.batch_size
    smaller = f"try --batch_size {batch_size // 2}" if batch_size > 1 else "there is no smaller batch"
    if phase == 1 or not config.training.phase2.freeze_encoder:
        smaller += ", or --set training.activation_checkpointing=true"
    with out_of_memory_named(f"out of memory with batch_size {batch_size}; {smaller}"):
        processes = join_processes(config.training.device, config.training.rank_timeout_minutes)
        try:
            with processes.loss_named(), only_training_in(run_directory(config, phase)):
                yield processes
        finally:
            dist.destroy_process_group()


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
        metavar="PLACE",
        help="phase 2 starts from this encoder: a file, a folder of export_policy.py, hf://owner/name (default: none)",
    )
    parser.add_argument(
        "--checkpoint",
        type=expanded,
        metavar="FILE",
        help="resume from this file of the same phase (default: start anew)",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on from the run's own checkpoint_latest.pt where there is one (default: start anew)",
    )
    parser.add_argument("--batch_size", type=int, help="samples a step and process (default: training.batch_size)")
    add_config_flags(parser)
    arguments = parser.parse_args()
    if arguments.phase not in (1, 2):
        raise BadInput(f"--phase {arguments.phase}: expected 1 (temporal JEPA) or 2 (flow matching)")
    if arguments.checkpoint and arguments.resume:
        raise BadInput("--checkpoint names what to go on from and --resume looks for it; give one of them")
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
