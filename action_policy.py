"""Phase 2: z_t -> a chunk of actions. Flow matching makes the six pose deltas, a classifier the gripper.

Both read z_t scaled with the statistics of the training frames (StateScaling; StateVLA does it).

Letters: B batch, H actions per chunk (10), D policy width. sigma = 0 is data, sigma = 1 is noise.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import ModelConfig
from jepa.mamba import MambaStack

POSE_DIM = 6  # x, y, z, rx, ry, rz: deltas in [-1, 1] of robosuite's OSC_POSE controller
CONSTANT_STD = 1e-6  # a dimension that varies less than this is constant: it is centred, not scaled


class Normalizer(nn.Module):
    """Standardises per dimension and back; the statistics are buffers and travel in the checkpoint. They start as NaN,
    so that forgetting to fit is loud."""

    mean: Tensor
    std: Tensor

    def __init__(self, dim: int):
        super().__init__()
        self.register_buffer("mean", torch.full((dim,), torch.nan))
        self.register_buffer("std", torch.full((dim,), torch.nan))

    def fit(self, values: Tensor, least_std: float = 0.0) -> None:
        """values (n, dim): those of the training demos alone. A dimension with less spread than `least_std` counts as
        having it; without one, what does not vary is not scaled."""
        values = values.cpu().double()  # Apple's GPUs have no float64
        std = values.std(dim=0, correction=0)
        self.mean.copy_(values.mean(dim=0).float())
        self.std.copy_(torch.where(std < CONSTANT_STD, least_std or 1.0, std.clamp(min=least_std)).float())

    def normalize(self, values: Tensor) -> Tensor:
        return (values - self.mean) / self.std

    def unnormalize(self, values: Tensor) -> Tensor:
        return values * self.std + self.mean


class StateScaling(nn.Module):
    """z_t as the policy reads it. A buffer of the model, NaN until it is fitted, so that forgetting it is loud.

    standardise: every dimension has mean 0 and variance 1. none: z as it is.
    """

    mean: Tensor
    transform: Tensor

    def __init__(self, dim: int):
        super().__init__()
        self.register_buffer("mean", torch.full((dim,), torch.nan))
        self.register_buffer("transform", torch.full((dim, dim), torch.nan))

    def fit(self, states: Tensor, kind: str = "standardise") -> None:
        """states (n, dim): those of the training demos alone."""
        states = states.cpu().double()
        mean, variance = states.mean(dim=0), states.var(dim=0, correction=0)
        if kind == "standardise":
            transform = torch.diag(torch.where(variance < CONSTANT_STD**2, 1.0, variance).rsqrt())
        else:
            mean, transform = torch.zeros_like(mean), torch.eye(len(mean), dtype=mean.dtype)
        self.mean.copy_(mean.float())
        self.transform.copy_(transform.float())

    def forward(self, z_t: Tensor) -> Tensor:
        """(B, dim) -> (B, dim)."""
        return (z_t - self.mean) @ self.transform


class SigmaEmbedding(nn.Module):
    """sigma (B,) in [0, 1] -> tokens (B, 1, D): sines and cosines of many frequencies, then an MLP."""

    frequencies: Tensor

    def __init__(self, dim: int):
        super().__init__()
        frequencies = torch.exp(torch.linspace(0, math.log(1000), dim // 2))
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.mlp = nn.Sequential(nn.Linear(2 * (dim // 2), 2 * dim), nn.SiLU(), nn.Linear(2 * dim, dim))

    def forward(self, sigma: Tensor) -> Tensor:
        angles = sigma[:, None] * self.frequencies  # (B, D / 2)
        return self.mlp(torch.cat([angles.sin(), angles.cos()], dim=-1)).unsqueeze(1)


class FlowMatchingPolicy(nn.Module):
    """Rectified flow (Liu et al. 2022; Lipman et al. 2023) over chunks of pose deltas, given z_t.

    The velocity network reads [sigma, z_t, a_noisy x H] = H + 2 tokens with Mamba and answers at the action tokens.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        dim = config.policy_embed_dim
        self.normalizer = Normalizer(POSE_DIM)
        self.embed_sigma = SigmaEmbedding(dim)
        self.embed_state = nn.Linear(config.state_dim, dim)
        self.embed_action = nn.Sequential(nn.Linear(POSE_DIM, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.positions = nn.Parameter(torch.empty(config.action_seq_len + 2, dim))
        nn.init.trunc_normal_(self.positions, std=0.02)
        self.mamba = MambaStack(config.policy_layers, dim, config.d_state, config.d_conv, config.expand, with_mlp=False)
        self.norm = nn.RMSNorm(dim, eps=1e-5)
        self.to_velocity = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, POSE_DIM))

    def velocity(self, x_sigma: Tensor, sigma_token: Tensor, state_token: Tensor) -> Tensor:
        """x_sigma (B, H, 6) normalised; sigma_token (B or 1, 1, D); state_token (B, 1, D) -> dx / dsigma (B, H, 6)."""
        B, H, _ = x_sigma.shape
        tokens = torch.cat([sigma_token.expand(B, -1, -1), state_token, self.embed_action(x_sigma)], dim=1)
        hidden = self.mamba(tokens + self.positions, last=H)  # (B, H, D)
        return self.to_velocity(self.norm(hidden))

    def loss(self, z_t: Tensor, pose_deltas: Tensor) -> Tensor:
        """z_t (B, state_dim); pose_deltas (B, H, 6) in robot units -> one loss a sample (B,)."""
        x_0 = self.normalizer.normalize(pose_deltas)
        noise = torch.randn_like(x_0)
        sigma = torch.rand(len(x_0), device=x_0.device)
        mix = sigma[:, None, None]
        x_sigma = (1 - mix) * x_0 + mix * noise
        target = noise - x_0  # d x_sigma / d sigma
        velocity = self.velocity(x_sigma, self.embed_sigma(sigma), self.embed_state(z_t).unsqueeze(1))
        return F.mse_loss(velocity, target, reduction="none").mean(dim=(1, 2))

    @torch.no_grad()
    def sample(self, z_t: Tensor, sample_steps: int, x_1: Tensor) -> Tensor:
        """Euler from sigma = 1 to 0. z_t (B, state_dim); x_1 (B, H, 6) the start -> (B, H, 6) in robot units."""
        state_token = self.embed_state(z_t).unsqueeze(1)  # (B, 1, D)
        sigmas = torch.arange(sample_steps, 0, -1, device=z_t.device, dtype=z_t.dtype) / sample_steps
        x = x_1.clone()
        for sigma_token in self.embed_sigma(sigmas).split(1):  # (1, 1, D), every step's embedded at once
            x.sub_(self.velocity(x, sigma_token, state_token), alpha=1 / sample_steps)
        return self.normalizer.unnormalize(x).clamp_(-1, 1)


class GripperClassifier(nn.Module):
    """z_t -> one logit a step: is the gripper closed (+1) rather than open (-1)?"""

    def __init__(self, config: ModelConfig):
        super().__init__()
        dim, state_dim = config.policy_embed_dim, config.state_dim
        self.mlp = nn.Sequential(
            nn.Linear(state_dim, dim), nn.GELU(), nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, config.action_seq_len)
        )

    def forward(self, z_t: Tensor) -> Tensor:
        return self.mlp(z_t)  # (B, H)

    def loss(self, z_t: Tensor, gripper: Tensor) -> Tensor:
        """z_t (B, state_dim); gripper (B, H) of -1 and +1 -> one binary cross entropy a sample (B,)."""
        labels = (gripper + 1) / 2  # {-1, 1} -> {0, 1}
        return F.binary_cross_entropy_with_logits(self(z_t), labels, reduction="none").mean(dim=1)

    @torch.no_grad()
    def sample(self, z_t: Tensor) -> Tensor:
        """z_t (B, state_dim) -> (B, H) of -1 and +1."""
        return torch.where(self(z_t) > 0, 1.0, -1.0)
