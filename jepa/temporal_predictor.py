"""Phase 1's parts: what does the action do to the state? z_t, a_t -> z'_{t+K}, the heads beside it and VICReg's terms.
StateVLATrainer.phase1_losses puts them together.

Letters: B batch, D state_dim, K prediction gap (1 in the guide), A action (7).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FORESIGHT = (0, 5, 10, 20, 40)  # frames ahead: two seconds take the hand from the start to most targets
STD_EPSILON = 1e-4  # inside the square root of VICReg's std, against its infinite slope at 0


class TemporalPredictor(nn.Module):
    """Residual: z'_{t+K} = z_t + delta(z_t, a_t .. a_{t+K-1}). The last layer starts at zero, so training starts from
    the copy baseline z' = z_t."""

    def __init__(self, state_dim: int, action_dim: int, hidden_dim: int):
        super().__init__()
        self.project_state = nn.Linear(state_dim, hidden_dim)
        self.project_action = nn.Linear(action_dim, hidden_dim)
        self.mlp = nn.Sequential(
            nn.GELU(),
            nn.Identity(),  # weights keep the names that they have had since a dropout stood here
            nn.Linear(2 * hidden_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, state_dim),
        )
        for parameter in self.mlp[-1].parameters():  # at first the prediction is z_t itself
            nn.init.zeros_(parameter)

    def forward(self, z_t: Tensor, actions: Tensor) -> Tensor:
        """z_t (B, D); actions (B, K, A) in robot units, those between t and t + K -> z'_{t+K} (B, D)."""
        projections = [self.project_state(z_t), self.project_action(actions.flatten(1))]
        return z_t + self.mlp(torch.cat(projections, dim=-1))


class Foresight(nn.Module):
    """Where does the demonstrator go? z_t -> the robot's own state now and FORESIGHT frames ahead, without the actions.

    Without them the arm's future depends on where the target is and on what was asked for, so z_t has to know both; and
    now means that an arm whose joints were hidden has to be seen.
    """

    def __init__(self, state_dim: int, robot_state_dim: int, hidden_dim: int):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(state_dim, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, len(FORESIGHT) * robot_state_dim)
        )

    def forward(self, z_t: Tensor) -> Tensor:
        """z_t (B, D) -> (B, F, robot_state_dim), standardised per dimension."""
        return self.mlp(z_t).unflatten(1, (len(FORESIGHT), -1))


class InverseDynamics(nn.Module):
    """Which actions lead from z_t to z_{t+K}? (B, D), (B, D) -> (B, K * A). Keeps what the arm does in z."""

    def __init__(self, state_dim: int, action_dim: int, hidden_dim: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2 * state_dim, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, action_dim))

    def forward(self, z_t: Tensor, z_next: Tensor) -> Tensor:
        return self.mlp(torch.cat([z_t, z_next], dim=-1))


def variance_loss(z: Tensor) -> Tensor:
    """VICReg (Bardes et al. 2022), eq. 1: mean over dimensions of max(0, 1 - std). z (B, D) -> scalar, 0 is best."""
    return F.relu(1 - torch.sqrt(z.var(dim=0) + STD_EPSILON)).mean()


def covariance_loss(z: Tensor) -> Tensor:
    """VICReg, eq. 3 and 4: sum of the squared off-diagonal covariances over D. z (B, D) -> scalar, 0 is best."""
    centred = z - z.mean(dim=0)
    covariance = centred.T @ centred / (len(z) - 1)  # (D, D)
    return (covariance.square().sum() - covariance.diagonal().square().sum()) / z.shape[1]


@torch.no_grad()
def representation_health(z: Tensor) -> dict[str, Tensor]:
    """Signs of collapse. z (B, D) -> z_std, the mean std of a dimension (0 is collapse), and effective_rank, the
    exponential of the entropy of the covariance spectrum (Roy & Vetterli 2007), at most min(B - 1, D). Both NaN where z
    is not finite, of which there is no spectrum."""
    if not z.isfinite().all():
        return {"z_std": z.new_tensor(torch.nan), "effective_rank": z.new_tensor(torch.nan)}
    singular_values = torch.linalg.svdvals((z - z.mean(dim=0)).cpu().double())
    spectrum = singular_values.square() / singular_values.square().sum().clamp_min(1e-30)
    entropy = -(spectrum * spectrum.clamp_min(1e-30).log()).sum()
    return {"z_std": z.std(dim=0).mean(), "effective_rank": entropy.exp()}
