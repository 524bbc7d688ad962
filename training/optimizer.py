"""AdamW over what a phase trains, and the schedules of a run: learning rate, EMA momentum."""

import math

import torch
from torch import Tensor, nn

from config import Config


def trained_by(trainer: nn.Module) -> list[Tensor]:
    """The parameters that the trainer's phase trains."""
    return [parameter for parameter in trainer.parameters() if parameter.requires_grad]


def make_optimizer(trainer: nn.Module, learning_rate: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW. Biases, norms and what Mamba marks `_no_weight_decay` (A_log and D) are not decayed."""
    trained = trained_by(trainer)
    kept = [p for p in trained if p.ndim < 2 or getattr(p, "_no_weight_decay", False)]
    kept_ids = {id(p) for p in kept}
    decayed = [p for p in trained if id(p) not in kept_ids]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, fused=trained[0].device.type in ("cuda", "cpu"))


def restore_optimizer(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """The moments of an earlier run, under the settings of this one."""
    of_this_run = [{key: group[key] for key in ("weight_decay", "fused")} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, settings in zip(optimizer.param_groups, of_this_run, strict=True):
        group.update(settings)  # load_state_dict brings those of the run before


def backpropagate(loss: Tensor) -> None:
    """A loss that is not finite makes every gradient so, and DDP brings that to all processes: whatever one of them
    finds, all find the same norm of the gradient and skip the same steps."""
    loss.backward(torch.where(loss.isfinite(), 1.0, torch.nan).to(loss.dtype))


def learning_rate_factor(step: int, total_steps: int, config: Config) -> float:
    """Linear warm-up over training.warmup_steps, then constant, or a cosine that would be 0 one step after the last."""
    warmup = config.training.warmup_steps
    if step < warmup:
        return (step + 1) / warmup
    if config.training.learning_rate_schedule == "constant":
        return 1.0
    return (1 + math.cos(math.pi * (step - warmup) / max(total_steps - warmup, 1))) / 2


def ema_momentum(step: int, total_steps: int, config: Config) -> float:
    """training.ema_momentum at the first step, rising along a cosine to 1.0 at the last."""
    start = config.training.ema_momentum
    if config.training.ema_momentum_schedule == "constant":
        return start
    return 1 - (1 - start) * (1 + math.cos(math.pi * step / max(total_steps - 1, 1))) / 2
