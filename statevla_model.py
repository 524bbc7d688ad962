"""StateVLA, the model that runs on the robot, and StateVLATrainer, the module that train.py optimises in both phases.

    python statevla_model.py --config conf/config.yaml      prints the component table with the counts of a built model

Letters: B batch, H actions per chunk (10), D state_dim, K prediction gap, F frames of foresight, R robot_state_dim.
"""

import argparse
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

from action_policy import POSE_DIM, FlowMatchingPolicy, GripperClassifier, Normalizer, StateScaling
from config import Config, ModelConfig, TrainingConfig, add_config_flags, load_config, parse_config
from demos.instructions import canonical_instruction
from demos.language import LanguageTable
from errors import BadInput, exits_on_bad_input
from jepa.all_ranks import rows_of_all_ranks
from jepa.gaze import losses_of_looks
from jepa.mamba import backend
from jepa.precision import blocks_in_bfloat16, in_precision
from jepa.temporal_predictor import (
    Foresight,
    InverseDynamics,
    covariance_loss,
    representation_health,
    variance_loss,
)
from jepa.tokenizer import resize_images
from observation import CAMERAS, state_of_width
from state_encoder import JEPAStateEncoder
from training.checkpoint import read_checkpoint

# training.phase1.place_of -> the labels that the head of place tells, (B, 3) each
PLACED = {
    "target": ("target_place",),
    "target_and_goal": ("target_place", "goal_place"),
    "target_goal_and_hand": ("target_place", "goal_place", "end_effector_place"),
}


class StateVLA(nn.Module):
    """Observation -> z_t -> a chunk of ten actions.

    An observation is a dict: agentview_rgb and eye_in_hand_rgb (B, h, w, 3) uint8 in LIBERO's raw orientation,
    language (B, lang_emb_dim) and the parts of the robot state that the model reads, `robot_state`: joint_states (B, 7)
    in rad and gripper_states (B, 2) in metres, or ee_pos (B, 3) in metres, ee_ori (B, 3) in rad and gripper_states.
    """

    def __init__(self, config: ModelConfig, predictor_hidden_dim: int = 512):
        super().__init__()
        self.config = config
        self.robot_state = state_of_width(config.robot_state_dim)  # names and widths of its parts
        self.state_encoder = JEPAStateEncoder(config, predictor_hidden_dim)
        self.state_scaling = StateScaling(config.state_dim)
        self.policy = FlowMatchingPolicy(config)
        self.gripper = GripperClassifier(config)
        # What a checkpoint brings beside the weights:
        self.language: LanguageTable | None = None  # the instructions that it knows
        self.flow_start = "noise"  # training.phase2.flow_start

    def encode(self, obs: dict[str, Tensor]) -> Tensor:
        """-> z_t (B, D)."""
        return self.state_encoder(obs)

    def decide(self, obs: dict[str, np.ndarray], instruction: str, **sampling) -> np.ndarray:
        """One frame's observation (observation.py) and what the robot is told -> actions (H, 7), as `predict`, whose
        other arguments are `sampling`. Raises BadInput as `batch_of`."""
        return self.predict(self.batch_of(obs, instruction), **sampling).squeeze(0).cpu().numpy()

    def batch_of(self, obs: dict[str, np.ndarray], instruction: str) -> dict[str, Tensor]:
        """One frame's observation and what the robot is told, as a batch of one on the model's device.

        Raises BadInput where the model came without a language table, its table lacks the instruction, or the
        observation lacks a camera or a part of the robot state.
        """
        if self.language is None:
            raise BadInput("this model knows no instruction; `load_checkpoint` brings those that it was trained on")
        names = (*CAMERAS, *self.robot_state)
        if missing := [name for name in names if name not in obs]:
            raise BadInput(f"the observation lacks {', '.join(missing)}; this model reads {', '.join(names)}")
        frame = {name: torch.from_numpy(np.ascontiguousarray(obs[name])) for name in names}
        frame["language"] = self.language[canonical_instruction(instruction)]
        device = self.policy.positions.device
        return {name: value.unsqueeze(0).to(device) for name, value in frame.items()}

    @torch.no_grad()
    def predict(
        self,
        obs: dict[str, Tensor],
        sample_steps: int = 4,
        flow_start: str | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """-> actions (B, H, 7): six pose deltas in robot units, [-1, 1], and the gripper, -1 (open) or +1 (close).

        The flow is integrated in `sample_steps` Euler steps from Gaussian noise or, with flow_start "zero", from the
        noise's mean, which makes the answer deterministic; None is the checkpoint's own.
        """
        x_1 = self.start_of_flow(len(obs["language"]), flow_start or self.flow_start, generator)
        return self.act(self.encode(obs), x_1, sample_steps)

    def start_of_flow(self, batch: int, flow_start: str, generator: torch.Generator | None = None) -> Tensor:
        """-> x_1 (B, H, 6) where the generator lives, so that one on the CPU gives every device the same noise."""
        shape = (batch, self.config.action_seq_len, POSE_DIM)
        device = generator.device if generator else self.policy.positions.device
        if flow_start == "noise":
            return torch.randn(shape, generator=generator, device=device)
        return torch.zeros(shape, device=device)

    @torch.no_grad()
    def act(self, z_t: Tensor, x_1: Tensor, sample_steps: int) -> Tensor:
        """z_t (B, D), the flow's start x_1 (B, H, 6) -> actions (B, H, 7), as `predict`."""
        z_t = self.state_scaling(z_t)
        pose_deltas = self.policy.sample(z_t, sample_steps, x_1.to(z_t))  # (B, H, 6)
        return torch.cat([pose_deltas, self.gripper.sample(z_t).unsqueeze(-1)], dim=-1)


class RecordedDecision:
    """obs, x_1 -> actions, as StateVLA.encode and act, for one batch size and pictures of any size: on CUDA recorded
    once and replayed.

    A decision is some thousand small kernels. Launching them one by one takes the CPU longer than the GPU needs to run
    them; a CUDA graph launches all of them at once. Elsewhere the model is simply called.
    """

    def __init__(self, model: StateVLA, obs: dict[str, Tensor], sample_steps: int, precision: str = "fp32"):
        """`obs` is any observation of the batch size to come, on the model's device; `precision` is fp32 or bf16, as
        jepa.precision.choose_precision gives it. In each of them the same observation gives the same bits every time,
        with the same number of rows and threads. The weights have to stay as they are as long as this is used."""
        self.model, self.sample_steps, self.precision = model, sample_steps, precision
        self.packed: dict[nn.Module, Any] = {}
        self.graph = None
        if not obs["language"].is_cuda:
            return
        self.obs = {name: value.clone() for name, value in self._at_one_size(obs).items()}
        self.x_1 = model.start_of_flow(len(obs["language"]), "zero").to(obs["language"].device)
        side_stream = torch.cuda.Stream()
        side_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side_stream):  # what is chosen or allocated on first use must not be recorded
            for _ in range(3):
                self._decide(self.obs, self.x_1)
        torch.cuda.current_stream().wait_stream(side_stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.actions = self._decide(self.obs, self.x_1)

    def __call__(self, obs: dict[str, Tensor], x_1: Tensor) -> Tensor:
        if self.graph is None:
            return self._decide(obs, x_1)
        for name, value in self._at_one_size(obs).items():
            self.obs[name].copy_(value, non_blocking=True)
        self.x_1.copy_(x_1, non_blocking=True)
        self.graph.replay()
        return self.actions.clone()

    def _at_one_size(self, obs: dict[str, Tensor]) -> dict[str, Tensor]:
        """With the model's pictures, as its tokenizer would make them: a recorded decision has its shapes for ever."""
        size = self.model.config.image_size
        return obs | {camera: resize_images(obs[camera], size).permute(0, 2, 3, 1) for camera in CAMERAS}

    @torch.no_grad()
    def _decide(self, obs: dict[str, Tensor], x_1: Tensor) -> Tensor:
        with in_precision(self.precision, obs["language"].device, self.packed):
            return self.model.act(self.model.encode(obs), x_1, self.sample_steps)


class StateVLATrainer(nn.Module):
    """Routes between the phases: forward(batch) gives the losses of its phase, `loss` being the one to minimise.

    Phase 1 trains tokenizer, context encoder and temporal predictor (and the heads of inverse dynamics, foresight and
    place, where their weights are not 0); phase 2 trains flow policy and gripper classifier and, with `freeze_encoder`
    False, tokenizer and context encoder too. Everything else is frozen and stays in eval mode.
    """

    def __init__(self, model: StateVLA, phase: int, config: TrainingConfig | None = None):
        """`config` is that of conf/config.yaml unless given."""
        super().__init__()
        if phase not in (1, 2):
            raise ValueError(f"phase is {phase}, expected 1 or 2")
        config = config or load_config().training
        recipe = config.phase1
        self.model, self.phase = model, phase
        self.weights = {
            "jepa_mse": 1.0, "jepa_variance": recipe.variance_weight, "jepa_covariance": recipe.covariance_weight,
        }  # fmt: skip
        self.proprioception_masking, self.vicreg_on = recipe.proprioception_masking, recipe.vicreg_on
        self.freeze_encoder, self.state_noise = config.phase2.freeze_encoder, config.phase2.state_noise
        self.gripper_noise = config.phase2.gripper_noise
        self.inverse_dynamics = self.foresight = None
        self.place = None
        self.placed = PLACED[recipe.place_of]
        if phase == 1:
            gaze, place = float(model.config.gaze), float(recipe.place_weight > 0)
            taught = {
                "gaze": gaze * recipe.gaze_weight, "gaze_scenes": gaze * recipe.gaze_scenes_weight,
                "place": recipe.place_weight, "place_scenes": place * recipe.place_scenes_weight,
            }  # fmt: skip
            self.weights |= {name: weight for name, weight in taught.items() if weight > 0}
        encoder, state_dim = model.state_encoder, model.config.state_dim
        hidden_dim = encoder.predictor.project_state.out_features
        if phase == 1 and recipe.inverse_dynamics_weight > 0:
            self.weights["inverse_dynamics"] = recipe.inverse_dynamics_weight
            chunk_dim = model.config.prediction_gap * model.config.action_dim
            self.inverse_dynamics = InverseDynamics(state_dim, chunk_dim, hidden_dim)
        if phase == 1 and recipe.foresight_weight > 0:
            self.weights["foresight"] = recipe.foresight_weight
            self.foresight = Foresight(state_dim, model.config.robot_state_dim, hidden_dim)
            self.robot_normalizer = Normalizer(model.config.robot_state_dim)
        if "place" in self.weights:
            width = 3 * len(self.placed)
            self.place, self.place_normalizer = nn.Linear(state_dim, width), Normalizer(width)
        trained: dict[int, list[nn.Module | None]] = {
            1: [
                encoder.tokenizer,
                encoder.encoder,
                encoder.predictor,
                self.inverse_dynamics,
                self.foresight,
                self.place,
            ],
            2: [model.policy, model.gripper, *([] if self.freeze_encoder else [encoder.tokenizer, encoder.encoder])],
        }
        self.trained = [module for module in trained[phase] if module is not None]  # a plain list: registers nothing
        self.requires_grad_(False)
        for module in self.trained:
            module.requires_grad_(True)
        self.train()

    def train(self, mode: bool = True) -> "StateVLATrainer":
        super().train(False)
        for module in self.trained:
            module.train(mode)
        self.training = mode
        return self

    def forward(self, *batches: dict) -> dict[str, Tensor]:
        """The losses of a step over one batch or, as those of one batch of all their rows, over several.

        Phase 1: a batch has obs, next_obs (K frames later) and actions (B, K, 7) between them, for foresight
        robot_ahead (B, F, 9 or 8), for gaze target_at (B, 2, 2), for place target_place (B, 3), and for both scenes
        (demos/scenes.py). Phase 2: z_t (B, D) or obs, and actions (B, H, 7)."""
        if self.phase == 1:
            return self.phase1_losses(batches)
        of_batches = [self.kept_small(self.phase2_losses, batch, len(batches)) for batch in batches]
        return {name: torch.stack([losses[name] for losses in of_batches]).mean() for name in of_batches[0]}

    def kept_small(self, function: Callable, batch: dict, batches: int) -> dict[str, Tensor]:
        """function(batch). Where a step has several batches, only what it returns is kept of it, and backward, which
        goes through the batches one after the other, computes the rest once more, with the same noise (GradCache,
        Gao et al. 2021): memory is that of one batch."""
        if batches == 1:
            return function(batch)
        bfloat16 = backend.bfloat16
        return torch.utils.checkpoint.checkpoint(
            function, batch, use_reentrant=False, context_fn=lambda: (nullcontext(), blocks_in_bfloat16(bfloat16))
        )

    def phase1_losses(self, batches: Iterable[dict], counted: bool = True) -> dict[str, Tensor]:
        """Temporal JEPA: MSE to the EMA target + VICReg (Bardes et al. 2022), beside it the heads that are on.

        The losses are over all rows of the batches, which are all held-out ones in validation, and of all ranks, so
        that variance and covariance are those of the joint batch. Rows that are not `counted` stand in for none of this
        rank. In eval mode the signs of collapse stand beside the losses.
        """
        number = len(batches) if isinstance(batches, tuple) else 1  # those of validation come one by one
        parts = [self.kept_small(self.phase1_rows, batch, number) for batch in batches]
        with torch.autocast(parts[0]["actions"].device.type, enabled=False):  # covariances in bfloat16 would be noise
            own = {name: in_float32([part[name] for part in parts]) for name in parts[0]}
            rows = {name: rows_of_all_ranks(values if counted else values[:0]) for name, values in own.items()}
            z_t, z_next_pred, z_next_target = (rows[name] for name in ("z_t", "z_next_pred", "z_next_target"))
            regularised = [z_t, z_next_pred] if self.vicreg_on == "both" else [z_t]  # z_t is what phase 2 consumes
            losses: dict[str, Tensor] = {
                "jepa_mse": F.mse_loss(z_next_pred, z_next_target),
                "jepa_variance": torch.stack([variance_loss(z) for z in regularised]).mean(),
                "jepa_covariance": torch.stack([covariance_loss(z) for z in regularised]).mean(),
            }
            if self.inverse_dynamics is not None:
                told = self.inverse_dynamics(z_t, z_next_target)  # (B, K * 7)
                losses["inverse_dynamics"] = F.mse_loss(told, rows["actions"].flatten(1))
            if self.foresight is not None:
                foreseen = self.foresight(z_t)  # (B, F, R)
                losses["foresight"] = F.mse_loss(foreseen, self.robot_normalizer.normalize(rows["robot_ahead"]))
            for name, z in (("place", z_t), ("place_scenes", rows.get("scenes_z"))):
                if self.place is not None and z is not None and name in self.weights:
                    truth, told = self.place_normalizer.normalize(rows[f"{name}_truth"]), self.place(z)  # (B, 3 to 9)
                    known = truth.isfinite()
                    errors = (told - torch.where(known, truth, told.detach())).square()
                    losses[name] = errors.sum() / known.sum().clamp_min(1)
            signs: dict[str, Tensor] = {}
            for name in ("gaze", "gaze_scenes"):
                if f"{name}_loss" in rows:
                    in_view = rows[f"{name}_in_view"].sum(0).clamp_min(1)  # (2,) rows of each camera
                    losses[name] = (rows[f"{name}_loss"].sum(0) / in_view).sum()
                    in_agentview, in_hand = rows[f"{name}_found"].sum(0) / in_view
                    signs |= {f"{name}_found": in_agentview, f"{name}_found_in_hand": in_hand}
            weighted = (self.weights[name] * value for name, value in losses.items())
            losses["loss"] = sum(weighted, start=torch.zeros_like(losses["jepa_mse"]))
            if not self.training:
                losses |= {"jepa_copy_mse": F.mse_loss(z_t, z_next_target), **representation_health(z_t), **signs}
        return losses

    def phase1_rows(self, batch: dict) -> dict[str, Tensor]:
        """What phase 1's losses are made of: z_t, z_next_pred and z_next_target (B, D), and some of the batch."""
        encoder = self.model.state_encoder
        tokenizer, looks = encoder.tokenizer, encoder.tokenizer.looks(batch["obs"])
        part = {"z_t": encoder(batch["obs"], self.hidden_arms(batch["actions"]), looks)}  # (B, D)
        if "gaze" in self.weights:
            taught = losses_of_looks(tokenizer.eyes, looks, batch["target_at"])  # (B, 2) each
            part |= {f"gaze_{name}": values for name, values in taught.items()}
        if "place" in self.weights:
            part["place_truth"] = self.places_in(batch)  # (B, 3 to 9), NaN where it is not known
        if "scenes" in batch:
            part |= self.scenes_rows(batch["scenes"])
        part["z_next_pred"] = encoder.predictor(part["z_t"], batch["actions"])  # (B, D), z_t + delta
        part["z_next_target"] = encoder.target(batch["next_obs"])  # (B, D), the EMA copy's, no gradient
        return part | {
            name: batch[name] for name in ("actions", "robot_ahead") if name in batch
        }  # (B, K, 7), (B, F, R)

    def scenes_rows(self, scenes: dict) -> dict[str, Tensor]:
        """The part of scenes without a demonstration in phase 1's losses: what the eyes say and, for place, z (B, D).
        Their robot token is hidden as often as that of demonstrations: a policy's hand comes near what it looks for."""
        encoder = self.model.state_encoder
        looks, part = encoder.tokenizer.looks(scenes), dict[str, Tensor]()
        if "gaze_scenes" in self.weights:
            taught = losses_of_looks(encoder.tokenizer.eyes, looks, scenes["target_at"])
            part |= {f"gaze_scenes_{name}": values for name, values in taught.items()}
        if "place_scenes" in self.weights:
            z = encoder(scenes, self.hidden_arms(scenes["language"]), looks)
            part |= {"scenes_z": z, "place_scenes_truth": self.places_in(scenes)}
        return part

    def places_in(self, labels: dict[str, Tensor]) -> Tensor:
        """What the head of place is to tell, (B, 3) for each of PLACED."""
        return torch.cat([labels[name] for name in self.placed], dim=1)

    def hidden_arms(self, rows: Tensor) -> Tensor | None:
        """Which of rows (B, ...) have their robot token hidden, (B,) bool: there the arm must be seen; in training."""
        if not (self.training and self.proprioception_masking):
            return None
        return torch.rand(len(rows), device=rows.device) < self.proprioception_masking

    def phase2_losses(self, batch: dict, per_sample: bool = False) -> dict[str, Tensor]:
        """Flow matching on the six pose deltas, BCE on the gripper. A frozen encoder's z_t carries no gradient."""
        if "z_t" in batch:
            z_t = batch["z_t"]
        else:
            with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_encoder):
                z_t = self.model.encode(batch["obs"])
        z_t = self.model.state_scaling(z_t)
        of_policy = of_gripper = z_t
        if self.training and self.state_noise:  # a policy that sees each frame many times would know it by heart
            of_policy = of_gripper = z_t + self.state_noise * torch.randn_like(z_t)
        if self.training and self.gripper_noise is not None:
            of_gripper = z_t + self.gripper_noise * torch.randn_like(z_t)
        actions = batch["actions"]
        losses = {
            "pos_rot_loss": self.model.policy.loss(of_policy, actions[..., :POSE_DIM]),
            "gripper_loss": self.model.gripper.loss(of_gripper, actions[..., POSE_DIM]),
        }
        losses["action_loss"] = losses["pos_rot_loss"] + losses["gripper_loss"]
        if not per_sample:
            losses = {name: value.mean() for name, value in losses.items()}
        losses["loss"] = losses["action_loss"]
        return losses

    @torch.no_grad()
    def see(self, obs: dict[str, np.ndarray], instruction: str) -> tuple[np.ndarray | None, np.ndarray | None]:
        """One frame, as `StateVLA.decide` -> where each eye looks (2, 2), the middle of its highest cell, and where
        place tells the object to be, and what else it tells, (3,) each in metres; None without eyes, or that head."""
        batch, encoder = self.model.batch_of(obs, instruction), self.model.state_encoder
        looks = encoder.tokenizer.looks(batch)
        at = [eye.cells[look.scores.argmax()] for eye, look in zip(encoder.tokenizer.eyes, looks, strict=True)]
        place = None
        if self.place is not None:
            place = self.place_normalizer.unnormalize(self.place(encoder(batch, looks=looks))).squeeze(0).cpu().numpy()
        return torch.stack(at).cpu().numpy() if at else None, place

    def update_target(self, momentum: float) -> None:
        """One EMA step of the target encoder."""
        self.model.state_encoder.update_target(momentum)


def in_float32(rows: Sequence[Tensor]) -> Tensor:
    """Joins rows; those in bfloat16, under autocast, become float32."""
    joined = torch.cat(list(rows))
    return joined.float() if joined.dtype == torch.bfloat16 else joined


def build_trainer(config: Config, phase: int) -> StateVLATrainer:
    """Model and trainer of a run from its settings, freshly initialised."""
    model = StateVLA(config.model, config.training.phase1.temporal_predictor_hidden_dim)
    model.state_encoder.encoder.mamba.checkpoint_activations = config.training.activation_checkpointing
    return StateVLATrainer(model, phase, config.training)


def load_weights(module: nn.Module, found: dict[str, Tensor], source: str | Path) -> None:
    """Loads a state dict strictly; a missing, surplus or differently shaped weight is named."""
    expected = module.state_dict()
    for name in sorted(expected.keys() ^ found.keys()):
        there = "lacks" if name in expected else "has the unknown"
        raise BadInput(f"{source}: model_state_dict {there} weight {name}; was it made with other settings?")
    for name, value in expected.items():
        if value.shape != found[name].shape:
            raise BadInput(
                f"{source}: weight {name} has shape {tuple(found[name].shape)}, the config expects {tuple(value.shape)}"
            )
    module.load_state_dict(found, strict=True)


def load_encoder(model: StateVLA, checkpoint: dict, source: str | Path) -> None:
    """Loads from a phase-1 checkpoint what phase 2 takes over, tokenizer, encoder, target and predictor, strictly."""
    prefix = "model.state_encoder."
    weights = checkpoint["model_state_dict"]
    found = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    load_weights(model.state_encoder, found, source)


def load_checkpoint(source: str | Path, device: str | torch.device = "cpu") -> StateVLA:
    """Rebuilds the model from a checkpoint alone, in eval mode, with the instructions that it was trained on: ready to
    `decide`. source: a file, a folder of export_policy.py, or hf://owner/name. Raises BadInput as `read_checkpoint`."""
    return model_from_checkpoint(read_checkpoint(source), source).to(device)


def model_from_checkpoint(checkpoint: dict, source: str | Path) -> StateVLA:
    """As `load_checkpoint`, from a dictionary that `read_checkpoint` has read from the file `source`."""
    return trainer_from_checkpoint(checkpoint, source).model


def trainer_from_checkpoint(checkpoint: dict, source: str | Path) -> StateVLATrainer:
    """The same with the heads of its phase, in eval mode."""
    config = parse_config(checkpoint["config"], str(source))
    trainer = build_trainer(config, checkpoint["phase"])
    load_weights(trainer, checkpoint["model_state_dict"], source)
    trainer.model.language = LanguageTable(**checkpoint["language"])
    trainer.model.flow_start = config.training.phase2.flow_start
    return trainer.eval()


def count_parameters(*modules: nn.Module) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def component_table(model: StateVLA) -> str:
    """The guide's component table with the counts of this very model."""
    config, encoder = model.config, model.state_encoder
    tokenizer = encoder.tokenizer
    on_robot = count_parameters(tokenizer, encoder.encoder, model.policy, model.gripper)
    rows = [
        (
            "Image Tokenizer",
            count_parameters(tokenizer.agentview, tokenizer.eye_in_hand),
            "two cameras, Conv2d patches",
        ),
        (
            "Language Tokenizer",
            count_parameters(tokenizer.language),
            f"Linear {config.lang_emb_dim} -> {config.embed_dim}",
        ),
        (
            "Robot State Tokenizer",
            count_parameters(tokenizer.robot_state),
            " + ".join(f"{name}({width})" for name, width in model.robot_state.items()) + " -> 1 token",
        ),
        *([("Gaze", count_parameters(*tokenizer.eyes), "an eye a camera -> 2 tokens")] if tokenizer.eyes else []),
        ("CLS token", tokenizer.cls.numel(), "last position, z_t is read here"),
        ("Context Encoder", count_parameters(encoder.encoder), f"Mamba x {config.encoder_depth}"),
        ("Target Encoder", 0, f"EMA copy, no gradient ({count_parameters(encoder.target):,} values)"),
        ("Temporal Predictor", count_parameters(encoder.predictor), "phase 1 only, residual"),
        ("Flow Matching Policy", count_parameters(model.policy), f"Mamba x {config.policy_layers}"),
        ("Gripper Classifier", count_parameters(model.gripper), f"MLP -> {config.action_seq_len} logits"),
        ("On the robot", on_robot, "tokenizers + context encoder + policy + gripper"),
    ]
    lines = [f"{'Component':<24}{'Parameters':>12}  Description"]
    return "\n".join(lines + [f"{name:<24}{count:>12,}  {description}" for name, count, description in rows])


@exits_on_bad_input
def main() -> None:
    parser = argparse.ArgumentParser(description="Prints the component table of the model that a config describes.")
    add_config_flags(parser)
    arguments = parser.parse_args()
    config = load_config(arguments.config, arguments.set)
    print(component_table(build_trainer(config, phase=1).model))


if __name__ == "__main__":
    main()
