"""StateVLA, the model that runs on the robot, and StateVLATrainer, the module that train.py optimises in both phases.

    python statevla_model.py --config conf/config.yaml      prints the component table with the counts of a built model
    python statevla_model.py --export CHECKPOINT OUTPUT     a checkpoint's weights alone, to be handed on

Letters: B batch, H actions per chunk (10), D state_dim, K prediction gap, R rollout length.
"""

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from action_policy import POSE_DIM, FlowMatchingPolicy, GripperClassifier, Normalizer, StateScaling
from config import Config, ModelConfig, add_config_flags, load_config, parse_config
from errors import BadInput, exits_on_bad_input
from files import expanded
from jepa.temporal_predictor import Foresight, InverseDynamics, temporal_jepa_losses
from state_encoder import JEPAStateEncoder
from training.checkpoint import read_checkpoint, save_checkpoint, weights_alone


class StateVLA(nn.Module):
    """Observation -> z_t -> a chunk of ten actions.

    An observation is a dict: agentview_rgb and eye_in_hand_rgb (B, h, w, 3) uint8 in LIBERO's raw orientation,
    joint_states (B, 7) in rad, gripper_states (B, 2) in metres, language (B, lang_emb_dim).
    """

    def __init__(self, config: ModelConfig, predictor_hidden_dim: int = 512, predictor_dropout: float = 0.0):
        super().__init__()
        self.config = config
        self.state_encoder = JEPAStateEncoder(config, predictor_hidden_dim, predictor_dropout)
        self.state_scaling = StateScaling(config.state_dim)
        self.policy = FlowMatchingPolicy(config)
        self.gripper = GripperClassifier(config)

    def encode(self, obs: dict[str, Tensor]) -> Tensor:
        """-> z_t (B, D)."""
        return self.state_encoder(obs)

    @torch.no_grad()
    def predict(
        self,
        obs: dict[str, Tensor],
        sample_steps: int = 4,
        flow_start: str = "noise",
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """-> actions (B, H, 7): six pose deltas in robot units, [-1, 1], and the gripper, -1 (open) or +1 (close).

        The flow is integrated in `sample_steps` Euler steps from Gaussian noise or, with flow_start "zero", from the
        noise's mean, which makes the answer deterministic.
        """
        x_1 = self.start_of_flow(len(obs["language"]), flow_start, generator)
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
    """obs, x_1 -> actions, as StateVLA.encode and act, for one batch size: on CUDA recorded once and replayed.

    A decision is some thousand small kernels. Launching them one by one takes the CPU longer than the GPU needs to run
    them; a CUDA graph launches all of them at once. Elsewhere the model is simply called.
    """

    def __init__(self, model: StateVLA, obs: dict[str, Tensor], sample_steps: int):
        """`obs` is any observation of the batch size to come, on the model's device."""
        self.model, self.sample_steps = model, sample_steps
        self.graph = None
        if not obs["language"].is_cuda:
            return
        self.obs = {name: value.clone() for name, value in obs.items()}
        self.x_1 = model.start_of_flow(len(obs["language"]), "zero").to(obs["language"].device)
        side_stream = torch.cuda.Stream()
        side_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side_stream):  # what is chosen or allocated on first use must not be recorded
            for _ in range(3):
                self._decide()
        torch.cuda.current_stream().wait_stream(side_stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.actions = self._decide()

    def __call__(self, obs: dict[str, Tensor], x_1: Tensor) -> Tensor:
        if self.graph is None:
            with torch.no_grad():
                return self.model.act(self.model.encode(obs), x_1, self.sample_steps)
        for name, value in obs.items():
            self.obs[name].copy_(value, non_blocking=True)
        self.x_1.copy_(x_1, non_blocking=True)
        self.graph.replay()
        return self.actions.clone()

    @torch.no_grad()
    def _decide(self) -> Tensor:
        return self.model.act(self.model.encode(self.obs), self.x_1, self.sample_steps)


class GatherRanks(torch.autograd.Function):
    """Rows of all ranks, the same number on each: (B, D) -> (ranks * B, D). Every rank computes a loss from all rows;
    the gradient of its own rows is the sum of what all these losses say about them."""

    @staticmethod
    def forward(ctx, rows: Tensor) -> Tensor:
        shares = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(shares, rows.contiguous())
        return torch.cat(shares)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


class StateVLATrainer(nn.Module):
    """Routes between the phases: forward(batch) gives the losses of its phase, `loss` being the one to minimise.

    Phase 1 trains tokenizer, context encoder and temporal predictor (and the heads of inverse dynamics and foresight,
    where their weights are not 0); phase 2 trains flow policy and gripper classifier and, with `freeze_encoder` False,
    tokenizer and context encoder too. Everything else is frozen and stays in eval mode.
    """

    def __init__(
        self,
        model: StateVLA,
        phase: int,
        variance_weight: float = 1.0,
        covariance_weight: float = 0.04,
        inverse_dynamics_weight: float = 0.0,
        foresight_weight: float = 0.0,
        proprioception_masking: float = 0.0,
        vicreg_on: str = "both",
        freeze_encoder: bool = True,
        state_noise: float = 0.0,
    ):
        super().__init__()
        if phase not in (1, 2):
            raise ValueError(f"phase is {phase}, expected 1 or 2")
        self.model, self.phase = model, phase
        self.weights = {"jepa_mse": 1.0, "jepa_variance": variance_weight, "jepa_covariance": covariance_weight}
        self.proprioception_masking, self.vicreg_on = proprioception_masking, vicreg_on
        self.freeze_encoder, self.state_noise = freeze_encoder, state_noise
        self.inverse_dynamics = self.foresight = None
        encoder, state_dim = model.state_encoder, model.config.state_dim
        hidden_dim = encoder.predictor.project_state.out_features
        if phase == 1 and inverse_dynamics_weight > 0:
            self.weights["inverse_dynamics"] = inverse_dynamics_weight
            chunk_dim = model.config.prediction_gap * model.config.action_dim
            self.inverse_dynamics = InverseDynamics(state_dim, chunk_dim, hidden_dim)
        if phase == 1 and foresight_weight > 0:
            self.weights["foresight"] = foresight_weight
            self.foresight = Foresight(state_dim, model.config.robot_state_dim, hidden_dim)
            self.robot_normalizer = Normalizer(model.config.robot_state_dim)
        trained = {
            1: [encoder.tokenizer, encoder.encoder, encoder.predictor, self.inverse_dynamics, self.foresight],
            2: [model.policy, model.gripper, *([] if freeze_encoder else [encoder.tokenizer, encoder.encoder])],
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

    def forward(self, batch: dict) -> dict[str, Tensor]:
        """Phase 1: batch has actions (B, R * K, 7) and, frame by frame of the window, obs and next_obs (R * B), and for
        foresight robot_ahead (R * B, F, 9). Phase 2: z_t (B, D) or obs, and actions (B, H, 7)."""
        return self.phase1_losses(self.phase1_outputs(batch)) if self.phase == 1 else self.phase2_losses(batch)

    def phase1_outputs(self, batch: dict) -> dict[str, Tensor]:
        """What the losses are made of, before any statistics over the batch.

        From every frame of a window but its last the predictor goes on to the end of the window, on its own
        predictions: z_next_pred, with the EMA target z_next_target and the start z_copied of each, has
        R * (R + 1) / 2 * B rows.
        """
        encoder, B = self.model.state_encoder, len(batch["actions"])
        masked = None
        if self.training and self.proprioception_masking:
            masked = torch.rand(len(batch["obs"]["language"]), device=batch["actions"].device)
            masked = masked < self.proprioception_masking
        z_t = encoder(batch["obs"], masked)  # (R * B, D)
        z_next = encoder.target(batch["next_obs"])  # (R * B, D)
        R = len(z_t) // B
        actions = batch["actions"].unflatten(1, (R, -1)).transpose(0, 1).flatten(0, 1)  # (R * B, K, 7)

        predicted, predictions = z_t, []
        for step in range(R):
            predicted = encoder.predictor(predicted[: (R - step) * B], actions[step * B :])
            predictions.append(predicted)
        outputs = {
            "z_t": z_t,
            "z_next_pred": torch.cat(predictions),
            "z_next_target": torch.cat([z_next[step * B :] for step in range(R)]),
            "z_copied": torch.cat([z_t[: (R - step) * B] for step in range(R)]).detach(),
        }
        if self.inverse_dynamics is not None:
            outputs["actions_pred"] = self.inverse_dynamics(z_t, z_next)
            outputs["actions"] = actions.flatten(1)
        if self.foresight is not None:
            outputs["robot_foreseen"] = self.foresight(z_t)
            outputs["robot_ahead"] = self.robot_normalizer.normalize(batch["robot_ahead"])
        return outputs

    def phase1_losses(self, outputs: dict[str, Tensor], gather: bool = True) -> dict[str, Tensor]:
        """The losses over the global batch: with several processes the rows of all ranks are gathered first, so that
        variance and covariance are those of the joint batch. DDP averages gradients over ranks while the backward of
        the gathering sums them: together the gradient is that of one process with the joint batch."""
        with torch.autocast(outputs["z_t"].device.type, enabled=False):  # covariances in bfloat16 would be noise
            outputs = {name: rows.float() if rows.dtype == torch.bfloat16 else rows for name, rows in outputs.items()}
            if gather and dist.is_initialized() and dist.get_world_size() > 1:
                needed = {name: rows for name, rows in outputs.items() if name != "z_copied"}
                outputs = {name: GatherRanks.apply(rows) for name, rows in needed.items()}
            z_t, z_next_pred, z_next_target = (outputs[name] for name in ("z_t", "z_next_pred", "z_next_target"))
            losses = temporal_jepa_losses(z_t, z_next_pred, z_next_target, self.vicreg_on)
            if "actions_pred" in outputs:
                losses["inverse_dynamics"] = F.mse_loss(outputs["actions_pred"], outputs["actions"])
            if "robot_foreseen" in outputs:
                losses["foresight"] = F.mse_loss(outputs["robot_foreseen"], outputs["robot_ahead"])
        losses["loss"] = sum(self.weights[name] * value for name, value in losses.items())
        return losses

    def phase2_losses(self, batch: dict, per_sample: bool = False) -> dict[str, Tensor]:
        """Flow matching on the six pose deltas, BCE on the gripper. A frozen encoder's z_t carries no gradient."""
        if "z_t" in batch:
            z_t = batch["z_t"]
        else:
            with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_encoder):
                z_t = self.model.encode(batch["obs"])
        z_t = self.model.state_scaling(z_t)
        if self.training and self.state_noise:  # a policy that sees each frame many times would know it by heart
            z_t = z_t + self.state_noise * torch.randn_like(z_t)
        actions = batch["actions"]
        losses = {
            "pos_rot_loss": self.model.policy.loss(z_t, actions[..., :POSE_DIM]),
            "gripper_loss": self.model.gripper.loss(z_t, actions[..., POSE_DIM]),
        }
        losses["action_loss"] = losses["pos_rot_loss"] + losses["gripper_loss"]
        if not per_sample:
            losses = {name: value.mean() for name, value in losses.items()}
        losses["loss"] = losses["action_loss"]
        return losses

    def update_target(self, momentum: float) -> None:
        """One EMA step of the target encoder."""
        self.model.state_encoder.update_target(momentum)


def choose_device(name: str) -> torch.device:
    """auto takes CUDA, then Apple's MPS, then the CPU. Raises BadInput for a device that isn't there."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, there in available.items() if there)
    if name not in available:
        raise BadInput(f"device is '{name}', expected auto, cuda, mps or cpu")
    if not available[name]:
        raise BadInput(f"device {name} was asked for, but this PyTorch finds none; use auto or cpu")
    if name == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32: float32 products at eight times the speed
    return torch.device(name)


def build_trainer(config: Config, phase: int) -> StateVLATrainer:
    """Model and trainer of a run from its settings, freshly initialised."""
    recipe = config.training.phase1
    model = StateVLA(config.model, recipe.temporal_predictor_hidden_dim, recipe.predictor_dropout)
    model.state_encoder.encoder.mamba.checkpoint_activations = config.training.activation_checkpointing
    return StateVLATrainer(
        model,
        phase,
        variance_weight=recipe.variance_weight,
        covariance_weight=recipe.covariance_weight,
        inverse_dynamics_weight=recipe.inverse_dynamics_weight,
        foresight_weight=recipe.foresight_weight,
        proprioception_masking=recipe.proprioception_masking,
        vicreg_on=recipe.vicreg_on,
        freeze_encoder=config.training.phase2.freeze_encoder,
        state_noise=config.training.phase2.state_noise,
    )


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


def load_checkpoint(path: str | Path, device: str | torch.device = "cpu") -> StateVLA:
    """Rebuilds the model from a checkpoint alone, in eval mode. Raises BadInput as `read_checkpoint`."""
    return model_from_checkpoint(read_checkpoint(path), path).to(device)


def model_from_checkpoint(checkpoint: dict, source: str | Path) -> StateVLA:
    """As `load_checkpoint`, from a dictionary that `read_checkpoint` has read from the file `source`."""
    trainer = build_trainer(parse_config(checkpoint["config"], str(source)), checkpoint["phase"])
    load_weights(trainer, checkpoint["model_state_dict"], source)
    return trainer.model.eval()


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
        ("Robot State Tokenizer", count_parameters(tokenizer.robot_state), "joint(7) + gripper(2) -> 1 token"),
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
    parser = argparse.ArgumentParser(
        description="Prints the component table of the model that a config describes, or exports a checkpoint."
    )
    parser.add_argument(
        "--export",
        nargs=2,
        metavar=("CHECKPOINT", "OUTPUT"),
        type=expanded,
        help="write the weights of a phase-2 checkpoint alone",
    )
    add_config_flags(parser)
    arguments = parser.parse_args()
    if arguments.export:
        source, target = map(Path, arguments.export)
        save_checkpoint(weights_alone(read_checkpoint(source, phase=2)), target)
        print(f"{target}: {target.stat().st_size / 1e6:.1f} MB, weights alone")
        return
    config = load_config(arguments.config, arguments.set)
    print(component_table(build_trainer(config, phase=1).model))


if __name__ == "__main__":
    main()
