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
import functools
import json
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from config import Config, load_config
from dataloader import (
    Batches,
    Demo,
    LanguageTable,
    LowDimensional,
    chunk_rows,
    embeddings_file,
    frame_rows,
    gather_rows,
    load_demos,
    load_language,
    same_language,
    shift_pictures,
    split_demos,
    transition_rows,
)
from errors import BadInput, exits_on_bad_input
from frame_cache import open_frames
from frozen_states import encode_all, frozen_states
from jepa.mamba import choose_mamba_backend
from jepa.temporal_predictor import FORESIGHT, representation_health
from statevla_model import (
    StateVLATrainer,
    build_trainer,
    choose_device,
    count_parameters,
    load_encoder,
    load_weights,
    read_checkpoint,
    save_checkpoint,
)

PHASE_DIRECTORIES = {1: "phase1_temporal_jepa", 2: "phase2_flow_matching"}
COLLAPSED_STD = 0.1  # a mean std of z below this (VICReg pulls it towards 1), or an effective rank
COLLAPSED_RANK = 0.05  # below this share of the dimensions, is warned about


@exits_on_bad_input
def main() -> None:
    # Settings.
    arguments = parse_arguments()
    config, phase = load_config(arguments.config, arguments.set), arguments.phase
    resumed = read_checkpoint(arguments.checkpoint, phase) if arguments.checkpoint else None
    if resumed and not resumed["optimizer_state_dict"]:
        raise BadInput(f"{arguments.checkpoint}: holds weights alone, training cannot be resumed from it")
    source = resumed or (read_checkpoint(arguments.phase1_checkpoint, 1) if phase == 2 else None)
    source_path = arguments.checkpoint or arguments.phase1_checkpoint
    device = join_processes(config.training.device)
    choose_mamba_backend(config.training.mamba_backend, device)

    # Data: whole demos of each task train or are held out.
    data = load_data(config, phase)

    # Model and what of it this phase trains. Weights come from the checkpoint: strictly, or not at all.
    torch.manual_seed(config.training.seed)
    trainer = build_trainer(config, phase)
    if source:
        check_same_run(source, source_path, config, data, resumes=bool(resumed))
    if resumed:
        load_weights(trainer, resumed["model_state_dict"], source_path)
    elif source:
        load_encoder(trainer.model, source, source_path)
    trainer.to(device)
    optimizer = make_optimizer(
        trainer,
        phase_settings(config, phase).learning_rate or config.training.learning_rate,
        config.training.weight_decay,
    )
    if resumed:
        restore_optimizer(optimizer, resumed["optimizer_state_dict"])
    trains = sum(parameter.numel() for parameter in trained_by(trainer))
    report(f"phase {phase}: {trains:,} parameters train, {count_parameters(trainer) - trains:,} are frozen")

    # Batches. What z and actions are normalised with is measured on them once and is kept in the checkpoint.
    make_batches = {1: phase1_batches, 2: phase2_batches}[phase]
    batches, held_out_batches = make_batches(trainer, data, config, device, fit_statistics=not resumed)
    report(
        f"phase {phase}: {len(batches.rows):,} training samples, {len(batches):,} steps an epoch "
        f"on {dist.get_world_size()} process(es)"
    )

    training = Training(trainer, optimizer, batches, held_out_batches, config, data, device)
    try:
        training.run(resumed, arguments.checkpoint)
    finally:
        dist.destroy_process_group()


# ----------------------------------------------------------------------------------------------------------- data


@dataclass(frozen=True)
class Data:
    """The demonstrations of a run, how they are split, and what they were recorded with."""

    demos: list[Demo]  # in the order of their rows
    train_demos: list[Demo]
    held_out_demos: list[Demo]
    observation: dict
    language: LanguageTable


def load_data(config: Config, phase: int) -> Data:
    min_actions = phase1_reach(config) if phase == 1 else config.model.action_seq_len
    demos, observation = load_demos(config.data, min_actions)
    train_demos, held_out_demos = split_demos(demos, config.data.train_split, config.data.split_seed)
    tasks = sorted({demo.task for demo in demos})
    language = load_language(embeddings_file(config.data), tasks, config.model.lang_emb_dim)
    forced = "" if config.data.obs_alignment == "auto" else ", as data.obs_alignment says"
    report(f"data: {len(tasks)} task(s), {len(train_demos)} demos train, {len(held_out_demos)} are held out")
    report(f"data: obs[t] was recorded {observation['obs_alignment']} actions[t]{forced}")
    return Data(demos, train_demos, held_out_demos, observation, language)


def phase1_reach(config: Config) -> int:
    """Frames from the first to the last of a sample of phase 1."""
    return config.model.prediction_gap * config.training.phase1.rollout_length


def phase1_batches(
    trainer: StateVLATrainer, data: Data, config: Config, device: torch.device, fit_statistics: bool
) -> tuple[Batches, Batches]:
    """Training and held-out samples of phase 1: frames, the actions between them, the robot's state ahead."""
    low_dimensional, reach = LowDimensional(data.demos, data.language, device), phase1_reach(config)
    if trainer.foresight and fit_statistics:
        now = low_dimensional.robot_ahead(frame_rows(data.train_demos).to(device), frames=[0])
        trainer.robot_normalizer.fit(now.squeeze(1))
    options = {
        "low_dimensional": low_dimensional,
        "num_actions": reach,
        "gap": config.model.prediction_gap,
        "rollout_length": config.training.phase1.rollout_length,
        "ahead": FORESIGHT if trainer.foresight else (),
        "frames": open_frames(data.demos, config.data, config.model.image_size, device),
    }
    rows = (transition_rows(demos, reach) for demos in (data.train_demos, data.held_out_demos))
    return both_batches(*rows, config, options)


def phase2_batches(
    trainer: StateVLATrainer, data: Data, config: Config, device: torch.device, fit_statistics: bool
) -> tuple[Batches, Batches]:
    """Training and held-out samples of phase 2: a state z_t, or the frame to make it from, and the actions to come.

    A frozen encoder sees every frame once, epochs run on its states. Where pictures or encoder change from step to step
    no state can be kept: z is needed once, for its statistics."""
    low_dimensional, chunk_length = LowDimensional(data.demos, data.language, device), config.model.action_seq_len
    options = {"low_dimensional": low_dimensional, "num_actions": chunk_length}
    frames = functools.cache(lambda: open_frames(data.demos, config.data, config.model.image_size, device))
    recipe, batch_size, states = config.training.phase2, config.training.batch_size, None
    if recipe.store_states and recipe.freeze_encoder and not recipe.image_shift:
        states_directory = Path(config.training.checkpoint_directory) / "frozen_states"
        states = frozen_states(trainer.model, data.demos, low_dimensional, frames, batch_size, states_directory)
        options["states"] = states
    else:
        options["frames"] = frames()
        if fit_statistics:
            states = encode_all(trainer.model, data.demos, low_dimensional, frames(), batch_size)
    if fit_statistics:
        trainer.model.state_scaling.fit(states[frame_rows(data.train_demos)], recipe.state_scaling)
        trainer.model.policy.normalizer.fit(torch.cat([demo.actions[:, :6] for demo in data.train_demos]))
    rows = (chunk_rows(demos, chunk_length) for demos in (data.train_demos, data.held_out_demos))
    return both_batches(*rows, config, options)


def both_batches(train_rows: Tensor, held_out_rows: Tensor, config: Config, options: dict) -> tuple[Batches, Batches]:
    """Training samples in an order that changes with the epoch, held-out ones as they are."""
    batch_size = config.training.batch_size
    return (
        Batches(train_rows, batch_size=batch_size, seed=config.training.seed, **options),
        Batches(held_out_rows, batch_size=batch_size, **options),
    )


# ----------------------------------------------------------------------------------------------------------- loop


class Training:
    """The loop of both phases: epochs of steps, each epoch ending with validation and checkpoints."""

    def __init__(
        self,
        trainer: StateVLATrainer,
        optimizer: torch.optim.Optimizer,
        batches: Batches,
        held_out_batches: Batches,
        config: Config,
        data: Data,
        device: torch.device,
    ):
        self.trainer, self.optimizer, self.config, self.device = trainer, optimizer, config, device
        self.batches, self.held_out_batches = batches, held_out_batches
        self.phase, self.settings = trainer.phase, config.training
        self.recipe = phase_settings(config, trainer.phase)
        self.num_epochs = self.recipe.num_epochs
        self.total_steps = self.num_epochs * len(batches)
        self.step, self.best_loss = 0, math.inf
        self.autocast = torch.autocast(
            device.type, torch.bfloat16, enabled=uses_bfloat16(config.training.precision, device)
        )
        self.ddp_trainer = trainer  # Apple's GPUs have no process group, hence one process and nothing to synchronise
        if device.type != "mps":
            self.ddp_trainer = DistributedDataParallel(
                trainer,
                device_ids=[device.index] if device.type == "cuda" else None,
                gradient_as_bucket_view=True,
            )
        # What a checkpoint keeps beside the guide's six keys: an evaluation needs no other file.
        self.facts = {
            "config": config.to_dict(),
            "phase": trainer.phase,
            "observation": data.observation,
            "language": {"encoder": data.language.encoder, "embeddings": data.language.embeddings},
            "held_out_demos": [demo.name for demo in data.held_out_demos],
        }

    def run(self, resumed: dict | None, resumed_from: str | None) -> None:
        """Trains from the first epoch, or from where `resumed` ended. A phase of 0 epochs is the untrained model,
        validated and kept like any other."""
        first_epoch = resumed["epoch"] if resumed else 0
        self.best_loss = resumed["best_loss"] if resumed else math.inf
        self.step = first_epoch * len(self.batches)
        self.log = RunLog(self.config, self.phase, resumed_from)
        if self.num_epochs == 0 and not resumed:
            self.end_epoch(0)
        for epoch in range(first_epoch, self.num_epochs):
            self.train_epoch(epoch)
            self.end_epoch(epoch + 1)
        done = f"phase {self.phase}: done after {self.step:,} steps"
        report(f"{done}, best validation loss {self.best_loss:.4f}, see {self.log.directory}")
        self.log.close()

    def train_epoch(self, epoch: int) -> None:
        self.batches.set_epoch(epoch)
        seed_epoch(self.settings.seed, epoch)
        title = f"phase {self.phase} epoch {epoch + 1}/{self.num_epochs}"
        progress = tqdm(self.batches, desc=title, disable=not is_first_rank())
        for batch in progress:
            losses = self.take_step(batch)
            self.log.add(losses)
            if self.step % self.settings.log_interval == 0 or self.step == self.total_steps:
                learning_rate = self.optimizer.param_groups[0]["lr"]
                means = self.log.write_training(epoch + 1, self.step, learning_rate, self.batches.waited)
                progress.set_postfix({name: f"{value:.3g}" for name, value in means.items()})

    def take_step(self, batch: dict) -> dict[str, Tensor]:
        """One step of the optimizer, and in phase 1 of the target encoder. Returns losses and gradient norm."""
        factor = learning_rate_factor(self.step, self.total_steps, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = self.optimizer.defaults["lr"] * factor
        if self.recipe.image_shift:
            batch = shift_pictures(batch, self.recipe.image_shift, self.config.model.image_size)
        with self.autocast:
            losses = self.ddp_trainer(batch)  # always through DDP: .module(...) skips the gradient sync
        losses["loss"].backward()
        gradient_norm = clip_grad_norm_(trained_by(self.trainer), self.settings.gradient_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.phase == 1:
            self.trainer.update_target(ema_momentum(self.step, self.total_steps, self.config))
        self.step += 1
        return losses | {"gradient_norm": gradient_norm}

    def end_epoch(self, epoch: int) -> None:
        """Validation and checkpoints after `epoch` epochs."""
        began = time.perf_counter()
        seed_epoch(self.settings.seed, 0)  # the noise of validation is the same in every epoch
        with self.autocast:
            metrics = validate(self.trainer, self.held_out_batches, self.device)
        self.log.write_validation(epoch, self.step, metrics)
        warn_of_collapse(metrics, self.config.model.state_dim)
        is_best = metrics["loss"] < self.best_loss
        self.best_loss = min(self.best_loss, metrics["loss"])
        if is_first_rank():
            checkpoint = self.facts | {
                "epoch": epoch,
                "step": self.step,
                "loss": metrics["loss"],
                "best_loss": self.best_loss,
                "model_state_dict": self.trainer.state_dict(),
                "optimizer_state_dict": self.optimizer.state_dict(),
            }
            save_checkpoint(checkpoint, self.log.directory / "checkpoint_latest.pt")
            if is_best:
                save_checkpoint(checkpoint, self.log.directory / "checkpoint_best.pt")
            if epoch and epoch % self.settings.save_interval == 0:
                save_checkpoint(checkpoint, self.log.directory / f"checkpoint_epoch_{epoch}.pt")
        dist.barrier()
        self.log.leave_out(time.perf_counter() - began)


# ------------------------------------------------------------------------------------------------------- settings


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Trains phase 1 (temporal JEPA) or phase 2 (flow matching) of StateVLA.",
        epilog="Several GPUs: torchrun --nproc_per_node=N train.py ...",
    )
    parser.add_argument("--config", default="conf/config.yaml", help="settings file (default: %(default)s)")
    parser.add_argument("--phase", type=int, required=True, help="1: encoder and predictor; 2: policy, encoder frozen")
    parser.add_argument("--phase1_checkpoint", help="phase 2 starts from the encoder in this file (default: none)")
    parser.add_argument("--checkpoint", help="resume from this file of the same phase (default: start anew)")
    parser.add_argument("--batch_size", type=int, help="samples a step and process (default: training.batch_size)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE",
        help="override one setting, e.g. training.phase1.num_epochs=5; may be repeated",
    )  # fmt: skip
    arguments = parser.parse_args()
    if arguments.phase not in PHASE_DIRECTORIES:
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


def phase_settings(config: Config, phase: int):
    return {1: config.training.phase1, 2: config.training.phase2}[phase]


def check_same_run(
    checkpoint: dict,
    path: str,
    config: Config,
    data: Data,
    resumes: bool,
) -> None:
    """Raises BadInput where the weights of a checkpoint don't fit this run's model, pictures, language or split.

    Phase 2 takes the encoder alone from phase 1, so there the policy's settings may differ."""
    if resumes and checkpoint["phase"] == 2:
        before, now = (
            settings["training"]["phase2"]["freeze_encoder"] for settings in (checkpoint["config"], config.to_dict())
        )
        if before != now:
            raise BadInput(f"{path}: training.phase2.freeze_encoder is {before}, a resumed run cannot have {now}")
    now = {"model": config.to_dict()["model"], "observation": data.observation}
    before = {"model": checkpoint["config"]["model"], "observation": checkpoint["observation"]}
    of_policy = () if resumes else ("action_seq_len", "policy_layers", "policy_embed_dim")
    for section in now:
        for key, value in now[section].items():
            if before[section].get(key) != value and key not in of_policy:
                raise BadInput(f"{path}: {section}.{key} is {before[section].get(key)}, but this run has {value}")
    if resumes:
        settings, earlier = config.to_dict()["training"], checkpoint["config"]["training"]
        elsewhere = {"save_interval", "log_interval", "device", "checkpoint_directory", "phase1", "phase2"}
        for key in [*sorted(settings.keys() - elsewhere), f"phase{checkpoint['phase']}"]:
            if settings[key] != earlier.get(key):
                report(f"note: training.{key} was {earlier.get(key)} and is now {settings[key]}")
    trained_with = LanguageTable(**checkpoint["language"])
    same_language(data.language, trained_with, config.data.data_directory)
    unseen, held_out = set(checkpoint["held_out_demos"]), {demo.name for demo in data.held_out_demos}
    if resumes and unseen != held_out:
        raise BadInput(
            f"{path}: it held out {len(unseen)} other demos than this run would; "
            "resume needs the same data and data.split_seed"
        )
    if not held_out <= unseen:
        report(f"note: {len(held_out - unseen)} demos held out here have trained the encoder in {path}")


# ------------------------------------------------------------------------------------------------------ processes


def join_processes(device_name: str) -> torch.device:
    """This process's device. A single process is a group of one, so that one code path trains on any number."""
    device = choose_device(device_name)
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if device.type == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise BadInput(
                f"process {local_rank} has no GPU: --nproc_per_node exceeds {torch.cuda.device_count()} GPU(s)"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if "RANK" in os.environ:  # set by torchrun
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return device


def is_first_rank() -> bool:
    return dist.get_rank() == 0


def report(line: str) -> None:
    if is_first_rank():
        print(line, flush=True)


def seed_epoch(seed: int, epoch: int) -> None:
    """Noise is drawn anew from here: different on every rank and in every epoch, the same in a resumed run."""
    torch.manual_seed((seed * 1_000_003 + epoch) * 1_009 + dist.get_rank())


# ------------------------------------------------------------------------------------------- optimizer, schedules


def trained_by(trainer: StateVLATrainer) -> list[Tensor]:
    """The parameters that the trainer's phase trains."""
    return [parameter for parameter in trainer.parameters() if parameter.requires_grad]


def make_optimizer(trainer: StateVLATrainer, learning_rate: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW. Biases, norms and what Mamba marks `_no_weight_decay` (A_log and D) are not decayed."""
    trainable = trained_by(trainer)
    kept = [p for p in trainable if p.ndim < 2 or getattr(p, "_no_weight_decay", False)]
    kept_ids = {id(p) for p in kept}
    decayed = [p for p in trainable if id(p) not in kept_ids]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, fused=trainable[0].device.type in ("cuda", "cpu"))


def restore_optimizer(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """The moments of an earlier run, under the settings of this one."""
    of_this_run = [{key: group[key] for key in ("weight_decay", "fused")} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, settings in zip(optimizer.param_groups, of_this_run, strict=True):
        group.update(settings)  # load_state_dict brings those of the run before


def learning_rate_factor(step: int, total_steps: int, config: Config) -> float:
    """Linear warm-up over training.warmup_steps, then constant, or a cosine down to 0 at the last step."""
    warmup = config.training.warmup_steps
    if step < warmup:
        return (step + 1) / warmup
    if config.training.learning_rate_schedule == "constant":
        return 1.0
    return (1 + math.cos(math.pi * (step - warmup) / max(total_steps - warmup, 1))) / 2


def uses_bfloat16(precision: str, device: torch.device) -> bool:
    """Under autocast matrix products are bfloat16; the scan's state, the losses and the weights stay float32."""
    return precision == "bf16" or (precision == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported())


def ema_momentum(step: int, total_steps: int, config: Config) -> float:
    """training.ema_momentum at the first step, rising along a cosine to 1.0 at the last."""
    start = config.training.ema_momentum
    if config.training.ema_momentum_schedule == "constant":
        return start
    return 1 - (1 - start) * (1 + math.cos(math.pi * step / max(total_steps - 1, 1))) / 2


# ------------------------------------------------------------------------------------------------------ validation


@torch.no_grad()
def validate(trainer: StateVLATrainer, batches: Batches, device: torch.device) -> dict[str, float]:
    """The losses over all held-out demos, whatever the batch size and the number of processes.

    Phase 1 adds what tells whether it works: `jepa_copy_mse`, the error of predicting that nothing changes (jepa_mse
    has to stay below it), and the mean std and effective rank of z (both near 0 where the representation collapses).
    """
    trainer.eval()
    rows: dict[str, list[Tensor]] = {}
    for batch in batches:
        outputs = trainer.phase1_outputs(batch) if trainer.phase == 1 else trainer.phase2_losses(batch, per_sample=True)
        for name, values in outputs.items():
            rows.setdefault(name, []).append(values)
    if dist.get_world_size() > 1:
        names = [None] * dist.get_world_size()
        dist.all_gather_object(names, {name: values[0].shape[1:] for name, values in rows.items()})
        for name, shape in max(names, key=len).items():  # a rank without a sample must take part all the same
            rows.setdefault(name, [torch.empty(0, *shape, device=device)])
    joined = {name: gather_rows(torch.cat(rows[name])) for name in sorted(rows)}
    trainer.train()
    if trainer.phase == 2:
        return {name: float(values.mean()) for name, values in joined.items()}
    metrics = trainer.phase1_losses(joined, gather=False)
    metrics["jepa_copy_mse"] = torch.nn.functional.mse_loss(joined["z_copied"], joined["z_next_target"])
    return {name: float(value) for name, value in (metrics | representation_health(joined["z_t"])).items()}


def warn_of_collapse(metrics: dict[str, float], state_dim: int) -> None:
    if "z_std" not in metrics:
        return
    if metrics["z_std"] < COLLAPSED_STD or metrics["effective_rank"] < COLLAPSED_RANK * state_dim:
        report(
            f"warning: the representation is collapsing (mean std of z {metrics['z_std']:.3f}, effective rank "
            f"{metrics['effective_rank']:.1f} of {state_dim}); see variance_weight and covariance_weight in the config"
        )


# ------------------------------------------------------------------------------------------------------------ log


class RunLog:
    """A run's folder, its metrics.jsonl and, where wandb.mode says so, its wandb run. Writes on the first rank only."""

    def __init__(self, config: Config, phase: int, resumed_from: str | None):
        self.directory = Path(config.training.checkpoint_directory) / PHASE_DIRECTORIES[phase]
        self.sums: dict[str, Tensor] = {}
        self.count, self.since, self.waited = 0, time.perf_counter(), 0.0
        self.samples_per_step = config.training.batch_size * dist.get_world_size()
        self.file = self.wandb_run = None
        if not is_first_rank():
            return
        continues = resumed_from is not None and Path(resumed_from).resolve().parent == self.directory.resolve()
        try:
            if not continues:
                set_aside(self.directory)
            self.directory.mkdir(parents=True, exist_ok=True)
            self.file = (self.directory / "metrics.jsonl").open("a")
        except OSError as problem:
            raise BadInput(
                f"training.checkpoint_directory: cannot write {self.directory} ({problem.strerror})"
            ) from None
        if config.wandb.mode != "disabled":
            import wandb

            try:
                self.wandb_run = wandb.init(
                    project=config.wandb.project, mode=config.wandb.mode, config=config.to_dict(), dir=self.directory,
                    name=PHASE_DIRECTORIES[phase],
                )  # fmt: skip
            except wandb.Error as problem:
                raise BadInput(f"wandb.mode is {config.wandb.mode}, but wandb says: {problem}") from None

    def add(self, values: dict[str, Tensor]) -> None:
        """Adds one step's values; nothing is copied from the device until a line is due."""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach()
        self.count += 1

    def write_training(self, epoch: int, step: int, learning_rate: float, waited: float) -> dict[str, float]:
        """One line with the means over the steps since the last and over all ranks (one all-reduce). `waited` are the
        seconds that all steps so far waited for data; the line has their share of the time since the last."""
        names = list(self.sums)
        totals = torch.stack([self.sums[name].float() for name in names])
        totals = totals.cpu() if totals.device.type == "mps" else totals  # gloo reduces CPU and CUDA tensors
        dist.all_reduce(totals)
        means = dict(zip(names, (totals / self.count / dist.get_world_size()).tolist(), strict=True))
        now = time.perf_counter()
        seconds = now - self.since
        line = {"split": "train", "epoch": epoch, "step": step, "learning_rate": learning_rate, **means}
        line["samples_per_s"] = self.samples_per_step * self.count / seconds
        line["waiting_for_data"] = (waited - self.waited) / seconds
        self._write(line)
        self.sums, self.count, self.since, self.waited = {}, 0, now, waited
        if not math.isfinite(means["loss"]):
            raise BadInput(f"training diverged: the loss is {means['loss']} at step {step}; lower the learning rate")
        return means

    def leave_out(self, seconds: float) -> None:
        """Time that was not spent on training steps."""
        self.since += seconds

    def write_validation(self, epoch: int, step: int, metrics: dict[str, float]) -> None:
        self._write({"split": "validation", "epoch": epoch, "step": step, **metrics})
        report("validation  " + "  ".join(f"{name} {value:.4g}" for name, value in metrics.items()))

    def _write(self, line: dict) -> None:
        if self.file:
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()
        if self.wandb_run:
            split = line["split"]
            self.wandb_run.log(
                {f"{split}/{name}": value for name, value in line.items() if name != "split"}, step=line["step"]
            )

    def close(self) -> None:
        if self.file:
            self.file.close()
        if self.wandb_run:
            self.wandb_run.finish()


def set_aside(directory: Path) -> None:
    """An earlier run's folder is renamed, never overwritten: starting anew loses nothing."""
    if not directory.is_dir() or not any(directory.iterdir()):
        return
    number = 1
    while (aside := directory.with_name(f"{directory.name}_earlier_{number}")).exists():
        number += 1
    directory.rename(aside)
    print(f"{directory}: the run that was there is kept as {aside}", flush=True)


if __name__ == "__main__":
    main()
